//! Frames on their way to the guest: each in a slot of memory, complete, until the socket has taken it.

use std::collections::VecDeque;

use crate::frame::build::HEAD_MAX;
use crate::io::{Buffers, Piece};
use crate::link::{FRAME_MAX, InboundHead, Space, complete};

/// Frames at the most.
const SLOTS: usize = 64;
/// Of them, kept for frames that are complete: while the socket is full, acknowledgements of what the guest sends wait too.
const SLOTS_KEPT: usize = 32;

/// The length in front of a frame on a stream, in bytes.
pub const LENGTH_LEN: usize = 4;

/// Room before a payload: the length and the longest head, rounded up to a cache line.
const HEAD_ROOM: usize = (LENGTH_LEN + HEAD_MAX).next_multiple_of(64);

/// A committed frame: its slot, and where in it its bytes begin and end.
struct Frame {
    slot: u32,
    start: usize,
    end: usize,
}

/// The slots, and the frames that wait in order.
pub struct Staged {
    slots: Buffers,
    /// The one used last, whose bytes are in the cache, on top.
    free: Vec<u32>,
    waiting: VecDeque<Frame>,
    lost: usize,
}

impl Staged {
    /// Nothing yet.
    pub fn new() -> Self {
        Self {
            slots: Buffers::new(SLOTS, HEAD_ROOM + FRAME_MAX),
            free: (0..SLOTS as u32).rev().collect(),
            waiting: VecDeque::with_capacity(SLOTS),
            lost: 0,
        }
    }

    /// Room for a frame.
    pub fn reserve(&mut self, payload_len: usize) -> Option<Space> {
        let capacity = payload_len.min(FRAME_MAX);
        self.free.pop().map(|index| Space { index, capacity })
    }

    /// Whether a frame whose payload has yet to come may have room.
    pub fn may_reserve_ahead(&self) -> bool {
        self.free.len() > SLOTS_KEPT
    }

    /// The piece for a payload.
    pub fn payload(&self, space: Space) -> Piece {
        self.slots.piece(space.index as usize).part(HEAD_ROOM, space.capacity)
    }

    /// The frame in `space` is complete: it gets its head, its checksum and, where the link has them, its length.
    pub fn commit(&mut self, space: Space, head: &InboundHead<'_>, payload_len: usize, has_length: bool) {
        let end = HEAD_ROOM + payload_len;
        let bytes = self.slots.bytes_mut(space.index as usize, end);
        let mut start = HEAD_ROOM - head.bytes.len();
        bytes[start..HEAD_ROOM].copy_from_slice(head.bytes);
        if head.offload.checksum_partial {
            complete::checksum(&mut bytes[start..], head);
        }
        if has_length {
            let len = (end - start) as u32;
            bytes[start - LENGTH_LEN..start].copy_from_slice(&len.to_be_bytes());
            start -= LENGTH_LEN;
        }
        self.waiting.push_back(Frame { slot: space.index, start, end });
    }

    /// Nothing came into `space`.
    pub fn cancel(&mut self, space: Space) {
        self.free.push(space.index);
    }

    /// The frame in `space` has nowhere to go.
    pub fn lose(&mut self, space: Space) {
        self.cancel(space);
        self.lost += 1;
    }

    /// Whether no frame waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The frames that wait, in order.
    pub fn pieces(&self) -> impl Iterator<Item = Piece> {
        self.waiting
            .iter()
            .map(|frame| self.slots.piece(frame.slot as usize).part(frame.start, frame.end - frame.start))
    }

    /// Bytes of the first frame.
    pub fn first_len(&self) -> Option<usize> {
        self.waiting.front().map(|frame| frame.end - frame.start)
    }

    /// The first frame has gone out.
    pub fn sent(&mut self) {
        self.free.extend(self.waiting.pop_front().map(|frame| frame.slot));
    }

    /// The first frame will never go out.
    pub fn lose_first(&mut self) {
        self.sent();
        self.lost += 1;
    }

    /// No frame that waits will ever go out.
    pub fn lose_all(&mut self) {
        while !self.is_empty() {
            self.lose_first();
        }
    }

    /// Frames lost since this was asked last.
    pub fn take_lost(&mut self) -> usize {
        std::mem::take(&mut self.lost)
    }
}
