//! A guest in this process: a driver of two queues, and behind it a TCP that never loses anything.

use std::net::Ipv4Addr;

use hythe::frame::address::{Address, Mac};
use hythe::frame::build::{self, HEAD_MAX, Route};
use hythe::frame::offload::{HEADER_LEN, Offload, Segmentation};
use hythe::frame::tcp::{Flags, Options, SegmentHead, Seq};
use hythe::frame::view::{Content, HEAD_LEN, IpHead, Transport, View};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::ring::{INDIRECT, Memory, Ring, START, WRITE};

pub const GATEWAY_MAC: Mac = Mac([0x5a, 0x94, 0xef, 0, 0, 1]);
pub const GUEST_MAC: Mac = Mac([0x5a, 0x94, 0xef, 0, 0, 2]);
pub const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 65, 3);
pub const HOST: Ipv4Addr = Ipv4Addr::new(192, 168, 65, 254);

const QUEUE: u16 = 256;
/// What a buffer of the receive queue holds: as Linux makes them for an MTU of 1500.
const BUFFER: u64 = 1536;
/// The longest payload of one frame: 45 segments.
pub const SEGMENT: u32 = 45 * 1448;
/// Bytes of a stream repeat so often.
pub const PERIOD: u64 = 251;

/// Where things lie in the guest's memory.
const TRANSMIT: u64 = START;
const RECEIVE: u64 = TRANSMIT + Ring::LEN;
const TABLES: u64 = RECEIVE + Ring::LEN;
const HEADS: u64 = TABLES + QUEUE as u64 * 64;
const PAYLOAD: u64 = HEADS + QUEUE as u64 * 256;
const BUFFERS: u64 = PAYLOAD + 0x2_0000;
const MEMORY: u64 = 2 << 20;

/// A guest, and its one connection.
pub struct Guest {
    pub memory: Memory,
    pub transmit: Ring,
    pub receive: Ring,
    pub kicks: [EventFd; 2],
    port: u16,
    peer_port: u16,
    next: Seq,
    acknowledged: Seq,
    window: u32,
    scale: u8,
    /// The next byte of the peer's, once it has said where it begins.
    expected: Option<Seq>,
    owes_acknowledgement: bool,
    /// Looks at the first and the last byte of what comes. Where nobody puts any there, it must not.
    pub looks: bool,
    /// Payload bytes so far.
    pub sent: u64,
    pub received: u64,
}

