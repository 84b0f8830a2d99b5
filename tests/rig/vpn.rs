//! A VPN of the host: a second link, which comes and goes, to a network that nobody else reaches.
//!
//! ```text
//! guest ── hythe ─ host ── up0 ─── far
//!                       └─ vpn0 ── vpn            10.99.0.0/24 and fd99::/64, the server is .1
//! ```

use std::net::IpAddr;

use super::netns::Netns;
use super::site::Family;

/// The network of the VPN that both families' servers are in; only the VPN leads there.
pub const INSIDE: u8 = 9;

/// A VPN's other end.
pub struct Vpn(pub Netns);

impl Vpn {
    /// The host's address on its link.
    pub fn host(family: Family) -> IpAddr {
        if family == Family::V4 { "10.99.0.2" } else { "fd99::2" }.parse().unwrap()
    }

    /// Comes up: a link, addresses, and a route to a network that nobody else reaches.
    pub fn up(host: &Netns) -> Self {
        let vpn = Netns::new();
        let path = vpn.path().display().to_string();
        host.ip(&format!("link add vpn0 type veth peer name vpn1 netns {path}"));
        vpn.ip("link set lo up
                addr add 10.99.0.1/24 dev vpn1
                addr add fd99::1/64 dev vpn1 nodad
                addr add 198.18.9.1/32 dev lo
                addr add 2001:db8:9::1/128 dev lo
                link set vpn1 up");
        host.ip("addr add 10.99.0.2/24 dev vpn0
                 addr add fd99::2/64 dev vpn0 nodad
                 link set vpn0 up
                 route add 198.18.9.0/24 via 10.99.0.1
                 -6 route add 2001:db8:9::/64 via fd99::1");
        Self(vpn)
    }

    /// Goes, with its link.
    pub fn down(host: &Netns) {
        host.ip("link del vpn0");
    }
}
