//! Giving a stream another host side.
//!
//! A stream that ends in hythe itself (its host side is one end of a socketpair) may go on to another socket: a proxy's
//! handshake is the slow path's work, and what follows is relayed like any other stream. Four things must hold, in both
//! directions, whatever the guest sends meanwhile:
//!
//! * No byte for the new socket passes one that the service still has to pass on. So the old end is shut down for
//!   writing at once, and what the guest sends waits in the stream's buffer.
//! * No byte of the old end is lost. So it stays until the service has closed it and the guest has acknowledged the last
//!   byte of it: until then it is the retransmission buffer.
//! * The new socket's first byte follows the old end's last one in the guest's sequence.
//! * An end of the guest's direction that came before the move is told to the new socket, too.

use crate::flow::slab::Slot;
use crate::frame::address::Endpoint;
use crate::host::engine::{Engine, Interest, Token};
use crate::host::{HostSocket, Sockets};
use crate::link::Link;
use crate::time::Now;

use super::super::{Worker, token_kind};
use super::{HostKind, HostSide, NextHost};

impl<L: Link, E: Engine, S: Sockets> Worker<L, E, S> {
    /// The stream's host side is to be `socket`, a connected TCP socket, once the old one is done with.
    pub(in crate::worker) fn rehome(&mut self, slot: Slot, socket: S::Socket, peer: Endpoint) {
        let waiting = self.streams.get(slot).is_some_and(|stream| {
            stream.host.is_some() && stream.next_host.is_none() && !stream.relay.is_host_done()
        });
        if !waiting || self.admission.open_stream().is_err() {
            // The service has nothing else to offer.
            self.sockets.reset(socket);
            return self.break_stream(slot);
        }
        let Some(stream) = self.streams.get_mut(slot) else { return };
        if let Some(host) = &stream.host {
            self.sockets.shut_down(&host.socket);
        }
        let host = HostSide::new(socket, HostKind::Tcp, peer);
        stream.next_host = Some(Box::new(NextHost { host, old_ended: false }));
        self.touch(slot);
    }

    /// What is behind the stream is lost: it ends with a reset.
    pub(in crate::worker) fn break_stream(&mut self, slot: Slot) {
        if let Some(stream) = self.streams.get_mut(slot) {
            stream.relay.host_failed();
            self.touch(slot);
        }
    }

    /// Takes the new host side into use if the old one is done with.
    pub(super) fn try_rehome(&mut self, slot: Slot, now: Now) {
        let Some(stream) = self.streams.get_mut(slot) else { return };
        let done =
            stream.next_host.as_ref().is_some_and(|next| next.old_ended) && stream.relay.send().is_quiet();
        let Some(next) = stream.next_host.take_if(|_| done) else { return };
        let mut host = next.host;
        stream.relay.take_discard();
        let token = Token { kind: token_kind::STREAM, slot };
        if let Some(old) = stream.host.take() {
            Self::close_host(&mut self.engine, &mut self.sockets, old, slot, false);
            self.admission.close_stream();
        }
        host.keeps_offset = self.sockets.establish(&host.socket, host.peer.address.is_v4(), false);
        if stream.relay.receive().is_shut_down() {
            // The guest's end came before the move, and only the old end has heard of it.
            self.sockets.shut_down(&host.socket);
        }
        let watched = self.engine.watch(host.socket.fd(), token, Interest::Both);
        let Some(stream) = self.streams.get_mut(slot) else { return };
        stream.host = Some(host);
        if watched.is_err() {
            stream.relay.host_failed();
        } else {
            stream.relay.readable(now);
        }
        self.again.push(slot);
    }
}
