//! A front-end of another make, the one of the rust-vmm project, with a driver of the test's own: what the protocol says,
//! word for word, and what hythe makes of a driver that is wrong.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use nix::sys::signal::Signal;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::rig::cell::{Cell, Engine};
use crate::rig::directory::Directory;
use crate::rig::hythe::Hythe;
use crate::rig::site::Site;
use crate::rig::wait::{wait_for, wait_until};
use crate::ring::{BUFFERS, Memory, Ring};

/// Features by their bits (virtio 1.3, 5.1.3 and 6; vhost-user).
const CSUM: u32 = 0;
const MRG_RXBUF: u32 = 15;
const PROTOCOL_FEATURES: u32 = 30;
const VERSION_1: u32 = 32;
const OFFERED: [u32; 17] =
    [CSUM, 1, 3, 5, 7, 8, 11, 12, MRG_RXBUF, 16, 28, 29, PROTOCOL_FEATURES, VERSION_1, 54, 55, 56];

fn bits(features: &[u32]) -> u64 {
    features.iter().fold(0, |bits, bit| bits | 1 << bit)
}

const QUEUE: u16 = 64;
const GUEST_MAC: [u8; 6] = [0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xee];

/// An ARP request (RFC 826) for the gateway, behind a virtio-net header, `number` in the bytes behind it.
fn question(number: u32) -> Vec<u8> {
    let mut bytes = vec![0; 12];
    bytes.extend([0xff; 6]);
    bytes.extend(GUEST_MAC);
    bytes.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    bytes.extend(GUEST_MAC);
    bytes.extend([192, 168, 65, 3, 0, 0, 0, 0, 0, 0, 192, 168, 65, 1]);
    bytes.extend(number.to_be_bytes());
    bytes
}

/// A front-end, and the driver behind it.
struct Machine {
    frontend: Frontend,
    memory: Memory,
    receive: Ring,
    transmit: Ring,
    kicks: [EventFd; 2],
    calls: [EventFd; 2],
}

impl Machine {
    fn new() -> (Self, Connection) {
        let connection = Connection::new(Engine::IoUring);
        let memory = Memory::new();
        let (receive, transmit) = (Ring::new(&memory, 0, QUEUE), Ring::new(&memory, 1, QUEUE));
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let machine = Self {
            frontend: connection.connect(),
            memory,
            receive,
            transmit,
            kicks: [event(), event()],
            calls: [event(), event()],
        };
        (machine, connection)
    }

    /// All that a front-end says before frames go to and fro.
    fn attach(&mut self) {
        self.negotiate();
        self.frontend.set_mem_table(&[self.memory.region()]).unwrap();
        self.start([0, 0]);
    }

    fn negotiate(&mut self) {
        let frontend = &mut self.frontend;
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        assert_eq!(offered, bits(&OFFERED), "{offered:#x}");
        let protocol = frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(protocol).unwrap();
        // Each message is answered once it is done.
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_features(offered).unwrap();
    }

    /// Starts both rings, to go on from some entries of the available rings.
    fn start(&mut self, next: [u16; 2]) {
        for (index, (ring, next)) in [&self.receive, &self.transmit].into_iter().zip(next).enumerate() {
            let [descriptors, available, used] = ring.addresses();
            let data = VringConfigData {
                queue_max_size: QUEUE,
                queue_size: QUEUE,
                flags: 0,
                desc_table_addr: descriptors,
                used_ring_addr: used,
                avail_ring_addr: available,
                log_addr: None,
            };
            let frontend = &mut self.frontend;
            frontend.set_vring_num(index, QUEUE).unwrap();
            frontend.set_vring_base(index, next).unwrap();
            frontend.set_vring_addr(index, &data).unwrap();
            frontend.set_vring_call(index, &self.calls[index]).unwrap();
            frontend.set_vring_kick(index, &self.kicks[index]).unwrap();
            frontend.set_vring_enable(index, true).unwrap();
        }
    }

    /// Puts an ARP request into the transmit queue, in a buffer of the guest's.
    fn ask(&mut self, number: u32, at: u64) {
        self.memory.write(at, &question(number));
        self.transmit.offer(&self.memory, at, question(number).len() as u32, false);
    }

    /// Offers so many buffers for answers.
    fn offer(&mut self, count: u64) {
        for _ in 0..count {
            self.receive.offer(&self.memory, BUFFERS + 0x1_0000, 1526, true);
        }
    }

    fn kick(&self) {
        self.kicks.iter().for_each(|kick| kick.write(1).unwrap());
    }

    /// Waits until so many chains of both queues have come back in all.
    fn expect_back(&mut self, answers: usize, questions: usize) {
        wait_until("the chains to come back", || {
            self.receive.look(&self.memory);
            self.transmit.look(&self.memory);
            self.receive.back.len() >= answers && self.transmit.back.len() >= questions
        });
        assert_eq!((self.receive.back.len(), self.transmit.back.len()), (answers, questions));
    }
}

