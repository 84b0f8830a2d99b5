//! A link over a socket as a worker uses it, against a peer in the same process.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Type};

use crate::flow::slab::Slot;
use crate::frame::build::Head;
use crate::frame::drop_reason::DropReason;
use crate::frame::offload::{Offload, Segmentation};
use crate::frame::view::HEAD_LEN;
use crate::host::engine::{Engine, Interest, Token, epoll::Epoll, uring::Uring};
use crate::io::{Operations, Piece};
use crate::link::{Ahead, FRAME_MAX, InboundHead, Link, Ready, Space};

use super::{Control, Socket, SocketType};

/// Frames that are on their way to the guest at the most.
const SLOTS: usize = 64;

type Frame = Result<Vec<u8>, DropReason>;

struct Bench {
    link: Socket,
    control: Control,
    engine: Box<dyn Engine>,
    operations: Operations,
}

fn stream() -> (Bench, UnixStream) {
    let (own, peer) = UnixStream::pair().unwrap();
    peer.set_nonblocking(true).unwrap();
    (Bench::new(SocketType::Stream, own), peer)
}

fn datagrams() -> (Bench, UnixDatagram) {
    let (own, peer) = UnixDatagram::pair().unwrap();
    peer.set_nonblocking(true).unwrap();
    (Bench::new(SocketType::Datagram, own), peer)
}

fn sequenced() -> (Bench, socket2::Socket) {
    let (own, peer) = socket2::Socket::pair(Domain::UNIX, Type::SEQPACKET, None).unwrap();
    (Bench::new(SocketType::Sequenced, own), peer)
}

fn token() -> Token {
    Token { kind: 1, slot: Slot { index: 0, generation: 0 } }
}

impl Bench {
    fn new(socket_type: SocketType, own: impl Into<OwnedFd>) -> Self {
        let (link, control) = Socket::new(1500, socket_type).unwrap();
        let (engine, operations) = (Box::new(Epoll::new().unwrap()), Operations::default());
        let mut bench = Self { link, control, engine, operations };
        bench.attach(own);
        bench
    }

    /// Does what a door does, while the worker answers; whether the guest has gone then.
    fn command<T: Send>(&mut self, task: impl FnOnce(&Control) -> T + Send) -> bool {
        let Self { control, link, .. } = self;
        std::thread::scope(|scope| {
            let door = scope.spawn(|| task(control));
            let mut gone = false;
            while !door.is_finished() {
                gone |= link.take_news().guest_gone;
            }
            door.join().unwrap();
            gone
        })
    }

    fn attach(&mut self, own: impl Into<OwnedFd>) {
        let own = own.into();
        assert!(!self.command(|control| control.attach(own, || ()).unwrap()));
    }

    /// Everything that is there; a batch is asked for until the link says that it is empty.
    fn receive(&mut self) -> Vec<Frame> {
        let mut frames = Vec::new();
        loop {
            self.operations.clear();
            self.link.begin_receive(&mut self.operations);
            self.engine.run(&mut self.operations);
            let received = self.link.end_receive(&self.operations);
            assert!(received.frames <= 64, "a pass has bounds");
            frames.extend((0..received.frames).map(|index| self.frame(index)));
            assert!(self.link.frame(received.frames).is_none());
            self.link.release();
            if received.empty {
                return frames;
            }
        }
    }

    fn frame(&self, index: usize) -> Frame {
        let frame = self.link.frame(index).unwrap();
        assert_eq!(frame.offload?, Offload::default());
        let mut bytes = Vec::new();
        self.link.payload(index, 0, frame.len, &mut |piece: Piece| piece.copy_to(&mut bytes));
        assert_eq!(bytes.len(), frame.len);
        assert_eq!(frame.head, &bytes[..frame.len.min(HEAD_LEN)]);
        let mut part = Vec::new();
        self.link.payload(index, 5, usize::MAX, &mut |piece: Piece| piece.copy_to(&mut part));
        assert_eq!(part, bytes[bytes.len().min(5)..]);
        Ok(bytes)
    }

