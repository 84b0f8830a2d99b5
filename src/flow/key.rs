//! The name of a flow.

use std::hash::Hasher;

use siphasher::sip128::{Hasher128, SipHasher13};

use crate::frame::address::{Address, Endpoint};

/// What a flow speaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum Protocol {
    /// TCP.
    Tcp = 6,
    /// UDP.
    Udp = 17,
    /// ICMP or ICMPv6 echo; the guest's port is the identifier, the remote port is zero.
    Echo = 1,
}

/// A conversation as the guest sees it: its own endpoint and the remote one, as they stand in the guest's packets.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct FlowKey {
    /// The guest's endpoint.
    pub guest: Endpoint,
    /// The remote endpoint.
    pub remote: Endpoint,
    /// The protocol.
    pub protocol: Protocol,
}

/// A key in five words: what is hashed.
type KeyWords = [u64; 5];

impl FlowKey {
    fn words(&self) -> KeyWords {
        let half = |address: Address, at: usize| {
            let o = address.octets();
            u64::from_ne_bytes([
                o[at],
                o[at + 1],
                o[at + 2],
                o[at + 3],
                o[at + 4],
                o[at + 5],
                o[at + 6],
                o[at + 7],
            ])
        };
        [
            half(self.guest.address, 0),
            half(self.guest.address, 8),
            half(self.remote.address, 0),
            half(self.remote.address, 8),
            u64::from(self.guest.port) | u64::from(self.remote.port) << 16 | (self.protocol as u64) << 32,
        ]
    }
}

/// The secret that keys the hash, so that a guest or a stranger cannot choose keys that collide.
#[derive(Clone, Copy)]
pub struct HashSecret(pub [u64; 2]);

impl HashSecret {
    /// SipHash-1-3 of a key, with a result of 128 bits.
    pub(super) fn hash(&self, key: &FlowKey) -> [u64; 2] {
        let mut hasher = SipHasher13::new_with_keys(self.0[0], self.0[1]);
        for word in key.words() {
            hasher.write_u64(word);
        }
        let hash = hasher.finish128();
        [hash.h1, hash.h2]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_differ_in_one_field_have_different_words() {
        let guest = Endpoint::new(Address::v4([192, 168, 65, 3]), 1000);
        let remote = Endpoint::new(Address::v4([198, 51, 100, 1]), 443);
        let key = FlowKey { guest, remote, protocol: Protocol::Tcp };
        let others = [
            FlowKey { guest: Endpoint { port: 1001, ..guest }, ..key },
            FlowKey {
                remote: Endpoint { port: 1000, ..remote },
                guest: Endpoint { port: 443, ..guest },
                ..key
            },
            FlowKey { remote: Endpoint::new(Address::v4([198, 51, 100, 2]), 443), ..key },
            FlowKey { protocol: Protocol::Udp, ..key },
        ];
        for other in others {
            assert_ne!(key.words(), other.words());
        }
        assert_eq!(key.words(), key.words());
    }
}
