//! Datagrams that come to a mapping's socket go to the guest.

use crate::flow::key::FlowKey;
use crate::flow::slab::Slot;
use crate::frame::address::Endpoint;
use crate::frame::build::{self, Route};
use crate::frame::drop_reason::DropReason;
use crate::frame::icmp::{self, ECHO_LEN};
use crate::frame::offload::{Offload, Segmentation};
use crate::frame::view::ETHERNET_LEN;
use crate::frame::{datagram, fragment, protocol};
use crate::host::control::{self, ReceiveControl};
use crate::host::engine::{Engine, Event};
use crate::host::{EchoKind, HostSocket, Sockets};
use crate::io::{Kind, OperationId};
use crate::link::{Ahead, InboundHead, Link, Space};
use crate::observe::counters::Metric;
use crate::policy::UdpFiltering;
use crate::time::Now;

use super::super::Worker;
use super::MappingKind;
use super::open::Routed;

/// Datagrams received at once from one socket, at the most.
const BURST_MAX: u8 = 16;
/// The largest payload of a datagram.
const PAYLOAD_MAX: usize = 65_527;
/// The IP header in front of what a raw IPv4 socket gives. The kernel has checked it; options do not come with replies.
const RAW_V4_HEADER: usize = 20;

/// One receive of this pass.
#[derive(Clone, Copy)]
pub(in crate::worker) struct Incoming {
    mapping: Slot,
    operation: OperationId,
    space: Space,
    /// Where the echo header (and a raw socket's IP header) was put, and how long both are.
    head: Option<(usize, usize)>,
}

impl<L: Link, E: Engine, S: Sockets> Worker<L, E, S> {
    /// Something happened on a mapping's socket.
    pub(in crate::worker) fn mapping_event(&mut self, event: Event) {
        let slot = event.token.slot;
        if event.failed {
            self.drain_errors(slot);
        }
        if event.readable || event.closed {
            self.queue_mapping(slot);
        }
    }

    fn queue_mapping(&mut self, slot: Slot) {
        if let Some(mapping) = self.mappings.get_mut(slot)
            && !mapping.queued
        {
            mapping.queued = true;
            self.readable_mappings.push(slot);
        }
    }

    /// Adds the receives of this pass to the batch, `share` of them at the most.
    pub(in crate::worker) fn submit_receives(&mut self, share: usize) {
        let Self { readable_mappings, mappings, link, operations, incoming, echo_replies, .. } = self;
        for slot in readable_mappings {
            let Some(mapping) = mappings.get_mut(*slot) else { continue };
            if !link.may_reserve_ahead() {
                break;
            }
            let fd = mapping.socket.fd();
            let v4 = mapping.guest.address.is_v4();
            for _ in 0..mapping.burst {
                if incoming.len() >= share.min(echo_replies.slots()) {
                    break;
                }
                let payload = Ahead::Datagram(PAYLOAD_MAX);
                let Some(space) = link.reserve_ahead(build::udp_head_len(v4), payload) else { break };
                let head = head_len(mapping.kind, v4);
                let head = head.map(|len| (incoming.len(), len));
                let mut receive = operations.begin(fd, Kind::ReceiveDatagram);
                if let Some((index, len)) = head {
                    receive.piece(echo_replies.piece(index).part(0, len));
                }
                link.space(space, &mut |piece| receive.piece(piece));
                let (operation, _) = receive.finish_datagram();
                incoming.push(Incoming { mapping: *slot, operation, space, head });
            }
        }
    }

    /// Sends on what the receives gave.
    pub(in crate::worker) fn conclude_receives(&mut self, now: Now) {
        let mut queued = std::mem::take(&mut self.readable_mappings);
        let incoming = std::mem::take(&mut self.incoming);
        for slot in &queued {
            if let Some(mapping) = self.mappings.get_mut(*slot) {
                mapping.queued = false;
            }
        }
        // The receives of a mapping stand together, in the order of the mappings. Those at the end for which no space was
        // left come first in the next pass.
        let mut rest = incoming.as_slice();
        let mut unread = 0;
        for slot in &queued {
            let len = rest.iter().take_while(|one| one.mapping == *slot).count();
            let (own, others) = rest.split_at(len);
            rest = others;
            if own.is_empty() {
                self.queue_mapping(*slot);
                unread += usize::from(self.mappings.get(*slot).is_some());
                continue;
            }
            let mut received = 0;
            let mut drained = false;
            for one in own {
                match self.operations.result(one.operation) {
                    Ok(len) => {
                        received += 1;
                        if let Err(reason) = self.datagram_to_guest(one, len, now) {
                            self.link.cancel(one.space);
                            self.drop_frame(reason);
                        }
                    }
                    Err(error) => {
                        drained |= error.kind() == std::io::ErrorKind::WouldBlock;
                        self.link.cancel(one.space);
                    }
                }
            }
            let Some(mapping) = self.mappings.get_mut(*slot) else { continue };
            mapping.burst =
                if drained { (received + 1).min(BURST_MAX) } else { (mapping.burst * 2).min(BURST_MAX) };
            if !drained {
                self.queue_mapping(*slot);
            }
        }
        self.readable_mappings.rotate_right(unread);
        self.incoming = incoming;
        self.incoming.clear();
        queued.clear();
        if self.readable_mappings.is_empty() {
            self.readable_mappings = queued;
        }
    }

