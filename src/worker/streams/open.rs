//! How streams begin, and what is said when they do not.
//!
//! *Outbound*: a SYN of the guest becomes a connect on the host; the guest hears SYN-ACK only when that stands. It
//! hears a reset when the host was refused, and an ICMP error when the destination cannot be reached (RFC 1122,
//! 4.2.3.9 has it fail the connect at once).
//!
//! *Inbound*: the host has accepted a client already when the guest is asked (no kernel asks first). A guest that
//! refuses makes the client's connection end with a reset, and the slow path stop listening for a while.

use std::time::Duration;

use crate::exchange::mail::{Publication, Service, ToSlow, ToWorker};
use crate::flow::key::{FlowKey, Protocol};
use crate::flow::slab::Slot;
use crate::flow::table::{Handle, InsertError};
use crate::frame::address::Endpoint;
use crate::frame::drop_reason::DropReason;
use crate::frame::icmp::{IcmpError, Quoted};
use crate::frame::tcp::{self, SegmentHead, Seq};
use crate::frame::view::IpHead;
use crate::host::engine::{Engine, Event, Interest, Token};
use crate::host::errors::{Answer, IcmpReport, SocketError};
use crate::host::{ConnectPlan, HostSocket, Sockets};
use crate::link::Link;
use crate::observe::counters::Metric;
use crate::policy::addresses::{Destination, Way};
use crate::relay::tcp::{Over, State, TcpRelay};
use crate::time::Now;

use super::super::{Worker, token_kind};
use super::moving::Strays;
use super::{HostKind, HostSide, Origin, Stream};

/// How long the guest has to answer a client's own address: so long that it may ask twice who the gateway is (RFC 4861, 10:
/// a neighbour solicitation is repeated after a second).
const PROOF: Duration = Duration::from_millis(1500);

/// Ports tried for a client that appears under the gateway's address while its own port is in use there.
const PORTS_TRIED: u16 = 16;

impl<L: Link, E: Engine, S: Sockets> Worker<L, E, S> {
    /// RFC 6528: a clock of four microseconds and a keyed hash of the connection's name.
    fn initial_sequence(&self, key: &FlowKey, now: Now) -> Seq {
        use std::hash::{Hash, Hasher};
        let mut hasher = siphasher::sip::SipHasher13::new_with_keys(self.secret[0], self.secret[1]);
        key.hash(&mut hasher);
        Seq((hasher.finish() as u32).wrapping_add((now.0 / 4_000) as u32))
    }

    /// Puts a stream into slab and table.
    fn insert_stream(&mut self, stream: Stream<S::Socket>) -> Result<Slot, NotInserted<S::Socket>> {
        let hashed = self.flows.hash(&stream.key);
        let slot = self.streams.insert(stream).map_err(|stream| NotInserted::Full(Box::new(stream)))?;
        match self.flows.insert(&hashed, Handle { owner: self.id, slot }) {
            Ok(position) => {
                if let Some(stream) = self.streams.get_mut(slot) {
                    stream.position = Some(position);
                    stream.strays = Strays::since(self.load.number());
                }
                Ok(slot)
            }
            Err(error) => {
                let stream = self.streams.remove(slot).map(Box::new);
                Err(match (error, stream) {
                    (InsertError::Exists(handle), Some(stream)) => NotInserted::Exists(handle, stream),
                    (_, Some(stream)) => NotInserted::Full(stream),
                    (_, None) => NotInserted::Gone,
                })
            }
        }
    }

    // Outbound.

