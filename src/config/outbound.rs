//! The way out that the user has chosen, checked against the host as it is at the start.

use std::net::IpAddr;

use super::{ConfigError, Options};
use crate::frame::address::Address;
use crate::netlink::{HostNetwork, interface_index};
use crate::policy::outbound::{Interface, Outbound};

/// What `--outbound-interface` and `--outbound-address` say.
pub(super) fn choose(options: &Options, host: &HostNetwork) -> Result<Outbound, ConfigError> {
    let interface = options.outbound_interface.as_deref().map(interface).transpose()?;
    let mut outbound = Outbound { interface, ..Outbound::default() };
    for ip in &options.outbound_address {
        let address = Address::from(*ip);
        let refused = |why: &str| Err(ConfigError::Value(format!("--outbound-address {ip}: {why}")));
        if address.is_loopback() || ip.is_unspecified() || ip.is_multicast() {
            return refused("nothing leaves the host from there; name an address of one of its interfaces");
        }
        if host.own.binary_search(&address).is_err() {
            return refused("the host does not have this address (ip address shows those that it has)");
        }
        let (is_off, chosen) = match ip {
            IpAddr::V4(_) => (options.ipv6_only, &mut outbound.v4),
            IpAddr::V6(_) => (options.ipv4_only, &mut outbound.v6),
        };
        if is_off {
            return refused("the address's family is off (-4, -6)");
        }
        if let Some(first) = chosen.replace(address) {
            return refused(&format!("{first} is given too; there can be one a family"));
        }
    }
    Ok(outbound)
}

fn interface(name: &str) -> Result<Interface, ConfigError> {
    let refused = |why: &str| ConfigError::Value(format!("--outbound-interface {name}: {why}"));
    if name == "lo" {
        return Err(refused("nothing leaves the host by its loopback; name another interface"));
    }
    let index = interface_index(name)
        .ok_or_else(|| refused("the host has no such interface (ip link shows those that it has)"))?;
    Ok(Interface { name: name.to_string(), index })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, Ipv6Addr};

    const OWN: [IpAddr; 3] = [
        IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2)),
        IpAddr::V4(Ipv4Addr::new(10, 0, 0, 3)),
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2)),
    ];

    fn host() -> HostNetwork {
        HostNetwork { own: OWN.map(Address::from).to_vec(), ..HostNetwork::default() }
    }

    #[test]
    fn an_address_a_family_is_taken() {
        let options = Options { outbound_address: vec![OWN[0], OWN[2]], ..Options::default() };
        let outbound = choose(&options, &host()).unwrap();
        assert_eq!((outbound.v4, outbound.v6), (Some(OWN[0].into()), Some(OWN[2].into())));
        assert_eq!(choose(&Options::default(), &host()).unwrap(), Outbound::default());
    }

    #[test]
    fn what_the_host_does_not_have_is_refused_in_plain_words() {
        let addresses = |texts: &[&str]| Options {
            outbound_address: texts.iter().map(|text| text.parse().unwrap()).collect(),
            ..Options::default()
        };
        let interface =
            |name: &str| Options { outbound_interface: Some(name.to_string()), ..Options::default() };
        for (options, expected) in [
            (addresses(&["10.0.0.4"]), "--outbound-address 10.0.0.4: the host does not have this address"),
            (addresses(&["127.0.0.1"]), "nothing leaves the host from there"),
            (addresses(&["::"]), "nothing leaves the host from there"),
            (addresses(&["10.0.0.2", "10.0.0.3"]), "10.0.0.2 is given too; there can be one a family"),
            (Options { ipv4_only: true, ..addresses(&["fd00::2"]) }, "the address's family is off"),
            (interface("none0"), "--outbound-interface none0: the host has no such interface"),
            (interface("lo"), "nothing leaves the host by its loopback"),
        ] {
            let message = choose(&options, &host()).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }
}
