//! The server: ping-pong, short connections, datagrams sent back. One thread, one system call an event.

use std::io::{self, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::{Domain, Protocol, Socket, Type};

/// Connections that the kernel may complete before they are accepted.
const BACKLOG: i32 = 4096;

const DATAGRAM_MAX: usize = 65_536;

/// A socket at a port of all addresses, of both families.
pub fn bound(port: u16, kind: Type) -> io::Result<Socket> {
    let protocol = if kind == Type::STREAM { Protocol::TCP } else { Protocol::UDP };
    let socket = Socket::new(Domain::IPV6, kind, Some(protocol))?;
    socket.set_reuse_address(true)?;
    socket.set_only_v6(false)?;
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
    Ok(socket)
}

/// As many connections as the system allows.
pub fn raise_descriptor_limit() -> io::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}

/// What a connection wants, said by its first byte.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wish {
    /// Every byte back.
    Echo,
    /// One byte back, and the end.
    Once,
}

struct Client {
    stream: TcpStream,
    wish: Option<Wish>,
}

impl Client {
    /// Answers what came; says whether the connection goes on.
    fn serve(&mut self) -> bool {
        let mut bytes = [0; 4096];
        match self.stream.read(&mut bytes) {
            Ok(0) => false,
            Ok(len) => {
                let first = if bytes[0] == b'C' { Wish::Once } else { Wish::Echo };
                let wish = *self.wish.get_or_insert(first);
                self.stream.write_all(&bytes[..len]).is_ok() && wish == Wish::Echo
            }
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        }
    }
}

/// Serves for ever.
pub fn run(port: u16) -> io::Result<()> {
    raise_descriptor_limit()?;
    let listener = bound(port, Type::STREAM)?;
    listener.listen(BACKLOG)?;
    let listener = TcpListener::from(listener);
    let datagrams = UdpSocket::from(bound(port, Type::DGRAM)?);
    let mut server = Server {
        epoll: Epoll::new(EpollCreateFlags::empty())?,
        listener,
        datagrams,
        datagram: vec![0; DATAGRAM_MAX],
        clients: Vec::new(),
    };
    for fd in [server.listener.as_raw_fd(), server.datagrams.as_raw_fd()] {
        server.clients.resize_with(server.clients.len().max(fd as usize + 1), || None);
    }
    server.watch_own()?;
    println!("ready");
    let mut events = [EpollEvent::empty(); 64];
    loop {
        let ready = match server.epoll.wait(&mut events, EpollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            other => other?,
        };
        events[..ready].iter().for_each(|event| server.take(event.data() as usize));
    }
}

struct Server {
    epoll: Epoll,
    listener: TcpListener,
    datagrams: UdpSocket,
    /// A datagram on its way back.
    datagram: Vec<u8>,
    /// By descriptor.
    clients: Vec<Option<Client>>,
}

impl Server {
    fn watch_own(&self) -> io::Result<()> {
        let event = |fd: i32| EpollEvent::new(EpollFlags::EPOLLIN, fd as u64);
        self.epoll.add(&self.listener, event(self.listener.as_raw_fd()))?;
        self.epoll.add(&self.datagrams, event(self.datagrams.as_raw_fd()))?;
        Ok(())
    }

    fn take(&mut self, fd: usize) {
        if fd == self.listener.as_raw_fd() as usize {
            // A client that has gone meanwhile, or one too many, is its own fault.
            let _ = self.accept();
        } else if fd == self.datagrams.as_raw_fd() as usize {
            let _ = self.return_datagram();
        } else if let Some(place) = self.clients.get_mut(fd)
            && !place.as_mut().is_some_and(Client::serve)
        {
            *place = None;
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        let (stream, _) = self.listener.accept()?;
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let fd = stream.as_raw_fd() as usize;
        self.epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, fd as u64))?;
        if self.clients.len() <= fd {
            self.clients.resize_with(fd + 1, || None);
        }
        self.clients[fd] = Some(Client { stream, wish: None });
        Ok(())
    }

    fn return_datagram(&mut self) -> io::Result<()> {
        let (len, from) = self.datagrams.recv_from(&mut self.datagram)?;
        self.datagrams.send_to(&self.datagram[..len], from)?;
        Ok(())
    }
}
