//! The names of the link, and what hythe knows of each.
//!
//! Whatever lies in one of the link's zones, and is no record of the user's, is answered here and nowhere else: a resolver
//! of the host would at best say that there is no such name, and would learn what the guest looked for. The zones are
//! `docker.internal`, `containers.internal` and the reverse zones of the link's subnets. The guest's own name is no zone:
//! a guest called `dev` has one name, not a top-level domain.

use std::net::IpAddr;

use hickory_proto::op::{self, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, PTR, SOA};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use ipnet::IpNet;
use tracing::warn;

use super::message;
use crate::frame::address::Address;
use crate::policy::addresses::{Addresses, Family};

/// How long an answer may be kept, in seconds: the link's addresses hardly ever change, but when they do, soon.
const TTL_S: u32 = 60;

/// Zones in which nothing is but what is listed here.
const ZONES: [&str; 2] = ["docker.internal.", "containers.internal."];

const GATEWAY: &str = "gateway.docker.internal.";
const HOST: &str = "host.docker.internal.";
/// Who answers for the zones, as their SOA records say (RFC 1035, 3.3.13): a mailbox that nobody reads.
const MAILBOX: &str = "hostmaster.docker.internal.";

/// Which address of a family a name stands for.
type Which = fn(&Family) -> Address;

const HOSTS: [(&str, Which); 5] = [
    (HOST, |family| family.host),
    ("host.containers.internal.", |family| family.host),
    (GATEWAY, |family| family.gateway),
    ("gateway.containers.internal.", |family| family.gateway),
    ("http.docker.internal.", |family| family.gateway),
];

/// The names of one link.
pub(super) struct LinkNames {
    zones: Vec<Name>,
    hosts: Vec<(Name, Vec<Address>)>,
    pointers: Vec<(Name, Name)>,
    soa: Option<SOA>,
}

/// What is known of a name.
#[derive(Debug)]
pub(super) struct Found {
    /// Whether it exists.
    pub code: ResponseCode,
    /// The records asked for.
    pub answers: Vec<Record>,
    /// Where there are none: for how long that may be believed (RFC 2308, 2).
    pub authority: Option<Record>,
}

impl LinkNames {
    /// The names of a link with these addresses and a guest that calls itself `hostname`.
    pub fn new(addresses: &Addresses, hostname: Option<&str>) -> Self {
        let mut zones: Vec<Name> = ZONES.into_iter().filter_map(name).collect();
        let mut hosts: Vec<(Name, Vec<Address>)> = HOSTS
            .into_iter()
            .filter_map(|(text, which)| Some((name(text)?, addresses.families().map(which).collect())))
            .collect();
        let guest = hostname.and_then(guest_name);
        if let Some(guest) = &guest {
            hosts.push((guest.clone(), addresses.families().map(|family| family.guest).collect()));
        }
        let mut pointers = Vec::new();
        let mut point = |address: Address, target: Option<Name>| {
            pointers.extend(target.map(|target| (Name::from(address.ip()), target)));
        };
        for family in addresses.families() {
            point(family.gateway, name(GATEWAY));
            point(family.host, name(HOST));
            point(family.guest, guest.clone());
            zones.extend(reverse_zones(family.subnet));
        }
        if addresses.v6.is_some() {
            point(addresses.gateway_link_local(), name(GATEWAY));
        }
        let soa = name(GATEWAY)
            .zip(name(MAILBOX))
            .map(|(primary, mailbox)| SOA::new(primary, mailbox, 1, 3600, 600, 86_400, TTL_S));
        Self { zones, hosts, pointers, soa }
    }

    /// What is known of a name, or `None` where it is none of the link's.
    pub fn look_up(&self, question: &op::Query) -> Option<Found> {
        let asked = question.name();
        let host = self.hosts.iter().find(|(name, _)| name == asked);
        let pointer = self.pointers.iter().find(|(name, _)| name == asked);
        // A name that is ours but in no zone of ours is a zone of its own.
        let apex = match self.zones.iter().find(|zone| zone.zone_of(asked)) {
            Some(zone) => zone,
            None => host.map(|(name, _)| name).or(pointer.map(|(name, _)| name))?,
        };
        if !message::is_internet(question.query_class()) {
            // Of the other classes nothing is known, and nobody else is asked about these names.
            return Some(Found { code: ResponseCode::Refused, answers: Vec::new(), authority: None });
        }
        let soa = || self.soa.clone().map(RData::SOA);
        let answers: Vec<Record> = host
            .into_iter()
            .flat_map(|(_, addresses)| addresses.iter().map(|address| address_data(*address)))
            .chain(pointer.map(|(_, target)| RData::PTR(PTR(target.clone()))))
            .chain(soa().filter(|_| apex == asked))
            .filter(|data| [data.record_type(), RecordType::ANY].contains(&question.query_type()))
            .map(|data| Record::from_rdata(asked.clone(), TTL_S, data))
            .collect();
        // RFC 8020: what has names below it exists, or none of those would.
        let exists = host.is_some()
            || pointer.is_some()
            || apex == asked
            || self.hosts.iter().map(|(name, _)| name).any(|name| asked.zone_of(name))
            || self.pointers.iter().map(|(name, _)| name).any(|name| asked.zone_of(name));
        let authority =
            soa().filter(|_| answers.is_empty()).map(|soa| Record::from_rdata(apex.clone(), TTL_S, soa));
        let code = if exists { ResponseCode::NoError } else { ResponseCode::NXDomain };
        Some(Found { code, answers, authority })
    }
}

