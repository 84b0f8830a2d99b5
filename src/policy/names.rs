//! What the user says about names: whom to ask about a zone, what a name stands for, what is kept and shown.
//!
//! A name is held as messages have it (RFC 1035, 3.1: labels behind their lengths, the root last), letters small, so that one
//! map finds what a guest asks for without a copy of the question being decoded.

use std::borrow::Borrow;
use std::fmt::{self, Display, Write};
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use serde::de::Error;
use serde::{Deserialize, Deserializer};

/// RFC 1035, 2.3.4: the longest name, and the longest label.
const NAME_MAX: usize = 255;
const LABEL_MAX: usize = 63;
/// The port of DNS, over UDP and TCP.
pub const DNS_PORT: u16 = 53;

/// A domain name, complete, letters small.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomainName(Box<[u8]>);

/// What is no name.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NameError {
    /// The text.
    #[error(
        "'{}' is no domain name (labels of 1 to 63 letters, digits, hyphens and underscores, points between them)",
        .0.escape_debug()
    )]
    Name(String),
    /// What is behind the `=`.
    #[error("'{}' is no {what}", .text.escape_debug())]
    Value {
        /// The text.
        text: String,
        /// What was expected.
        what: &'static str,
    },
    /// There is no `=`.
    #[error("'{}': expected NAME=ADDRESS[,ADDRESS…]", .0.escape_debug())]
    Form(String),
}

impl DomainName {
    /// The name as messages have it.
    pub fn wire(&self) -> &[u8] {
        &self.0
    }

    /// The name of an address in the reverse tree: in-addr.arpa (RFC 1035, 3.5) or ip6.arpa (RFC 3596, 2.5).
    pub fn of_address(address: IpAddr) -> Self {
        let mut wire = Vec::with_capacity(80);
        let mut label = |text: &[u8]| {
            wire.push(text.len() as u8);
            wire.extend(text);
        };
        match address {
            IpAddr::V4(ip) => {
                ip.octets().iter().rev().for_each(|octet| label(octet.to_string().as_bytes()));
                label(b"in-addr");
            }
            IpAddr::V6(ip) => {
                let nibbles = ip.octets().into_iter().rev().flat_map(|octet| [octet & 15, octet >> 4]);
                nibbles.for_each(|nibble| label(&[b"0123456789abcdef"[usize::from(nibble)]]));
                label(b"ip6");
            }
        }
        label(b"arpa");
        wire.push(0);
        Self(wire.into())
    }

    /// The name without its first label.
    pub fn parent(&self) -> Option<&[u8]> {
        suffixes(&self.0).nth(1)
    }
}

/// A name as messages have it, and all that it is below of, the root last.
pub fn suffixes(wire: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::successors(Some(wire), |name| match usize::from(*name.first()?) {
        0 => None,
        label => name.get(1 + label..),
    })
}

impl FromStr for DomainName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let none = || NameError::Name(text.chars().take(NAME_MAX).collect());
        let plain = text.strip_suffix('.').unwrap_or(text);
        if plain.len() + 2 > NAME_MAX {
            return Err(none());
        }
        let mut wire = Vec::with_capacity(plain.len() + 2);
        for (index, label) in plain.split('.').enumerate() {
            let is_plain =
                label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
            // RFC 4592: an asterisk stands for whatever is there, as a label of its own, and the first.
            let is_wildcard = index == 0 && label == "*" && plain.len() > 1;
            if !(1..=LABEL_MAX).contains(&label.len()) || !(is_plain || is_wildcard) {
                return Err(none());
            }
            wire.push(label.len() as u8);
            wire.extend(label.bytes().map(|byte| byte.to_ascii_lowercase()));
        }
        wire.push(0);
        Ok(Self(wire.into()))
    }
}

impl Borrow<[u8]> for DomainName {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for DomainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        WireText(&self.0).fmt(f)
    }
}

impl fmt::Debug for DomainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        WireText(&self.0).fmt(f)
    }
}

/// A name as messages have it, shown as zone files do (RFC 1035, 5.1), without the last point: whatever might mean something
/// to a terminal, a parser or an eye is shown by its number.
pub struct WireText<'n>(pub &'n [u8]);

impl fmt::Display for WireText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let labels = suffixes(self.0).filter_map(|name| {
            let (length, rest) = name.split_first()?;
            rest.get(..usize::from(*length)).filter(|label| !label.is_empty())
        });
        let mut is_root = true;
        for label in labels {
            if !is_root {
                f.write_char('.')?;
            }
            is_root = false;
            for byte in label {
                match byte {
                    b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'*' => {
                        f.write_char(char::from(*byte))?;
                    }
                    _ => write!(f, "\\{byte:03}")?,
                }
            }
        }
        if is_root { f.write_char('.') } else { Ok(()) }
    }
}

/// What a name leads to: `NAME=VALUE[,VALUE…]` as an option, a key and its list in a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry<T> {
    /// The name.
    pub name: DomainName,
    /// What it leads to.
    pub values: Vec<T>,
}

/// What may stand behind the `=`.
pub trait Value: FromStr {
    /// What it is called.
    const WHAT: &'static str;
}

impl Value for IpAddr {
    const WHAT: &'static str = "address";
}

/// A server: an address, with a port where it is not that of DNS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Server(pub SocketAddr);

impl FromStr for Server {
    type Err = std::net::AddrParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse::<IpAddr>() {
            Ok(address) => Ok(Self(SocketAddr::new(address, DNS_PORT))),
            Err(_) => text.parse().map(Self),
        }
    }
}

impl Value for Server {
    const WHAT: &'static str = "server (ADDRESS or ADDRESS:PORT, IPv6 with a port in brackets)";
}

