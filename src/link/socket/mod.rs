//! A socket: a virtual machine's frames over a connection with its monitor (QEMU's `stream` and `dgram`, libkrun, vfkit).
//!
//! ```text
//! monitor ── AF_UNIX socket ── link ── worker          stream: each frame behind its length, four bytes, big-endian
//!               door ─ commands ┘                      datagrams: one frame each
//! ```
//! For compatibility, not for speed: there is no virtio-net header, so nothing is offloaded, and every byte goes through
//! the kernel's socket buffers.
//!
//! The door ([`crate::monitor`]) attaches a connection, and detaches it. In between the link is the only one that reads
//! and writes, and so the one that finds out that the connection has ended: it lets it be, says so by an eventfd, and
//! waits to be detached.
//!
//! Frames to a guest that does not read wait in their slots, and a stream goes on in the middle of a frame. Once the
//! socket takes no more, the worker is woken when it has room again.

mod datagrams;
mod staged;
mod stream;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::io::{Buffers, Kind, Operations, Piece};

use super::commands::{self, Commander, Commands, Ended};
use super::{Ahead, Capabilities, InboundHead, Link, News, OutboundFrame, READY_FDS, Ready, Received, Space};
use datagrams::Datagrams;
use staged::Staged;
use stream::Stream;

/// The type of a socket, which says how it carries frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SocketType {
    /// `SOCK_STREAM`: each frame behind its length.
    Stream,
    /// `SOCK_SEQPACKET`: one frame a message; the peer's end shows as an empty one.
    Sequenced,
    /// `SOCK_DGRAM`: one frame a message; the peer's end shows when a frame cannot be sent.
    Datagram,
}

/// What some operations have shown of a connection, in the order of what counts more.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum State {
    /// There may be more to receive, or room for more to send.
    Open,
    /// There is nothing to receive, or no room to send, until the socket is ready.
    Blocked,
    /// The connection has ended.
    Ended,
}

impl State {
    /// What an error says.
    fn after(error: &io::Error) -> Self {
        if error.kind() == io::ErrorKind::WouldBlock { Self::Blocked } else { Self::Ended }
    }
}

/// How a connection carries frames.
trait Framing: Send {
    /// Whether a frame's length stands in front of it.
    fn has_length(&self) -> bool;

    /// Adds the operations that receive the next batch.
    fn begin_receive(&mut self, socket: RawFd, operations: &mut Operations);

    /// Takes in what they gave; returns how many frames that are.
    fn end_receive(&mut self, operations: &Operations) -> (usize, State);

    /// A frame of the batch.
    fn frame(&self, index: usize) -> Option<OutboundFrame<'_>>;

    /// The bytes `from..from + len` of a frame.
    fn payload(&self, index: usize, from: usize, len: usize) -> Option<Piece>;

    /// The batch is not used any more.
    fn release(&mut self);

    /// Adds the operations that send what is staged, as far as the socket takes it.
    fn begin_send(&mut self, socket: RawFd, staged: &Staged, operations: &mut Operations);

    /// Takes in what they gave. Nothing was staged since.
    fn end_send(&mut self, staged: &mut Staged, operations: &Operations) -> State;

    /// Another connection comes: nothing of the last one is left.
    fn reset(&mut self);
}

enum Command {
    Attach(OwnedFd),
    Detach,
}

/// The door's hold on a worker's link.
pub struct Control {
    commands: Commander<Command, ()>,
    ended: EventFd,
}

impl Control {
    /// Attaches a connection, a socket of the link's type.
    pub fn attach(&self, connection: OwnedFd, wake: impl FnOnce()) -> Result<(), Ended> {
        self.commands.ask(Command::Attach(connection), wake)
    }

    /// The descriptor that becomes readable when the connection that is attached has ended.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }

    /// Detaches the connection, and ends the guest's side of every flow.
    pub fn detach(&self, wake: impl FnOnce()) -> Result<(), Ended> {
        self.commands.ask(Command::Detach, wake)?;
        // It is the old connection's word. There is none where the link has not found its end.
        let _ = self.ended.read();
        Ok(())
    }
}

/// A worker's link over a connection, or over none.
pub struct Socket {
    mtu: u16,
    commands: Commands<Command, ()>,
    connection: Option<OwnedFd>,
    /// The connection is not touched any more.
    has_ended: bool,
    /// The door is to be told of it.
    tell_end: bool,
    /// The socket takes no more frames for now.
    is_full: bool,
    framing: Box<dyn Framing>,
    staged: Staged,
    ended: OwnedFd,
    /// What is written to an eventfd.
    one: Buffers,
}

