//! Where all randomness of the simulation and of tests comes from: one seed (SplitMix64, Steele and others 2014).
//!
//! Parts of a world get generators of their own ([`Random::fork`]), so that one part that asks more often does not
//! change what the others get.

/// A stream of random numbers.
#[derive(Clone, Debug)]
pub struct Random(u64);

const MILLION: u64 = 1_000_000;

impl Random {
    /// The stream of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed ^ 0x5851_f42d_4c95_7f2d)
    }

    /// An independent stream.
    #[must_use]
    pub fn fork(&mut self) -> Self {
        Self(self.bits())
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// A number from 0 to `bound - 1`; 0 when there is none.
    pub fn below(&mut self, bound: u64) -> u64 {
        // The high half of the product: close enough to even for bounds far below 2^64.
        ((u128::from(self.bits()) * u128::from(bound)) >> 64) as u64
    }

    /// A number from `range.0` to `range.1`, both included.
    pub fn within(&mut self, range: (u64, u64)) -> u64 {
        range.0 + self.below(range.1.saturating_sub(range.0).saturating_add(1))
    }

    /// A number from 1 to `most`, small ones as likely as large ones (each power of two has the same share).
    pub fn spread(&mut self, most: u64) -> u64 {
        let bits = self.within((0, u64::from(most.max(1).ilog2())));
        self.within((1 << bits, (2 << bits) - 1)).min(most)
    }

    /// True so many times in a million.
    pub fn chance(&mut self, per_million: u64) -> bool {
        self.below(MILLION) < per_million
    }

    /// True once in so many times.
    pub fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    /// One of several.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}
