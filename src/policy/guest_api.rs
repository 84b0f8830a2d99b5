//! What the guest may ask of hythe at the gateway, and within which bounds.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;

use super::publish::{Binding, HostPort, PublishRequest};

/// What the guest may ask.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestApi {
    /// Nothing: nobody answers at the gateway's port 80.
    #[default]
    Off,
    /// How hythe is and which ports the guest has published.
    Status,
    /// To publish ports of its own, and to unpublish those.
    Publish,
}

/// What the guest may publish.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GuestBounds {
    /// Ports of the host.
    pub ports: RangeInclusive<u16>,
    /// Addresses of the host; any where there are none.
    pub addresses: Vec<IpNet>,
    /// Ports at a time, each address for itself.
    pub most: usize,
}

/// Why the guest may not publish something.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OutOfBounds {
    /// Not this port.
    #[error(
        "the guest may publish ports from {} to {}; {port} is none of them (hythe --guest-api-ports)",
        .allowed.start(), .allowed.end()
    )]
    Port {
        /// What was wanted.
        port: u16,
        /// What is allowed.
        allowed: RangeInclusive<u16>,
    },
    /// Not on this address.
    #[error("the guest may not publish on {0} (hythe --guest-api-address)")]
    Address(IpAddr),
    /// Not so many.
    #[error(
        "the guest may publish {0} ports at a time, each address for itself (hythe --guest-api-max-ports)"
    )]
    TooMany(usize),
}

impl GuestBounds {
    /// Whether a request is within the bounds, whatever port it gets of those it leaves open.
    pub fn admit(&self, request: &PublishRequest) -> Result<(), OutOfBounds> {
        let allows = |address: &IpAddr| {
            self.addresses.is_empty() || self.addresses.iter().any(|net| net.contains(address))
        };
        if let Some(address) = request.addresses().into_iter().find(|address| !allows(address)) {
            return Err(OutOfBounds::Address(address));
        }
        let named = match request.host_port {
            // Drawn from those that are allowed.
            HostPort::Random => return Ok(()),
            HostPort::One(port) => [port, port],
            HostPort::FirstFree(first, last) => [first, last],
        };
        match named.into_iter().find(|port| !self.ports.contains(port)) {
            Some(port) => Err(OutOfBounds::Port { port, allowed: self.ports.clone() }),
            None => Ok(()),
        }
    }

    /// Whether a port that was drawn may be the guest's.
    pub fn allows(&self, binding: &Binding) -> bool {
        self.ports.contains(&binding.host_port)
    }
}

/// A range of ports as an option tells it: `1024-65535`, or one port.
pub fn port_range(text: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let [first, last] = [first, last].map(|number| number.parse::<u16>().ok());
    Some(first?..=last?).filter(|range| !range.is_empty() && *range.start() > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::publish::parse;

    fn admit(bounds: &GuestBounds, spec: &str) -> Result<(), String> {
        parse(spec).unwrap().iter().try_for_each(|request| bounds.admit(request)).map_err(|e| e.to_string())
    }

    #[test]
    fn ports_and_addresses_outside_the_bounds_are_refused_with_the_option_that_sets_them() {
        let bounds = GuestBounds {
            ports: 1024..=9000,
            addresses: vec!["127.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()],
            most: 10,
        };
        for allowed in ["127.0.0.1:8000:80", "[::1]:9000:80", "127.0.0.2::80", "127.0.0.1:1024-1030:80"] {
            assert_eq!(admit(&bounds, allowed), Ok(()), "{allowed}");
        }
        for (spec, word) in [
            ("8000:80", "0.0.0.0"),
            ("[::]:8000:80", "::"),
            ("10.0.0.1:8000:80", "10.0.0.1"),
            ("127.0.0.1:1023:80", "1023"),
            ("127.0.0.1:8999-9001:80", "9001"),
            ("127.0.0.1:8999-9001:80-82", "9001"),
        ] {
            let error = admit(&bounds, spec).unwrap_err();
            assert!(error.contains(word) && error.contains("hythe --guest-api-"), "{error}");
        }
        let open = GuestBounds { addresses: Vec::new(), ..bounds };
        assert_eq!(admit(&open, "8000:80"), Ok(()));
    }

    #[test]
    fn a_range_of_ports_is_two_numbers_or_one() {
        assert_eq!(port_range("1024-65535"), Some(1024..=65535));
        assert_eq!(port_range("8080"), Some(8080..=8080));
        for text in ["", "-", "0-5", "5-4", "1-65536", "x", "1-2-3", " 1"] {
            assert_eq!(port_range(text), None, "{text}");
        }
    }
}