    /// The guest opens a connection.
    pub(in crate::worker) fn open_outbound(
        &mut self,
        key: FlowKey,
        syn: &SegmentHead,
        traffic_class: u8,
        now: Now,
    ) -> Result<Option<u8>, DropReason> {
        let remote = key.remote;
        let destination = match self.addresses.classify(remote.address) {
            Ok(destination) => destination,
            Err(DropReason::Policy) => {
                let report = IcmpReport { error: IcmpError::Prohibited, offender: None };
                self.tell_about_syn(&key, syn, report);
                return Err(DropReason::Policy);
            }
            Err(reason) => return Err(reason),
        };
        let (first, alternative) = match destination {
            Destination::Gateway => {
                let Some(service) = Service::on_gateway_port(remote.port, &self.addresses) else {
                    self.reset_reply(&key, syn);
                    return Err(DropReason::GatewayPort);
                };
                return self.open_service(key, syn, service, now);
            }
            Destination::Host | Destination::Outside => match self.addresses.way(remote, destination) {
                Way::Straight if destination == Destination::Host => {
                    let [v4, _] = loopbacks(remote.port);
                    (v4, true)
                }
                Way::Straight => (remote, false),
                Way::ByName => return self.open_service(key, syn, Service::Through, now),
                Way::Shut => {
                    self.reset_reply(&key, syn);
                    return Err(DropReason::Policy);
                }
            },
        };
        let admitted = self.admission.open_stream().and_then(|()| {
            self.admission.begin_connect(first.address).inspect_err(|_| self.admission.close_stream())
        });
        if let Err(reason) = admitted {
            self.reset_reply(&key, syn);
            return Err(reason);
        }
        let isn = self.initial_sequence(&key, now);
        let relay = TcpRelay::outbound(syn, isn, self.config(key.guest.address.is_v4()), now);
        let origin = Origin::Outbound { connecting: true, alternative, traffic_class };
        let stream = Stream::new(key, relay, origin);
        let slot = match self.insert_stream(stream) {
            Ok(slot) => slot,
            Err(refused) => {
                self.admission.close_stream();
                self.admission.end_connect(first.address);
                return self.not_inserted(&refused, &key, syn);
            }
        };
        self.counters.add(Metric::StreamsOut, 1);
        self.connect_host(slot, first, now);
        Ok(None)
    }

    /// Another worker has the flow, or there is no room.
    fn not_inserted(
        &mut self,
        refused: &NotInserted<S::Socket>,
        key: &FlowKey,
        syn: &SegmentHead,
    ) -> Result<Option<u8>, DropReason> {
        if let NotInserted::Exists(handle, _) = refused {
            return Ok(Some(handle.owner));
        }
        self.reset_reply(key, syn);
        Err(DropReason::FlowBudget)
    }

    /// The guest opens a connection to a service of hythe's: the host side is a socketpair.
    fn open_service(
        &mut self,
        key: FlowKey,
        syn: &SegmentHead,
        service: Service,
        now: Now,
    ) -> Result<Option<u8>, DropReason> {
        if let Err(reason) = self.admission.open_stream() {
            self.reset_reply(&key, syn);
            return Err(reason);
        }
        let Ok((socket, other_end)) = self.sockets.pair() else {
            self.admission.close_stream();
            self.reset_reply(&key, syn);
            return Err(DropReason::DescriptorBudget);
        };
        let isn = self.initial_sequence(&key, now);
        let mut relay = TcpRelay::outbound(syn, isn, self.config(key.guest.address.is_v4()), now);
        relay.connected(now);
        let origin = Origin::Outbound { connecting: false, alternative: false, traffic_class: 0 };
        let stream = Stream::new(key, relay, origin);
        match self.insert_stream(stream) {
            Ok(slot) => {
                self.counters.add(Metric::StreamsOut, 1);
                self.attach_host(slot, socket, HostKind::Pair, key.remote);
                let mail = ToSlow::Stream {
                    worker: self.id,
                    stream: slot,
                    service,
                    socket: other_end,
                    guest: key.guest,
                    remote: key.remote,
                };
                if self.slow.put(mail).is_err() {
                    self.abandon_stream(slot, now);
                    return Err(DropReason::SlowPathFull);
                }
                Ok(None)
            }
            Err(refused) => {
                self.admission.close_stream();
                self.not_inserted(&refused, &key, syn)
            }
        }
    }