/// hythe, and where it listens.
struct Connection {
    site: Site,
    directory: Directory,
    hythe: Option<Hythe<PathBuf>>,
}

impl Connection {
    fn new(engine: Engine) -> Self {
        let mut connection = Self { site: Site::new(), directory: Directory::new(), hythe: None };
        connection.restart(engine);
        connection
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("link")
    }

    fn hythe(&self) -> &Hythe<PathBuf> {
        self.hythe.as_ref().unwrap()
    }

    /// Starts hythe anew, after killing the one that there is.
    fn restart(&mut self, engine: Engine) {
        if let Some(hythe) = self.hythe.take() {
            hythe.signal(Signal::SIGKILL);
            hythe.end();
        }
        let options = format!("--vhost-user {}", self.socket().display());
        self.hythe =
            Some(Hythe::of(&self.site.host, Cell::new(engine, 1)).serve("vm", &options, self.socket()));
    }

    fn connect(&self) -> Frontend {
        wait_for("the front-end to be let in", || {
            assert!(self.hythe().is_running(), "{}", self.hythe().log());
            Frontend::connect(self.socket(), 2).ok()
        })
    }
}

#[test]
fn frames_go_to_and_fro_and_every_chain_comes_back_once() {
    let (mut machine, connection) = Machine::new();
    machine.attach();
    machine.offer(20);
    for round in 0..10u32 {
        machine.ask(round, BUFFERS);
        machine.kick();
        machine.expect_back(round as usize + 1, round as usize + 1);
    }
    for (_, len) in &machine.receive.back {
        // Virtio-net header, Ethernet, ARP.
        assert_eq!(*len, 12 + 14 + 28);
    }
    let answer = machine.memory.read(BUFFERS + 0x1_0000, 54);
    assert_eq!(answer[10..12], [1, 0], "one buffer");
    assert_eq!(answer[12..18], GUEST_MAC);
    assert_eq!(answer[24..34], [8, 6, 0, 1, 8, 0, 6, 4, 0, 2], "an ARP reply");
    assert!(machine.calls[0].read().unwrap() > 0, "interrupts have come");
    assert_eq!(connection.hythe().counters().get("frames_out"), 10);
}

#[test]
fn what_was_not_offered_is_refused_and_the_front_end_may_go_on() {
    let (mut machine, connection) = Machine::new();
    machine.negotiate();
    let frontend = &mut machine.frontend;
    for wrong in [&[VERSION_1, 34][..], &[VERSION_1, 22], &[MRG_RXBUF]] {
        assert!(frontend.set_features(bits(wrong)).is_err(), "{wrong:?}");
    }
    wait_until("the user to be told", || connection.hythe().log().contains("VIRTIO_F_VERSION_1"));
    assert!(frontend.set_features(bits(&OFFERED)).is_ok());
    assert!(frontend.set_mem_table(&[machine.memory.region()]).is_ok());
    machine.start([0, 0]);
    machine.offer(1);
    machine.ask(1, BUFFERS);
    machine.kick();
    machine.expect_back(1, 1);
}

#[test]
fn the_guest_reads_its_mac_status_and_mtu() {
    let (mut machine, _connection) = Machine::new();
    machine.negotiate();
    let flags = VhostUserConfigFlags::empty();
    let (_, space) = machine.frontend.get_config(0, 12, flags, &[0; 12]).unwrap();
    assert_eq!(space[..6], GUEST_MAC);
    assert_eq!(space[6..], [1, 0, 1, 0, 0xdc, 5], "the link is up, one pair, 1500 bytes");
}

#[test]
fn memory_comes_and_goes_in_slots() {
    let (mut machine, connection) = Machine::new();
    machine.negotiate();
    let protocol = machine.frontend.get_protocol_features().unwrap();
    assert!(protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS));
    assert!(machine.frontend.get_max_mem_slots().unwrap() >= 8);
    machine.frontend.add_mem_region(&machine.memory.region()).unwrap();
    machine.start([0, 0]);
    machine.offer(8);
    // A hot-plugged piece of memory, from which frames come too.
    let plugged = Memory::at(0x8000_0000);
    machine.frontend.add_mem_region(&plugged.region()).unwrap();
    plugged.write(0x8000_0000, &question(1));
    machine.transmit.offer(&machine.memory, 0x8000_0000, question(1).len() as u32, false);
    machine.kick();
    machine.expect_back(1, 1);
    // It goes away, and the driver does not know.
    machine.frontend.remove_mem_region(&plugged.region()).unwrap();
    machine.ask(2, BUFFERS);
    machine.kick();
    machine.expect_back(2, 2);
    machine.transmit.offer(&machine.memory, 0x8000_0000, 60, false);
    machine.kick();
    wait_until("the fault to be counted", || connection.hythe().counters().get("dropped_queue_fault") == 1);
    assert!(
        connection.hythe().log().contains("outside of the guest's memory"),
        "{}",
        connection.hythe().log()
    );
    // The other queue goes on, and a driver that starts anew is served.
    machine.frontend.get_vring_base(1).unwrap();
    machine.transmit = Ring::new(&machine.memory, 1, QUEUE);
    let next = machine.frontend.get_vring_base(0).unwrap() as u16;
    machine.start([next, 0]);
    machine.ask(3, BUFFERS);
    machine.kick();
    machine.expect_back(3, 1);
}

