//! How mappings and their flows begin and end.

use std::time::Duration;

use crate::exchange::mail::Publication;
use crate::flow::key::{FlowKey, Protocol};
use crate::flow::slab::Slot;
use crate::flow::table::{Handle, InsertError};
use crate::frame::address::{Address, Endpoint};
use crate::frame::drop_reason::DropReason;
use crate::host::engine::{Engine, Interest, Token};
use crate::host::{EchoSocket, HostSocket, Sockets};
use crate::link::Link;
use crate::observe::counters::Metric;
use crate::policy::addresses::Destination;
use crate::policy::target::TargetProtocol;
use crate::time::Now;

#[cfg(feature = "sim")]
use super::super::simulated::{Omission, omits};
use super::super::{Served, Worker, token_kind};
use super::members::{Members, Neighbours};
use super::peers::Peers;
use super::{DatagramFlow, Mapping, MappingKind};

/// RFC 4787, REQ-5: five minutes are recommended.
const UDP_IDLE: Duration = Duration::from_mins(5);
/// A question and its answer (RFC 4787, REQ-5 (b) lets well-known ports have shorter ones).
const DNS_IDLE: Duration = Duration::from_secs(30);
/// A stranger at a published port to whom the guest has said nothing yet.
const UNANSWERED_IDLE: Duration = Duration::from_secs(30);
/// RFC 5508, REQ-2: at least a minute.
const ECHO_IDLE: Duration = Duration::from_mins(1);

/// Guests keep their own ports up to this many at a time: each is a port that the host cannot use.
const KEPT_PORTS_MAX: u32 = 1024;

/// Mappings looked at when the least recently used has to go; flows, when one that nobody answered has.
const SAMPLE: u32 = 16;
/// Strangers at one published port: this part of all flows at the most.
const PUBLISHED_SHARE: u32 = 4;

/// Who is to handle a datagram.
pub(in crate::worker) enum Routed {
    /// This worker, by this flow.
    Here(Slot),
    /// Another worker, which owns the mapping.
    Elsewhere(u8),
}

/// What rules call a protocol of datagrams.
fn target_protocol(protocol: Protocol) -> TargetProtocol {
    if protocol == Protocol::Echo { TargetProtocol::Icmp } else { TargetProtocol::Udp }
}

impl<L: Link, E: Engine, S: Sockets> Worker<L, E, S> {
    /// How long a flow lives without use.
    pub(super) fn idle_time(key: &FlowKey) -> Duration {
        match key.protocol {
            Protocol::Echo => ECHO_IDLE,
            _ if key.remote.port == 53 => DNS_IDLE,
            _ => UDP_IDLE,
        }
    }

    /// The name under which a mapping is found.
    fn mapping_key(guest: Endpoint, protocol: Protocol) -> FlowKey {
        let nowhere: Address = std::net::Ipv6Addr::UNSPECIFIED.into();
        FlowKey { guest, remote: Endpoint { address: nowhere, port: 0 }, protocol }
    }

    /// Finds, or begins, the flow of a datagram from the guest.
    pub(super) fn route_datagram(&mut self, key: FlowKey, now: Now) -> Result<Routed, DropReason> {
        let hashed = self.flows.hash(&key);
        if let Some(handle) = self.flows.find(&hashed) {
            if handle.owner != self.id {
                return Ok(Routed::Elsewhere(handle.owner));
            }
            if self.datagram_flows.get(handle.slot).is_some_and(|flow| flow.key == key) {
                return Ok(Routed::Here(handle.slot));
            }
        }
        let peer = self.peer_of(&key)?;
        let mapping = match self.flows.find(&self.flows.hash(&Self::mapping_key(key.guest, key.protocol))) {
            Some(handle) if handle.owner != self.id => return Ok(Routed::Elsewhere(handle.owner)),
            Some(handle) if self.mappings.get(handle.slot).is_some() => handle.slot,
            _ => match self.open_mapping(key.guest, key.protocol, now)? {
                Routed::Here(slot) => slot,
                elsewhere @ Routed::Elsewhere(_) => return Ok(elsewhere),
            },
        };
        self.open_flow(key, mapping, peer, None, now)
    }

