//! UDP and ICMP echo of a worker.
//!
//! # How it works
//! A *mapping* is an endpoint of the guest joined to one unconnected host socket, whatever the destination
//! (endpoint-independent mapping, RFC 4787 REQ-1; for echo the identifier stands for the port, RFC 5508 REQ-1). A
//! *datagram flow* is a mapping and one remote endpoint; it is what the flow table finds, what has a deadline, and
//! what tells which strangers may answer.
//!
//! ```text
//! guest:port ──┬── remote A ──┐                      flow: (guest, remote) → peer, deadline
//!              ├── remote B ──┼── mapping ── socket
//!              └── remote C ──┘
//! ```
//!
//! *Out* ([`outbound`]): a run of datagrams of one flow and one size becomes one send (`UDP_SEGMENT`). *In*
//! ([`inbound`]): datagrams are received straight into space of the link; a run that the kernel kept together
//! (`UDP_GRO`) goes on as one frame. What a socket's error queue says becomes ICMP to the guest ([`errors`]).
//!
//! Filtering is address-dependent (RFC 4787 REQ-8): whoever shares an address with somebody the guest has spoken
//! to may answer, strangers may not, unless the port is published.
//!
//! A published port is a mapping whose socket was bound for it. Its peers are whoever calls; those that the guest
//! could not answer appear under the gateway's address.

pub(super) mod errors;
pub(super) mod inbound;
mod members;
pub(super) mod open;
pub(super) mod outbound;
mod peers;

use crate::exchange::mail::Publication;
use crate::flow::key::{FlowKey, Protocol};
use crate::flow::slab::Slot;
use crate::flow::table::Position;
use crate::frame::address::{Address, Endpoint};
use crate::host::EchoKind;
use crate::time::Now;
use members::{Members, Neighbours};
use peers::Peers;

/// How a mapping's socket is used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MappingKind {
    /// UDP, opened for the guest.
    Udp,
    /// UDP, published.
    Published(Publication),
    /// Echo with this identifier on the wire.
    Echo {
        /// The identifier.
        id: u16,
        /// The kind of socket.
        kind: EchoKind,
    },
}

impl MappingKind {
    /// The protocol of its flows.
    pub fn protocol(self) -> Protocol {
        match self {
            Self::Udp | Self::Published(_) => Protocol::Udp,
            Self::Echo { .. } => Protocol::Echo,
        }
    }
}

/// An endpoint of the guest and its host socket.
pub struct Mapping<S> {
    /// The guest's endpoint.
    pub guest: Endpoint,
    /// What it is.
    pub kind: MappingKind,
    /// The host socket.
    pub socket: S,
    /// The local endpoint of the socket.
    pub local: Endpoint,
    /// Its place in the flow table, where it is the mapping for all of its endpoint's destinations.
    pub position: Option<Position>,
    /// Its flows.
    pub flows: Members,
    /// With whom it has flows.
    pub peers: Peers,
    /// What the socket was told last about fragments.
    pub dont_fragment: Option<bool>,
    /// How many datagrams to receive at once: grows while there are more.
    pub burst: u8,
    /// It is in the list of those to be read in this pass.
    pub queued: bool,
    /// When it was last used.
    pub last_used: Now,
}

/// A mapping and one remote endpoint.
#[derive(Clone, Copy, Debug)]
pub struct DatagramFlow {
    /// Its name: the endpoints as the guest sees them.
    pub key: FlowKey,
    /// Its place in the flow table.
    pub position: Position,
    /// Its mapping.
    pub mapping: Slot,
    /// The peer as the host sees it.
    pub peer: Endpoint,
    /// The local address that the peer called, to answer from.
    pub local: Option<Address>,
    /// When it ends unless it is used again.
    pub expires: Now,
    /// The guest has sent something to this peer.
    pub answered: bool,
    /// Its neighbours among the flows of its mapping.
    pub neighbours: Neighbours,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_flow_with_its_mapping_takes_half_a_kilobyte_with_all_that_belongs_to_it() {
        let mapping = size_of::<Mapping<std::os::fd::OwnedFd>>();
        let flow = size_of::<DatagramFlow>();
        // Beside the records: the slab's generation and link of each, a timer, and two entries in a table that is full.
        let beside = 2 * 8 + 16 + 2 * crate::flow::table::BYTES_PER_FLOW;
        println!(
            "mapping {mapping} bytes, flow {flow}, with slab, timer and table {}",
            mapping + flow + beside
        );
        assert!(mapping + flow + beside <= 512, "{mapping} + {flow} + {beside}");
    }
}
