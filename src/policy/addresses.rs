//! The addresses of the link, and what each destination means.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::egress::{ByAddress, Rules, Verdict};
use super::proxy::{Choice, Kind, ProxySettings, TransparentPorts};
use super::target::{Target, TargetProtocol};
use crate::frame::address::{Address, Endpoint, Mac};
use crate::frame::drop_reason::DropReason;
use crate::policy::outbound::{Outbound, WayOut};

/// The name under which rules know the host's loopback.
const HOST: &str = "host.docker.internal";

/// The addresses of one family on the link.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Family {
    /// The link's subnet.
    pub subnet: IpNet,
    /// The gateway: DNS, DHCP, the in-guest API.
    pub gateway: Address,
    /// The host, meaning its loopback.
    pub host: Address,
    /// The guest.
    pub guest: Address,
}

/// The metadata services of clouds: what a guest reads there is the host's.
const METADATA: [Address; 2] = [
    Address::of_v4(Ipv4Addr::new(169, 254, 169, 254)),
    Address::of_v6(Ipv6Addr::new(0xfd00, 0x0ec2, 0, 0, 0, 0, 0, 0x254)),
];

/// Everything that decides about an address.
#[derive(Clone, Debug)]
pub struct Addresses {
    /// The gateway's MAC.
    pub gateway_mac: Mac,
    /// IPv4, unless it is off.
    pub v4: Option<Family>,
    /// IPv6, unless it is off.
    pub v6: Option<Family>,
    /// A prefix of the host's own kind from which the guest may have taken an address besides (RFC 6724: with
    /// unique local addresses only it would never prefer IPv6).
    pub global_prefix: Option<Ipv6Net>,
    /// Whether the host's loopback may be reached through the host address.
    pub host_loopback: bool,
    /// Whether the host's other addresses may be reached.
    pub host_addresses: bool,
    /// Whether metadata services may be reached.
    pub metadata: bool,
    /// Whether the gateway answers at the API's port.
    pub guest_api: bool,
    /// Where the guest may go of its own accord, besides what all of this says.
    pub egress: Arc<Rules>,
    /// Which proxy leads there, if one does.
    pub proxy: Option<Arc<ProxySettings>>,
    /// Ports on which a stream's way may depend on the name in its first bytes.
    pub transparent: TransparentPorts,
    /// Clients of these networks appear to the guest under the gateway's address.
    pub snat_from: Vec<IpNet>,
    /// The host's own addresses, sorted; kept by the slow path.
    pub own: Vec<Address>,
    /// By which way the guest's traffic leaves the host; kept by the slow path.
    pub outbound: Outbound,
}

/// What a destination means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Destination {
    /// hythe itself.
    Gateway,
    /// The host's loopback.
    Host,
    /// The world, through the host's routes.
    Outside,
}

/// Which way a stream of the guest's goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// From the host itself.
    Straight,
    /// As its name says, once that is known.
    ByName,
    /// None.
    Shut,
}

impl Addresses {
    /// Which way a stream goes, as far as its address says. On transparent ports of the world what is refused is looked into as
    /// well: HTTP has words for it.
    pub fn way(&self, remote: Endpoint, means: Destination) -> Way {
        if means != Destination::Outside {
            let admitted = self.admit(remote, means, TargetProtocol::Tcp);
            return if admitted.is_ok() { Way::Straight } else { Way::Shut };
        }
        let (ip, is_looked_into) = (remote.address.ip(), self.transparent.contains(remote.port));
        match self.egress.decide_by_address(ip, remote.port, TargetProtocol::Tcp) {
            ByAddress::Deny(_) | ByAddress::AskName if is_looked_into => return Way::ByName,
            ByAddress::Deny(rule) => {
                rule.count_refusal();
                return Way::Shut;
            }
            // No name will be known: what is said of the address alone counts.
            ByAddress::AskName if self.admit(remote, means, TargetProtocol::Tcp).is_err() => {
                return Way::Shut;
            }
            ByAddress::AskName | ByAddress::Allow => {}
        }
        let target =
            Target { name: None, address: Some(ip), port: remote.port, protocol: TargetProtocol::Tcp };
        let by_proxy = |settings: &Arc<ProxySettings>| {
            [Kind::Http, Kind::Tunnel]
                .iter()
                .any(|kind| !matches!(settings.choose(*kind, &target), Choice::Direct(_)))
        };
        if is_looked_into && self.proxy.as_ref().is_some_and(by_proxy) { Way::ByName } else { Way::Straight }
    }

