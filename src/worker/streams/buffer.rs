//! Bytes of the guest's that its stream has taken and the socket has not: in order, and held out of order.

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;

use crate::frame::tcp::Seq;
use crate::io::ByteQueue;

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