    /// Gives a stream its host side, which stands.
    fn attach_host(&mut self, slot: Slot, socket: S::Socket, kind: HostKind, peer: Endpoint) {
        let keeps_offset = self.sockets.establish(&socket, peer.address.is_v4(), false);
        let watched =
            self.engine.watch(socket.fd(), Token { kind: token_kind::STREAM, slot }, Interest::Both);
        let Some(stream) = self.streams.get_mut(slot) else { return };
        stream.host = Some(HostSide { keeps_offset, ..HostSide::new(socket, kind, peer) });
        if watched.is_err() {
            stream.relay.host_failed();
        }
        // What the client has sent already shows in the first report of the socket.
        self.touch(slot);
    }

    /// Begins the connect to `destination`, or to the stream's alternative when that fails at once.
    fn connect_host(&mut self, slot: Slot, destination: Endpoint, now: Now) {
        let Some(stream) = self.streams.get(slot) else { return };
        let Origin::Outbound { traffic_class, .. } = stream.origin else { return };
        let guest = stream.key.guest;
        // From the same port to the same port of the loopback a connection would open to itself.
        let own = destination.address.is_loopback() && self.ports.wish(guest) == Some(destination.port);
        let wish = self.ports.wish(guest).filter(|_| !own);
        let way = self.addresses.way_out(destination.address);
        let mut plan = ConnectPlan { destination, local_port: wish, traffic_class, way };
        let mut result = self.sockets.connect(&plan);
        let taken = |error: &SocketError| {
            matches!(error.number, libc::EADDRINUSE | libc::EADDRNOTAVAIL | libc::EACCES)
        };
        if wish.is_some() && result.as_ref().is_err_and(taken) {
            plan.local_port = None;
            result = self.sockets.connect(&plan);
        }
        match result {
            Ok(socket) => {
                if plan.local_port.is_none()
                    && !own
                    && let Some(local) = self.sockets.local(&socket)
                {
                    self.ports.remember(guest, local.port);
                }
                let watched =
                    self.engine.watch(socket.fd(), Token { kind: token_kind::STREAM, slot }, Interest::Both);
                if let Some(stream) = self.streams.get_mut(slot) {
                    stream.host = Some(HostSide::new(socket, HostKind::Tcp, destination));
                    if watched.is_err() {
                        stream.relay.host_failed();
                        self.touch(slot);
                    }
                }
            }
            Err(error) => self.connect_failed(slot, error, now),
        }
    }

    /// The connect of a stream has an outcome.
    pub(super) fn connect_ended(&mut self, slot: Slot, event: Event, now: Now) {
        let Some(stream) = self.streams.get_mut(slot) else { return };
        let Some(host) = &mut stream.host else { return };
        // A socket that failed says so beside having room.
        let stands = event.writable && !event.closed && !event.failed;
        let outcome = if stands { Ok(()) } else { self.sockets.outcome(&host.socket) };
        // A connection that meets itself (RFC 9293, 3.5 allows it) is nobody's service.
        let itself = host.peer.address.is_loopback() && self.sockets.local(&host.socket) == Some(host.peer);
        let error = match outcome {
            Ok(()) if !itself => {
                host.keeps_offset = self.sockets.establish(&host.socket, host.peer.address.is_v4(), true);
                stream.relay.connected(now);
                if event.readable || event.closed {
                    stream.relay.readable(now);
                }
                self.end_connect(slot);
                self.touch(slot);
                return;
            }
            Ok(()) => SocketError::from_number(libc::ECONNREFUSED),
            Err(error) => error,
        };
        self.connect_failed(slot, error, now);
    }

    fn connect_failed(&mut self, slot: Slot, error: SocketError, now: Now) {
        let Some(stream) = self.streams.get_mut(slot) else { return };
        if let Some(host) = stream.host.take() {
            Self::close_host(&mut self.engine, &mut self.sockets, host, slot, true);
        }
        let port = stream.key.remote.port;
        if let Origin::Outbound { alternative, .. } = &mut stream.origin
            && std::mem::take(alternative)
        {
            let [_, v6] = loopbacks(port);
            self.connect_host(slot, v6, now);
            return;
        }
        self.drop_frame(DropReason::HostRefused);
        let Some(stream) = self.streams.get_mut(slot) else { return };
        match error.answer() {
            Answer::Refused => stream.relay.host_failed(),
            Answer::Icmp(report) => {
                stream.relay.forget();
                let (key, syn) = (
                    stream.key,
                    SegmentHead { seq: stream.relay.receive().next() - 1, ..SegmentHead::default() },
                );
                self.tell_about_syn(&key, &syn, report);
            }
        }
        self.touch(slot);
    }

