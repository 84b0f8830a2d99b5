//! Planted bugs: the checkers are checked.
//!
//! Each fault is a bug that the worker could have, put where it would show: at the seams (engine, sockets, link, and the
//! heads of segments on their way out) by the wrappers below, and where no seam sees it by a step that the worker leaves
//! out ([`Omission`]). Without a fault the wrappers pass everything through.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::time::Duration;

use crate::flow::slab::Slot;
use crate::frame::address::Endpoint;
use crate::frame::tcp::{Flags, Seq};
use crate::frame::view::{Content, Transport, View};
use crate::host::engine::{Engine, EngineCounts, Event, Interest, Token};
use crate::host::errors::{QueuedError, SocketError};
use crate::host::tcp::Accepted;
use crate::host::{ConnectPlan, EchoKind, EchoSocket, Sockets};
use crate::io::{Kind, Operations, Piece};
use crate::link::{Ahead, Capabilities, InboundHead, Link, OutboundFrame, READY_FDS, Ready, Received, Space};

use crate::random::Random;
use crate::worker::simulated::{Omission, omit};

use super::check::Name;

/// A planted bug.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// What a socket does not take is forgotten.
    ShortSendDropped,
    /// The acknowledgement covers what arrived, whether or not it was taken.
    AcknowledgedBeforeTaken,
    /// The window shrinks faster than bytes arrive.
    WindowRetreats,
    /// An empty receive queue counts as the end of the stream.
    EndBeforeData,
    /// An event of an earlier generation of a slot is honoured.
    StaleHandle,
    /// A space goes back to the link twice.
    ReturnedTwice,
    /// A space never goes back to the link.
    SpaceLeaked,
    /// A batch of frames is not released.
    FramesKept,
    /// A report of readiness gets lost.
    LostWakeUp,
    /// The peek offset is not moved back for a retransmission.
    PeekNotRewound,
    /// A time-out is armed once only.
    TimeoutNotRearmed,
    /// A mapping whose flows have ended stays.
    MappingLeaked,
    /// More is dropped from the receive queue than the guest has.
    DiscardedTooMuch,
    /// A reset on one side becomes an orderly end on the other.
    ResetSwallowed,
    /// A frame that another worker owns goes to the wrong one.
    HandedOverLost,
    /// A frame that the stand-in should carry is gone.
    DetourLost,
    /// A stream moves to another worker, and its frames do not.
    MoveUntold,
    /// Room that is found while frames are published is slept on.
    FoundRoomUnused,
}

impl Fault {
    /// All of them.
    pub const ALL: &'static [Self] = &[
        Self::ShortSendDropped,
        Self::AcknowledgedBeforeTaken,
        Self::WindowRetreats,
        Self::EndBeforeData,
        Self::StaleHandle,
        Self::ReturnedTwice,
        Self::SpaceLeaked,
        Self::FramesKept,
        Self::LostWakeUp,
        Self::PeekNotRewound,
        Self::TimeoutNotRearmed,
        Self::MappingLeaked,
        Self::DiscardedTooMuch,
        Self::ResetSwallowed,
        Self::HandedOverLost,
        Self::DetourLost,
        Self::MoveUntold,
        Self::FoundRoomUnused,
    ];
}

thread_local! {
    static PLANTED: Cell<Option<Fault>> = const { Cell::new(None) };
}

/// Whether this bug is planted in the world that runs on this thread.
fn planted(fault: Fault) -> bool {
    PLANTED.get() == Some(fault)
}

/// A bug that is planted for as long as this lives.
pub struct Planting(());

impl Planting {
    /// Plants a bug, or none, on this thread.
    pub fn of(fault: Option<Fault>) -> Self {
        PLANTED.set(fault);
        omit(match fault {
            Some(Fault::TimeoutNotRearmed) => Some(Omission::RearmTimeout),
            Some(Fault::MappingLeaked) => Some(Omission::CloseMapping),
            Some(Fault::HandedOverLost) => Some(Omission::FindOwner),
            Some(Fault::MoveUntold) => Some(Omission::TellMove),
            Some(Fault::FoundRoomUnused) => Some(Omission::UseFoundRoom),
            _ => None,
        });
        Self(())
    }
}

impl Drop for Planting {
    fn drop(&mut self) {
        PLANTED.set(None);
        omit(None);
    }
}

/// An engine with bugs.
pub struct FaultyEngine<E> {
    inner: E,
    random: Random,
    /// The latest token by kind and index.
    latest: BTreeMap<(u8, u32), Token>,
}

impl<E> FaultyEngine<E> {
    /// An engine with the planted bug.
    pub fn new(inner: E, random: Random) -> Self {
        Self { inner, random, latest: BTreeMap::new() }
    }
}

