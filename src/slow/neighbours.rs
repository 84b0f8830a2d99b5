//! Neighbours: ARP (RFC 826), neighbour discovery and router advertisements (RFC 4861).
//!
//! The link has two stations. The gateway's MAC answers for the addresses that are hythe's own, the gateway's and the
//! host's, and for nothing else:
//! * never for the guest's own address, so that its probe for duplicates (RFC 5227; RFC 4862, 5.4) finds it free;
//! * not for other addresses of the subnet: nobody is there, and a guest that asks learns it at once;
//! * not for addresses outside the subnet (proxy ARP): a guest that takes them for neighbours is configured wrongly.
//!
//! Pure: a frame in, the answering frame out. The worker has compared the frame's source MAC with the guest's and has
//! verified its checksum.

use std::net::{IpAddr, Ipv6Addr};

use etherparse::icmpv6::{NdpOptionSlice, NdpOptionsIterator, PrefixInformation};
use etherparse::{ArpEthIpv4Packet, ArpOperation, ArpPacketSlice};
use hickory_proto::rr::Name;
use hickory_proto::serialize::binary::{BinEncodable, BinEncoder, NameEncoding};
use ipnet::{IpNet, Ipv6Net};

use crate::frame::address::{Address, Mac};
use crate::frame::build::{self, Route};
use crate::frame::view::{Content, ETHERNET_LEN, IpHead, Packet, Transport, View};
use crate::policy::addresses::Addresses;

/// Advertisements must be repeated at least this often, in seconds (RFC 4861, 6.2.1: `MaxRtrAdvInterval`): the guest
/// forgets its default route [`ROUTER_LIFETIME_S`] after the last one.
pub const ADVERTISEMENT_INTERVAL_S: u64 = 600;

/// How long the guest may use the gateway as its router and DNS server without hearing of it again (RFC 4861, 6.2.1;
/// RFC 8106, 5.1: three intervals).
const ROUTER_LIFETIME_S: u16 = 1800;

/// Lifetimes of addresses. RFC 9096 (`ND_PREFERRED_LIMIT`, `ND_VALID_LIMIT`): short, so that a guest that outlives this
/// hythe does not keep the addresses of a subnet that is gone for a week.
const PREFERRED_LIFETIME_S: u32 = 2700;
const VALID_LIFETIME_S: u32 = 5400;

/// RFC 4861, 6.1.1 and 7.1: a message of neighbour discovery that passed a router has fewer than 255 hops left.
const HOP_LIMIT: u8 = 255;

/// `ff02::1`, all nodes of the link, and its MAC (RFC 2464, 7).
const ALL_NODES: Address = Address::of_v6(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1));
const ALL_NODES_MAC: Mac = Mac([0x33, 0x33, 0, 0, 0, 1]);

/// Bytes of search domains that are told by one message: what `resolv.conf` can hold (256 characters) and no packet
/// is filled by.
const SEARCH_MAX: usize = 256;
/// Domains that are remembered to be withdrawn.
const WITHDRAWN_MAX: usize = 32;

const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;

/// What the guest is told about the link besides its addresses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RouterConfig {
    /// The MTU of the link in bytes.
    pub mtu: u16,
    /// Domains in which the guest looks for short names.
    pub search: Vec<Name>,
    /// Domains in which it is to look no more.
    pub withdrawn: Vec<Name>,
    /// Whether the host has a route for IPv6.
    pub has_route: bool,
}

impl RouterConfig {
    /// The guest is to look for short names in these domains from now on, and not any more in those that it was told before.
    pub fn search_in(&mut self, search: Vec<Name>) {
        let before = std::mem::replace(&mut self.search, search);
        // The latest first, if there is not room for all.
        self.withdrawn = [before, std::mem::take(&mut self.withdrawn)].concat();
        self.withdrawn.retain(|domain| !self.search.contains(domain));
        self.withdrawn.truncate(WITHDRAWN_MAX);
    }
}

/// A message of neighbour discovery that the guest may send.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Discovery {
    RouterSolicitation,
    NeighbourSolicitation { target: Address },
    NeighbourAdvertisement { target: Address },
}

