//! Where a guest wants to go, as far as that is known: what rules are held against.

use std::net::IpAddr;

/// RFC 1035, 2.3.4: the longest name, written out, and the longest label.
const NAME_MAX: usize = 253;
const LABEL_MAX: usize = 63;

/// By which protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum TargetProtocol {
    /// A connection.
    Tcp,
    /// Datagrams.
    Udp,
    /// Echo requests.
    Icmp,
}

/// A destination. A connection of the guest's has an address and sometimes a name beside it (SNI, Host); a request to the
/// explicit proxy may have a name alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Target<'n> {
    /// The name, in small letters and without a last point.
    pub name: Option<&'n str>,
    /// The address.
    pub address: Option<IpAddr>,
    /// The port; 0 for ICMP.
    pub port: u16,
    /// The protocol.
    pub protocol: TargetProtocol,
}

impl<'n> Target<'n> {
    /// A connection to what somebody wrote as a host: a name as [`host_name`] gives it, or an address, IPv6 in brackets or not.
    pub fn tcp(host: &'n str, port: u16) -> Self {
        let address = host_address(host);
        let name = if address.is_some() { None } else { Some(host) };
        Self { name, address, port, protocol: TargetProtocol::Tcp }
    }
}

/// The address that a host's text is, if it is one. IPv6 may stand in brackets; IPv4 written as IPv6 (RFC 4291, 2.5.5.2) is
/// IPv4.
pub fn host_address(text: &str) -> Option<IpAddr> {
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let address: IpAddr = bare.parse().ok()?;
    (bare.len() == text.len() || address.is_ipv6()).then(|| address.to_canonical())
}

/// A host's name in the one form that rules know: small letters, no last point. `None` for what is no name: an address, labels
/// of other characters than letters, digits, hyphens and underscores, and what ends in a number (it would be taken for an
/// IPv4 address somewhere: WHATWG URL, "ends in a number").
pub fn host_name(text: &str) -> Option<String> {
    let plain = text.strip_suffix('.').unwrap_or(text);
    let is_label = |label: &str| {
        (1..=LABEL_MAX).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    let last = plain.rsplit('.').next().unwrap_or(plain);
    let is_name = plain.len() <= NAME_MAX
        && plain.split('.').all(is_label)
        && !last.bytes().all(|byte| byte.is_ascii_digit());
    is_name.then(|| plain.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_name_has_one_form() {
        for (text, expected) in [
            ("Example.COM.", Some("example.com")),
            ("localhost", Some("localhost")),
            ("_sip._tcp.a-b.test", Some("_sip._tcp.a-b.test")),
            ("xn--fsq092h.com", Some("xn--fsq092h.com")),
            ("4.example", Some("4.example")),
            ("", None),
            (".", None),
            ("a..b", None),
            (".a", None),
            ("a b", None),
            ("a/b", None),
            ("*.a", None),
            ("例.com", None),
            ("10.0.0.1", None),
            ("10.0.0.256", None),
            ("1.2.3", None),
            ("::1", None),
            ("[::1]", None),
        ] {
            assert_eq!(host_name(text).as_deref(), expected, "{text}");
        }
        assert!(host_name(&"a.".repeat(127)).is_some());
        assert!(host_name(&"a.".repeat(128)).is_none());
        assert!(host_name(&"a".repeat(64)).is_none());
    }

    #[test]
    fn an_address_is_no_name() {
        for (text, address) in [
            ("10.0.0.1", Some("10.0.0.1")),
            ("::1", Some("::1")),
            ("[::1]", Some("::1")),
            ("[::ffff:10.0.0.1]", Some("10.0.0.1")),
            ("[10.0.0.1]", None),
            ("[::1", None),
            ("fe80::1%eth0", None),
            ("example.com", None),
        ] {
            let address = address.map(|text| text.parse().unwrap());
            assert_eq!(host_address(text), address, "{text}");
            let target = Target::tcp(text, 80);
            assert_eq!((target.address, target.name.is_none()), (address, address.is_some()), "{text}");
        }
    }

    proptest! {
        #[test]
        fn the_one_form_of_the_one_form_is_itself(text in "[A-Za-z0-9._-]{0,40}") {
            if let Some(name) = host_name(&text) {
                prop_assert_eq!(host_address(&name), None);
                prop_assert_eq!(host_name(&name), Some(name));
            }
        }

        #[test]
        fn no_text_makes_it_panic(text in any::<String>()) {
            host_name(&text);
            host_address(&text);
        }
    }
}
