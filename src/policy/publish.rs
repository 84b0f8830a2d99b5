//! The words of `-p`: which port of the host leads to which port of the guest, as docker(1) understands them.
//!
//! ```text
//! [ADDRESS:][HOST[-END]:]GUEST[-END][/tcp|udp]      IPv6 addresses in brackets
//!
//! 8000:80                 all addresses of both families
//! 127.0.0.1:8000:80       that one alone
//! 80    127.0.0.1::80     a random port of the host; 0 says the same
//! 8000-8002:80-82         pairs
//! 8000-8010:80            the first of the host's ports that is free
//! ```
//! From words come [`PublishRequest`]s, one a port of the guest. Which port of the host a request gets is found where ports are
//! opened (`slow::ports`); what it has got then is a [`Binding`].

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::{Deserialize, Serialize};

/// What is longer is no specification: the longest one that means something has less than 100 characters.
const LENGTH_MAX: usize = 128;

/// All addresses of the host, of both families.
pub const ALL_ADDRESSES: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];

/// What a published port speaks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PublishedProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for PublishedProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// Which port of the host is wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostPort {
    /// Any of those that the host gives out.
    Random,
    /// This one.
    One(u16),
    /// The first of these, from the first to the last, that is free.
    FirstFree(u16, u16),
}

/// A port of the guest that is to be published.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PublishRequest {
    /// The host's address; none means all, of both families.
    pub address: Option<IpAddr>,
    /// The host's port.
    pub host_port: HostPort,
    /// The port of the guest.
    pub guest_port: u16,
    /// The protocol.
    pub protocol: PublishedProtocol,
}

impl PublishRequest {
    /// The addresses of the host that it means.
    pub fn addresses(&self) -> Vec<IpAddr> {
        match self.address {
            Some(address) => vec![address],
            None => ALL_ADDRESSES.to_vec(),
        }
    }

    /// Whether a binding is one that this request means, or may have made.
    pub fn covers(&self, binding: &Binding) -> bool {
        let port = match self.host_port {
            HostPort::Random => true,
            HostPort::One(port) => port == binding.host_port,
            HostPort::FirstFree(first, last) => (first..=last).contains(&binding.host_port),
        };
        port && (self.guest_port, self.protocol) == (binding.guest_port, binding.protocol)
            && self.addresses().contains(&binding.address)
    }
}

/// A port of one address of the host that leads to one of the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Serialize, Deserialize)]
pub struct Binding {
    /// The address of the host.
    pub address: IpAddr,
    /// The port of the host.
    pub host_port: u16,
    /// The port of the guest.
    pub guest_port: u16,
    /// The protocol.
    pub protocol: PublishedProtocol,
}

impl Binding {
    /// The host's address and port.
    pub fn endpoint(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.host_port)
    }

    /// The host's side in words, as Docker names it.
    pub fn place(&self) -> String {
        match self.protocol {
            PublishedProtocol::Tcp => self.endpoint().to_string(),
            PublishedProtocol::Udp => format!("{}/udp", self.endpoint()),
        }
    }

    /// Whether two cannot be at the same time: the same port of the same address, or of all.
    pub fn meets(&self, other: &Self) -> bool {
        (self.host_port, self.protocol) == (other.host_port, other.protocol)
            && self.address.is_ipv4() == other.address.is_ipv4()
            && (self.address == other.address
                || self.address.is_unspecified()
                || other.address.is_unspecified())
    }
}

/// As `docker port` prints it.
impl fmt::Display for Binding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} -> {}", self.guest_port, self.protocol, self.endpoint())
    }
}

/// Why a specification means nothing.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("'{spec}': {problem}{hint}")]
pub struct PublishError {
    spec: String,
    problem: String,
    hint: &'static str,
}

/// What is expected instead.
const HINT: &str = "; expected [ADDRESS:][HOSTPORT[-END]:]GUESTPORT[-END][/tcp|udp], like 8000:80";
const HINT_IPV6: &str = "; an IPv6 address stands in brackets, like [::1]:8000:80";
const SCTP: &str = "sctp cannot be published: hythe relays TCP, UDP and ICMP echo, and has no SCTP";

