//! Which memory of the link may be touched at this moment.
//!
//! The model link lends pieces of its memory: payload of frames until the batch is released, space for frames to the
//! guest until it is committed or cancelled. The model engine asks here about every piece of every operation, so zero
//! copy is something a test shows: bytes that could come straight from the guest's frame are seen to come from there,
//! and nothing is read after it was given back.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::io::{Buffers, Piece};

/// What a piece of the link's memory is lent for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lent {
    /// Payload of a frame from the guest, to be read.
    Payload,
    /// Space for a frame to the guest, to be written.
    Space,
}

/// Where a piece lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// In a lent part of the link's memory.
    Link(Lent),
    /// Outside of the link's memory: in hythe's own.
    Own,
}

/// The link's memory, and what of it is lent.
#[derive(Default)]
pub struct Memory {
    arenas: Vec<Range<usize>>,
    /// By start: the end, and what for.
    lent: BTreeMap<usize, (usize, Lent)>,
}

fn span(piece: &Piece) -> Range<usize> {
    let start = piece.start() as usize;
    start..start + piece.len()
}

impl Memory {
    /// All slots of `buffers` are the link's.
    pub fn add_arena(&mut self, buffers: &Buffers) {
        let first = span(&buffers.piece(0));
        let last = span(&buffers.piece(buffers.slots() - 1));
        self.arenas.push(first.start..last.end);
    }

    /// Lends a piece.
    pub fn lend(&mut self, piece: &Piece, lent: Lent) {
        if !piece.is_empty() {
            let Range { start, end } = span(piece);
            self.lent.insert(start, (end, lent));
        }
    }

    /// Takes a piece back.
    pub fn take_back(&mut self, piece: &Piece) {
        if !piece.is_empty() {
            self.lent.remove(&span(piece).start);
        }
    }

    /// Where a piece lies, or what is wrong with it.
    pub fn place(&self, piece: &Piece) -> Result<Place, String> {
        let Range { start, end } = span(piece);
        if !self.arenas.iter().any(|arena| start < arena.end && arena.start < end) {
            return Ok(Place::Own);
        }
        match self.lent.range(..=start).next_back() {
            Some((_, (lent_end, lent))) if end <= *lent_end => Ok(Place::Link(*lent)),
            _ => Err(format!("a piece of {} bytes lies in memory of the link that is not lent", end - start)),
        }
    }

    /// How many pieces are lent.
    pub fn lent(&self) -> usize {
        self.lent.len()
    }
}
