//! The host's side: sockets of the kernel, and the engines that do input and output on them.
//!
//! [`engine`] runs batches of operations and reports readiness. [`Sockets`] is what a worker asks of sockets besides
//! that; [`kernel`] answers with real ones, the simulation with models.

pub mod control;
pub mod datagram;
pub mod engine;
pub mod errors;
pub mod kernel;
pub mod listen;
pub mod occupant;
pub mod options;
pub mod processors;
pub mod splice;
pub mod tcp;

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::time::Duration;

use crate::frame::address::Endpoint;
use crate::policy::outbound::WayOut;
use errors::{QueuedError, SocketError};
use tcp::Accepted;

/// The host's resolver configuration.
pub const RESOLV_CONF: &str = "/etc/resolv.conf";
/// The host's own list of names.
pub const HOSTS: &str = "/etc/hosts";

/// A connection to be opened on the host.
#[derive(Clone, Copy, Debug)]
pub struct ConnectPlan {
    /// Where to.
    pub destination: Endpoint,
    /// The local port that the connection should leave from.
    pub local_port: Option<u16>,
    /// The traffic class of the guest's SYN, whose DSCP the connection carries on.
    pub traffic_class: u8,
    /// By which way it leaves the host.
    pub way: WayOut,
}

/// A socket of the host. Dropping it closes it.
pub trait HostSocket {
    /// Its descriptor.
    fn fd(&self) -> RawFd;
}

/// How an echo socket wants its messages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EchoKind {
    /// A ping socket: the kernel fills in identifier and checksum.
    Ping,
    /// A raw socket: hythe does, and received IPv4 packets come with their IP header.
    Raw,
}

/// A socket for ICMP echo.
pub struct EchoSocket<S> {
    /// The socket.
    pub socket: S,
    /// Its identifier on the wire.
    pub id: u16,
    /// Its kind.
    pub kind: EchoKind,
}

/// What a worker asks of the host's sockets, besides operations. None of it waits.
pub trait Sockets {
    /// A socket.
    type Socket: HostSocket;

    /// Opens a TCP connection; it is under way when this returns.
    fn connect(&mut self, plan: &ConnectPlan) -> Result<Self::Socket, SocketError>;

    /// What became of a connect, or of a connection that reported an error.
    fn outcome(&mut self, socket: &Self::Socket) -> Result<(), SocketError>;

    /// The connection stands: prepares it for peeking. Returns whether it keeps a peek offset.
    fn establish(&mut self, socket: &Self::Socket, v4: bool, connecting: bool) -> bool;

    /// Accepts the next client of a listener.
    fn accept(&mut self, listener: RawFd) -> io::Result<Option<Accepted<Self::Socket>>>;

    /// How many bytes the socket would take now.
    fn room(&mut self, socket: &Self::Socket) -> u32;

    /// Puts the offset at which the next peek starts.
    fn seek(&mut self, socket: &Self::Socket, offset: u32);

    /// Closes the sending direction.
    fn shut_down(&mut self, socket: &Self::Socket);

    /// Has the kernel probe the peer for liveness.
    fn keep_alive(&mut self, socket: &Self::Socket, after: Duration);

    /// A pair of connected stream sockets: the worker's end, and the one for whoever serves it.
    fn pair(&mut self) -> io::Result<(Self::Socket, OwnedFd)>;

    /// The local endpoint of a socket.
    fn local(&mut self, socket: &Self::Socket) -> Option<Endpoint>;

    /// Connects a socket that was opened in the guest's namespace; the connect is under way when this returns. Sockets
    /// of other hosts than the kernel have no such thing.
    fn connect_guest(&mut self, _socket: &Self::Socket, _destination: Endpoint) -> Result<(), SocketError> {
        Err(SocketError::from_number(libc::EOPNOTSUPP))
    }

    /// Closes a connection with a reset.
    fn reset(&mut self, socket: Self::Socket);

    /// A UDP socket that is bound to `port`, or to one that the host chooses.
    fn open_udp(&mut self, v4: bool, port: Option<u16>) -> io::Result<Self::Socket>;

    /// A socket for ICMP echo with the identifier `id`, or another one.
    fn open_echo(&mut self, v4: bool, id: u16) -> io::Result<EchoSocket<Self::Socket>>;

    /// An echo socket is not used any more.
    fn close_echo(&mut self, socket: Self::Socket, kind: EchoKind);

    /// Whether the host may cut the datagrams that follow.
    fn set_dont_fragment(&mut self, socket: &Self::Socket, v4: bool, on: bool);

    /// Takes the next entry out of a socket's error queue.
    fn take_error(&mut self, socket: &Self::Socket) -> Option<QueuedError>;
}
