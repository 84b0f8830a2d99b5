//! Clients of the host's loopback and a guest in the same kernel: two sockets joined by `splice`.
//!
//! When the guest is a network namespace of this kernel, a client of a published port that comes from the loopback
//! needs no frames: it is joined to a socket that was opened inside the namespace and is connected to the guest's own
//! address (never its loopback, which is the guest's own affair). Sockets of the namespace come from the helper, some in
//! advance; while there is none, the client goes the way of all others.

use std::os::fd::RawFd;

use crate::exchange::mail::{Publication, ToSlow};
use crate::flow::slab::Slot;
use crate::frame::address::Endpoint;
use crate::frame::drop_reason::DropReason;
use crate::host::engine::{Engine, Event, Interest, Token};
use crate::host::splice::Conduit;
use crate::host::{HostSocket, Sockets, tcp};
use crate::link::Link;
use crate::observe::counters::Metric;
use crate::time::Now;

use super::{Worker, token_kind};

/// Sockets of the guest's namespace that are asked for at a time, of each family.
const SOCKETS_ASKED: u8 = 32;
/// Descriptors of one join: two sockets, two pipes.
const DESCRIPTORS: u32 = 6;
/// Empty conduits kept for the next joins.
const CONDUITS_KEPT: usize = 64;

/// A client and a socket of the guest.
pub(super) struct Join<S> {
    publication: Publication,
    client: S,
    peer: Endpoint,
    guest: S,
    to_guest: Conduit,
    to_client: Conduit,
    connected: bool,
    /// The guest was asked at its address of the other family already.
    asked_both: bool,
    queued: bool,
}

/// Sockets of the guest's namespace that are connected to nothing yet.
pub(super) struct GuestSockets<S> {
    /// IPv6's, IPv4's.
    idle: [Vec<S>; 2],
    asked: [bool; 2],
    /// Whether the guest is in this kernel, so that there are any.
    available: bool,
}

impl<S> GuestSockets<S> {
    pub fn new(available: bool) -> Self {
        Self { idle: [Vec::new(), Vec::new()], asked: [false; 2], available }
    }
}

impl<L: Link, E: Engine, S: Sockets> Worker<L, E, S> {
    /// Sockets of the guest's namespace have come.
    pub(super) fn add_guest_sockets(&mut self, v4: bool, sockets: Vec<S::Socket>) {
        self.guest_sockets.asked[usize::from(v4)] = false;
        self.guest_sockets.idle[usize::from(v4)].extend(sockets);
    }

    /// Asks for sockets of the guest's namespace when few are left.
    pub(super) fn ask_for_guest_sockets(&mut self, v4: bool) {
        let family = usize::from(v4);
        let few = self.guest_sockets.idle[family].len() < SOCKETS_ASKED as usize / 2;
        if self.guest_sockets.available && few && !self.guest_sockets.asked[family] {
            let ask = ToSlow::WantSockets { worker: self.id, count: SOCKETS_ASKED, v4 };
            self.guest_sockets.asked[family] = self.slow.put(ask).is_ok();
        }
    }

    /// The family of the guest's that is asked first, if it has one: whether that is IPv4.
    fn first_family(&self) -> Option<bool> {
        self.addresses.families().next().map(|family| family.guest.is_v4())
    }

    /// A socket to join a client by, for another worker.
    pub(super) fn take_guest_socket(&mut self) -> Option<S::Socket> {
        let v4 = self.first_family()?;
        self.ask_for_guest_sockets(v4);
        self.guest_sockets.idle[usize::from(v4)].pop()
    }

    /// Takes in what [`take_guest_socket`](Self::take_guest_socket) gave, if few are there.
    pub(super) fn keep_guest_socket(&mut self, socket: S::Socket) {
        let Some(v4) = self.first_family() else { return };
        let idle = &mut self.guest_sockets.idle[usize::from(v4)];
        if idle.len() < SOCKETS_ASKED as usize {
            idle.push(socket);
        }
    }

    /// Joins a client to the guest; gives it back when that cannot be done.
    pub(super) fn join_client(
        &mut self,
        publication: Publication,
        client: S::Socket,
        peer: Endpoint,
    ) -> Option<S::Socket> {
        let Some(v4) = self.first_family() else { return Some(client) };
        if self.admission.open_sockets(DESCRIPTORS).is_err() {
            return Some(client);
        }
        let guest = self.connect_into_guest(publication, v4);
        let parts = guest.and_then(|guest| Some((guest, self.take_conduit()?, self.take_conduit()?)));
        let Some((guest, to_guest, to_client)) = parts else {
            self.admission.close_sockets(DESCRIPTORS);
            return Some(client);
        };
        let (client_fd, guest_fd) = (client.fd(), guest.fd());
        let join = Join {
            publication,
            client,
            peer,
            guest,
            to_guest,
            to_client,
            connected: false,
            asked_both: false,
            queued: false,
        };
        let slot = match self.joins.insert(join) {
            Ok(slot) => slot,
            Err(join) => {
                self.admission.close_sockets(DESCRIPTORS);
                return Some(join.client);
            }
        };
        let client_token = Token { kind: token_kind::JOIN_CLIENT, slot };
        let guest_token = Token { kind: token_kind::JOIN_GUEST, slot };
        let watched = self.engine.watch(client_fd, client_token, Interest::Both).is_ok()
            && self.engine.watch(guest_fd, guest_token, Interest::Both).is_ok();
        if watched {
            self.counters.add(Metric::StreamsIn, 1);
        } else {
            self.end_join(slot, true);
        }
        None
    }

