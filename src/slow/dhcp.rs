//! DHCP (RFC 2131) for the one guest of the link, which has one address.
//!
//! There is nothing to remember: whoever asks at the guest's MAC gets the guest's address, and a request for another is
//! refused, so that a guest that comes from another network starts over at once. DECLINE and RELEASE change nothing.
//!
//! Messages are written by `dhcproto` and read with its borrowing reader only. Its owning decoder looks into every
//! option, and asserts that some have the length they should have, which is the guest's to choose.
//!
//! Pure: a datagram's payload in, the answering frame out.

use std::net::Ipv4Addr;

use dhcproto::Encodable;
use dhcproto::v4::borrowed;
use dhcproto::v4::{DhcpOption, Flags, HType, Message, MessageType, Opcode, OptionCode};
use hickory_proto::rr::Name;
use ipnet::IpNet;

use crate::frame::address::{Address, Mac};
use crate::frame::build::{self, HEAD_MAX, Route};
use crate::frame::view::IpHead;
use crate::policy::addresses::{Addresses, Family};

const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;

/// RFC 2131, 2: what every client can take, a datagram of 576 bytes, without IP and UDP headers.
const MESSAGE_LEN: usize = 576 - 28;

/// RFC 1542, 2.1: relays and clients may drop what is shorter than a BOOTP message.
const MESSAGE_MIN: usize = 300;

/// The longest option that is not in parts (RFC 3396): a client's identifier is echoed up to this length.
const OPTION_MAX: usize = 255;

/// More resolvers than this no guest uses (`resolv.conf`).
const RESOLVERS_MAX: usize = 3;

/// What the guest is told besides its addresses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DhcpConfig {
    /// How long the guest may keep its address without asking again, in seconds.
    pub lease_s: u32,
    /// The MTU of the link in bytes.
    pub mtu: u16,
    /// The guest's host name.
    pub hostname: Option<String>,
    /// Resolvers; where there are none, the gateway.
    pub dns: Vec<Ipv4Addr>,
    /// Domains in which the guest looks for short names.
    pub search: Vec<Name>,
}

/// Answers a DHCP message of the guest's, the payload of a datagram to port 67, with a whole frame. `source_mac` is the
/// frame's, which the worker has compared with the guest's.
pub fn answer(
    addresses: &Addresses,
    config: &DhcpConfig,
    source_mac: Mac,
    payload: &[u8],
) -> Option<Vec<u8>> {
    let family = addresses.v4.as_ref()?;
    let request = Request::parse(payload).filter(|request| request.mac == source_mac)?;
    let lease = Lease::of(family)?;
    let reply = decide(&request, &lease)?;
    let message = write(&request, reply, &lease, config)?;
    let destination = destination(&request, reply, &lease);
    let destination_mac = if destination == Ipv4Addr::BROADCAST { Mac::BROADCAST } else { source_mac };
    let ip = IpHead {
        source: family.gateway,
        destination: destination.into(),
        hop_limit: 64,
        traffic_class: 0,
        dont_fragment: true,
    };
    let route = Route { source_mac: addresses.gateway_mac, destination_mac, ip };
    Some(udp_frame(&route, SERVER_PORT, CLIENT_PORT, &message))
}

/// What there is to give.
struct Lease {
    guest: Ipv4Addr,
    gateway: Ipv4Addr,
    netmask: Ipv4Addr,
    broadcast: Ipv4Addr,
}

impl Lease {
    fn of(family: &Family) -> Option<Self> {
        let IpNet::V4(subnet) = family.subnet else { return None };
        let v4 = |address: Address| Ipv4Addr::from(address.v4_octets());
        Some(Self {
            guest: v4(family.guest),
            gateway: v4(family.gateway),
            netmask: subnet.netmask(),
            broadcast: subnet.broadcast(),
        })
    }
}