/// Answers an ARP request, a neighbour solicitation or a router solicitation of the guest's, if it is to be answered.
pub fn answer(addresses: &Addresses, config: &RouterConfig, guest_mac: Mac, frame: &[u8]) -> Option<Vec<u8>> {
    match View::parse(frame, frame.len()).ok()?.content {
        Content::Arp(packet) => answer_arp(addresses, guest_mac, packet),
        Content::Ip(packet) => match parse_discovery(&packet)? {
            Discovery::RouterSolicitation => {
                let (to, mac, _) = asker(addresses, guest_mac, packet.ip.source)?;
                advertise_router(addresses, config, to, mac)
            }
            Discovery::NeighbourSolicitation { target } => {
                answer_solicitation(addresses, guest_mac, packet.ip.source, target)
            }
            Discovery::NeighbourAdvertisement { .. } => None,
        },
    }
}

/// The router advertisement for all nodes: to be sent every [`ADVERTISEMENT_INTERVAL_S`]. `None` where IPv6 is off.
pub fn router_advertisement(addresses: &Addresses, config: &RouterConfig) -> Option<Vec<u8>> {
    advertise_router(addresses, config, ALL_NODES, ALL_NODES_MAC)
}

/// An address of the link's subnet that the guest uses, as a frame of its shows: the sender of ARP, the source of a
/// solicitation, the target of a probe for duplicates or of an advertisement. Connections to published ports go there.
pub fn learn(addresses: &Addresses, frame: &[u8]) -> Option<Address> {
    let candidate = match View::parse(frame, frame.len()).ok()?.content {
        Content::Arp(packet) => Address::v4(parse_arp(packet)?.sender_ipv4),
        Content::Ip(packet) => match parse_discovery(&packet)? {
            // RFC 4862, 5.4.2: an address that is being probed for. Nobody else on the link could have it.
            Discovery::NeighbourSolicitation { target } if is_unspecified(packet.ip.source) => target,
            Discovery::NeighbourAdvertisement { target } => target,
            Discovery::NeighbourSolicitation { .. } | Discovery::RouterSolicitation => packet.ip.source,
        },
    };
    let subnet = addresses.family(candidate.is_v4())?.subnet;
    // RFC 4291, 2.6.1: the subnet's first address means its routers, not a station.
    let usable = subnet.contains(&candidate.ip()) && candidate.ip() != subnet.network();
    (usable && addresses.may_send_from(candidate)).then_some(candidate)
}

fn parse_arp(packet: &[u8]) -> Option<ArpEthIpv4Packet> {
    ArpPacketSlice::from_slice(packet).ok()?.to_packet().try_eth_ipv4().ok()
}

fn answer_arp(addresses: &Addresses, guest_mac: Mac, packet: &[u8]) -> Option<Vec<u8>> {
    let request = parse_arp(packet)?;
    let family = addresses.v4.as_ref()?;
    let target = Address::v4(request.target_ipv4);
    // The sender's IP address does not matter: a probe has none (RFC 5227, 2.1.1), a guest with networks of its own may
    // ask from one of those, and one that claims the gateway's address learns of the conflict by the answer.
    let for_us = request.operation == ArpOperation::REQUEST
        && request.sender_mac == guest_mac.0
        && (target == family.gateway || target == family.host);
    let reply = ArpEthIpv4Packet {
        operation: ArpOperation::REPLY,
        sender_mac: addresses.gateway_mac.0,
        sender_ipv4: request.target_ipv4,
        target_mac: request.sender_mac,
        target_ipv4: request.sender_ipv4,
    };
    for_us.then(|| [&guest_mac.0[..], &addresses.gateway_mac.0, &[0x08, 0x06], &reply.to_bytes()].concat())
}

/// Reads a message of neighbour discovery and checks what RFC 4861 tells its receiver to check (6.1.1, 7.1.1, 7.1.2).
fn parse_discovery(packet: &Packet<'_>) -> Option<Discovery> {
    let Transport::Icmp(message) = packet.transport else { return None };
    let &[kind, code, _, _, flags, ..] = message else { return None };
    // RFC 6980, 5: not in fragments, not even in one that is whole. Nothing puts other extension headers here.
    let direct = packet.transport_start == ETHERNET_LEN + 40 && packet.transport_len == message.len();
    if packet.ip.source.is_v4() || !direct || packet.ip.hop_limit != HOP_LIMIT || code != 0 {
        return None;
    }
    let target = || {
        let bytes: [u8; 16] = message.get(8..24)?.try_into().ok()?;
        let target = Address::v6(bytes);
        (!target.is_multicast() && !target.is_v4()).then_some(target)
    };
    let (discovery, options) = match kind {
        ROUTER_SOLICITATION => (Discovery::RouterSolicitation, message.get(8..)?),
        NEIGHBOUR_SOLICITATION => {
            (Discovery::NeighbourSolicitation { target: target()? }, message.get(24..)?)
        }
        NEIGHBOUR_ADVERTISEMENT => {
            (Discovery::NeighbourAdvertisement { target: target()? }, message.get(24..)?)
        }
        _ => return None,
    };
    let mut names_source = false;
    for option in NdpOptionsIterator::from_slice(options) {
        names_source |= matches!(option.ok()?, NdpOptionSlice::SourceLinkLayerAddress(_));
    }
    let solicited = flags & 0x40 != 0;
    let sound = match discovery {
        // Who has no address yet names no MAC for it, and asks only those who could have the target.
        Discovery::NeighbourSolicitation { target } if is_unspecified(packet.ip.source) => {
            !names_source && packet.ip.destination == solicited_node(target)
        }
        Discovery::RouterSolicitation if is_unspecified(packet.ip.source) => !names_source,
        Discovery::NeighbourAdvertisement { .. } => !(solicited && packet.ip.destination.is_multicast()),
        _ => true,
    };
    sound.then_some(discovery)
}

