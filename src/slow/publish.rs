//! Published ports that show what the guest shows: refused while the guest refuses.
//!
//! A client's connection is open before the guest can be asked, so the first refusal makes one client see a connection
//! that ends at once. From then on the port does not listen and refuses clients itself, while a probe asks the guest
//! now and then whether somebody listens there; when somebody does, the port listens again.
//!
//! Probes follow the clock, not their answers: an answer that is lost, or a guest that says nothing, costs a moment and
//! no more. A worker that has a probe under way leaves the next one out.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use crate::exchange::mail::Publication;
use crate::host::listen;

/// The first probe comes this soon, each later one after twice the pause of the one before.
const PROBE_FIRST: Duration = Duration::from_millis(20);
const PROBE_MAX: Duration = Duration::from_secs(1);

/// A published TCP port, as the slow path sees it.
struct Port {
    publication: Publication,
    /// Handles of the workers' listening sockets.
    sockets: Vec<OwnedFd>,
    /// Whether it refuses clients, as the guest does.
    refuses: bool,
    /// How often it has begun to.
    refusals: u32,
}

/// All published TCP ports.
#[derive(Default)]
pub struct Published {
    ports: HashMap<u32, Port>,
}

/// One time in which a port refuses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// Which publication.
    pub publication: Publication,
    number: u32,
}

/// What a refusing port waits before each probe: ever longer, up to a bound.
#[derive(Clone, Debug)]
pub struct Pauses(Duration);

impl Default for Pauses {
    fn default() -> Self {
        Self(PROBE_FIRST)
    }
}

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let pause = self.0;
        self.0 = (pause * 2).min(PROBE_MAX);
        Some(pause)
    }
}

impl Published {
    /// Adds a port that listens, by handles of its sockets.
    pub fn add(&mut self, publication: Publication, sockets: Vec<OwnedFd>) {
        self.ports.insert(publication.id, Port { publication, sockets, refuses: false, refusals: 0 });
    }

    /// The guest refuses at a port. Returns the port if that is new: it has to be probed while this refusal lasts.
    pub fn guest_refuses(&mut self, publication: u32) -> Option<Refusal> {
        let port = self.ports.get_mut(&publication).filter(|port| !port.refuses)?;
        for socket in &port.sockets {
            // It fails only for a socket that does not listen.
            let _ = listen::stop_listening(socket.as_raw_fd());
        }
        port.refuses = true;
        port.refusals = port.refusals.wrapping_add(1);
        Some(Refusal { publication: port.publication, number: port.refusals })
    }

    /// The guest listens at a port.
    pub fn guest_listens(&mut self, publication: u32) {
        let Some(port) = self.ports.get_mut(&publication).filter(|port| port.refuses) else { return };
        let failed: Vec<_> =
            port.sockets.iter().filter_map(|socket| listen::listen(socket.as_raw_fd()).err()).collect();
        // Without a socket that listens, the port goes on refusing, and the next probe tries again.
        port.refuses = failed.len() == port.sockets.len();
        if let Some(error) = failed.first() {
            tracing::warn!(port = port.publication.guest_port, %error, "a published port cannot listen again");
        }
    }

    /// Whether a refusal lasts.
    pub fn lasts(&self, refusal: &Refusal) -> bool {
        let port = self.ports.get(&refusal.publication.id);
        port.is_some_and(|port| port.refuses && port.refusals == refusal.number)
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

        let refusal = published.guest_refuses(7).unwrap();
        assert_eq!(refusal.publication, publication);
        assert!(published.lasts(&refusal));
        assert!(TcpStream::connect(address).is_err());
        assert_eq!(published.guest_refuses(7), None, "other clients of the same moment begin nothing");

        published.guest_listens(7);
        assert!(!published.lasts(&refusal));
        TcpStream::connect(address).unwrap();
        let again = published.guest_refuses(7).unwrap();
        assert!(published.lasts(&again) && !published.lasts(&refusal), "the first one is over");
        assert_eq!(published.guest_refuses(8), None, "an unknown port");
    }

    #[test]
    fn pauses_grow_up_to_a_second() {
        let pauses: Vec<u128> = Pauses::default().take(8).map(|pause| pause.as_millis()).collect();
        assert_eq!(pauses, [20, 40, 80, 160, 320, 640, 1000, 1000]);
    }
}
