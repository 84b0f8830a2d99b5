//! Whether one more flow may begin: budgets for a guest and for each destination.
//!
//! A connect that is not answered yet holds a socket. How many of them one destination may hold is bounded, so that
//! a black hole never uses up what other destinations need.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crossbeam::utils::CachePadded;

use crate::frame::address::Address;
use crate::frame::drop_reason::DropReason;

/// The bounds of a worker.
#[derive(Clone, Debug)]
pub struct Limits {
    /// What it shares with the others.
    pub descriptors: Descriptors,
    /// Connects under way to one destination address.
    pub connects_per_destination: u32,
    /// Connects under way in all.
    pub connects: u32,
}

/// The descriptors that all workers together may hold for flows: one may have what the others do not need. Written when one
/// is opened or closed.
#[derive(Clone, Debug)]
pub struct Descriptors {
    used: Arc<CachePadded<AtomicU32>>,
    limit: u32,
}

impl Descriptors {
    /// So many.
    pub fn new(limit: u32) -> Self {
        Self { used: Arc::default(), limit }
    }

    /// How many are held.
    pub fn used(&self) -> u32 {
        self.used.load(Ordering::Relaxed)
    }

    fn take(&self, count: u32) -> bool {
        let more = |used: u32| used.checked_add(count).filter(|used| *used <= self.limit);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    fn give_back(&self, count: u32) {
        self.used.fetch_sub(count, Ordering::Relaxed);
    }
}

/// What is in use. One a worker.
pub struct Admission {
    limits: Limits,
    sockets: u32,
    streams: u32,
    connects: u32,
    /// Connects under way by destination. The standard map is keyed SipHash: a guest chooses the destinations.
    by_destination: HashMap<Address, u32>,
}

impl Admission {
    /// Nothing in use.
    pub fn new(limits: Limits) -> Self {
        Self { limits, sockets: 0, streams: 0, connects: 0, by_destination: HashMap::new() }
    }

    /// Host sockets in use.
    pub fn sockets(&self) -> u32 {
        self.sockets
    }

    /// Connects under way.
    pub fn connects(&self) -> u32 {
        self.connects
    }

    /// Host sockets of streams in use.
    pub fn streams(&self) -> u32 {
        self.streams
    }

    /// Counts a stream's host socket in, or says why not.
    pub fn open_stream(&mut self) -> Result<(), DropReason> {
        self.open_sockets(1)?;
        self.streams += 1;
        Ok(())
    }

    /// Counts several descriptors in, or says why not.
    pub fn open_sockets(&mut self, count: u32) -> Result<(), DropReason> {
        if !self.limits.descriptors.take(count) {
            return Err(DropReason::DescriptorBudget);
        }
        self.sockets += count;
        Ok(())
    }

    /// Counts a stream's host socket out.
    pub fn close_stream(&mut self) {
        self.streams -= 1;
        self.close_sockets(1);
    }

    /// Counts several descriptors out.
    pub fn close_sockets(&mut self, count: u32) {
        self.sockets -= count;
        self.limits.descriptors.give_back(count);
    }

    /// A stream's host socket goes to another worker, who adopts it or sends it back.
    pub fn hand_over_stream(&mut self) {
        self.streams -= 1;
        self.sockets -= 1;
    }

    /// One has come from another worker.
    pub fn adopt_stream(&mut self) {
        self.streams += 1;
        self.sockets += 1;
    }

    /// Counts a connect in, or says why not.
    pub fn begin_connect(&mut self, destination: Address) -> Result<(), DropReason> {
        let pending = self.by_destination.get(&destination).copied().unwrap_or(0);
        if self.connects >= self.limits.connects || pending >= self.limits.connects_per_destination {
            return Err(DropReason::ConnectBudget);
        }
        self.by_destination.insert(destination, pending + 1);
        self.connects += 1;
        Ok(())
    }

    /// Counts a connect out, whatever became of it.
    pub fn end_connect(&mut self, destination: Address) {
        if let Some(pending) = self.by_destination.get_mut(&destination) {
            *pending -= 1;
            self.connects -= 1;
            if *pending == 0 {
                self.by_destination.remove(&destination);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_black_hole_uses_up_its_own_budget_only() {
        let descriptors = Descriptors::new(100);
        let mut admission = Admission::new(Limits { descriptors, connects_per_destination: 3, connects: 5 });
        let [hole, other, third] = [1, 2, 3].map(|n| Address::v4([198, 51, 100, n]));
        for _ in 0..3 {
            admission.begin_connect(hole).unwrap();
        }
        assert_eq!(admission.begin_connect(hole), Err(DropReason::ConnectBudget));
        admission.begin_connect(other).unwrap();
        admission.begin_connect(other).unwrap();
        assert_eq!(admission.begin_connect(third), Err(DropReason::ConnectBudget));
        for _ in 0..3 {
            admission.end_connect(hole);
        }
        admission.begin_connect(third).unwrap();
        assert_eq!(admission.connects(), 3);
        assert_eq!(admission.by_destination.len(), 2, "no entry is kept for a destination without connects");
    }

    #[test]
    fn one_worker_may_hold_what_others_do_not_and_all_no_more_than_there_is() {
        let limits = Limits { descriptors: Descriptors::new(8), connects_per_destination: 1, connects: 1 };
        let [mut one, mut other] = [(); 2].map(|()| Admission::new(limits.clone()));
        one.open_sockets(6).unwrap();
        one.open_stream().unwrap();
        assert_eq!(other.open_sockets(2), Err(DropReason::DescriptorBudget));
        other.open_stream().unwrap();
        assert_eq!(one.open_stream(), Err(DropReason::DescriptorBudget));
        one.hand_over_stream();
        other.adopt_stream();
        assert_eq!([one.sockets(), one.streams(), other.sockets(), other.streams()], [6, 0, 2, 2]);
        assert_eq!(one.open_stream(), Err(DropReason::DescriptorBudget), "handing over frees nothing");
        other.close_stream();
        other.close_stream();
        one.open_sockets(2).unwrap();
    }
}