impl<E: Engine> Engine for FaultyEngine<E> {
    fn run(&mut self, operations: &mut Operations) {
        let discard_too_much = planted(Fault::DiscardedTooMuch);
        for operation in &mut operations.list {
            if discard_too_much && operation.kind == Kind::Discard {
                operation.extra += 10;
            }
        }
        self.inner.run(operations);
        let Operations { list, pieces, .. } = operations;
        for operation in list {
            let first = operation.first_piece as usize;
            let asked: usize = pieces[first..first + operation.pieces as usize].iter().map(Piece::len).sum();
            match operation.kind {
                Kind::Send if planted(Fault::ShortSendDropped) && operation.result > 0 => {
                    operation.result = asked as i32;
                }
                Kind::Peek if planted(Fault::EndBeforeData) && operation.result == -libc::EAGAIN => {
                    operation.result = 0;
                }
                Kind::Discard if discard_too_much && operation.result > 0 => {
                    operation.extra -= 10;
                    operation.result = operation.result.min(operation.extra as i32);
                }
                _ => {}
            }
        }
    }

    fn watch(&mut self, fd: RawFd, token: Token, interest: Interest) -> io::Result<()> {
        self.latest.insert((token.kind, token.slot.index), token);
        self.inner.watch(fd, token, interest)
    }

    fn arm(&mut self, fd: RawFd, token: Token, interest: Interest) -> io::Result<()> {
        self.inner.arm(fd, token, interest)
    }

    fn unwatch(&mut self, fd: RawFd, token: Token) {
        self.inner.unwatch(fd, token);
    }

    fn wait(&mut self, timeout: Option<Duration>, events: &mut Vec<Event>) {
        self.inner.wait(timeout, events);
        if planted(Fault::LostWakeUp) {
            events.retain(|_| !self.random.chance(100_000));
        }
        if planted(Fault::StaleHandle) {
            for event in events.iter_mut() {
                let Slot { index, .. } = event.token.slot;
                if let Some(latest) = self.latest.get(&(event.token.kind, index)) {
                    event.token = *latest;
                }
            }
        }
    }

    fn counts(&self) -> EngineCounts {
        self.inner.counts()
    }
}

/// Sockets with bugs.
pub struct FaultySockets<S>(pub S);

impl<S: Sockets> Sockets for FaultySockets<S> {
    type Socket = S::Socket;

    fn connect(&mut self, plan: &ConnectPlan) -> Result<Self::Socket, SocketError> {
        self.0.connect(plan)
    }

    fn outcome(&mut self, socket: &Self::Socket) -> Result<(), SocketError> {
        self.0.outcome(socket)
    }

    fn establish(&mut self, socket: &Self::Socket, v4: bool, connecting: bool) -> bool {
        self.0.establish(socket, v4, connecting)
    }

    fn accept(&mut self, listener: RawFd) -> io::Result<Option<Accepted<Self::Socket>>> {
        self.0.accept(listener)
    }

    fn room(&mut self, socket: &Self::Socket) -> u32 {
        self.0.room(socket)
    }

    fn seek(&mut self, socket: &Self::Socket, offset: u32) {
        if !planted(Fault::PeekNotRewound) {
            self.0.seek(socket, offset);
        }
    }

    fn shut_down(&mut self, socket: &Self::Socket) {
        self.0.shut_down(socket);
    }

    fn keep_alive(&mut self, socket: &Self::Socket, after: Duration) {
        self.0.keep_alive(socket, after);
    }

    fn pair(&mut self) -> io::Result<(Self::Socket, OwnedFd)> {
        self.0.pair()
    }

    fn local(&mut self, socket: &Self::Socket) -> Option<Endpoint> {
        self.0.local(socket)
    }

    fn reset(&mut self, socket: Self::Socket) {
        if planted(Fault::ResetSwallowed) {
            drop(socket);
        } else {
            self.0.reset(socket);
        }
    }

    fn open_udp(&mut self, v4: bool, port: Option<u16>) -> io::Result<Self::Socket> {
        self.0.open_udp(v4, port)
    }

    fn open_echo(&mut self, v4: bool, id: u16) -> io::Result<EchoSocket<Self::Socket>> {
        self.0.open_echo(v4, id)
    }

    fn close_echo(&mut self, socket: Self::Socket, kind: EchoKind) {
        self.0.close_echo(socket, kind);
    }

    fn set_dont_fragment(&mut self, socket: &Self::Socket, v4: bool, on: bool) {
        self.0.set_dont_fragment(socket, v4, on);
    }

    fn take_error(&mut self, socket: &Self::Socket) -> Option<QueuedError> {
        self.0.take_error(socket)
    }
}

/// A link with bugs.
pub struct FaultyLink<L> {
    inner: L,
    random: Random,
    /// The end of what has arrived from the guest, by connection.
    arrived: BTreeMap<Name, Seq>,
}

impl<L> FaultyLink<L> {
    /// A link with the planted bug.
    pub fn new(inner: L, random: Random) -> Self {
        Self { inner, random, arrived: BTreeMap::new() }
    }

    /// The link behind it.
    pub fn inner(&self) -> &L {
        &self.inner
    }
}

