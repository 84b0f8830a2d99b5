//! A front-end of another make, the one of the rust-vmm project, with a driver of the test's own.

use std::path::PathBuf;

use nix::sys::signal::Signal;
use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::rig::cell::Cell;
use crate::rig::directory::Directory;
use crate::rig::hythe::Hythe;
use crate::rig::site::Site;
use crate::rig::wait::{wait_for, wait_until};
use crate::ring::{Memory, NEXT, Ring, START, WRITE};
use crate::world::queues;

/// Features by their bits (virtio 1.3, 5.1.3 and 6; vhost-user).
const CSUM: u32 = 0;
pub const MRG_RXBUF: u32 = 15;
pub const CTRL_VQ: u32 = 17;
pub const MQ: u32 = 22;
const PROTOCOL_FEATURES: u32 = 30;
pub const VERSION_1: u32 = 32;
/// What is offered with one pair of queues.
pub const OFFERED: [u32; 17] =
    [CSUM, 1, 3, 5, 7, 8, 11, 12, MRG_RXBUF, 16, 28, 29, PROTOCOL_FEATURES, VERSION_1, 54, 55, 56];

pub fn bits(features: &[u32]) -> u64 {
    features.iter().fold(0, |bits, bit| bits | 1 << bit)
}

/// The queues of the first pair, by their numbers.
pub const RECEIVE: usize = 0;
pub const TRANSMIT: usize = 1;

pub const QUEUE: u16 = 64;
/// Bytes of a used ring: flags, index, entries, and the event index (virtio 1.3, 2.7.8).
const USED_LEN: usize = 6 + 8 * QUEUE as usize;
/// How much memory the guest has.
pub const MEMORY: usize = 2 << 20;
/// Behind the rings there is room for buffers.
pub const BUFFERS: u64 = START + 0x10_0000;
pub const GUEST_MAC: [u8; 6] = [0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xee];

/// A guest's ARP request (RFC 826) for the gateway.
pub fn arp_request(mac: [u8; 6]) -> Vec<u8> {
    let mut bytes = vec![0xff; 6];
    bytes.extend(mac);
    bytes.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    bytes.extend(mac);
    bytes.extend([192, 168, 65, 3, 0, 0, 0, 0, 0, 0, 192, 168, 65, 1]);
    bytes
}

/// An ARP request behind a virtio-net header, `number` in the bytes behind it.
pub fn question(number: u32) -> Vec<u8> {
    [&[0; 12][..], &arp_request(GUEST_MAC), &number.to_be_bytes()].concat()
}

/// A queue of the driver's, with all that was ever offered in it and all that came back.
pub struct Queue {
    ring: Ring,
    pub kick: EventFd,
    pub call: EventFd,
    /// Heads in the order in which they were offered.
    offered: Vec<u16>,
    /// Heads and lengths in the order in which they came back.
    pub back: Vec<(u32, u32)>,
}

impl Queue {
    fn new(memory: &Memory, number: u64) -> Self {
        let ring = Ring::new(memory, START + number * Ring::LEN, QUEUE);
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        Self { ring, kick: event(), call: event(), offered: Vec::new(), back: Vec::new() }
    }

    /// Begins anew, with nothing in it.
    pub fn clear(&mut self) {
        self.ring.clear();
        self.offered.clear();
        self.back.clear();
    }

    /// The memory of the used ring is used for something else.
    pub fn overwrite_used(&self, memory: &Memory, byte: u8) {
        memory.write(self.ring.addresses().used_ring_addr, &[byte; USED_LEN]);
    }

    /// Nobody has written there since.
    pub fn assert_used_is(&self, memory: &Memory, byte: u8) {
        let used = memory.bytes(self.ring.addresses().used_ring_addr, USED_LEN);
        assert_eq!(used.iter().position(|now| *now != byte), None, "offset in the used ring");
    }

    /// Offers one buffer.
    pub fn offer(&mut self, address: u64, len: u32, writable: bool) {
        let head = self.offered.len() as u16 % QUEUE;
        self.ring.describe(head, address, len, if writable { WRITE } else { 0 }, 0);
        self.make_available(head);
    }

    /// Offers a buffer to be read and one for the answer, as one chain: once what was offered before has come back.
    pub fn offer_request(&mut self, request: (u64, u32), answer: (u64, u32)) {
        assert_eq!(self.back.len(), self.offered.len());
        self.ring.describe(0, request.0, request.1, NEXT, 1);
        self.ring.describe(1, answer.0, answer.1, WRITE, 0);
        self.make_available(0);
    }

    fn make_available(&mut self, head: u16) {
        self.ring.set_entry(self.offered.len() as u16 % QUEUE, head);
        self.offered.push(head);
        // Wants to be told of the next one that comes back.
        self.ring.set_used_event(0);
        self.ring.offer(1);
    }

    /// Looks what came back.
    fn look(&mut self) {
        while let Some(entry) = self.ring.take_used() {
            self.back.push(entry);
        }
    }

    /// Every chain that came back did so once, in its turn.
    fn assert_in_order(&self) {
        let heads: Vec<u16> = self.back.iter().map(|(head, _)| *head as u16).collect();
        assert_eq!(heads, self.offered[..heads.len()]);
    }
}

/// A front-end, and the driver behind it.
pub struct Machine {
    pub frontend: Frontend,
    pub memory: Memory,
    /// By their numbers.
    pub queues: Vec<Queue>,
}

impl Machine {
    /// One with so many queues, of which nothing was said yet.
    pub fn new(connection: &Connection, queues: u64) -> Self {
        let memory = Memory::new(MEMORY);
        let queues = (0..queues).map(|number| Queue::new(&memory, number)).collect();
        Self { frontend: connection.connect(), memory, queues }
    }