#[test]
fn memory_that_cannot_be_mapped_is_refused_and_told() {
    let (mut machine, connection) = Machine::new();
    machine.negotiate();
    let mut short = tempfile();
    short.write_all(&[0; 4096]).unwrap();
    let region = VhostUserMemoryRegionInfo { mmap_handle: short.as_raw_fd(), ..machine.memory.region() };
    assert!(machine.frontend.set_mem_table(&[region]).is_err());
    wait_until("the user to be told", || connection.hythe().log().contains("cannot be mapped"));
}

fn tempfile() -> File {
    let directory = Directory::new();
    File::options().read(true).write(true).create_new(true).open(directory.path().join("memory")).unwrap()
}

#[test]
fn a_ring_that_is_stopped_tells_where_and_goes_on_from_there() {
    let (mut machine, _connection) = Machine::new();
    machine.attach();
    machine.offer(60);
    for round in 1..=25u32 {
        machine.ask(round, BUFFERS);
        machine.kick();
        if round % 5 == 0 {
            // In the middle of traffic: whatever was taken has come back, and the rest comes after the restart.
            let next = [0, 1].map(|index| machine.frontend.get_vring_base(index).unwrap() as u16);
            machine.receive.look(&machine.memory);
            machine.transmit.look(&machine.memory);
            let back = [machine.receive.back.len(), machine.transmit.back.len()].map(|len| len as u16);
            assert_eq!(next, back);
            machine.start(next);
        }
    }
    machine.kick();
    wait_until("every question to come back", || {
        machine.transmit.look(&machine.memory);
        machine.transmit.back.len() == 25
    });
    machine.transmit.assert_in_order();
    machine.receive.look(&machine.memory);
    machine.receive.assert_in_order();
}

#[test]
fn a_hythe_that_is_killed_leaves_nothing_that_another_could_not_go_on_from() {
    let (mut machine, mut connection) = Machine::new();
    machine.attach();
    for round in 0..50u32 {
        machine.offer(1);
        machine.ask(round, BUFFERS);
        machine.kick();
        if round % 2 == 0 {
            let before = machine.receive.back.len();
            wait_until("an answer", || {
                machine.receive.look(&machine.memory);
                machine.receive.back.len() > before
            });
        }
        connection.restart(if round % 4 < 2 { Engine::Epoll } else { Engine::IoUring });
        machine.frontend = connection.connect();
        machine.negotiate();
        machine.frontend.set_mem_table(&[machine.memory.region()]).unwrap();
        // As QEMU does: what was not given back is taken again.
        machine.receive.look(&machine.memory);
        machine.transmit.look(&machine.memory);
        let back = [machine.receive.back.len(), machine.transmit.back.len()].map(|len| len as u16);
        machine.start(back);
        machine.expect_questions(round as usize + 1);
    }
    machine.transmit.assert_in_order();
    machine.receive.assert_in_order();
}

impl Machine {
    /// Waits until so many questions have come back in all; their answers may have died with a hythe.
    fn expect_questions(&mut self, questions: usize) {
        wait_until("the questions to come back", || {
            self.receive.look(&self.memory);
            self.transmit.look(&self.memory);
            self.transmit.back.len() >= questions
        });
        assert_eq!(self.transmit.back.len(), questions);
    }
}

#[test]
fn front_ends_may_come_and_go_and_say_anything() {
    let (machine, connection) = Machine::new();
    drop(machine);
    for words in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 200], &[1, 0, 0, 0], &[5, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0]]
    {
        let mut stream = std::os::unix::net::UnixStream::connect(connection.socket()).unwrap();
        // hythe may have hung up before the end.
        let _ = stream.write_all(words);
    }
    let memory = Memory::new();
    let (receive, transmit) = (Ring::new(&memory, 0, QUEUE), Ring::new(&memory, 1, QUEUE));
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let (kicks, calls) = ([event(), event()], [event(), event()]);
    let mut machine = Machine { frontend: connection.connect(), memory, receive, transmit, kicks, calls };
    machine.attach();
    machine.offer(1);
    machine.ask(1, BUFFERS);
    machine.kick();
    machine.expect_back(1, 1);
    let hythe = connection.hythe.unwrap();
    hythe.signal(Signal::SIGTERM);
    hythe.end().assert_clean(0);
    assert_eq!(connection.directory.names(), [""; 0], "the socket is gone");
}
