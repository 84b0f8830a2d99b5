//! The host's resolvers as resolv.conf(5) names them, read as glibc reads them.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV6};
use std::path::Path;

use tracing::warn;

use super::file_watch::read_bounded;
use crate::netlink::interface_index;
pub use crate::policy::names::DNS_PORT;

/// Resolvers that count; glibc takes three, and no host needs more than this.
const SERVERS_MAX: usize = 20;
/// Search domains that count.
const SEARCH_MAX: usize = 32;
/// The longest name in text, RFC 1035, 2.3.4.
const NAME_MAX: usize = 255;
/// As much of the file is read; what comes behind is no resolv.conf.
const FILE_MAX_BYTES: u64 = 64 << 10;

/// Whom the host asks.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct ResolvConf {
    /// The resolvers, in the order in which they are asked.
    pub servers: Vec<SocketAddr>,
    /// The domains in which the host looks for short names. They are for the guest to use: nothing is appended to its
    /// queries here.
    pub search: Vec<String>,
}

impl ResolvConf {
    /// Reads the file. Where it names no resolver, is missing or cannot be read, there is one on the host itself: so
    /// resolv.conf(5) says and glibc does. If nothing listens there, the guest gets SERVFAIL at once.
    pub fn read(path: &Path) -> Self {
        let mut conf = match read_bounded(path, FILE_MAX_BYTES) {
            Ok(text) => Self::parse(&text, interface_index),
            Err(error) => {
                warn!(path = %path.display(), %error, "the host's resolvers cannot be read; asking the host itself");
                Self::default()
            }
        };
        if conf.servers.is_empty() {
            conf.servers.push(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), DNS_PORT));
        }
        conf
    }

    /// Understands the lines that name resolvers and domains; all others, and what is wrong in these, count for
    /// nothing. `interface_index` finds the interface behind the scope of a link-local address.
    fn parse(text: &str, interface_index: impl Fn(&str) -> Option<u32>) -> Self {
        let mut conf = Self::default();
        for line in text.lines() {
            // A keyword must start its line, as in glibc: a line that the host itself passes over is passed over.
            let Some((keyword, rest)) = line.split_once([' ', '\t']) else { continue };
            let mut words =
                rest.split_ascii_whitespace().take_while(|word| !word.starts_with(['#', ';'])).peekable();
            match keyword {
                "nameserver" => {
                    // glibc cuts the address off at a comment that touches it.
                    let address = words.next().and_then(|word| word.split(['#', ';']).next());
                    let server = address.and_then(|text| parse_server(text, &interface_index));
                    conf.servers.extend(
                        server.filter(|server| {
                            conf.servers.len() < SERVERS_MAX && !conf.servers.contains(server)
                        }),
                    );
                }
                // The two exclude each other; the last one counts.
                "search" if words.peek().is_some() => conf.search = domains(words.take(SEARCH_MAX)),
                "domain" if words.peek().is_some() => conf.search = domains(words.take(1)),
                _ => {}
            }
        }
        conf
    }
}

fn parse_server(text: &str, interface_index: impl Fn(&str) -> Option<u32>) -> Option<SocketAddr> {
    let Some((address, scope)) = text.split_once('%') else {
        return Some(SocketAddr::new(text.parse().ok()?, DNS_PORT));
    };
    // RFC 4007, 11: a zone is a number or, on Linux, the interface's name. An address of IPv4 has none.
    let IpAddr::V6(ip) = address.parse().ok()? else { return None };
    let index = scope.parse().ok().or_else(|| interface_index(scope))?;
    Some(SocketAddrV6::new(ip, DNS_PORT, 0, index).into())
}

