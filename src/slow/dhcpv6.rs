//! DHCP for IPv6 (RFC 8415) for the one guest of the link: an address for guests that ask for one, and names for all.
//!
//! As with DHCP there is nothing to remember: the guest's address belongs to the first association that asks, and what
//! else is asked for (temporary addresses, prefixes) is not to be had.
//!
//! Replies are written by `dhcproto`; requests are not read by it. Its decoder follows options inside options as deep
//! as a message makes them, on the stack, which one datagram can overflow, and computes with lengths before it checks
//! them. The options that matter here are a flat list, and one level inside an association.
//!
//! Pure: a datagram's payload in, the answering frame out.

use std::net::Ipv6Addr;

use dhcproto::Encodable;
use dhcproto::v6::{
    DhcpOption, DhcpOptions, IAAddr, IANA, IAPD, IATA, Message, MessageType, OptionCode, Status, StatusCode,
    UnknownOption,
};
use hickory_proto::rr::Name;

use crate::frame::address::{Address, Mac};
use crate::frame::build::Route;
use crate::frame::view::IpHead;
use crate::policy::addresses::Addresses;

use super::dhcp::udp_frame;
use super::neighbours::uncompressed;

const SERVER_PORT: u16 = 547;
const CLIENT_PORT: u16 = 546;

/// Options of one message, and of one association, that are looked at. More no client sends.
const OPTIONS_MAX: usize = 64;

/// Associations, and addresses of each, that are answered for, so that no reply outgrows a packet of 1280 bytes.
const ASSOCIATIONS_MAX: usize = 4;
const ADDRESSES_MAX: usize = 4;

/// RFC 8415, 11.1: an identifier (DUID) has a type of two bytes and at most 128 more.
const IDENTIFIER_LEN: std::ops::RangeInclusive<usize> = 3..=130;

/// More resolvers than this no guest uses (`resolv.conf`).
const RESOLVERS_MAX: usize = 3;

/// What the guest is told besides its address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Dhcpv6Config {
    /// How long the guest may keep its address without asking again, in seconds.
    pub lease_s: u32,
    /// Resolvers; where there are none, the gateway.
    pub dns: Vec<Ipv6Addr>,
    /// Domains in which the guest looks for short names.
    pub search: Vec<Name>,
}

/// Answers a message of the guest's, the payload of a datagram from `source` to port 547, with a whole frame.
pub fn answer(
    addresses: &Addresses,
    config: &Dhcpv6Config,
    guest_mac: Mac,
    source: Address,
    payload: &[u8],
) -> Option<Vec<u8>> {
    let link = Link::of(addresses)?;
    // RFC 8415, 13: clients speak from their link-local addresses.
    if !source.is_link_local() || !addresses.may_send_from(source) {
        return None;
    }
    let request = Request::parse(payload).filter(|request| request.is_sound(&link.identifier))?;
    let reply = reply(&request, &link, config)?;
    let ip = IpHead {
        source: addresses.gateway_link_local(),
        destination: source,
        hop_limit: 64,
        traffic_class: 0,
        dont_fragment: true,
    };
    let route = Route { source_mac: addresses.gateway_mac, destination_mac: guest_mac, ip };
    Some(udp_frame(&route, SERVER_PORT, CLIENT_PORT, &reply.to_vec().ok()?))
}

/// What there is to give, and who gives it.
struct Link<'a> {
    addresses: &'a Addresses,
    guest: Ipv6Addr,
    gateway: Ipv6Addr,
    /// The server's identifier: DUID-LL (RFC 8415, 11.4) of the gateway's MAC, the same after every start.
    identifier: Vec<u8>,
}

impl<'a> Link<'a> {
    fn of(addresses: &'a Addresses) -> Option<Self> {
        let family = addresses.v6.as_ref()?;
        Some(Self {
            addresses,
            guest: family.guest.octets().into(),
            gateway: family.gateway.octets().into(),
            identifier: [&[0, 3, 0, 1][..], &addresses.gateway_mac.0].concat(),
        })
    }