    /// A socket of the guest's namespace on its way to the published port, at the guest's address of a family.
    fn connect_into_guest(&mut self, publication: Publication, v4: bool) -> Option<S::Socket> {
        let guest = self.addresses.family(v4)?.guest;
        self.ask_for_guest_sockets(v4);
        let socket = self.guest_sockets.idle[usize::from(v4)].pop()?;
        let destination = Endpoint { address: guest, port: publication.guest_port };
        self.sockets.connect_guest(&socket, destination).ok().map(|()| socket)
    }

    /// The guest refused a join at its address of one family: the other one is tried, by frames where there is no socket for it.
    fn join_refused(&mut self, slot: Slot, now: Now) {
        let Some(join) = self.joins.get(slot) else { return };
        let (publication, peer) = (join.publication, join.peer);
        let other_v4 = self.first_family().is_some_and(|v4| !v4);
        let has_other = !join.asked_both && self.addresses.family(other_v4).is_some();
        let other = if has_other { self.connect_into_guest(publication, other_v4) } else { None };
        if has_other && other.is_none() {
            let Some([client, guest]) = self.part_join(slot) else { return };
            self.sockets.reset(guest);
            if let Err(reason) = self.open_inbound(publication, client, peer, now) {
                self.drop_frame(reason);
            }
            return;
        }
        let token = Token { kind: token_kind::JOIN_GUEST, slot };
        if let (Some(other), Some(join)) = (other, self.joins.get_mut(slot)) {
            join.asked_both = true;
            self.engine.unwatch(join.guest.fd(), token);
            join.guest = other;
            if self.engine.watch(join.guest.fd(), token, Interest::Both).is_ok() {
                return;
            }
        }
        self.end_join(slot, true);
        self.drop_frame(DropReason::GuestRefused);
        self.tell_listens(publication.id, false);
    }

    fn take_conduit(&mut self) -> Option<Conduit> {
        self.conduits.pop().or_else(|| Conduit::new().ok())
    }

    /// Something happened on one of a join's sockets.
    pub(super) fn join_event(&mut self, event: Event, guest_side: bool, now: Now) {
        let slot = event.token.slot;
        let Some(join) = self.joins.get_mut(slot) else { return };
        if guest_side && !join.connected && (event.writable || event.closed || event.failed) {
            if self.sockets.outcome(&join.guest).is_err() {
                self.join_refused(slot, now);
                return;
            }
            join.connected = true;
            // Until here the client might have had to go the way of frames.
            for fd in [join.client.fd(), join.guest.fd()] {
                tcp::lift_unsent_limit(fd);
            }
            self.counters.add(Metric::StreamsJoined, 1);
        }
        let Join { to_guest, to_client, queued, .. } = join;
        let (outward, inward) = if guest_side { (to_client, to_guest) } else { (to_guest, to_client) };
        outward.source_ready |= event.readable || event.closed;
        inward.sink_ready |= event.writable || event.closed;
        if !*queued {
            *queued = true;
            self.ready_joins.push(slot);
        }
    }

    /// Moves what the joins of this pass can move.
    pub(super) fn pump_joins(&mut self) {
        let mut ready = std::mem::take(&mut self.ready_joins);
        for slot in ready.drain(..) {
            let Some(join) = self.joins.get_mut(slot) else { continue };
            join.queued = false;
            if !join.connected {
                continue;
            }
            let (client, guest): (RawFd, RawFd) = (join.client.fd(), join.guest.fd());
            let results = [join.to_guest.pump(client, guest), join.to_client.pump(guest, client)];
            let finished = join.to_guest.is_done() && join.to_client.is_done();
            let bytes: usize = results.iter().flatten().map(|pumped| pumped.bytes).sum();
            self.counters.add(Metric::BytesJoined, bytes as u64);
            if results.iter().any(Result::is_err) {
                // A reset on one side is a reset on the other.
                self.end_join(slot, true);
            } else if finished {
                self.end_join(slot, false);
            } else if results.iter().flatten().any(|pumped| pumped.more) {
                join.queued = true;
                self.ready_joins.push(slot);
            }
        }
        if self.ready_joins.is_empty() {
            self.ready_joins = ready;
        }
    }

    fn end_join(&mut self, slot: Slot, reset: bool) {
        for socket in self.part_join(slot).into_iter().flatten() {
            if reset {
                self.sockets.reset(socket);
            }
        }
    }

    /// Ends a join; its sockets, the client's first, are the caller's.
    fn part_join(&mut self, slot: Slot) -> Option<[S::Socket; 2]> {
        let join = self.joins.remove(slot)?;
        self.engine.unwatch(join.client.fd(), Token { kind: token_kind::JOIN_CLIENT, slot });
        self.engine.unwatch(join.guest.fd(), Token { kind: token_kind::JOIN_GUEST, slot });
        for conduit in [join.to_guest, join.to_client] {
            if self.conduits.len() < CONDUITS_KEPT {
                self.conduits.extend(conduit.renewed());
            }
        }
        self.admission.close_sockets(DESCRIPTORS);
        self.counters.add(Metric::StreamsOver, 1);
        Some([join.client, join.guest])
    }

    /// Resets every join.
    pub(super) fn end_all_joins(&mut self) {
        for slot in self.joins.slots() {
            self.end_join(slot, true);
        }
    }
}
