//! Whether one more flow may begin: budgets for a guest and for each destination.
//!
//! A connect that is not answered yet holds a socket. How many of them one destination may hold is bounded, so that
//! a black hole never uses up what other destinations need.

use std::collections::HashMap;

use crate::frame::address::Address;
use crate::frame::drop_reason::DropReason;

/// The bounds.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Host sockets that one worker may hold.
    pub sockets: u32,
    /// Connects under way to one destination address.
    pub connects_per_destination: u32,
    /// Connects under way in all.
    pub connects: u32,
}

/// What is in use. One a worker.
pub struct Admission {
    limits: Limits,
    sockets: u32,
    connects: u32,
    /// Connects under way by destination. The standard map is keyed SipHash: a guest chooses the destinations.
    by_destination: HashMap<Address, u32>,
}

impl Admission {
    /// Nothing in use.
    pub fn new(limits: Limits) -> Self {
        Self { limits, sockets: 0, connects: 0, by_destination: HashMap::new() }
    }

    /// Host sockets in use.
    pub fn sockets(&self) -> u32 {
        self.sockets
    }

    /// Connects under way.
    pub fn connects(&self) -> u32 {
        self.connects
    }

    /// Counts a host socket in, or says why not.
    pub fn open_socket(&mut self) -> Result<(), DropReason> {
        self.open_sockets(1)
    }

    /// Counts several descriptors in, or says why not.
    pub fn open_sockets(&mut self, count: u32) -> Result<(), DropReason> {
        if self.sockets + count > self.limits.sockets {
            return Err(DropReason::DescriptorBudget);
        }
        self.sockets += count;
        Ok(())
    }

    /// Counts a host socket out.
    pub fn close_socket(&mut self) {
        self.close_sockets(1);
    }

    /// Counts several descriptors out.
    pub fn close_sockets(&mut self, count: u32) {
        self.sockets = self.sockets.saturating_sub(count);
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
        let mut admission = Admission::new(Limits { sockets: 100, connects_per_destination: 3, connects: 5 });
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
}