    /// Writes a payload into a space, and commits it with a head.
    fn fill(&mut self, space: Space, payload: &[u8]) {
        let mut at = 0;
        self.link.space(space, &mut |piece| at += piece.copy_from(&payload[at..]));
        assert_eq!(at, payload.len());
        let head = Head { len: HEAD.len(), transport_start: HEAD.len(), checksum_offset: 0 };
        let head = InboundHead { bytes: &HEAD, head, v4: true, offload: Offload::default() };
        self.link.commit(space, &head, payload.len());
    }

    /// Commits frames, as many as there is room for; returns them.
    fn fill_all(&mut self, len: usize) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        while let Some(space) = self.link.reserve(len) {
            let payload = bytes(len, frames.len());
            self.fill(space, &payload);
            frames.push([&HEAD[..], &payload].concat());
        }
        frames
    }

    /// Publishes; returns how many frames were lost.
    fn publish(&mut self) -> usize {
        self.operations.clear();
        self.link.begin_publish(&mut self.operations);
        self.engine.run(&mut self.operations);
        self.link.end_publish(&self.operations)
    }

    /// Publishes until the worker may sleep.
    fn publish_all(&mut self) -> usize {
        let mut lost = 0;
        loop {
            lost += self.publish();
            if self.link.prepare_sleep() {
                return lost;
            }
        }
    }

    /// The link has found the end of its connection, and does not touch it any more.
    fn expect_end(&mut self) {
        assert!(self.link.has_unpublished(), "the door is still to be told");
        self.publish();
        let mut ended = [PollFd::new(self.control.ended(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut ended, PollTimeout::ZERO), Ok(1));
        assert!(!self.link.has_unpublished() && self.link.wants_room(), "there is nobody to send to");
        assert_eq!(self.link.ready_fds(), [None, None]);
        assert!(self.link.reserve(0).is_none() && !self.link.may_reserve_ahead());
        assert_eq!(self.receive(), []);
    }

    fn expect_open(&self) {
        let mut ended = [PollFd::new(self.control.ended(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut ended, PollTimeout::ZERO), Ok(0));
        assert!(!self.link.has_unpublished());
        assert!(matches!(self.link.ready_fds(), [Some(Ready { or_writable: false, .. }), None]));
    }
}

const HEAD: [u8; 34] = [0xaa; 34];

fn bytes(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|index| (index * 7 + seed) as u8).collect()
}

/// A frame as it goes over a stream.
fn on_stream(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes()[..], frame].concat()
}

fn read_all(mut peer: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let end = peer.read_to_end(&mut bytes);
    assert!(end.is_err(), "nothing more for now");
    bytes
}

#[test]
fn frames_arrive_whole_wherever_the_stream_was_cut() {
    let (mut bench, mut peer) = stream();
    let frames: Vec<Vec<u8>> = [60, 0, 1, 300].map(|len| bytes(len, len)).into();
    let whole: Vec<u8> = frames.iter().flat_map(|frame| on_stream(frame)).collect();
    for cut in 0..=whole.len() {
        let mut got = Vec::new();
        for part in [&whole[..cut], &whole[cut..]] {
            peer.write_all(part).unwrap();
            got.extend(bench.receive());
        }
        assert_eq!(got, frames.iter().cloned().map(Ok).collect::<Vec<_>>(), "cut at {cut}");
    }
    for byte in &whole {
        peer.write_all(&[*byte]).unwrap();
        bench.receive();
    }
    bench.expect_open();
}

#[test]
fn more_frames_than_a_batch_has_come_in_order() {
    let (mut bench, mut peer) = stream();
    let frames: Vec<Vec<u8>> = (0..1000).map(|index| bytes(20, index)).collect();
    peer.write_all(&frames.iter().flat_map(|frame| on_stream(frame)).collect::<Vec<_>>()).unwrap();
    assert_eq!(bench.receive(), frames.into_iter().map(Ok).collect::<Vec<_>>());
}

