//! The world around a guest: a host, a far server, and routers between them where a test wants some.
//!
//! ```text
//! guest ── eth0 ─ hythe ─ host ── up0 ──────── up1 ── far            segment 0 is 10.77.0.0/24 and fd77::/64
//!                         .2                   .1                    the left end is .2, the right end .1
//!
//!                         host ─── router ─── router ─── far         segment n is 10.77.n.0/24 and fd77:0:0:n::/64
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Once;

use super::netns::Netns;
use super::wait::wait_until;

/// An IP version, and the addresses of the site in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    V4,
    V6,
}

pub const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

impl Family {
    fn choose(self, v4: &str, v6: &str) -> IpAddr {
        (if self == Self::V4 { v4 } else { v6 }).parse().unwrap()
    }

    /// The far server's address, beyond the wire.
    pub fn far(self) -> IpAddr {
        self.choose("198.51.100.1", "2001:db8::1")
    }

    /// The host's address on the wire.
    pub fn host(self) -> IpAddr {
        self.choose("10.77.0.2", "fd77::2")
    }

    /// The other end of the host's wire: the far server's, or the first router's.
    pub fn next_hop(self) -> IpAddr {
        self.choose("10.77.0.1", "fd77::1")
    }

    /// The guest's address.
    pub fn guest(self) -> IpAddr {
        self.choose("192.168.65.3", "fdc4:f303:9324::3")
    }

    /// The gateway, as the guest sees it.
    pub fn gateway(self) -> IpAddr {
        self.choose("192.168.65.1", "fdc4:f303:9324::1")
    }

    /// host.docker.internal, as the guest sees it.
    pub fn host_internal(self) -> IpAddr {
        self.choose("192.168.65.254", "fdc4:f303:9324::254")
    }

    pub fn loopback(self) -> IpAddr {
        if self == Self::V4 { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() }
    }

    pub fn any(self) -> IpAddr {
        if self == Self::V4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
    }

    /// A host address of a network that routes can be set for (198.18.`net`.`host`, 2001:db8:`net`::`host`).
    pub fn elsewhere(self, net: u8, host: u8) -> IpAddr {
        self.choose(&format!("198.18.{net}.{host}"), &format!("2001:db8:{net:x}::{host:x}"))
    }

    /// The network of [`Self::elsewhere`], for ip(8).
    pub fn elsewhere_network(self, net: u8) -> String {
        match self {
            Self::V4 => format!("198.18.{net}.0/24"),
            Self::V6 => format!("2001:db8:{net:x}::/64"),
        }
    }
}

/// The namespaces of a test.
pub struct Site {
    pub host: Netns,
    pub far: Netns,
    /// From the host's side on.
    pub routers: Vec<Netns>,
}

impl Site {
    /// A host and a far server, joined by a wire.
    pub fn new() -> Self {
        Self::with_routers(0)
    }

    /// So many routers between host and far server.
    pub fn with_routers(count: u8) -> Self {
        raise_descriptor_limit();
        let routers: Vec<Netns> = (0..count).map(|_| Netns::new()).collect();
        let site = Self { host: Netns::new(), far: Netns::new(), routers };
        site.far.ip("addr add 198.51.100.1/32 dev lo
                     addr add 2001:db8::1/128 dev lo");
        for router in &site.routers {
            router.sysctl("ipv4/ip_forward", "1");
            router.sysctl("ipv6/conf/all/forwarding", "1");
        }
        let nodes: Vec<&Netns> = [&site.host].into_iter().chain(&site.routers).chain([&site.far]).collect();
        for (number, pair) in nodes.windows(2).enumerate() {
            wire(number, pair[0], pair[1]);
        }
        for (number, node) in nodes.iter().enumerate() {
            if number + 1 < nodes.len() {
                node.ip(&format!(
                    "route add default via 10.77.{number}.1
                     -6 route add default via fd77:0:0:{number}::1"
                ));
            }
            for segment in 0..number.saturating_sub(1) {
                let back = number - 1;
                node.ip(&format!(
                    "route add 10.77.{segment}.0/24 via 10.77.{back}.2
                     -6 route add fd77:0:0:{segment}::/64 via fd77:0:0:{back}::2"
                ));
            }
        }
        site
    }
}

/// Joins two namespaces by segment `number`.
pub fn wire(number: usize, left: &Netns, right: &Netns) {
    let right_path = right.path();
    left.ip(&format!("link add up{number} type veth peer name down{number} netns {}", right_path.display()));
    for (netns, name, last) in [(left, format!("up{number}"), 2), (right, format!("down{number}"), 1)] {
        netns.ip(&format!(
            "addr add 10.77.{number}.{last}/24 dev {name}
             addr add fd77:0:0:{number}::{last}/64 dev {name} nodad
             link set {name} up"
        ));
    }
    for (netns, name) in [(left, format!("up{number}")), (right, format!("down{number}"))] {
        wait_until("a carrier", || netns.command(&["ip", "link", "show", &name]).contains("state UP"));
    }
}

/// Tests hold thousands of sockets.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    static RAISED: Once = Once::new();
    RAISED.call_once(|| {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    });
}
