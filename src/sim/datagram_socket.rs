//! A model of the kernel's datagram sockets: UDP, ping sockets, raw ICMP.

use std::collections::VecDeque;
use std::os::fd::RawFd;

use crate::frame::address::Endpoint;
use crate::frame::checksum::Sum;
use crate::frame::icmp;
use crate::host::EchoKind;
use crate::host::errors::QueuedError;
use crate::io::sockaddr;
use crate::io::{Message, Piece};

use super::stream_socket::Readiness;

/// Bytes that wait to be received at the most.
const RECEIVE_BUFFER: usize = 1 << 20;

/// A datagram on its way between a socket and the world.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Datagram {
    /// hythe's end: the unspecified address and the port, or the identifier of echo.
    pub local: Endpoint,
    /// The other end.
    pub remote: Endpoint,
    /// Echo or UDP.
    pub echo: bool,
    /// UDP: the payload. Echo: the whole message.
    pub bytes: Vec<u8>,
}

/// One socket.
#[derive(Debug)]
pub struct DatagramSocket {
    /// hythe's descriptor, until it is closed.
    pub fd: Option<RawFd>,
    /// What it is bound to.
    pub local: Endpoint,
    /// Echo, and how.
    pub echo: Option<EchoKind>,
    /// What was received.
    queue: VecDeque<Datagram>,
    queued_bytes: usize,
    /// What went wrong, with the error number that the next call tells.
    pub errors: VecDeque<QueuedError>,
    pending_error: i32,
}

/// `struct cmsghdr` on 64-bit Linux.
const CONTROL_HEADER: usize = 16;

fn control_number(message: &Message, level: i32, kind: i32) -> Option<u16> {
    let mut rest = &message.control[..message.control_len];
    while let Some((head, _)) = rest.split_at_checked(CONTROL_HEADER) {
        let word = |at: usize| i32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let len = word(0) as usize;
        if let Some([low, high, ..]) = rest.get(CONTROL_HEADER..len)
            && (word(8), word(12)) == (level, kind)
        {
            return Some(u16::from_ne_bytes([*low, *high]));
        }
        rest = rest.get(len.next_multiple_of(8)..)?;
    }
    None
}

impl DatagramSocket {
    /// A bound socket.
    pub fn new(fd: RawFd, local: Endpoint, echo: Option<EchoKind>) -> Self {
        Self {
            fd: Some(fd),
            local,
            echo,
            queue: VecDeque::new(),
            queued_bytes: 0,
            errors: VecDeque::new(),
            pending_error: 0,
        }
    }

    /// What poll(2) would say.
    pub fn level(&self) -> Readiness {
        let failed = !self.errors.is_empty() || self.pending_error != 0;
        Readiness { readable: !self.queue.is_empty(), writable: true, closed: failed, failed }
    }

    /// `sendmsg`: the datagrams that leave, or the error.
    pub fn send(&mut self, pieces: &[Piece], message: &Message) -> Result<(usize, Vec<Datagram>), i32> {
        if self.pending_error != 0 {
            return Err(std::mem::take(&mut self.pending_error));
        }
        let mut bytes = Vec::new();
        for piece in pieces {
            piece.copy_to(&mut bytes);
        }
        let Some(remote) = sockaddr::load(&message.name).filter(|_| message.name_len > 0) else {
            return Err(libc::EDESTADDRREQ);
        };
        let len = bytes.len();
        let size = control_number(message, libc::SOL_UDP, libc::UDP_SEGMENT).map_or(len, usize::from);
        if len > 65_507 || (size < len && len.div_ceil(size) > 64) {
            return Err(libc::EMSGSIZE);
        }
        if self.echo == Some(EchoKind::Raw)
            && self.local.address.is_v4()
            && Sum::default().with(&bytes).partial() != 0xffff
        {
            // The kernel would send it all the same; nobody would answer.
            return Ok((len, Vec::new()));
        }
        if self.echo == Some(EchoKind::Ping)
            && let Some(id) = bytes.get_mut(4..6)
        {
            id.copy_from_slice(&self.local.port.to_be_bytes());
        }
        let one = |bytes: &[u8]| Datagram {
            local: self.local,
            remote,
            echo: self.echo.is_some(),
            bytes: bytes.to_vec(),
        };
        let all = if len == 0 { vec![one(&[])] } else { bytes.chunks(size.max(1)).map(one).collect() };
        Ok((len, all))
    }

    /// Something came for the socket; returns whether it was taken in.
    pub fn arrive(&mut self, datagram: Datagram) -> bool {
        if self.queued_bytes + datagram.bytes.len() > RECEIVE_BUFFER {
            return false;
        }
        if self.echo.is_some() {
            // Only replies to its own identifier.
            let reply = icmp::parse_echo_reply(&datagram.bytes, self.local.address.is_v4());
            if reply.is_none_or(|reply| reply.id != self.local.port) {
                return false;
            }
        }
        self.queued_bytes += datagram.bytes.len();
        self.queue.push_back(datagram);
        true
    }

    /// An error came back.
    pub fn fail(&mut self, number: i32, queued: QueuedError) {
        self.pending_error = number;
        self.errors.push_back(queued);
    }

    /// Takes an error out of the queue; the last one takes the pending error along (`ip_recv_error`).
    pub fn take_error(&mut self) -> Option<QueuedError> {
        let taken = self.errors.pop_front();
        if taken.is_some() && self.errors.is_empty() {
            self.pending_error = 0;
        }
        taken
    }

    /// `recvmsg`: `together` joins datagrams of one source and size, as `UDP_GRO` does.
    pub fn receive(&mut self, pieces: &[Piece], message: &mut Message, together: bool) -> i32 {
        if self.pending_error != 0 {
            return -std::mem::take(&mut self.pending_error);
        }
        let Some(first) = self.queue.pop_front() else { return -libc::EAGAIN };
        self.queued_bytes -= first.bytes.len();
        let (remote, size) = (first.remote, first.bytes.len());
        let mut bytes = Vec::new();
        if self.echo == Some(EchoKind::Raw) && remote.address.is_v4() {
            bytes.extend([0x45; 20]);
        }
        bytes.extend(first.bytes);
        let mut count = 1;
        while together && self.echo.is_none() && count < 40 && size > 0 && bytes.len() == count * size {
            let fits = |next: &&Datagram| {
                next.remote == remote && next.bytes.len() <= size && bytes.len() + next.bytes.len() <= 60_000
            };
            let Some(next) = self.queue.front().filter(fits).map(|next| next.bytes.clone()) else { break };
            self.queued_bytes -= next.len();
            self.queue.pop_front();
            bytes.extend(next);
            count += 1;
        }
        let mut at = 0;
        for piece in pieces {
            at += piece.copy_from(&bytes[at..]);
        }
        message.flags = if at < bytes.len() { libc::MSG_TRUNC } else { 0 };
        message.name_len = sockaddr::store(remote, &mut message.name);
        message.control_len = 0;
        if count > 1 {
            let control = &mut message.control[..CONTROL_HEADER + 8];
            control.fill(0);
            control[0..8].copy_from_slice(&(CONTROL_HEADER + 4).to_ne_bytes());
            control[8..12].copy_from_slice(&libc::SOL_UDP.to_ne_bytes());
            control[12..16].copy_from_slice(&libc::UDP_GRO.to_ne_bytes());
            control[16..20].copy_from_slice(&(size as i32).to_ne_bytes());
            message.control_len = CONTROL_HEADER + 8;
        }
        at as i32
    }
}
