//! The host's sockets, as a worker asks for them: answered by the model kernel.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::time::Duration;

use crate::frame::address::Endpoint;
use crate::host::errors::{QueuedError, SocketError};
use crate::host::tcp::Accepted;
use crate::host::{ConnectPlan, EchoKind, EchoSocket, HostSocket, Sockets};
use crate::random::Random;
use crate::time::Now;

use super::kernel::{Kernel, own_address};
use super::plan::{ConnectionPlan, HostPlan, Opening, Outcome};
use super::stage::Stage;
use super::stream_socket::{Standing, StreamSocket};

/// A descriptor of the model kernel. Dropping it closes it.
pub struct ModelSocket {
    fd: RawFd,
    reset: bool,
    kernel: Rc<RefCell<Kernel>>,
}

impl ModelSocket {
    /// The owner of a descriptor.
    pub fn new(fd: RawFd, kernel: &Rc<RefCell<Kernel>>) -> Self {
        Self { fd, reset: false, kernel: kernel.clone() }
    }
}

impl HostSocket for ModelSocket {
    fn fd(&self) -> RawFd {
        self.fd
    }
}

impl Drop for ModelSocket {
    fn drop(&mut self) {
        // While a panic unwinds the kernel may be in use; then nothing counts any more.
        if let Ok(mut kernel) = self.kernel.try_borrow_mut() {
            kernel.close(self.fd, self.reset);
        }
    }
}

/// The endpoint that stands for the far end of a socketpair.
const NOWHERE: Endpoint =
    Endpoint { address: crate::frame::address::Address::of_v6(std::net::Ipv6Addr::UNSPECIFIED), port: 0 };

/// What all workers' sockets have in common.
pub struct Connections {
    /// The plans.
    pub plans: Vec<ConnectionPlan>,
    /// The outbound connection that is under way to a destination of the host's.
    pub by_destination: BTreeMap<Endpoint, usize>,
    /// The sockets that connections have got.
    claims: Vec<Option<usize>>,
    /// The far ends of socketpairs, by the descriptor that stands for them in mail: the socket's number.
    pub pairs: Vec<(RawFd, usize)>,
    /// Connects that hythe has asked for.
    pub connects: u64,
}

impl Connections {
    /// Nothing is connected yet.
    pub fn new(plans: &[ConnectionPlan]) -> Self {
        Self {
            plans: plans.to_vec(),
            by_destination: BTreeMap::new(),
            claims: vec![None; plans.len()],
            pairs: Vec::new(),
            connects: 0,
        }
    }
}

/// A connect that belongs to no connection of the plan: a SYN that came late has caused it.
const STRAY: usize = usize::MAX;
/// When a stray one is refused, in nanoseconds.
const STRAY_NS: u64 = 1_000_000;

/// The sockets of one worker.
pub struct ModelSockets {
    stage: Rc<Stage>,
    plan: HostPlan,
    kernel: Rc<RefCell<Kernel>>,
    connections: Rc<RefCell<Connections>>,
    random: Random,
    next_port: u16,
}

impl ModelSockets {
    /// Sockets of a kernel.
    pub fn new(
        stage: Rc<Stage>,
        plan: HostPlan,
        kernel: Rc<RefCell<Kernel>>,
        connections: Rc<RefCell<Connections>>,
        random: Random,
    ) -> Self {
        Self { stage, plan, kernel, connections, random, next_port: 33_000 }
    }

    fn open_connection(&mut self, plan: &ConnectPlan, connection: usize) -> Result<ModelSocket, SocketError> {
        let mut connections = self.connections.borrow_mut();
        let conversation = &connections.plans[connection];
        let Opening::Outbound { outcome, delay_ns, .. } = conversation.opening else {
            return Err(SocketError::from_number(libc::ENETUNREACH));
        };
        if let Outcome::FailsAtOnce(error) = outcome {
            return Err(SocketError::from_number(error));
        }
        let mut kernel = self.kernel.borrow_mut();
        let claimed = connections.claims[connection].is_some_and(|id| {
            let connected = self.stage.books.borrow().progress[connection].host_connected;
            connected || kernel.streams[id].fd.is_some()
        });
        let silence_ns = if outcome == Outcome::Silence { 20_000_000_000 } else { 0 };
        let (connection, outcome, delay_ns) = if claimed {
            (STRAY, Outcome::Refused, STRAY_NS)
        } else {
            (connection, outcome, delay_ns + silence_ns)
        };
        let at = Now(self.stage.now().0 + delay_ns);
        let port = plan.local_port.unwrap_or(self.next_port);
        let local = Endpoint { address: own_address(plan.destination.address.is_v4()), port };
        let standing = Standing::Connecting { at, outcome };
        let buffers = (conversation.send_buffer, conversation.receive_buffer);
        let socket = StreamSocket::new(connection, local, plan.destination, standing, buffers);
        let (id, fd) = kernel.add_stream(socket);
        if connection != STRAY {
            connections.claims[connection] = Some(id);
        }
        Ok(ModelSocket::new(fd, &self.kernel))
    }
}

impl Sockets for ModelSockets {
    type Socket = ModelSocket;

    fn connect(&mut self, plan: &ConnectPlan) -> Result<ModelSocket, SocketError> {
        if plan.local_port.is_some() && self.kernel.borrow_mut().port_is_taken() {
            let number = self.random.pick(&[libc::EADDRINUSE, libc::EADDRNOTAVAIL]);
            return Err(SocketError::from_number(number));
        }
        self.next_port = if plan.local_port.is_none() { self.next_port + 1 } else { self.next_port };
        let mut connections = self.connections.borrow_mut();
        connections.connects += 1;
        let connection = connections.by_destination.get(&plan.destination).copied();
        drop(connections);
        let Some(connection) = connection else {
            // Nobody is there: the host's other loopback.
            return Err(SocketError::from_number(libc::ECONNREFUSED));
        };
        self.open_connection(plan, connection)
    }