    /// All that a front-end says before frames go to and fro.
    pub fn attach(&mut self) {
        self.negotiate(&OFFERED);
        self.share_memory();
        self.start([0, 0]);
    }

    pub fn share_memory(&mut self) {
        self.frontend.set_mem_table(&[self.memory.region()]).unwrap();
    }

    pub fn negotiate(&mut self, expected: &[u32]) {
        let frontend = &mut self.frontend;
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        assert_eq!(offered, bits(expected), "{offered:#x}");
        let protocol = frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(protocol).unwrap();
        // Each message is answered once it is done.
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_features(offered).unwrap();
    }

    /// Starts a queue, to go on from an entry of its available ring. It is not enabled yet.
    pub fn set_up(&mut self, index: usize, next: u16) {
        let Self { frontend, queues, .. } = self;
        let Queue { ring, kick, call, .. } = &queues[index];
        frontend.set_vring_num(index, QUEUE).unwrap();
        frontend.set_vring_base(index, next).unwrap();
        frontend.set_vring_addr(index, &ring.addresses()).unwrap();
        frontend.set_vring_call(index, call).unwrap();
        frontend.set_vring_kick(index, kick).unwrap();
    }

    /// Starts and enables the first queues, each to go on from an entry of its available ring.
    pub fn start<const N: usize>(&mut self, next: [u16; N]) {
        for (index, next) in next.into_iter().enumerate() {
            self.set_up(index, next);
            self.frontend.set_vring_enable(index, true).unwrap();
        }
    }

    /// Puts an ARP request into a transmit queue, in a buffer of the guest's.
    pub fn ask_on(&mut self, queue: usize, number: u32, at: u64) {
        self.memory.write(at, &question(number));
        self.queues[queue].offer(at, question(number).len() as u32, false);
    }

    pub fn ask(&mut self, number: u32, at: u64) {
        self.ask_on(TRANSMIT, number, at);
    }

    /// Offers so many buffers for answers.
    pub fn offer_on(&mut self, queue: usize, count: u64) {
        for _ in 0..count {
            self.queues[queue].offer(BUFFERS + 0x1_0000, 1526, true);
        }
    }

    pub fn offer(&mut self, count: u64) {
        self.offer_on(RECEIVE, count);
    }

    pub fn kick(&self) {
        self.queues.iter().for_each(|queue| queue.kick.write(1).unwrap());
    }

    /// How many chains of a queue have come back in all.
    pub fn back(&mut self, queue: usize) -> usize {
        let queue = &mut self.queues[queue];
        queue.look();
        queue.back.len()
    }

    /// Waits until so many chains have come back in all: answers, and questions.
    pub fn expect_back(&mut self, answers: usize, questions: usize) {
        self.expect_back_on([RECEIVE, TRANSMIT], answers, questions);
    }

    /// The same for a pair of queues.
    pub fn expect_back_on(&mut self, [receive, transmit]: [usize; 2], answers: usize, questions: usize) {
        wait_until("the chains to come back", || {
            self.back(receive) >= answers && self.back(transmit) >= questions
        });
        assert_eq!((self.back(receive), self.back(transmit)), (answers, questions));
    }

    /// Asks, and is answered.
    pub fn expect_answer(&mut self, number: u32) {
        self.expect_answer_on([RECEIVE, TRANSMIT], number);
    }

    /// The same on a pair of queues: the answer comes back on it, too.
    pub fn expect_answer_on(&mut self, [receive, transmit]: [usize; 2], number: u32) {
        let before = [self.back(receive), self.back(transmit)];
        self.offer_on(receive, 1);
        self.ask_on(transmit, number, BUFFERS + 0x1000 * transmit as u64);
        self.kick();
        self.expect_back_on([receive, transmit], before[0] + 1, before[1] + 1);
    }

    /// Waits until so many questions have come back in all; their answers may have died with a hythe.
    pub fn expect_questions(&mut self, questions: usize) {
        wait_until("the questions to come back", || self.back(TRANSMIT) >= questions);
        assert_eq!(self.back(TRANSMIT), questions);
        self.back(RECEIVE);
    }

    /// Every chain that came back did so once, in its turn.
    pub fn assert_in_order(&mut self) {
        for index in 0..self.queues.len() {
            self.back(index);
            self.queues[index].assert_in_order();
        }
    }
}

/// hythe, and where it listens.
pub struct Connection {
    site: Site,
    pub directory: Directory,
    pub hythe: Option<Hythe<PathBuf>>,
}

impl Connection {
    pub fn new(cell: Cell) -> Self {
        let mut connection = Self { site: Site::new(), directory: Directory::new(), hythe: None };
        connection.restart(cell);
        // hythe does so when it starts: while nobody is there, so that no test gets a frame that it has not asked for.
        wait_until("the router to have advertised itself", || {
            connection.socket().exists() && connection.hythe().counters().get("dropped_link_full") == 1
        });
        connection
    }

    pub fn site(&self) -> &Site {
        &self.site
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("link")
    }

    pub fn hythe(&self) -> &Hythe<PathBuf> {
        self.hythe.as_ref().unwrap()
    }

    /// Starts hythe anew, after killing the one that there is.
    pub fn restart(&mut self, cell: Cell) {
        if let Some(hythe) = self.hythe.take() {
            hythe.signal(Signal::SIGKILL);
            hythe.end();
        }
        let options = format!("--vhost-user {}{}", self.socket().display(), queues(cell));
        self.hythe = Some(Hythe::of(&self.site.host, cell).serve("vm", &options, self.socket()));
    }

    pub fn connect(&self) -> Frontend {
        wait_for("the front-end to be let in", || {
            assert!(self.hythe().is_running(), "{}", self.hythe().log());
            Frontend::connect(self.socket(), 16).ok()
        })
    }
}