#[test]
fn the_longest_frame_is_taken_and_a_longer_one_ends_the_stream() {
    let (mut bench, mut peer) = stream();
    let longest = bytes(FRAME_MAX, 1);
    peer.write_all(&on_stream(&longest)).unwrap();
    assert_eq!(bench.receive(), [Ok(longest.clone())]);
    // Twice, so that one lies behind the other.
    peer.write_all(&on_stream(&longest)).unwrap();
    peer.write_all(&on_stream(&longest)[..1000]).unwrap();
    assert_eq!(bench.receive(), [Ok(longest.clone())]);
    peer.write_all(&on_stream(&longest)[1000..]).unwrap();
    assert_eq!(bench.receive(), [Ok(longest)]);
    bench.expect_open();
    peer.write_all(&on_stream(b"before")).unwrap();
    peer.write_all(&(FRAME_MAX as u32 + 1).to_be_bytes()).unwrap();
    peer.write_all(&on_stream(b"behind")).unwrap();
    assert_eq!(bench.receive(), [Ok(b"before".to_vec()), Err(DropReason::FrameTooLong)]);
    bench.expect_end();
}

#[test]
fn a_peer_that_closes_in_the_middle_of_a_frame_is_told_from_one_that_does_not() {
    let whole = on_stream(&bytes(100, 0));
    for (len, wrong) in [(0, false), (2, true), (4, true), (50, true), (103, true), (104, false)] {
        let (mut bench, mut peer) = stream();
        peer.write_all(&on_stream(b"first")).unwrap();
        peer.write_all(&whole[..len]).unwrap();
        drop(peer);
        let mut expected: Vec<Frame> = vec![Ok(b"first".to_vec())];
        expected.extend((len == 104).then(|| Ok(whole[4..].to_vec())));
        expected.extend(wrong.then_some(Err(DropReason::Truncated)));
        assert_eq!(bench.receive(), expected, "{len} bytes");
        bench.expect_end();
    }
}

#[test]
fn what_was_said_before_the_end_is_read_although_nobody_listens_any_more() {
    let (mut bench, mut peer) = stream();
    peer.write_all(&on_stream(b"last words")).unwrap();
    drop(peer);
    assert_eq!(bench.fill_all(100).len(), SLOTS);
    assert_eq!(bench.publish_all(), SLOTS);
    assert_eq!(bench.receive(), [Ok(b"last words".to_vec())]);
    bench.expect_end();
    let (mut bench, peer) = sequenced();
    peer.send(b"last words").unwrap();
    drop(peer);
    assert_eq!(bench.fill_all(100).len(), SLOTS);
    assert_eq!(bench.publish_all(), SLOTS);
    assert_eq!(bench.receive(), [Ok(b"last words".to_vec())]);
    bench.expect_end();
}

/// Fills a link until its socket takes no more, and has `drain` read what came, until everything has: the engine says when
/// there is room again. Returns the frames that went in.
fn through_a_full_socket(bench: &mut Bench, mut drain: impl FnMut()) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    for _ in 0..20 {
        frames.extend(bench.fill_all(20_000));
        bench.publish_all();
        assert!(bench.link.wants_room(), "more than any socket buffer holds");
        let [Some(Ready { fd, or_writable: true }), None] = bench.link.ready_fds() else {
            panic!("room is waited for: {:?}", bench.link.ready_fds())
        };
        bench.engine.watch(fd, token(), Interest::Both).unwrap();
        let mut events = Vec::new();
        while bench.link.wants_room() {
            drain();
            bench.engine.wait(Some(Duration::from_secs(30)), &mut events);
            assert!(!events.is_empty(), "there is room, and nobody says so");
            assert!(events.drain(..).all(|event| event.token == token()));
            bench.publish_all();
        }
        bench.engine.unwatch(fd, token());
        assert!(bench.link.ready_fds()[0].is_some_and(|ready| !ready.or_writable));
    }
    drain();
    frames
}

