//! Virtual time, and what is to happen later.

use std::collections::BTreeMap;

use crate::time::Now;

/// Things that happen at a time; of those at the same time, in the order in which they were put in.
pub struct Agenda<T> {
    entries: BTreeMap<(u64, u64), T>,
    count: u64,
}

impl<T> Default for Agenda<T> {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), count: 0 }
    }
}

impl<T> Agenda<T> {
    /// `thing` happens at `at`.
    pub fn add(&mut self, at: Now, thing: T) {
        self.entries.insert((at.0, self.count), thing);
        self.count += 1;
    }

    /// The next time at which something happens.
    pub fn next(&self) -> Option<Now> {
        self.entries.first_key_value().map(|((at, _), _)| Now(*at))
    }

    /// What happens next, if it happens by `now`.
    pub fn take(&mut self, now: Now) -> Option<T> {
        let entry = self.entries.first_entry()?;
        (entry.key().0 <= now.0).then(|| entry.remove())
    }

    /// Whether something of a kind is to happen.
    pub fn any(&self, is: impl Fn(&T) -> bool) -> bool {
        self.entries.values().any(is)
    }

    /// How many things are to happen.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is to happen any more.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// The earliest of several times.
pub fn earliest(times: impl IntoIterator<Item = Option<Now>>) -> Option<Now> {
    times.into_iter().flatten().min()
}
