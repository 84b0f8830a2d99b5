//! Streams of bytes whose every position is known, so that one that is lost, doubled or moved is found where it is.
//!
//! The standard library only: the guests of tests/guest are made with it as well.

use std::io::{self, Read, Write};

/// Bytes that one call moves.
const CHUNK: usize = 256 << 10;

/// An endless sequence of bytes, another one for each seed.
#[derive(Clone, Copy)]
pub struct Pattern(pub u64);

impl Pattern {
    /// The word at a position of the sequence (SplitMix64).
    fn word(self, index: u64) -> u64 {
        let mut z = self.0.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z ^ (z >> 27)
    }

    /// The bytes from `offset` on, which is a multiple of eight.
    fn fill(self, offset: u64, bytes: &mut [u8]) {
        for (index, piece) in (offset / 8..).zip(bytes.chunks_mut(8)) {
            let word = self.word(index).to_le_bytes();
            piece.copy_from_slice(&word[..piece.len()]);
        }
    }

    /// The first `len` bytes.
    pub fn bytes(self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.fill(0, &mut bytes);
        bytes
    }

    /// Writes `len` bytes of the sequence from `from` on, a multiple of eight.
    pub fn send(self, mut to: impl Write, from: u64, len: u64) -> io::Result<()> {
        let mut chunk = vec![0; CHUNK];
        let mut at = from;
        while at < from + len {
            let part = &mut chunk[..CHUNK.min((from + len - at) as usize)];
            self.fill(at, part);
            to.write_all(part)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Reads `len` bytes, which must be the sequence's from `from` on, a multiple of eight.
    pub fn expect(self, mut stream: impl Read, from: u64, len: u64) -> io::Result<()> {
        let (mut chunk, mut right) = (vec![0; CHUNK], vec![0; CHUNK]);
        let mut at = from;
        while at < from + len {
            let size = CHUNK.min((from + len - at) as usize);
            stream.read_exact(&mut chunk[..size])?;
            self.fill(at, &mut right[..size]);
            if chunk[..size] != right[..size] {
                let differ = |index: &usize| chunk[*index] != right[*index];
                let wrong: Vec<usize> = (0..size).filter(differ).collect();
                let (first, last) = (wrong[0], wrong[wrong.len() - 1]);
                panic!(
                    "byte {} is not the one that was sent; {} of the {} from there on are wrong: {:02x?} instead of {:02x?}",
                    at + first as u64,
                    wrong.len(),
                    last + 1 - first,
                    &chunk[first..size.min(first + 64)],
                    &right[first..size.min(first + 64)]
                );
            }
            at += size as u64;
        }
        Ok(())
    }
}
