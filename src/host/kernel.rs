//! The kernel's sockets.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use super::errors::{self, QueuedError, SocketError};
use super::tcp::{self, Accepted};
use super::{ConnectPlan, EchoKind, EchoSocket, HostSocket, Sockets, datagram, options};
use crate::frame::address::Endpoint;
use crate::io::sockaddr;

/// Real sockets.
#[derive(Default)]
pub struct KernelSockets {
    /// Raw ICMP sockets that serve no mapping, made at start where ping sockets are not allowed: IPv6's, IPv4's.
    idle_raw: [Vec<OwnedFd>; 2],
    next_raw_id: u16,
}

impl KernelSockets {
    /// Sockets of a worker; `raw` are raw ICMP sockets for echo, IPv6's and IPv4's. `first_id` starts the identifiers
    /// that raw sockets use, different for each worker.
    pub fn new(raw: [Vec<OwnedFd>; 2], first_id: u16) -> Self {
        Self { idle_raw: raw, next_raw_id: first_id }
    }
}

impl HostSocket for OwnedFd {
    fn fd(&self) -> RawFd {
        self.as_raw_fd()
    }
}

impl Sockets for KernelSockets {
    type Socket = OwnedFd;

    fn connect(&mut self, plan: &ConnectPlan) -> Result<OwnedFd, SocketError> {
        tcp::open(plan)
    }

    fn outcome(&mut self, socket: &OwnedFd) -> Result<(), SocketError> {
        tcp::outcome(socket.as_raw_fd())
    }

    fn establish(&mut self, socket: &OwnedFd, v4: bool, connecting: bool) -> bool {
        tcp::establish(socket.as_raw_fd(), v4, connecting)
    }

    fn accept(&mut self, listener: RawFd) -> io::Result<Option<Accepted<OwnedFd>>> {
        tcp::accept(listener)
    }

    fn room(&mut self, socket: &OwnedFd) -> u32 {
        tcp::room(socket.as_raw_fd())
    }

    fn seek(&mut self, socket: &OwnedFd, offset: u32) {
        // It worked when the connection was established, so it works.
        let _ = tcp::seek(socket.as_raw_fd(), offset);
    }

    fn shut_down(&mut self, socket: &OwnedFd) {
        tcp::shut_down(socket.as_raw_fd());
    }

    fn keep_alive(&mut self, socket: &OwnedFd, after: Duration) {
        tcp::keep_alive(socket.as_raw_fd(), after);
    }

    fn pair(&mut self) -> io::Result<(OwnedFd, OwnedFd)> {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        Ok(socketpair(AddressFamily::Unix, SockType::Stream, None, flags)?)
    }

    fn local(&mut self, socket: &OwnedFd) -> Option<Endpoint> {
        sockaddr::local(socket.as_raw_fd())
    }

    fn connect_guest(&mut self, socket: &OwnedFd, destination: Endpoint) -> Result<(), SocketError> {
        tcp::prepare(socket.as_raw_fd());
        Ok(tcp::connect(socket.as_raw_fd(), destination)?)
    }

    fn reset(&mut self, socket: OwnedFd) {
        // A socket that cannot be told so is closed all the same.
        let _ = options::set_reset_on_close(socket.as_raw_fd());
    }

    fn open_udp(&mut self, v4: bool, port: Option<u16>) -> io::Result<OwnedFd> {
        datagram::open_udp(v4, port)
    }

    fn open_echo(&mut self, v4: bool, id: u16) -> io::Result<EchoSocket<OwnedFd>> {
        let ping = datagram::open_ping(v4, Some(id)).or_else(|_| datagram::open_ping(v4, None));
        match ping {
            Ok(socket) => {
                let id = datagram::port_of(socket.as_raw_fd()).unwrap_or(id);
                Ok(EchoSocket { socket, id, kind: EchoKind::Ping })
            }
            Err(refused) => {
                let socket = self.idle_raw[usize::from(v4)].pop().ok_or(refused)?;
                self.next_raw_id = self.next_raw_id.wrapping_add(1);
                let id = self.next_raw_id;
                datagram::admit_replies(socket.as_raw_fd(), v4, Some(id))?;
                Ok(EchoSocket { socket, id, kind: EchoKind::Raw })
            }
        }
    }

    fn close_echo(&mut self, socket: OwnedFd, kind: EchoKind) {
        let v4 = sockaddr::local(socket.as_raw_fd()).is_none_or(|local| local.address.is_v4());
        if kind == EchoKind::Raw && datagram::admit_replies(socket.as_raw_fd(), v4, None).is_ok() {
            self.idle_raw[usize::from(v4)].push(socket);
        }
    }

    fn set_dont_fragment(&mut self, socket: &OwnedFd, v4: bool, on: bool) {
        // It works on every datagram socket; were it refused, the host would decide about fragments.
        let _ = datagram::set_dont_fragment(socket.as_raw_fd(), v4, on);
    }

    fn take_error(&mut self, socket: &OwnedFd) -> Option<QueuedError> {
        errors::take_queued(socket.as_raw_fd())
    }
}
