//! From the host: events of a stream's socket, and its bytes as segments to the guest.

use crate::flow::key::FlowKey;
use crate::flow::slab::Slot;
use crate::frame::build;
use crate::frame::offload::{Offload, Segmentation};
use crate::frame::tcp::SegmentHead;
use crate::host::Sockets;
use crate::host::engine::{Engine, Event};
use crate::link::{InboundHead, Link, Space};
use crate::observe::counters::Metric;
use crate::relay::tcp::State;
use crate::time::Now;

use super::super::Worker;
use super::settle::Peek;

impl<L: Link, E: Engine, S: Sockets> Worker<L, E, S> {
    /// Something happened on a stream's socket.
    pub(in crate::worker) fn stream_event(&mut self, event: Event, now: Now) {
        let slot = event.token.slot;
        let Some(stream) = self.streams.get_mut(slot) else { return };
        if let Some(host) = &mut stream.host {
            // Also while connecting: a peer may have accepted, written and closed before anybody looked.
            host.closed |= event.closed;
            host.urgent |= event.urgent;
        }
        if stream.relay.state() == State::Connecting {
            if event.writable || event.closed || event.failed {
                self.connect_ended(slot, event, now);
            }
            return;
        }
        let Some(host) = &mut stream.host else { return };
        if event.failed && self.sockets.outcome(&host.socket).is_err() {
            host.failed = true;
            stream.relay.readable(now);
        } else if event.readable || event.closed {
            stream.relay.readable(now);
        }
        self.touch(slot);
    }

    /// A deadline of a stream has come.
    pub(in crate::worker) fn stream_deadline(&mut self, slot: Slot, now: Now) {
        if self.fall_back_to_gateway(slot, now) {
            return;
        }
        let Some(stream) = self.streams.get_mut(slot) else { return };
        let config = self.configs[usize::from(stream.key.guest.address.is_v4())];
        let backoffs = stream.relay.send().backoffs();
        stream.relay.expired(&config, now);
        if stream.relay.send().backoffs() > backoffs {
            self.counters.add(Metric::Timeouts, 1);
        }
        self.touch(slot);
    }

    /// Sends `got` peeked bytes that lie in a peek's spaces.
    pub(super) fn send_peeked(&mut self, slot: Slot, peek: &Peek, got: u32, drained: bool, now: Now) {
        let mut sent = 0;
        for index in peek.first_space..peek.first_space + peek.spaces {
            let space = self.spaces[index];
            let len = (got - sent).min(space.capacity as u32);
            let Some(stream) = self.streams.get_mut(slot).filter(|_| len > 0) else {
                self.link.cancel(space);
                continue;
            };
            let last = sent + len == got && drained;
            let segment = stream.relay.data_segment(peek.wanted.seq + sent, len, last, now);
            let key = stream.key;
            let size = stream.relay.segment_bytes();
            self.commit_segment(space, &key, &segment, size);
            sent += len;
        }
    }

    /// Gives back the spaces of a peek.
    pub(super) fn cancel_spaces(&mut self, peek: &Peek) {
        for index in peek.first_space..peek.first_space + peek.spaces {
            self.link.cancel(self.spaces[index]);
        }
    }

    /// Sends the segments without payload that a stream has due.
    pub(super) fn send_due_segments(&mut self, slot: Slot, now: Now) {
        loop {
            let Some(stream) = self.streams.get_mut(slot) else { return };
            let config = self.configs[usize::from(stream.key.guest.address.is_v4())];
            let key = stream.key;
            let Some(segment) = stream.relay.poll_segment(&config, now) else { return };
            self.send_segment(&key, &segment);
        }
    }

    /// Sends a segment without payload.
    pub(in crate::worker) fn send_segment(&mut self, key: &FlowKey, segment: &SegmentHead) {
        if let Some(space) = self.reserve(0) {
            self.commit_segment(space, key, segment, 0);
        }
    }

    fn commit_segment(&mut self, space: Space, key: &FlowKey, segment: &SegmentHead, size: u16) {
        let route = self.route_to_guest(key.remote.address, key.guest.address);
        let mut bytes = [0; build::HEAD_MAX];
        let head = build::tcp(&mut bytes, &route, key.remote.port, key.guest.port, segment, true);
        let segmentation = if segment.len > u32::from(size) && size > 0 {
            Segmentation::Tcp { size }
        } else {
            Segmentation::None
        };
        let offload = Offload { checksum_partial: true, segmentation };
        let v4 = key.guest.address.is_v4();
        let head = InboundHead { bytes: &bytes[..head.len], head, v4, offload };
        self.commit(space, &head, segment.len as usize);
    }
}
