//! TCP flows of a worker.
//!
//! A stream is a relay (numbers), a host socket, and the few bytes that neither side has taken yet. Whatever happens
//! to it in a pass, a segment, an event of its socket, a deadline, is told to its relay and *touches* it; at the end
//! of the pass [`settle`] does for every touched stream what its relay wants, in one batch.
//!
//! * [`open`]: how streams begin, in both directions, and what the guest is told when they do not
//! * [`outbound`]: segments of the guest
//! * [`inbound`]: events of the host socket, and frames with its bytes
//! * [`settle`]: the batch
//! * [`rehome`]: another host side
//! * [`unanswerable`]: clients that the guest cannot answer under their own address

pub(super) mod inbound;
pub(super) mod open;
pub(super) mod outbound;
mod rehome;
pub(super) mod settle;
pub(super) mod unanswerable;

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;

use crate::flow::key::FlowKey;
use crate::flow::table::Position;
use crate::frame::address::Endpoint;
use crate::frame::tcp::Seq;
use crate::io::ByteQueue;
use crate::relay::tcp::TcpRelay;

/// What kind of stream the host side is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostKind {
    /// A TCP socket.
    Tcp,
    /// One end of a socketpair whose other end hythe itself serves.
    Pair,
}

/// The host side of a stream.
pub struct HostSide<S> {
    /// The socket.
    pub socket: S,
    /// Its kind.
    pub kind: HostKind,
    /// The destination or the client; of no meaning for a pair.
    pub peer: Endpoint,
    /// Whether the kernel keeps a peek offset for it.
    pub keeps_offset: bool,
    /// Where the next peek starts, from the start of the receive queue.
    pub position: u32,
    /// Peeks since bytes were discarded last.
    pub peeks: u8,
    /// The peer has closed its direction, or the socket failed: a short read is not the end of what there is to learn.
    pub closed: bool,
    /// The socket failed. What it had received before goes to the guest first.
    pub failed: bool,
    /// The peer has sent urgent data. It is delivered in line, but the kernel ends every read at its mark: a short one
    /// says nothing then.
    pub urgent: bool,
}

impl<S> HostSide<S> {
    /// A socket of which nothing was read.
    pub fn new(socket: S, kind: HostKind, peer: Endpoint) -> Self {
        Self {
            socket,
            kind,
            peer,
            keeps_offset: false,
            position: 0,
            peeks: 0,
            closed: false,
            failed: false,
            urgent: false,
        }
    }
}

/// The host side that a stream is to have next.
pub struct NextHost<S> {
    /// The host side.
    pub host: HostSide<S>,
    /// The old one's last byte was read.
    pub old_ended: bool,
}

/// How a stream came to be.
#[derive(Clone, Copy, Debug)]
pub enum Origin {
    /// The guest opened it.
    Outbound {
        /// The connect has no outcome yet, and is counted as one under way.
        connecting: bool,
        /// The other loopback address is tried when the connect fails.
        alternative: bool,
        /// The traffic class of the guest's SYN.
        traffic_class: u8,
    },
    /// A client called a published port.
    Inbound {
        /// The publication's number.
        publication: u32,
        /// The client.
        client: Endpoint,
        /// The client's own source was kept, and the guest has not shown that it can answer it.
        unproven: bool,
        /// The guest was asked at its address of the other family already.
        asked_both: bool,
    },
    /// hythe asks whether the guest listens at a published port.
    Probe {
        /// The publication's number.
        publication: u32,
        /// The guest was asked at its address of the other family already.
        asked_both: bool,
    },
}

/// A TCP flow.
pub struct Stream<S> {
    /// Its name.
    pub key: FlowKey,
    /// Where it lies in the flow table, once it does.
    pub position: Option<Position>,
    /// Its relay.
    pub relay: TcpRelay,
    /// Its host side, until both ends are done with it.
    pub host: Option<HostSide<S>>,
    /// The host side that it is to have next.
    pub next_host: Option<Box<NextHost<S>>>,
    /// How it came to be.
    pub origin: Origin,
    /// Bytes that wait.
    pub buffer: Option<Box<Buffer>>,
    /// Its place in the list of streams that something happened to in this pass.
    pub touched: Option<u32>,
    /// A host socket is counted for it.
    pub counted: bool,
    /// How many spaces the next peek may fill: grows while they are filled.
    pub burst: u8,
}

impl<S> Stream<S> {
    /// A stream without a host side, for which a host socket is counted.
    pub fn new(key: FlowKey, relay: TcpRelay, origin: Origin) -> Self {
        Self {
            key,
            position: None,
            relay,
            host: None,
            next_host: None,
            origin,
            buffer: None,
            touched: None,
            counted: true,
            burst: 1,
        }
    }
}

/// How many buffers of a worker's streams there are: each may grow to what its window promised.
#[derive(Clone, Default)]
pub struct BufferCount(Rc<Cell<u32>>);

impl BufferCount {
    /// One gibibyte of bytes that wait, if every buffer were full.
    const MAX: u32 = 16_384;