/// A message of the guest's: what of it matters here.
#[derive(Debug)]
struct Request {
    kind: MessageType,
    transaction: u32,
    flags: Flags,
    /// The address that the client uses already (`ciaddr`), or 0.0.0.0.
    current: Ipv4Addr,
    mac: Mac,
    requested: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
    client_id: Option<Vec<u8>>,
    rapid_commit: bool,
    /// The longest message that the client takes, in bytes.
    message_max: usize,
}

impl Request {
    /// `None` for what is no request from a station on this very link.
    fn parse(payload: &[u8]) -> Option<Self> {
        let message = borrowed::Message::new(payload).ok()?;
        let from_ethernet =
            message.opcode() == Opcode::BootRequest && message.htype() == HType::Eth && message.hlen() == 6;
        // A relay would be a router behind the guest; the one address is the guest's own.
        if !from_ethernet || !message.giaddr().is_unspecified() {
            return None;
        }
        let mac = Mac(message.chaddr().try_into().ok()?);
        let mut request = Self {
            kind: MessageType::Unknown(0),
            transaction: message.xid(),
            flags: message.flags(),
            current: message.ciaddr(),
            mac,
            requested: None,
            server: None,
            client_id: None,
            rapid_commit: false,
            message_max: MESSAGE_LEN,
        };
        message.opts().try_for_each(|option| request.take(option.code(), option.data()))?;
        Some(request)
    }

    /// `None` for an option with a length that it cannot have.
    fn take(&mut self, code: OptionCode, data: &[u8]) -> Option<()> {
        let address = || <[u8; 4]>::try_from(data).ok().map(Ipv4Addr::from);
        match code {
            OptionCode::MessageType => self.kind = <[u8; 1]>::try_from(data).ok()?[0].into(),
            OptionCode::RequestedIpAddress => self.requested = Some(address()?),
            OptionCode::ServerIdentifier => self.server = Some(address()?),
            OptionCode::ClientIdentifier if data.len() > OPTION_MAX => return None,
            OptionCode::ClientIdentifier => self.client_id = Some(data.to_vec()),
            OptionCode::RapidCommit => self.rapid_commit = true,
            OptionCode::MaxMessageSize => {
                let len = u16::from_be_bytes(data.try_into().ok()?);
                self.message_max = usize::from(len).saturating_sub(28);
            }
            _ => {}
        }
        Some(())
    }
}

/// What is replied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Reply {
    Offer,
    /// The address, and with `rapid` that it was given without an offer (RFC 4039).
    Grant {
        rapid: bool,
    },
    /// Configuration for one that has its address from elsewhere.
    Inform,
    Refuse,
}

/// RFC 2131, 4.3.
fn decide(request: &Request, lease: &Lease) -> Option<Reply> {
    match request.kind {
        MessageType::Discover if request.rapid_commit => Some(Reply::Grant { rapid: true }),
        MessageType::Discover => Some(Reply::Offer),
        MessageType::Request => {
            let wanted = match (request.server, request.requested) {
                // 4.3.2, SELECTING: the client has chosen among offers; one for another server is none of ours.
                (Some(server), _) if server != lease.gateway => return None,
                // SELECTING, and INIT-REBOOT: the client remembers an address.
                (_, Some(requested)) => requested,
                // RENEWING and REBINDING: the client uses it.
                (_, None) if !request.current.is_unspecified() => request.current,
                _ => return None,
            };
            // INIT-REBOOT and REBINDING: the server that knows the network refuses what is wrong there.
            Some(if wanted == lease.guest { Reply::Grant { rapid: false } } else { Reply::Refuse })
        }
        MessageType::Inform => Some(Reply::Inform),
        // DECLINE: the guest's link has nobody else who could use the address, and there is no other to give. RELEASE:
        // the address stays the guest's.
        _ => None,
    }
}

