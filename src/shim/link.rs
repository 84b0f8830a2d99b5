//! The guest's interface on which hythe is.

use std::io;
use std::net::IpAddr;

use nix::ifaddrs::getifaddrs;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::SockaddrStorage;

/// An interface: its name and number, and the families in which it has an address that others can reach.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Link {
    name: String,
    /// One that comes after it with the same name is another one.
    index: u32,
    has_v4: bool,
    has_v6: bool,
}

impl Link {
    /// The interface that has an address: the near end of a connection to the gateway.
    pub fn of(address: IpAddr) -> io::Result<Self> {
        let all = getifaddrs()?.filter_map(|entry| Some((entry.interface_name, ip_of(&entry.address?)?)));
        let all: Vec<(String, IpAddr)> = all.collect();
        let own = all.iter().find(|(_, ip)| *ip == address);
        // It is gone since.
        let (name, _) = own.ok_or(io::ErrorKind::AddrNotAvailable)?;
        let has = |is: fn(&IpAddr) -> bool| all.iter().any(|(other, ip)| other == name && is(ip));
        Ok(Self {
            name: name.clone(),
            index: if_nametoindex(name.as_str())?,
            has_v4: has(IpAddr::is_ipv4),
            has_v6: has(|ip| matches!(ip, IpAddr::V6(v6) if !v6.is_unicast_link_local())),
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether others can reach it in a family.
    pub fn has(&self, is_ipv6: bool) -> bool {
        if is_ipv6 { self.has_v6 } else { self.has_v4 }
    }
}

fn ip_of(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| v4.ip().into());
    v4.or_else(|| Some(address.as_sockaddr_in6()?.ip().into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_is_known_by_each_of_its_addresses() {
        let link = Link::of("127.0.0.1".parse().unwrap()).unwrap();
        assert_eq!((link.name(), link.has(false), link.has(true)), ("lo", true, true));
        assert_eq!(Link::of("::1".parse().unwrap()).unwrap(), link);
    }

    #[test]
    fn an_address_that_is_gone_is_no_link() {
        let error = Link::of("198.51.100.7".parse().unwrap()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrNotAvailable);
    }
}
