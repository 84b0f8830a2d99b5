//! The guest's interface on which hythe is.

use std::net::IpAddr;

use ipnet::IpNet;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::SockaddrStorage;

/// The addresses of an interface, each with its network.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Link {
    networks: Vec<IpNet>,
}

impl Link {
    /// The interface that has an address: the near end of a connection to the gateway.
    pub fn of(address: IpAddr) -> std::io::Result<Self> {
        let all = getifaddrs()?.filter_map(|entry| {
            let ip = ip_of(&entry.address?)?;
            let network = IpNet::with_netmask(ip, ip_of(&entry.netmask?)?).ok()?;
            Some((entry.interface_name, network))
        });
        let all: Vec<(String, IpNet)> = all.collect();
        let own = all.iter().find(|(_, network)| network.addr() == address);
        let networks = match own {
            Some((name, _)) => {
                all.iter().filter(|(other, _)| other == name).map(|(_, network)| *network).collect()
            }
            // It is gone since.
            None => vec![address.into()],
        };
        Ok(Self { networks })
    }

    /// Its address of a family, which others can reach.
    pub fn address(&self, is_ipv6: bool) -> Option<IpAddr> {
        let is_wide = |ip: &IpAddr| match ip {
            IpAddr::V4(_) => true,
            IpAddr::V6(v6) => !v6.is_unicast_link_local(),
        };
        self.networks.iter().map(IpNet::addr).find(|ip| ip.is_ipv6() == is_ipv6 && is_wide(ip))
    }

    /// Whether an address is one of its networks: the gateway's, or its own.
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.networks.iter().any(|network| network.contains(&address))
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
        assert_eq!(link.address(false), Some("127.0.0.1".parse().unwrap()));
        assert!(link.contains("127.9.9.9".parse().unwrap()));
        assert!(!link.contains("172.17.0.2".parse().unwrap()));
        assert_eq!(Link::of("::1".parse().unwrap()).unwrap(), link);
    }

    #[test]
    fn an_address_that_is_gone_is_a_link_of_its_own() {
        let link = Link::of("198.51.100.7".parse().unwrap()).unwrap();
        assert_eq!(link.address(false), Some("198.51.100.7".parse().unwrap()));
        assert_eq!(link.address(true), None);
        assert!(!link.contains("198.51.100.8".parse().unwrap()));
    }

    #[test]
    fn an_address_of_the_link_alone_is_not_told_to_others() {
        let link =
            Link { networks: vec!["fe80::1/64".parse().unwrap(), "fdc4:f303:9324::3/64".parse().unwrap()] };
        assert_eq!(link.address(true), Some("fdc4:f303:9324::3".parse().unwrap()));
        assert_eq!(link.address(false), None);
    }
}