    /// Whether the guest may use this address on the link.
    fn has(&self, address: Ipv6Addr) -> bool {
        let address = Address::from(address);
        self.addresses.v6.is_some_and(|family| family.subnet.contains(&address.ip()))
            && self.addresses.may_send_from(address)
    }
}

/// A message of the guest's: what of it matters here.
#[derive(Debug)]
struct Request<'p> {
    kind: MessageType,
    transaction: [u8; 3],
    client: Option<&'p [u8]>,
    server: Option<&'p [u8]>,
    rapid_commit: bool,
    associations: Vec<Association>,
}

/// An identity association: addresses, or prefixes, that a client asks for together (RFC 8415, 4.2).
#[derive(Debug)]
struct Association {
    kind: AssociationKind,
    id: u32,
    /// Addresses that the client has or would like.
    addresses: Vec<Ipv6Addr>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum AssociationKind {
    Addresses,
    Temporary,
    Prefixes,
}

/// The options of a message or an association, or `None` where one is cut off or there are too many.
fn options(mut bytes: &[u8]) -> Option<Vec<(OptionCode, &[u8])>> {
    let mut options = Vec::new();
    while let Some((&[code_high, code_low, len_high, len_low], rest)) = bytes.split_first_chunk() {
        let len = usize::from(u16::from_be_bytes([len_high, len_low]));
        let (data, rest) = rest.split_at_checked(len)?;
        options.push((OptionCode::from(u16::from_be_bytes([code_high, code_low])), data));
        bytes = rest;
    }
    (bytes.is_empty() && options.len() <= OPTIONS_MAX).then_some(options)
}

impl<'p> Request<'p> {
    fn parse(payload: &'p [u8]) -> Option<Self> {
        let (&[kind, a, b, c], rest) = payload.split_first_chunk()?;
        let mut request = Self {
            kind: kind.into(),
            transaction: [a, b, c],
            client: None,
            server: None,
            rapid_commit: false,
            associations: Vec::new(),
        };
        for (code, data) in options(rest)? {
            match code {
                OptionCode::ClientId if IDENTIFIER_LEN.contains(&data.len()) => request.client = Some(data),
                OptionCode::ClientId => return None,
                OptionCode::ServerId => request.server = Some(data),
                OptionCode::RapidCommit => request.rapid_commit = true,
                OptionCode::IANA => request.associate(AssociationKind::Addresses, data)?,
                OptionCode::IATA => request.associate(AssociationKind::Temporary, data)?,
                OptionCode::IAPD => request.associate(AssociationKind::Prefixes, data)?,
                _ => {}
            }
        }
        Some(request)
    }

    fn associate(&mut self, kind: AssociationKind, data: &[u8]) -> Option<()> {
        let (id, rest) = data.split_first_chunk()?;
        // Behind the identifier there are two times, but for temporary addresses.
        let rest = if kind == AssociationKind::Temporary { rest } else { rest.get(8..)? };
        let addresses = options(rest)?
            .into_iter()
            .filter(|(code, _)| *code == OptionCode::IAAddr)
            .map(|(_, data)| data.first_chunk::<16>().map(|octets| Ipv6Addr::from(*octets)))
            .collect::<Option<Vec<_>>>()?;
        if self.associations.len() < ASSOCIATIONS_MAX {
            let addresses = addresses.into_iter().take(ADDRESSES_MAX).collect();
            self.associations.push(Association { kind, id: u32::from_be_bytes(*id), addresses });
        }
        Some(())
    }

