//! Published TCP ports that show what the guest shows: refused while the guest refuses.
//!
//! A client's connection is open before the guest can be asked, so the first refusal makes one client see a connection
//! that ends at once. From then on the port does not listen and refuses clients itself, while a probe asks the guest
//! now and then whether somebody listens there; when somebody does, the port listens again.
//!
//! Probes follow the clock, not their answers: an answer that is lost, or a guest that says nothing, costs a moment and
//! no more. A worker that has a probe under way leaves the next one out.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use crate::host::listen;

/// The first probe comes this soon, each later one after twice the pause of the one before.
const PROBE_FIRST: Duration = Duration::from_millis(20);
const PROBE_MAX: Duration = Duration::from_secs(1);

/// A published TCP port that follows the guest.
pub struct Follower {
    /// Handles of the workers' listening sockets.
    sockets: Vec<OwnedFd>,
    /// Whether it refuses clients, as the guest does.
    refuses: bool,
    /// How often it has begun to.
    refusals: u32,
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

impl Follower {
    /// A port that listens, by handles of its sockets.
    pub fn new(sockets: Vec<OwnedFd>) -> Self {
        Self { sockets, refuses: false, refusals: 0 }
    }

    /// The guest refuses. Returns the refusal's number if that is new: the port has to be probed while this refusal lasts.
    pub fn guest_refuses(&mut self) -> Option<u32> {
        if self.refuses {
            return None;
        }
        for socket in &self.sockets {
            // It fails only for a socket that does not listen.
            let _ = listen::stop_listening(socket.as_raw_fd());
        }
        self.refuses = true;
        self.refusals = self.refusals.wrapping_add(1);
        Some(self.refusals)
    }

    /// The guest listens. Returns what went wrong, if anything.
    pub fn guest_listens(&mut self) -> Option<std::io::Error> {
        if !self.refuses {
            return None;
        }
        let failed: Vec<_> =
            self.sockets.iter().filter_map(|socket| listen::listen(socket.as_raw_fd()).err()).collect();
        // Without a socket that listens, the port goes on refusing, and the next probe tries again.
        self.refuses = failed.len() == self.sockets.len();
        failed.into_iter().next()
    }

    /// Whether a refusal lasts.
    pub fn lasts(&self, refusal: u32) -> bool {
        self.refuses && self.refusals == refusal
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, TcpStream};

    #[test]
    fn a_port_follows_the_guest() {
        let (sockets, port) = listen::tests::open_any(Ipv4Addr::LOCALHOST.into(), 2);
        let address = (Ipv4Addr::LOCALHOST, port);
        let mut follower = Follower::new(sockets);
        TcpStream::connect(address).unwrap();

        let refusal = follower.guest_refuses().unwrap();
        assert!(follower.lasts(refusal));
        assert!(TcpStream::connect(address).is_err());
        assert_eq!(follower.guest_refuses(), None, "other clients of the same moment begin nothing");

        assert!(follower.guest_listens().is_none());
        assert!(!follower.lasts(refusal));
        TcpStream::connect(address).unwrap();
        let again = follower.guest_refuses().unwrap();
        assert!(follower.lasts(again) && !follower.lasts(refusal), "the first one is over");
    }

    #[test]
    fn pauses_grow_up_to_a_second() {
        let pauses: Vec<u128> = Pauses::default().take(8).map(|pause| pause.as_millis()).collect();
        assert_eq!(pauses, [20, 40, 80, 160, 320, 640, 1000, 1000]);
    }
}
