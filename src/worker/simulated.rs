//! What the simulation does with a worker and sees of it (feature `sim`).
//!
//! A simulated worker has no thread: the world calls [`Worker::pass`], asks by [`Worker::fall_asleep`] whether it would
//! sleep now, and calls [`Worker::wake_up`] when something would have woken it. The rest only looks.

use std::cell::Cell;
use std::time::Duration;

use crate::flow::key::FlowKey;
use crate::host::Sockets;
use crate::host::engine::Engine;
use crate::link::Link;
use crate::time::Now;

use super::Worker;

/// A step that a worker can be made to leave out: a bug planted where no seam of the worker shows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Omission {
    /// After a time-out the next one is not armed.
    RearmTimeout,
    /// The last flow of a mapping does not take it along.
    CloseMapping,
    /// A frame of another worker's flow goes to whoever comes next.
    FindOwner,
    /// A stream moves, and the flow table does not hear where it lies.
    TellMove,
    /// Room that is found while frames are published is not looked at.
    UseFoundRoom,
}

thread_local! {
    static OMITTED: Cell<Option<Omission>> = const { Cell::new(None) };
}

/// Has the workers of this thread leave a step out from now on, or none.
pub fn omit(omission: Option<Omission>) {
    OMITTED.set(omission);
}

/// Whether a step is to be left out.
pub(super) fn omits(omission: Omission) -> bool {
    OMITTED.get() == Some(omission)
}

/// What a worker holds on to.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Holdings {
    /// TCP flows.
    pub streams: u32,
    /// Datagram mappings.
    pub mappings: u32,
    /// Datagram flows.
    pub datagram_flows: u32,
    /// Host sockets, as the budget counts them.
    pub sockets: u32,
    /// Connects under way, as the budget counts them.
    pub connects: u32,
    /// Deadlines that are armed.
    pub deadlines: u32,
    /// Bytes of the guest's that wait for a socket, or are held out of order, in the fullest buffer.
    pub buffered_bytes_max: usize,
}

impl<L: Link, E: Engine, S: Sockets> Worker<L, E, S> {
    /// What the loop does behind a pass, up to the sleep: returns whether the worker sleeps now.
    pub fn fall_asleep(&mut self, busy: bool) -> bool {
        self.may_sleep(busy)
    }

    /// Ends a sleep: takes in what the engine has to report.
    pub fn wake_up(&mut self) {
        self.engine.wait(Some(Duration::ZERO), &mut self.events);
        self.awake();
    }

    /// Deals the streams that the guest speaks in from now on: every other one goes to another worker.
    pub fn deal_to(&mut self, other: u8, now: Now) {
        self.load.begin(self.id, std::iter::once(other), now);
    }

    /// Its link.
    pub fn link(&self) -> &L {
        &self.link
    }

    /// Whether something is there for the guest for which the link had no room.
    pub fn waits_for_room(&self) -> bool {
        !self.starved.is_empty() || !self.readable_mappings.is_empty()
    }

    /// When the worker has to wake by itself.
    pub fn wakes_at(&self) -> Option<Now> {
        self.deadline()
    }

    /// What the worker holds on to.
    pub fn holdings(&self) -> Holdings {
        let buffers =
            self.streams.slots().into_iter().filter_map(|slot| self.streams.get(slot)?.buffer.as_deref());
        Holdings {
            streams: self.streams.len(),
            mappings: self.mappings.len(),
            datagram_flows: self.datagram_flows.len(),
            sockets: self.admission.sockets(),
            connects: self.admission.connects(),
            deadlines: self.stream_timers.armed() + self.datagram_timers.armed(),
            buffered_bytes_max: buffers.map(super::streams::buffer::Buffer::bytes).max().unwrap_or(0),
        }
    }

    /// Bytes of a flow that were taken from the guest and wait for the socket.
    pub fn waiting_bytes(&self, key: &FlowKey) -> usize {
        let handle = self.flows.find(&self.flows.hash(key)).filter(|handle| handle.owner == self.id);
        let stream = handle.and_then(|handle| self.streams.get(handle.slot));
        stream.and_then(|stream| stream.buffer.as_deref()).map_or(0, |buffer| buffer.waiting.len())
    }
}