fn name(text: &str) -> Option<Name> {
    Name::from_ascii(text).ok()
}

/// The name that a guest gives itself, where it can be one. RFC 6761, 6.3: `localhost` is everybody's own.
fn guest_name(hostname: &str) -> Option<Name> {
    let parsed =
        Name::from_ascii(hostname).ok().filter(|name| name.iter().next().is_some() && !name.is_localhost());
    let Some(mut name) = parsed else {
        warn!(hostname, "the guest's name cannot be resolved: it is no host name, or everybody's");
        return None;
    };
    name.set_fqdn(true);
    Some(name)
}

fn address_data(address: Address) -> RData {
    match address.ip() {
        IpAddr::V4(ip) => RData::A(A(ip)),
        IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
    }
}

/// The zones under in-addr.arpa (RFC 1035, 3.5) or ip6.arpa (RFC 3596, 2.5) that hold a subnet and nothing else: cut
/// at the next whole label, so up to 128 of them where a prefix ends in the middle of an octet.
fn reverse_zones(subnet: IpNet) -> Vec<Name> {
    let (bits_per_label, suffix_labels) = match subnet {
        IpNet::V4(_) => (8, 2),
        IpNet::V6(_) => (4, 2),
    };
    let labels = subnet.prefix_len().div_ceil(bits_per_label);
    if labels == 0 {
        return Vec::new();
    }
    let zone = |net: IpNet| Name::from(net.network()).trim_to(usize::from(labels + suffix_labels));
    subnet.subnets(labels * bits_per_label).map(|nets| nets.map(zone).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slow::dns::fake_server::addresses;
    use hickory_proto::rr::DNSClass;

    const NONE: [&str; 0] = [];

    fn look_up(names: &LinkNames, text: &str, kind: RecordType) -> Option<(ResponseCode, Vec<String>)> {
        let found = names.look_up(&op::Query::query(name(text).unwrap(), kind))?;
        assert_eq!(found.authority.is_some(), found.answers.is_empty(), "{text} {kind}");
        for record in &found.answers {
            assert_eq!((record.name.to_string(), record.ttl), (text.to_string(), TTL_S));
        }
        if let Some(authority) = &found.authority {
            assert!(authority.name.zone_of(&text.parse().unwrap()), "{} for {text}", authority.name);
        }
        Some((found.code, found.answers.iter().map(|record| record.data.to_string()).collect()))
    }

    #[allow(clippy::unnecessary_wraps, reason = "what look_up returns")]
    fn records<const N: usize>(texts: [&str; N]) -> Option<(ResponseCode, Vec<String>)> {
        Some((ResponseCode::NoError, texts.map(str::to_string).to_vec()))
    }

    #[test]
    fn each_name_of_the_link_has_an_address_of_each_family() {
        let names = LinkNames::new(&addresses(), Some("web"));
        for (name, v4, v6) in [
            ("host.docker.internal.", "192.168.65.254", "fdc4:f303:9324::254"),
            ("host.containers.internal.", "192.168.65.254", "fdc4:f303:9324::254"),
            ("gateway.docker.internal.", "192.168.65.1", "fdc4:f303:9324::1"),
            ("gateway.containers.internal.", "192.168.65.1", "fdc4:f303:9324::1"),
            ("http.docker.internal.", "192.168.65.1", "fdc4:f303:9324::1"),
            ("HOST.Docker.Internal.", "192.168.65.254", "fdc4:f303:9324::254"),
            ("web.", "192.168.65.3", "fdc4:f303:9324::3"),
        ] {
            assert_eq!(look_up(&names, name, RecordType::A), records([v4]), "{name}");
            assert_eq!(look_up(&names, name, RecordType::AAAA), records([v6]), "{name}");
            assert_eq!(look_up(&names, name, RecordType::ANY).unwrap().1[..2], [v4, v6], "{name}");
            assert_eq!(look_up(&names, name, RecordType::HTTPS), records(NONE), "{name}");
        }
    }

    #[test]
    fn a_family_that_is_off_has_no_records_but_the_name_exists() {
        let names = LinkNames::new(&Addresses { v6: None, ..addresses() }, None);
        assert_eq!(look_up(&names, "host.docker.internal.", RecordType::AAAA), records(NONE));
        assert_eq!(look_up(&names, "host.docker.internal.", RecordType::A), records(["192.168.65.254"]));
    }

    #[test]
    fn addresses_of_the_link_have_names() {
        let names = LinkNames::new(&addresses(), Some("web.example"));
        for (address, target) in [
            ("192.168.65.1", "gateway.docker.internal."),
            ("192.168.65.254", "host.docker.internal."),
            ("192.168.65.3", "web.example."),
            ("fdc4:f303:9324::1", "gateway.docker.internal."),
            ("fdc4:f303:9324::254", "host.docker.internal."),
            ("fdc4:f303:9324::3", "web.example."),
            ("fe80::5894:efff:fee4:cdd", "gateway.docker.internal."),
        ] {
            let reverse = Name::from(address.parse::<IpAddr>().unwrap()).to_string();
            assert_eq!(look_up(&names, &reverse, RecordType::PTR), records([target]), "{address}");
            assert_eq!(look_up(&names, &reverse, RecordType::A), records(NONE), "{address}");
        }
    }

    #[test]
    fn nothing_else_exists_in_the_zones_of_the_link() {
        let names = LinkNames::new(&addresses(), None);
        for name in [
            "wpad.docker.internal.",
            "a.host.docker.internal.",
            "x.containers.internal.",
            "77.65.168.192.in-addr.arpa.",
            "3.65.168.192.in-addr.arpa.",
            "b._dns-sd._udp.0.65.168.192.in-addr.arpa.",
            "9.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.4.2.3.9.3.0.3.f.4.c.d.f.ip6.arpa.",
        ] {
            assert_eq!(
                look_up(&names, name, RecordType::A),
                Some((ResponseCode::NXDomain, vec![])),
                "{name}"
            );
        }
    }

    #[test]
    fn what_has_names_below_it_exists() {
        let names = LinkNames::new(&addresses(), None);
        for name in [
            "docker.internal.",
            "containers.internal.",
            "65.168.192.in-addr.arpa.",
            "0.0.0.0.0.0.0.0.0.0.0.4.2.3.9.3.0.3.f.4.c.d.f.ip6.arpa.",
        ] {
            assert_eq!(look_up(&names, name, RecordType::A), records(NONE), "{name}");
        }
        let mut wide = addresses();
        wide.v4.as_mut().unwrap().subnet = "192.168.64.0/23".parse().unwrap();
        let wide = LinkNames::new(&wide, None);
        assert_eq!(
            look_up(&wide, "64.168.192.in-addr.arpa.", RecordType::A),
            records(NONE),
            "nothing below it"
        );
        let (code, soa) = look_up(&names, "docker.internal.", RecordType::SOA).unwrap();
        assert_eq!((code, soa.len()), (ResponseCode::NoError, 1));
    }

    #[test]
    fn the_rest_of_the_world_is_not_ours() {
        let names = LinkNames::new(&addresses(), Some("dev"));
        for name in [
            "example.com.",
            ".",
            "internal.",
            "mydocker.internal.",
            "host.docker.internal.example.com.",
            "web.dev.",
            "168.192.in-addr.arpa.",
            "1.66.168.192.in-addr.arpa.",
        ] {
            assert_eq!(look_up(&names, name, RecordType::A), None, "{name}");
        }
    }

    #[test]
    fn in_other_classes_the_names_of_the_link_are_refused_not_leaked() {
        let names = LinkNames::new(&addresses(), None);
        let mut question = op::Query::query("host.docker.internal.".parse().unwrap(), RecordType::TXT);
        question.set_query_class(DNSClass::CH);
        assert_eq!(names.look_up(&question).unwrap().code, ResponseCode::Refused);
        question.set_name("version.bind.".parse().unwrap());
        assert!(names.look_up(&question).is_none());
    }

    #[test]
    fn a_guest_cannot_be_called_what_everybody_is_called() {
        for hostname in ["", ".", "localhost", "localhost.", "a..b", &"x".repeat(64)] {
            let names = LinkNames::new(&addresses(), Some(hostname));
            assert_eq!(names.hosts.len(), HOSTS.len(), "{hostname:?}");
        }
    }

    #[test]
    fn a_subnet_that_ends_inside_a_label_has_a_zone_for_each_label() {
        for (subnet, zones) in [
            ("192.168.65.0/24", vec!["65.168.192.in-addr.arpa."]),
            ("10.0.2.0/23", vec!["2.0.10.in-addr.arpa.", "3.0.10.in-addr.arpa."]),
            ("192.0.2.8/31", vec!["8.2.0.192.in-addr.arpa.", "9.2.0.192.in-addr.arpa."]),
            ("2001:db8::/31", vec!["8.b.d.0.1.0.0.2.ip6.arpa.", "9.b.d.0.1.0.0.2.ip6.arpa."]),
            ("0.0.0.0/0", vec![]),
        ] {
            let found: Vec<_> =
                reverse_zones(subnet.parse().unwrap()).iter().map(ToString::to_string).collect();
            assert_eq!(found, zones, "{subnet}");
        }
    }
}