    /// The connect is not under way any more.
    pub(super) fn end_connect(&mut self, slot: Slot) {
        let Some(stream) = self.streams.get_mut(slot) else { return };
        let remote = stream.key.remote;
        if let Origin::Outbound { connecting, .. } = &mut stream.origin
            && std::mem::take(connecting)
        {
            let [loopback, _] = loopbacks(remote.port);
            let host = self.addresses.families().any(|family| family.host == remote.address);
            self.admission.end_connect(if host { loopback.address } else { remote.address });
        }
    }

    /// Tells the guest about its SYN by an ICMP error.
    fn tell_about_syn(&mut self, key: &FlowKey, syn: &SegmentHead, report: IcmpReport) {
        let mut header = [0; tcp::HEADER_MAX];
        let segment = SegmentHead { flags: tcp::Flags::SYN, ..*syn };
        let len = tcp::write(&mut header, key.guest.port, key.remote.port, &segment);
        let ip = IpHead {
            source: key.guest.address,
            destination: key.remote.address,
            hop_limit: 64,
            traffic_class: 0,
            dont_fragment: true,
        };
        self.tell_icmp(report, &Quoted { ip, protocol: 6, len, bytes: &header[..len] });
    }

    // Inbound.

    /// Asks the guest whether it listens at a published port: a SYN from the gateway. Does nothing while it is being
    /// asked already, in either family.
    pub(in crate::worker) fn probe(&mut self, publication: Publication, now: Now) {
        let keys = self.addresses.families().map(|family| InboundKeys {
            guest: Endpoint { address: family.guest, port: publication.guest_port },
            remote: Endpoint { address: family.gateway, port: other_port(publication.guest_port, 1) },
            keeps_source: false,
        });
        let is_asked = |keys: &InboundKeys| {
            let key = FlowKey { guest: keys.guest, remote: keys.remote, protocol: Protocol::Tcp };
            self.flows.find(&self.flows.hash(&key)).is_some()
        };
        let keys: Vec<InboundKeys> = keys.collect();
        if keys.iter().any(is_asked) {
            return;
        }
        let Some(keys) = keys.into_iter().next() else { return };
        let origin = Origin::Probe { publication: publication.id, asked_both: false };
        if let Ok(slot) = self.insert_inbound(keys, origin, None, now) {
            self.touch(slot);
        }
    }

    pub(in crate::worker) fn open_inbound(
        &mut self,
        publication: Publication,
        socket: S::Socket,
        client: Endpoint,
        now: Now,
    ) -> Result<(), DropReason> {
        if let Err(reason) = self.admission.open_stream() {
            self.sockets.reset(socket);
            return Err(reason);
        }
        let Some(keys) = self.inbound_keys(publication.guest_port, client, now) else {
            self.admission.close_stream();
            self.sockets.reset(socket);
            return Err(DropReason::Policy);
        };
        let unproven = keys.keeps_source;
        let origin = Origin::Inbound { publication: publication.id, client, unproven, asked_both: false };
        match self.insert_inbound(keys, origin, None, now) {
            Ok(slot) => {
                self.counters.add(Metric::StreamsIn, 1);
                self.attach_host(slot, socket, HostKind::Tcp, client);
                Ok(())
            }
            Err(_) => {
                self.admission.close_stream();
                self.sockets.reset(socket);
                Err(DropReason::FlowBudget)
            }
        }
    }