/// Parses one specification into what it asks for, one request a port of the guest.
pub fn parse(spec: &str) -> Result<Vec<PublishRequest>, PublishError> {
    let shown: String = spec.chars().take(LENGTH_MAX).flat_map(char::escape_debug).collect();
    let fail = |problem: String, hint| PublishError { spec: shown.clone(), problem, hint };
    if spec.len() > LENGTH_MAX {
        return Err(fail(format!("is longer than {LENGTH_MAX} bytes"), HINT));
    }
    let (address, host, guest) = parts(spec);
    let (guest, protocol) = guest.split_once('/').unwrap_or((guest, ""));
    let protocol = match protocol.to_ascii_lowercase().as_str() {
        "tcp" | "" => PublishedProtocol::Tcp,
        "udp" => PublishedProtocol::Udp,
        "sctp" => return Err(fail(SCTP.into(), "")),
        _ => return Err(fail(format!("invalid proto: {}", protocol.escape_debug()), HINT)),
    };
    let address = match address {
        "" => None,
        text => {
            let hint = if text.parse::<Ipv6Addr>().is_ok() { HINT_IPV6 } else { HINT };
            let ip = host_address(text);
            Some(ip.ok_or_else(|| fail(format!("invalid IP address: {}", text.escape_debug()), hint))?)
        }
    };
    if guest.is_empty() {
        return Err(fail("no port specified".into(), HINT));
    }
    let (first, last) = range(guest)
        .filter(|(first, _)| *first > 0)
        .ok_or_else(|| fail(format!("invalid containerPort: {}", guest.escape_debug()), HINT))?;
    let host_range = match host {
        "" | "0" => None,
        text => {
            let range = range(text).filter(|(first, _)| *first > 0);
            Some(range.ok_or_else(|| fail(format!("invalid hostPort: {}", text.escape_debug()), HINT))?)
        }
    };
    let host_port = |index: u16| match host_range {
        None => HostPort::Random,
        Some((from, to)) if first == last && from != to => HostPort::FirstFree(from, to),
        Some((from, _)) => HostPort::One(from + index),
    };
    if let Some((from, to)) = host_range
        && last != first
        && to - from != last - first
    {
        let problem = format!("invalid ranges specified for container and host Ports: {guest} and {host}");
        return Err(fail(problem, HINT));
    }
    Ok((0..=last - first)
        .map(|index| PublishRequest {
            address,
            host_port: host_port(index),
            guest_port: first + index,
            protocol,
        })
        .collect())
}

/// Address, host's part and guest's part; what is not there is empty.
fn parts(spec: &str) -> (&str, &str, &str) {
    let Some((host, guest)) = spec.rsplit_once(':') else { return ("", "", spec) };
    let (address, host) = host.rsplit_once(':').unwrap_or(("", host));
    (address, host, guest)
}

/// An IPv4 address, or an IPv6 one in brackets. IPv4 written as IPv6 (RFC 4291, 2.5.5.2) is IPv4.
fn host_address(text: &str) -> Option<IpAddr> {
    match text.strip_prefix('[').and_then(|text| text.strip_suffix(']')) {
        Some(v6) => v6.parse::<Ipv6Addr>().ok().map(|ip| IpAddr::V6(ip).to_canonical()),
        None => text.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
    }
}

