//! Sockets of published ports.
//!
//! A published TCP port has one listening socket, whose worker deals clients to others, or one a worker (`SO_REUSEPORT`), over
//! which the kernel spreads them. While the guest refuses, they keep the port without listening: `shutdown(SHUT_RD)` ends
//! a listener's listening and leaves it bound (the kernel then refuses clients at once), `listen` starts it again. So a
//! port is bound once, when hythe may still have the right to bind it.
#![allow(unsafe_code)]

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use crate::frame::address::Endpoint;
use crate::policy::publish::PublishedProtocol;

use super::{datagram, options, tcp};

/// The system calls made here besides those of [`tcp`] and [`options`].
pub const SYSTEM_CALLS: &[libc::c_long] = &[libc::SYS_listen, libc::SYS_shutdown];

/// Clients that may wait to be accepted; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// Binds the sockets of a published port: for TCP so many, which do not listen yet; for UDP one.
pub fn bind(
    address: IpAddr,
    port: u16,
    protocol: PublishedProtocol,
    listeners: usize,
) -> io::Result<Vec<OwnedFd>> {
    let endpoint = Endpoint::new(address, port);
    match protocol {
        PublishedProtocol::Udp => open_udp(endpoint).map(|socket| vec![socket]),
        PublishedProtocol::Tcp => {
            // Finds a stranger who listens there, even one with SO_REUSEPORT; connections in TIME-WAIT do not count.
            drop(open_tcp(endpoint, Sharing { address: true, port: false })?);
            // SO_REUSEADDR on a socket that does not listen would let strangers with that option have the port too.
            // It takes it all the same where another program's connections are in TIME-WAIT.
            let all = |sharing: Sharing| (0..listeners).map(|_| open_tcp(endpoint, sharing)).collect();
            match all(Sharing { address: false, port: true }) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    all(Sharing { address: true, port: true })
                }
                other => other,
            }
        }
    }
}

/// With whom a port may be shared.
#[derive(Clone, Copy)]
struct Sharing {
    /// `SO_REUSEADDR`.
    address: bool,
    /// `SO_REUSEPORT`.
    port: bool,
}

fn open_tcp(endpoint: Endpoint, sharing: Sharing) -> io::Result<OwnedFd> {
    let v4 = endpoint.address.is_v4();
    let socket = tcp::new_stream(v4)?;
    let fd = socket.as_raw_fd();
    options::set_number(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, i32::from(sharing.address))?;
    options::set_number(fd, libc::SOL_SOCKET, libc::SO_REUSEPORT, i32::from(sharing.port))?;
    if !v4 {
        options::set_number(fd, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)?;
    }
    tcp::bind(fd, endpoint)?;
    // What it accepts inherits these.
    tcp::prepare(fd);
    Ok(socket)
}

fn open_udp(endpoint: Endpoint) -> io::Result<OwnedFd> {
    let v4 = endpoint.address.is_v4();
    let kind = libc::SOCK_DGRAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    let socket = tcp::socket(v4, kind, 0)?;
    let fd = socket.as_raw_fd();
    datagram::prepare_udp(fd, v4)?;
    // Answers leave from the address that was called.
    datagram::tell_local_address(fd, v4)?;
    if !v4 {
        options::set_number(fd, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)?;
    }
    tcp::bind(fd, endpoint)?;
    Ok(socket)
}

/// Starts a bound socket's listening.
pub fn listen(fd: RawFd) -> io::Result<()> {
    // SAFETY: no memory is passed.
    if unsafe { libc::listen(fd, BACKLOG) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // Connections inherit it, so that those in TIME-WAIT do not keep the port from a hythe that comes later. A
    // listener shares its port with nobody, whatever its options.
    options::set_number(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)
}

/// Ends a listener's listening; it stays bound, and clients that wait are reset.
pub fn stop_listening(fd: RawFd) -> io::Result<()> {
    options::set_number(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 0)?;
    // SAFETY: no memory is passed.
    if unsafe { libc::shutdown(fd, libc::SHUT_RD) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};

    fn open(
        address: IpAddr,
        port: u16,
        protocol: PublishedProtocol,
        workers: usize,
    ) -> io::Result<Vec<OwnedFd>> {
        let sockets = bind(address, port, protocol, workers)?;
        sockets.iter().try_for_each(|socket| listen(socket.as_raw_fd()))?;
        Ok(sockets)
    }

    pub fn open_any(address: IpAddr, workers: usize) -> (Vec<OwnedFd>, u16) {
        // A port that is free now; another process may take it, so several are tried.
        for _ in 0..20 {
            let port = TcpListener::bind((address, 0)).unwrap().local_addr().unwrap().port();
            if let Ok(sockets) = open(address, port, PublishedProtocol::Tcp, workers) {
                return (sockets, port);
            }
        }
        panic!("no free port");
    }

    #[test]
    fn a_port_refuses_while_it_does_not_listen_and_stays_ours() {
        for address in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
            let (sockets, port) = open_any(address, 3);
            let client = TcpStream::connect((address, port)).unwrap();
            for socket in &sockets {
                stop_listening(socket.as_raw_fd()).unwrap();
            }
            let refused = TcpStream::connect((address, port)).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
            assert_eq!(TcpListener::bind((address, port)).unwrap_err().kind(), io::ErrorKind::AddrInUse);
            for socket in &sockets {
                listen(socket.as_raw_fd()).unwrap();
            }
            TcpStream::connect((address, port)).unwrap();
            drop(client);
        }
    }

    #[test]
    fn connections_in_time_wait_do_not_keep_the_port() {
        let address = IpAddr::from(Ipv4Addr::LOCALHOST);
        for workers in [1, 2] {
            let (sockets, port) = open_any(address, workers);
            let client = TcpStream::connect((address, port)).unwrap();
            let accepted =
                sockets.iter().find_map(|socket| tcp::accept(socket.as_raw_fd()).unwrap()).unwrap();
            // Whoever closes first is left in TIME-WAIT.
            drop(accepted);
            drop(client);
            drop(sockets);
            open(address, port, PublishedProtocol::Tcp, workers).unwrap();
        }
    }

    #[test]
    fn a_port_that_is_taken_is_an_error_whoever_has_it() {
        let address = IpAddr::from(Ipv4Addr::LOCALHOST);
        let (_sockets, port) = open_any(address, 1);
        for workers in [1, 2] {
            let error = open(address, port, PublishedProtocol::Tcp, workers).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "with SO_REUSEPORT on the other side too");
        }
    }
}
