//! Serves a port that the Engine serves on one address of the guest only.
//!
//! ```text
//! host 127.0.0.1:8001 ── hythe ── link's address:PORT ── this ── container:80          PORT is a random one
//! ```
//! hythe's connections come over the guest's link, and the Engine lets nothing from there through to such a port: its rules
//! name the address, and the real docker-proxy binds it. So a relay of this process's own listens on the link, and whoever
//! comes there is led to the container.
//!
//! A port of the host's loopback is for that host's processes alone: who comes from another network than the link's, say from
//! another container, is not served.

mod datagrams;
mod streams;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::net::{TcpListener, UdpSocket};
use tokio::task::JoinHandle;

use super::link::Link;
use crate::policy::publish::PublishedProtocol;

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
    #[error("cannot listen at {at} in the guest: {error}")]
    Listen {
        /// Where.
        at: IpAddr,
        /// Why.
        error: io::Error,
    },
}

/// Where whoever comes is led, and who may come.
#[derive(Clone, Debug)]
struct Way {
    container: SocketAddr,
    /// The only networks from which somebody may come, if there are such.
    only: Option<Link>,
}

impl Way {
    fn is_for(&self, peer: SocketAddr) -> bool {
        self.only.as_ref().is_none_or(|link| link.contains(peer.ip()))
    }
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

    /// Serves at the link's address, if it does not yet; returns the port.
    pub async fn serve(&mut self, link: Link) -> Result<u16, RelayError> {
        if let Some(serving) = self.serving.as_ref().filter(|serving| serving.link == link) {
            return Ok(serving.port);
        }
        let at = link.address(self.host.is_ipv6()).ok_or(RelayError::NoAddress { host: self.host })?;
        let refused = |error| RelayError::Listen { at, error };
        let way = Way { container: self.container, only: self.host.ip().is_loopback().then(|| link.clone()) };
        let (port, task) = match self.protocol {
            PublishedProtocol::Tcp => {
                let listener = TcpListener::bind((at, 0)).await.map_err(refused)?;
                let port = listener.local_addr().map_err(refused)?.port();
                (port, tokio::spawn(streams::serve(listener, way)))
            }
            PublishedProtocol::Udp => {
                let socket = UdpSocket::bind((at, 0)).await.map_err(refused)?;
                let port = socket.local_addr().map_err(refused)?.port();
                (port, tokio::spawn(datagrams::serve(Arc::new(socket), way)))
            }
        };
        self.serving = Some(Serving { link, port, task });
        Ok(port)
    }
}

/// A connection takes two descriptors, and shells leave a process a thousand.
fn raise_descriptor_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

#[cfg(test)]
mod tests;
