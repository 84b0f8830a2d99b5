//! One word about destinations: of NO_PROXY, or of a rule.
//!
//! | word | what it means |
//! |---|---|
//! | `*` | everything |
//! | `example.com`, `.example.com` | that name and all below it |
//! | `*.example.com` | all names below it |
//! | `192.0.2.1`, `2001:db8::1` | that address |
//! | `192.0.2.0/24`, `2001:db8::/32` | the addresses of that network |
//!
//! Behind each may stand a port, or several where the word is a rule's: `example.com:80`, `[2001:db8::1]:443`,
//! `[2001:db8::]/32:443`. Where programs differ in what they read, docs/PROXY.md says which one is followed.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net};

use super::ports::{Ports, PortsError};
use super::target::{Target, host_name};

/// One word about destinations.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pattern {
    place: Place,
    ports: Ports,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Place {
    Any,
    /// All names below this one, and itself.
    Domain(Box<str>),
    /// All names below this one.
    Below(Box<str>),
    /// IPv4 written as IPv6 is IPv4 here.
    Network(IpNet),
}

/// What is no word about destinations.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PatternError {
    /// It is neither a name nor an address.
    #[error(
        "'{}' is neither a name (example.com, *.example.com), nor an address (192.0.2.1, 2001:db8::1), nor a network \
         (192.0.2.0/24), nor *", .0.escape_debug()
    )]
    Place(String),
    /// What stands behind it is no port.
    #[error(transparent)]
    Ports(#[from] PortsError),
}

impl Pattern {
    /// Whether this means a destination: by its name or by its address, whichever is known.
    pub fn matches(&self, target: &Target<'_>) -> bool {
        self.ports.contains(target.port)
            && match &self.place {
                Place::Any => true,
                Place::Domain(_) | Place::Below(_) => {
                    target.name.is_some_and(|name| self.is_about_name(name))
                }
                Place::Network(network) => {
                    target.address.is_some_and(|address| network.contains(&address.to_canonical()))
                }
            }
    }

    /// Whether this means a name, at some port and whatever its address is.
    pub fn is_about_name(&self, name: &str) -> bool {
        match &self.place {
            Place::Any => true,
            Place::Domain(domain) => name == &**domain || is_below(name, domain),
            Place::Below(domain) => is_below(name, domain),
            Place::Network(_) => false,
        }
    }

    /// Whether it takes a name to decide.
    pub fn asks_name(&self) -> bool {
        matches!(self.place, Place::Domain(_) | Place::Below(_))
    }

    /// Whether it takes an address to decide.
    pub fn asks_address(&self) -> bool {
        matches!(self.place, Place::Network(_))
    }

    /// The ports that are meant.
    pub fn ports(&self) -> &Ports {
        &self.ports
    }
}

/// Whether a name lies below a domain, at a label's boundary.
fn is_below(name: &str, domain: &str) -> bool {
    name.strip_suffix(domain).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
}

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        // An IPv6 address without brackets is no address with a port, though it may look like one.
        if let Some(place) = Place::read(text) {
            return Ok(Self { place, ports: Ports::default() });
        }
        let wrong = || PatternError::Place(text.chars().take(300).collect());
        let (place, ports) = text.rsplit_once(':').ok_or_else(wrong)?;
        let is_bare_v6 = place.contains(':') && !place.starts_with('[');
        let place = Place::read(place).filter(|_| !is_bare_v6).ok_or_else(wrong)?;
        Ok(Self { place, ports: ports.parse()? })
    }
}

impl Place {
    fn read(text: &str) -> Option<Self> {
        if text == "*" {
            return Some(Self::Any);
        }
        if let Some(network) = read_network(text) {
            return Some(Self::Network(network));
        }
        let name = |text: &str| host_name(text).map(String::into_boxed_str);
        match text.strip_prefix("*.") {
            Some(domain) => name(domain).map(Self::Below),
            None => name(text.strip_prefix('.').unwrap_or(text)).map(Self::Domain),
        }
    }
}

/// An address or a network; IPv6 may stand in brackets, its length behind them or inside.
fn read_network(text: &str) -> Option<IpNet> {
    let unbracketed;
    let plain = match text.strip_prefix('[') {
        None => text,
        Some(rest) => {
            let (inside, behind) = rest.split_once(']')?;
            if !inside.contains(':') || !(behind.is_empty() || behind.starts_with('/')) {
                return None;
            }
            unbracketed = [inside, behind].concat();
            &unbracketed
        }
    };
    match plain.parse::<IpAddr>() {
        Ok(address) => Some(IpNet::from(address.to_canonical())),
        Err(_) => plain.parse::<IpNet>().ok().map(|network| canonical(network.trunc())),
    }
}