impl Guest {
    pub fn new(peer_port: u16) -> Self {
        let memory = Memory::new(MEMORY as usize);
        let (transmit, receive) = (Ring::new(&memory, TRANSMIT, QUEUE), Ring::new(&memory, RECEIVE, QUEUE));
        let payload: Vec<u8> = (0..0x2_0000).map(|at| (at % PERIOD) as u8).collect();
        memory.write(PAYLOAD, &payload);
        for slot in 0..QUEUE {
            receive.describe(slot, BUFFERS + u64::from(slot) * BUFFER, BUFFER as u32, WRITE, 0);
        }
        let kick = || EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK).unwrap();
        let mut guest = Self {
            memory,
            transmit,
            receive,
            kicks: [kick(), kick()],
            port: 40_000,
            peer_port,
            next: Seq(1000),
            acknowledged: Seq(1000),
            window: 0,
            scale: 0,
            expected: None,
            owes_acknowledgement: false,
            looks: true,
            sent: 0,
            received: 0,
        };
        guest.receive.offer(QUEUE);
        guest
    }

    /// Asks for a connection.
    pub fn connect(&mut self) {
        let options = Options { mss: Some(1460), window_scale: Some(7), ..Options::default() };
        self.send(Flags::SYN, options, 0);
        self.next = self.next + 1;
    }

    pub fn is_connected(&self) -> bool {
        self.expected.is_some()
    }

    /// Takes in what came, sends what may be sent up to `sent` bytes in all, and acknowledges. Whether anything happened.
    pub fn turn(&mut self, sent: u64) -> bool {
        let mut frames = 0;
        while let Some((head, _)) = self.receive.take_used() {
            self.take_frame(head);
            frames += 1;
        }
        while self.transmit.take_used().is_some() {}
        let before = self.sent;
        while self.may_send() && self.sent < sent {
            let room = self.window.saturating_sub(self.next.since(self.acknowledged));
            let len = (sent - self.sent).min(u64::from(SEGMENT)) as u32;
            if room < len {
                break;
            }
            self.send(Flags::ACK | Flags::PSH, Options::default(), len);
        }
        if std::mem::take(&mut self.owes_acknowledgement) && self.sent == before && self.may_send() {
            self.send(Flags::ACK, Options::default(), 0);
        }
        for (ring, kick) in [(&mut self.transmit, &self.kicks[0]), (&mut self.receive, &self.kicks[1])] {
            ring.set_used_event(u16::MAX);
            if ring.wants_kick() {
                kick.write(1).unwrap();
            }
        }
        frames > 0 || self.sent > before
    }

    fn may_send(&self) -> bool {
        let (available, used) = self.transmit.counts();
        self.is_connected() && available.wrapping_sub(used) < QUEUE
    }

    /// Puts a segment into the transmit queue: its head in a buffer, its payload where it always lies.
    fn send(&mut self, flags: Flags, options: Options, len: u32) {
        let ip = IpHead {
            source: Address::of_v4(GUEST),
            destination: Address::of_v4(HOST),
            hop_limit: 64,
            traffic_class: 0,
            dont_fragment: true,
        };
        let route = Route { source_mac: GUEST_MAC, destination_mac: GATEWAY_MAC, ip };
        let segment = SegmentHead {
            seq: self.next,
            ack: self.expected.unwrap_or_default(),
            flags,
            window: u16::MAX,
            options,
            len,
        };
        let mut front = [0; HEADER_LEN + HEAD_MAX];
        let head = build::tcp(&mut front[HEADER_LEN..], &route, self.port, self.peer_port, &segment, true);
        let segmentation = if len > 1448 { Segmentation::Tcp { size: 1448 } } else { Segmentation::None };
        let offload = Offload { checksum_partial: true, segmentation };
        let checksum = (head.transport_start as u16, head.checksum_offset as u16);
        offload.write(&mut front, true, head.len as u16, checksum, 0);

        let slot = self.transmit.counts().0 % QUEUE;
        let (at, table) = (HEADS + u64::from(slot) * 256, TABLES + u64::from(slot) * 64);
        self.memory.write(at, &front[..HEADER_LEN + head.len]);
        let first = len.min(32 << 10);
        let payload = PAYLOAD + self.sent % PERIOD;
        let buffers = [
            (at, (HEADER_LEN + head.len) as u32),
            (payload, first),
            (payload + u64::from(first), len - first),
        ];
        let count = buffers.iter().take_while(|(_, len)| *len > 0).count();
        for (index, (buffer, len)) in buffers[..count].iter().enumerate() {
            let flags = u16::from(index + 1 < count);
            self.memory.describe(table + 16 * index as u64, *buffer, *len, flags, index as u16 + 1);
        }
        self.transmit.describe(slot, table, 16 * count as u32, INDIRECT, 0);
        self.transmit.offer(1);
        self.next = self.next + len;
        self.sent += u64::from(len);
    }

    /// A frame whose first buffer came back; its other ones come with it.
    fn take_frame(&mut self, head: u32) {
        let at = BUFFERS + u64::from(head) * BUFFER;
        let mut front = [0; HEADER_LEN + HEAD_LEN];
        self.memory.read(at, &mut front);
        let buffers = u16::from_le_bytes([front[10], front[11]]);
        let mut last = at;
        for _ in 1..buffers {
            let (head, _) = self.receive.take_used().unwrap();
            last = BUFFERS + u64::from(head) * BUFFER;
        }
        self.take_packet(&front, at, last);
        // The device may write over them from now on.
        self.receive.offer(buffers);
    }

    /// The packet of a frame that begins with `front`, which lies in the buffer at `at`; it ends in the one at `last`.
    fn take_packet(&mut self, front: &[u8], at: u64, last: u64) {
        let ip_len = usize::from(u16::from_be_bytes([front[HEADER_LEN + 16], front[HEADER_LEN + 17]]));
        let Ok(Content::Ip(packet)) = View::parse(&front[HEADER_LEN..], 14 + ip_len).map(|view| view.content)
        else {
            return;
        };
        let Transport::Tcp(tcp) = packet.transport else { return };
        let segment = tcp.segment;
        assert!(!segment.flags.has(Flags::RST), "the connection was reset");
        self.acknowledged = self.acknowledged.max(segment.ack);
        if segment.flags.has(Flags::SYN) {
            self.expected = Some(segment.seq + 1);
            self.scale = segment.options.window_scale.unwrap_or(0);
            self.window = u32::from(segment.window);
            self.owes_acknowledgement = true;
            return;
        }
        self.window = u32::from(segment.window) << self.scale;
        if segment.len == 0 {
            return;
        }
        self.owes_acknowledgement = true;
        if self.expected == Some(segment.seq) {
            let start = HEADER_LEN + packet.transport_start + tcp.header_len;
            let end = (start as u64 + u64::from(segment.len) - 1) % BUFFER;
            self.look(at + start as u64, self.received);
            self.received += u64::from(segment.len);
            self.look(last + end, self.received - 1);
            self.expected = Some(segment.seq + segment.len);
        }
    }

    /// The byte at an address is that of a position in the stream.
    fn look(&self, at: u64, position: u64) {
        if self.looks {
            let mut byte = [0];
            self.memory.read(at, &mut byte);
            assert_eq!(u64::from(byte[0]), position % PERIOD, "byte {position} of the stream");
        }
    }
}
