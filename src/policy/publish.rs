//! The words of `-p`: which port of the host leads to which port of the guest.
//!
//! `[ADDRESS:]HOST[-END]:GUEST[-END][/tcp|udp]`, IPv6 addresses in brackets; without an address all of both families.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What a published port speaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum PublishedProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// One port of the host that leads to one port of the guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PublishedPort {
    /// The addresses of the host; both families' unspecified ones where the user named none.
    pub addresses: Vec<IpAddr>,
    /// The port of the host.
    pub host_port: u16,
    /// The port of the guest.
    pub guest_port: u16,
    /// The protocol.
    pub protocol: PublishedProtocol,
}

/// Why a specification means nothing.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "--publish '{spec}': {problem}; expected [ADDRESS:]HOSTPORT[-END]:GUESTPORT[-END][/tcp|udp], like 8000:80"
)]
pub struct PublishError {
    spec: String,
    problem: String,
}

/// Parses one specification into the ports that it publishes.
pub fn parse(spec: &str) -> Result<Vec<PublishedPort>, PublishError> {
    let fail = |problem: String| PublishError { spec: spec.to_string(), problem };
    let (ports, protocol) = match spec.rsplit_once('/') {
        None => (spec, PublishedProtocol::Tcp),
        Some((ports, "tcp")) => (ports, PublishedProtocol::Tcp),
        Some((ports, "udp")) => (ports, PublishedProtocol::Udp),
        Some((_, other)) => return Err(fail(format!("invalid proto: {other}"))),
    };
    let (host, guest) = ports.rsplit_once(':').ok_or_else(|| fail("no host port is given".to_string()))?;
    let (address, host) = match host.rsplit_once(':') {
        None => (None, host),
        Some((address, host)) => (Some(address), host),
    };
    let addresses = match address {
        None => vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
        Some(text) => {
            let inner = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
            let ip = match inner {
                Some(v6) => v6.parse::<Ipv6Addr>().map(IpAddr::V6).ok(),
                None => text.parse::<Ipv4Addr>().map(IpAddr::V4).ok(),
            };
            vec![ip.ok_or_else(|| fail(format!("invalid IP address: {text}")))?]
        }
    };
    let host_ports = range(host).ok_or_else(|| fail(format!("invalid hostPort: {host}")))?;
    let guest_ports = range(guest).ok_or_else(|| fail(format!("invalid containerPort: {guest}")))?;
    if host_ports.len() != guest_ports.len() {
        return Err(fail(format!(
            "invalid ranges specified for container and host Ports: {guest} and {host}"
        )));
    }
    Ok(host_ports
        .zip(guest_ports)
        .map(|(host_port, guest_port)| PublishedPort {
            addresses: addresses.clone(),
            host_port,
            guest_port,
            protocol,
        })
        .collect())
}

fn range(text: &str) -> Option<std::ops::RangeInclusive<u16>> {
    let port = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse::<u16>().ok().filter(|port| digits && *port > 0)
    };
    match text.split_once('-') {
        None => port(text).map(|port| port..=port),
        Some((first, last)) => {
            let (first, last) = (port(first)?, port(last)?);
            (first <= last).then_some(first..=last)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ports(spec: &str) -> Vec<(Vec<String>, u16, u16, PublishedProtocol)> {
        let text = |ips: &[IpAddr]| ips.iter().map(ToString::to_string).collect();
        parse(spec)
            .unwrap()
            .iter()
            .map(|port| (text(&port.addresses), port.host_port, port.guest_port, port.protocol))
            .collect()
    }

    #[test]
    fn the_short_forms_of_docker_are_understood() {
        use PublishedProtocol::{Tcp, Udp};
        let any = vec!["0.0.0.0".to_string(), "::".to_string()];
        let one = |ip: &str| vec![ip.to_string()];
        assert_eq!(ports("8000:80"), [(any.clone(), 8000, 80, Tcp)]);
        assert_eq!(ports("127.0.0.1:8001:80/tcp"), [(one("127.0.0.1"), 8001, 80, Tcp)]);
        assert_eq!(ports("[::1]:8001:80"), [(one("::1"), 8001, 80, Tcp)]);
        assert_eq!(ports("9000-9001:90-91/udp"), [(any.clone(), 9000, 90, Udp), (any, 9001, 91, Udp)]);
    }

    #[test]
    fn what_is_wrong_is_said_in_dockers_words() {
        for (spec, problem) in [
            ("80", "no host port is given"),
            ("x:80", "invalid hostPort: x"),
            ("0:80", "invalid hostPort: 0"),
            ("65536:80", "invalid hostPort: 65536"),
            ("+80:80", "invalid hostPort: +80"),
            ("8000:", "invalid containerPort: "),
            ("8000:80x", "invalid containerPort: 80x"),
            ("8000-8002:80-81", "invalid ranges specified for container and host Ports: 80-81 and 8000-8002"),
            ("8002-8000:80-82", "invalid hostPort: 8002-8000"),
            ("8000:80/icmp", "invalid proto: icmp"),
            ("1.2.3:8000:80", "invalid IP address: 1.2.3"),
            ("::1:8000:80", "invalid IP address: ::1"),
            ("[127.0.0.1]:8000:80", "invalid IP address: [127.0.0.1]"),
        ] {
            assert_eq!(parse(spec).unwrap_err().problem, problem, "{spec}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(spec in "[0-9a-f:.\\[\\]/-]{0,30}") {
            let _ = parse(&spec);
        }
    }
}
