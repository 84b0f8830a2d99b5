//! Ports below 1024 while hythe runs: a process that has kept the right to bind them, and nothing else.
//!
//! ```text
//! hythe ── which port, how many sockets ──▶ broker
//! hythe ◀── bound sockets, or why not ───── broker
//! ```
//! hythe gives up its rights before it sees the first frame. What `docker run -p 80:80` in a guest asks for comes later. The
//! broker is forked while the rights are there, before any thread; it keeps `CAP_NET_BIND_SERVICE` and one descriptor, makes the
//! system calls of a bind and no others, and sees nothing of the guest's but a port's number. It ends when hythe does.
#![allow(unsafe_code)]

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, getppid};

use crate::channel::{Channel, Message};
use crate::host::listen;
use crate::policy::publish::PublishedProtocol;

/// The system calls of the broker's process besides those of a bind.
pub const SYSTEM_CALLS: &[libc::c_long] = &[libc::SYS_recvmsg, libc::SYS_sendmsg];

/// How long an answer may take. A bind waits for nothing.
const PATIENCE: Duration = Duration::from_secs(1);

/// What hythe wants.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Bind {
    at: SocketAddr,
    protocol: PublishedProtocol,
    /// For TCP: sockets of the same port, one a worker.
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

/// The broker, as hythe has it.
pub struct PortBroker(Channel);

/// The broker's process. It ends when the [`PortBroker`] is gone; who drops this afterwards has waited for it.
pub struct Process(Pid);

impl Drop for Process {
    fn drop(&mut self) {
        // It fails only where there is no such child, which is as good.
        let _ = waitpid(self.0, None);
    }
}

impl PortBroker {
    /// Forks the broker. `limit` takes from it what it does not need; no other thread exists yet.
    pub fn start(limit: impl FnOnce() -> io::Result<()>) -> io::Result<(Self, Process)> {
        let (ours, theirs) = Channel::pair()?;
        let parent = Pid::this();
        // SAFETY: no other thread exists, so the child may do as it likes.
        match unsafe { fork() }? {
            ForkResult::Child => {
                let lived = prepare(&theirs, parent).and_then(|()| limit()).and_then(|()| serve(&theirs));
                // No destructors of the parent's things, no flushing of its buffers.
                // SAFETY: ends the process.
                unsafe { libc::_exit(i32::from(lived.is_err())) }
            }
            ForkResult::Parent { child } => {
                let process = Process(child);
                let (seconds, micros) = (PATIENCE.as_secs() as i64, i64::from(PATIENCE.subsec_micros()));
                setsockopt(&ours.as_fd(), sockopt::ReceiveTimeout, &TimeVal::new(seconds, micros))?;
                Ok((Self(ours), process))
            }
        }
    }

    /// Binds the sockets of a published port, as [`listen::bind`] does.
    pub fn bind(
        &self,
        at: SocketAddr,
        protocol: PublishedProtocol,
        workers: usize,
    ) -> io::Result<Vec<OwnedFd>> {
        let workers = u8::try_from(workers).map_err(io::Error::other)?;
        self.0.send(&Bind { at, protocol, workers }, &[])?;
        let answer = self.0.receive().inspect_err(|_| {
            // What comes late would be taken for the answer to the next question.
            self.0.close();
        });
        match answer? {
            Some((Bound::Here, sockets)) => Ok(sockets),
            Some((Bound::Refused(errno), _)) => Err(io::Error::from_raw_os_error(errno)),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

/// Leaves the child with its end of the channel alone.
fn prepare(channel: &Channel, parent: Pid) -> io::Result<()> {
    // Signals of the terminal reach the whole process group; this ends when hythe does, and not before.
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)?;
    nix::sys::prctl::set_name(c"hythe-ports")?;
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    if getppid() != parent {
        return Err(Errno::ESRCH.into());
    }
    let own = channel.as_fd().as_raw_fd() as u32;
    // SAFETY: what is closed belongs to the parent; nothing here uses these copies.
    let closed = unsafe {
        (own == 0 || libc::syscall(libc::SYS_close_range, 0, own - 1, 0) == 0)
            && libc::syscall(libc::SYS_close_range, own + 1, u32::MAX, 0) == 0
    };
    if closed { Ok(()) } else { Err(io::Error::last_os_error()) }
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
        let broker = PortBroker(ours);
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let at = taken.local_addr().unwrap();
        let error = broker.bind(at, PublishedProtocol::Tcp, 2).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EADDRINUSE));
        drop(taken);
        let sockets = broker.bind(at, PublishedProtocol::Tcp, 2).unwrap();
        assert_eq!(sockets.len(), 2);
        sockets.iter().for_each(|socket| listen::listen(socket.as_raw_fd()).unwrap());
        TcpStream::connect(at).unwrap();
        drop(broker);
        served.join().unwrap().unwrap();
    }
}
