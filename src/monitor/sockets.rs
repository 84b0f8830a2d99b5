//! Monitors whose frames come over a socket: who is served, and until when.
//!
//! One at a time. A stream's second client is accepted and shut out at once, so that it need not wait for what will not
//! come. Datagrams have no connection of their own: the socket is connected to whoever sends the first one, and from then on
//! the kernel refuses everybody else (`EPERM`). But it tells nobody when that sender ends, and the next one would be refused
//! for ever; so there it is looked, once a second, whether the sender is still there.
//!
//! The frames themselves are the link's ([`crate::link::socket`]), which also says when a connection has ended.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, SockAddr, SockRef, Type};

use crate::link::commands::Ended;
use crate::link::socket::{Control, SocketType};

use super::place::{Inode, inode};
use super::{PAUSE, Worker, tried};

/// The system calls made here, beside those of the runtime.
pub const SYSTEM_CALLS: &[libc::c_long] = &[
    libc::SYS_poll,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_recvfrom,
    libc::SYS_read,
    libc::SYS_statx,
    libc::SYS_clock_nanosleep,
];

/// How often it is looked whether a sender of datagrams is still there.
const LOOK_EVERY_MS: u16 = 1000;

/// A descriptor that hythe was started with is no connection with a monitor.
#[derive(Debug, thiserror::Error)]
#[error("--fd {fd}: {problem}")]
pub struct InheritError {
    fd: RawFd,
    problem: &'static str,
}

/// Where monitors come from.
pub enum Door {
    /// They connect.
    Listen(UnixListener),
    /// They send datagrams.
    Datagrams(UnixDatagram),
    /// There is one, and hythe was started with the connection.
    Inherited(OwnedFd, SocketType),
}

/// The door that is a descriptor which hythe was started with. To be called before anything else is opened, which would
/// be taken for it.
pub fn inherit(fd: RawFd) -> Result<Door, InheritError> {
    let refused = |problem| InheritError { fd, problem };
    // SAFETY: no memory is passed. What was not open stays so.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(refused("is not open; whoever starts hythe has to leave it open"));
    }
    // SAFETY: the descriptor is new and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(copy) };
    let about = SockRef::from(&socket);
    match about.domain() {
        Ok(Domain::UNIX) => {}
        Ok(_) => return Err(refused("is a socket, but not of AF_UNIX")),
        Err(_) => return Err(refused("is not a socket")),
    }
    let socket_type = match about.r#type() {
        Ok(Type::STREAM) => SocketType::Stream,
        Ok(Type::SEQPACKET) => SocketType::Sequenced,
        _ => SocketType::Datagram,
    };
    if about.peer_addr().is_err() {
        return Err(refused("is a socket that is not connected"));
    }
    // The copy is all there is, so that the connection ends with it. The standard ones stay: nothing else may take their
    // place.
    if fd > libc::STDERR_FILENO {
        let _ = nix::unistd::close(fd);
    }
    Ok(Door::Inherited(socket, socket_type))
}

impl Door {
    /// The type of the connections' sockets.
    pub fn socket_type(&self) -> SocketType {
        match self {
            Self::Listen(_) => SocketType::Stream,
            Self::Datagrams(_) => SocketType::Datagram,
            Self::Inherited(_, socket_type) => *socket_type,
        }
    }

    /// Serves one monitor after the other; `left` is called after each. Ends well when there can be no other one.
    pub fn serve(self, worker: &Worker<Control>, left: impl Fn()) -> Result<(), Ended> {
        match self {
            Self::Listen(listener) => loop {
                let Some(stream) = tried(listener.accept()).map(|(stream, _)| stream) else { continue };
                serve_one(worker, stream.into(), &Meanwhile::Refuse(&listener))?;
                left();
            },
            Self::Datagrams(socket) => loop {
                let sender = next_sender(&socket);
                let Some(copy) = tried(socket.try_clone()) else { continue };
                serve_one(worker, copy.into(), &Meanwhile::Look(&socket, &sender))?;
                disconnect(&socket);
                left();
            },
            Self::Inherited(socket, _) => serve_one(worker, socket, &Meanwhile::Nothing),
        }
    }
}

/// What there is to do while a monitor is served.
enum Meanwhile<'d> {
    /// Others come here, and are refused.
    Refuse(&'d UnixListener),
    /// It has to be looked whether this sender of datagrams is still there.
    Look(&'d UnixDatagram, &'d Sender),
    Nothing,
}

impl Meanwhile<'_> {
    fn listener(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Refuse(listener) => Some(listener.as_fd()),
            Self::Look(..) | Self::Nothing => None,
        }
    }

    fn timeout(&self) -> PollTimeout {
        match self {
            Self::Look(..) => PollTimeout::from(LOOK_EVERY_MS),
            Self::Refuse(_) | Self::Nothing => PollTimeout::NONE,
        }
    }
}

/// Has the worker serve a connection until that has ended.
fn serve_one(worker: &Worker<Control>, connection: OwnedFd, meanwhile: &Meanwhile<'_>) -> Result<(), Ended> {
    let Worker { control, wake } = worker;
    control.attach(connection, || wake())?;
    tracing::info!("a virtual machine has come");
    loop {
        let watched = [Some(control.ended()), meanwhile.listener()].into_iter().flatten();
        let mut watched: Vec<_> = watched.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        // It fails only when a signal comes, and then nothing is ready.
        let _ = poll(&mut watched, meanwhile.timeout());
        let is_ready = |which: usize| watched.get(which).is_some_and(|fd| fd.any().unwrap_or(false));
        if is_ready(0) {
            break;
        }
        match meanwhile {
            Meanwhile::Refuse(listener) if is_ready(1) && tried(listener.accept()).is_some() => {
                tracing::warn!("another virtual machine was refused: there is one");
            }
            Meanwhile::Look(socket, sender) if !sender.is_there(socket) => break,
            _ => {}
        }
    }
    control.detach(|| wake())?;
    tracing::info!("the virtual machine has gone");
    Ok(())
}

/// Who sends datagrams.
struct Sender {
    address: SockAddr,
    /// Which file has its name, unless the name is an abstract one.
    inode: Option<Inode>,
}

impl Sender {
    fn inode(address: &SockAddr) -> Option<Inode> {
        address.as_pathname().and_then(|path| inode(path).ok())
    }

    /// Whether the socket is still connected with somebody. To connect it once more changes nothing then.
    fn is_there(&self, socket: &UnixDatagram) -> bool {
        self.inode == Self::inode(&self.address) && SockRef::from(socket).connect(&self.address).is_ok()
    }
}

/// Waits for a sender that can be answered, and connects the socket to it.
fn next_sender(socket: &UnixDatagram) -> Sender {
    loop {
        let Some(address) = tried(SockRef::from(socket).peek_sender()) else { continue };
        let inode = Sender::inode(&address);
        match SockRef::from(socket).connect(&address) {
            Ok(()) => return Sender { address, inode },
            Err(error) => {
                tracing::warn!(%error, "a datagram came from a socket that cannot be answered; has it a name?");
                // It is there, so this does not wait.
                let _ = socket.recv(&mut []);
                std::thread::sleep(PAUSE);
            }
        }
    }
}

/// Lets go of the sender that a socket is connected to; what it has sent and nobody read is dropped.
fn disconnect(socket: &UnixDatagram) {
    let nobody = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    let len = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: the address is valid for its length. A socket that is connected to nobody stays so.
    let _ = unsafe { libc::connect(socket.as_raw_fd(), &raw const nobody, len) };
}
