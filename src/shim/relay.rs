//! Serves a port that the Engine serves on one address of the guest only.
//!
//! ```text
//! host 127.0.0.1:8001 ── hythe ── link:PORT ── this ── container:80          PORT is a random one
//! ```
//! hythe's connections come over the guest's link, and the Engine lets nothing from there through to such a port: its rules
//! name the address, and the real docker-proxy binds it. So a relay of this process's own listens on the link, whichever of its
//! addresses hythe calls, and whoever comes there is led to the container. What comes by another interface, say from another
//! container, does not come there (`SO_BINDTODEVICE`).

mod datagrams;
mod streams;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::{Domain, Socket, Type};
use tokio::net::{TcpListener, UdpSocket};
use tokio::task::JoinHandle;

use super::link::Link;
use crate::policy::publish::PublishedProtocol;

/// Clients that may wait to be accepted.
const CLIENTS_WAITING: i32 = 1024;

/// Why nothing can be relayed.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The link has no address of the family.
    #[error(
        "{host} cannot be published: the guest has no IPv{} address on its link",
        if .host.is_ipv6() { 6 } else { 4 }
    )]
    NoAddress {
        /// What was to be published.
        host: SocketAddr,
    },
    /// The kernel refuses.
    #[error("cannot listen on the guest's link: {0}")]
    Listen(#[from] io::Error),
}

/// A relay to one port of a container.
pub struct Relay {
    host: SocketAddr,
    container: SocketAddr,
    protocol: PublishedProtocol,
    serving: Option<Serving>,
}

/// A socket at which somebody is served.
struct Serving {
    link: Link,
    port: u16,
    task: JoinHandle<()>,
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Relay {
    /// For what is published at `host`. Nobody is served yet.
    pub fn new(host: SocketAddr, container: SocketAddr, protocol: PublishedProtocol) -> Self {
        raise_descriptor_limit();
        Self { host, container, protocol, serving: None }
    }

    /// Serves on a link, if it does not yet; returns the port.
    pub fn serve(&mut self, link: Link) -> Result<u16, RelayError> {
        if let Some(serving) = self.serving.as_ref().filter(|serving| serving.link == link) {
            return Ok(serving.port);
        }
        if !link.has(self.host.is_ipv6()) {
            return Err(RelayError::NoAddress { host: self.host });
        }
        let socket = socket_on(&link, self.host.is_ipv6(), self.protocol)?;
        let port = socket.local_addr()?.as_socket().map_or(0, |at| at.port());
        let task = match self.protocol {
            PublishedProtocol::Tcp => {
                socket.listen(CLIENTS_WAITING)?;
                tokio::spawn(streams::serve(TcpListener::from_std(socket.into())?, self.container))
            }
            PublishedProtocol::Udp => {
                let socket = Arc::new(UdpSocket::from_std(socket.into())?);
                tokio::spawn(datagrams::serve(socket, self.container))
            }
        };
        self.serving = Some(Serving { link, port, task });
        Ok(port)
    }
}

/// A socket for what comes by an interface, on a random port.
fn socket_on(link: &Link, is_ipv6: bool, protocol: PublishedProtocol) -> io::Result<Socket> {
    let (domain, any): (_, IpAddr) = if is_ipv6 {
        (Domain::IPV6, Ipv6Addr::UNSPECIFIED.into())
    } else {
        (Domain::IPV4, Ipv4Addr::UNSPECIFIED.into())
    };
    let kind = if protocol == PublishedProtocol::Tcp { Type::STREAM } else { Type::DGRAM };
    let socket = Socket::new(domain, kind, None)?;
    if is_ipv6 {
        socket.set_only_v6(true)?;
    }
    socket.bind_device(Some(link.name().as_bytes()))?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::new(any, 0).into())?;
    Ok(socket)
}

/// A connection takes two descriptors, and shells leave a process a thousand.
fn raise_descriptor_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

#[cfg(test)]
mod tests;
