//! A flow table, and flows to be looked for in it.
#![allow(dead_code)]

use std::hint::black_box;

use hythe::flow::key::{FlowKey, HashSecret, Protocol};
use hythe::flow::slab::Slot;
use hythe::flow::table::{FlowTable, Handle, HashedKey};
use hythe::frame::address::{Address, Endpoint};

/// How many flows there is room for.
pub const CAPACITY: u32 = 262_144;

/// Odd, so that its multiples visit every flow; large, so that a look-up finds little of the table in a cache.
const STRIDE: u32 = 7_919;

fn key(number: u32) -> FlowKey {
    let guest = Endpoint::new(Address::v4([192, 168, 65, 3]), number as u16);
    let remote = Endpoint::new(Address::v4(number.to_be_bytes()), 443);
    FlowKey { guest, remote, protocol: Protocol::Tcp }
}

/// A table with so many flows, of which another one is looked for each time.
pub struct Flows {
    pub table: FlowTable,
    count: u32,
    number: u32,
}

impl Flows {
    pub fn new(count: u32) -> Self {
        let table = FlowTable::new(CAPACITY, HashSecret([1, 2]));
        for number in 0..count {
            let handle = Handle { owner: 0, slot: Slot { index: number, generation: 0 } };
            assert!(table.insert(&table.hash(&key(number)), handle).is_ok(), "flow {number} has no place");
        }
        Self { table, count, number: 0 }
    }

    fn next(&mut self) -> u32 {
        self.number = (self.number + STRIDE) % self.count;
        self.number
    }

    /// A flow that is there.
    pub fn hit(&mut self) -> bool {
        let number = self.next();
        self.table.find(&self.table.hash(black_box(&key(number)))).is_some()
    }

    /// One that is not.
    pub fn miss(&mut self) -> bool {
        let number = self.count + self.next();
        self.table.find(&self.table.hash(black_box(&key(number)))).is_none()
    }

    /// One more than there are.
    pub fn new_flow(&self) -> HashedKey {
        self.table.hash(&key(self.count))
    }
}
