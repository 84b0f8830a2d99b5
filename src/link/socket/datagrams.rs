//! Frames as messages, one each.

use std::os::fd::RawFd;

use crate::frame::drop_reason::DropReason;
use crate::frame::offload::Offload;
use crate::frame::view::HEAD_LEN;
use crate::io::{Buffers, Kind, OperationId, Operations, Piece};
use crate::link::{FRAME_MAX, OutboundFrame};

use super::staged::Staged;
use super::{Framing, State};

/// Frames of a batch at the most.
const BATCH: usize = 64;

/// Where the frames of a batch are, and which operations are under way.
pub struct Datagrams {
    /// An empty message is the end, and nothing else is.
    shows_end: bool,
    /// A byte more than a frame has shows that one is longer.
    buffers: Buffers,
    /// The batch's frames: in which buffer each lies, and its length. A read in the middle of a batch may have come too
    /// early for a frame that the next one got.
    frames: Vec<(usize, usize)>,
    /// How many frames to ask for.
    ask: usize,
    reads: Vec<OperationId>,
    send: Option<OperationId>,
}

impl Datagrams {
    /// Messages on a socket that shows the peer's end by an empty one, or on one that does not show it.
    pub fn new(shows_end: bool) -> Self {
        Self {
            shows_end,
            buffers: Buffers::new(BATCH, FRAME_MAX + 1),
            frames: Vec::with_capacity(BATCH),
            ask: 1,
            reads: Vec::with_capacity(BATCH),
            send: None,
        }
    }
}

/// Whether an error is about one frame, and not about the connection.
fn is_about_the_frame(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMSGSIZE | libc::ENOBUFS | libc::ENOMEM))
}

impl Framing for Datagrams {
    fn has_length(&self) -> bool {
        false
    }

    fn begin_receive(&mut self, socket: RawFd, operations: &mut Operations) {
        for slot in 0..self.ask {
            self.reads.push(operations.push(socket, Kind::Receive, [self.buffers.piece(slot)]));
        }
    }

    fn end_receive(&mut self, operations: &Operations) -> (usize, State) {
        let mut state = State::Open;
        let mut blocked = false;
        for (buffer, id) in self.reads.drain(..).enumerate() {
            // Only a last read that found nothing shows that there is nothing: what came since has the socket say so.
            blocked = false;
            match operations.result(id) {
                Ok(0) if self.shows_end => state = State::Ended,
                Ok(len) => self.frames.push((buffer, len)),
                Err(error) if State::after(&error) == State::Blocked => blocked = true,
                Err(_) => state = State::Ended,
            }
        }
        if blocked {
            state = state.max(State::Blocked);
        }
        let next = if blocked { self.frames.len() + 1 } else { self.ask * 2 };
        self.ask = next.min(BATCH);
        (self.frames.len(), state)
    }

    fn frame(&self, index: usize) -> Option<OutboundFrame<'_>> {
        let (buffer, len) = *self.frames.get(index)?;
        if len > FRAME_MAX {
            return Some(OutboundFrame { head: &[], len: 0, offload: Err(DropReason::FrameTooLong) });
        }
        let head = self.buffers.bytes(buffer, len.min(HEAD_LEN));
        Some(OutboundFrame { head, len, offload: Ok(Offload::default()) })
    }

    fn payload(&self, index: usize, from: usize, len: usize) -> Option<Piece> {
        let (buffer, whole) = *self.frames.get(index)?;
        Some(self.buffers.piece(buffer).part(0, whole).part(from, len))
    }

    fn release(&mut self) {
        self.frames.clear();
    }

    fn begin_send(&mut self, socket: RawFd, staged: &Staged, operations: &mut Operations) {
        self.send = Some(operations.push(socket, Kind::SendEach, staged.pieces()));
    }

    fn end_send(&mut self, staged: &mut Staged, operations: &Operations) -> State {
        match self.send.take().map(|send| operations.result(send)) {
            None => State::Open,
            Some(Ok(frames)) => {
                (0..frames).for_each(|_| staged.sent());
                State::Open
            }
            Some(Err(error)) if State::after(&error) == State::Blocked => State::Blocked,
            Some(Err(error)) => {
                staged.lose_first();
                // Where the end shows otherwise, what was sent before it is still to be read.
                if self.shows_end || is_about_the_frame(&error) { State::Open } else { State::Ended }
            }
        }
    }

    fn reset(&mut self) {
        self.frames.clear();
        self.reads.clear();
        self.send = None;
        self.ask = 1;
    }
}
