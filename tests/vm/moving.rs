//! A conversation goes to the pair of queues on which the guest sends: a driver of the test's own speaks TCP on two pairs.

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, TcpStream};

use etherparse::{PacketBuilder, SlicedPacket, TcpSlice, TransportSlice};

use crate::peer::{BUFFERS, Connection, GUEST_MAC, Machine};
use crate::queues::{PAIRS, machine_of_two};
use crate::rig::bytes::accept;
use crate::rig::cell::{Cell, Engine};
use crate::rig::site::Family;
use crate::rig::wait::wait_for;

const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 65, 3);
const GATEWAY_MAC: [u8; 6] = [0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd];
const GUEST_PORT: u16 = 40_000;
/// The virtio-net header (virtio 1.3, 5.1.6).
const HEADER_LEN: usize = 12;
const SEGMENT: [u8; 100] = [7; 100];

/// The guest's end of a connection, each segment of which waits for its acknowledgement.
struct GuestEnd<'a> {
    machine: &'a mut Machine,
    server: Ipv4Addr,
    port: u16,
    /// What is sent next, and what was received.
    seq: u32,
    ack: u32,
    /// Where the answers of each pair are.
    answers: [usize; 2],
}

impl GuestEnd<'_> {
    /// Sends a segment on a pair of queues, and returns the pair on which it is answered.
    fn segment(&mut self, pair: usize, syn: bool, payload: &[u8]) -> usize {
        let builder = PacketBuilder::ethernet2(GUEST_MAC, GATEWAY_MAC)
            .ipv4(GUEST.octets(), self.server.octets(), 64)
            .tcp(GUEST_PORT, self.port, self.seq, 60_000);
        let builder = if syn { builder.syn() } else { builder.psh().ack(self.ack) };
        let mut frame = vec![0; HEADER_LEN];
        builder.write(&mut frame, payload).unwrap();
        self.seq = self.seq.wrapping_add(payload.len() as u32 + u32::from(syn));
        let at = BUFFERS + 0x1000 * pair as u64;
        self.machine.memory.write(at, &frame);
        self.machine.queues[PAIRS[pair][1]].offer(at, frame.len() as u32, false);
        self.machine.kick();
        wait_for("the acknowledgement", || (0..2).find(|pair| self.is_acknowledged_on(*pair)))
    }

    fn is_acknowledged_on(&mut self, pair: usize) -> bool {
        let receive = PAIRS[pair][0];
        if self.machine.back(receive) == self.answers[pair] {
            return false;
        }
        self.answers[pair] += 1;
        let (_, len) = self.machine.queues[receive].back[self.answers[pair] - 1];
        let bytes = self.machine.memory.bytes(BUFFERS + 0x1_0000, len as usize);
        // The next one has a buffer again.
        self.machine.offer_on(receive, 1);
        self.machine.kick();
        let packet = SlicedPacket::from_ethernet(&bytes[HEADER_LEN..]).unwrap();
        let Some(TransportSlice::Tcp(tcp)) = packet.transport else { return false };
        self.take(&tcp)
    }

    /// Takes a segment in; returns whether it acknowledges all that was sent.
    fn take(&mut self, tcp: &TcpSlice) -> bool {
        assert!(!tcp.rst());
        self.ack = tcp.sequence_number().wrapping_add(u32::from(tcp.syn()));
        tcp.acknowledgment_number() == self.seq
    }

    /// Sends on a pair until the answers come there. Returns how many segments it took.
    fn settle_on(&mut self, pair: usize) -> usize {
        (1..100).find(|_| self.segment(pair, false, &SEGMENT) == pair).unwrap()
    }
}

/// Whether so many segments have come to the far server whole.
fn expect_segments(stream: &mut TcpStream, count: usize) {
    let mut bytes = vec![0; count * SEGMENT.len()];
    stream.read_exact(&mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == SEGMENT[0]));
}

fn a_conversation_goes_where_the_guest_sends(engine: Engine) {
    let connection = Connection::new(Cell::new(engine, 2));
    let mut machine = machine_of_two(&connection);
    machine.start([0; 5]);
    machine.set_pairs(2, 0);
    let listener = connection.site().far.listen(Family::V4.far(), 0);
    let IpAddr::V4(server) = Family::V4.far() else { unreachable!() };
    for [receive, _] in PAIRS {
        machine.offer_on(receive, 1);
    }
    let answers = PAIRS.map(|[receive, _]| machine.back(receive));
    let port = listener.local_addr().unwrap().port();
    let mut guest = GuestEnd { machine: &mut machine, server, port, seq: 1_000, ack: 0, answers };
    assert_eq!(guest.segment(0, true, &[]), 0);
    let (mut stream, _) = accept(&listener);
    assert_eq!(guest.settle_on(0), 1);

    let there = guest.settle_on(1);
    let after = connection.hythe().counters();
    assert_eq!(after.get("tcp_moved"), 1);
    assert!((8..=16).contains(&there), "{there} segments");
    for _ in 0..20 {
        assert_eq!(guest.segment(1, false, &SEGMENT), 1);
    }
    let handed_over = connection.hythe().counters().get("frames_handed_over");
    assert_eq!(handed_over, after.get("frames_handed_over"), "nothing is handed over any more");
    // A guest that goes back has to insist longer.
    let back = guest.settle_on(0);
    assert!(back > there, "{back} segments after {there}");
    expect_segments(&mut stream, 1 + there + 20 + back);
}

#[test]
fn a_conversation_goes_where_the_guest_sends_on_io_uring() {
    a_conversation_goes_where_the_guest_sends(Engine::IoUring);
}

#[test]
fn a_conversation_goes_where_the_guest_sends_on_epoll() {
    a_conversation_goes_where_the_guest_sends(Engine::Epoll);
}
