//! A model of the kernel's TCP socket (and of one end of a socketpair), as far as hythe can see it.
//!
//! Bytes are numbers here: what a stream holds at an offset is known ([`super::pattern`]), so the queues are counters.
//!
//! ```text
//!  hythe ── send ──▶ taken ┄┄ queued ┄┄▶ delivered ──▶ the peer's program
//!  hythe ◀── peek ── consumed ┄┄ queue ┄┄▶ arrived ◀── the peer's program
//! ```
//!
//! Like Linux: a peek moves the peek offset forward and a discard moves it back; what arrived before a reset can still
//! be read, then the error is told once; a send that does not take everything has the socket say when there is room
//! again, one that does take everything has not.

use std::os::fd::RawFd;

use crate::frame::address::Endpoint;
use crate::frame::icmp::IcmpError;
use crate::host::errors::{IcmpReport, SocketError};
use crate::host::tcp::UNSENT_MAX;
use crate::time::Now;

use super::plan::Outcome;

/// What of a descriptor is ready.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Readiness {
    /// There is something to read.
    pub readable: bool,
    /// There is room to write.
    pub writable: bool,
    /// The peer has closed its direction, or the socket failed.
    pub closed: bool,
    /// The socket failed, or its error queue has an entry.
    pub failed: bool,
}

impl Readiness {
    /// Everything at once.
    pub const ALL: Self = Self { readable: true, writable: true, closed: true, failed: true };
    /// Something to read.
    pub const READABLE: Self = Self { readable: true, writable: false, closed: false, failed: false };
    /// Room to write.
    pub const WRITABLE: Self = Self { readable: false, writable: true, closed: false, failed: false };
    /// The peer's end, which is something to read.
    pub const ENDED: Self = Self { readable: true, writable: false, closed: true, failed: false };

    /// Either of two.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            readable: self.readable || other.readable,
            writable: self.writable || other.writable,
            closed: self.closed || other.closed,
            failed: self.failed || other.failed,
        }
    }

    /// Whether nothing is ready.
    pub fn is_nothing(self) -> bool {
        self == Self::default()
    }
}

/// Where a socket stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// The connect has an outcome at `at`.
    Connecting {
        /// When.
        at: Now,
        /// Which.
        outcome: Outcome,
    },
    /// Connected.
    Open,
    /// Reset, refused or failed.
    Dead,
}

/// One socket.
#[derive(Clone, Debug)]
pub struct StreamSocket {
    /// The connection that it is a part of.
    pub connection: usize,
    /// It is an end of a socketpair.
    pub pair: bool,
    /// hythe's descriptor, until it is closed.
    pub fd: Option<RawFd>,
    /// hythe's end.
    pub local: Endpoint,
    /// The peer.
    pub remote: Endpoint,
    /// Where it stands.
    pub standing: Standing,
    /// The error that the next call tells.
    pub error: i32,
    /// Bytes that hythe has sent.
    pub taken: u64,
    /// Bytes of these that the peer has read.
    pub delivered: u64,
    /// Room for bytes that the peer has not read.
    pub send_buffer: u64,
    /// A send did not take everything: an event says when there is room.
    pub wants_space: bool,
    /// The sending direction is closed.
    pub shut_down: bool,
    /// Bytes of the peer's that are, or were, in the receive queue.
    pub arrived: u64,
    /// Bytes that hythe has dropped from it.
    pub consumed: u64,
    /// Room for bytes that hythe has not dropped.
    pub receive_buffer: u64,
    /// Where the next peek starts, from `consumed` on.
    pub peek_offset: Option<u64>,
    /// The peer has closed its direction.
    pub ended: bool,
    /// hythe has closed its descriptor.
    pub closed_by_host: bool,
    /// hythe, or its kernel, has reset the connection.
    pub reset_by_host: bool,
}

impl StreamSocket {
    /// A socket that stands somewhere.
    pub fn new(
        connection: usize,
        local: Endpoint,
        remote: Endpoint,
        standing: Standing,
        buffers: (u64, u64),
    ) -> Self {
        Self {
            connection,
            pair: false,
            fd: None,
            local,
            remote,
            standing,
            error: 0,
            taken: 0,
            delivered: 0,
            send_buffer: buffers.0,
            wants_space: false,
            shut_down: false,
            arrived: 0,
            consumed: 0,
            receive_buffer: buffers.1,
            peek_offset: None,
            ended: false,
            closed_by_host: false,
            reset_by_host: false,
        }
    }

    fn queued(&self) -> u64 {
        self.taken - self.delivered
    }