    /// Both families that are on.
    pub fn families(&self) -> impl Iterator<Item = &Family> {
        self.v4.iter().chain(&self.v6)
    }

    /// The family of an address.
    pub fn family(&self, v4: bool) -> Option<&Family> {
        if v4 { self.v4.as_ref() } else { self.v6.as_ref() }
    }

    /// The gateway's link-local address (RFC 4291, 2.5.6), made from its MAC (RFC 2464, 4).
    pub fn gateway_link_local(&self) -> Address {
        link_local(self.gateway_mac)
    }

    /// Whether the guest may send from this address: IPv4, the one that it was given; IPv6, any of the prefixes that
    /// it was offered (it chooses the rest itself) and link-local ones.
    pub fn may_send_from(&self, source: Address) -> bool {
        let Some(family) = self.family(source.is_v4()) else { return false };
        if source == family.gateway || source == family.host {
            return false;
        }
        match source.ip() {
            std::net::IpAddr::V4(_) => source == family.guest,
            std::net::IpAddr::V6(ip) => {
                family.subnet.contains(&source.ip())
                    || self.global_prefix.is_some_and(|prefix| prefix.contains(&ip))
                    || (source.is_link_local() && source != self.gateway_link_local())
            }
        }
    }

    /// What a destination of the guest's means, or why it may not be reached.
    pub fn classify(&self, destination: Address) -> Result<Destination, DropReason> {
        let Some(family) = self.family(destination.is_v4()) else { return Err(DropReason::Policy) };
        if destination == family.gateway || destination == self.gateway_link_local() {
            return Ok(Destination::Gateway);
        }
        if destination == family.host {
            return if self.host_loopback { Ok(Destination::Host) } else { Err(DropReason::Policy) };
        }
        if destination.is_martian() {
            return Err(DropReason::Martian);
        }
        if destination.is_multicast() || is_directed_broadcast(family, destination) {
            return Err(DropReason::Multicast);
        }
        if METADATA.contains(&destination) {
            return if self.metadata { Ok(Destination::Outside) } else { Err(DropReason::Policy) };
        }
        if destination.is_link_local() {
            return Err(DropReason::LinkLocal);
        }
        if family.subnet.contains(&destination.ip()) {
            return Err(DropReason::Policy);
        }
        if !self.host_addresses && self.own.binary_search(&destination).is_ok() {
            return Err(DropReason::Policy);
        }
        Ok(Destination::Outside)
    }

    /// Why a destination that is refused is, in words.
    pub fn why_not(&self, destination: Address) -> &'static str {
        let Some(family) = self.family(destination.is_v4()) else { return "its family is off (-4, -6)" };
        if destination == family.host {
            "the host's loopback is shut (--no-host-loopback)"
        } else if METADATA.contains(&destination) {
            "a cloud's metadata service is the host's (--allow-metadata)"
        } else if family.subnet.contains(&destination.ip()) {
            "nobody but the guest, the gateway and the host is in the guest's subnet"
        } else if self.own.binary_search(&destination).is_ok() && !self.host_addresses {
            "the host's own addresses are shut (--no-host-addresses)"
        } else if destination.is_multicast() || destination.is_link_local() {
            "multicast and link-local addresses mean a link, and the guest's link ends here"
        } else {
            "an address that nobody can have (loopback, unspecified or reserved)"
        }
    }

    /// The way to a destination of the host's side. What stays on the host has none of its own.
    pub fn way_out(&self, destination: Address) -> WayOut {
        if self.outbound == Outbound::default()
            || destination.is_loopback()
            || self.own.binary_search(&destination).is_ok()
        {
            return WayOut::default();
        }
        self.outbound.way(destination)
    }

    /// Why the guest may not begin to speak with an endpoint, by its address alone: the rule is counted. hythe itself may always be
    /// spoken to; the host's loopback goes by its name.
    pub fn admit(
        &self,
        remote: Endpoint,
        means: Destination,
        protocol: TargetProtocol,
    ) -> Result<(), DropReason> {
        if self.egress.is_empty() {
            return Ok(());
        }
        let name = match means {
            Destination::Gateway => return Ok(()),
            Destination::Host => Some(HOST),
            Destination::Outside => None,
        };
        let target = Target { name, address: Some(remote.address.ip()), port: remote.port, protocol };
        match self.egress.decide(&target) {
            Verdict::Allow => Ok(()),
            Verdict::Deny(rule) => {
                rule.count_refusal();
                Err(DropReason::Policy)
            }
        }
    }

    /// The source under which a client of a published port appears to the guest: its own, unless the guest could not
    /// answer that (it is loopback, link-local or of the link's own subnet); then the gateway's.
    pub fn may_keep_source(&self, client: Address) -> bool {
        let Some(family) = self.family(client.is_v4()) else { return false };
        !client.is_martian()
            && !client.is_multicast()
            && !client.is_link_local()
            && !family.subnet.contains(&client.ip())
            && !self.snat_from.iter().any(|net| net.contains(&client.ip()))
            && !matches!(client.ip(), std::net::IpAddr::V6(ip) if self.global_prefix.is_some_and(|p| p.contains(&ip)))
    }
}

