//! Which pairs of queues the guest uses.
//!
//! A driver uses the first so many (virtio 1.3, 5.1.6.5.6), and may change how many at any time. The workers of the others
//! keep their flows, and what is for the guest goes by way of another worker, its *stand-in*.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

/// How many pairs are used, as all queues of a machine and its session see it.
#[derive(Clone, Default)]
pub struct Pairs(Arc<AtomicU16>);

impl Pairs {
    /// So many are used from now on. Returns how many were before.
    pub fn set(&self, used: u16) -> u16 {
        self.0.swap(used, Ordering::AcqRel)
    }

    /// The pair that takes the place of one that is not used; `None` where that is used, and where none is.
    pub fn stand_in(&self, pair: u16) -> Option<u16> {
        let used = self.0.load(Ordering::Acquire);
        (used != 0 && pair >= used).then(|| pair % used)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_that_are_off_have_stand_ins_among_those_that_are_used() {
        let pairs = Pairs::default();
        assert_eq!(pairs.stand_in(0), None, "there is no guest");
        assert_eq!(pairs.stand_in(3), None);
        pairs.set(2);
        assert_eq!([0, 1, 2, 3, 4].map(|pair| pairs.stand_in(pair)), [None, None, Some(0), Some(1), Some(0)]);
    }
}
