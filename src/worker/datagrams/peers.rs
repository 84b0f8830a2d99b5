//! Whom a mapping speaks with on the host's side.
//!
//! Nearly always that is one peer, which appears to the guest under its own address. What one such peer takes lies in the
//! mapping's record; only for others is there memory besides, and for as long as there are any.

use std::collections::HashMap;

use crate::flow::slab::Slot;
use crate::frame::address::{Address, Endpoint};

/// The peers of the flows of one mapping.
#[derive(Default)]
pub struct Peers {
    /// The address of one, and how many flows it has.
    one: Option<(Address, u32)>,
    others: Option<Box<Others>>,
}

/// Strangers choose themselves, so the maps are keyed: the standard ones are.
#[derive(Default)]
struct Others {
    /// How many flows each address has.
    addresses: HashMap<Address, u32>,
    /// Flows of peers whose address differs from the one the guest sees.
    translated: HashMap<Endpoint, Slot>,
}

impl Peers {
    /// A flow with a peer has begun; it is named where the guest sees the peer under another address.
    pub fn begin(&mut self, peer: Endpoint, translated: Option<Slot>) {
        match &mut self.one {
            Some((address, count)) if *address == peer.address => *count += 1,
            one @ None if !self.others.as_ref().is_some_and(|others| others.knows(peer.address)) => {
                *one = Some((peer.address, 1));
            }
            _ => *self.others.get_or_insert_default().addresses.entry(peer.address).or_insert(0) += 1,
        }
        if let Some(slot) = translated {
            self.others.get_or_insert_default().translated.insert(peer, slot);
        }
    }

    /// The flow in this slot, with a peer, has ended.
    pub fn end(&mut self, peer: Endpoint, slot: Slot) {
        match &mut self.one {
            Some((address, count)) if *address == peer.address => {
                *count -= 1;
                if *count == 0 {
                    self.one = None;
                }
            }
            _ => self.others.iter_mut().for_each(|others| others.end(peer.address)),
        }
        if let Some(others) = &mut self.others {
            // The guest may speak with the same peer under its own address, too.
            if others.translated.get(&peer) == Some(&slot) {
                others.translated.remove(&peer);
            }
            if others.addresses.is_empty() && others.translated.is_empty() {
                self.others = None;
            }
        }
    }

    /// Whether any flow is with a peer at this address.
    pub fn knows(&self, address: Address) -> bool {
        self.one.is_some_and(|(one, _)| one == address)
            || self.others.as_ref().is_some_and(|others| others.knows(address))
    }

    /// The flow of a peer that the guest sees under another address.
    pub fn translated(&self, peer: Endpoint) -> Option<Slot> {
        self.others.as_ref()?.translated.get(&peer).copied()
    }
}

impl Others {
    fn knows(&self, address: Address) -> bool {
        self.addresses.contains_key(&address)
    }

    fn end(&mut self, address: Address) {
        if let Some(count) = self.addresses.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                self.addresses.remove(&address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn peer(host: u8, port: u16) -> Endpoint {
        Endpoint::new(Ipv4Addr::new(198, 51, 100, host), port)
    }

    #[test]
    fn an_address_is_known_as_long_as_it_has_a_flow() {
        let mut peers = Peers::default();
        let (a, b) = (peer(1, 1), peer(2, 1));
        let slot = Slot { index: 3, generation: 1 };
        peers.begin(a, None);
        assert!(peers.others.is_none(), "one peer takes no memory of its own");
        peers.begin(peer(1, 2), None);
        peers.begin(b, None);
        peers.end(a, slot);
        assert!(peers.knows(a.address) && peers.knows(b.address));
        peers.end(peer(1, 2), slot);
        assert!(!peers.knows(a.address) && peers.knows(b.address));
        // The place in the record is free, but who lies elsewhere stays there.
        peers.begin(peer(2, 2), None);
        peers.end(b, slot);
        assert!(peers.knows(b.address));
        peers.end(peer(2, 2), slot);
        assert!(!peers.knows(b.address) && peers.others.is_none());
    }

    #[test]
    fn a_peer_under_another_address_is_found_by_its_own() {
        let mut peers = Peers::default();
        let slot = Slot { index: 3, generation: 1 };
        peers.begin(peer(1, 1), Some(slot));
        assert_eq!(peers.translated(peer(1, 1)), Some(slot));
        assert_eq!(peers.translated(peer(1, 2)), None);
        let beside = Slot { index: 4, generation: 1 };
        peers.begin(peer(1, 1), None);
        peers.end(peer(1, 1), beside);
        assert_eq!(peers.translated(peer(1, 1)), Some(slot), "another flow with the same peer has ended");
        peers.end(peer(1, 1), slot);
        assert!(peers.translated(peer(1, 1)).is_none() && peers.others.is_none());
    }
}