impl<T: Value> Entry<T> {
    fn new<'v>(name: &str, values: impl Iterator<Item = &'v str>) -> Result<Self, NameError> {
        let value = |text: &str| {
            let wrong = |_| NameError::Value { text: text.to_string(), what: T::WHAT };
            text.parse().map_err(wrong)
        };
        Ok(Self { name: name.parse()?, values: values.map(value).collect::<Result<_, _>>()? })
    }
}

impl<T: Value> FromStr for Entry<T> {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let (name, values) = text.split_once('=').ok_or_else(|| NameError::Form(text.to_string()))?;
        Self::new(name, values.split(',').filter(|value| !value.is_empty()))
    }
}

/// Reads a table of a configuration file: names, and what each leads to.
pub fn entries<'de, D: Deserializer<'de>, T: Value>(deserializer: D) -> Result<Vec<Entry<T>>, D::Error> {
    let table = std::collections::BTreeMap::<String, Vec<String>>::deserialize(deserializer)?;
    let entry = |(name, values): (String, Vec<String>)| Entry::new(&name, values.iter().map(String::as_str));
    table.into_iter().map(|pair| entry(pair).map_err(D::Error::custom)).collect()
}

/// Which kinds of addresses the guest is not told: those that resolvers know.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AddressFilter {
    /// All are told.
    #[default]
    None,
    /// IPv4 addresses (A).
    Ipv4,
    /// IPv6 addresses (AAAA).
    Ipv6,
    /// IPv6 addresses, while the host has no route to the IPv6 Internet.
    Auto,
}

/// Names that can have records of the user's.
pub const RECORDS_MAX: usize = 4096;
/// Addresses of one name.
pub const ADDRESSES_MAX: usize = 64;
/// Answers that are kept by default.
pub const CACHE_DEFAULT: usize = 1000;
/// Answers that can be kept at the most.
pub const CACHE_MAX: usize = 100_000;

/// What the user says about names.
#[derive(Clone, Debug)]
pub struct NamePolicy {
    /// Zones, and who is asked about what lies in them.
    pub zones: Vec<Entry<Server>>,
    /// Names, and what they stand for.
    pub records: Vec<Entry<IpAddr>>,
    /// Whether the host's /etc/hosts counts.
    pub hosts: bool,
    /// Answers that are kept.
    pub cache: usize,
    /// What is not told.
    pub filter: AddressFilter,
    /// Whether each query is shown.
    pub log: bool,
}

impl Default for NamePolicy {
    fn default() -> Self {
        Self {
            zones: Vec::new(),
            records: Vec::new(),
            hosts: true,
            cache: CACHE_DEFAULT,
            filter: AddressFilter::None,
            log: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> DomainName {
        text.parse().unwrap()
    }

    #[test]
    fn a_name_is_the_same_in_any_case_and_with_or_without_its_last_point() {
        assert_eq!(name("Corp.Example"), name("corp.example."));
        assert_eq!(name("corp.example").wire(), b"\x04corp\x07example\0");
        assert_eq!(name("*.Apps.test").to_string(), "*.apps.test");
        assert_eq!(name("_dmarc.a-b.test").to_string(), "_dmarc.a-b.test");
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let long = format!("{}.test", "x".repeat(64));
        let longer = "a.".repeat(128);
        for text in
            ["", ".", "..", "a..b", ".a", "a b", "a.*", "*", "a*.b", "ü.test", "a\\.b", &long, &longer]
        {
            assert!(text.parse::<DomainName>().is_err(), "{text}");
        }
        assert!("a.".repeat(127).parse::<DomainName>().is_ok());
    }

    #[test]
    fn suffixes_end_at_label_boundaries() {
        let all: Vec<_> = suffixes(b"\x01a\x04corp\x07example\0").map(<[u8]>::len).collect();
        assert_eq!(all, [16, 14, 9, 1]);
        assert_eq!(name("corp.example").parent(), Some(&b"\x07example\0"[..]));
    }

    #[test]
    fn hostile_names_are_shown_by_numbers() {
        assert_eq!(WireText(b"\x04a\x1b.\"\x02\xff\\\0").to_string(), "a\\027\\046\\034.\\255\\092");
        assert_eq!(WireText(b"\0").to_string(), ".");
        assert_eq!(WireText(b"\x3fab").to_string(), ".", "cut short");
    }

    #[test]
    fn addresses_have_names() {
        let v4 = DomainName::of_address("192.0.2.17".parse().unwrap());
        assert_eq!(v4.to_string(), "17.2.0.192.in-addr.arpa");
        let v6 = DomainName::of_address("2001:db8::12".parse().unwrap()).to_string();
        assert_eq!(v6, format!("2.1.{}8.b.d.0.1.0.0.2.ip6.arpa", "0.".repeat(22)));
    }

    #[test]
    fn an_entry_is_a_name_and_what_it_leads_to() {
        let zone: Entry<Server> = "corp.example=10.8.0.53,[fd00::53]:5353,fd00::1".parse().unwrap();
        let servers: Vec<_> = zone.values.iter().map(|server| server.0.to_string()).collect();
        assert_eq!(servers, ["10.8.0.53:53", "[fd00::53]:5353", "[fd00::1]:53"]);
        let blocked: Entry<IpAddr> = "ads.test=".parse().unwrap();
        assert_eq!(blocked.values, [] as [IpAddr; 0]);
        for (text, said) in [
            ("corp.example", "expected NAME=ADDRESS"),
            ("corp..example=10.8.0.53", "is no domain name"),
            ("corp.example=10.8.0", "'10.8.0' is no server"),
        ] {
            let error = text.parse::<Entry<Server>>().unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }
}
