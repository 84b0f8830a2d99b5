//! Which clients the guest cannot answer under their own address: those of networks that it takes for its own.

use std::collections::HashMap;

use crate::frame::address::Address;
use crate::time::Now;

/// Prefixes whose clients the guest turned out not to answer: networks that it takes for its own.
#[derive(Default)]
pub(in crate::worker) struct Unanswerable(HashMap<Address, Now>);

impl Unanswerable {
    const KEPT: usize = 1024;
    /// A network of the guest's may go away again.
    const VALID_NS: u64 = 600 * 1_000_000_000;

    fn prefix(client: Address) -> Address {
        let mut octets = client.octets();
        let host_bytes = if client.is_v4() { 1 } else { 8 };
        octets[16 - host_bytes..].fill(0);
        Address::v6(octets)
    }

    /// The guest does not answer this client.
    pub fn note(&mut self, client: Address, now: Now) {
        if self.0.len() >= Self::KEPT {
            self.0.retain(|_, since| now.since(*since) < Self::VALID_NS / 2);
        }
        // Beyond that, each client of a new prefix waits for its proof.
        if self.0.len() < Self::KEPT {
            self.0.insert(Self::prefix(client), now);
        }
    }

    /// Whether the client is of a prefix that the guest did not answer lately.
    pub fn contains(&self, client: Address, now: Now) -> bool {
        self.0.get(&Self::prefix(client)).is_some_and(|since| now.since(*since) < Self::VALID_NS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_prefix_is_remembered_for_a_while_and_no_other() {
        let mut unanswerable = Unanswerable::default();
        let now = Now(1);
        let client = |text: &str| Address::from(text.parse::<std::net::IpAddr>().unwrap());
        unanswerable.note(client("172.17.0.9"), now);
        unanswerable.note(client("2001:db8::9"), now);
        assert!(unanswerable.contains(client("172.17.0.77"), now));
        assert!(unanswerable.contains(client("2001:db8::1:2"), now));
        assert!(!unanswerable.contains(client("172.17.1.9"), now));
        assert!(!unanswerable.contains(client("172.17.0.9"), Now(now.0 + Unanswerable::VALID_NS)));
    }
}
