//! The TCP relay: the end of the guest's connection, joined to a socket of the host.
//!
//! # Theory of operation
//! Towards the guest hythe is a TCP endpoint (RFC 9293); towards the world it is the host's kernel, through a socket.
//! The relay is the part that knows sequence numbers. It holds no bytes:
//!
//! ```text
//!             segment()                       Disposition::Payload
//!   guest ───────────────▶ ┌─────────┐ ─────────────────────────────▶ sendmsg, rest buffered → taken()
//!             poll_segment │  relay  │ wanted()                         room sampled           → offer()
//!   guest ◀─────────────── └─────────┘ ◀───────────────────────────── MSG_PEEK at an offset   → data_segment()
//!                               │        take_discard()                MSG_TRUNC
//!                           expired()
//! ```
//!
//! *Guest to host* ([`receive`]). What is accepted in order goes into the socket at once; what the socket does not
//! take stays in a buffer of the worker that the offered window had already counted. So everything that is
//! acknowledged is kept by somebody, and nothing in the window is ever dropped.
//!
//! *Host to guest* ([`send`]). The kernel's receive queue is the retransmission buffer: bytes are peeked at an offset
//! and discarded when the guest has acknowledged them. A retransmission is a peek at a smaller offset.
//!
//! *Opening*. Outbound: SYN → connect on the host ([`State::Connecting`]) → SYN-ACK only when the host is connected.
//! Inbound: the host has accepted → SYN to the guest ([`State::Offering`]).
//!
//! *Closing*. The directions close one by one: FIN from the guest becomes `shutdown(SHUT_WR)` when the last byte is in
//! the socket; end of file from the socket becomes FIN behind the last byte. Of the RFC's closing states only
//! TIME-WAIT is a state of its own here; the others follow from the two halves. A reset on one side is a reset on the
//! other.
//!
//! The worker calls inputs (`segment`, `connected`, `taken`, `offer`, `readable`, `drained`, `data_segment`,
//! `end_of_stream`, `expired`) and then asks for what is due (`poll_segment`, `wanted`, `take_discard`, `wants_shutdown`,
//! `next_deadline`, `over`).

pub mod options;
pub mod receive;
pub mod rtt;
pub mod send;
mod state;

#[cfg(test)]
mod script;
#[cfg(test)]
mod tests;

pub use state::{Disposition, Over, State, TcpRelay, Wanted, reset_for};

use std::time::Duration;

/// What all relays of a link have in common.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// The largest segment that the guest may send, payload bytes: its MTU without headers.
    pub mss: u16,
    /// The window scale that is offered (RFC 7323, 2.3: at most 14).
    pub window_scale: u8,
    /// The largest window that is offered to a guest, in bytes.
    pub window_max: u32,
    /// Bytes that a flow may hold which the socket would not take.
    pub buffer_max: u32,
    /// Bytes that a flow may hold out of order.
    pub held_max: u32,
    /// Bytes that may lie unacknowledged towards the guest: a peek walks over them.
    pub unacknowledged_max: u32,
    /// How long a pure acknowledgement may wait for data to ride on (RFC 1122, 4.2.3.2: below 0.5 s).
    pub acknowledgement_delay: Duration,
    /// How long a guest that does not answer an inbound SYN is asked.
    pub open_timeout: Duration,
    /// How long unacknowledged bytes are sent again (RFC 9293, 3.8.3, R2: at least 100 s).
    pub retransmit_timeout: Duration,
    /// Idle time after which the guest is probed (RFC 9293, 3.8.4: at least 2 hours).
    pub keep_alive_idle: Duration,
    /// Time between two keep-alive probes.
    pub keep_alive_interval: Duration,
    /// Unanswered probes after which the guest counts as gone.
    pub keep_alive_probes: u8,
    /// How long TIME-WAIT lasts. Twice the segment lifetime of a link inside one machine.
    pub time_wait: Duration,
}

impl Config {
    /// The defaults for a guest with an MTU and the family's IP header length.
    pub fn for_mtu(mtu: u16, v4: bool) -> Self {
        Self {
            mss: mtu.saturating_sub(if v4 { 40 } else { 60 }).max(536),
            window_scale: 7,
            window_max: 4 << 20,
            buffer_max: 64 << 10,
            held_max: 256 << 10,
            unacknowledged_max: 1 << 20,
            acknowledgement_delay: Duration::from_millis(1),
            open_timeout: Duration::from_secs(30),
            retransmit_timeout: Duration::from_secs(100),
            keep_alive_idle: Duration::from_mins(2 * 60 + 4),
            keep_alive_interval: Duration::from_secs(75),
            keep_alive_probes: 9,
            time_wait: Duration::from_secs(2),
        }
    }
}