fn range(text: &str) -> Option<(u16, u16)> {
    let port = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse::<u16>().ok().filter(|_| digits)
    };
    match text.split_once('-') {
        None => port(text).map(|port| (port, port)),
        Some((first, last)) => {
            let (first, last) = (port(first)?, port(last)?);
            (first <= last).then_some((first, last))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a specification asks for, in words: `ADDRESS PORT GUEST/PROTOCOL`, `*` for all addresses, `?` for any port.
    fn meaning(spec: &str) -> Vec<String> {
        let word = |request: PublishRequest| {
            let address = request.address.map_or("*".to_string(), |ip| ip.to_string());
            let port = match request.host_port {
                HostPort::Random => "?".to_string(),
                HostPort::One(port) => port.to_string(),
                HostPort::FirstFree(first, last) => format!("{first}..{last}"),
            };
            format!("{address} {port} {}/{}", request.guest_port, request.protocol)
        };
        parse(spec).unwrap_or_else(|error| panic!("{error}")).into_iter().map(word).collect()
    }

    /// By Docker's reference ("docker container run", "Publish or expose port") and by what its Engine does.
    #[test]
    fn what_docker_understands_is_understood_as_docker_does() {
        for (spec, expected) in [
            ("80", &["* ? 80/tcp"][..]),
            ("80/udp", &["* ? 80/udp"]),
            ("80/TCP", &["* ? 80/tcp"]),
            ("80/", &["* ? 80/tcp"]),
            (":80", &["* ? 80/tcp"]),
            ("::80", &["* ? 80/tcp"]),
            ("0:80", &["* ? 80/tcp"]),
            ("8000:80", &["* 8000 80/tcp"]),
            (":8000:80", &["* 8000 80/tcp"]),
            ("08000:080", &["* 8000 80/tcp"]),
            ("80:80/tcp", &["* 80 80/tcp"]),
            ("53:53/udp", &["* 53 53/udp"]),
            ("127.0.0.1:80:8080/tcp", &["127.0.0.1 80 8080/tcp"]),
            ("127.0.0.1:8001:80", &["127.0.0.1 8001 80/tcp"]),
            ("127.0.0.1::80", &["127.0.0.1 ? 80/tcp"]),
            ("127.0.0.1:0:80", &["127.0.0.1 ? 80/tcp"]),
            ("0.0.0.0:1234-1235:3333-3334/udp", &["0.0.0.0 1234 3333/udp", "0.0.0.0 1235 3334/udp"]),
            ("192.168.1.100::3333-3334/udp", &["192.168.1.100 ? 3333/udp", "192.168.1.100 ? 3334/udp"]),
            ("[::1]:8001:80", &["::1 8001 80/tcp"]),
            ("[::1]::80", &["::1 ? 80/tcp"]),
            ("[2001:4860:0:2001::68]::333", &["2001:4860:0:2001::68 ? 333/tcp"]),
            ("[::]:8000:80/udp", &[":: 8000 80/udp"]),
            ("[::ffff:127.0.0.1]:8000:80", &["127.0.0.1 8000 80/tcp"]),
            ("9000-9001:90-91/udp", &["* 9000 90/udp", "* 9001 91/udp"]),
            ("3333-3334", &["* ? 3333/tcp", "* ? 3334/tcp"]),
            ("80-80", &["* ? 80/tcp"]),
            ("8000-8000:80-80", &["* 8000 80/tcp"]),
            ("8000-9000:80", &["* 8000..9000 80/tcp"]),
            ("8000-9000:80-80/udp", &["* 8000..9000 80/udp"]),
            ("127.0.0.1:8000-8001:80", &["127.0.0.1 8000..8001 80/tcp"]),
            ("65535:65535", &["* 65535 65535/tcp"]),
        ] {
            assert_eq!(meaning(spec), expected, "{spec}");
        }
        assert_eq!(meaning("1-65535:1-65535").len(), 65535);
    }

    #[test]
    fn what_is_wrong_is_said_in_dockers_words() {
        for (spec, problem) in [
            ("", "no port specified"),
            (":", "no port specified"),
            ("/tcp", "no port specified"),
            ("8000:", "no port specified"),
            ("127.0.0.1:8000:", "no port specified"),
            ("x", "invalid containerPort: x"),
            ("0", "invalid containerPort: 0"),
            ("8000:0", "invalid containerPort: 0"),
            ("8000:80x", "invalid containerPort: 80x"),
            ("8000:80-", "invalid containerPort: 80-"),
            ("8000:82-80", "invalid containerPort: 82-80"),
            ("8000:65536", "invalid containerPort: 65536"),
            ("8000:-1", "invalid containerPort: -1"),
            ("8000: 80", "invalid containerPort:  80"),
            ("8000:٨٠", "invalid containerPort: ٨٠"),
            ("x:80", "invalid hostPort: x"),
            ("65536:80", "invalid hostPort: 65536"),
            ("+80:80", "invalid hostPort: +80"),
            ("0-10:80", "invalid hostPort: 0-10"),
            ("8002-8000:80-82", "invalid hostPort: 8002-8000"),
            ("8000-8002-8004:80", "invalid hostPort: 8000-8002-8004"),
            ("8000-8002:80-81", "invalid ranges specified for container and host Ports: 80-81 and 8000-8002"),
            ("8000:80-81", "invalid ranges specified for container and host Ports: 80-81 and 8000"),
            ("8000:80/icmp", "invalid proto: icmp"),
            ("8000:80/tcp/udp", "invalid proto: tcp/udp"),
            ("8000:80/sctp", SCTP),
            ("8000:80/SCTP", SCTP),
            ("1.2.3:8000:80", "invalid IP address: 1.2.3"),
            ("256.1.1.1:8000:80", "invalid IP address: 256.1.1.1"),
            ("localhost:8000:80", "invalid IP address: localhost"),
            ("::1:8000:80", "invalid IP address: ::1"),
            ("[::1:8000:80", "invalid IP address: [::1"),
            ("[fe80::1%eth0]:8000:80", "invalid IP address: [fe80::1%eth0]"),
            ("[]:8000:80", "invalid IP address: []"),
            ("[127.0.0.1]:8000:80", "invalid IP address: [127.0.0.1]"),
        ] {
            assert_eq!(parse(spec).unwrap_err().problem, problem, "{spec}");
        }
        let said = |spec: &str| parse(spec).unwrap_err().to_string();
        assert!(said("::1:8000:80").ends_with("stands in brackets, like [::1]:8000:80"));
        assert!(said("x:80").starts_with("'x:80': invalid hostPort: x; expected [ADDRESS:]"));
        assert!(said("80\u{1b}[2J").starts_with("'80\\u{1b}[2J': "), "a terminal is not spoken to");
        assert!(said(&"8".repeat(1 << 20)).len() < 400);
    }

    #[test]
    fn bindings_meet_where_one_has_every_address_of_the_family() {
        let binding = |text: &str, port| Binding {
            address: text.parse().unwrap(),
            host_port: port,
            guest_port: 80,
            protocol: PublishedProtocol::Tcp,
        };
        let any = binding("0.0.0.0", 8000);
        assert!(any.meets(&binding("127.0.0.1", 8000)) && binding("127.0.0.1", 8000).meets(&any));
        assert!(!any.meets(&binding("::", 8000)) && !any.meets(&binding("0.0.0.0", 8001)));
        assert!(!binding("127.0.0.1", 8000).meets(&binding("127.0.0.2", 8000)));
        assert!(!any.meets(&Binding { protocol: PublishedProtocol::Udp, ..any }));
        assert_eq!(any.to_string(), "80/tcp -> 0.0.0.0:8000");
        assert_eq!(binding("::", 8000).to_string(), "80/tcp -> [::]:8000");
    }

    fn address() -> impl Strategy<Value = Option<IpAddr>> {
        prop_oneof![
            Just(None),
            any::<[u8; 4]>().prop_map(|octets| Some(IpAddr::from(octets))),
            // Those that are written as IPv4 are IPv4.
            any::<[u8; 16]>().prop_map(|octets| Some(IpAddr::from(octets).to_canonical())),
        ]
    }

    proptest! {
        #[test]
        fn what_is_written_is_understood(
            address in address(),
            host in prop_oneof![Just(None), (1u16..=65000, 0u16..500).prop_map(Some)],
            guest in 1u16..=65000,
            count in 0u16..500,
            udp: bool,
        ) {
            // Either a range for a range, or a range for one.
            let (host, count) = match host {
                Some((first, more)) if more % 2 == 0 => (Some((first, first + count)), count),
                Some((first, more)) => (Some((first, first + more)), 0),
                None => (None, count),
            };
            let host_text = host.map_or(String::new(), |(first, last)| format!("{first}-{last}"));
            let address_text = match address {
                None => String::new(),
                Some(IpAddr::V4(v4)) => v4.to_string(),
                Some(IpAddr::V6(v6)) => format!("[{v6}]"),
            };
            let protocol = if udp { "/udp" } else { "" };
            let spec = format!("{address_text}:{host_text}:{guest}-{}{protocol}", guest + count);
            let requests = parse(&spec).unwrap();
            prop_assert_eq!(requests.len(), usize::from(count) + 1);
            for (index, request) in requests.iter().enumerate() {
                let index = index as u16;
                let host_port = match host {
                    None => HostPort::Random,
                    Some((first, last)) if count == 0 && first != last => HostPort::FirstFree(first, last),
                    Some((first, _)) => HostPort::One(first + index),
                };
                let protocol = if udp { PublishedProtocol::Udp } else { PublishedProtocol::Tcp };
                let expected = PublishRequest { address, host_port, guest_port: guest + index, protocol };
                prop_assert_eq!(request, &expected);
            }
        }

        #[test]
        fn no_text_makes_the_parser_panic(spec in "[0-9a-f:.\\[\\]/-]{0,30}") {
            let _ = parse(&spec);
        }

        #[test]
        fn nor_does_any_other(spec in any::<String>()) {
            if let Err(error) = parse(&spec) {
                prop_assert!(!error.to_string().contains(char::is_control));
            }
        }
    }
}
