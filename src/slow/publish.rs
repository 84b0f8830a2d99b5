//! Published ports that show what the guest shows: refused while the guest refuses.
//!
//! A client's connection is open before the guest can be asked, so the first refusal makes one client see a connection
//! that ends at once. From then on the port does not listen and refuses clients itself, while a probe asks the guest
//! now and then whether somebody listens there; when somebody does, the port listens again.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use crate::exchange::mail::Publication;
use crate::host::listen;

/// The first probe comes this soon, later ones at twice the time of the one before.
const PROBE_FIRST: Duration = Duration::from_millis(20);
const PROBE_MAX: Duration = Duration::from_secs(1);

/// A published TCP port, as the slow path sees it.
struct Port {
    publication: Publication,
    /// Handles of the workers' listening sockets.
    sockets: Vec<OwnedFd>,
    /// The time until the next probe, while the port refuses.
    refusing: Option<Duration>,
}

/// All published TCP ports.
#[derive(Default)]
pub struct Published {
    ports: HashMap<u32, Port>,
}

/// A probe that is due after a while.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ProbeAfter {
    /// Which publication.
    pub publication: Publication,
    /// When.
    pub after: Duration,
}

impl Published {
    /// Adds a port that listens, by handles of its sockets.
    pub fn add(&mut self, publication: Publication, sockets: Vec<OwnedFd>) {
        self.ports.insert(publication.id, Port { publication, sockets, refusing: None });
    }

    /// What the guest answers at a port. Returns the probe that is to come, if one is.
    pub fn told(&mut self, publication: u32, listens: bool) -> Option<ProbeAfter> {
        let port = self.ports.get_mut(&publication)?;
        if listens {
            if port.refusing.take().is_some() {
                let failed = port.sockets.iter().any(|socket| listen::listen(socket.as_raw_fd()).is_err());
                if failed {
                    tracing::warn!(
                        port = port.publication.guest_port,
                        "a published port cannot listen again"
                    );
                }
            }
            return None;
        }
        let after = match port.refusing {
            // Further clients of the same moment tell what is known.
            None => {
                for socket in &port.sockets {
                    // It fails only for a socket that does not listen.
                    let _ = listen::stop_listening(socket.as_raw_fd());
                }
                PROBE_FIRST
            }
            Some(last) => (last * 2).min(PROBE_MAX),
        };
        port.refusing = Some(after);
        Some(ProbeAfter { publication: port.publication, after })
    }

    /// Whether a probe of the port is wanted still.
    pub fn refuses(&self, publication: u32) -> bool {
        self.ports.get(&publication).is_some_and(|port| port.refusing.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::publish::PublishedProtocol;
    use std::net::{Ipv4Addr, TcpStream};

    #[test]
    fn a_port_follows_the_guest() {
        let (sockets, port) = listen::tests::open_any(Ipv4Addr::LOCALHOST.into(), 2);
        let address = (Ipv4Addr::LOCALHOST, port);
        let publication = Publication { id: 7, guest_port: 80, protocol: PublishedProtocol::Tcp };
        let mut published = Published::default();
        published.add(publication, sockets);
        TcpStream::connect(address).unwrap();

        let first = published.told(7, false).unwrap();
        assert_eq!(first, ProbeAfter { publication, after: PROBE_FIRST });
        assert!(TcpStream::connect(address).is_err());
        assert_eq!(published.told(7, false).unwrap().after, PROBE_FIRST * 2);
        for _ in 0..20 {
            published.told(7, false);
        }
        assert_eq!(published.told(7, false).unwrap().after, PROBE_MAX);
        assert!(published.refuses(7));

        assert_eq!(published.told(7, true), None);
        assert!(!published.refuses(7));
        TcpStream::connect(address).unwrap();
        assert_eq!(published.told(8, false), None, "an unknown port");
    }
}