fn engines() -> [Box<dyn Engine>; 2] {
    [Box::new(Epoll::new().unwrap()), Box::new(Uring::new().unwrap())]
}

#[test]
fn a_stream_goes_on_where_its_socket_was_full() {
    for engine in engines() {
        let (mut bench, peer) = stream();
        bench.engine = engine;
        let mut got = Vec::new();
        let frames = through_a_full_socket(&mut bench, || got.extend(read_all(&peer)));
        assert!(frames.len() > SLOTS);
        let sent: Vec<u8> = frames.iter().flat_map(|frame| on_stream(frame)).collect();
        assert!(got == sent, "{} bytes came of {}, or others", got.len(), sent.len());
        bench.expect_open();
    }
}

#[test]
fn datagrams_wait_in_order_while_their_socket_is_full() {
    for engine in engines() {
        let (mut bench, peer) = datagrams();
        bench.engine = engine;
        let mut got = Vec::new();
        let frames = through_a_full_socket(&mut bench, || {
            let mut frame = vec![0; 30_000];
            while let Ok(len) = peer.recv(&mut frame) {
                got.push(frame[..len].to_vec());
            }
        });
        assert!(got == frames, "{} frames came of {}, or others", got.len(), frames.len());
        bench.expect_open();
    }
}

#[test]
fn a_datagram_is_a_frame() {
    let (mut bench, peer) = datagrams();
    let frames: Vec<Vec<u8>> = (0..200).map(|index| bytes(index * 20, index)).collect();
    for some in frames.chunks(20) {
        for frame in some {
            assert_eq!(peer.send(frame).unwrap(), frame.len());
        }
        assert_eq!(bench.receive(), some.iter().cloned().map(Ok).collect::<Vec<_>>());
    }
    peer.send(&bytes(FRAME_MAX, 0)).unwrap();
    peer.send(&bytes(FRAME_MAX + 1, 0)).unwrap();
    peer.send(&bytes(FRAME_MAX + 100, 0)).unwrap();
    peer.send(b"").unwrap();
    peer.send(b"last").unwrap();
    let too_long = || Err(DropReason::FrameTooLong);
    let expected = [Ok(bytes(FRAME_MAX, 0)), too_long(), too_long(), Ok(Vec::new()), Ok(b"last".to_vec())];
    assert!(bench.receive() == expected);
    bench.expect_open();
}

#[test]
fn the_end_of_a_sender_of_datagrams_shows_when_a_frame_cannot_be_sent() {
    let (mut bench, peer) = datagrams();
    drop(peer);
    assert_eq!(bench.receive(), []);
    bench.expect_open();
    let space = bench.link.reserve(4).unwrap();
    bench.fill(space, b"lost");
    assert_eq!(bench.publish(), 1);
    bench.expect_end();
}

#[test]
fn a_frame_that_is_too_long_for_its_socket_is_lost_alone() {
    let (mut bench, peer) = datagrams();
    let own = bench.link.connection.as_ref().unwrap();
    socket2::SockRef::from(own).set_send_buffer_size(8192).unwrap();
    for len in [100, 60_000, 200] {
        let space = bench.link.reserve(len).unwrap();
        bench.fill(space, &bytes(len, 0));
    }
    assert_eq!(bench.publish_all(), 1);
    let mut frame = vec![0; 70_000];
    assert_eq!(peer.recv(&mut frame).unwrap(), HEAD.len() + 100);
    assert_eq!(peer.recv(&mut frame).unwrap(), HEAD.len() + 200);
    bench.expect_open();
}