    /// RFC 8415, 16: which identifiers a message must have and must not have.
    fn is_sound(&self, own: &[u8]) -> bool {
        match self.kind {
            MessageType::Solicit | MessageType::Confirm | MessageType::Rebind => {
                self.client.is_some() && self.server.is_none()
            }
            MessageType::Request | MessageType::Renew | MessageType::Release | MessageType::Decline => {
                self.client.is_some() && self.server == Some(own)
            }
            MessageType::InformationRequest => {
                self.server.is_none_or(|server| server == own) && self.associations.is_empty()
            }
            _ => false,
        }
    }
}

/// RFC 8415, 18.3.
fn reply(request: &Request<'_>, link: &Link<'_>, config: &Dhcpv6Config) -> Option<Message> {
    let granted = || request.associations.iter().enumerate().map(|(i, _)| grant(request, i, link, config));
    let mut kind = MessageType::Reply;
    let mut body: Vec<DhcpOption> = Vec::new();
    match request.kind {
        MessageType::Solicit if request.rapid_commit => {
            body.push(DhcpOption::RapidCommit);
            body.extend(granted());
        }
        MessageType::Solicit => {
            kind = MessageType::Advertise;
            // 18.2.1: with the highest preference the client does not wait for other servers.
            body.push(DhcpOption::Preference(255));
            body.extend(granted());
        }
        MessageType::Request | MessageType::Renew | MessageType::Rebind => body.extend(granted()),
        MessageType::Confirm => {
            let mut asked = request.associations.iter().flat_map(|association| &association.addresses);
            // 18.3.3: where nothing is asked, nothing is answered.
            asked.clone().next()?;
            let on_link = asked.all(|address| link.has(*address));
            body.push(status(if on_link { Status::Success } else { Status::NotOnLink }));
        }
        // 18.3.7, 18.3.8: the address stays the guest's, whether it is used or not.
        MessageType::Release | MessageType::Decline => body.push(status(Status::Success)),
        _ => {}
    }
    let mut message = Message::new_with_id(kind, request.transaction);
    let options = message.opts_mut();
    options.insert(DhcpOption::ServerId(link.identifier.clone()));
    if let Some(client) = request.client {
        options.insert(DhcpOption::ClientId(client.to_vec()));
    }
    if !matches!(request.kind, MessageType::Confirm | MessageType::Release | MessageType::Decline) {
        body.extend(names(link, config));
    }
    for option in body {
        options.insert(option);
    }
    Some(message)
}

/// What an association gets: the first one for addresses the guest's, others the reason why not.
fn grant(request: &Request<'_>, index: usize, link: &Link<'_>, config: &Dhcpv6Config) -> DhcpOption {
    let association = &request.associations[index];
    let id = association.id;
    let refused = |why: Status| [status(why)].into_iter().collect::<DhcpOptions>();
    let is_first =
        !request.associations[..index].iter().any(|other| other.kind == AssociationKind::Addresses);
    match association.kind {
        AssociationKind::Temporary => DhcpOption::IATA(IATA { id, opts: refused(Status::NoAddrsAvail) }),
        AssociationKind::Prefixes => {
            DhcpOption::IAPD(IAPD { id, t1: 0, t2: 0, opts: refused(Status::NoPrefixAvail) })
        }
        AssociationKind::Addresses if !is_first => {
            DhcpOption::IANA(IANA { id, t1: 0, t2: 0, opts: refused(Status::NoAddrsAvail) })
        }
        // 18.3.2: a client that asks for an address of another network learns that it has moved.
        AssociationKind::Addresses
            if request.kind == MessageType::Request
                && association.addresses.iter().any(|address| !link.has(*address)) =>
        {
            DhcpOption::IANA(IANA { id, t1: 0, t2: 0, opts: refused(Status::NotOnLink) })
        }
        AssociationKind::Addresses => {
            let lease = config.lease_s;
            let given = address_option(link.guest, lease);
            // 18.3.4, 18.3.5: what the client may no longer use comes back with lifetimes of zero.
            let extends = matches!(request.kind, MessageType::Renew | MessageType::Rebind);
            let others = association.addresses.iter().filter(|address| extends && **address != link.guest);
            let others = others.map(|address| address_option(*address, 0));
            let opts = std::iter::once(given).chain(others).collect();
            // 21.4: ask again after half of the time, and others after four fifths.
            let t2 = (u64::from(lease) * 4 / 5) as u32;
            DhcpOption::IANA(IANA { id, t1: lease / 2, t2, opts })
        }
    }
}

fn address_option(addr: Ipv6Addr, lifetime_s: u32) -> DhcpOption {
    let opts = DhcpOptions::new();
    DhcpOption::IAAddr(IAAddr { addr, preferred_life: lifetime_s, valid_life: lifetime_s, opts })
}

fn status(status: Status) -> DhcpOption {
    DhcpOption::StatusCode(StatusCode { status, msg: String::new() })
}

/// RFC 3646: resolvers and search domains.
fn names(link: &Link<'_>, config: &Dhcpv6Config) -> Vec<DhcpOption> {
    let mut dns: Vec<Ipv6Addr> = config.dns.iter().copied().take(RESOLVERS_MAX).collect();
    if dns.is_empty() {
        dns.push(link.gateway);
    }
    let mut options = vec![DhcpOption::DomainNameServers(dns)];
    let search = uncompressed(&config.search);
    if !search.is_empty() {
        // RFC 8415, 10 forbids the compression that the crate's own option would apply.
        options.push(DhcpOption::Unknown(UnknownOption::new(OptionCode::DomainSearchList, search)));
    }
    options
}

#[cfg(test)]
mod tests {
    use super::super::dhcp::tests::datagram;
    use super::super::neighbours::tests::{GUEST_MAC, address, addresses};
    use super::*;
    use dhcproto::Decodable;
    use proptest::prelude::*;