impl Socket {
    /// A link with nothing attached, and the door's hold on it.
    pub fn new(mtu: u16, socket_type: SocketType) -> io::Result<(Self, Control)> {
        let ended = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let (commander, commands) = commands::channel();
        let mut one = Buffers::new(1, 8);
        one.bytes_mut(0, 8).copy_from_slice(&1u64.to_ne_bytes());
        let framing: Box<dyn Framing> = match socket_type {
            SocketType::Stream => Box::new(Stream::new()),
            SocketType::Sequenced => Box::new(Datagrams::new(true)),
            SocketType::Datagram => Box::new(Datagrams::new(false)),
        };
        let link = Self {
            mtu,
            commands,
            connection: None,
            has_ended: false,
            tell_end: false,
            is_full: false,
            framing,
            staged: Staged::new(),
            ended: ended.as_fd().try_clone_to_owned()?,
            one,
        };
        Ok((link, Control { commands: commander, ended }))
    }

    /// The connection, unless it has ended.
    fn fd(&self) -> Option<RawFd> {
        self.connection.as_ref().filter(|_| !self.has_ended).map(AsRawFd::as_raw_fd)
    }

    /// Takes another connection, or none, in the place of the one there is.
    fn connect(&mut self, connection: Option<OwnedFd>) {
        self.connection = connection;
        (self.has_ended, self.tell_end, self.is_full) = (false, false, false);
        self.framing.reset();
        self.staged.lose_all();
    }

    /// The connection has ended. The batch that came with that stays until it is released.
    fn end(&mut self) {
        if self.fd().is_some() {
            (self.has_ended, self.tell_end, self.is_full) = (true, true, false);
            self.staged.lose_all();
        }
    }
}

impl Link for Socket {
    fn capabilities(&self) -> Capabilities {
        Capabilities { mtu: self.mtu, tcp_segmentation: false, udp_segmentation: false }
    }

    fn ready_fds(&self) -> [Option<Ready>; READY_FDS] {
        [self.fd().map(|fd| Ready { fd, or_writable: self.is_full }), None]
    }

    fn wants_room(&self) -> bool {
        self.is_full || self.fd().is_none()
    }

    fn prepare_sleep(&mut self) -> bool {
        // What a stream took in part may go on at once.
        !self.has_unpublished()
    }

    fn has_news(&self) -> bool {
        !self.commands.is_empty()
    }

    fn take_news(&mut self) -> News {
        let Some((command, answer)) = self.commands.take() else { return News::default() };
        let news = News { guest_gone: matches!(command, Command::Detach) };
        self.connect(match command {
            Command::Attach(connection) => Some(connection),
            Command::Detach => None,
        });
        // A door that is gone does not wait for it.
        let _ = answer.send(());
        news
    }

    fn begin_receive(&mut self, operations: &mut Operations) {
        if let Some(fd) = self.fd() {
            self.framing.begin_receive(fd, operations);
        }
    }

    fn end_receive(&mut self, operations: &Operations) -> Received {
        if self.fd().is_none() {
            return Received { frames: 0, empty: true };
        }
        let (frames, state) = self.framing.end_receive(operations);
        if state == State::Ended {
            self.end();
        }
        Received { frames, empty: state != State::Open }
    }

    fn frame(&self, index: usize) -> Option<OutboundFrame<'_>> {
        self.framing.frame(index)
    }

    fn payload(&self, index: usize, from: usize, len: usize, take: &mut dyn FnMut(Piece)) {
        if let Some(piece) = self.framing.payload(index, from, len) {
            take(piece);
        }
    }

    fn release(&mut self) {
        self.framing.release();
    }

    fn has_unpublished(&self) -> bool {
        !self.staged.is_empty() && !self.is_full || self.tell_end
    }

    fn reserve(&mut self, payload_len: usize) -> Option<Space> {
        self.fd()?;
        self.staged.reserve(payload_len)
    }

    fn may_reserve_ahead(&self) -> bool {
        self.fd().is_some() && self.staged.may_reserve_ahead()
    }

    fn reserve_ahead(&mut self, _head_len: usize, payload: Ahead) -> Option<Space> {
        if self.may_reserve_ahead() { self.staged.reserve(payload.bytes_max()) } else { None }
    }

    fn space(&self, space: Space, take: &mut dyn FnMut(Piece)) {
        take(self.staged.payload(space));
    }

    fn commit(&mut self, space: Space, head: &InboundHead<'_>, payload_len: usize) {
        if self.fd().is_some() {
            self.staged.commit(space, head, payload_len, self.framing.has_length());
        } else {
            self.staged.lose(space);
        }
    }

    fn cancel(&mut self, space: Space) {
        self.staged.cancel(space);
    }

    fn begin_publish(&mut self, operations: &mut Operations) {
        // Also where there was no room: a worker that is busy has nobody tell it that there is.
        if let Some(fd) = self.fd().filter(|_| !self.staged.is_empty()) {
            self.framing.begin_send(fd, &self.staged, operations);
        }
        if std::mem::take(&mut self.tell_end) {
            operations.push(self.ended.as_raw_fd(), Kind::Write, [self.one.piece(0)]);
        }
    }

    fn end_publish(&mut self, operations: &Operations) -> usize {
        let state = self.framing.end_send(&mut self.staged, operations);
        self.is_full = state == State::Blocked;
        if state == State::Ended {
            self.end();
        }
        self.staged.take_lost()
    }

    fn is_closed(&self) -> bool {
        // Another connection may come.
        false
    }
}
