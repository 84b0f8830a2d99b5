//! Streams from addresses that the host has no more.
//!
//! The kernel keeps such a connection and sends into nothing until it gives up, a quarter of an hour later. The guest is told
//! at once: a reset. Which streams are concerned, their sockets know; they are asked a few in each pass, so that nobody waits.

use crate::frame::address::Address;
use crate::host::Sockets;
use crate::host::engine::Engine;
use crate::link::Link;
use crate::observe::counters::Metric;
use crate::worker::Worker;

use super::HostKind;

/// Places of the slab that one pass looks at: a system call for each that holds a stream.
const LOOKS: u32 = 128;

/// A search that goes on over several passes.
#[derive(Default)]
pub struct Departed {
    /// What is gone.
    addresses: Vec<Address>,
    /// Where the search goes on.
    next: u32,
}

impl Departed {
    /// Whether there is nothing to look for.
    pub fn is_over(&self) -> bool {
        self.addresses.is_empty()
    }
}

impl<L: Link, E: Engine, S: Sockets> Worker<L, E, S> {
    /// The host has these addresses no more.
    pub(in crate::worker) fn addresses_gone(&mut self, gone: &[Address]) {
        for address in gone {
            if !self.departed.addresses.contains(address) {
                self.departed.addresses.push(*address);
            }
        }
        self.departed.next = 0;
    }

    /// Resets what is found in a few places of the slab.
    pub(in crate::worker) fn reset_departed(&mut self) {
        if self.departed.is_over() {
            return;
        }
        let first = self.departed.next;
        let end = self.streams.index_bound().min(first + LOOKS);
        for index in first..end {
            let Some(slot) = self.streams.slot_at(index) else { continue };
            let Some(stream) = self.streams.get_mut(slot) else { continue };
            let Some(host) = stream.host.as_ref().filter(|host| host.kind == HostKind::Tcp) else { continue };
            let local = self.sockets.local(&host.socket);
            if local.is_some_and(|local| self.departed.addresses.contains(&local.address)) {
                stream.relay.abandon();
                self.counters.add(Metric::StreamsDeparted, 1);
                self.touch(slot);
            }
        }
        self.departed.next = end;
        if end == self.streams.index_bound() {
            self.departed = Departed::default();
        }
    }
}