/// RFC 2131, 4.1: where the reply goes.
fn destination(request: &Request, reply: Reply, lease: &Lease) -> Ipv4Addr {
    let to_all = match reply {
        Reply::Refuse => true,
        Reply::Inform => request.current.is_unspecified(),
        // Who has the address already is reached there.
        Reply::Offer | Reply::Grant { .. } => request.flags.broadcast() && request.current != lease.guest,
    };
    match reply {
        _ if to_all => Ipv4Addr::BROADCAST,
        Reply::Inform => request.current,
        _ => lease.guest,
    }
}

fn write(request: &Request, reply: Reply, lease: &Lease, config: &DhcpConfig) -> Option<Vec<u8>> {
    let yours = match reply {
        Reply::Offer | Reply::Grant { .. } => lease.guest,
        // 4.3.5, and table 3.
        Reply::Inform | Reply::Refuse => Ipv4Addr::UNSPECIFIED,
    };
    let current = match reply {
        Reply::Grant { .. } | Reply::Inform => request.current,
        Reply::Offer | Reply::Refuse => Ipv4Addr::UNSPECIFIED,
    };
    let none = Ipv4Addr::UNSPECIFIED;
    let mut message = Message::new_with_id(request.transaction, current, yours, none, none, &request.mac.0);
    message.set_opcode(Opcode::BootReply).set_flags(request.flags);
    for option in options(request, reply, lease, config) {
        message.opts_mut().insert(option);
    }
    let mut bytes = message.to_vec().ok()?;
    // What does not fit is left out, the least needed first.
    let max = request.message_max.min(usize::from(config.mtu).saturating_sub(28)).max(MESSAGE_LEN);
    for code in [OptionCode::DomainSearch, OptionCode::Hostname, OptionCode::BroadcastAddr] {
        if bytes.len() > max {
            message.opts_mut().remove(code);
            bytes = message.to_vec().ok()?;
        }
    }
    bytes.resize(bytes.len().max(MESSAGE_MIN), 0);
    Some(bytes)
}

/// RFC 2131, table 3.
fn options(request: &Request, reply: Reply, lease: &Lease, config: &DhcpConfig) -> Vec<DhcpOption> {
    let kind = match reply {
        Reply::Offer => MessageType::Offer,
        Reply::Grant { .. } | Reply::Inform => MessageType::Ack,
        Reply::Refuse => MessageType::Nak,
    };
    let mut options = vec![DhcpOption::MessageType(kind), DhcpOption::ServerIdentifier(lease.gateway)];
    // RFC 6842, 3: in every reply, a refusal too.
    options.extend(request.client_id.clone().map(DhcpOption::ClientIdentifier));
    if reply == Reply::Refuse {
        return options;
    }
    let mut dns: Vec<Ipv4Addr> = config.dns.iter().copied().take(RESOLVERS_MAX).collect();
    if dns.is_empty() {
        dns.push(lease.gateway);
    }
    options.extend([
        DhcpOption::SubnetMask(lease.netmask),
        DhcpOption::Router(vec![lease.gateway]),
        DhcpOption::DomainNameServer(dns),
        DhcpOption::BroadcastAddr(lease.broadcast),
        DhcpOption::InterfaceMtu(config.mtu),
    ]);
    // RFC 2132, 3.14: at least one byte.
    let hostname = config.hostname.clone().filter(|name| (1..=OPTION_MAX).contains(&name.len()));
    options.extend(hostname.map(DhcpOption::Hostname));
    if !config.search.is_empty() {
        options.push(DhcpOption::DomainSearch(config.search.clone()));
    }
    // 4.3.5: who has its address from elsewhere is given no time for it.
    if reply != Reply::Inform {
        options.push(DhcpOption::AddressLeaseTime(config.lease_s));
    }
    if reply == (Reply::Grant { rapid: true }) {
        options.push(DhcpOption::RapidCommit);
    }
    options
}

