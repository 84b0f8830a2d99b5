//! A destination in the user's words: `DEST[:PORT][/tcp|udp]`.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use super::names::DomainName;
use super::publish::PublishedProtocol;

/// A destination that is asked about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Asked {
    /// Who.
    pub host: Host,
    /// Which port of theirs, if it matters.
    pub port: Option<u16>,
    /// By what.
    pub protocol: PublishedProtocol,
}

/// Who is meant.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Host {
    /// Who has this address.
    Address(IpAddr),
    /// Whoever has this name.
    Name(DomainName),
}

/// Words that mean no destination.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "'{0}' is no destination: expected NAME, ADDRESS, NAME:PORT, ADDRESS:PORT or [IPV6]:PORT, and /udp behind it"
)]
pub struct AskedError(String);

/// The longest text that may mean one: a name, brackets, a port, a protocol.
const LEN_MAX: usize = 300;

impl FromStr for Asked {
    type Err = AskedError;

    fn from_str(text: &str) -> Result<Self, AskedError> {
        let none = || AskedError(text.chars().take(LEN_MAX).flat_map(char::escape_debug).collect());
        if text.len() > LEN_MAX {
            return Err(none());
        }
        let (place, protocol) = match text.rsplit_once('/') {
            None => (text, PublishedProtocol::Tcp),
            Some((place, "tcp")) => (place, PublishedProtocol::Tcp),
            Some((place, "udp")) => (place, PublishedProtocol::Udp),
            Some(_) => return Err(none()),
        };
        let (host, port) = split(place).ok_or_else(none)?;
        let host = match host.parse::<IpAddr>() {
            Ok(address) => Host::Address(address),
            Err(_) => Host::Name(name(host).ok_or_else(none)?),
        };
        Ok(Self { host, port, protocol })
    }
}

/// Host and port of a place.
fn split(place: &str) -> Option<(&str, Option<u16>)> {
    // An IPv6 address by itself has colons of its own.
    if place.parse::<Ipv6Addr>().is_ok() {
        return Some((place, None));
    }
    if let Some(rest) = place.strip_prefix('[') {
        let (host, rest) = rest.split_once(']')?;
        host.parse::<Ipv6Addr>().ok()?;
        return match rest.strip_prefix(':') {
            Some(port) => Some((host, Some(number(port)?))),
            None => rest.is_empty().then_some((host, None)),
        };
    }
    match place.split_once(':') {
        Some((host, port)) => Some((host, Some(number(port)?))),
        None => Some((place, None)),
    }
}

/// A port. `+80` would be read as a number, too.
fn number(port: &str) -> Option<u16> {
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    port.parse().ok().filter(|port| digits && *port != 0)
}

/// A name that can be looked up; one that ends like an address is a mistyped one (RFC 3696, 2).
fn name(text: &str) -> Option<DomainName> {
    let last = text.trim_end_matches('.').rsplit('.').next()?;
    let is_number = last.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| !is_number && !text.starts_with('*'))
}

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.host, self.port) {
            (Host::Address(IpAddr::V6(ip)), Some(port)) => write!(f, "[{ip}]:{port}")?,
            (Host::Address(ip), Some(port)) => write!(f, "{ip}:{port}")?,
            (Host::Address(ip), None) => write!(f, "{ip}")?,
            (Host::Name(name), Some(port)) => write!(f, "{name}:{port}")?,
            (Host::Name(name), None) => write!(f, "{name}")?,
        }
        match self.protocol {
            PublishedProtocol::Tcp => Ok(()),
            PublishedProtocol::Udp => f.write_str("/udp"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn destinations_are_read_as_people_write_them() {
        for (text, shown) in [
            ("example.com", "example.com"),
            ("Example.COM.:443", "example.com:443"),
            ("example.com:53/udp", "example.com:53/udp"),
            ("10.0.0.1", "10.0.0.1"),
            ("10.0.0.1:80/tcp", "10.0.0.1:80"),
            ("fd00::1", "fd00::1"),
            ("[fd00::1]", "fd00::1"),
            ("[fd00::1]:80/udp", "[fd00::1]:80/udp"),
            ("localhost", "localhost"),
        ] {
            assert_eq!(text.parse::<Asked>().unwrap().to_string(), shown, "{text}");
        }
        for text in [
            "",
            ":80",
            "a:",
            "a:0",
            "a:65536",
            "a:+80",
            "a/sctp",
            "a/",
            "[::1",
            "[a]:1",
            "[::1]x",
            "10.0.0.256",
            "10.0.0",
            "a b",
            "*.a",
            "a..b",
            "fd00::1%eth0",
        ] {
            assert!(text.parse::<Asked>().is_err(), "{text}");
        }
        assert!("a".repeat(400).parse::<Asked>().is_err());
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_as_the_same(text in "\\PC{0,60}|[a-c.:\\[\\]/0-9]{0,30}") {
            if let Ok(asked) = text.parse::<Asked>() {
                prop_assert_eq!(asked.to_string().parse::<Asked>().unwrap(), asked);
            }
        }
    }
}
