//! Where a guest wants to go: by name, by address, or both, as far as it has said.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::Failure;
use crate::policy::addresses::{Addresses, Destination};
use crate::policy::egress::{ByAddress, Rules, Verdict};
use crate::policy::target::{Target, TargetProtocol, host_address, host_name};
use crate::slow::dns::Dns;

/// Names that many hosts give their loopback, besides those of RFC 6761, 6.3.
const LOCAL_NAMES: [&str; 5] = ["localhost", "localhost6", "ip6-localhost", "ip6-loopback", "loopback"];

/// A place to go to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place {
    /// Its name: letters small, without a final point.
    pub name: Option<String>,
    /// Its address, where the guest has one already, or has named one.
    pub address: Option<IpAddr>,
    /// The port.
    pub port: u16,
}

impl Place {
    /// A host as URIs have it (RFC 3986, 3.2.2), in the one form that rules know; nothing for what is no host, or what somebody
    /// else might take for an address.
    pub fn of_host(host: &str, port: u16) -> Option<Self> {
        if let Some(address) = host_address(host) {
            return Some(Self { name: None, address: Some(address), port });
        }
        let last = host.trim_end_matches('.').rsplit('.').next().unwrap_or_default().to_ascii_lowercase();
        let is_number =
            last.strip_prefix("0x").is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let name = host_name(host).filter(|_| !is_number)?;
        Some(Self { name: Some(name), address: None, port })
    }

    /// The same for rules and proxies.
    pub fn target(&self) -> Target<'_> {
        Target {
            name: self.name.as_deref(),
            address: self.address,
            port: self.port,
            protocol: TargetProtocol::Tcp,
        }
    }

    /// The host as URIs have it.
    pub fn host(&self) -> String {
        match (&self.name, self.address) {
            (Some(name), _) => name.clone(),
            (None, Some(IpAddr::V6(address))) => format!("[{address}]"),
            (None, Some(IpAddr::V4(address))) => address.to_string(),
            (None, None) => String::new(),
        }
    }

    /// Whether it is the link's own, where no proxy leads: a name of hythe's, or an address of the guest's subnet.
    pub fn is_own(&self, addresses: &Addresses) -> bool {
        let named = self.name.as_deref().is_some_and(|name| {
            ["docker.internal", "containers.internal"].iter().any(|zone| {
                name.strip_suffix(zone).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            })
        });
        let inside = |ip| addresses.families().any(|family| family.subnet.contains(&ip));
        named || (self.name.is_none() && self.address.is_some_and(inside))
    }

    /// Whether it names this very host, whose loopback is nobody's but under the name that leads there.
    pub fn is_loopback(&self) -> bool {
        let is_local = |name: &str| {
            LOCAL_NAMES.contains(&name) || name.ends_with(".localhost") || name.ends_with(".localdomain")
        };
        let is_own = |address: IpAddr| address.is_loopback() || address.is_unspecified();
        self.name.as_deref().is_some_and(is_local) || self.address.is_some_and(is_own)
    }

    /// The place by its name alone, where rules allow it for its name: a guest says what name it likes to whomever it has called.
    pub fn held_to_its_name(self, rules: &Rules) -> Self {
        let is_allowed = |address| {
            matches!(rules.decide_by_address(address, self.port, TargetProtocol::Tcp), ByAddress::Allow)
        };
        match (&self.name, self.address) {
            (Some(_), Some(address)) if !is_allowed(address) => Self { address: None, ..self },
            _ => self,
        }
    }

    /// The addresses under which the host reaches it for the guest.
    pub async fn reach(&self, addresses: &Addresses, dns: &Dns) -> Result<Vec<SocketAddr>, Failure> {
        let known = match (self.address, &self.name) {
            (Some(address), _) => vec![address],
            (None, Some(name)) => dns.addresses_of(name).await,
            (None, None) => Vec::new(),
        };
        if known.is_empty() {
            return Err(Failure::NoAddress);
        }
        let mut sockets = Vec::new();
        for address in known {
            let target = Target { address: Some(address), ..self.target() };
            let Verdict::Allow = addresses.egress.decide(&target) else { continue };
            match addresses.classify(address.into()) {
                Ok(Destination::Outside) => sockets.push(SocketAddr::new(address, self.port)),
                Ok(Destination::Host) => sockets.extend(
                    [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)]
                        .map(|loopback| SocketAddr::new(loopback, self.port)),
                ),
                Ok(Destination::Gateway) | Err(_) => {}
            }
        }
        if sockets.is_empty() {
            Err(Failure::Refused("the guest may not go there".into()))
        } else {
            Ok(sockets)
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host(), self.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_might_be_taken_for_an_address_is_no_name() {
        for host in
            ["127.1", "2130706433", "0x7f.1", "0x7f000001", "a.0X7f", "localhost..", "", ".", "a b", "10.1"]
        {
            assert_eq!(Place::of_host(host, 80), None, "{host}");
        }
        assert_eq!(Place::of_host(&"a".repeat(600), 80), None);
        let named = |host| Place::of_host(host, 80).unwrap();
        assert_eq!(named("Example.COM.").name.as_deref(), Some("example.com"));
        assert!(named("[::ffff:127.0.0.1]").is_loopback() && named("ip6-localhost").is_loopback());
        assert_eq!(named("[2001:db8::1]").to_string(), "[2001:db8::1]:80");
    }
}