fn answer_solicitation(
    addresses: &Addresses,
    guest_mac: Mac,
    source: Address,
    target: Address,
) -> Option<Vec<u8>> {
    let family = addresses.v6.as_ref()?;
    let is_router = target == family.gateway || target == addresses.gateway_link_local();
    if !is_router && target != family.host {
        return None;
    }
    let (to, to_mac, solicited) = asker(addresses, guest_mac, source)?;
    // RFC 4861, 4.4: Router, Solicited, and Override, since no other station may answer for the target.
    let flags = (u8::from(is_router) << 7) | (u8::from(solicited) << 6) | 0x20;
    let message = [
        &[NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0][..],
        &target.octets(),
        &[2, 1],
        &addresses.gateway_mac.0,
    ]
    .concat();
    Some(icmp_frame(&route(addresses, target, to, to_mac), &message))
}

/// Where the answer to a question goes, and whether it is an answer to somebody. RFC 4861, 7.2.4: who asks without an
/// address is answered by a word to all. `None` for an address that is not the guest's.
fn asker(addresses: &Addresses, guest_mac: Mac, source: Address) -> Option<(Address, Mac, bool)> {
    if is_unspecified(source) {
        Some((ALL_NODES, ALL_NODES_MAC, false))
    } else {
        addresses.may_send_from(source).then_some((source, guest_mac, true))
    }
}

fn advertise_router(
    addresses: &Addresses,
    config: &RouterConfig,
    to: Address,
    to_mac: Mac,
) -> Option<Vec<u8>> {
    let family = addresses.v6.as_ref()?;
    let IpNet::V6(subnet) = family.subnet else { return None };
    // RFC 4861, 6.2.3: a router with lifetime zero is no default router, while everything else that it says holds.
    let lifetime = if config.has_route { ROUTER_LIFETIME_S } else { 0 };
    let [lifetime_high, lifetime_low] = lifetime.to_be_bytes();
    // Hop limit 64; not Managed (addresses are the guest's own choice) but Other (DHCPv6 has the rest, and an address
    // for those that ask); no reachable time, no retransmission timer.
    let mut message = vec![ROUTER_ADVERTISEMENT, 0, 0, 0, 64, 0x40, lifetime_high, lifetime_low];
    message.extend([0; 8]);
    message.extend([1, 1]);
    message.extend(addresses.gateway_mac.0);
    message.extend([5, 1, 0, 0]);
    message.extend(u32::from(config.mtu).to_be_bytes());
    message.extend(prefix_option(subnet, true));
    // Not on-link: other addresses of the host's own prefix are reached through the gateway.
    message.extend(addresses.global_prefix.map(|prefix| prefix_option(prefix, false)).into_iter().flatten());
    message.extend([25, 3, 0, 0]);
    message.extend(u32::from(ROUTER_LIFETIME_S).to_be_bytes());
    message.extend(family.gateway.octets());
    // RFC 8106, 5.2: what is told with a lifetime of zero is not to be used any more.
    for (domains, lifetime_s) in [(&config.search, ROUTER_LIFETIME_S), (&config.withdrawn, 0)] {
        let names = uncompressed(domains);
        if !names.is_empty() {
            let units = 1 + names.len().div_ceil(8);
            let end = message.len() + units * 8;
            message.extend([31, units as u8, 0, 0]);
            message.extend(u32::from(lifetime_s).to_be_bytes());
            message.extend(names);
            message.resize(end, 0);
        }
    }
    let source = addresses.gateway_link_local();
    Some(icmp_frame(&route(addresses, source, to, to_mac), &message))
}

