//! The host's hosts(5): names that whoever keeps the host has given to addresses.
//!
//! An address of the loopback means the host there, and would mean the guest here: the guest is told the address under which it
//! reaches the host's loopback. `localhost` is everybody's own (RFC 6761, 6.3) and stays.

use std::io;
use std::net::IpAddr;
use std::path::Path;

use tracing::{debug, warn};

use super::address_table::AddressTable;
use super::file_watch::read_bounded;
use crate::policy::addresses::Addresses;
use crate::policy::names::DomainName;

/// As much of the file is read: lists of advertisers have some megabytes.
const FILE_MAX_BYTES: u64 = 16 << 20;
/// Names that count, of all lines together.
const NAMES_MAX: usize = 400_000;

/// Names by which a host calls its own loopback.
const OWN: [&str; 6] =
    ["localhost", "localhost.localdomain", "localhost4", "localhost6", "ip6-localhost", "ip6-loopback"];

/// Reads a file; what cannot be read is empty.
pub(super) fn read(path: &Path, link: &Addresses) -> AddressTable {
    match read_bounded(path, FILE_MAX_BYTES) {
        Ok(text) => parse(&text, link),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            debug!(path = %path.display(), "the host has no hosts file");
            AddressTable::default()
        }
        Err(error) => {
            warn!(path = %path.display(), %error, "the host's hosts file cannot be read, and does not count");
            AddressTable::default()
        }
    }
}

/// As hosts(5) has it: an address and its names a line; of several lines about a name all count.
fn parse(text: &str, link: &Addresses) -> AddressTable {
    let mut table = AddressTable::default();
    let mut names = 0;
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default();
        let mut words = line.split_ascii_whitespace();
        let Some(address) = words.next().and_then(|word| word.parse::<IpAddr>().ok()) else { continue };
        let mut is_first = true;
        // hosts(5) knows no names that stand for others.
        for word in words.filter(|word| !word.starts_with('*')) {
            let Ok(name) = word.parse::<DomainName>() else { continue };
            if names == NAMES_MAX {
                warn!(names, "the hosts file has more names than count");
                return table;
            }
            names += 1;
            let Some(address) = as_the_guest_sees(address, word, link) else { continue };
            table.add(&name, &[address]);
            // hosts(5): the first is the canonical one.
            if std::mem::take(&mut is_first) {
                table.point(address, &name);
            }
        }
    }
    table
}

fn as_the_guest_sees(address: IpAddr, name: &str, link: &Addresses) -> Option<IpAddr> {
    let is_own = || OWN.iter().any(|own| own.eq_ignore_ascii_case(name));
    if !address.is_loopback() || is_own() {
        return Some(address);
    }
    link.family(address.is_ipv4()).map(|family| family.host.ip())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slow::dns::fake_server::{Directory, addresses};
    use proptest::prelude::*;

    fn table(entries: &[(&str, &[&str])], pointers: &[(&str, &str)]) -> AddressTable {
        let mut table = AddressTable::default();
        for (name, addresses) in entries {
            let addresses: Vec<IpAddr> = addresses.iter().map(|address| address.parse().unwrap()).collect();
            table.add(&name.parse().unwrap(), &addresses);
        }
        for (address, name) in pointers {
            table.point(address.parse().unwrap(), &name.parse().unwrap());
        }
        table
    }

    #[test]
    fn all_lines_about_a_name_count_and_the_first_name_of_an_address() {
        let text = "# made by hand\n10.0.0.5\tdb.test db  # the database\nfd00::5 DB.test\n 10.0.0.6 db.test\n10.0.0.5 other.test\n";
        let expected = table(
            &[
                ("db.test", &["10.0.0.5", "fd00::5", "10.0.0.6"]),
                ("db", &["10.0.0.5"]),
                ("other.test", &["10.0.0.5"]),
            ],
            &[("10.0.0.5", "db.test"), ("fd00::5", "db.test"), ("10.0.0.6", "db.test")],
        );
        assert_eq!(parse(text, &addresses()), expected);
    }

    #[test]
    fn lines_that_say_nothing_are_passed_over() {
        let text = "10.0.0.5\n\n#10.0.0.6 x\nname 10.0.0.7\nfe80::1%eth0 y\n10.0.0.8 a..b good\n\u{fffd} z\n";
        assert_eq!(parse(text, &addresses()), table(&[("good", &["10.0.0.8"])], &[("10.0.0.8", "good")]));
    }

    #[test]
    fn the_hosts_loopback_is_where_the_guest_reaches_it_and_localhost_is_everybodys_own() {
        let text = "127.0.0.1 localhost\n127.0.1.1 box box.lan\n::1 localhost ip6-loopback box\n";
        let (v4, v6) = ("192.168.65.254", "fdc4:f303:9324::254");
        let expected = table(
            &[
                ("localhost", &["127.0.0.1", "::1"]),
                ("box", &[v4, v6]),
                ("box.lan", &[v4]),
                ("ip6-loopback", &["::1"]),
            ],
            &[("127.0.0.1", "localhost"), (v4, "box"), ("::1", "localhost")],
        );
        let parsed = parse(text, &addresses());
        // Which name the host's own IPv6 address has does not show: the link's names count before.
        assert_eq!(parsed, expected);
        let v4_only = Addresses { v6: None, ..addresses() };
        assert_eq!(parse("::1 box\n", &v4_only), AddressTable::default());
    }

    #[test]
    fn a_file_that_cannot_be_read_is_empty_and_one_of_any_length_bounded() {
        let directory = Directory::new();
        for name in ["missing", ""] {
            assert_eq!(read(&directory.path(name), &addresses()), AddressTable::default());
        }
        nix::unistd::mkfifo(&directory.path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(read(&directory.path("fifo"), &addresses()), AddressTable::default());
        let path = directory.path("hosts");
        std::fs::write(&path, "x".repeat(FILE_MAX_BYTES as usize) + "\n10.0.0.5 late\n").unwrap();
        assert_eq!(read(&path, &addresses()), AddressTable::default());
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "([0-9a-f.:%]{0,12}[ \t#\\n]{1,2}[a-z.*_\\PC-]{0,20}){0,4}") {
            parse(&text, &addresses());
        }
    }
}