fn is_directed_broadcast(family: &Family, destination: Address) -> bool {
    matches!(family.subnet, IpNet::V4(net) if Address::from(net.broadcast()) == destination)
}

/// The link-local address of a MAC: fe80::/64 and the modified EUI-64.
pub fn link_local(mac: Mac) -> Address {
    let mac = mac.0;
    let mut octets = [0; 16];
    octets[..2].copy_from_slice(&[0xfe, 0x80]);
    octets[8..11].copy_from_slice(&mac[..3]);
    octets[11..13].copy_from_slice(&[0xff, 0xfe]);
    octets[13..].copy_from_slice(&mac[3..]);
    octets[8] ^= 2;
    Address::v6(octets)
}

/// The default subnet of IPv4.
pub const SUBNET: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 65, 0), 24);
/// The default subnet of IPv6.
pub const SUBNET6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfdc4, 0xf303, 0x9324, 0, 0, 0, 0, 0), 64);

/// Other private subnets of IPv6 (RFC 4193), for hosts on which a route covers the default one.
pub const OTHER_SUBNETS6: [Ipv6Net; 3] = [
    Ipv6Net::new_assert(Ipv6Addr::new(0xfd9a, 0x6c1e, 0x27b8, 0, 0, 0, 0, 0), 64),
    Ipv6Net::new_assert(Ipv6Addr::new(0xfd31, 0xb7d4, 0x805f, 0, 0, 0, 0, 0), 64),
    Ipv6Net::new_assert(Ipv6Addr::new(0xfde6, 0x4a93, 0xf16c, 0, 0, 0, 0, 0), 64),
];

