//! The guest's MAC, which all workers and the slow path know.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::frame::address::Mac;

/// The guest's MAC: the one it was given, or that of its first frame where somebody else chooses it (the monitor of a
/// virtual machine does).
#[derive(Clone, Debug)]
pub struct GuestMac {
    /// The MAC in the lower 48 bits, and whether it is known.
    value: Arc<AtomicU64>,
    /// What it is while it is not known.
    given: u64,
}

const KNOWN: u64 = 1 << 48;

impl GuestMac {
    /// A MAC that the guest was given.
    pub fn given(mac: Mac) -> Self {
        let given = number(mac) | KNOWN;
        Self { value: Arc::new(AtomicU64::new(given)), given }
    }

    /// One that the guest shows by its first frame; `expected` until then.
    pub fn learned(expected: Mac) -> Self {
        let given = number(expected);
        Self { value: Arc::new(AtomicU64::new(given)), given }
    }

    /// The MAC, as far as it is known.
    pub fn get(&self) -> Mac {
        let bytes = self.value.load(Ordering::Relaxed).to_be_bytes();
        Mac([bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]])
    }

    /// Whether a frame may come from `source`: it is the guest's MAC, or becomes it.
    pub fn accepts(&self, source: Mac) -> bool {
        let known = self.value.load(Ordering::Relaxed);
        if known & KNOWN != 0 {
            return known == number(source) | KNOWN;
        }
        if source.is_group() {
            return false;
        }
        // Of two workers that learn at once, one wins.
        let learned = number(source) | KNOWN;
        match self.value.compare_exchange(known, learned, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => true,
            Err(other) => other == learned,
        }
    }

    /// Another guest may come: what was learned is forgotten.
    pub fn forget(&self) {
        self.value.store(self.given, Ordering::Relaxed);
    }
}

fn number(mac: Mac) -> u64 {
    mac.0.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIVEN: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const OTHER: Mac = Mac([2, 0, 0, 0, 0, 9]);

    #[test]
    fn a_given_one_is_the_only_one() {
        let mac = GuestMac::given(GIVEN);
        assert!(mac.accepts(GIVEN) && !mac.accepts(OTHER));
        mac.forget();
        assert!(mac.accepts(GIVEN) && !mac.accepts(OTHER));
        assert_eq!(mac.get(), GIVEN);
    }

    #[test]
    fn the_first_one_that_is_seen_stays_until_it_is_forgotten() {
        let mac = GuestMac::learned(GIVEN);
        assert_eq!(mac.get(), GIVEN);
        assert!(!mac.accepts(Mac([0xff; 6])), "nobody's");
        assert!(mac.clone().accepts(OTHER));
        assert_eq!(mac.get(), OTHER);
        assert!(!mac.accepts(GIVEN));
        mac.forget();
        assert!(mac.accepts(GIVEN));
    }
}