fn domains<'w>(words: impl Iterator<Item = &'w str>) -> Vec<String> {
    words.filter(|word| word.len() <= NAME_MAX).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slow::dns::fake_server::Directory;
    use proptest::prelude::*;

    fn parse(text: &str) -> ResolvConf {
        ResolvConf::parse(text, |name| (name == "eth0").then_some(7))
    }

    fn servers(text: &str) -> Vec<String> {
        parse(text).servers.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn resolvers_of_both_families_are_read_in_order_and_once() {
        let text = "# made by hand\nnameserver 192.0.2.1\nnameserver\t2001:db8::1  \n\
                    nameserver 192.0.2.1\noptions ndots:5 timeout:1\nnameserver 127.0.0.53 # local\n";
        assert_eq!(servers(text), ["192.0.2.1:53", "[2001:db8::1]:53", "127.0.0.53:53"]);
    }

    #[test]
    fn a_scope_is_a_number_or_an_interface() {
        let text =
            "nameserver fe80::1%eth0\nnameserver fe80::2%3\nnameserver fe80::3%gone0\nnameserver 192.0.2.1%1";
        assert_eq!(servers(text), ["[fe80::1%7]:53", "[fe80::2%3]:53"]);
    }

    #[test]
    fn the_loopback_interface_is_found_by_its_name() {
        assert!(interface_index("lo").is_some());
        assert_eq!(interface_index("no-such-if"), None);
    }

    #[test]
    fn lines_that_glibc_passes_over_are_passed_over() {
        let text = "nameserver\nnameserver \nnameserver example.com\nnameserver 1.2.3.4.5\n nameserver 192.0.2.1\n\
                    ;nameserver 192.0.2.2\nnameservers 192.0.2.3\nnameserver #192.0.2.4\nNAMESERVER 192.0.2.5\n\
                    nameserver 192.0.2.9#dns.example\n";
        assert_eq!(servers(text), ["192.0.2.9:53"]);
    }

    #[test]
    fn of_search_and_domain_the_last_counts() {
        assert_eq!(parse("search a.example b.example\n").search, ["a.example", "b.example"]);
        assert_eq!(parse("search a.example\ndomain c.example d.example\n").search, ["c.example"]);
        assert_eq!(parse("domain c.example\nsearch a.example\nsearch\nsearch \n").search, ["a.example"]);
        assert_eq!(parse("search a.example # not.this\n").search, ["a.example"]);
    }

    #[test]
    fn a_file_of_any_length_is_bounded() {
        let servers: Vec<_> = (0..250).map(|last| format!("nameserver 192.0.2.{last}\n")).collect();
        let text = format!("{}search{}\n", servers.concat(), " a.example".repeat(100));
        let conf = parse(&text);
        assert_eq!((conf.servers.len(), conf.search.len()), (SERVERS_MAX, SEARCH_MAX));

        let directory = Directory::new();
        let path = directory.path("resolv.conf");
        std::fs::write(&path, "x".repeat(FILE_MAX_BYTES as usize) + "\nnameserver 192.0.2.1\n").unwrap();
        assert_eq!(read_bounded(&path, FILE_MAX_BYTES).unwrap().len() as u64, FILE_MAX_BYTES);
    }

    #[test]
    fn without_a_resolver_the_host_itself_is_asked_as_glibc_does() {
        let directory = Directory::new();
        let path = directory.path("resolv.conf");
        let local: Vec<SocketAddr> = vec!["127.0.0.1:53".parse().unwrap()];
        assert_eq!(ResolvConf::read(&path).servers, local, "missing");
        std::fs::write(&path, "# nothing\nsearch example.com\n").unwrap();
        let conf = ResolvConf::read(&path);
        assert_eq!((conf.servers, conf.search), (local.clone(), vec!["example.com".to_string()]));
        assert_eq!(ResolvConf::read(&directory.path("")).servers, local, "a directory");
        nix::unistd::mkfifo(&directory.path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(ResolvConf::read(&directory.path("fifo")).servers, local, "a FIFO that nobody writes");
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "(nameserver|search|domain|[a-z]{0,9})?[ \t%#;:.0-9a-f\n\\PC]{0,60}") {
            parse(&text);
        }
    }
}