    /// The peer on the host's side, or why it may not be reached.
    fn peer_of(&self, key: &FlowKey) -> Result<Endpoint, DropReason> {
        if !self.addresses.may_send_from(key.guest.address) {
            return Err(DropReason::SourceAddress);
        }
        let means = self.addresses.classify(key.remote.address)?;
        self.addresses.admit(key.remote, means, target_protocol(key.protocol))?;
        match means {
            Destination::Gateway => Err(DropReason::GatewayPort),
            Destination::Outside => Ok(key.remote),
            Destination::Host => {
                let loopback: Address = if key.remote.address.is_v4() {
                    std::net::Ipv4Addr::LOCALHOST.into()
                } else {
                    std::net::Ipv6Addr::LOCALHOST.into()
                };
                Ok(Endpoint { address: loopback, port: key.remote.port })
            }
        }
    }

    fn open_mapping(&mut self, guest: Endpoint, protocol: Protocol, now: Now) -> Result<Routed, DropReason> {
        if self.admission.open_sockets(1).is_err() {
            // The least recently used one makes room, if it may.
            self.evict_mapping(now);
            self.admission.open_sockets(1)?;
        }
        let v4 = guest.address.is_v4();
        let opened = match protocol {
            Protocol::Echo => self
                .sockets
                .open_echo(v4, guest.port)
                .map(|EchoSocket { socket, id, kind }| (socket, MappingKind::Echo { id, kind }))
                .map_err(|_| DropReason::EchoUnavailable),
            _ => self
                .open_udp(guest)
                .map(|socket| (socket, MappingKind::Udp))
                .map_err(|_| DropReason::DescriptorBudget),
        };
        let (socket, kind) = opened.inspect_err(|_| self.admission.close_sockets(1))?;
        let local = self.sockets.local(&socket).unwrap_or(guest);
        match self.add_mapping(guest, kind, socket, local, true, now) {
            Ok(slot) => Ok(Routed::Here(slot)),
            Err(InsertError::Exists(handle)) => Ok(Routed::Elsewhere(handle.owner)),
            Err(InsertError::Full) => Err(DropReason::FlowBudget),
        }
    }

    /// A socket on the guest's own port where that may be had, else on another.
    fn open_udp(&mut self, guest: Endpoint) -> std::io::Result<S::Socket> {
        let v4 = guest.address.is_v4();
        let wish = self.ports.wish(guest).filter(|_| self.kept_ports < KEPT_PORTS_MAX);
        match wish {
            Some(port) => self.sockets.open_udp(v4, Some(port)).or_else(|_| self.sockets.open_udp(v4, None)),
            None => self.sockets.open_udp(v4, None),
        }
    }

    /// Adds a mapping; `general` makes it the one for all destinations of its endpoint.
    fn add_mapping(
        &mut self,
        guest: Endpoint,
        kind: MappingKind,
        socket: S::Socket,
        local: Endpoint,
        general: bool,
        now: Now,
    ) -> Result<Slot, InsertError> {
        let mapping = Mapping {
            guest,
            kind,
            socket,
            local,
            position: None,
            flows: Members::default(),
            peers: Peers::default(),
            dont_fragment: None,
            burst: 1,
            queued: false,
            last_used: now,
        };
        let Ok(slot) = self.mappings.insert(mapping) else {
            self.give_up_share(kind);
            return Err(InsertError::Full);
        };
        self.kept_ports += u32::from(kind == MappingKind::Udp && local.port == guest.port);
        if general {
            let hashed = self.flows.hash(&Self::mapping_key(guest, kind.protocol()));
            match self.flows.insert(&hashed, Handle { owner: self.id, slot }) {
                Ok(position) => {
                    if let Some(mapping) = self.mappings.get_mut(slot) {
                        mapping.position = Some(position);
                    }
                }
                // Two ports of the host lead to one of the guest: what the guest begins goes out by the first one.
                // Where the table is full, what comes in has its own place, or is refused when it comes.
                Err(_) if matches!(kind, MappingKind::Published(_)) => {}
                Err(error) => {
                    self.close_mapping(slot);
                    return Err(error);
                }
            }
        }
        let Some(mapping) = self.mappings.get(slot) else { return Err(InsertError::Full) };
        if self
            .engine
            .watch(mapping.socket.fd(), Token { kind: token_kind::MAPPING, slot }, Interest::Both)
            .is_err()
        {
            self.close_mapping(slot);
            return Err(InsertError::Full);
        }
        self.counters.add(Metric::MappingsOpened, 1);
        Ok(slot)
    }

