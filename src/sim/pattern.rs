//! The bytes of streams: known from a stream's number and an offset, so that nobody has to keep them.

use std::rc::Rc;

use crate::random::Random;

/// The pattern's period: a prime, so that no power of two is a multiple of it.
const PERIOD: usize = 65_521;
/// The longest slice that [`Pattern::slice`] gives.
pub const SLICE_MAX: usize = 2 * PERIOD;

/// Bytes by stream and offset.
#[derive(Clone)]
pub struct Pattern(Rc<[u8]>);

impl Pattern {
    /// The bytes of a world.
    pub fn new(random: &mut Random) -> Self {
        let one: Vec<u8> = (0..PERIOD).map(|_| random.bits() as u8).collect();
        Self(one.iter().cycle().take(PERIOD + SLICE_MAX).copied().collect())
    }

    /// `len` bytes of a stream from `offset` on; at most [`SLICE_MAX`].
    pub fn slice(&self, stream: u32, offset: u64, len: usize) -> &[u8] {
        let salt = u64::from(stream).wrapping_mul(0x9e37_79b1) % PERIOD as u64;
        let start = ((offset + salt) % PERIOD as u64) as usize;
        &self.0[start..start + len.min(SLICE_MAX)]
    }

    /// Whether `bytes` are those of a stream at `offset`; else where the first wrong one lies.
    pub fn compare(&self, stream: u32, offset: u64, bytes: &[u8]) -> Result<(), u64> {
        let mut at = offset;
        for part in bytes.chunks(SLICE_MAX) {
            let expected = self.slice(stream, at, part.len());
            if expected != part {
                let wrong = part.iter().zip(expected).position(|(a, b)| a != b).unwrap_or(0);
                return Err(at + wrong as u64);
            }
            at += part.len() as u64;
        }
        Ok(())
    }
}