    /// Sends one received datagram (or run) on. An error leaves the space to the caller.
    fn datagram_to_guest(&mut self, one: &Incoming, len: usize, now: Now) -> Result<(), DropReason> {
        let message = self.operations.message(one.operation);
        let told = control::read(message);
        let (source, truncated) = (message.source(), message.is_truncated());
        let Some(source) = source else { return Err(DropReason::Malformed) };
        if truncated {
            return Err(DropReason::TooLarge);
        }
        let Some(mapping) = self.mappings.get(one.mapping) else { return Err(DropReason::NoFlow) };
        let kind = mapping.kind;
        let peer = match kind {
            MappingKind::Echo { .. } => Endpoint { port: 0, ..source },
            _ => source,
        };
        let key = self.flow_of_peer(one.mapping, peer, &told, now)?;
        if let Some(mapping) = self.mappings.get_mut(one.mapping) {
            mapping.last_used = now;
        }
        let mut route = self.route_to_guest(key.remote.address, key.guest.address);
        route.ip.traffic_class = told.traffic_class;
        match (kind, one.head) {
            (MappingKind::Echo { id, kind }, Some((index, head_len))) => {
                let v4 = key.guest.address.is_v4();
                let head = self.echo_replies.bytes(index, head_len.min(len));
                let header = if kind == EchoKind::Raw && v4 { head.get(RAW_V4_HEADER..) } else { Some(head) };
                let reply =
                    header.and_then(|header| icmp::parse_echo_reply(header, v4)).filter(|echo| echo.id == id);
                let Some(reply) = reply else { return Err(DropReason::IcmpType) };
                self.echo_to_guest(one.space, &key, &route, reply.sequence, len - head_len);
            }
            _ => self.udp_to_guest(one.space, &key, &route, len, told.segment),
        }
        Ok(())
    }

    /// The flow of a peer, begun if the peer may: as the guest's own correspondent, or as a client of a published port.
    fn flow_of_peer(
        &mut self,
        slot: Slot,
        peer: Endpoint,
        told: &ReceiveControl,
        now: Now,
    ) -> Result<FlowKey, DropReason> {
        let Some(mapping) = self.mappings.get(slot) else { return Err(DropReason::NoFlow) };
        // The guest has called its own published port, and an answer to that would go round for ever.
        let own_address = peer.address.is_loopback()
            || peer.address == mapping.local.address
            || self.addresses.own.binary_search(&peer.address).is_ok();
        if peer.port != 0 && peer.port == mapping.local.port && own_address {
            return Err(DropReason::OwnSocket);
        }
        let published = matches!(mapping.kind, MappingKind::Published(_));
        let known = mapping.peers.translated(peer).or_else(|| {
            let key = FlowKey { guest: mapping.guest, remote: peer, protocol: mapping.kind.protocol() };
            let handle = self.flows.find(&self.flows.hash(&key))?;
            (handle.owner == self.id).then_some(handle.slot)
        });
        if let Some(flow) =
            known.and_then(|flow| self.datagram_flows.get_mut(flow)).filter(|f| f.mapping == slot)
        {
            if published && flow.answered {
                flow.expires = now + Self::idle_time(&flow.key);
            }
            return Ok(flow.key);
        }
        let Some(mapping) = self.mappings.get(slot) else { return Err(DropReason::NoFlow) };
        let anybody = published || self.udp_filtering == UdpFiltering::EndpointIndependent;
        if !anybody && !mapping.peers.knows(peer.address) {
            return Err(DropReason::Filtered);
        }
        self.begin_inbound_flow(slot, peer, told, now)
    }

    fn begin_inbound_flow(
        &mut self,
        slot: Slot,
        peer: Endpoint,
        told: &ReceiveControl,
        now: Now,
    ) -> Result<FlowKey, DropReason> {
        let Some(mapping) = self.mappings.get(slot) else { return Err(DropReason::NoFlow) };
        let (guest, protocol) = (mapping.guest, mapping.kind.protocol());
        let Some(family) = self.addresses.family(guest.address.is_v4()).copied() else {
            return Err(DropReason::Policy);
        };
        let same_family = peer.address.is_v4() == guest.address.is_v4();
        let remote = if same_family && self.addresses.may_keep_source(peer.address) {
            peer
        } else if mapping.peers.knows(peer.address) && peer.address.is_loopback() {
            // Another port of the host's loopback, with which the guest speaks under the host's name.
            Endpoint { address: family.host, port: peer.port }
        } else {
            Endpoint { address: family.gateway, port: peer.port }
        };
        let local = told
            .local
            .filter(|_| matches!(self.mappings.get(slot).map(|m| m.kind), Some(MappingKind::Published(_))));
        // Two clients may have the same port and appear under the gateway: the later one gets another.
        for attempt in 0..8u16 {
            let port = if attempt == 0 {
                remote.port
            } else {
                1024 + (remote.port ^ attempt.wrapping_mul(7919)) % 64_512
            };
            let key = FlowKey { guest, remote: Endpoint { port, ..remote }, protocol };
            match self.open_flow(key, slot, peer, local, now)? {
                Routed::Here(_) => return Ok(key),
                Routed::Elsewhere(_) if remote == peer => return Err(DropReason::FlowBudget),
                Routed::Elsewhere(_) => {}
            }
        }
        Err(DropReason::FlowBudget)
    }