    const GUEST: Ipv6Addr = Ipv6Addr::new(0xfdc4, 0xf303, 0x9324, 0, 0, 0, 0, 3);
    const GATEWAY: Ipv6Addr = Ipv6Addr::new(0xfdc4, 0xf303, 0x9324, 0, 0, 0, 0, 1);
    const ELSEWHERE: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);
    const CLIENT: [u8; 10] = [0, 3, 0, 1, 0x52, 0x54, 0, 0x12, 0x34, 0x56];

    fn config() -> Dhcpv6Config {
        let search = ["a.example.com", "b.example.com"].map(|name| Name::from_ascii(name).unwrap());
        Dhcpv6Config { lease_s: 1000, dns: vec![], search: search.to_vec() }
    }

    fn client() -> DhcpOption {
        DhcpOption::ClientId(CLIENT.to_vec())
    }

    fn server() -> DhcpOption {
        DhcpOption::ServerId([&[0, 3, 0, 1][..], &addresses().gateway_mac.0].concat())
    }

    fn wants(id: u32, wanted: &[Ipv6Addr]) -> DhcpOption {
        let opts = wanted.iter().map(|address| address_option(*address, 5)).collect();
        DhcpOption::IANA(IANA { id, t1: 0, t2: 0, opts })
    }

    fn request(kind: MessageType, options: &[DhcpOption]) -> Vec<u8> {
        // In this order, which the crate's own list of options would not keep.
        let options = options.iter().flat_map(|option| option.to_vec().unwrap());
        [u8::from(kind), 1, 2, 3].into_iter().chain(options).collect()
    }

    fn ask_bytes(payload: &[u8]) -> Option<Message> {
        let source = address("fe80::3");
        let frame = answer(&addresses(), &config(), GUEST_MAC, source, payload)?;
        let (ip, mac, payload) = datagram(&frame, (547, 546));
        assert_eq!((ip.source, ip.destination), (addresses().gateway_link_local(), source));
        assert_eq!(mac, GUEST_MAC);
        assert!(frame.len() <= 14 + 1280);
        let message = Message::from_bytes(payload).unwrap();
        assert_eq!(message.opts().get(OptionCode::ServerId), Some(&server()));
        Some(message)
    }

    fn ask(kind: MessageType, options: &[DhcpOption]) -> Option<Message> {
        let reply = ask_bytes(&request(kind, options))?;
        assert_eq!(reply.xid(), [1, 2, 3]);
        Some(reply)
    }