    /// Begins a flow of a mapping.
    pub(super) fn open_flow(
        &mut self,
        key: FlowKey,
        mapping: Slot,
        peer: Endpoint,
        local: Option<Address>,
        now: Now,
    ) -> Result<Routed, DropReason> {
        let hashed = self.flows.hash(&key);
        let published = {
            let Some(mapping) = self.mappings.get_mut(mapping) else { return Err(DropReason::NoFlow) };
            // In use, and so not the one to go below.
            mapping.last_used = now;
            matches!(mapping.kind, MappingKind::Published(_))
        };
        if published {
            self.make_room_for_stranger(mapping)?;
        }
        let mut evicted = false;
        let position = loop {
            let vacancy = self.datagram_flows.vacancy();
            let inserted = vacancy.map_or(Err(InsertError::Full), |slot| {
                self.flows.insert(&hashed, Handle { owner: self.id, slot })
            });
            match inserted {
                Ok(position) => break position,
                Err(InsertError::Exists(handle)) => return Ok(Routed::Elsewhere(handle.owner)),
                // The least recently used mapping makes room, once.
                Err(InsertError::Full) if !evicted && self.evict_mapping(now) => evicted = true,
                Err(InsertError::Full) => return Err(DropReason::FlowBudget),
            }
        };
        let idle = if published { UNANSWERED_IDLE } else { Self::idle_time(&key) };
        let expires = now + idle;
        let flow = DatagramFlow {
            key,
            position,
            mapping,
            peer,
            local,
            expires,
            answered: !published,
            neighbours: Neighbours::default(),
        };
        let Ok(slot) = self.datagram_flows.insert(flow) else {
            self.flows.remove(position);
            return Err(DropReason::FlowBudget);
        };
        self.datagram_timers.arm(slot.index, expires);
        if let Some(mapping) = self.mappings.get_mut(mapping) {
            mapping.flows.append(&mut self.datagram_flows, slot);
            mapping.peers.begin(peer, (peer != key.remote).then_some(slot));
        }
        Ok(Routed::Here(slot))
    }

    /// Strangers begin flows at a published port by a datagram each, from whatever address they claim. Where they have
    /// had their share, one whom the guest never answered goes.
    fn make_room_for_stranger(&mut self, mapping: Slot) -> Result<(), DropReason> {
        for _ in 0..SAMPLE {
            let Some(record) = self.mappings.get_mut(mapping) else { return Err(DropReason::NoFlow) };
            if record.flows.count() < self.datagram_flows.capacity() / PUBLISHED_SHARE {
                return Ok(());
            }
            let Some(first) = record.flows.first() else { return Ok(()) };
            if self.datagram_flows.get(first).is_some_and(|flow| flow.answered) {
                record.flows.rotate(&mut self.datagram_flows);
            } else {
                self.close_flow(first);
            }
        }
        Err(DropReason::FlowBudget)
    }

    /// A deadline of a flow has come: it ends, unless it was used since the deadline was armed.
    pub(in crate::worker) fn datagram_deadline(&mut self, index: u32, now: Now) {
        let Some(slot) = self.datagram_flows.slot_at(index) else { return };
        match self.datagram_flows.get(slot) {
            Some(flow) if flow.expires > now => self.datagram_timers.arm(index, flow.expires),
            _ => self.close_flow(slot),
        }
    }

    /// Ends a flow, and its mapping with the last one.
    pub(super) fn close_flow(&mut self, slot: Slot) {
        let Some(flow) = self.datagram_flows.remove(slot) else { return };
        self.flows.remove(flow.position);
        self.datagram_timers.cancel(slot.index);
        self.datagram_timers.shrink(self.datagram_flows.index_bound());
        let Some(mapping) = self.mappings.get_mut(flow.mapping) else { return };
        mapping.flows.remove(&mut self.datagram_flows, flow.neighbours);
        mapping.peers.end(flow.peer, slot);
        #[cfg(feature = "sim")]
        if omits(Omission::CloseMapping) {
            return;
        }
        if mapping.flows.count() == 0 && !matches!(mapping.kind, MappingKind::Published(_)) {
            self.close_mapping(flow.mapping);
        }
    }

