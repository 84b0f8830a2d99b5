//! Which port of the host a flow of the guest leaves from.
//!
//! The guest's own port where it may be had: above 1023, not reserved by the host's administrator
//! (`net.ipv4.ip_local_reserved_ports`), not published. Where it is taken, one other port stands in for it, the same
//! for all destinations, so that two servers see one port (RFC 5382, REQ-1).

use std::collections::{HashMap, VecDeque};

use crate::frame::address::Endpoint;

/// Stand-ins that are remembered.
const REMEMBERED: usize = 4096;

/// A set of ports.
#[derive(Clone)]
pub struct PortSet(Box<[u64; 1024]>);

impl Default for PortSet {
    fn default() -> Self {
        Self(Box::new([0; 1024]))
    }
}

impl PortSet {
    /// Puts a port in.
    pub fn insert(&mut self, port: u16) {
        self.0[port as usize / 64] |= 1 << (port % 64);
    }

    /// Takes a port out.
    pub fn remove(&mut self, port: u16) {
        self.0[port as usize / 64] &= !(1 << (port % 64));
    }

    /// Whether a port is in.
    pub fn contains(&self, port: u16) -> bool {
        self.0[port as usize / 64] & (1 << (port % 64)) != 0
    }

    /// Reads the kernel's notation: `8080,9000-9010`. What cannot be read is left out.
    pub fn parse(text: &str) -> Self {
        let mut set = Self::default();
        for part in text.trim().split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            if let (Ok(first), Ok(last)) = (first.parse::<u16>(), last.parse::<u16>()) {
                (first..=last).for_each(|port| set.insert(port));
            }
        }
        set
    }
}

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
    fn the_kernels_notation_is_read() {
        let set = PortSet::parse("8080,9000-9010\n");
        for (port, expected) in [(8080, true), (8081, false), (9000, true), (9010, true), (9011, false)] {
            assert_eq!(set.contains(port), expected, "{port}");
        }
        assert!(!PortSet::parse("").contains(0));
    }

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
