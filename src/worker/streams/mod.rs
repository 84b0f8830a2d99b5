//! TCP flows of a worker.
//!
//! A stream is a relay (numbers), a host socket, and the few bytes that neither side has taken yet. Whatever happens
//! to it in a pass, a segment, an event of its socket, a deadline, is told to its relay and *touches* it; at the end
//! of the pass [`settle`] does for every touched stream what its relay wants, in one batch.
//!
//! * [`clients`]: who comes to published ports
//! * [`departed`]: streams from addresses that the host has no more
//! * [`open`]: how streams begin, in both directions, and what the guest is told when they do not
//! * [`outbound`]: segments of the guest
//! * [`inbound`]: events of the host socket, and frames with its bytes
//! * [`settle`]: the batch
//! * [`buffer`]: bytes that neither side has taken yet
//! * [`rehome`]: another host side
//! * [`moving`]: another worker
//! * [`unanswerable`]: clients that the guest cannot answer under their own address

pub(super) mod buffer;
pub(super) mod clients;
pub(super) mod departed;
pub(super) mod inbound;
pub(super) mod moving;
pub(super) mod open;
pub(super) mod outbound;
mod rehome;
pub(super) mod settle;
pub(super) mod unanswerable;

use crate::flow::key::FlowKey;
use crate::flow::table::Position;
use crate::frame::address::Endpoint;
use crate::relay::tcp::TcpRelay;
use buffer::Buffer;
use moving::Strays;

/// What kind of stream the host side is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostKind {
    /// A TCP socket.
    Tcp,
    /// One end of a socketpair whose other end hythe itself serves.
    Pair,
}

/// The host side of a stream.
pub struct HostSide<S> {
    /// The socket.
    pub socket: S,
    /// Its kind.
    pub kind: HostKind,
    /// The destination or the client; of no meaning for a pair.
    pub peer: Endpoint,
    /// Whether the kernel keeps a peek offset for it.
    pub keeps_offset: bool,
    /// Where the next peek starts, from the start of the receive queue.
    pub position: u32,
    /// Peeks since bytes were discarded last.
    pub peeks: u8,
    /// The peer has closed its direction, or the socket failed: a short read is not the end of what there is to learn.
    pub closed: bool,
    /// The socket failed. What it had received before goes to the guest first.
    pub failed: bool,
    /// The peer has sent urgent data. It is delivered in line, but the kernel ends every read at its mark: a short one
    /// says nothing then.
    pub urgent: bool,
}

impl<S> HostSide<S> {
    /// A socket of which nothing was read.
    pub fn new(socket: S, kind: HostKind, peer: Endpoint) -> Self {
        Self {
            socket,
            kind,
            peer,
            keeps_offset: false,
            position: 0,
            peeks: 0,
            closed: false,
            failed: false,
            urgent: false,
        }
    }
}

/// The host side that a stream is to have next.
pub struct NextHost<S> {
    /// The host side.
    pub host: HostSide<S>,
    /// The old one's last byte was read.
    pub old_ended: bool,
}

/// How a stream came to be.
#[derive(Clone, Copy, Debug)]
pub enum Origin {
    /// The guest opened it.
    Outbound {
        /// The connect has no outcome yet, and is counted as one under way.
        connecting: bool,
        /// The other loopback address is tried when the connect fails.
        alternative: bool,
        /// The traffic class of the guest's SYN.
        traffic_class: u8,
    },
    /// A client called a published port.
    Inbound {
        /// The publication's number.
        publication: u32,
        /// The client.
        client: Endpoint,
        /// The client's own source was kept, and the guest has not shown that it can answer it.
        unproven: bool,
        /// The guest was asked at its address of the other family already.
        asked_both: bool,
    },
    /// hythe asks whether the guest listens at a published port.
    Probe {
        /// The publication's number.
        publication: u32,
        /// The guest was asked at its address of the other family already.
        asked_both: bool,
    },
}

/// A TCP flow.
pub struct Stream<S> {
    /// Its name.
    pub key: FlowKey,
    /// Where it lies in the flow table, once it does.
    pub position: Option<Position>,
    /// Its relay.
    pub relay: TcpRelay,
    /// Its host side, until both ends are done with it.
    pub host: Option<HostSide<S>>,
    /// The host side that it is to have next.
    pub next_host: Option<Box<NextHost<S>>>,
    /// How it came to be.
    pub origin: Origin,
    /// Bytes that wait.
    pub buffer: Option<Box<Buffer>>,
    /// Its place in the list of streams that something happened to in this pass.
    pub touched: Option<u32>,
    /// A host socket is counted for it.
    pub counted: bool,
    /// How many spaces the next peek may fill: grows while they are filled.
    pub burst: u8,
    /// Its segments that came on another worker's queue.
    pub strays: Strays,
}

impl<S> Stream<S> {
    /// A stream without a host side, for which a host socket is counted.
    pub fn new(key: FlowKey, relay: TcpRelay, origin: Origin) -> Self {
        Self {
            key,
            position: None,
            relay,
            host: None,
            next_host: None,
            origin,
            buffer: None,
            touched: None,
            counted: true,
            burst: 1,
            strays: Strays::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_stream_takes_half_a_kilobyte_with_all_that_belongs_to_it() {
        let record = size_of::<Stream<std::os::fd::OwnedFd>>();
        // Beside the record: the slab's generation and link, a timer, and a table that is full.
        let beside = 8 + 16 + crate::flow::table::BYTES_PER_FLOW;
        println!("stream {record} bytes, with slab, timer and table {}", record + beside);
        assert!(record + beside <= 512, "{record} + {beside}");
    }
}
