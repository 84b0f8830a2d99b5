//! What workers and the slow path tell each other.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crossbeam::channel::Sender;
use hdrhistogram::Histogram;

use crate::flow::slab::Slot;
use crate::frame::address::{Address, Endpoint};
use crate::frame::drop_reason::DropReason;
use crate::frame::offload::Offload;
use crate::frame::view::HEAD_LEN;
use crate::io::{Buffers, Piece};
use crate::link::OutboundFrame;
use crate::policy::addresses::Addresses;
use crate::policy::publish::PublishedProtocol;

/// A frame in memory of its own: handed over by another worker, or put together from fragments.
pub struct OwnedFrame {
    /// The frame, from the Ethernet header on, in one slot.
    pub bytes: Buffers,
    /// Its length.
    pub len: usize,
    /// What its virtio-net header said.
    pub offload: Result<Offload, DropReason>,
    /// The worker on whose queue it came, if it came on one.
    pub queue: Option<u8>,
}

impl OwnedFrame {
    /// The frame as a link would show it.
    pub fn as_outbound(&self) -> OutboundFrame<'_> {
        OutboundFrame {
            head: self.bytes.bytes(0, self.len.min(HEAD_LEN)),
            len: self.len,
            offload: self.offload,
        }
    }

    /// A frame that holds a copy of `bytes`.
    pub fn copy_of(bytes: &[u8], offload: Offload) -> Self {
        let mut frame = Self::with_capacity(bytes.len(), offload);
        frame.bytes.bytes_mut(0, bytes.len()).copy_from_slice(bytes);
        frame.len = bytes.len();
        frame
    }

    /// An empty frame with room for so many bytes.
    pub fn with_capacity(capacity: usize, offload: Offload) -> Self {
        Self { bytes: Buffers::new(1, capacity.max(1)), len: 0, offload: Ok(offload), queue: None }
    }

    /// Appends a copy of a piece, as far as there is room.
    pub fn append(&mut self, piece: &Piece) {
        self.len += self.bytes.piece(0).part(self.len, piece.len()).copy_piece(piece);
    }
}

/// A port of the host that is published to the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Publication {
    /// Its number, unique in this process.
    pub id: u32,
    /// The port of the guest.
    pub guest_port: u16,
    /// The protocol.
    pub protocol: PublishedProtocol,
}

/// What whoever does something holds until it is done. Nothing has to be sent back, and so nothing can be lost.
#[derive(Clone, Default)]
pub struct Receipt(Arc<()>);

impl Receipt {
    /// Whether nobody else holds it any more.
    pub fn is_back(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }
}

/// What the recorder is told.
pub enum ToRecorder {
    /// A copy of a frame.
    Frame {
        /// When it passed, in nanoseconds since the epoch.
        time_ns: u64,
        /// Whether it came from the guest.
        outbound: bool,
        /// The frame.
        bytes: Vec<u8>,
    },
    /// There are no more.
    End,
}