    fn udp_to_guest(&mut self, space: Space, key: &FlowKey, route: &Route, len: usize, segment: Option<u16>) {
        let capabilities = self.link.capabilities();
        let headers = if route.ip.source.is_v4() { 28 } else { 48 };
        let fits = |len: usize| len + headers <= capabilities.mtu as usize;
        let fits_a_packet = len + headers <= 65_535;
        let segment = segment.map(usize::from).filter(|segment| *segment < len && *segment > 0);
        match segment {
            Some(size) if capabilities.udp_segmentation && fits(size) && fits_a_packet => {
                self.counters.add(Metric::DatagramsIn, len.div_ceil(size) as u64);
                let segmentation = Segmentation::Udp { size: size as u16 };
                self.commit_udp(space, key, route, len, segmentation);
            }
            None if fits(len) => {
                self.counters.add(Metric::DatagramsIn, 1);
                self.commit_udp(space, key, route, len, Segmentation::None);
            }
            _ => {
                // Datagram by datagram, each whole or in fragments: copies, for what no guest of this link takes whole.
                let payload = self.take_out(space, len);
                for datagram in payload.chunks(segment.unwrap_or(len).max(1)) {
                    self.counters.add(Metric::DatagramsIn, 1);
                    self.copy_udp(key, route, datagram);
                }
            }
        }
    }

    /// Copies the first bytes of a space out and gives it back unused.
    fn take_out(&mut self, space: Space, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len);
        let mut rest = len;
        self.link.space(space, &mut |piece| {
            let piece = piece.part(0, rest);
            rest -= piece.len();
            piece.copy_to(&mut bytes);
        });
        self.link.cancel(space);
        bytes
    }

    fn commit_udp(
        &mut self,
        space: Space,
        key: &FlowKey,
        route: &Route,
        len: usize,
        segmentation: Segmentation,
    ) {
        let mut bytes = [0; build::HEAD_MAX];
        let head = build::udp(&mut bytes, route, key.remote.port, key.guest.port, len, true);
        let offload = Offload { checksum_partial: true, segmentation };
        let v4 = route.ip.source.is_v4();
        self.commit(space, &InboundHead { bytes: &bytes[..head.len], head, v4, offload }, len);
    }

    /// Sends a copy of a datagram, in fragments where it is larger than the guest's MTU.
    fn copy_udp(&mut self, key: &FlowKey, route: &Route, payload: &[u8]) {
        match datagram::whole(route, key.remote.port, key.guest.port, payload) {
            Some(frame) => self.send_in_fragments(&frame, route, protocol::UDP),
            None => self.drop_frame(DropReason::TooLarge),
        }
    }

    /// Sends a complete frame whole, or its packet in fragments where that is larger than the guest's MTU.
    fn send_in_fragments(&mut self, frame: &[u8], route: &Route, protocol: u8) {
        let mtu = self.link.capabilities().mtu;
        self.fragment_id = self.fragment_id.wrapping_add(1);
        for frame in fragment::frames(frame, route, protocol, mtu, self.fragment_id) {
            self.frame_to_guest(&frame);
        }
    }

    fn echo_to_guest(&mut self, space: Space, key: &FlowKey, route: &Route, sequence: u16, len: usize) {
        let v4 = route.ip.source.is_v4();
        let mut message = icmp::echo_reply(v4, icmp::Echo { id: key.guest.port, sequence }).to_vec();
        message.extend(self.take_out(space, len));
        let mut frame = vec![0; ETHERNET_LEN + 40 + message.len()];
        let len = build::icmp(&mut frame, route, &message);
        self.counters.add(Metric::DatagramsIn, 1);
        self.send_in_fragments(&frame[..len], route, protocol::icmp(v4));
    }
}

/// Bytes in front of the payload that a socket of this kind gives, to be kept out of the link's space.
fn head_len(kind: MappingKind, v4: bool) -> Option<usize> {
    match kind {
        MappingKind::Echo { kind: EchoKind::Raw, .. } if v4 => Some(RAW_V4_HEADER + ECHO_LEN),
        MappingKind::Echo { .. } => Some(ECHO_LEN),
        _ => None,
    }
}
