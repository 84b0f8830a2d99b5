//! One address type for both families.
//!
//! Inside hythe an IPv4 address is its IPv4-mapped IPv6 form (RFC 4291, 2.5.5.2), so that keys, tables and
//! relays have one path. A packet that carries a mapped address in an IPv6 header is refused by the parser
//! ([`super::view`]): otherwise a guest could name the host's IPv4 loopback through IPv6.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// An IPv4 or IPv6 address; IPv4 in its mapped form.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address(Ipv6Addr);

impl Address {
    /// The IPv4 address in four bytes, network order.
    pub fn v4(bytes: [u8; 4]) -> Self {
        Self(Ipv4Addr::from(bytes).to_ipv6_mapped())
    }

    /// An IPv4 address, in constants.
    pub const fn of_v4(ip: Ipv4Addr) -> Self {
        Self(ip.to_ipv6_mapped())
    }

    /// An IPv6 address, in constants.
    pub const fn of_v6(ip: Ipv6Addr) -> Self {
        Self(ip)
    }

    /// The IPv6 address in sixteen bytes, network order. A mapped address becomes IPv4.
    pub fn v6(bytes: [u8; 16]) -> Self {
        Self(Ipv6Addr::from(bytes))
    }

    /// Whether this is an IPv4 address.
    pub fn is_v4(self) -> bool {
        self.0.octets()[..12] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]
    }

    /// The sixteen bytes, IPv4 mapped.
    pub fn octets(self) -> [u8; 16] {
        self.0.octets()
    }

    /// The last four bytes: the IPv4 address where [`Self::is_v4`].
    pub fn v4_octets(self) -> [u8; 4] {
        let o = self.0.octets();
        [o[12], o[13], o[14], o[15]]
    }

    /// The standard library's form.
    pub fn ip(self) -> IpAddr {
        if self.is_v4() { IpAddr::V4(self.v4_octets().into()) } else { IpAddr::V6(self.0) }
    }

    /// This address and a port, in the standard library's form.
    pub fn with_port(self, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip(), port)
    }

    /// Multicast of either family, or the IPv4 limited broadcast.
    pub fn is_multicast(self) -> bool {
        match self.ip() {
            IpAddr::V4(a) => a.is_multicast() || a.is_broadcast(),
            IpAddr::V6(a) => a.is_multicast(),
        }
    }

    /// The loopback networks: 127.0.0.0/8 and ::1.
    pub fn is_loopback(self) -> bool {
        self.ip().is_loopback()
    }

    /// Link-local unicast: 169.254.0.0/16 and fe80::/10.
    pub fn is_link_local(self) -> bool {
        match self.ip() {
            IpAddr::V4(a) => a.is_link_local(),
            IpAddr::V6(a) => a.is_unicast_link_local(),
        }
    }

    /// Addresses that are no destination of a packet on a wire (RFC 6890): loopback, "this network" (0.0.0.0/8,
    /// which Linux takes for the local host), the unspecified address, 240.0.0.0/4, and the IPv6 forms that
    /// embed IPv4 in the low 32 bits (::/96 and mapped).
    pub fn is_martian(self) -> bool {
        match self.ip() {
            IpAddr::V4(a) => {
                a.is_loopback() || a.octets()[0] == 0 || (a.octets()[0] >= 240 && !a.is_broadcast())
            }
            IpAddr::V6(a) => a.octets()[..12] == [0; 12] || self.is_v4(),
        }
    }
}

impl From<IpAddr> for Address {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(a) => Self(a.to_ipv6_mapped()),
            IpAddr::V6(a) => Self(a),
        }
    }
}

impl From<Ipv4Addr> for Address {
    fn from(ip: Ipv4Addr) -> Self {
        Self(ip.to_ipv6_mapped())
    }
}

impl From<Ipv6Addr> for Address {
    fn from(ip: Ipv6Addr) -> Self {
        Self(ip)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ip().fmt(f)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ip().fmt(f)
    }
}

/// An address and a port (or, for ICMP echo, the identifier).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint {
    /// The address.
    pub address: Address,
    /// The port in host byte order.
    pub port: u16,
}

impl Endpoint {
    /// Joins an address and a port.
    pub fn new(address: impl Into<Address>, port: u16) -> Self {
        Self { address: address.into(), port }
    }

    /// The standard library's form.
    pub fn socket_address(self) -> SocketAddr {
        self.address.with_port(self.port)
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(a: SocketAddr) -> Self {
        Self { address: a.ip().into(), port: a.port() }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.socket_address().fmt(f)
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.socket_address().fmt(f)
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// ff:ff:ff:ff:ff:ff.
    pub const BROADCAST: Mac = Mac([0xff; 6]);

    /// Whether the group bit is set: multicast or broadcast.
    pub fn is_group(self) -> bool {
        self.0[0] & 1 == 1
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02x}", if index == 0 { "" } else { ":" })?;
        }
        Ok(())
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for Mac {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            *byte = parts
                .next()
                .filter(|part| part.len() == 2)
                .and_then(|part| u8::from_str_radix(part, 16).ok())
                .ok_or_else(|| format!("'{text}' is not a MAC address like 52:54:00:12:34:56"))?;
        }
        let mac = Mac(mac);
        if parts.next().is_some() || mac.is_group() || mac == Mac::default() {
            return Err(format!("'{text}' is not the MAC address of one station"));
        }
        Ok(mac)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn both_families_survive_the_round_trip() {
        for text in ["192.0.2.1", "2001:db8::1", "0.0.0.0", "::"] {
            assert_eq!(address(text).to_string(), text);
        }
        assert!(address("192.0.2.1").is_v4());
        assert!(!address("2001:db8::1").is_v4());
    }

    #[test]
    fn addresses_that_would_reach_the_host_itself_are_martian() {
        for text in ["127.0.0.1", "127.9.9.9", "0.0.0.0", "0.1.2.3", "::1", "::", "::7f00:1", "240.0.0.1"] {
            assert!(address(text).is_martian(), "{text}");
        }
        for text in ["10.0.0.1", "169.254.169.254", "fe80::1", "2001:db8::1"] {
            assert!(!address(text).is_martian(), "{text}");
        }
    }

    #[test]
    fn a_mac_address_is_parsed_strictly() {
        assert_eq!("52:54:00:12:34:56".parse::<Mac>().unwrap().to_string(), "52:54:00:12:34:56");
        for text in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "01:00:5e:00:00:01",
            "5:4:0:1:3:5",
            "zz:54:00:12:34:56",
        ] {
            assert!(text.parse::<Mac>().is_err(), "{text}");
        }
    }
}