    /// Bytes that the next send would take, or that `Sockets::room` tells.
    pub fn room(&self) -> u64 {
        let free = self.send_buffer.saturating_sub(self.queued());
        if self.pair { free } else { free.min(u64::from(UNSENT_MAX).saturating_sub(self.queued())) }
    }

    /// Whether poll(2) would say that there is room: not before a third is free (`sk_stream_is_writeable`).
    fn is_writable(&self) -> bool {
        self.shut_down || (self.room() > 0 && self.room() >= self.queued() / 2)
    }

    /// What poll(2) would say.
    pub fn level(&self) -> Readiness {
        match self.standing {
            Standing::Connecting { .. } => Readiness::default(),
            Standing::Dead => Readiness { failed: self.error != 0, ..Readiness::ALL },
            Standing::Open => Readiness {
                readable: self.arrived > self.consumed || self.ended,
                writable: self.is_writable(),
                closed: self.ended,
                failed: self.error != 0,
            },
        }
    }

    fn take_error(&mut self) -> Option<i32> {
        (self.error != 0).then(|| std::mem::take(&mut self.error))
    }

    /// What stands against a send, as an error number.
    pub fn send_refusal(&mut self) -> Option<i32> {
        if let Some(error) = self.take_error() {
            return Some(error);
        }
        match self.standing {
            Standing::Connecting { .. } => Some(libc::EAGAIN),
            Standing::Dead => Some(libc::EPIPE),
            Standing::Open if self.shut_down => Some(libc::EPIPE),
            Standing::Open if self.room() == 0 => {
                self.wants_space = true;
                Some(libc::EAGAIN)
            }
            Standing::Open => None,
        }
    }

    /// A read from `start` on: how many bytes are there, or the result when there are none.
    pub fn readable_from(&mut self, start: u64) -> Result<u64, i32> {
        let available = self.arrived.saturating_sub(start);
        if available > 0 {
            return Ok(available);
        }
        // The order of tcp_recvmsg: end of stream, error, shut down, not connected, nothing yet.
        if self.ended {
            return Err(0);
        }
        if let Some(error) = self.take_error() {
            return Err(-error);
        }
        match self.standing {
            Standing::Dead => Err(0),
            Standing::Connecting { .. } | Standing::Open => Err(-libc::EAGAIN),
        }
    }

    /// A peek was made of `len` bytes.
    pub fn peeked(&mut self, len: u64) {
        if let Some(offset) = &mut self.peek_offset {
            *offset += len;
        }
    }

    /// `len` bytes leave the receive queue.
    pub fn consume(&mut self, len: u64) {
        self.consumed += len;
        if let Some(offset) = &mut self.peek_offset {
            *offset = offset.saturating_sub(len);
        }
    }

    /// `SO_ERROR`, and what the error queue says beside it.
    pub fn outcome(&mut self) -> Result<(), SocketError> {
        let Some(number) = self.take_error() else { return Ok(()) };
        let report = (number == libc::EHOSTUNREACH && self.taken == 0)
            .then_some(IcmpReport { error: IcmpError::HostUnreachable, offender: Some(self.remote.address) });
        Err(SocketError { number, report })
    }

    /// hythe closes its descriptor. Returns whether the peer is reset: it was asked for, or bytes lie unread.
    pub fn close(&mut self, reset: bool) -> bool {
        self.fd = None;
        self.closed_by_host = true;
        let unread = self.arrived > self.consumed;
        let resets = self.standing == Standing::Open && (reset || unread);
        self.reset_by_host |= resets;
        self.shut_down = true;
        resets
    }

    // What the peer does.

    /// Room for the peer's bytes.
    pub fn peer_room(&self) -> u64 {
        if self.ended || self.standing != Standing::Open {
            return 0;
        }
        self.receive_buffer.saturating_sub(self.arrived - self.consumed)
    }

    /// Bytes that the peer can read.
    pub fn peer_available(&self) -> u64 {
        if self.reset_by_host { 0 } else { self.queued() }
    }

    /// The peer has read everything, and hythe's direction is closed.
    pub fn peer_sees_end(&self) -> bool {
        self.shut_down && self.queued() == 0 && !self.reset_by_host
    }

    /// The peer reads. Returns whether there is room again that was asked for.
    pub fn peer_reads(&mut self, len: u64) -> bool {
        self.delivered += len;
        let event = self.wants_space && self.is_writable();
        self.wants_space &= !event;
        event
    }

    /// The peer resets the connection, or the connect failed.
    pub fn die(&mut self, error: i32) {
        self.standing = Standing::Dead;
        self.error = error;
    }
}
