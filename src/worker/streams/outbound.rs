//! A segment of the guest: its flow is found, its relay asked, and its payload noted for the send of this pass.

use crate::flow::key::{FlowKey, Protocol};
use crate::flow::slab::Slot;
use crate::flow::table::Handle;
use crate::frame::address::Endpoint;
use crate::frame::drop_reason::DropReason;
use crate::frame::tcp::{Flags, SegmentHead, TcpView};
use crate::frame::view::IpHead;
use crate::host::Sockets;
use crate::host::engine::Engine;
use crate::link::Link;
use crate::observe::counters::Metric;
use crate::relay::tcp::receive::Payload;
use crate::relay::tcp::{Disposition, State, reset_for};
use crate::time::Now;

use super::super::Worker;
use super::super::outbound::{FrameRef, Part};
use super::{Origin, Stream};

/// A TCP segment on its way through the worker.
#[derive(Clone, Copy)]
pub(in crate::worker) struct Arrived {
    pub frame: FrameRef,
    pub ip: IpHead,
    pub tcp: TcpView,
    /// Where the payload starts in the frame.
    pub payload_start: usize,
}

impl Arrived {
    fn key(&self) -> FlowKey {
        FlowKey {
            guest: Endpoint { address: self.ip.source, port: self.tcp.source_port },
            remote: Endpoint { address: self.ip.destination, port: self.tcp.destination_port },
            protocol: Protocol::Tcp,
        }
    }
}

impl<L: Link, E: Engine, S: Sockets> Worker<L, E, S> {
    /// Takes a segment in.
    pub(in crate::worker) fn segment_from_guest(
        &mut self,
        arrived: &Arrived,
        now: Now,
    ) -> Result<(), DropReason> {
        let key = arrived.key();
        let hashed = self.flows.hash(&key);
        if let Some(handle) = self.flows.find(&hashed) {
            // One that is on its way here finds the frame in the next pass's mail, behind itself.
            if handle.owner != self.id || handle == Handle::on_its_way_to(self.id) {
                return self.hand_over(arrived.frame, handle.owner);
            }
            if self.streams.get(handle.slot).is_some_and(|stream| stream.key == key) {
                return self.segment_of_stream(handle.slot, arrived, now);
            }
        }
        self.segment_without_flow(arrived, now)
    }

    /// RFC 9293, 3.10.7.1 and 3.10.7.2: a SYN opens, anything else is answered with a reset.
    fn segment_without_flow(&mut self, arrived: &Arrived, now: Now) -> Result<(), DropReason> {
        let key = arrived.key();
        if !self.addresses.may_send_from(key.guest.address) {
            return Err(DropReason::SourceAddress);
        }
        let segment = &arrived.tcp.segment;
        let flags = segment.flags;
        if flags.has(Flags::SYN) && !flags.has(Flags::ACK) && !flags.has(Flags::RST) {
            return match self.open_outbound(key, segment, arrived.ip.traffic_class, now)? {
                Some(owner) if owner != self.id => self.hand_over(arrived.frame, owner),
                _ => Ok(()),
            };
        }
        self.addresses.classify(key.remote.address)?;
        self.reset_reply(&key, segment);
        Err(DropReason::NoFlow)
    }

    /// Answers a segment with a reset, where RFC 9293 allows one.
    pub(super) fn reset_reply(&mut self, key: &FlowKey, segment: &SegmentHead) {
        if let Some(reset) = reset_for(segment) {
            self.send_segment(key, &reset);
        }
    }

    fn segment_of_stream(&mut self, slot: Slot, arrived: &Arrived, now: Now) -> Result<(), DropReason> {
        let mut config = *self.config(arrived.ip.source.is_v4());
        if !self.buffers.has_plenty() {
            config.held_max = 0;
        }
        let Some(stream) = self.streams.get_mut(slot) else { return Err(DropReason::NoFlow) };
        if let Origin::Inbound { unproven, .. } = &mut stream.origin {
            *unproven = false;
        }
        let disposition = stream.relay.segment(&arrived.tcp.segment, &config, now);
        let answered = stream.relay.state() == State::Open;
        self.touch(slot);
        self.note_queue(slot, arrived.frame, arrived.tcp.segment.len);
        if let Some(Stream { origin: Origin::Probe { publication, .. }, relay, .. }) =
            self.streams.get_mut(slot)
            && answered
        {
            // Half open is all that was asked: a reset now, and no program of the guest's sees a connection.
            let publication = *publication;
            relay.abandon();
            self.tell_listens(publication, true);
            return Ok(());
        }
        match disposition {
            Disposition::Reopen => {
                self.settle_one_now(slot, now);
                self.segment_without_flow(arrived, now)
            }
            Disposition::Payload(Payload::Nothing) => Ok(()),
            Disposition::Payload(Payload::Refuse(reason)) => Err(reason),
            Disposition::Payload(Payload::Take { skip, len, held }) => {
                self.take_payload(slot, arrived, skip, len, held);
                Ok(())
            }
            Disposition::Payload(Payload::Hold { seq, len }) => {
                self.counters.add(Metric::SegmentsHeld, 1);
                let from = arrived.payload_start + seq.since(arrived.tcp.segment.seq) as usize;
                let bytes = self.copy_of(arrived.frame, from, len as usize);
                if let Some(stream) = self.streams.get_mut(slot) {
                    stream.buffer.get_or_insert_with(|| Box::new(self.buffers.open())).hold(seq, &bytes);
                }
                Ok(())
            }
        }
    }

    /// Notes payload that is in order for the send of this pass. Behind bytes that wait already, it joins them.
    fn take_payload(&mut self, slot: Slot, arrived: &Arrived, skip: u32, len: u32, held: u32) {
        if len > 0 {
            let from = arrived.payload_start as u32 + skip;
            self.note_part(slot, Part { frame: arrived.frame, from, len, next: None });
        }
        let Some(stream) = self.streams.get(slot) else { return };
        let waiting = stream.buffer.as_deref().is_some_and(|buffer| !buffer.waiting.is_empty());
        if held > 0 || waiting {
            self.buffer_parts(slot);
        }
        if held > 0 {
            let seq = arrived.tcp.segment.seq + skip + len;
            let Some(stream) = self.streams.get_mut(slot) else { return };
            let released =
                stream.buffer.get_or_insert_with(|| Box::new(self.buffers.open())).release(seq, held);
            debug_assert!(released, "the relay counts held bytes that are there");
        }
    }
}