fn prefix_option(prefix: Ipv6Net, on_link: bool) -> [u8; PrefixInformation::LEN] {
    let information = PrefixInformation {
        prefix_length: prefix.prefix_len(),
        on_link,
        // RFC 4862, 5.5.3 (d): an interface identifier has 64 bits; with another prefix no address can be made.
        autonomous_address_configuration: prefix.prefix_len() == 64,
        valid_lifetime: VALID_LIFETIME_S,
        preferred_lifetime: PREFERRED_LIFETIME_S,
        prefix: prefix.network().octets(),
    };
    information.to_bytes()
}

/// The domains of a list that are DNS names. What else a configuration may hold no guest could use.
pub fn search_names(domains: &[String]) -> Vec<Name> {
    domains.iter().filter_map(|domain| Name::from_utf8(domain).ok()).collect()
}

/// Names as RFC 8106 (5.2) and RFC 8415 (10) want them, uncompressed; as many as fit into [`SEARCH_MAX`].
pub(super) fn uncompressed(names: &[Name]) -> Vec<u8> {
    let mut all = Vec::new();
    for name in names.iter().filter(|name| name.iter().next().is_some()) {
        let mut bytes = Vec::new();
        let mut encoder = BinEncoder::new(&mut bytes);
        encoder.set_name_encoding(NameEncoding::Uncompressed);
        if name.emit(&mut encoder).is_ok() && all.len() + bytes.len() <= SEARCH_MAX {
            all.extend(bytes);
        }
    }
    all
}

fn route(addresses: &Addresses, source: Address, destination: Address, destination_mac: Mac) -> Route {
    let ip = IpHead { source, destination, hop_limit: HOP_LIMIT, traffic_class: 0, dont_fragment: true };
    Route { source_mac: addresses.gateway_mac, destination_mac, ip }
}

/// A whole frame with an ICMP message of either family, whose checksum is filled in.
pub(super) fn icmp_frame(route: &Route, message: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; ETHERNET_LEN + 40 + message.len()];
    let len = build::icmp(&mut frame, route, message);
    frame.truncate(len);
    frame
}

fn is_unspecified(address: Address) -> bool {
    matches!(address.ip(), IpAddr::V6(ip) if ip.is_unspecified())
}