    /// The addresses of association `id` with their lifetimes, and its status.
    fn given(reply: &Message, id: u32) -> (Vec<(Ipv6Addr, u32)>, Option<Status>) {
        let associations = reply.opts().iter().filter_map(|option| match option {
            DhcpOption::IANA(association) if association.id == id => Some(association),
            _ => None,
        });
        let [association] = associations.collect::<Vec<_>>()[..] else { panic!("{reply:?}") };
        let addresses = association.opts.iter().filter_map(|option| match option {
            DhcpOption::IAAddr(address) => {
                assert_eq!(address.preferred_life, address.valid_life);
                Some((address.addr, address.valid_life))
            }
            _ => None,
        });
        (addresses.collect(), association.opts.get(OptionCode::StatusCode).map(status_of))
    }

    fn status_of(option: &DhcpOption) -> Status {
        let DhcpOption::StatusCode(code) = option else { panic!("{option:?}") };
        code.status
    }

    fn status_in(reply: &Message) -> Status {
        status_of(reply.opts().get(OptionCode::StatusCode).unwrap())
    }

    #[test]
    fn a_solicitation_is_advertised_the_guests_address_and_the_names() {
        let reply = ask(MessageType::Solicit, &[client(), wants(9, &[ELSEWHERE])]).unwrap();
        assert_eq!(reply.msg_type(), MessageType::Advertise);
        assert_eq!(reply.opts().get(OptionCode::ClientId), Some(&client()));
        assert_eq!(reply.opts().get(OptionCode::Preference), Some(&DhcpOption::Preference(255)));
        assert_eq!(given(&reply, 9), (vec![(GUEST, 1000)], None));
        let Some(DhcpOption::IANA(association)) = reply.opts().get(OptionCode::IANA) else { panic!() };
        assert_eq!((association.t1, association.t2), (500, 800));
        let resolvers = DhcpOption::DomainNameServers(vec![GATEWAY]);
        assert_eq!(reply.opts().get(OptionCode::DomainNameServers), Some(&resolvers));
        let search = DhcpOption::DomainSearchList(
            ["a.example.com.", "b.example.com."].map(|name| Name::from_ascii(name).unwrap()).to_vec(),
        );
        assert_eq!(reply.opts().get(OptionCode::DomainSearchList), Some(&search));
    }

    /// RFC 8415, 10.
    #[test]
    fn search_domains_are_not_compressed() {
        let bytes = request(MessageType::InformationRequest, &[]);
        let frame = answer(&addresses(), &config(), GUEST_MAC, address("fe80::3"), &bytes).unwrap();
        let names = b"\x01a\x07example\x03com\x00\x01b\x07example\x03com\x00";
        assert!(frame.windows(names.len()).any(|window| window == names));
    }

    #[test]
    fn a_solicitation_with_rapid_commit_is_granted_at_once() {
        let reply = ask(MessageType::Solicit, &[client(), DhcpOption::RapidCommit, wants(9, &[])]).unwrap();
        assert_eq!(reply.msg_type(), MessageType::Reply);
        assert!(reply.opts().get(OptionCode::RapidCommit).is_some());
        assert_eq!(given(&reply, 9).0, [(GUEST, 1000)]);
    }

    #[test]
    fn a_request_is_granted_and_one_from_another_network_learns_that_it_has_moved() {
        let reply = ask(MessageType::Request, &[client(), server(), wants(9, &[GUEST])]).unwrap();
        assert_eq!(reply.msg_type(), MessageType::Reply);
        assert_eq!(given(&reply, 9), (vec![(GUEST, 1000)], None));
        let reply = ask(MessageType::Request, &[client(), server(), wants(9, &[ELSEWHERE])]).unwrap();
        assert_eq!(given(&reply, 9), (vec![], Some(Status::NotOnLink)));
    }

    /// RFC 8415, 18.3.4 and 18.3.5.
    #[test]
    fn a_renewal_takes_back_what_is_not_the_guests() {
        for (kind, server_id) in [(MessageType::Renew, vec![server()]), (MessageType::Rebind, Vec::new())] {
            let options = [vec![client(), wants(9, &[ELSEWHERE, GUEST])], server_id].concat();
            let reply = ask(kind, &options).unwrap();
            assert_eq!(given(&reply, 9), (vec![(GUEST, 1000), (ELSEWHERE, 0)], None));
        }
    }

