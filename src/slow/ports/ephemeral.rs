//! Random ports of the host, as Docker draws them: in order, after the one that was given last.
//!
//! In order, so that a port that was given back is not given to somebody else at once. The range is that from which the kernel
//! gives ports to whoever asks for any, without those that the administrator has reserved.

use std::collections::HashMap;
use std::fs;
use std::ops::RangeInclusive;

use crate::policy::port_set::PortSet;
use crate::policy::publish::PublishedProtocol;

/// The kernel's own range where it does not tell another one.
const DEFAULT: (u16, u16) = (32_768, 60_999);

/// The range, and where it goes on.
#[derive(Clone, Debug)]
pub struct Ephemeral {
    first: u16,
    last: u16,
    reserved: PortSet,
    /// The port that was drawn last, by protocol.
    drawn: HashMap<PublishedProtocol, u16>,
}

impl Ephemeral {
    /// The host's range as it is now.
    pub fn read() -> Self {
        let read = |name: &str| fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap_or_default();
        Self::new(&read("ip_local_port_range"), &read("ip_local_reserved_ports"))
    }

    /// The range in the kernel's notation (`32768 60999`), and reserved ports (`8080,9000-9010`).
    fn new(range: &str, reserved: &str) -> Self {
        let numbers: Vec<u16> = range.split_whitespace().filter_map(|number| number.parse().ok()).collect();
        let (first, last) = match *numbers {
            [first, last] if 0 < first && first <= last => (first, last),
            _ => DEFAULT,
        };
        Self { first, last, reserved: PortSet::parse(reserved), drawn: HashMap::new() }
    }

    /// Ports that the administrator keeps for others.
    pub fn reserved(&self) -> &PortSet {
        &self.reserved
    }

    /// Whether some of these ports are in the range.
    pub fn meets(&self, ports: &RangeInclusive<u16>) -> bool {
        *ports.start() <= self.last && self.first <= *ports.end()
    }

    /// The next port that is neither reserved nor taken, as far as is known; `None` when there is none.
    pub fn draw(&mut self, protocol: PublishedProtocol, is_taken: impl Fn(u16) -> bool) -> Option<u16> {
        let count = u32::from(self.last - self.first) + 1;
        let before = self.drawn.get(&protocol).map_or(0, |drawn| u32::from(drawn - self.first) + 1);
        let ports = (0..count).map(|step| self.first + ((before + step) % count) as u16);
        let port = ports.into_iter().find(|port| !self.reserved.contains(*port) && !is_taken(*port))?;
        self.drawn.insert(protocol, port);
        Some(port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use PublishedProtocol::{Tcp, Udp};

    #[test]
    fn ports_are_drawn_in_order_after_the_last_one() {
        let mut ephemeral = Ephemeral::new("32768\t32773\n", "32770,32000-32001\n");
        let drawn: Vec<u16> = (0..4).map(|_| ephemeral.draw(Tcp, |port| port == 32771).unwrap()).collect();
        assert_eq!(drawn, [32768, 32769, 32772, 32773]);
        assert_eq!(ephemeral.draw(Tcp, |_| false), Some(32768), "and from the first again");
        assert_eq!(ephemeral.draw(Udp, |_| false), Some(32768), "each protocol by itself");
        assert_eq!(ephemeral.draw(Tcp, |_| true), None);
        assert_eq!(ephemeral.draw(Tcp, |_| false), Some(32769), "which changes nothing");
        assert!(ephemeral.reserved().contains(32770));
    }

    #[test]
    fn a_range_that_cannot_be_read_is_the_kernels_own() {
        for range in ["", "x y", "5 4", "0 10", "1 2 3"] {
            assert_eq!(Ephemeral::new(range, "").draw(Tcp, |_| false), Some(DEFAULT.0), "{range}");
        }
        let mut whole = Ephemeral::new("1 65535", "");
        assert_eq!(whole.draw(Tcp, |port| port < 65535), Some(65535));
        assert_eq!(whole.draw(Tcp, |_| false), Some(1));
    }
}