/// The group that a station with this address listens to (RFC 4291, 2.7.1).
fn solicited_node(target: Address) -> Address {
    let [.., a, b, c] = target.octets();
    Address::v6([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c])
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::frame::checksum;
    use crate::policy::addresses::{Family, SUBNET, SUBNET6, link_local};
    use proptest::prelude::*;

    pub const GUEST_MAC: Mac = Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56]);

    pub fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    /// The default addresses of a link, without a global prefix.
    pub fn addresses() -> Addresses {
        let family = |subnet, gateway, host, guest| Family {
            subnet,
            gateway: address(gateway),
            host: address(host),
            guest: address(guest),
        };
        Addresses {
            gateway_mac: Mac([0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd]),
            v4: Some(family(SUBNET.into(), "192.168.65.1", "192.168.65.254", "192.168.65.3")),
            v6: Some(family(SUBNET6.into(), "fdc4:f303:9324::1", "fdc4:f303:9324::254", "fdc4:f303:9324::3")),
            global_prefix: None,
            host_loopback: true,
            host_addresses: true,
            metadata: false,
            guest_api: false,
            egress: std::sync::Arc::default(),
            proxy: None,
            transparent: crate::policy::proxy::TransparentPorts::default(),
            snat_from: Vec::new(),
            own: Vec::new(),
            outbound: crate::policy::outbound::Outbound::default(),
        }
    }

    /// Whether the checksum of an ICMP message of either family is right.
    pub fn checksum_is_right(packet: &Packet<'_>) -> bool {
        let Transport::Icmp(message) = packet.transport else { return false };
        let sum = if packet.ip.source.is_v4() {
            checksum::Sum::default()
        } else {
            checksum::pseudo_header(packet.ip.source, packet.ip.destination, 58, message.len())
        };
        sum.with(message).partial() == 0xffff
    }

    fn config() -> RouterConfig {
        RouterConfig {
            mtu: 1500,
            search: vec![Name::from_ascii("corp.example.com").unwrap()],
            withdrawn: Vec::new(),
            has_route: true,
        }
    }

    fn arp(operation: u16, sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
        let packet = ArpEthIpv4Packet {
            operation: ArpOperation(operation),
            sender_mac: GUEST_MAC.0,
            sender_ipv4: sender,
            target_mac: [0; 6],
            target_ipv4: target,
        };
        [&[0xff; 6][..], &GUEST_MAC.0, &[8, 6], &packet.to_bytes()].concat()
    }

    fn ask_arp(frame: &[u8]) -> Option<ArpEthIpv4Packet> {
        let answer = answer(&addresses(), &config(), GUEST_MAC, frame)?;
        assert_eq!(answer[..12], [&GUEST_MAC.0[..], &addresses().gateway_mac.0].concat());
        assert_eq!(answer[12..14], [8, 6]);
        Some(parse_arp(&answer[14..]).unwrap())
    }

    #[test]
    fn arp_finds_the_gateway_and_the_host_at_the_gateways_mac() {
        for target in [[192, 168, 65, 1], [192, 168, 65, 254]] {
            let reply = ask_arp(&arp(1, [192, 168, 65, 3], target)).unwrap();
            let expected = ArpEthIpv4Packet {
                operation: ArpOperation::REPLY,
                sender_mac: addresses().gateway_mac.0,
                sender_ipv4: target,
                target_mac: GUEST_MAC.0,
                target_ipv4: [192, 168, 65, 3],
            };
            assert_eq!(reply, expected);
        }
    }

    #[test]
    fn arp_finds_nobody_at_the_guests_own_address_nor_elsewhere() {
        for target in [[192, 168, 65, 3], [192, 168, 65, 77], [192, 168, 65, 255], [8, 8, 8, 8], [0; 4]] {
            for sender in [[0; 4], [192, 168, 65, 3]] {
                assert_eq!(ask_arp(&arp(1, sender, target)), None, "{target:?}");
            }
        }
    }

    /// RFC 5227, 2.1.1: a probe has the sender 0.0.0.0; somebody who has the address defends it.
    #[test]
    fn a_probe_for_the_gateways_address_meets_its_defence() {
        assert_eq!(ask_arp(&arp(1, [0; 4], [192, 168, 65, 1])).unwrap().target_ipv4, [0; 4]);
    }

    #[test]
    fn arp_replies_and_packets_in_another_stations_name_are_not_answered() {
        assert_eq!(ask_arp(&arp(2, [192, 168, 65, 3], [192, 168, 65, 1])), None);
        let mut frame = arp(1, [192, 168, 65, 3], [192, 168, 65, 1]);
        frame[ETHERNET_LEN + 8] ^= 2;
        assert_eq!(ask_arp(&frame), None);
        let mut off = addresses();
        off.v4 = None;
        let frame = arp(1, [192, 168, 65, 3], [192, 168, 65, 1]);
        assert_eq!(answer(&off, &config(), GUEST_MAC, &frame), None);
    }

    fn discovery(source: &str, destination: &str, hop_limit: u8, message: &[u8]) -> Vec<u8> {
        let (source, destination) = (address(source), address(destination));
        let ip = IpHead { source, destination, hop_limit, traffic_class: 0, dont_fragment: true };
        let destination_mac = Mac([0x33, 0x33, 0xff, 0, 0, 1]);
        icmp_frame(&Route { source_mac: GUEST_MAC, destination_mac, ip }, message)
    }

    fn solicitation(target: &str, options: &[u8]) -> Vec<u8> {
        [&[NEIGHBOUR_SOLICITATION, 0, 0, 0, 0, 0, 0, 0][..], &address(target).octets(), options].concat()
    }

    fn ask(frame: &[u8]) -> Option<(IpHead, Mac, Vec<u8>)> {
        let answer = answer(&addresses(), &config(), GUEST_MAC, frame)?;
        let view = View::parse(&answer, answer.len()).unwrap();
        let Content::Ip(packet) = view.content else { panic!("{view:?}") };
        assert_eq!(view.source_mac, addresses().gateway_mac);
        assert_eq!(packet.ip.hop_limit, 255);
        assert_eq!(packet.transport_start + packet.transport_len, answer.len());
        assert!(checksum_is_right(&packet));
        let Transport::Icmp(message) = packet.transport else { panic!("{packet:?}") };
        Some((packet.ip, view.destination_mac, message.to_vec()))
    }

    const GUEST: &str = "fdc4:f303:9324::3";
    const SOURCE_MAC: [u8; 8] = [1, 1, 0x52, 0x54, 0, 0x12, 0x34, 0x56];

    #[test]
    fn a_solicitation_finds_the_addresses_of_hythe() {
        let gateway_link_local = addresses().gateway_link_local().to_string();
        for (target, flags) in
            [("fdc4:f303:9324::1", 0xe0), ("fdc4:f303:9324::254", 0x60), (gateway_link_local.as_str(), 0xe0)]
        {
            let frame = discovery(GUEST, "ff02::1:ff00:1", 255, &solicitation(target, &SOURCE_MAC));
            let (ip, mac, message) = ask(&frame).unwrap();
            assert_eq!((ip.source, ip.destination, mac), (address(target), address(GUEST), GUEST_MAC));
            assert_eq!((message[0], message[1], message[4]), (NEIGHBOUR_ADVERTISEMENT, 0, flags));
            assert_eq!(message[8..24], address(target).octets());
            assert_eq!(message[24..], [&[2, 1][..], &addresses().gateway_mac.0].concat());
        }
    }

    #[test]
    fn a_solicitation_from_the_guests_link_local_address_is_answered_there() {
        let guest = link_local(GUEST_MAC).to_string();
        let frame = discovery(&guest, "fdc4:f303:9324::1", 255, &solicitation("fdc4:f303:9324::1", &[]));
        assert_eq!(ask(&frame).unwrap().0.destination, link_local(GUEST_MAC));
    }

    #[test]
    fn a_probe_for_the_guests_own_address_finds_it_free() {
        for target in [GUEST, "fdc4:f303:9324::77", "fe80::5054:ff:fe12:3456", "2001:db8::1"] {
            let group = solicited_node(address(target)).to_string();
            assert_eq!(ask(&discovery("::", &group, 255, &solicitation(target, &[]))), None, "{target}");
        }
    }

    /// RFC 4862, 5.4.3 with RFC 4861, 7.2.4: the answer to a probe goes to all nodes and is not "solicited".
    #[test]
    fn a_probe_for_an_address_of_hythe_meets_its_defence() {
        for (target, flags) in [("fdc4:f303:9324::1", 0xa0), ("fdc4:f303:9324::254", 0x20)] {
            let group = solicited_node(address(target)).to_string();
            let (ip, mac, message) = ask(&discovery("::", &group, 255, &solicitation(target, &[]))).unwrap();
            assert_eq!((ip.source, ip.destination, mac), (address(target), ALL_NODES, ALL_NODES_MAC));
            assert_eq!(message[4], flags);
        }
    }

    /// RFC 4861, 7.1.1.
    #[test]
    fn a_solicitation_that_no_neighbour_may_send_is_not_answered() {
        let target = "fdc4:f303:9324::1";
        let sound = solicitation(target, &SOURCE_MAC);
        assert!(ask(&discovery(GUEST, target, 255, &sound)).is_some());
        assert_eq!(ask(&discovery(GUEST, target, 254, &sound)), None, "came from afar");
        assert_eq!(ask(&discovery(GUEST, target, 255, &sound[..23])), None, "short");
        assert_eq!(ask(&discovery(GUEST, target, 255, &sound[..30])), None, "cut in an option");
        assert_eq!(ask(&discovery("2001:db8::9", target, 255, &sound)), None, "not the guest's address");
        assert_eq!(ask(&discovery(target, target, 255, &sound)), None, "the gateway's own address");
        let mut coded = sound.clone();
        coded[1] = 1;
        assert_eq!(ask(&discovery(GUEST, target, 255, &coded)), None, "code");
        let empty_option = solicitation(target, &[1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(ask(&discovery(GUEST, target, 255, &empty_option)), None, "an option of length zero");
        assert_eq!(ask(&discovery("::", "ff02::1:ff00:1", 255, &sound)), None, "a MAC without an address");
        let probe = solicitation(target, &[]);
        assert_eq!(ask(&discovery("::", "ff02::1", 255, &probe)), None, "a probe to all");
        let group = solicitation("ff02::1", &[]);
        assert_eq!(ask(&discovery(GUEST, "ff02::1", 255, &group)), None, "a group as target");
    }

    /// RFC 6980, 5.
    #[test]
    fn a_solicitation_in_a_fragment_header_is_not_answered() {
        let mut frame = discovery(GUEST, "fdc4:f303:9324::1", 255, &solicitation("fdc4:f303:9324::1", &[]));
        let at = ETHERNET_LEN + 40;
        frame.splice(at..at, [58, 0, 0, 0, 0, 0, 0, 9]);
        frame[ETHERNET_LEN + 5] += 8;
        frame[ETHERNET_LEN + 6] = 44;
        assert!(View::parse(&frame, frame.len()).is_ok());
        assert_eq!(ask(&frame), None);
    }

    const ROUTERS: &str = "ff02::2";

    fn advertised(addresses: &Addresses, config: &RouterConfig) -> Vec<u8> {
        let frame = router_advertisement(addresses, config).unwrap();
        let view = View::parse(&frame, frame.len()).unwrap();
        let Content::Ip(packet) = view.content else { panic!("{view:?}") };
        assert!(checksum_is_right(&packet));
        assert_eq!(packet.ip.source, addresses.gateway_link_local());
        assert_eq!((packet.ip.destination, view.destination_mac), (ALL_NODES, ALL_NODES_MAC));
        frame[packet.transport_start..].to_vec()
    }

    fn option(message: &[u8], kind: u8) -> Vec<Vec<u8>> {
        let options = NdpOptionsIterator::from_slice(&message[16..]).map(|option| option.unwrap());
        options.map(|option| option.as_bytes().to_vec()).filter(|bytes| bytes[0] == kind).collect()
    }

    #[test]
    fn a_router_advertisement_says_what_the_link_is() {
        let message = advertised(&addresses(), &config());
        assert_eq!(message[..2], [ROUTER_ADVERTISEMENT, 0]);
        assert_eq!((message[4], message[5]), (64, 0x40));
        assert_eq!(u16::from_be_bytes([message[6], message[7]]), 1800);
        assert_eq!(option(&message, 1), [[&[1, 1][..], &addresses().gateway_mac.0].concat()]);
        assert_eq!(option(&message, 5), [[5, 1, 0, 0, 0, 0, 5, 220]]);
        let [prefix] = &option(&message, 3)[..] else { panic!("one prefix") };
        let prefix = PrefixInformation::from_slice(prefix).unwrap();
        assert_eq!((prefix.prefix_length, prefix.prefix), (64, SUBNET6.network().octets()));
        assert!(prefix.on_link && prefix.autonomous_address_configuration);
        assert!(prefix.preferred_lifetime <= prefix.valid_lifetime);
        assert_eq!(option(&message, 25)[0][8..], address("fdc4:f303:9324::1").octets());
        let [search] = &option(&message, 31)[..] else { panic!("one list of domains") };
        assert_eq!(search[8..], *b"\x04corp\x07example\x03com\0\0\0\0\0\0\0");
    }

    /// RFC 4861, 6.2.3.
    #[test]
    fn without_a_route_the_gateway_is_no_default_router_but_still_serves_names() {
        let message =
            advertised(&addresses(), &RouterConfig { has_route: false, search: vec![], ..config() });
        assert_eq!(message[6..8], [0, 0]);
        assert_eq!(option(&message, 25)[0][4..8], 1800u32.to_be_bytes());
        assert_eq!(option(&message, 3).len(), 1);
        assert_eq!(option(&message, 31).len(), 0);
    }

    #[test]
    fn a_global_prefix_is_for_addresses_but_not_on_the_link() {
        let mut addresses = addresses();
        addresses.global_prefix = Some("2001:db8:1::/64".parse().unwrap());
        let message = advertised(&addresses, &config());
        let prefix = PrefixInformation::from_slice(&option(&message, 3)[1]).unwrap();
        assert_eq!(prefix.prefix, address("2001:db8:1::").octets());
        assert_eq!((prefix.on_link, prefix.autonomous_address_configuration), (false, true));
    }

    /// RFC 8106, 5.2.
    #[test]
    fn a_domain_that_is_searched_no_more_is_withdrawn() {
        let name = |text: &str| Name::from_ascii(text).unwrap();
        let mut config = config();
        config.search_in(vec![name("vpn.example"), name("corp.example.com")]);
        config.search_in(vec![name("corp.example.com")]);
        let [searched, withdrawn] = &option(&advertised(&addresses(), &config), 31)[..] else {
            panic!("two lists")
        };
        assert_eq!(
            (&searched[4..8], &searched[8..]),
            (&1800u32.to_be_bytes()[..], &b"\x04corp\x07example\x03com\0\0\0\0\0\0\0"[..])
        );
        assert_eq!((&withdrawn[4..8], &withdrawn[8..]), (&[0; 4][..], &b"\x03vpn\x07example\0\0\0\0"[..]));
        config.search_in(vec![name("vpn.example")]);
        assert_eq!(
            (config.search, config.withdrawn),
            (vec![name("vpn.example")], vec![name("corp.example.com")])
        );
    }

    #[test]
    fn search_domains_never_overfill_an_advertisement() {
        let search = (0..400).map(|i| Name::from_ascii(format!("d{i}.example")).unwrap());
        let search = std::iter::once(Name::root()).chain(search).collect();
        let message = advertised(&addresses(), &RouterConfig { search, ..config() });
        assert!(message.len() < 1280 - 40);
        assert!(option(&message, 31)[0].starts_with(&[31]));
    }

    #[test]
    fn a_router_solicitation_is_answered_to_its_sender_or_to_all() {
        let sound = [&[ROUTER_SOLICITATION, 0, 0, 0, 0, 0, 0, 0][..], &SOURCE_MAC].concat();
        let guest = link_local(GUEST_MAC).to_string();
        let (ip, mac, message) = ask(&discovery(&guest, ROUTERS, 255, &sound)).unwrap();
        assert_eq!((ip.destination, mac, message[0]), (link_local(GUEST_MAC), GUEST_MAC, 134));
        let (ip, mac, _) = ask(&discovery("::", ROUTERS, 255, &sound[..8])).unwrap();
        assert_eq!((ip.destination, mac), (ALL_NODES, ALL_NODES_MAC));
        assert_eq!(ask(&discovery("::", ROUTERS, 255, &sound)), None, "a MAC without an address");
        assert_eq!(ask(&discovery(&guest, ROUTERS, 64, &sound)), None, "came from afar");
        assert_eq!(ask(&discovery(&guest, ROUTERS, 255, &sound[..7])), None, "short");
    }

    #[test]
    fn without_ipv6_nothing_of_it_is_answered_or_advertised() {
        let mut addresses = addresses();
        addresses.v6 = None;
        assert_eq!(router_advertisement(&addresses, &config()), None);
        let sound = [ROUTER_SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(answer(&addresses, &config(), GUEST_MAC, &discovery("::", ROUTERS, 255, &sound)), None);
    }

    #[test]
    fn an_address_that_the_guest_chose_is_learnt() {
        let chosen = "fdc4:f303:9324:0:5054:ff:fe12:3456";
        let group = solicited_node(address(chosen)).to_string();
        let learnt = |frame: &[u8]| learn(&addresses(), frame).map(|address| address.to_string());
        let probe = discovery("::", &group, 255, &solicitation(chosen, &[]));
        assert_eq!(learnt(&probe).as_deref(), Some(chosen));
        let asks = discovery(chosen, "fdc4:f303:9324::1", 255, &solicitation("fdc4:f303:9324::1", &[]));
        assert_eq!(learnt(&asks).as_deref(), Some(chosen));
        let mut says = solicitation(chosen, &[]);
        says[0] = NEIGHBOUR_ADVERTISEMENT;
        let says = discovery(GUEST, "ff02::1", 255, &says);
        assert_eq!(learnt(&says).as_deref(), Some(chosen));
        assert_eq!(learnt(&arp(1, [192, 168, 65, 3], [192, 168, 65, 1])).as_deref(), Some("192.168.65.3"));
    }

    #[test]
    fn no_address_of_others_is_learnt() {
        for chosen in [
            "fdc4:f303:9324::",
            "fdc4:f303:9324::1",
            "fdc4:f303:9324::254",
            "fe80::5054:ff:fe12:3456",
            "2001:db8::1",
        ] {
            let group = solicited_node(address(chosen)).to_string();
            let probe = discovery("::", &group, 255, &solicitation(chosen, &[]));
            assert_eq!(learn(&addresses(), &probe), None, "{chosen}");
        }
        for sender in [[192, 168, 65, 4], [192, 168, 65, 1], [0; 4], [10, 0, 0, 1]] {
            assert_eq!(learn(&addresses(), &arp(1, sender, [192, 168, 65, 1])), None, "{sender:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            answer(&addresses(), &config(), GUEST_MAC, &bytes);
            learn(&addresses(), &bytes);
        }

        #[test]
        fn no_message_of_discovery_makes_it_panic(
            kind in 133u8..138,
            rest in proptest::collection::vec(any::<u8>(), 0..120),
            unspecified: bool,
        ) {
            let message = [&[kind, 0, 0, 0][..], &rest].concat();
            let frame = discovery(if unspecified { "::" } else { GUEST }, ROUTERS, 255, &message);
            answer(&addresses(), &config(), GUEST_MAC, &frame);
            learn(&addresses(), &frame);
        }

        #[test]
        fn no_arp_packet_makes_it_panic(rest in proptest::collection::vec(any::<u8>(), 0..64), sizes: bool) {
            let mut frame = [&[0xff; 6][..], &GUEST_MAC.0, &[8, 6], &rest].concat();
            if sizes && rest.len() >= 8 {
                frame[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
            }
            answer(&addresses(), &config(), GUEST_MAC, &frame);
            learn(&addresses(), &frame);
        }
    }
}
