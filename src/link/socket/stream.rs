//! Frames on a stream, each behind its length.
//!
//! ```text
//! buffer   │ frames of the batch, or of earlier ones │ the start of a frame │ room for one read
//!                                                  parsed                 filled
//! ```
//! A frame is handed out where it was read. What is left of a frame that has not come whole moves to the buffer's start
//! before the next read, so that there is always room for a long one.

use std::io;
use std::os::fd::RawFd;

use crate::frame::drop_reason::DropReason;
use crate::frame::offload::Offload;
use crate::frame::view::HEAD_LEN;
use crate::io::{Buffers, Kind, OperationId, Operations, Piece};
use crate::link::{FRAME_MAX, OutboundFrame};

use super::staged::{LENGTH_LEN, Staged};
use super::{Framing, State};

/// Frames of a batch at the most.
const BATCH: usize = 64;

/// Bytes of a read at the most: what stays in the cache until it is sent.
const READ: usize = 256 << 10;

/// A frame of the batch: where it lies, or what is wrong with it.
struct Frame {
    from: usize,
    len: usize,
    offload: Result<Offload, DropReason>,
}

/// Where a stream is, in both directions.
pub struct Stream {
    buffer: Buffers,
    /// The bytes before this are the batch's, or were an earlier one's.
    parsed: usize,
    filled: usize,
    frames: Vec<Frame>,
    /// The batch was full: there may be more whole frames, which come before another read.
    has_more: bool,
    read: Option<OperationId>,
    send: Option<OperationId>,
    /// Bytes of the first staged frame that have gone out.
    sent: usize,
}

impl Stream {
    /// A stream at its start.
    pub fn new() -> Self {
        Self {
            buffer: Buffers::new(1, LENGTH_LEN + FRAME_MAX + READ),
            parsed: 0,
            filled: 0,
            frames: Vec::with_capacity(BATCH),
            has_more: false,
            read: None,
            send: None,
            sent: 0,
        }
    }

    /// Adds whole frames to the batch. A length that no frame has is the end: where the next frame would begin is unknown.
    fn parse(&mut self) -> State {
        let bytes = self.buffer.bytes(0, self.filled);
        while let Some((length, rest)) = bytes[self.parsed..].split_first_chunk::<LENGTH_LEN>() {
            if self.frames.len() == BATCH {
                self.has_more = true;
                break;
            }
            let len = u32::from_be_bytes(*length) as usize;
            if len > FRAME_MAX {
                self.frames.push(wrong(DropReason::FrameTooLong));
                return State::Ended;
            }
            if len > rest.len() {
                break;
            }
            let from = self.parsed + LENGTH_LEN;
            self.frames.push(Frame { from, len, offload: Ok(Offload::default()) });
            self.parsed = from + len;
        }
        State::Open
    }
}

/// What came of bytes that are no frame.
fn wrong(reason: DropReason) -> Frame {
    Frame { from: 0, len: 0, offload: Err(reason) }
}

impl Framing for Stream {
    fn has_length(&self) -> bool {
        true
    }

    fn begin_receive(&mut self, socket: RawFd, operations: &mut Operations) {
        if self.has_more {
            return;
        }
        if self.parsed > 0 {
            self.buffer.bytes_mut(0, self.filled).copy_within(self.parsed.., 0);
            (self.parsed, self.filled) = (0, self.filled - self.parsed);
        }
        let room = self.buffer.piece(0).part(self.filled, READ);
        self.read = Some(operations.push(socket, Kind::Receive, [room]));
    }

    fn end_receive(&mut self, operations: &Operations) -> (usize, State) {
        let state = match self.read.take().map(|read| operations.result(read)) {
            None => State::Open,
            Some(Ok(0)) => State::Ended,
            Some(Ok(len)) => {
                self.filled += len;
                State::Open
            }
            Some(Err(error)) => State::after(&error),
        };
        self.has_more = false;
        let state = state.max(self.parse());
        if state == State::Ended && self.parsed < self.filled && self.frames.is_empty() {
            self.frames.push(wrong(DropReason::Truncated));
        }
        (self.frames.len(), state)
    }

    fn frame(&self, index: usize) -> Option<OutboundFrame<'_>> {
        let Frame { from, len, offload } = self.frames.get(index)?;
        let head = &self.buffer.bytes(0, from + len.min(&HEAD_LEN))[*from..];
        Some(OutboundFrame { head, len: *len, offload: *offload })
    }

    fn payload(&self, index: usize, from: usize, len: usize) -> Option<Piece> {
        let frame = self.frames.get(index)?;
        Some(self.buffer.piece(0).part(frame.from, frame.len).part(from, len))
    }

    fn release(&mut self) {
        self.frames.clear();
    }

    fn begin_send(&mut self, socket: RawFd, staged: &Staged, operations: &mut Operations) {
        let mut gone = self.sent;
        let rest = staged.pieces().map(|piece| piece.part(std::mem::take(&mut gone), piece.len()));
        self.send = Some(operations.push(socket, Kind::Send, rest));
    }

    fn end_send(&mut self, staged: &mut Staged, operations: &Operations) -> State {
        match self.send.take().map(|send| operations.result(send)) {
            None => State::Open,
            Some(Ok(len)) => {
                self.sent += len;
                while let Some(first) = staged.first_len().filter(|first| *first <= self.sent) {
                    self.sent -= first;
                    staged.sent();
                }
                State::Open
            }
            Some(Err(error))
                if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) =>
            {
                // Nobody reads any more. What was said before is read to its end, which is when the connection has ended.
                self.sent = 0;
                staged.lose_all();
                State::Open
            }
            // Of a frame that went out in part, the rest can be sent later (the socket has no room) or never.
            Some(Err(error)) => State::after(&error),
        }
    }

    fn reset(&mut self) {
        self.frames.clear();
        (self.parsed, self.filled, self.has_more) = (0, 0, false);
        (self.read, self.send, self.sent) = (None, None, 0);
    }
}
