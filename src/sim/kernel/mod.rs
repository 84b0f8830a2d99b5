//! A model of the host's kernel: descriptors, sockets, operations on them, and what happens to them from outside.
//!
//! * [`reports`]: what of them is ready, and who hears of it

mod reports;

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::rc::Rc;

use crate::frame::address::{Address, Endpoint};
use crate::host::EchoKind;
use crate::io::{Kind, Message, Piece};
use crate::random::Random;
use crate::time::Now;

use super::check::{from_guest, to_guest};
use super::datagram_socket::{Datagram, DatagramSocket};
use super::memory::{Lent, Place};
use super::plan::{HostPlan, Outcome};
use super::stage::Stage;
use super::stream_socket::{Readiness, Standing, StreamSocket};

use reports::{Reports, Watch};

/// Model descriptors start here, far above real ones.
pub const FIRST_FD: RawFd = 100_000;
/// Links' descriptors start here.
pub const FIRST_LINK_FD: RawFd = 200_000;
/// How far behind it the descriptor is that tells of room on the same link.
pub const ROOM_FD: RawFd = 10_000;

/// The host's own addresses.
pub fn own_address(v4: bool) -> Address {
    if v4 {
        Address::v4([203, 0, 113, 9])
    } else {
        Address::v6([0x20, 1, 0x0d, 0xb8, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9])
    }
}

/// What a descriptor stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Object {
    /// A stream socket.
    Stream(usize),
    /// A listener.
    Listener(usize),
    /// A datagram socket.
    Datagram(usize),
}

struct Descriptor {
    object: Object,
    watch: Option<Watch>,
}

/// A listening socket with its clients.
struct Listener {
    clients: VecDeque<usize>,
    fd: Option<RawFd>,
}

/// The kernel.
pub struct Kernel {
    stage: Rc<Stage>,
    plan: HostPlan,
    random: Random,
    table: Vec<Option<Descriptor>>,
    /// All stream sockets that there were.
    pub streams: Vec<StreamSocket>,
    listeners: Vec<Listener>,
    /// All datagram sockets that there were.
    pub datagrams: Vec<DatagramSocket>,
    reports: Vec<Reports>,
    /// Stream sockets at which the peer may have something to do.
    pub for_peers: Vec<usize>,
    /// Datagrams that left.
    pub sent: Vec<Datagram>,
    /// Bytes of streams that were sent straight from frames, and from hythe's own memory.
    pub sent_bytes: (u64, u64),
}

impl Kernel {
    /// A kernel with so many engines.
    pub fn new(stage: Rc<Stage>, plan: HostPlan, random: Random, engines: usize) -> Self {
        Self {
            stage,
            plan,
            random,
            table: Vec::new(),
            streams: Vec::new(),
            listeners: Vec::new(),
            datagrams: Vec::new(),
            reports: (0..engines).map(|_| Reports::default()).collect(),
            for_peers: Vec::new(),
            sent: Vec::new(),
            sent_bytes: (0, 0),
        }
    }

    // Descriptors.