    /// Under which name a client may appear to the guest.
    fn inbound_keys(&self, guest_port: u16, client: Endpoint, now: Now) -> Option<InboundKeys> {
        let keeps_source = self.addresses.may_keep_source(client.address)
            && self.addresses.family(client.address.is_v4()).is_some()
            && !self.unanswerable.contains(client.address, now);
        let same = self.addresses.family(client.address.is_v4());
        let family = same.or_else(|| self.addresses.families().next())?;
        let address = if keeps_source { client.address } else { family.gateway };
        Some(InboundKeys {
            guest: Endpoint { address: family.guest, port: guest_port },
            remote: Endpoint { address, port: client.port },
            keeps_source,
        })
    }

    /// Puts an inbound stream into slab and table under the first name that is free; its host side, if it has one, is
    /// counted already. Gives it back when there is no room.
    fn insert_inbound(
        &mut self,
        mut keys: InboundKeys,
        mut origin: Origin,
        host: Option<HostSide<S::Socket>>,
        now: Now,
    ) -> Result<Slot, Option<HostSide<S::Socket>>> {
        let counted = !matches!(origin, Origin::Probe { .. });
        let mut host = host;
        for attempt in 0..PORTS_TRIED {
            let port =
                if keys.keeps_source { keys.remote.port } else { other_port(keys.remote.port, attempt) };
            let remote = Endpoint { port, ..keys.remote };
            let key = FlowKey { guest: keys.guest, remote, protocol: Protocol::Tcp };
            let isn = self.initial_sequence(&key, now);
            let relay = TcpRelay::inbound(isn, self.config(key.guest.address.is_v4()), now);
            let stream = Stream { host, counted, ..Stream::new(key, relay, origin) };
            match self.insert_stream(stream) {
                Ok(slot) => return Ok(slot),
                Err(NotInserted::Exists(handle, stream)) => {
                    host = stream.host;
                    if handle.owner == self.id && self.gives_way(handle.slot, origin) {
                        self.abandon_stream(handle.slot, now);
                    } else if keys.keeps_source
                        && let Some(family) = self.addresses.family(key.guest.address.is_v4())
                    {
                        // The client calls by two ports of the host from one of its own: the other call keeps the name.
                        keys = InboundKeys {
                            remote: Endpoint { address: family.gateway, ..key.remote },
                            keeps_source: false,
                            ..keys
                        };
                        if let Origin::Inbound { unproven, .. } = &mut origin {
                            *unproven = false;
                        }
                    }
                }
                Err(NotInserted::Full(stream)) => return Err(stream.host),
                Err(NotInserted::Gone) => return Err(None),
            }
        }
        Err(host)
    }

    /// Whether a stream may be ended for a new one of its name: it is over, or it is of the same client of the same
    /// port of the host, on whose side the name is free again.
    fn gives_way(&self, slot: Slot, new: Origin) -> bool {
        let Some(stream) = self.streams.get(slot) else { return true };
        let call = |origin| match origin {
            Origin::Inbound { publication, client, .. } => Some((publication, client)),
            _ => None,
        };
        stream.relay.is_host_done() || (call(new).is_some() && call(stream.origin) == call(new))
    }

    /// Ends a stream with resets, at once.
    fn abandon_stream(&mut self, slot: Slot, now: Now) {
        if let Some(stream) = self.streams.get_mut(slot) {
            stream.relay.abandon();
            self.settle_one_now(slot, now);
        }
    }

    /// The guest does not answer a client's own address: the client appears under the gateway's instead, and so does
    /// its whole prefix for a while. Returns whether that was done.
    pub(super) fn fall_back_to_gateway(&mut self, slot: Slot, now: Now) -> bool {
        let Some(stream) = self.streams.get(slot) else { return false };
        let Origin::Inbound { client, unproven: true, publication, asked_both } = stream.origin else {
            return false;
        };
        if proof_due(stream).is_none_or(|due| now < due) {
            return false;
        }
        self.unanswerable.note(client.address, now);
        for (id, worker) in self.workers.iter().enumerate() {
            if id != usize::from(self.id) {
                // One that does not hear of it finds out by itself.
                let _ = worker.put(ToWorker::Unanswerable(client.address));
            }
        }
        let origin = Origin::Inbound { publication, client, unproven: false, asked_both };
        let keys = self.inbound_keys(stream.key.guest.port, client, now);
        self.ask_again(slot, keys, origin, now);
        true
    }