    /// Whether there may be one more.
    pub fn has_room(&self) -> bool {
        self.0.get() < Self::MAX
    }

    /// Whether there are so few that segments may be held out of order, which is a kindness.
    pub fn has_plenty(&self) -> bool {
        self.0.get() < Self::MAX / 4
    }

    /// One more buffer, empty; it is counted until it is dropped.
    pub fn open(&self) -> Buffer {
        self.0.set(self.0.get() + 1);
        Buffer { waiting: ByteQueue::default(), held: Vec::new(), count: self.clone() }
    }
}

/// Bytes from the guest that the socket has not taken, and segments held out of order.
pub struct Buffer {
    /// In order.
    pub waiting: ByteQueue,
    /// Out of order: stretches that neither touch nor overlap, as few as the relay's ranges, each with the sequence
    /// number of its first byte.
    held: Vec<(Seq, VecDeque<u8>)>,
    count: BufferCount,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.count.0.set(self.count.0.get() - 1);
    }
}

impl Buffer {
    /// Holds bytes that belong at `seq` and are not held yet.
    pub fn hold(&mut self, seq: Seq, bytes: &[u8]) {
        let end = seq + bytes.len() as u32;
        let after = self.held.iter().position(|(start, _)| *start == end);
        let before = self.held.iter().position(|(start, held)| *start + held.len() as u32 == seq);
        match (before, after) {
            (None, None) => self.held.push((seq, bytes.iter().copied().collect())),
            (Some(before), None) => self.held[before].1.extend(bytes),
            (None, Some(after)) => {
                bytes.iter().rev().for_each(|byte| self.held[after].1.push_front(*byte));
                self.held[after].0 = seq;
            }
            (Some(before), Some(after)) => {
                let mut rest = std::mem::take(&mut self.held[after].1);
                self.held[before].1.extend(bytes);
                self.held[before].1.append(&mut rest);
                self.held.swap_remove(after);
            }
        }
    }

    /// Moves `len` held bytes from `seq` on behind the waiting ones, and forgets what lies before their end.
    /// Returns whether all of them were there.
    pub fn release(&mut self, seq: Seq, len: u32) -> bool {
        let end = seq + len;
        let mut at = seq;
        while at.before(end) {
            let next = self
                .held
                .iter()
                .find(|(start, bytes)| !at.before(*start) && at.before(*start + bytes.len() as u32));
            let Some((start, bytes)) = next else { return false };
            let from = at.since(*start) as usize;
            let take = (bytes.len() - from).min(end.since(at) as usize);
            // Of the two halves of the ring, the one in which `from` lies; the other one follows in the next turn.
            let (first, second) = bytes.as_slices();
            let half = if from < first.len() { &first[from..] } else { &second[from - first.len()..] };
            let part = &half[..take.min(half.len())];
            self.waiting.append(part);
            at = at + part.len() as u32;
        }
        self.held.retain(|(start, bytes)| end.before(*start + bytes.len() as u32));
        true
    }

    /// Bytes that wait or are held.
    #[cfg(feature = "sim")]
    pub fn bytes(&self) -> usize {
        self.waiting.len() + self.held.iter().map(|(_, bytes)| bytes.len()).sum::<usize>()
    }

    /// Whether nothing waits and nothing is held.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.held.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_stream_takes_half_a_kilobyte_with_all_that_belongs_to_it() {
        let record = size_of::<Stream<std::os::fd::OwnedFd>>();
        // Beside the record: the slab's generation and link, a timer, and a table that is two thirds full.
        let beside = 16 + 24 + crate::flow::table::BYTES_PER_FLOW;
        println!("stream {record} bytes, with slab, timer and table {}", record + beside);
        assert!(record + beside <= 512, "{record} + {beside}");
    }

    #[test]
    fn held_bytes_are_released_in_order_whatever_their_overlaps() {
        let content = |buffer: &Buffer| {
            let mut bytes = Vec::new();
            buffer.waiting.pieces().iter().for_each(|piece| piece.copy_to(&mut bytes));
            bytes
        };
        let count = BufferCount::default();
        let mut buffer = count.open();
        buffer.waiting.append(b"abc");
        buffer.hold(Seq(16), b"ghi");
        buffer.hold(Seq(19), b"j");
        buffer.hold(Seq(30), b"later");
        buffer.hold(Seq(13), b"def");
        assert_eq!(buffer.held.len(), 2, "what touches is one");
        buffer.hold(Seq(26), b"no");
        buffer.hold(Seq(28), b"t ");
        assert_eq!(buffer.held.len(), 2);
        assert!(buffer.release(Seq(13), 7));
        assert_eq!(content(&buffer), b"abcdefghij");
        assert!(!buffer.is_empty());
        assert!(!buffer.release(Seq(20), 1), "not there");
        assert!(buffer.release(Seq(28), 7), "the first of them came again");
        assert_eq!(content(&buffer), b"abcdefghijt later");
        assert!(buffer.held.is_empty());
        assert_eq!(count.0.get(), 1);
        drop(buffer);
        assert_eq!(count.0.get(), 0);
    }
}
