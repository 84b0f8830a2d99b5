//! Clients of published TCP ports, as the host's kernel has accepted them.

use std::time::Duration;

use crate::exchange::mail::{Publication, ToWorker};
use crate::flow::slab::Slot;
use crate::frame::address::Endpoint;
use crate::frame::drop_reason::DropReason;
use crate::host::engine::{Engine, Interest, Token};
use crate::host::tcp::Accepted;
use crate::host::{HostSocket, Sockets};
use crate::link::Link;
use crate::time::Now;

use super::super::{Served, Worker, token_kind};

/// A published TCP port, by its listening socket of this worker.
pub(in crate::worker) struct Listener<S> {
    pub publication: Publication,
    pub socket: S,
}

/// Listeners at the most: every port of both families, of all addresses.
pub(in crate::worker) const LISTENERS_MAX: u32 = 1 << 17;

/// How long a listener pauses for whose clients there is no descriptor.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Clients accepted in one pass from one listener.
const ACCEPTED_AT_ONCE: usize = 64;

impl<L: Link, E: Engine, S: Sockets> Worker<L, E, S> {
    /// Clients of a published port come from `socket` from now on.
    pub(in crate::worker) fn add_listener(&mut self, publication: Publication, socket: S::Socket) {
        let fd = socket.fd();
        let Ok(slot) = self.listeners.insert(Listener { publication, socket }) else {
            return self.tell_unserved(publication);
        };
        let token = Token { kind: token_kind::LISTENER, slot };
        if self.engine.watch(fd, token, Interest::Readable).is_ok() {
            self.published.insert(publication.id, Served::Listener(slot));
        } else {
            self.listeners.remove(slot);
            self.tell_unserved(publication);
        }
    }

    /// No more clients come from a listener; those that wait there are reset, those that were accepted stay.
    pub(in crate::worker) fn remove_listener(&mut self, slot: Slot) {
        if let Some(listener) = self.listeners.remove(slot) {
            self.engine.unwatch(listener.socket.fd(), Token { kind: token_kind::LISTENER, slot });
        }
    }

    /// Accepts the clients that wait at a listener.
    pub(in crate::worker) fn accept_clients(&mut self, slot: Slot, now: Now) {
        let Some(listener) = self.listeners.get(slot) else { return };
        let (fd, publication) = (listener.socket.fd(), listener.publication);
        for _ in 0..ACCEPTED_AT_ONCE {
            match self.sockets.accept(fd) {
                Ok(Some(Accepted { socket, peer })) => {
                    let stand_in = self.link.stand_in();
                    let dealt_to = || self.load.whose(peer, self.id);
                    let left = match stand_in.or_else(dealt_to) {
                        Some(number) => self.pass_on(number, publication, socket, peer),
                        None => Some(socket),
                    };
                    match left {
                        Some(socket) if stand_in.is_some() => {
                            self.drop_frame(DropReason::WorkerFull);
                            self.sockets.reset(socket);
                        }
                        Some(socket) => self.admit_client(publication, socket, peer, now),
                        None => {}
                    }
                }
                Ok(None) => return,
                Err(_) => {
                    // No descriptor: the client waits in the kernel's queue, and no event will say when one is free.
                    self.drop_frame(DropReason::DescriptorBudget);
                    self.paused_listeners.push(slot);
                    self.listeners_resume.get_or_insert(now + ACCEPT_PAUSE);
                    return;
                }
            }
        }
        // There may be more, and no event will say so.
        self.waiting_listeners.push(slot);
    }

    /// Leaves a client to another worker; gives it back when that one's mailbox is full. One of the host itself takes along the
    /// socket by which it is joined.
    fn pass_on(
        &mut self,
        number: u8,
        publication: Publication,
        socket: S::Socket,
        peer: Endpoint,
    ) -> Option<S::Socket> {
        let Some(mailbox) = self.workers.get(usize::from(number)) else { return Some(socket) };
        let mailbox = mailbox.clone();
        let guest_socket = if peer.address.is_loopback() { self.take_guest_socket() } else { None };
        match mailbox.put(ToWorker::Client { publication, socket, peer, guest_socket }) {
            Err(ToWorker::Client { socket, guest_socket, .. }) => {
                if let Some(socket) = guest_socket {
                    self.keep_guest_socket(socket);
                }
                Some(socket)
            }
            _ => None,
        }
    }

    /// Takes a client that was accepted: joins one of the host itself to the guest, and opens a connection for any other.
    pub(in crate::worker) fn admit_client(
        &mut self,
        publication: Publication,
        socket: S::Socket,
        peer: Endpoint,
        now: Now,
    ) {
        let socket = if peer.address.is_loopback() {
            self.join_client(publication, socket, peer)
        } else {
            Some(socket)
        };
        if let Some(socket) = socket
            && let Err(reason) = self.open_inbound(publication, socket, peer, now)
        {
            self.drop_frame(reason);
        }
    }
}
