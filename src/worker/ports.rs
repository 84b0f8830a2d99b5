//! Which port of the host a flow of the guest leaves from.
//!
//! The guest's own port where it may be had: above 1023, not reserved by the host's administrator
//! (`net.ipv4.ip_local_reserved_ports`), not published. Where it is taken, one other port stands in for it, the same
//! for all destinations, so that two servers see one port (RFC 5382, REQ-1).

use std::collections::{HashMap, VecDeque};

use crate::frame::address::Endpoint;
use crate::policy::port_set::PortSet;

/// Stand-ins that are remembered.
const REMEMBERED: usize = 4096;

/// The choice of ports.
pub struct Ports {
    /// Ports that the guest's flows must leave alone.
    pub excluded: PortSet,
    stand_ins: HashMap<Endpoint, u16>,
    order: VecDeque<Endpoint>,
}

impl Ports {
    /// Everything is free but `excluded`.
    pub fn new(excluded: PortSet) -> Self {
        Self { excluded, stand_ins: HashMap::new(), order: VecDeque::new() }
    }

    /// The port to ask the host for; `None` lets the kernel choose one, which is then to be [`Self::remember`]ed.
    pub fn wish(&self, guest: Endpoint) -> Option<u16> {
        let own = guest.port > 1023 && !self.excluded.contains(guest.port);
        self.stand_ins.get(&guest).copied().or(own.then_some(guest.port))
    }

    /// `port` stands in for the guest's own from now on.
    pub fn remember(&mut self, guest: Endpoint, port: u16) {
        if self.stand_ins.insert(guest, port).is_none() {
            self.order.push_back(guest);
            if self.order.len() > REMEMBERED
                && let Some(oldest) = self.order.pop_front()
            {
                self.stand_ins.remove(&oldest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::address::Address;

    #[test]
    fn a_guest_port_has_one_stand_in() {
        let mut ports = Ports::new(PortSet::parse("5000"));
        let guest = |port| Endpoint::new(Address::v4([192, 168, 65, 3]), port);
        assert_eq!(ports.wish(guest(40000)), Some(40000));
        assert_eq!(ports.wish(guest(80)), None, "privileged");
        assert_eq!(ports.wish(guest(5000)), None, "reserved");
        ports.remember(guest(80), 33333);
        assert_eq!(ports.wish(guest(80)), Some(33333));
        for port in 1024..=(1024 + REMEMBERED as u16) {
            ports.remember(guest(port), port + 1);
        }
        assert_eq!(ports.wish(guest(80)), None, "the oldest gave way");
        assert_eq!(ports.stand_ins.len(), REMEMBERED);
    }
}