    /// The guest refused an inbound connection (or a probe) at its address of one family: perhaps its service listens
    /// at the other one. Returns whether it is asked there.
    pub(super) fn ask_other_family(&mut self, slot: Slot, now: Now) -> bool {
        let Some(stream) = self.streams.get(slot) else { return false };
        if stream.relay.over() != Some(Over::GuestRefused) {
            return false;
        }
        let origin = match stream.origin {
            Origin::Inbound { publication, client, asked_both: false, .. } => {
                Origin::Inbound { publication, client, unproven: false, asked_both: true }
            }
            Origin::Probe { publication, asked_both: false } => {
                Origin::Probe { publication, asked_both: true }
            }
            _ => return false,
        };
        let guest = stream.key.guest;
        let Some(other) = self.addresses.family(!guest.address.is_v4()) else { return false };
        let keys = InboundKeys {
            guest: Endpoint { address: other.guest, port: guest.port },
            remote: Endpoint { address: other.gateway, port: stream.key.remote.port },
            keeps_source: false,
        };
        self.ask_again(slot, Some(keys), origin, now);
        true
    }

    /// Asks the guest once more, under another name; the client is reset when there is none.
    fn ask_again(&mut self, slot: Slot, keys: Option<InboundKeys>, origin: Origin, now: Now) {
        let Some(stream) = self.remove_stream(slot) else { return };
        if let Some(host) = &stream.host {
            self.engine.unwatch(host.socket.fd(), Token { kind: token_kind::STREAM, slot });
        }
        let inserted = match keys {
            Some(keys) => self.insert_inbound(keys, origin, stream.host, now),
            None => Err(stream.host),
        };
        let new = match inserted {
            Ok(new) => new,
            Err(host) => {
                if let Some(host) = host {
                    self.sockets.reset(host.socket);
                    self.admission.close_stream();
                }
                return;
            }
        };
        let Some(stream) = self.streams.get_mut(new) else { return };
        stream.relay.readable(now);
        if let Some(host) = &stream.host {
            let token = Token { kind: token_kind::STREAM, slot: new };
            if self.engine.watch(host.socket.fd(), token, Interest::Both).is_err() {
                stream.relay.host_failed();
            }
        }
        self.touch(new);
    }
}

/// When the guest has had its time to answer the client's own address.
pub(super) fn proof_due<S>(stream: &Stream<S>) -> Option<Now> {
    let asked = matches!(stream.origin, Origin::Inbound { unproven: true, .. })
        && stream.relay.state() == State::Offering;
    asked.then(|| stream.relay.last_heard() + PROOF)
}

/// 127.0.0.1 and ::1, the order in which a service on the host's loopback is looked for.
fn loopbacks(port: u16) -> [Endpoint; 2] {
    [Endpoint::new(std::net::Ipv4Addr::LOCALHOST, port), Endpoint::new(std::net::Ipv6Addr::LOCALHOST, port)]
}

/// The port itself first, then others spread over the unprivileged ones.
fn other_port(port: u16, attempt: u16) -> u16 {
    if attempt == 0 {
        port
    } else {
        1024 + port.wrapping_mul(31).wrapping_add(attempt.wrapping_mul(7919)) % 64_512
    }
}

/// The name of an inbound connection.
#[derive(Clone, Copy)]
struct InboundKeys {
    guest: Endpoint,
    remote: Endpoint,
    keeps_source: bool,
}

enum NotInserted<T> {
    Exists(Handle, Box<Stream<T>>),
    Full(Box<Stream<T>>),
    Gone,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stand_in_ports_are_unprivileged_and_differ() {
        let ports: Vec<u16> = (0..PORTS_TRIED).map(|attempt| other_port(5000, attempt)).collect();
        assert_eq!(ports[0], 5000);
        assert!(ports.iter().all(|port| *port >= 1024));
        let mut unique = ports.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), ports.len());
    }
}