    fn outcome(&mut self, socket: &ModelSocket) -> Result<(), SocketError> {
        self.kernel.borrow_mut().stream(socket.fd).map_or(Ok(()), StreamSocket::outcome)
    }

    fn establish(&mut self, socket: &ModelSocket, _v4: bool, _connecting: bool) -> bool {
        let mut kernel = self.kernel.borrow_mut();
        let Some(stream) = kernel.stream(socket.fd) else { return false };
        let connecting = matches!(stream.standing, Standing::Connecting { .. });
        stream.peek_offset = self.plan.peek_offset.then_some(0);
        self.stage.check(!connecting, || "a connection is taken for established before it is".into());
        self.plan.peek_offset
    }

    fn accept(&mut self, listener: RawFd) -> io::Result<Option<Accepted<ModelSocket>>> {
        let mut kernel = self.kernel.borrow_mut();
        let Some(id) = kernel.accept(listener) else { return Ok(None) };
        let stream = &kernel.streams[id];
        let peer = stream.remote;
        Ok(stream.fd.map(|fd| Accepted { socket: ModelSocket::new(fd, &self.kernel), peer }))
    }

    fn room(&mut self, socket: &ModelSocket) -> u32 {
        self.kernel.borrow_mut().stream(socket.fd).map_or(0, |stream| stream.room() as u32)
    }

    fn seek(&mut self, socket: &ModelSocket, offset: u32) {
        let mut kernel = self.kernel.borrow_mut();
        let Some(stream) = kernel.stream(socket.fd) else { return };
        self.stage.check(stream.peek_offset.is_some(), || {
            "a peek offset is set that the kernel does not keep".into()
        });
        stream.peek_offset = Some(u64::from(offset));
    }

    fn shut_down(&mut self, socket: &ModelSocket) {
        let mut kernel = self.kernel.borrow_mut();
        let Some(stream) = kernel.stream(socket.fd) else { return };
        stream.shut_down = true;
        let connection = stream.connection;
        let told = self.stage.books.borrow_mut().shut_down(connection);
        self.stage.expect(told);
        self.stage.trace(7, || format!("socket  {connection:>3} shut down for writing"));
        let Some(id) = kernel.streams.iter().rposition(|stream| stream.fd == Some(socket.fd)) else { return };
        kernel.for_peers.push(id);
    }

    fn keep_alive(&mut self, socket: &ModelSocket, _after: Duration) {
        let mut kernel = self.kernel.borrow_mut();
        let Some(connection) = kernel.stream(socket.fd).map(|stream| stream.connection) else { return };
        self.stage.books.borrow_mut().progress[connection].keep_alive = true;
    }

    fn pair(&mut self) -> io::Result<(ModelSocket, OwnedFd)> {
        // The far end stays in the world. A descriptor of this process stands for it in the slow path's mail.
        let stand_in: OwnedFd = std::fs::File::open("/dev/null")?.into();
        let mut socket = StreamSocket::new(STRAY, NOWHERE, NOWHERE, Standing::Open, (64 << 10, 64 << 10));
        socket.pair = true;
        let (id, fd) = self.kernel.borrow_mut().add_stream(socket);
        self.connections.borrow_mut().pairs.push((stand_in.as_raw_fd(), id));
        Ok((ModelSocket::new(fd, &self.kernel), stand_in))
    }

    fn local(&mut self, socket: &ModelSocket) -> Option<Endpoint> {
        let mut kernel = self.kernel.borrow_mut();
        if let Some(datagram) = kernel.datagrams.iter().find(|datagram| datagram.fd == Some(socket.fd)) {
            return Some(datagram.local);
        }
        kernel.stream(socket.fd).map(|stream| stream.local)
    }

    fn reset(&mut self, mut socket: ModelSocket) {
        socket.reset = true;
    }

    fn open_udp(&mut self, v4: bool, port: Option<u16>) -> io::Result<ModelSocket> {
        let opened = self.kernel.borrow_mut().add_datagram(v4, port, None);
        opened.map(|(fd, _)| ModelSocket::new(fd, &self.kernel)).map_err(io::Error::from_raw_os_error)
    }

    fn open_echo(&mut self, v4: bool, id: u16) -> io::Result<EchoSocket<ModelSocket>> {
        let kind = if self.random.chance(600_000) { EchoKind::Ping } else { EchoKind::Raw };
        let mut kernel = self.kernel.borrow_mut();
        let opened = kernel
            .add_datagram(v4, Some(id), Some(kind))
            .or_else(|_| kernel.add_datagram(v4, None, Some(kind)));
        let (fd, id) = opened.map_err(io::Error::from_raw_os_error)?;
        Ok(EchoSocket { socket: ModelSocket::new(fd, &self.kernel), id, kind })
    }

    fn close_echo(&mut self, _socket: ModelSocket, _kind: EchoKind) {}

    fn set_dont_fragment(&mut self, _socket: &ModelSocket, _v4: bool, _on: bool) {}

    fn take_error(&mut self, socket: &ModelSocket) -> Option<QueuedError> {
        self.kernel.borrow_mut().datagram(socket.fd)?.take_error()
    }
}
