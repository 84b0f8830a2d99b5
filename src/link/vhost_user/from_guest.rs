//! Batches of frames from the guest's transmit queue.

use crate::frame::drop_reason::DropReason;
use crate::frame::offload::{HEADER_LEN, Offload};
use crate::frame::view::HEAD_LEN;
use crate::io::Piece;
use crate::link::virtqueue::{Chain, Direction, Fault, SplitQueue};
use crate::link::{FRAME_MAX, OutboundFrame, Received};

/// Frames of a batch at the most.
const BATCH: usize = 64;

/// Bytes of a batch, about: what stays in the cache until it is sent.
const BATCH_BYTES: usize = 256 << 10;

/// The longest frame that is believed: the length that IPv6 tells leaves its header out (RFC 8200, 3). A chain may have
/// 4 GiB, the same buffer over and over, and who keeps a frame copies all of it.
const LONGEST: usize = FRAME_MAX + 40;

/// The start of a frame that is copied out: virtio-net header and head.
const COPIED: usize = HEADER_LEN + HEAD_LEN;

struct Frame {
    chain: Chain,
    first_piece: usize,
    head: [u8; COPIED],
    copied: usize,
}

/// The frames of one pass, and what is where.
pub struct FromGuest {
    frames: Vec<Frame>,
    pieces: Vec<Piece>,
}

/// Buffers that a frame has as a rule: heads, and payload in pages.
const FRAME_PIECES: usize = 18;

impl FromGuest {
    /// An empty batch, with the memory of a full one.
    pub fn new() -> Self {
        Self { frames: Vec::with_capacity(BATCH), pieces: Vec::with_capacity(BATCH * FRAME_PIECES) }
    }

    /// Takes the next batch.
    pub fn receive(&mut self, queue: &mut SplitQueue) -> Result<Received, Fault> {
        debug_assert!(self.frames.is_empty());
        let mut bytes = 0;
        while self.frames.len() < BATCH && bytes < BATCH_BYTES {
            let first_piece = self.pieces.len();
            let Some(chain) = queue.take(Direction::FromDriver, &mut self.pieces)? else {
                return Ok(Received { frames: self.frames.len(), empty: true });
            };
            bytes += chain.bytes as usize;
            let mut frame = Frame { chain, first_piece, head: [0; COPIED], copied: 0 };
            for piece in &self.pieces[first_piece..] {
                frame.copied += piece.copy_out(&mut frame.head[frame.copied..]);
                if frame.copied == COPIED {
                    break;
                }
            }
            self.frames.push(frame);
        }
        Ok(Received { frames: self.frames.len(), empty: false })
    }

    /// A frame of the batch.
    pub fn frame(&self, index: usize) -> Option<OutboundFrame<'_>> {
        let frame = self.frames.get(index)?;
        let copied = &frame.head[..frame.copied];
        let len = (frame.chain.bytes as usize).saturating_sub(HEADER_LEN);
        // A chain too short for its header says nothing that could be believed.
        let (head, offload) = match copied.get(HEADER_LEN..) {
            Some(head) if len > LONGEST => (head, Err(DropReason::FrameTooLong)),
            Some(head) => (head, Offload::parse(copied)),
            None => (&[][..], Err(DropReason::Truncated)),
        };
        Some(OutboundFrame { head, len: len.min(LONGEST), offload })
    }

    /// Hands the pieces of a frame's bytes to `take`.
    pub fn payload(&self, index: usize, from: usize, len: usize, take: &mut dyn FnMut(Piece)) {
        let Some(frame) = self.frames.get(index) else { return };
        let pieces = &self.pieces[frame.first_piece..frame.first_piece + frame.chain.pieces as usize];
        part_of(pieces, HEADER_LEN + from, len, take);
    }

    /// Gives all chains of the batch back; how many those were.
    pub fn release(&mut self, queue: &mut SplitQueue) -> u16 {
        for frame in self.frames.drain(..) {
            queue.give_back(frame.chain, 0);
        }
        self.pieces.clear();
        queue.publish()
    }

    /// Forgets the batch: its queue has failed or is gone.
    pub fn forget(&mut self) {
        self.frames.clear();
        self.pieces.clear();
    }
}

/// Hands `len` bytes from `from` on of what some pieces are together to `take`.
pub fn part_of(pieces: &[Piece], from: usize, len: usize, take: &mut dyn FnMut(Piece)) {
    let (mut skip, mut rest) = (from, len);
    for piece in pieces {
        #[cfg(test)]
        crate::link::virtqueue::steps::count();
        if rest == 0 {
            return;
        }
        let skipped = skip.min(piece.len());
        skip -= skipped;
        let part = piece.part(skipped, rest);
        rest -= part.len();
        if !part.is_empty() {
            take(part);
        }
    }
}