/// What a worker is told; `S` is a socket.
pub enum ToWorker<S> {
    /// The guest does not answer this client's own address, nor those of its network.
    Unanswerable(Address),
    /// A whole frame for the guest, checksums complete.
    FrameToGuest(Vec<u8>),
    /// A frame from the guest that belongs here.
    FrameFromGuest(OwnedFrame),
    /// A client of a published port, whom a worker has accepted that does not keep it.
    Client {
        /// Which port.
        publication: Publication,
        /// The connection.
        socket: S,
        /// Who it is.
        peer: Endpoint,
        /// A socket of the guest's namespace to join one of the host itself by, of the guest's first family.
        guest_socket: Option<S>,
    },
    /// Clients of a published port come from this socket (a listener, or a bound datagram socket).
    Publish(Publication, S),
    /// The port is not published any more.
    Unpublish {
        /// Which publication.
        id: u32,
        /// Given back when its socket is closed.
        receipt: Receipt,
    },
    /// Whether flows of the guest must leave a port of the host alone.
    Exclude {
        /// The port.
        port: u16,
        /// They must.
        excluded: bool,
    },
    /// Find out whether the guest listens at a published port, without showing its program a connection.
    Probe(Publication),
    /// Sockets that were opened in the guest's namespace.
    GuestSockets {
        /// IPv4 or IPv6.
        v4: bool,
        /// The sockets, connected to nothing.
        sockets: Vec<S>,
    },
    /// The stream's host side is to be another socket, once the service has closed the old one (see
    /// [`ToSlow::Stream`]).
    Rehome {
        /// The stream's slot at this worker.
        stream: Slot,
        /// The socket, connected.
        socket: S,
        /// Its peer.
        peer: Endpoint,
    },
    /// The stream is to end with a reset: the service will not have it, or has lost what was behind it.
    Break {
        /// The stream's slot at this worker.
        stream: Slot,
    },
    /// New addresses and rules. The receipt is given back when they hold.
    Addresses(Arc<Addresses>, Receipt),
    /// The host has these addresses no more: what came from them is over.
    AddressesGone(Arc<[Address]>),
    /// Another worker suffices no more: what the guest begins is to come by way of this one too.
    TakePart,
    /// Somebody wants to know the latencies that were recorded so far, in nanoseconds: from a frame to a socket, and back.
    TellLatencies(Sender<[Histogram<u64>; 2]>),
    /// Reset everything and end.
    Stop,
}

/// What hythe itself does for the guest over TCP.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Service {
    /// DNS, on port 53 of the gateway.
    Dns,
    /// The control API, on port 80, where the guest may ask.
    Api,
    /// An HTTP proxy, on port 3128.
    Proxy,
    /// None that the guest knows of: a stream to the world whose way depends on the name in its first bytes.
    Through,
}

/// The gateway's port of the HTTP proxy.
pub const PROXY_PORT: u16 = 3128;

impl Service {
    /// The service on a TCP port of the gateway.
    pub fn on_gateway_port(port: u16, addresses: &Addresses) -> Option<Self> {
        match port {
            53 => Some(Self::Dns),
            80 if addresses.guest_api => Some(Self::Api),
            PROXY_PORT => Some(Self::Proxy),
            _ => None,
        }
    }
}

/// What the slow path is told.
pub enum ToSlow {
    /// A frame from the guest for hythe itself. The transport checksum has been verified or completed.
    Frame {
        /// The worker whose link it came from, and to which answers go.
        worker: u8,
        /// The frame, from the Ethernet header on.
        frame: Vec<u8>,
    },
    /// The guest has opened a stream to a service: its other end.
    ///
    /// The service may give the stream another host side, by mailing [`ToWorker::Rehome`] to the worker. From then on it
    /// gets no new bytes; it reads its end until end of file, passes on what it has read to the new socket, and then
    /// closes its end. The worker takes the new socket into use once everything of the old end is delivered.
    Stream {
        /// The worker that has the stream.
        worker: u8,
        /// The stream's slot there.
        stream: Slot,
        /// Which service.
        service: Service,
        /// The end that the service reads and writes.
        socket: OwnedFd,
        /// Who opened it.
        guest: Endpoint,
        /// What it wanted to reach.
        remote: Endpoint,
    },
    /// A worker wants sockets that were opened in the guest's namespace.
    WantSockets {
        /// The worker.
        worker: u8,
        /// How many.
        count: u8,
        /// IPv4 or IPv6.
        v4: bool,
    },
    /// A queue of the link has failed, in these words: the user is told.
    QueueFailed(String),
    /// The worker cannot serve a published port: the kernel watches no more, or there is no room for another mapping.
    Unserved {
        /// Which publication.
        publication: u32,
    },
    /// What the guest answers at a published TCP port.
    Listens {
        /// Which publication.
        publication: u32,
        /// Whether somebody listens there.
        listens: bool,
    },
}