    #[test]
    fn one_association_gets_the_address_and_the_others_a_reason() {
        let temporary = DhcpOption::IATA(IATA { id: 7, opts: DhcpOptions::new() });
        let prefixes = DhcpOption::IAPD(IAPD { id: 8, t1: 0, t2: 0, opts: DhcpOptions::new() });
        let options = [client(), wants(9, &[]), wants(10, &[]), temporary, prefixes];
        let reply = ask(MessageType::Solicit, &options).unwrap();
        assert_eq!(given(&reply, 9), (vec![(GUEST, 1000)], None));
        assert_eq!(given(&reply, 10), (vec![], Some(Status::NoAddrsAvail)));
        let Some(DhcpOption::IATA(temporary)) = reply.opts().get(OptionCode::IATA) else { panic!() };
        let why = temporary.opts.get(OptionCode::StatusCode).map(status_of);
        assert_eq!((temporary.id, why), (7, Some(Status::NoAddrsAvail)));
        let Some(DhcpOption::IAPD(prefixes)) = reply.opts().get(OptionCode::IAPD) else { panic!() };
        let why = prefixes.opts.get(OptionCode::StatusCode).map(status_of);
        assert_eq!((prefixes.id, why), (8, Some(Status::NoPrefixAvail)));
    }

    /// RFC 8415, 18.3.3.
    #[test]
    fn a_confirmation_says_whether_the_addresses_belong_on_the_link() {
        let chosen: Ipv6Addr = "fdc4:f303:9324::1234".parse().unwrap();
        for (held, expected) in [
            (vec![GUEST, chosen], Status::Success),
            (vec![GUEST, ELSEWHERE], Status::NotOnLink),
            (vec![GATEWAY], Status::NotOnLink),
        ] {
            let reply = ask(MessageType::Confirm, &[client(), wants(9, &held)]).unwrap();
            assert_eq!(status_in(&reply), expected, "{held:?}");
            assert_eq!(reply.opts().get(OptionCode::IANA), None);
        }
        assert_eq!(ask(MessageType::Confirm, &[client(), wants(9, &[])]), None);
    }

    #[test]
    fn release_and_decline_are_acknowledged() {
        for kind in [MessageType::Release, MessageType::Decline] {
            let reply = ask(kind, &[client(), server(), wants(9, &[GUEST])]).unwrap();
            assert_eq!((reply.msg_type(), status_in(&reply)), (MessageType::Reply, Status::Success));
            assert_eq!(reply.opts().get(OptionCode::IANA), None);
        }
    }

    #[test]
    fn an_information_request_is_told_the_names_and_needs_no_identifier() {
        for options in [vec![], vec![client()], vec![client(), server()]] {
            let reply = ask(MessageType::InformationRequest, &options).unwrap();
            assert_eq!(reply.msg_type(), MessageType::Reply);
            assert!(reply.opts().get(OptionCode::DomainNameServers).is_some());
            assert_eq!(reply.opts().get(OptionCode::ClientId), options.first());
        }
        assert_eq!(ask(MessageType::InformationRequest, &[client(), wants(9, &[])]), None);
    }