/// Other private subnets, for hosts on which a route covers the default one.
pub const OTHER_SUBNETS: [Ipv4Net; 4] = [
    Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 127, 0), 24),
    Ipv4Net::new_assert(Ipv4Addr::new(172, 30, 65, 0), 24),
    Ipv4Net::new_assert(Ipv4Addr::new(10, 165, 65, 0), 24),
    Ipv4Net::new_assert(Ipv4Addr::new(100, 115, 92, 0), 24),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::egress::Rule;
    use std::net::IpAddr;

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    pub fn addresses() -> Addresses {
        let v4 = Family {
            subnet: SUBNET.into(),
            gateway: address("192.168.65.1"),
            host: address("192.168.65.254"),
            guest: address("192.168.65.3"),
        };
        let v6 = Family {
            subnet: SUBNET6.into(),
            gateway: address("fdc4:f303:9324::1"),
            host: address("fdc4:f303:9324::254"),
            guest: address("fdc4:f303:9324::3"),
        };
        Addresses {
            gateway_mac: Mac([0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd]),
            v4: Some(v4),
            v6: Some(v6),
            global_prefix: Some("2001:db8:1::/64".parse().unwrap()),
            host_loopback: true,
            host_addresses: true,
            metadata: false,
            guest_api: false,
            egress: std::sync::Arc::default(),
            proxy: None,
            transparent: crate::policy::proxy::TransparentPorts::default(),
            snat_from: vec!["203.0.113.0/24".parse().unwrap()],
            own: vec![address("203.0.113.5")],
            outbound: crate::policy::outbound::Outbound::default(),
        }
    }

    #[test]
    fn a_guest_speaks_only_for_itself() {
        let addresses = addresses();
        for (source, allowed) in [
            ("192.168.65.3", true),
            ("192.168.65.4", false),
            ("192.168.65.1", false),
            ("10.0.0.1", false),
            ("127.0.0.1", false),
            ("fdc4:f303:9324::3", true),
            ("fdc4:f303:9324:0:1:2:3:4", true),
            ("fdc4:f303:9324::1", false),
            ("fdc4:f303:9324::254", false),
            ("2001:db8:1::77", true),
            ("2001:db8:2::77", false),
            ("fe80::1234", true),
        ] {
            assert_eq!(addresses.may_send_from(address(source)), allowed, "{source}");
        }
        assert!(!addresses.may_send_from(addresses.gateway_link_local()));
    }

    #[test]
    fn each_destination_means_what_the_design_says() {
        use Destination::{Gateway, Host, Outside};
        let mut addresses = addresses();
        for (destination, expected) in [
            ("192.168.65.1", Ok(Gateway)),
            ("fdc4:f303:9324::1", Ok(Gateway)),
            ("192.168.65.254", Ok(Host)),
            ("fdc4:f303:9324::254", Ok(Host)),
            ("198.51.100.1", Ok(Outside)),
            ("2001:db8::1", Ok(Outside)),
            ("203.0.113.5", Ok(Outside)),
            ("127.0.0.1", Err(DropReason::Martian)),
            ("0.0.0.0", Err(DropReason::Martian)),
            ("::1", Err(DropReason::Martian)),
            ("224.0.0.251", Err(DropReason::Multicast)),
            ("255.255.255.255", Err(DropReason::Multicast)),
            ("192.168.65.255", Err(DropReason::Multicast)),
            ("ff02::1", Err(DropReason::Multicast)),
            ("169.254.169.254", Err(DropReason::Policy)),
            ("fd00:ec2::254", Err(DropReason::Policy)),
            ("169.254.1.1", Err(DropReason::LinkLocal)),
            ("fe80::9", Err(DropReason::LinkLocal)),
            ("192.168.65.77", Err(DropReason::Policy)),
        ] {
            assert_eq!(addresses.classify(address(destination)), expected, "{destination}");
        }
        assert_eq!(addresses.classify(addresses.gateway_link_local()), Ok(Gateway));
        addresses.metadata = true;
        assert_eq!(addresses.classify(address("169.254.169.254")), Ok(Outside));
        addresses.host_addresses = false;
        assert_eq!(addresses.classify(address("203.0.113.5")), Err(DropReason::Policy));
        addresses.host_loopback = false;
        assert_eq!(addresses.classify(address("192.168.65.254")), Err(DropReason::Policy));
    }

    #[test]
    fn rules_decide_about_what_could_be_reached() {
        let mut addresses = addresses();
        let admits = |addresses: &Addresses, text: &str, port, protocol| {
            let remote = Endpoint { address: address(text), port };
            let means = addresses.classify(remote.address).unwrap();
            addresses.admit(remote, means, protocol).is_ok()
        };
        assert!(admits(&addresses, "198.51.100.1", 53, TargetProtocol::Udp));
        let texts =
            ["allow ok.test", "allow 198.51.100.0/24:53/udp", "allow host.docker.internal:5000", "deny *"];
        let rules = texts.iter().map(|text| text.parse().unwrap()).collect();
        addresses.egress = Arc::new(Rules::of_guest(rules, None).unwrap());
        for (text, port, protocol, expected) in [
            ("198.51.100.1", 53, TargetProtocol::Udp, true),
            ("198.51.100.1", 54, TargetProtocol::Udp, false),
            ("198.51.100.1", 0, TargetProtocol::Icmp, false),
            ("2001:db8::1", 53, TargetProtocol::Udp, false),
            ("192.168.65.254", 5000, TargetProtocol::Udp, true),
            ("192.168.65.254", 5001, TargetProtocol::Udp, false),
            ("192.168.65.1", 53, TargetProtocol::Udp, true),
            ("fdc4:f303:9324::1", 0, TargetProtocol::Icmp, true),
        ] {
            assert_eq!(admits(&addresses, text, port, protocol), expected, "{text} {port}");
        }
        assert_eq!(addresses.egress.iter().map(Rule::refusals).sum::<u64>(), 4);
    }

    #[test]
    fn a_client_keeps_its_source_where_the_guest_can_answer_it() {
        let addresses = addresses();
        for (client, kept) in [
            ("198.51.100.1", true),
            ("10.1.2.3", true),
            ("127.0.0.1", false),
            ("192.168.65.9", false),
            ("169.254.3.4", false),
            ("::1", false),
            ("fe80::1", false),
            ("2001:db8::1", true),
            ("203.0.113.9", false),
        ] {
            assert_eq!(addresses.may_keep_source(address(client)), kept, "{client}");
        }
    }
}