#[test]
fn checksums_are_complete() {
    let (mut bench, peer) = stream();
    let head_bytes = bytes(42, 1);
    let head = Head { len: 42, transport_start: 34, checksum_offset: 6 };
    let offload = Offload { checksum_partial: true, segmentation: Segmentation::None };
    let space = bench.link.reserve(101).unwrap();
    let payload = bytes(101, 2);
    bench.link.space(space, &mut |piece| assert_eq!(piece.copy_from(&payload), 101));
    bench.link.commit(space, &InboundHead { bytes: &head_bytes, head, v4: true, offload }, 101);
    bench.publish();
    let got = read_all(&peer);
    assert_eq!(got[..4], 143u32.to_be_bytes());
    let sum = crate::frame::checksum::Sum::default().with(&got[4 + 34..]);
    // What the partial sum stood for is all that is missing.
    assert_eq!(sum.finish(), u16::from_be_bytes([head_bytes[40], head_bytes[41]]));
    assert_eq!(got[4 + 42..], payload);
}

#[test]
fn a_connection_leaves_nothing_to_the_next_one() {
    let (mut bench, mut peer) = stream();
    // In the middle of a frame, in both directions.
    peer.write_all(&on_stream(&bytes(1000, 0))[..500]).unwrap();
    assert_eq!(bench.receive(), []);
    bench.fill_all(20_000);
    bench.publish_all();
    assert!(bench.link.wants_room());
    let gone = bench.command(|control| control.detach(|| ()).unwrap());
    assert!(gone, "the guest's connections end");
    assert!(bench.link.reserve(0).is_none() && bench.link.ready_fds() == [None, None]);
    assert!(bench.publish() > 0, "what waited is lost");
    // The rest of the frame that came in part, and then the end.
    read_all_to_end(&peer);
    let (own, mut peer) = UnixStream::pair().unwrap();
    bench.attach(own);
    peer.write_all(&on_stream(b"hello")).unwrap();
    assert_eq!(bench.receive(), [Ok(b"hello".to_vec())]);
    let frames = bench.fill_all(100);
    assert_eq!(frames.len(), SLOTS, "no room has got lost");
    bench.publish_all();
    let mut got = vec![0; on_stream(&frames[0]).len()];
    peer.read_exact(&mut got).unwrap();
    assert_eq!(got, on_stream(&frames[0]));
}

fn read_all_to_end(mut peer: &UnixStream) {
    let mut bytes = Vec::new();
    peer.set_nonblocking(false).unwrap();
    peer.read_to_end(&mut bytes).unwrap();
}

#[test]
fn room_that_was_reserved_when_the_connection_ended_is_not_lost() {
    let (mut bench, peer) = datagrams();
    drop(peer);
    let spaces: Vec<Space> = (0..SLOTS - 1).map(|_| bench.link.reserve(10).unwrap()).collect();
    let space = bench.link.reserve(4).unwrap();
    bench.fill(space, b"lost");
    assert_eq!(bench.publish(), 1);
    for (index, space) in spaces.into_iter().enumerate() {
        if index % 2 == 0 {
            bench.fill(space, b"too late");
        } else {
            bench.link.cancel(space);
        }
    }
    assert_eq!(bench.publish(), SLOTS / 2);
    bench.command(|control| control.detach(|| ()).unwrap());
    let (own, peer) = UnixDatagram::pair().unwrap();
    bench.attach(own);
    bench.expect_open();
    assert_eq!(bench.fill_all(10).len(), SLOTS);
    drop(peer);
}

#[test]
fn some_room_is_kept_for_frames_that_are_complete() {
    let (mut bench, _peer) = stream();
    let ahead = std::iter::from_fn(|| bench.link.reserve_ahead(66, Ahead::Bytes(1400))).count();
    assert_eq!(ahead, SLOTS / 2);
    assert!(!bench.link.may_reserve_ahead());
    assert_eq!(std::iter::from_fn(|| bench.link.reserve(0)).count(), SLOTS / 2);
}
