//! What dockerd wants, in the words that docker-proxy takes:
//!
//! ```text
//! -proto tcp|udp|sctp -host-ip IP -host-port N -container-ip IP -container-port N [-use-listen-fd]
//! ```
//! One process is started for each port and address. Words that an Engine to come may add are not for this program: the real
//! docker-proxy gets them all.

use std::net::SocketAddr;

use crate::policy::publish::{self, PublishError, PublishedProtocol};

/// A word that is shown in a message has at most so many characters.
const SHOWN_MAX: usize = 64;

/// Why the words mean nothing.
#[derive(Debug, thiserror::Error)]
pub enum ArgumentError {
    /// One is not there.
    #[error("-{0} is missing: dockerd starts this program, when its --userland-proxy-path says so")]
    Missing(&'static str),
    /// One is no address or port.
    #[error("-{0} is no {1}: '{2}'")]
    Wrong(&'static str, &'static str, String),
    /// The port cannot be published.
    #[error(transparent)]
    Publish(#[from] PublishError),
}

/// A port that is to be published.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wanted {
    /// The address and port of the host.
    pub host: SocketAddr,
    /// Where it leads in the end.
    pub container: SocketAddr,
    /// The protocol.
    pub protocol: PublishedProtocol,
}

impl Wanted {
    /// Understands what comes behind the program's name.
    pub fn parse(words: impl IntoIterator<Item = String>) -> Result<Self, ArgumentError> {
        let [mut protocol, mut host_ip, mut host_port, mut container_ip, mut container_port] =
            [const { None }; 5];
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let Some(flag) = word.strip_prefix('-') else { continue };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_string())),
                None => (flag, None),
            };
            let place = match name {
                "proto" => &mut protocol,
                "host-ip" => &mut host_ip,
                "host-port" => &mut host_port,
                "container-ip" => &mut container_ip,
                "container-port" => &mut container_port,
                _ => continue,
            };
            *place = value.or_else(|| words.next());
        }
        let protocol = protocol.ok_or(ArgumentError::Missing("proto"))?;
        let host_ip = host_ip.ok_or(ArgumentError::Missing("host-ip"))?;
        let host_port = host_port.ok_or(ArgumentError::Missing("host-port"))?;
        let container_ip = container_ip.ok_or(ArgumentError::Missing("container-ip"))?;
        let container_port = container_port.ok_or(ArgumentError::Missing("container-port"))?;

        let wrong = |name, what, text: &str| {
            ArgumentError::Wrong(
                name,
                what,
                text.chars().take(SHOWN_MAX).flat_map(char::escape_debug).collect(),
            )
        };
        let port = |name, text: &str| {
            let port = text.parse::<u16>().ok().filter(|port| *port > 0);
            port.ok_or_else(|| wrong(name, "port", text))
        };
        let container = SocketAddr::new(
            container_ip.parse().map_err(|_| wrong("container-ip", "address", &container_ip))?,
            port("container-port", &container_port)?,
        );
        let host_port = port("host-port", &host_port)?;
        // What hythe publishes is told in one place.
        let in_brackets = if host_ip.contains(':') { format!("[{host_ip}]") } else { host_ip.clone() };
        let requests = publish::parse(&format!("{in_brackets}:{host_port}:{host_port}/{protocol}"))?;
        let address = requests.first().and_then(|request| Some((request.address?, request.protocol)));
        let (address, protocol) = address.ok_or_else(|| wrong("host-ip", "address", &host_ip))?;
        Ok(Self { host: SocketAddr::new(address, host_port), container, protocol })
    }

    /// Whether the Engine serves the port on one address of the guest only, which is not the one that hythe's link has.
    pub fn is_for_one_address(&self) -> bool {
        !self.host.ip().is_unspecified()
    }

    /// The same for hythe.
    pub fn specification(&self, guest_port: u16) -> String {
        format!("{}:{guest_port}/{}", self.host, self.protocol)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(words: &str) -> Result<Wanted, ArgumentError> {
        Wanted::parse(words.split_whitespace().map(str::to_string))
    }

    fn said(words: &str) -> String {
        parse(words).unwrap_err().to_string()
    }

    #[test]
    fn what_engines_say_is_understood() {
        for (words, specification, container) in [
            (
                "-proto tcp -host-ip 0.0.0.0 -host-port 8000 -container-ip 172.17.0.2 -container-port 80 -use-listen-fd",
                "0.0.0.0:8000:9/tcp",
                "172.17.0.2:80",
            ),
            (
                "-proto udp -host-ip :: -host-port 53 -container-ip 172.17.0.2 -container-port 5353",
                "[::]:53:9/udp",
                "172.17.0.2:5353",
            ),
            (
                "-proto tcp -host-ip ::1 -host-port 8001 -container-ip fd00::2 -container-port 80",
                "[::1]:8001:9/tcp",
                "[fd00::2]:80",
            ),
            (
                "--proto=tcp -host-ip=127.0.0.1 --host-port 8001 --container-ip 172.17.0.2 -container-port=80",
                "127.0.0.1:8001:9/tcp",
                "172.17.0.2:80",
            ),
            (
                "-tomorrow 5 -new-one=x -proto tcp -host-ip ::ffff:10.0.0.1 -host-port 1 -container-ip 10.1.0.1 -container-port 2",
                "10.0.0.1:1:9/tcp",
                "10.1.0.1:2",
            ),
        ] {
            let wanted = parse(words).unwrap_or_else(|error| panic!("{words}: {error}"));
            assert_eq!(wanted.specification(9), specification, "{words}");
            assert_eq!(wanted.container.to_string(), container, "{words}");
        }
    }

    #[test]
    fn an_address_of_its_own_is_told_from_all_addresses() {
        for (host, one) in
            [("0.0.0.0", false), ("::", false), ("127.0.0.1", true), ("::1", true), ("10.0.0.1", true)]
        {
            let words =
                format!("-proto tcp -host-ip {host} -host-port 1 -container-ip 10.1.0.1 -container-port 2");
            assert_eq!(parse(&words).unwrap().is_for_one_address(), one, "{host}");
        }
    }

    #[test]
    fn sctp_is_refused_with_hythes_reason() {
        let said =
            said("-proto sctp -host-ip 0.0.0.0 -host-port 5 -container-ip 172.17.0.2 -container-port 5");
        assert!(said.contains("sctp cannot be published: hythe relays TCP, UDP"), "{said}");
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let good = "-proto tcp -host-ip 0.0.0.0 -host-port 8000 -container-ip 172.17.0.2 -container-port 80";
        assert!(parse(good).is_ok());
        for missing in ["proto", "host-ip", "host-port", "container-ip", "container-port"] {
            let words: Vec<&str> = good.split_whitespace().collect();
            let at = words.iter().position(|word| *word == format!("-{missing}")).unwrap();
            let rest: Vec<&str> = words[..at].iter().chain(&words[at + 2..]).copied().collect();
            assert!(said(&rest.join(" ")).starts_with(&format!("-{missing} is missing: ")));
        }
        for (from, to, expected) in [
            ("-host-port 8000", "-host-port 0", "-host-port is no port: '0'"),
            ("-host-port 8000", "-host-port 1-2", "-host-port is no port: '1-2'"),
            ("-host-port 8000", "-host-port 70000", "-host-port is no port: '70000'"),
            ("-host-ip 0.0.0.0", "-host-ip=", "-host-ip is no address: ''"),
            ("-host-ip 0.0.0.0", "-host-ip localhost", "invalid IP address: localhost"),
            ("-host-ip 0.0.0.0", "-host-ip 0.0.0.0:1:2", "invalid IP address: [0.0.0.0:1:2]"),
            ("-host-ip 0.0.0.0", "-host-ip fe80::1%eth0", "invalid IP address: [fe80::1%eth0]"),
            ("172.17.0.2", "172.17.0.256", "-container-ip is no address: '172.17.0.256'"),
            ("-container-port 80", "-container-port 0", "-container-port is no port: '0'"),
            ("-container-port 80", "-container-port", "-container-port is missing"),
            ("-proto tcp", "-proto icmp", "invalid proto: icmp"),
        ] {
            let said = said(&good.replace(from, to));
            assert!(said.contains(expected), "{said}");
        }
        let long = "8".repeat(1 << 20);
        assert!(said(&good.replace("80", &long)).len() < 500);
        assert!(
            !said(&good.replace("172.17.0.2", "\u{1b}[2J")).contains('\u{1b}'),
            "a terminal is not spoken to"
        );
    }

    proptest! {
        #[test]
        fn no_words_make_it_panic(words in prop::collection::vec(any::<String>(), 0..12)) {
            let _ = Wanted::parse(words);
        }

        #[test]
        fn nor_do_hostile_values(values in prop::collection::vec("[0-9a-f:.%/\\[\\]-]{0,12}", 5)) {
            let names = ["proto", "host-ip", "host-port", "container-ip", "container-port"];
            let words = names.iter().zip(values).flat_map(|(name, value)| [format!("-{name}"), value]);
            let _ = Wanted::parse(words);
        }
    }
}