/// The TCP segment in a frame's first bytes: the guest's and the remote endpoint (`outbound` says which is the
/// source), where the TCP header starts, and the segment.
fn segment_in(
    head: &[u8],
    len: usize,
    outbound: bool,
) -> Option<(Name, usize, crate::frame::tcp::SegmentHead)> {
    let Content::Ip(packet) = View::parse(head, len).ok()?.content else { return None };
    let Transport::Tcp(tcp) = packet.transport else { return None };
    let source = Endpoint { address: packet.ip.source, port: tcp.source_port };
    let destination = Endpoint { address: packet.ip.destination, port: tcp.destination_port };
    let name = if outbound { (source, destination) } else { (destination, source) };
    Some((name, packet.transport_start, tcp.segment))
}

impl<L: Link> FaultyLink<L> {
    fn note_arrivals(&mut self) {
        let mut index = 0;
        while let Some(frame) = self.inner.frame(index) {
            if let Some((name, _, segment)) = segment_in(frame.head, frame.len, true) {
                let end = segment.seq + segment.sequence_len();
                let known = self.arrived.get(&name).copied();
                let syn = segment.flags.has(Flags::SYN);
                let end = known.filter(|_| !syn).map_or(end, |known| known.max(end));
                self.arrived.insert(name, end);
            }
            index += 1;
        }
    }

    /// The head of a segment, as the planted bug has it.
    fn spoil(&mut self, head: &mut [u8], payload_len: usize) {
        let len = head.len() + payload_len;
        let Some((name, start, segment)) = segment_in(head, len, false) else { return };
        if !segment.flags.has(Flags::ACK) || segment.flags.has(Flags::RST) || segment.flags.has(Flags::SYN) {
            return;
        }
        if planted(Fault::AcknowledgedBeforeTaken)
            && let Some(end) = self.arrived.get(&name).filter(|end| segment.ack.before(**end))
        {
            head[start + 8..start + 12].copy_from_slice(&end.0.to_be_bytes());
        }
        if planted(Fault::WindowRetreats) && self.random.chance(100_000) {
            head[start + 14..start + 16].copy_from_slice(&(segment.window / 2).to_be_bytes());
        }
    }
}

impl<L: Link> Link for FaultyLink<L> {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn ready_fds(&self) -> [Option<Ready>; READY_FDS] {
        self.inner.ready_fds()
    }

    fn woken(&mut self, which: usize) {
        self.inner.woken(which);
    }

    fn has_work(&self) -> bool {
        self.inner.has_work()
    }

    fn wants_room(&self) -> bool {
        self.inner.wants_room()
    }

    fn prepare_sleep(&mut self) -> bool {
        self.inner.prepare_sleep()
    }

    fn begin_receive(&mut self, operations: &mut Operations) {
        self.inner.begin_receive(operations);
    }

    fn end_receive(&mut self, operations: &Operations) -> Received {
        let received = self.inner.end_receive(operations);
        if planted(Fault::AcknowledgedBeforeTaken) {
            self.note_arrivals();
        }
        received
    }

    fn frame(&self, index: usize) -> Option<OutboundFrame<'_>> {
        self.inner.frame(index)
    }

    fn payload(&self, index: usize, from: usize, len: usize, take: &mut dyn FnMut(Piece)) {
        self.inner.payload(index, from, len, take);
    }

    fn release(&mut self) {
        if !(planted(Fault::FramesKept) && self.random.chance(100_000)) {
            self.inner.release();
        }
    }

    fn has_unpublished(&self) -> bool {
        self.inner.has_unpublished()
    }

    fn reserve(&mut self, payload_len: usize) -> Option<Space> {
        self.inner.reserve(payload_len)
    }

    fn may_reserve_ahead(&self) -> bool {
        self.inner.may_reserve_ahead()
    }

    fn reserve_ahead(&mut self, head_len: usize, payload: Ahead) -> Option<Space> {
        self.inner.reserve_ahead(head_len, payload)
    }

    fn space(&self, space: Space, take: &mut dyn FnMut(Piece)) {
        self.inner.space(space, take);
    }

    fn commit(&mut self, space: Space, head: &InboundHead<'_>, payload_len: usize) {
        let mut bytes = head.bytes.to_vec();
        self.spoil(&mut bytes, payload_len);
        self.inner.commit(space, &InboundHead { bytes: &bytes, ..*head }, payload_len);
    }

    fn cancel(&mut self, space: Space) {
        if planted(Fault::SpaceLeaked) {
            return;
        }
        self.inner.cancel(space);
        if planted(Fault::ReturnedTwice) {
            self.inner.cancel(space);
        }
    }

    fn begin_publish(&mut self, operations: &mut Operations) {
        self.inner.begin_publish(operations);
    }

    fn end_publish(&mut self, operations: &Operations) -> usize {
        self.inner.end_publish(operations)
    }

    fn stand_in(&self) -> Option<u8> {
        self.inner.stand_in()
    }

    fn take_detoured(&mut self) -> Option<Vec<u8>> {
        let frame = self.inner.take_detoured();
        frame.filter(|_| !planted(Fault::DetourLost))
    }

    fn is_closed(&self) -> bool {
        self.inner.is_closed()
    }
}