    /// RFC 8415, 16.
    #[test]
    fn a_message_with_identifiers_missing_or_in_excess_is_not_answered() {
        use MessageType::*;
        let other = DhcpOption::ServerId(vec![0, 3, 0, 1, 2, 0, 0, 0, 0, 9]);
        let ia = wants(9, &[GUEST]);
        for kind in [Solicit, Confirm, Rebind] {
            assert!(ask(kind, &[client(), ia.clone()]).is_some());
            assert_eq!(ask(kind, std::slice::from_ref(&ia)), None, "{kind:?} of nobody");
            assert_eq!(ask(kind, &[client(), server(), ia.clone()]), None, "{kind:?} to a server");
        }
        for kind in [Request, Renew, Release, Decline] {
            assert!(ask(kind, &[client(), server(), ia.clone()]).is_some());
            assert_eq!(ask(kind, &[server(), ia.clone()]), None, "{kind:?} of nobody");
            assert_eq!(ask(kind, &[client(), ia.clone()]), None, "{kind:?} to no server");
            assert_eq!(ask(kind, &[client(), other.clone(), ia.clone()]), None, "{kind:?} to another");
        }
        for kind in [Advertise, Reply, Reconfigure, RelayForw, RelayRepl, Unknown(200)] {
            assert_eq!(ask(kind, &[client(), server(), ia.clone()]), None, "{kind:?}");
        }
        assert_eq!(ask(Solicit, &[DhcpOption::ClientId(vec![0, 1]), ia.clone()]), None);
        assert_eq!(ask(Solicit, &[DhcpOption::ClientId(vec![0; 131]), ia]), None);
    }

    #[test]
    fn only_the_guests_link_local_address_is_answered() {
        let bytes = request(MessageType::Solicit, &[client(), wants(9, &[])]);
        let ask = |source| answer(&addresses(), &config(), GUEST_MAC, source, &bytes).is_some();
        assert!(ask(address("fe80::3")));
        for source in [address("fdc4:f303:9324::3"), address("::"), addresses().gateway_link_local()] {
            assert!(!ask(source), "{source}");
        }
        let mut off = addresses();
        off.v6 = None;
        assert_eq!(answer(&off, &config(), GUEST_MAC, address("fe80::3"), &bytes), None);
    }

    #[test]
    fn a_cut_message_is_not_answered() {
        let bytes = request(MessageType::Solicit, &[client(), wants(9, &[GUEST])]);
        assert!(ask_bytes(&bytes).is_some());
        let whole = 4 + 4 + CLIENT.len();
        for len in (0..bytes.len()).filter(|len| *len != whole) {
            assert_eq!(ask_bytes(&bytes[..len]), None, "{len} bytes");
        }
    }

    /// A decoder that follows them would need a frame of its stack for each.
    #[test]
    fn associations_inside_associations_are_not_followed() {
        let mut inner = Vec::new();
        while inner.len() < 65_000 {
            let len = inner.len() as u16 + 4;
            inner = [&[0, 4][..], &len.to_be_bytes(), &[0, 0, 0, 1], &inner].concat();
        }
        let message = request(MessageType::Solicit, &[client()]);
        let reply = ask_bytes(&[message, inner].concat()).unwrap();
        assert!(reply.opts().get(OptionCode::IATA).is_some());
    }

    #[test]
    fn no_request_makes_a_reply_outgrow_a_packet() {
        let many: Vec<Ipv6Addr> = (0..20).map(|i| Ipv6Addr::from(u128::from(u64::MAX) + i)).collect();
        let associations = (0..20).map(|id| wants(id, &many));
        let options = [DhcpOption::ClientId(vec![0; 130])].into_iter().chain(associations);
        let reply = ask(MessageType::Rebind, &options.collect::<Vec<_>>()).unwrap();
        assert_eq!(given(&reply, 0).0.len(), 1 + ADDRESSES_MAX);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            ask_bytes(&bytes);
        }

        #[test]
        fn no_options_make_it_panic(
            kind in 0u8..14,
            options in proptest::collection::vec(
                (0u16..27, proptest::collection::vec(any::<u8>(), 0..60)),
                0..10,
            ),
            with_client: bool,
            with_server: bool,
        ) {
            let identifiers = [client(), server()].into_iter().zip([with_client, with_server]);
            let identifiers: Vec<_> =
                identifiers.filter(|(_, with)| *with).map(|(option, _)| option).collect();
            let mut bytes = request(MessageType::from(kind), &identifiers);
            for (code, data) in options {
                bytes.extend(code.to_be_bytes());
                bytes.extend((data.len() as u16).to_be_bytes());
                bytes.extend(data);
            }
            ask_bytes(&bytes);
        }
    }
}