    fn allocate(&mut self, object: Object) -> RawFd {
        // The lowest that is free, as POSIX has it: one that is used after it was closed meets a stranger.
        let free = self.table.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            self.table.push(None);
            self.table.len() - 1
        });
        self.table[index] = Some(Descriptor { object, watch: None });
        FIRST_FD + index as RawFd
    }

    fn descriptor(&mut self, fd: RawFd) -> Option<&mut Descriptor> {
        let index = usize::try_from(fd - FIRST_FD).ok()?;
        self.table.get_mut(index)?.as_mut()
    }

    fn object(&mut self, fd: RawFd) -> Option<Object> {
        let object = self.descriptor(fd).map(|descriptor| descriptor.object);
        self.stage.check(object.is_some(), || format!("descriptor {fd} is used, but it is closed"));
        object
    }

    /// The stream socket of a descriptor.
    pub fn stream(&mut self, fd: RawFd) -> Option<&mut StreamSocket> {
        match self.object(fd) {
            Some(Object::Stream(id)) => self.streams.get_mut(id),
            _ => None,
        }
    }

    /// The datagram socket of a descriptor.
    pub fn datagram(&mut self, fd: RawFd) -> Option<&mut DatagramSocket> {
        match self.object(fd) {
            Some(Object::Datagram(id)) => self.datagrams.get_mut(id),
            _ => None,
        }
    }

    /// How many descriptors are open.
    pub fn open_descriptors(&self) -> usize {
        self.table.iter().flatten().count()
    }

    /// Puts a stream socket in and gives it a descriptor.
    pub fn add_stream(&mut self, mut socket: StreamSocket) -> (usize, RawFd) {
        let id = self.streams.len();
        let fd = self.allocate(Object::Stream(id));
        socket.fd = Some(fd);
        self.streams.push(socket);
        (id, fd)
    }

    /// A listener; returns its number and its descriptor.
    pub fn add_listener(&mut self) -> (usize, RawFd) {
        let id = self.listeners.len();
        let fd = self.allocate(Object::Listener(id));
        self.listeners.push(Listener { clients: VecDeque::new(), fd: Some(fd) });
        (id, fd)
    }

    /// A datagram socket that is bound to `port`, or to another one; the error where that one is taken.
    pub fn add_datagram(
        &mut self,
        v4: bool,
        port: Option<u16>,
        echo: Option<EchoKind>,
    ) -> Result<(RawFd, u16), i32> {
        let taken = |datagrams: &[DatagramSocket], port: u16| {
            datagrams.iter().any(|other| {
                other.fd.is_some()
                    && other.local.port == port
                    && other.local.address.is_v4() == v4
                    && other.echo.is_some() == echo.is_some()
            })
        };
        let port = match port {
            Some(port) if taken(&self.datagrams, port) || self.random.chance(self.plan.port_taken) => {
                return Err(libc::EADDRINUSE);
            }
            Some(port) => port,
            None => (33_000..u16::MAX).find(|port| !taken(&self.datagrams, *port)).ok_or(libc::EADDRINUSE)?,
        };
        let id = self.datagrams.len();
        let fd = self.allocate(Object::Datagram(id));
        let everywhere = if v4 { Address::v4([0; 4]) } else { Address::v6([0; 16]) };
        let local = Endpoint { address: everywhere, port };
        self.datagrams.push(DatagramSocket::new(fd, local, echo));
        Ok((fd, port))
    }

    /// Whether the host says that a local port is taken.
    pub fn port_is_taken(&mut self) -> bool {
        self.random.chance(self.plan.port_taken)
    }

    /// hythe closes a descriptor.
    pub fn close(&mut self, fd: RawFd, reset: bool) {
        let Some(descriptor) =
            usize::try_from(fd - FIRST_FD).ok().and_then(|index| self.table.get_mut(index)?.take())
        else {
            self.stage.fail(format!("descriptor {fd} is closed twice"));
            return;
        };
        self.stage
            .check(descriptor.watch.is_none(), || format!("descriptor {fd} is closed while it is watched"));
        match descriptor.object {
            Object::Stream(id) => {
                let socket = &mut self.streams[id];
                let resets = socket.close(reset);
                let connection = socket.connection;
                self.for_peers.push(id);
                self.stage.trace(1, || {
                    format!(
                        "socket  {connection:>3} closed{}",
                        if resets { ", the peer is reset" } else { "" }
                    )
                });
            }
            Object::Listener(id) => self.listeners[id].fd = None,
            Object::Datagram(id) => self.datagrams[id].fd = None,
        }
    }

    // Operations.

    /// Carries out an operation on a socket.
    pub fn operate(
        &mut self,
        kind: Kind,
        fd: RawFd,
        pieces: &[Piece],
        extra: u32,
        message: Option<&mut Message>,
    ) -> i32 {
        self.check_pieces(kind, fd, pieces);
        match (self.object(fd), kind, message) {
            (Some(Object::Stream(id)), Kind::Send, _) => self.send(id, pieces),
            (Some(Object::Stream(id)), Kind::Peek, _) => self.peek(id, pieces),
            (Some(Object::Stream(id)), Kind::Receive, _) => {
                let len: usize = pieces.iter().map(Piece::len).sum();
                self.consume(id, len as u64)
            }
            (Some(Object::Stream(id)), Kind::Discard, _) => {
                let pair = self.streams[id].pair;
                self.stage.check(!pair, || "MSG_TRUNC drops nothing from an AF_UNIX socket".into());
                self.consume(id, u64::from(extra))
            }
            (Some(Object::Datagram(id)), Kind::SendDatagram, Some(message)) => {
                match self.datagrams[id].send(pieces, message) {
                    Ok((len, datagrams)) => {
                        self.sent.extend(datagrams);
                        len as i32
                    }
                    Err(error) => -error,
                }
            }
            (Some(Object::Datagram(id)), Kind::ReceiveDatagram, Some(message)) => {
                let together = self.random.chance(500_000);
                self.datagrams[id].receive(pieces, message, together)
            }
            (None, ..) => -libc::EBADF,
            (object, ..) => {
                self.stage.fail(format!("{kind:?} on {object:?}"));
                -libc::EINVAL
            }
        }
    }

    /// Every piece lies where an operation may read or write.
    fn check_pieces(&mut self, kind: Kind, fd: RawFd, pieces: &[Piece]) {
        let keeps_offset = match self.descriptor(fd).map(|descriptor| descriptor.object) {
            Some(Object::Stream(id)) => self.streams[id].peek_offset.is_some(),
            _ => false,
        };
        let memory = self.stage.memory.borrow();
        for piece in pieces {
            let place = match memory.place(piece) {
                Ok(place) => place,
                Err(what) => return self.stage.fail(format!("{kind:?}: {what}")),
            };
            let fits = match (kind, place) {
                (Kind::Send | Kind::SendDatagram, place) => place != Place::Link(Lent::Space),
                // Where the kernel keeps an offset, every peeked byte goes straight into space of the link.
                (Kind::Peek, Place::Own) => !keeps_offset,
                (_, place) => place != Place::Link(Lent::Payload),
            };
            self.stage.check(fits, || format!("{kind:?} of a piece in {place:?}"));
            if kind == Kind::Send {
                let count = if place == Place::Own { &mut self.sent_bytes.1 } else { &mut self.sent_bytes.0 };
                *count += piece.len() as u64;
            }
        }
    }

    fn send(&mut self, id: usize, pieces: &[Piece]) -> i32 {
        let socket = &mut self.streams[id];
        let connection = socket.connection;
        let was_shut_down = socket.shut_down && socket.standing == Standing::Open;
        if let Some(error) = socket.send_refusal() {
            self.stage
                .check(!was_shut_down, || format!("connection {connection}: a send after the shutdown"));
            return -error;
        }
        let total: usize = pieces.iter().map(Piece::len).sum();
        let mut len = (total as u64).min(socket.room());
        if len > 1 && self.random.chance(self.plan.short_sends) {
            len = 1 + self.random.below(len);
        }
        let socket = &mut self.streams[id];
        socket.wants_space |= len < total as u64;
        let start = socket.taken;
        socket.taken += len;
        self.for_peers.push(id);
        let mut bytes = Vec::with_capacity(total);
        for piece in pieces {
            piece.copy_to(&mut bytes);
        }
        let right = self.stage.pattern.compare(from_guest(connection), start, &bytes[..len as usize]);
        if let Err(at) = right {
            self.stage.fail(format!("connection {connection}: byte {at} to the peer is wrong"));
        }
        let mut books = self.stage.books.borrow_mut();
        let progress = &mut books.progress[connection];
        progress.taken = start + len;
        if start + len > progress.guest_wrote {
            self.stage.fail(format!(
                "connection {connection}: {} bytes to the peer, the guest wrote fewer",
                start + len
            ));
        }
        drop(books);
        self.stage.trace(2, || format!("socket  {connection:>3} took {len} of {total} from {start}"));
        len as i32
    }

    fn peek(&mut self, id: usize, pieces: &[Piece]) -> i32 {
        let socket = &mut self.streams[id];
        let connection = socket.connection;
        let start = socket.consumed + socket.peek_offset.unwrap_or(0);
        let available = match socket.readable_from(start) {
            Ok(available) => available,
            Err(result) => {
                self.stage.trace(3, || format!("socket  {connection:>3} peek at {start} gives {result}"));
                return result;
            }
        };
        let mut at = 0;
        for piece in pieces {
            let mut filled = 0;
            while filled < piece.len() && at < available {
                let part = piece.part(filled, (available - at) as usize);
                let copied =
                    part.copy_from(self.stage.pattern.slice(to_guest(connection), start + at, part.len()));
                filled += copied;
                at += copied as u64;
            }
        }
        self.streams[id].peeked(at);
        self.stage.trace(4, || format!("socket  {connection:>3} peek at {start} gives {at} of {available}"));
        at as i32
    }

    /// Takes bytes out of a receive queue.
    fn consume(&mut self, id: usize, len: u64) -> i32 {
        let socket = &mut self.streams[id];
        let connection = socket.connection;
        let taken = match socket.readable_from(socket.consumed) {
            Ok(available) => available.min(len),
            Err(result) => return result,
        };
        socket.consume(taken);
        self.for_peers.push(id);
        let told = self.stage.books.borrow_mut().discarded(connection, taken);
        self.stage.expect(told);
        self.stage.trace(5, || format!("socket  {connection:>3} drops {taken}"));
        taken as i32
    }

    // What happens to sockets.

    /// When a connect has its outcome next.
    pub fn next_outcome(&self) -> Option<Now> {
        let pending = self.streams.iter().filter_map(|socket| match socket.standing {
            Standing::Connecting { at, .. } if socket.fd.is_some() => Some(at),
            _ => None,
        });
        pending.min()
    }

    /// Connects whose time has come have their outcome.
    pub fn settle_connects(&mut self, now: Now) {
        for id in 0..self.streams.len() {
            let socket = &mut self.streams[id];
            let Standing::Connecting { at, outcome } = socket.standing else { continue };
            if at > now || socket.fd.is_none() {
                continue;
            }
            let connection = socket.connection;
            let event = match outcome {
                Outcome::Connects => {
                    socket.standing = Standing::Open;
                    self.stage.books.borrow_mut().progress[connection].host_connected = true;
                    Readiness::WRITABLE
                }
                Outcome::Refused => dies(socket, libc::ECONNREFUSED),
                Outcome::Unreachable => dies(socket, libc::EHOSTUNREACH),
                Outcome::FailsAtOnce(error) => dies(socket, error),
                Outcome::Silence => dies(socket, libc::ETIMEDOUT),
            };
            self.for_peers.push(id);
            self.stage.trace(6, || format!("socket  {connection:>3} connect: {outcome:?}"));
            self.notify_stream(id, event);
        }
    }

    /// A client calls a listener; `false` where nobody listens any more.
    pub fn client_calls(&mut self, listener: usize, socket: StreamSocket) -> Option<usize> {
        let fd = self.listeners[listener].fd?;
        let id = self.streams.len();
        self.streams.push(socket);
        self.listeners[listener].clients.push_back(id);
        self.notify(fd, Readiness::READABLE);
        Some(id)
    }

    /// Accepts a client.
    pub fn accept(&mut self, fd: RawFd) -> Option<usize> {
        let Some(Object::Listener(listener)) = self.object(fd) else { return None };
        let id = self.listeners[listener].clients.pop_front()?;
        let fd = self.allocate(Object::Stream(id));
        self.streams[id].fd = Some(fd);
        Some(id)
    }

    /// The peer writes.
    pub fn peer_writes(&mut self, id: usize, len: u64) {
        self.streams[id].arrived += len;
        self.notify_stream(id, Readiness::READABLE);
    }

    /// The peer reads.
    pub fn peer_reads(&mut self, id: usize, len: u64) {
        if self.streams[id].peer_reads(len) {
            self.notify_stream(id, Readiness::WRITABLE);
        }
    }

    /// The peer closes its direction.
    pub fn peer_ends(&mut self, id: usize) {
        self.streams[id].ended = true;
        self.notify_stream(id, Readiness::ENDED);
    }

    /// The peer resets the connection.
    pub fn peer_resets(&mut self, id: usize) {
        self.streams[id].die(libc::ECONNRESET);
        self.notify_stream(id, Readiness::ALL);
    }

    /// A datagram comes from the world, for whichever socket is bound there.
    pub fn datagram_arrives(&mut self, datagram: Datagram) {
        let socket = self.datagrams.iter_mut().find(|socket| {
            socket.fd.is_some() && socket.local == datagram.local && socket.echo.is_some() == datagram.echo
        });
        if let Some(socket) = socket
            && socket.arrive(datagram)
            && let Some(fd) = socket.fd
        {
            self.notify(fd, Readiness::READABLE);
        }
    }

    /// An ICMP error comes back for a datagram.
    pub fn datagram_fails(
        &mut self,
        datagram: &Datagram,
        number: i32,
        queued: crate::host::errors::QueuedError,
    ) {
        let socket = self.datagrams.iter_mut().find(|socket| {
            socket.fd.is_some() && socket.local == datagram.local && socket.echo.is_some() == datagram.echo
        });
        if let Some(socket) = socket {
            socket.fail(number, queued);
            if let Some(fd) = socket.fd {
                self.notify(fd, Readiness { failed: true, closed: true, ..Readiness::default() });
            }
        }
    }
}

fn dies(socket: &mut StreamSocket, error: i32) -> Readiness {
    socket.die(error);
    Readiness::ALL
}