/// A whole frame with a UDP datagram, its checksum complete.
pub(super) fn udp_frame(route: &Route, source: u16, destination: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; HEAD_MAX];
    let head = build::udp(&mut frame, route, source, destination, payload.len(), false);
    build::finish_checksum(&mut frame, head, std::iter::once(payload));
    frame.truncate(head.len);
    frame.extend_from_slice(payload);
    frame
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::neighbours::tests::{GUEST_MAC, addresses};
    use super::*;
    use crate::frame::checksum::pseudo_header;
    use crate::frame::view::{Content, ETHERNET_LEN, Transport, View};
    use dhcproto::Decodable;
    use proptest::prelude::*;

    const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 65, 3);
    const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 65, 1);
    const OTHER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 7);

    fn config() -> DhcpConfig {
        DhcpConfig {
            lease_s: 3600,
            mtu: 1400,
            hostname: Some("web".into()),
            dns: vec![],
            search: vec![Name::from_ascii("corp.example.com").unwrap()],
        }
    }

    fn request(kind: MessageType, current: Ipv4Addr, options: &[DhcpOption]) -> Message {
        let none = Ipv4Addr::UNSPECIFIED;
        let mut message = Message::new_with_id(0xabcd, current, none, none, none, &GUEST_MAC.0);
        message.opts_mut().insert(DhcpOption::MessageType(kind));
        for option in options {
            message.opts_mut().insert(option.clone());
        }
        message
    }

    /// The IP head, the destination MAC and the payload of a datagram, which must be sound.
    pub fn datagram(frame: &[u8], ports: (u16, u16)) -> (IpHead, Mac, &[u8]) {
        let view = View::parse(frame, frame.len()).unwrap();
        assert_eq!(view.source_mac, addresses().gateway_mac);
        let Content::Ip(packet) = view.content else { panic!("{view:?}") };
        let Transport::Udp(udp) = packet.transport else { panic!("{packet:?}") };
        assert_eq!((udp.source_port, udp.destination_port), ports);
        let bytes = &frame[packet.transport_start..];
        assert_eq!(bytes.len(), udp.len + 8);
        let pseudo = pseudo_header(packet.ip.source, packet.ip.destination, 17, bytes.len());
        assert_eq!(pseudo.with(bytes).partial(), 0xffff);
        (packet.ip, view.destination_mac, &bytes[8..])
    }

    fn ask_with(config: &DhcpConfig, message: &Message) -> Option<(Ipv4Addr, Mac, Message)> {
        let frame = answer(&addresses(), config, GUEST_MAC, &message.to_vec().unwrap())?;
        let (ip, mac, payload) = datagram(&frame, (67, 68));
        assert_eq!(ip.source, GATEWAY.into());
        assert!(payload.len() >= 300);
        let reply = Message::from_bytes(payload).unwrap();
        assert_eq!((reply.opcode(), reply.xid()), (Opcode::BootReply, message.xid()));
        assert_eq!((reply.chaddr(), reply.flags()), (message.chaddr(), message.flags()));
        Some((ip.destination.v4_octets().into(), mac, reply))
    }

    fn ask(message: &Message) -> Option<(Ipv4Addr, Mac, Message)> {
        ask_with(&config(), message)
    }

    fn option(message: &Message, code: OptionCode) -> Option<DhcpOption> {
        message.opts().get(code).cloned()
    }

    fn is_nak(reply: Option<(Ipv4Addr, Mac, Message)>) -> bool {
        reply.is_some_and(|(to, mac, message)| {
            (to, mac) == (Ipv4Addr::BROADCAST, Mac::BROADCAST)
                && message.opts().has_msg_type(MessageType::Nak)
                && message.yiaddr().is_unspecified()
        })
    }

    fn is_ack(reply: Option<(Ipv4Addr, Mac, Message)>) -> bool {
        reply.is_some_and(|(to, mac, message)| {
            (to, mac) == (GUEST, GUEST_MAC)
                && message.opts().has_msg_type(MessageType::Ack)
                && message.yiaddr() == GUEST
        })
    }

    const NOWHERE: Ipv4Addr = Ipv4Addr::UNSPECIFIED;

    #[test]
    fn a_discover_is_offered_the_guests_address_and_all_about_the_link() {
        let (to, mac, offer) = ask(&request(MessageType::Discover, NOWHERE, &[])).unwrap();
        assert_eq!((to, mac, offer.yiaddr()), (GUEST, GUEST_MAC, GUEST));
        for expected in [
            DhcpOption::MessageType(MessageType::Offer),
            DhcpOption::ServerIdentifier(GATEWAY),
            DhcpOption::SubnetMask(Ipv4Addr::new(255, 255, 255, 0)),
            DhcpOption::Router(vec![GATEWAY]),
            DhcpOption::DomainNameServer(vec![GATEWAY]),
            DhcpOption::BroadcastAddr(Ipv4Addr::new(192, 168, 65, 255)),
            DhcpOption::AddressLeaseTime(3600),
            DhcpOption::InterfaceMtu(1400),
            DhcpOption::Hostname("web".into()),
        ] {
            assert_eq!(option(&offer, OptionCode::from(&expected)), Some(expected));
        }
        let Some(DhcpOption::DomainSearch(search)) = option(&offer, OptionCode::DomainSearch) else {
            panic!()
        };
        assert_eq!(search[0].to_string().trim_end_matches('.'), "corp.example.com");
        assert_eq!(option(&offer, OptionCode::ClientIdentifier), None);
    }

    #[test]
    fn resolvers_that_were_given_take_the_gateways_place() {
        let config =
            DhcpConfig { dns: vec![OTHER; 9], hostname: Some(String::new()), search: vec![], ..config() };
        let (.., offer) = ask_with(&config, &request(MessageType::Discover, NOWHERE, &[])).unwrap();
        let resolvers = DhcpOption::DomainNameServer(vec![OTHER; 3]);
        assert_eq!(option(&offer, OptionCode::DomainNameServer), Some(resolvers));
        assert_eq!(option(&offer, OptionCode::Hostname), None);
        assert_eq!(option(&offer, OptionCode::DomainSearch), None);
    }

    /// RFC 4039.
    #[test]
    fn a_discover_with_rapid_commit_is_granted_at_once() {
        let reply = ask(&request(MessageType::Discover, NOWHERE, &[DhcpOption::RapidCommit]));
        let (.., message) = reply.as_ref().unwrap();
        assert!(message.opts().contains(OptionCode::RapidCommit));
        assert!(is_ack(reply));
    }

    /// RFC 2131, 4.1: a client that cannot take unicast before it has an address says so.
    #[test]
    fn the_broadcast_flag_is_honoured() {
        let mut message = request(MessageType::Discover, NOWHERE, &[]);
        message.set_flags(Flags::default().set_broadcast());
        let (to, mac, _) = ask(&message).unwrap();
        assert_eq!((to, mac), (Ipv4Addr::BROADCAST, Mac::BROADCAST));
        let mut renewing = request(MessageType::Request, GUEST, &[]);
        renewing.set_flags(Flags::default().set_broadcast());
        assert!(is_ack(ask(&renewing)), "who has the address is reached there");
    }

    /// RFC 2131, 4.3.2.
    #[test]
    fn every_kind_of_request_for_the_guests_address_is_granted() {
        let wants = DhcpOption::RequestedIpAddress(GUEST);
        let chose = DhcpOption::ServerIdentifier(GATEWAY);
        let selecting = ask(&request(MessageType::Request, NOWHERE, &[wants.clone(), chose]));
        assert!(is_ack(selecting), "selecting");
        assert!(is_ack(ask(&request(MessageType::Request, NOWHERE, &[wants]))), "init-reboot");
        let renewed = ask(&request(MessageType::Request, GUEST, &[]));
        assert_eq!(renewed.as_ref().unwrap().2.ciaddr(), GUEST);
        assert!(is_ack(renewed), "renewing, rebinding");
    }

    #[test]
    fn a_request_for_another_address_is_refused() {
        let wants = DhcpOption::RequestedIpAddress(OTHER);
        let chose = DhcpOption::ServerIdentifier(GATEWAY);
        let id = DhcpOption::ClientIdentifier(vec![1, 2, 3]);
        let selecting = ask(&request(MessageType::Request, NOWHERE, &[wants.clone(), chose]));
        assert!(is_nak(selecting), "selecting");
        let reboot = ask(&request(MessageType::Request, NOWHERE, &[wants, id.clone()]));
        let (.., refusal) = reboot.as_ref().unwrap();
        assert_eq!(option(refusal, OptionCode::ClientIdentifier), Some(id));
        assert_eq!(option(refusal, OptionCode::AddressLeaseTime), None);
        assert!(is_nak(reboot), "init-reboot");
        assert!(is_nak(ask(&request(MessageType::Request, OTHER, &[]))), "renewing, rebinding");
    }

    #[test]
    fn what_is_for_another_server_or_for_nobody_is_not_answered() {
        let wants = DhcpOption::RequestedIpAddress(GUEST);
        let other = DhcpOption::ServerIdentifier(OTHER);
        assert_eq!(ask(&request(MessageType::Request, NOWHERE, &[wants, other])), None);
        assert_eq!(ask(&request(MessageType::Request, NOWHERE, &[])), None);
        for kind in [MessageType::Decline, MessageType::Release, MessageType::Offer, MessageType::Ack] {
            assert_eq!(ask(&request(kind, GUEST, &[])), None, "{kind:?}");
        }
    }

    /// RFC 2131, 4.3.5.
    #[test]
    fn an_inform_is_told_about_the_link_but_gets_no_address() {
        let (to, mac, reply) = ask(&request(MessageType::Inform, GUEST, &[])).unwrap();
        assert_eq!((to, mac), (GUEST, GUEST_MAC));
        assert!(reply.opts().has_msg_type(MessageType::Ack));
        assert_eq!((reply.yiaddr(), reply.ciaddr()), (NOWHERE, GUEST));
        assert_eq!(option(&reply, OptionCode::AddressLeaseTime), None);
        assert!(reply.opts().contains(OptionCode::DomainNameServer));
        let (to, ..) = ask(&request(MessageType::Inform, NOWHERE, &[])).unwrap();
        assert_eq!(to, Ipv4Addr::BROADCAST);
    }

    /// RFC 6842.
    #[test]
    fn the_clients_identifier_is_echoed() {
        let id = DhcpOption::ClientIdentifier(vec![255, 1, 2, 3, 4]);
        let (.., offer) = ask(&request(MessageType::Discover, NOWHERE, std::slice::from_ref(&id))).unwrap();
        assert_eq!(option(&offer, OptionCode::ClientIdentifier), Some(id));
        let long = DhcpOption::ClientIdentifier(vec![1; 300]);
        assert_eq!(ask(&request(MessageType::Discover, NOWHERE, &[long])), None);
    }

    #[test]
    fn a_reply_stays_within_what_the_client_takes() {
        let search: Vec<Name> =
            (0..40).map(|i| Name::from_ascii(format!("domain{i}.example{i}")).unwrap()).collect();
        let config = DhcpConfig { search, ..config() };
        let id = DhcpOption::ClientIdentifier(vec![7; 255]);
        let (.., short) =
            ask_with(&config, &request(MessageType::Discover, NOWHERE, std::slice::from_ref(&id))).unwrap();
        assert!(short.to_vec().unwrap().len() <= 548);
        assert_eq!(option(&short, OptionCode::DomainSearch), None);
        assert!(short.opts().contains(OptionCode::Hostname));
        let crowded = DhcpConfig { dns: vec![OTHER; 3], ..config.clone() };
        let discover = request(MessageType::Discover, NOWHERE, &[id.clone(), DhcpOption::RapidCommit]);
        let (.., crowded) = ask_with(&crowded, &discover).unwrap();
        assert!(crowded.to_vec().unwrap().len() <= 548);
        let roomy = DhcpOption::MaxMessageSize(1500);
        let (.., long) = ask_with(&config, &request(MessageType::Discover, NOWHERE, &[id, roomy])).unwrap();
        let Some(DhcpOption::DomainSearch(told)) = option(&long, OptionCode::DomainSearch) else { panic!() };
        assert_eq!(told.len(), 40);
    }

    #[test]
    fn only_a_station_on_the_link_itself_is_served() {
        let mut relayed = request(MessageType::Discover, NOWHERE, &[]);
        relayed.set_giaddr(OTHER);
        assert_eq!(ask(&relayed), None);
        let mut other = request(MessageType::Discover, NOWHERE, &[]);
        other.set_chaddr(&[2, 0, 0, 0, 0, 9]);
        assert_eq!(ask(&other), None);
        let mut reply = request(MessageType::Discover, NOWHERE, &[]);
        reply.set_opcode(Opcode::BootReply);
        assert_eq!(ask(&reply), None);
        let mut off = addresses();
        off.v4 = None;
        let bytes = request(MessageType::Discover, NOWHERE, &[]).to_vec().unwrap();
        assert_eq!(answer(&off, &config(), GUEST_MAC, &bytes), None);
    }

    #[test]
    fn a_message_that_lies_about_its_lengths_is_not_answered() {
        let sound = request(MessageType::Discover, NOWHERE, &[]).to_vec().unwrap();
        assert!(answer(&addresses(), &config(), GUEST_MAC, &sound).is_some());
        for len in 0..sound.len() - 1 {
            let answer = answer(&addresses(), &config(), GUEST_MAC, &sound[..len]);
            assert!(answer.is_none(), "{len} bytes");
        }
        let mut long_mac = sound.clone();
        long_mac[2] = 255;
        assert_eq!(answer(&addresses(), &config(), GUEST_MAC, &long_mac), None);
        let mut no_cookie = sound.clone();
        no_cookie[236] ^= 1;
        assert_eq!(answer(&addresses(), &config(), GUEST_MAC, &no_cookie), None);
        for option in [&[50, 3, 1, 2, 3][..], &[54, 0], &[57, 1, 1], &[53, 1, 1]] {
            let bytes = [&sound[..sound.len() - 1], option, &[255]].concat();
            assert_eq!(answer(&addresses(), &config(), GUEST_MAC, &bytes), None, "{option:?}");
        }
    }

    /// Options on whose length the crate's owning decoder asserts.
    #[test]
    fn options_of_lengths_that_they_cannot_have_do_no_harm() {
        let sound = request(MessageType::Discover, NOWHERE, &[]).to_vec().unwrap();
        for option in [&[80, 2, 9, 9][..], &[81, 1, 0], &[81, 0], &[94, 1, 1], &[151, 0], &[152, 1, 1]] {
            let bytes = [&sound[..sound.len() - 1], option, &[255]].concat();
            assert!(answer(&addresses(), &config(), GUEST_MAC, &bytes).is_some(), "{option:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            answer(&addresses(), &config(), GUEST_MAC, &bytes);
        }

        #[test]
        fn no_options_make_it_panic_or_answer_at_length(
            options in proptest::collection::vec(any::<u8>(), 0..1500),
            kind in 0u8..19,
            current: [u8; 4],
        ) {
            let mut bytes = request(MessageType::from(kind), current.into(), &[]).to_vec().unwrap();
            bytes.pop();
            bytes.extend(options);
            if let Some(frame) = answer(&addresses(), &config(), GUEST_MAC, &bytes) {
                prop_assert!(frame.len() <= ETHERNET_LEN + 1400);
            }
        }
    }
}
