//! A host in memory: one connection whose socket takes whatever it is given and has as many bytes as it was told to, and
//! the engine on it. It makes no system call and copies nothing, so that what is measured is the worker.
#![allow(dead_code)]

use std::cell::RefCell;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::rc::Rc;
use std::time::Duration;

use hythe::frame::address::Endpoint;
use hythe::host::engine::{Engine, EngineCounts, Event, Interest, Token};
use hythe::host::errors::{QueuedError, SocketError};
use hythe::host::tcp::Accepted;
use hythe::host::{ConnectPlan, EchoKind, EchoSocket, HostSocket, Sockets};
use hythe::io::{Kind, Operations, Piece};

/// The descriptor of the connection, which is none of the kernel's.
const CONNECTION: RawFd = 1 << 20;

/// What a socket says that it has room for.
const ROOM: u32 = 4 << 20;

/// The connection, and what is to be reported.
#[derive(Default)]
pub struct Host {
    token: Option<Token>,
    /// What the link has armed: by which of its descriptors.
    armed: [Option<Token>; 2],
    events: Vec<Event>,
    /// The worker has waited, and nothing was there to be reported: it would sleep now.
    pub was_quiet: bool,
    /// Payload bytes that the socket took.
    pub taken: u64,
    /// Bytes that wait in the socket, and how many of them were peeked.
    waiting: u64,
    peeked: u64,
    counts: EngineCounts,
}

impl Host {
    fn report(&mut self, token: Option<Token>, readable: bool, writable: bool) {
        let Some(token) = token else { return };
        self.events.push(Event { token, readable, writable, closed: false, failed: false, urgent: false });
    }

    /// The guest has kicked one of the link's queues.
    pub fn kick(&mut self, which: usize) {
        let token = self.armed[which].take();
        self.report(token, true, false);
    }

    /// So many bytes come to the socket.
    pub fn give(&mut self, bytes: u64) {
        self.waiting += bytes;
        self.report(self.token, true, false);
    }

    /// As the kernel's, but for the bytes.
    fn peek(&mut self, pieces: &[Piece]) -> i32 {
        let room: u64 = pieces.iter().map(|piece| piece.len() as u64).sum();
        let len = room.min(self.waiting - self.peeked);
        if len == 0 {
            return -libc::EAGAIN;
        }
        self.peeked += len;
        len as i32
    }

    fn discard(&mut self, bytes: u32) -> i32 {
        let bytes = u64::from(bytes).min(self.waiting);
        self.waiting -= bytes;
        self.peeked = self.peeked.saturating_sub(bytes);
        bytes as i32
    }
}

/// The engine of the host, and its sockets.
#[derive(Clone, Default)]
pub struct InMemory(pub Rc<RefCell<Host>>);

impl Engine for InMemory {
    fn run(&mut self, operations: &mut Operations) {
        let mut host = self.0.borrow_mut();
        operations.perform(|operation, pieces, _| {
            host.counts.operations += 1;
            match operation.kind() {
                Kind::Send => {
                    let len: usize = pieces.iter().map(Piece::len).sum();
                    host.taken += len as u64;
                    len as i32
                }
                Kind::Peek => host.peek(pieces),
                Kind::Discard => host.discard(operation.bytes_to_drop()),
                // The link's own eventfds.
                Kind::Read | Kind::Write => 8,
                Kind::Receive | Kind::SendDatagram | Kind::ReceiveDatagram | Kind::SendEach => {
                    -libc::EOPNOTSUPP
                }
            }
        });
    }

    fn watch(&mut self, fd: RawFd, token: Token, _interest: Interest) -> io::Result<()> {
        if fd == CONNECTION {
            // It is connected at once.
            let mut host = self.0.borrow_mut();
            host.token = Some(token);
            host.report(Some(token), false, true);
        }
        Ok(())
    }

    fn arm(&mut self, _fd: RawFd, token: Token, _interest: Interest) -> io::Result<()> {
        self.0.borrow_mut().armed[token.slot.index as usize] = Some(token);
        Ok(())
    }

    fn unwatch(&mut self, _fd: RawFd, _token: Token) {}

    fn wait(&mut self, _timeout: Option<Duration>, events: &mut Vec<Event>) {
        let mut host = self.0.borrow_mut();
        host.was_quiet = host.events.is_empty();
        events.append(&mut host.events);
    }

    fn counts(&self) -> EngineCounts {
        self.0.borrow().counts
    }
}

/// The connection's socket.
pub struct Connection;

impl HostSocket for Connection {
    fn fd(&self) -> RawFd {
        CONNECTION
    }
}

fn unsupported<T>() -> io::Result<T> {
    Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
}

impl Sockets for InMemory {
    type Socket = Connection;

    fn connect(&mut self, _plan: &ConnectPlan) -> Result<Connection, SocketError> {
        Ok(Connection)
    }

    fn outcome(&mut self, _socket: &Connection) -> Result<(), SocketError> {
        Ok(())
    }

    fn establish(&mut self, _socket: &Connection, _v4: bool, _connecting: bool) -> bool {
        true
    }

    fn accept(&mut self, _listener: RawFd) -> io::Result<Option<Accepted<Connection>>> {
        Ok(None)
    }

    fn room(&mut self, _socket: &Connection) -> u32 {
        ROOM
    }

    fn seek(&mut self, _socket: &Connection, offset: u32) {
        self.0.borrow_mut().peeked = u64::from(offset);
    }

    fn shut_down(&mut self, _socket: &Connection) {}

    fn keep_alive(&mut self, _socket: &Connection, _after: Duration) {}

    fn pair(&mut self) -> io::Result<(Connection, OwnedFd)> {
        unsupported()
    }

    fn local(&mut self, _socket: &Connection) -> Option<Endpoint> {
        None
    }

    fn reset(&mut self, _socket: Connection) {}

    fn open_udp(&mut self, _v4: bool, _port: Option<u16>) -> io::Result<Connection> {
        unsupported()
    }

    fn open_echo(&mut self, _v4: bool, _id: u16) -> io::Result<EchoSocket<Connection>> {
        unsupported()
    }

    fn close_echo(&mut self, _socket: Connection, _kind: EchoKind) {}

    fn set_dont_fragment(&mut self, _socket: &Connection, _v4: bool, _on: bool) {}

    fn take_error(&mut self, _socket: &Connection) -> Option<QueuedError> {
        None
    }
}