/// A network of IPv4 addresses written as IPv6 (::ffff:0:0/96) is one of IPv4.
fn canonical(network: IpNet) -> IpNet {
    let v4 = |network: ipnet::Ipv6Net| {
        let address: Ipv4Addr = network.network().to_ipv4_mapped()?;
        Ipv4Net::new(address, network.prefix_len().checked_sub(96)?).ok()
    };
    match network {
        IpNet::V6(v6) => v4(v6).map_or(network, IpNet::V4),
        IpNet::V4(_) => network,
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Any => f.write_str("*")?,
            Place::Domain(domain) => f.write_str(domain)?,
            Place::Below(domain) => write!(f, "*.{domain}")?,
            Place::Network(network) => {
                let address = network.addr();
                let is_bracketed = address.is_ipv6() && !self.ports.is_all();
                if is_bracketed { write!(f, "[{address}]") } else { write!(f, "{address}") }?;
                if network.prefix_len() < network.max_prefix_len() {
                    write!(f, "/{}", network.prefix_len())?;
                }
            }
        }
        if self.ports.is_all() { Ok(()) } else { write!(f, ":{}", self.ports) }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::policy::target::TargetProtocol;
    use proptest::prelude::*;

    fn pattern(text: &str) -> Pattern {
        text.parse().unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn a_word_is_shown_in_one_form() {
        for (text, shown) in [
            ("*", "*"),
            ("*:443", "*:443"),
            ("Example.COM.", "example.com"),
            (".example.com", "example.com"),
            ("*.example.com:80", "*.example.com:80"),
            ("localhost:8080-8090,9000", "localhost:8080-8090,9000"),
            ("10.1.2.3", "10.1.2.3"),
            ("10.1.2.3/32", "10.1.2.3"),
            ("10.1.2.3/8", "10.0.0.0/8"),
            ("10.0.0.0/8:443", "10.0.0.0/8:443"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("::1", "::1"),
            ("[::1]", "::1"),
            ("[::1]:80", "[::1]:80"),
            ("2001:DB8::5/32", "2001:db8::/32"),
            ("[2001:db8::]/32:80", "[2001:db8::]/32:80"),
            ("[2001:db8::/32]:80", "[2001:db8::]/32:80"),
            ("::ffff:10.0.0.1", "10.0.0.1"),
            ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
            // No port: the address ends in it.
            ("2001:db8::1:80", "2001:db8::1:80"),
        ] {
            assert_eq!(pattern(text).to_string(), shown, "{text}");
        }
    }

    #[test]
    fn what_is_neither_name_nor_address_is_refused() {
        for text in [
            "",
            ".",
            "*.",
            "**",
            "*x",
            "a*.b",
            "*.*.b",
            "a b",
            "a,b",
            ":80",
            "x:",
            "x:0",
            "x:http",
            "x:70000",
            "[::1",
            "::1]",
            "[]",
            "[x]:80",
            "[10.0.0.1]",
            "10.0.0.256",
            "192.168",
            "10.0.0.0/33",
            "10.0.0.0/",
            "10.0.0.0/-1",
            "::/129",
            "fe80::1%eth0",
            "http://x",
            "<local>",
            "a/b",
            "[::1]x:80",
            "192.168.*",
            "éa",
        ] {
            assert!(text.parse::<Pattern>().is_err(), "{text}");
        }
        assert!("\u{1b}[2J".parse::<Pattern>().unwrap_err().to_string().starts_with("'\\u{1b}[2J' is"));
    }

    #[test]
    fn a_domain_ends_at_a_label() {
        assert!(is_below("a.b", "b") && is_below("x.a.b", "a.b"));
        assert!(!is_below("b", "b") && !is_below("ab", "b") && !is_below(".b", "b") && !is_below("b.a", "b"));
    }

    #[test]
    fn names_ask_for_names_and_networks_for_addresses() {
        for (text, name, address) in
            [("*", false, false), ("a", true, false), ("*.a", true, false), ("::/0", false, true)]
        {
            let pattern = pattern(text);
            assert_eq!((pattern.asks_name(), pattern.asks_address()), (name, address), "{text}");
        }
    }

    /// Any pattern, without ports of more than one kind.
    pub fn any_pattern() -> impl Strategy<Value = Pattern> {
        let place = prop_oneof![
            Just(Place::Any),
            "[a-z]([a-z0-9_-]{0,6}\\.){0,3}[a-z]{1,4}"
                .prop_filter_map("a name", |text| host_name(&text).map(|name| Place::Domain(name.into()))),
            "[a-z]{1,4}(\\.[a-z]{1,4}){0,2}".prop_map(|text| Place::Below(text.into())),
            (any::<[u8; 4]>(), 0u8..=32).prop_map(|(octets, length)| {
                Place::Network(IpNet::new(octets.into(), length).unwrap().trunc())
            }),
            (any::<[u8; 16]>(), 0u8..=128).prop_map(|(octets, length)| {
                Place::Network(canonical(IpNet::new(octets.into(), length).unwrap().trunc()))
            }),
        ];
        let ports = prop_oneof![Just(Ports::default()), (1u16..).prop_map(|port| Ports::of(&[port]))];
        (place, ports).prop_map(|(place, ports)| Pattern { place, ports })
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_as_it_was(pattern in any_pattern()) {
            prop_assert_eq!(pattern.to_string().parse(), Ok(pattern));
        }

        #[test]
        fn no_text_makes_it_panic(text in any::<String>(), near in "[a-c0-9.:/*\\[\\]-]{0,24}") {
            for text in [text, near] {
                if let Ok(pattern) = text.parse::<Pattern>() {
                    prop_assert_eq!(pattern.to_string().parse(), Ok(pattern));
                }
            }
        }

        #[test]
        fn any_target_is_decided_about(pattern in any_pattern(), name in "[a-z.]{0,12}", octets: [u8; 16], port: u16) {
            let target = Target {
                name: Some(&name),
                address: Some(octets.into()),
                port,
                protocol: TargetProtocol::Udp,
            };
            if pattern.matches(&target) && pattern.asks_name() {
                let nameless = Target { name: None, ..target };
                prop_assert!(!pattern.matches(&nameless));
            }
        }
    }
}
