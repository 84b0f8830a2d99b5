//! Ports below 1024 while hythe runs: a process that has kept the right to bind them, and nothing else.
//!
//! ```text
//! hythe ── which port, how many sockets ──▶ broker
//! hythe ◀── bound sockets, or why not ───── broker
//! ```
//! hythe gives up its rights before it sees the first frame. What `docker run -p 80:80` in a guest asks for comes later. The
//! broker is forked while the rights are there, before any thread; it keeps `CAP_NET_BIND_SERVICE` and one descriptor, makes the
//! system calls of a bind and no others, and sees nothing of the guest's but a port's number. It ends when hythe does.

use std::cell::RefCell;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;
use nix::unistd::Pid;

use crate::channel::{Channel, Message};
use crate::fork::{Child, Process, fork_child};
use crate::host::listen;
use crate::policy::publish::PublishedProtocol;

/// The system calls of the broker's process.
pub const SYSTEM_CALLS: &[libc::c_long] =
    &[libc::SYS_socket, libc::SYS_setsockopt, libc::SYS_bind, libc::SYS_recvmsg, libc::SYS_sendmsg];

/// How long an answer may take. A bind waits for nothing.
const PATIENCE: Duration = Duration::from_secs(1);

/// What hythe wants.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Bind {
    at: SocketAddr,
    protocol: PublishedProtocol,
    /// For TCP: sockets of the same port, one for each worker that listens.
    workers: u8,
}

/// What it gets.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Bound {
    /// The sockets come with this.
    Here,
    /// The kernel's error.
    Refused(i32),
}

impl Message for Bind {
    fn encode(&self) -> Vec<u8> {
        let address = match self.at.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        let mut bytes = vec![u8::from(self.protocol == PublishedProtocol::Udp), self.workers];
        bytes.extend(self.at.port().to_be_bytes());
        bytes.extend(address.octets());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let [protocol, workers, port_high, port_low, ref address @ ..] = *bytes else { return None };
        let address = Ipv6Addr::from(<[u8; 16]>::try_from(address).ok()?).to_canonical();
        Some(Self {
            at: SocketAddr::new(address, u16::from_be_bytes([port_high, port_low])),
            protocol: if protocol == 0 { PublishedProtocol::Tcp } else { PublishedProtocol::Udp },
            workers,
        })
    }
}

impl Message for Bound {
    fn encode(&self) -> Vec<u8> {
        match self {
            Self::Here => vec![0],
            Self::Refused(errno) => [&[1], &errno.to_be_bytes()[..]].concat(),
        }
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        match *bytes {
            [0] => Some(Self::Here),
            [1, a, b, c, d] => Some(Self::Refused(i32::from_be_bytes([a, b, c, d]))),
            _ => None,
        }
    }
}

/// The broker, as hythe has it. One that does not answer as it should is not asked again.
pub struct PortBroker(RefCell<Option<Channel>>);

impl PortBroker {
    /// Forks the broker. `limit` takes from it what it does not need; no other thread exists yet.
    pub fn start(limit: impl FnOnce() -> io::Result<()>) -> io::Result<(Self, Process)> {
        let (ours, theirs) = Channel::pair()?;
        let parent = Pid::this();
        let live = |child: &Child| {
            let prepared = child
                .close_all_but(theirs.as_fd())
                .and_then(|()| child.live_as_long_as(parent, c"hythe-ports"));
            let lived = prepared.and_then(|()| limit()).and_then(|()| serve(&theirs));
            u8::from(lived.is_err())
        };
        let process = Process::new(fork_child(live)?);
        let patience = TimeVal::new(PATIENCE.as_secs() as i64, i64::from(PATIENCE.subsec_micros()));
        setsockopt(&ours.as_fd(), sockopt::ReceiveTimeout, &patience)?;
        Ok((Self(RefCell::new(Some(ours))), process))
    }

    /// Binds the sockets of a published port, as [`listen::bind`] does.
    pub fn bind(
        &self,
        at: SocketAddr,
        protocol: PublishedProtocol,
        workers: usize,
    ) -> io::Result<Vec<OwnedFd>> {
        let expected = if protocol == PublishedProtocol::Tcp { workers } else { 1 };
        let mut channel = self.0.borrow_mut();
        let answered = channel.as_ref().map(|channel| ask(channel, at, protocol, workers));
        match answered {
            Some(Ok((Bound::Here, sockets))) if sockets.len() == expected => Ok(sockets),
            Some(Ok((Bound::Refused(errno), _))) => Err(io::Error::from_raw_os_error(errno)),
            // What comes late would be taken for the answer to the next question.
            _ => {
                *channel = None;
                Err(io::ErrorKind::PermissionDenied.into())
            }
        }
    }
}

fn ask(
    channel: &Channel,
    at: SocketAddr,
    protocol: PublishedProtocol,
    workers: usize,
) -> io::Result<(Bound, Vec<OwnedFd>)> {
    let workers = u8::try_from(workers).map_err(io::Error::other)?;
    channel.send(&Bind { at, protocol, workers }, &[])?;
    channel.receive()?.ok_or_else(|| io::ErrorKind::BrokenPipe.into())
}

fn serve(channel: &Channel) -> io::Result<()> {
    while let Some((Bind { at, protocol, workers }, _)) = channel.receive()? {
        match listen::bind(at.ip(), at.port(), protocol, usize::from(workers)) {
            Ok(sockets) => {
                let descriptors: Vec<RawFd> = sockets.iter().map(AsRawFd::as_raw_fd).collect();
                channel.send(&Bound::Here, &descriptors)?;
            }
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                channel.send(&Bound::Refused(errno), &[])?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    #[test]
    fn every_message_arrives_as_it_was_sent() {
        for at in ["127.0.0.1:80", "[::1]:443", "0.0.0.0:1", "[::]:65535"] {
            for protocol in [PublishedProtocol::Tcp, PublishedProtocol::Udp] {
                let bind = Bind { at: at.parse().unwrap(), protocol, workers: 64 };
                assert_eq!(Bind::decode(&bind.encode()), Some(bind));
            }
        }
        for bound in [Bound::Here, Bound::Refused(libc::EADDRINUSE)] {
            assert_eq!(Bound::decode(&bound.encode()), Some(bound));
        }
        assert_eq!(Bind::decode(&[0; 19]), None);
        assert_eq!(Bound::decode(&[1, 0]), None);
    }

    #[test]
    fn sockets_come_bound_and_errors_as_the_kernel_told_them() {
        let (ours, theirs) = Channel::pair().unwrap();
        let served = std::thread::spawn(move || serve(&theirs));
        let broker = PortBroker(RefCell::new(Some(ours)));
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let at = taken.local_addr().unwrap();
        let error = broker.bind(at, PublishedProtocol::Tcp, 2).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EADDRINUSE));
        drop(taken);
        // A port that is free now; another process may take it, so several are tried.
        let free = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        let bound = |at| broker.bind(at, PublishedProtocol::Tcp, 2).ok().map(|sockets| (at, sockets));
        let (at, sockets) = (0..20).find_map(|_| bound(free())).unwrap();
        assert_eq!(sockets.len(), 2);
        for socket in &sockets {
            listen::listen(socket.as_raw_fd()).unwrap();
        }
        TcpStream::connect(at).unwrap();
        drop(broker);
        served.join().unwrap().unwrap();
    }
}