    /// Ends a mapping that has no flows (any more).
    fn close_mapping(&mut self, slot: Slot) {
        let Some(mapping) = self.mappings.remove(slot) else { return };
        if let Some(position) = mapping.position {
            self.flows.remove(position);
        }
        self.engine.unwatch(mapping.socket.fd(), Token { kind: token_kind::MAPPING, slot });
        self.kept_ports -=
            u32::from(mapping.kind == MappingKind::Udp && mapping.local.port == mapping.guest.port);
        if let MappingKind::Echo { kind, .. } = mapping.kind {
            self.sockets.close_echo(mapping.socket, kind);
        }
        self.give_up_share(mapping.kind);
    }

    /// Flows of the guest have a share of the descriptors; published sockets have one of their own, which the slow path
    /// counts.
    fn give_up_share(&mut self, kind: MappingKind) {
        if !matches!(kind, MappingKind::Published(_)) {
            self.admission.close_sockets(1);
        }
    }

    /// Ends every flow of a mapping, and the mapping.
    pub(in crate::worker) fn close_mapping_and_flows(&mut self, slot: Slot) {
        while let Some(flow) = self.mappings.get(slot).and_then(|mapping| mapping.flows.first()) {
            self.close_flow(flow);
        }
        self.close_mapping(slot);
    }

    /// Ends the least recently used of a sample of mappings. Returns whether one went.
    fn evict_mapping(&mut self, now: Now) -> bool {
        let bound = self.mappings.index_bound();
        let mut oldest: Option<(Slot, Now)> = None;
        for step in 0..SAMPLE.min(bound) {
            let index = (self.eviction_hand + step) % bound;
            let Some(slot) = self.mappings.slot_at(index) else { continue };
            let Some(mapping) = self.mappings.get(slot) else { continue };
            if !matches!(mapping.kind, MappingKind::Published(_))
                && oldest.is_none_or(|(_, last_used)| mapping.last_used < last_used)
            {
                oldest = Some((slot, mapping.last_used));
            }
        }
        self.eviction_hand = if bound == 0 { 0 } else { (self.eviction_hand + SAMPLE) % bound };
        // One that is in use at this very moment is no idle one.
        let Some((slot, _)) = oldest.filter(|(_, last_used)| now.since(*last_used) > 1_000_000_000) else {
            return false;
        };
        self.close_mapping_and_flows(slot);
        true
    }

    /// Datagrams to a published port come to `socket` from now on.
    pub(in crate::worker) fn add_published_datagrams(
        &mut self,
        publication: Publication,
        socket: S::Socket,
        now: Now,
    ) {
        let Some(local) = self.sockets.local(&socket) else { return self.tell_unserved(publication) };
        let same = self.addresses.family(local.address.is_v4());
        let Some(family) = same.or_else(|| self.addresses.families().next()) else {
            return self.tell_unserved(publication);
        };
        let guest = Endpoint { address: family.guest, port: publication.guest_port };
        // Bound to every address, it serves all that the guest sends from this port.
        let general = local.address.ip().is_unspecified() && same.is_some();
        let kind = MappingKind::Published(publication);
        match self.add_mapping(guest, kind, socket, local, general, now) {
            Ok(slot) => drop(self.published.insert(publication.id, Served::Datagrams(slot))),
            Err(_) => self.tell_unserved(publication),
        }
    }

    /// The guest may have another address: what comes to its published ports from now on goes there.
    pub(in crate::worker) fn readdress_published_datagrams(&mut self) {
        let served = self.published.values().filter_map(|served| match served {
            Served::Datagrams(slot) => Some(*slot),
            Served::Listener(_) => None,
        });
        for slot in served.collect::<Vec<_>>() {
            let Some(mapping) = self.mappings.get_mut(slot) else { continue };
            let Some(family) = self.addresses.family(mapping.guest.address.is_v4()) else { continue };
            if mapping.guest.address == family.guest {
                continue;
            }
            mapping.guest.address = family.guest;
            let (guest, protocol) = (mapping.guest, mapping.kind.protocol());
            let Some(position) = mapping.position.take() else { continue };
            self.flows.remove(position);
            let hashed = self.flows.hash(&Self::mapping_key(guest, protocol));
            // A mapping that the guest has begun already keeps what it begins; what comes in is found all the same.
            mapping.position = self.flows.insert(&hashed, Handle { owner: self.id, slot }).ok();
        }
    }

    /// Ends every mapping.
    pub(in crate::worker) fn close_all_mappings(&mut self) {
        for flow in self.datagram_flows.slots() {
            self.close_flow(flow);
        }
        for mapping in self.mappings.slots() {
            self.close_mapping(mapping);
        }
    }
}
