//! The flows of a mapping, as a list through their records: whoever ends a mapping visits its own flows and no others.

use crate::flow::slab::{Slab, Slot};

use super::DatagramFlow;

/// The flows of one mapping, the one that was appended first in front.
#[derive(Clone, Copy, Default, Debug)]
pub struct Members {
    first: Option<Slot>,
    last: Option<Slot>,
    count: u32,
}

/// A flow's neighbours in the list.
#[derive(Clone, Copy, Default, Debug)]
pub struct Neighbours {
    before: Option<Slot>,
    behind: Option<Slot>,
}

impl Members {
    /// How many there are.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// The one that was appended first.
    pub fn first(&self) -> Option<Slot> {
        self.first
    }

    /// Appends a flow that is in no list.
    pub fn append(&mut self, flows: &mut Slab<DatagramFlow>, slot: Slot) {
        let before = self.last.replace(slot);
        match before.and_then(|before| flows.get_mut(before)) {
            Some(before) => before.neighbours.behind = Some(slot),
            None => self.first = Some(slot),
        }
        if let Some(flow) = flows.get_mut(slot) {
            flow.neighbours = Neighbours { before, behind: None };
        }
        self.count += 1;
    }

    /// Takes a flow out of this list, by the neighbours that it had.
    pub fn remove(&mut self, flows: &mut Slab<DatagramFlow>, neighbours: Neighbours) {
        let Neighbours { before, behind } = neighbours;
        match before.and_then(|before| flows.get_mut(before)) {
            Some(before) => before.neighbours.behind = behind,
            None => self.first = behind,
        }
        match behind.and_then(|behind| flows.get_mut(behind)) {
            Some(behind) => behind.neighbours.before = before,
            None => self.last = before,
        }
        self.count -= 1;
    }

    /// Moves the first one to the end.
    pub fn rotate(&mut self, flows: &mut Slab<DatagramFlow>) {
        let Some(first) = self.first else { return };
        let Some(neighbours) = flows.get(first).map(|flow| flow.neighbours) else { return };
        self.remove(flows, neighbours);
        self.append(flows, first);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::key::{FlowKey, HashSecret, Protocol};
    use crate::flow::slab::Slot;
    use crate::flow::table::{FlowTable, Handle};
    use crate::frame::address::Endpoint;
    use crate::time::Now;
    use std::net::Ipv4Addr;

    fn flows(count: u16) -> (Slab<DatagramFlow>, Vec<Slot>) {
        let table = FlowTable::new(64, HashSecret([1, 2]));
        let endpoint = |port| Endpoint::new(Ipv4Addr::LOCALHOST, port);
        let mut flows = Slab::new(64);
        let nothing = Slot { index: 0, generation: 0 };
        let slots = (0..count).map(|port| {
            let key = FlowKey { guest: endpoint(1), remote: endpoint(port), protocol: Protocol::Udp };
            let position = table.insert(&table.hash(&key), Handle { owner: 0, slot: nothing }).unwrap();
            let flow = DatagramFlow {
                key,
                position,
                mapping: nothing,
                peer: endpoint(port),
                local: None,
                expires: Now(0),
                answered: false,
                neighbours: Neighbours::default(),
            };
            flows.insert(flow).unwrap_or_else(|_| panic!("there is room"))
        });
        let slots = slots.collect();
        (flows, slots)
    }

    fn order(members: Members, flows: &Slab<DatagramFlow>) -> Vec<u16> {
        let mut ports = Vec::new();
        let mut next = members.first();
        while let Some(flow) = next.and_then(|slot| flows.get(slot)) {
            ports.push(flow.peer.port);
            next = flow.neighbours.behind;
        }
        assert_eq!(ports.len(), members.count() as usize);
        ports
    }

    #[test]
    fn flows_come_and_go_in_order() {
        let (mut flows, slots) = flows(5);
        let mut members = Members::default();
        assert!(order(members, &flows).is_empty());
        for slot in &slots {
            members.append(&mut flows, *slot);
        }
        assert_eq!(order(members, &flows), [0, 1, 2, 3, 4]);
        for (gone, rest) in [(2, vec![0, 1, 3, 4]), (0, vec![1, 3, 4]), (4, vec![1, 3])] {
            let flow = flows.remove(slots[gone]).unwrap();
            members.remove(&mut flows, flow.neighbours);
            assert_eq!(order(members, &flows), rest);
        }
        members.rotate(&mut flows);
        assert_eq!(order(members, &flows), [3, 1]);
        for gone in [1, 3] {
            let flow = flows.remove(slots[gone]).unwrap();
            members.remove(&mut flows, flow.neighbours);
        }
        members.rotate(&mut flows);
        assert!(order(members, &flows).is_empty());
    }
}
