//! DNS at the gateway: names of the link, and everything else from the host's resolvers, byte for byte.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::rig::cell::{ANY, Cell, on_every_cell};
use crate::rig::directory::Directory;
use crate::rig::dns_server::{DnsServer, LARGE, Over};
use crate::rig::hythe::{Hythe, Start};
use crate::rig::netns::Netns;
use crate::rig::program::Program;
use crate::rig::site::{FAMILIES, Family, Site};
use crate::rig::wait::wait_until;

/// Further addresses of the far server, for further resolvers.
pub const SECOND: &str = "198.51.100.2";
pub const THIRD: &str = "198.51.100.3";

pub fn site() -> Site {
    let site = Site::new();
    site.far.ip(&format!(
        "addr add {SECOND}/32 dev lo
         addr add {THIRD}/32 dev lo"
    ));
    site
}

/// A start with resolvers of the host.
fn with_resolvers<'s>(site: &'s Site, cell: Cell, resolv_conf: &str) -> Start<'s> {
    let content = resolv_conf.to_string();
    Hythe::of(&site.host, cell).mounts(move |mounts| mounts.resolv_conf(&content))
}

fn asking_far(site: &Site, cell: Cell) -> Start<'_> {
    with_resolvers(site, cell, &format!("nameserver {}\n", Family::V4.far()))
}

/// What dig(1) got.
struct Answer {
    status: String,
    truncated: bool,
    /// The data of the answer's records, as zone files have it.
    records: Vec<String>,
    text: String,
}

/// Asks the gateway with dig(1); `words` are the name, the type and options.
fn dig(guest: &Netns, family: Family, words: &str) -> Answer {
    let at = format!("@{}", family.gateway());
    let fixed = ["dig", &at, "+tries=1", "+time=20", "+noall", "+comments", "+answer"];
    let words: Vec<&str> = fixed.into_iter().chain(words.split_whitespace()).collect();
    let text = guest.command(&words);
    let word_after =
        |mark: &str| Some(text.split_once(mark)?.1.split([',', ';', '\n']).next()?.trim().to_string());
    let status = word_after("status: ").unwrap_or_else(|| panic!("no answer: {text}"));
    let flags = word_after(";; flags: ").unwrap();
    let records = text.lines().filter(|line| !line.starts_with(';') && !line.is_empty());
    let data = |line: &str| line.split_whitespace().skip(4).collect::<Vec<_>>().join(" ");
    Answer {
        status,
        truncated: flags.split_whitespace().any(|flag| flag == "tc"),
        records: records.map(data).collect(),
        text: text.clone(),
    }
}

impl Answer {
    fn assert(&self, status: &str, records: &[&str]) {
        assert_eq!(self.status, status, "{}", self.text);
        assert_eq!(self.records, records, "{}", self.text);
    }
}

on_every_cell! {
    every_kind_of_record_is_passed_on_over_udp_and_tcp(cell) {
        let site = site();
        let server = DnsServer::start(&site.far, Family::V4.far(), 1);
        let hythe = asking_far(&site, cell).run();
        for family in FAMILIES {
            for transport in ["+notcp", "+tcp"] {
                for (question, records) in [
                    ("address.test A", &["203.0.113.10"][..]),
                    ("address.test AAAA", &["2001:db8::10"]),
                    ("text.test TXT", &[r#""one string" "another""#]),
                    ("mail.test MX", &["10 mx.test."]),
                    ("_http._tcp.test SRV", &["1 2 8080 web.test."]),
                    ("https.test HTTPS", &[r#"1 . alpn="h2""#]),
                    ("empty.test A", &[]),
                    ("address.test MX", &[]),
                ] {
                    dig(&hythe.guest, family, &format!("{transport} {question}")).assert("NOERROR", records);
                }
            }
        }
        // The guest's transport is kept.
        assert_eq!(server.count("mail.test", Over::Udp), 2);
        assert_eq!(server.count("mail.test", Over::Tcp), 2);
        hythe.stop().assert_clean(0);
    }
}

on_every_cell! {
    a_failure_is_passed_on_as_the_failure_it_is(cell) {
        let site = site();
        let _server = DnsServer::start(&site.far, Family::V4.far(), 1);
        let hythe = asking_far(&site, cell).run();
        for transport in ["+notcp", "+tcp"] {
            let ask = |name: &str| dig(&hythe.guest, Family::V4, &format!("{transport} {name} A"));
            ask("absent.test").assert("NXDOMAIN", &[]);
            ask("broken.test").assert("SERVFAIL", &[]);
            ask("refused.test").assert("REFUSED", &[]);
        }
        hythe.stop().assert_clean(0);
    }
}

on_every_cell! {
    an_answer_is_as_long_as_the_guest_takes_it(cell) {
        let site = site();
        let server = DnsServer::start(&site.far, Family::V4.far(), 1);
        let hythe = asking_far(&site, cell).run();
        for family in FAMILIES {
            let before = server.asked().len();
            let whole = |answer: &Answer| {
                let text: usize = answer.records.iter().map(|record| record.matches('x').count()).sum();
                assert_eq!((answer.status.as_str(), answer.truncated, text), ("NOERROR", false, LARGE), "{}", answer.text);
            };
            whole(&dig(&hythe.guest, family, "+notcp +ignore +bufsize=4096 large.test TXT"));
            whole(&dig(&hythe.guest, family, "+tcp large.test TXT"));
            for small in ["+bufsize=1232", "+noedns", "+bufsize=512"] {
                let cut = dig(&hythe.guest, family, &format!("+notcp +ignore {small} large.test TXT"));
                assert!(cut.truncated, "{small}: {}", cut.text);
                cut.assert("NOERROR", &[]);
            }
            // A client that is told so comes again over TCP.
            whole(&dig(&hythe.guest, family, "+notcp +bufsize=1232 large.test TXT"));
            let asked = server.asked();
            let tcp = asked[before..].iter().filter(|asked| asked.over == Over::Tcp).count();
            assert_eq!(tcp, 2, "{:?}", &asked[before..]);
        }
        hythe.stop().assert_clean(0);
    }
}

on_every_cell! {
    a_silent_resolver_is_followed_by_the_next_one(cell) {
        let site = site();
        let silent = DnsServer::silent(&site.far, Family::V4.far());
        let second = DnsServer::start(&site.far, SECOND.parse().unwrap(), 2);
        let resolvers = format!("nameserver {}\nnameserver {SECOND}\n", Family::V4.far());
        let hythe = with_resolvers(&site, cell, &resolvers).run();
        for transport in ["+notcp", "+tcp"] {
            dig(&hythe.guest, Family::V4, &format!("{transport} whoami.test A")).assert("NOERROR", &["203.0.113.2"]);
        }
        assert!(!silent.asked().is_empty(), "the first one is asked first");
        // And then after the one that answers.
        let (begun, asked) = (Instant::now(), silent.asked().len());
        for number in 0..10 {
            dig(&hythe.guest, Family::V4, &format!("n{number}.test A")).assert("NXDOMAIN", &[]);
        }
        assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
        assert_eq!(silent.asked().len(), asked);
        assert!(second.asked().len() >= 12);
        hythe.stop().assert_clean(0);
    }
}

on_every_cell! {
    when_nobody_answers_the_guest_is_told_so_and_nothing_else(cell) {
        let site = site();
        let silent = DnsServer::silent(&site.far, Family::V4.far());
        // Nobody has the second; the third is refused by its host.
        let resolvers = format!("nameserver {}\nnameserver {SECOND}\nnameserver 10.77.0.1\n", Family::V4.far());
        let hythe = with_resolvers(&site, cell, &resolvers).run();
        for transport in ["+notcp", "+tcp"] {
            // Not NXDOMAIN: nobody has said that.
            dig(&hythe.guest, Family::V4, &format!("{transport} address.test A")).assert("SERVFAIL", &[]);
        }
        assert!(!silent.asked().is_empty());
        // The link's own names need nobody.
        dig(&hythe.guest, Family::V4, "host.docker.internal A").assert("NOERROR", &["192.168.65.254"]);
        hythe.stop().assert_clean(0);
    }
}

/// hythe's own /etc/resolv.conf, as this process can reach it.
fn resolv_conf_of(hythe: &Hythe) -> PathBuf {
    let path = format!("/proc/{}/root/mnt/resolv.conf", hythe.pid());
    assert!(std::fs::exists(&path).unwrap(), "{path}");
    path.into()
}

on_every_cell! {
    resolvers_may_change_while_hythe_runs(cell) {
        let site = site();
        let servers = [(Family::V4.far(), 1), (SECOND.parse().unwrap(), 2), (Family::V6.far(), 3)];
        let _servers = servers.map(|(address, identity)| DnsServer::start(&site.far, address, identity));
        let hythe = asking_far(&site, cell).run();
        let file = resolv_conf_of(&hythe);
        let ask = || dig(&hythe.guest, Family::V4, "whoami.test A").records;
        assert_eq!(ask(), ["203.0.113.1"]);
        for (address, identity) in servers.into_iter().rev() {
            std::fs::write(&file, format!("# changed\nnameserver {address}\n")).unwrap();
            wait_until("the change to be seen", || ask() == [format!("203.0.113.{identity}")]);
        }
        hythe.stop().assert_clean(0);
    }
}

on_every_cell! {
    the_names_of_the_link_are_answered_in_both_families_and_asked_of_nobody(cell) {
        let site = site();
        let server = DnsServer::start(&site.far, Family::V4.far(), 1);
        let hythe = asking_far(&site, cell).options("--hostname web").run();
        let [host, gateway] = [[254; 2], [1; 2]].map(|[v4, v6]: [u8; 2]| {
            [format!("192.168.65.{v4}"), format!("fdc4:f303:9324::{v6}")]
        });
        for family in FAMILIES {
            for transport in ["+notcp", "+tcp"] {
                for (name, addresses) in [
                    ("host.docker.internal", &host),
                    ("host.containers.internal", &host),
                    ("HOST.Docker.Internal", &host),
                    ("gateway.docker.internal", &gateway),
                    ("gateway.containers.internal", &gateway),
                    ("web", &["192.168.65.3".to_string(), "fdc4:f303:9324::3".to_string()]),
                ] {
                    for (kind, address) in ["A", "AAAA"].iter().zip(addresses) {
                        let answer = dig(&hythe.guest, family, &format!("{transport} {name} {kind}"));
                        answer.assert("NOERROR", &[address]);
                    }
                }
                let reverse = dig(&hythe.guest, family, &format!("{transport} -x 192.168.65.254"));
                reverse.assert("NOERROR", &["host.docker.internal."]);
                let reverse = dig(&hythe.guest, family, &format!("{transport} -x fdc4:f303:9324::1"));
                reverse.assert("NOERROR", &["gateway.docker.internal."]);
                dig(&hythe.guest, family, &format!("{transport} nobody.docker.internal A")).assert("NXDOMAIN", &[]);
                dig(&hythe.guest, family, &format!("{transport} host.docker.internal MX")).assert("NOERROR", &[]);
            }
        }
        assert_eq!(server.asked(), []);
        hythe.stop().assert_clean(0);
    }
}

on_every_cell! {
    a_command_resolves_names_by_the_c_library(cell) {
        let site = site();
        let _server = DnsServer::start(&site.far, Family::V4.far(), 1);
        for (database, name, address) in [
            ("ahostsv4", "address.test", "203.0.113.10"),
            ("ahostsv6", "address.test", "2001:db8::10"),
            ("ahostsv4", "host.docker.internal", "192.168.65.254"),
            ("ahostsv6", "host.docker.internal", "fdc4:f303:9324::254"),
            ("ahostsv4", "gateway.containers.internal", "192.168.65.1"),
            // By the host's search domain.
            ("ahostsv4", "address", "203.0.113.10"),
        ] {
            let resolvers = format!("nameserver {}\nsearch test\n", Family::V4.far());
            let command = with_resolvers(&site, cell, &resolvers).command(&["getent", database, name]).end();
            command.assert_clean(0);
            let found = command.stdout.split_whitespace().next();
            assert_eq!(found, Some(address), "{database} {name}: {}", command.stderr);
        }
        let command = asking_far(&site, cell).command(&["getent", "hosts", "absent.test"]).end();
        // getent(1): a key that was not found.
        command.assert_clean(2);
    }
}

#[test]
fn resolvers_of_the_command_line_count_instead_of_the_hosts() {
    let site = site();
    let host = DnsServer::start(&site.far, Family::V4.far(), 1);
    let _other = DnsServer::start(&site.far, SECOND.parse().unwrap(), 2);
    let hythe = asking_far(&site, ANY).options(&format!("--dns {SECOND}")).run();
    dig(&hythe.guest, Family::V4, "whoami.test A").assert("NOERROR", &["203.0.113.2"]);
    assert_eq!(host.asked(), []);
    hythe.stop().assert_clean(0);
}

#[test]
fn resolvers_on_the_hosts_own_loopback_are_asked_there() {
    let site = site();
    let _server = DnsServer::start(&site.host, "127.0.0.53".parse().unwrap(), 53);
    let hythe = with_resolvers(&site, ANY, "nameserver 127.0.0.53\n").options("--no-host-loopback").run();
    dig(&hythe.guest, Family::V4, "whoami.test A").assert("NOERROR", &["203.0.113.53"]);
    hythe.stop().assert_clean(0);
}

/// A server that others wrote, with the records of a zone of its own.
fn unbound(site: &Site, directory: &Directory) -> Program {
    let long = "y".repeat(250);
    let record = |n| format!("    local-data: 'large.example. 60 IN TXT \"{n:02} {long}\"'\n");
    let large = (0..12).map(record).collect::<Vec<_>>().concat();
    let config = format!(
        "server:
    interface: {address}
    interface: {SECOND}
    port: 53
    access-control: 0.0.0.0/0 allow
    do-daemonize: no
    use-syslog: no
    chroot: \"\"
    username: \"\"
    pidfile: \"\"
    directory: \"{directory}\"
    max-udp-size: 4096
    edns-buffer-size: 4096
    module-config: iterator
    local-zone: example. static
    local-data: 'example. 60 IN SOA ns.example. hostmaster.example. 1 3600 600 86400 60'
    local-data: 'address.example. 60 IN A 203.0.113.20'
    local-data: 'address.example. 60 IN AAAA 2001:db8::20'
    local-data: 'text.example. 60 IN TXT \"some text\"'
    local-data: 'mail.example. 60 IN MX 5 mx.example.'
    local-data: '_http._tcp.example. 60 IN SRV 1 2 80 web.example.'
    local-data: 'https.example. 60 IN HTTPS 1 . alpn=h2'
    local-zone: refused.example. always_refuse
{large}remote-control:
    control-enable: no
",
        address = Family::V4.far(),
        directory = directory.path().display()
    );
    let file = directory.file("unbound.conf", &config);
    let server = Program::start(&site.far, &["unbound", "-d", "-c", &file.to_string_lossy()]);
    wait_until("unbound to serve", || site.far.connect((Family::V4.far(), 53)).is_ok());
    server
}

on_every_cell! {
    a_server_that_others_wrote_is_passed_on_as_well(cell) {
        let site = site();
        let directory = Directory::new();
        let _server = unbound(&site, &directory);
        let hythe = asking_far(&site, cell).run();
        for family in FAMILIES {
            for transport in ["+notcp", "+tcp"] {
                let ask = |question: &str| dig(&hythe.guest, family, &format!("{transport} {question}"));
                ask("address.example A").assert("NOERROR", &["203.0.113.20"]);
                ask("address.example AAAA").assert("NOERROR", &["2001:db8::20"]);
                ask("text.example TXT").assert("NOERROR", &["\"some text\""]);
                ask("mail.example MX").assert("NOERROR", &["5 mx.example."]);
                ask("_http._tcp.example SRV").assert("NOERROR", &["1 2 80 web.example."]);
                ask("https.example HTTPS").assert("NOERROR", &["1 . alpn=\"h2\""]);
                ask("absent.example A").assert("NXDOMAIN", &[]);
                ask("sub.refused.example A").assert("REFUSED", &[]);
                assert_eq!(ask("+bufsize=4096 large.example TXT").records.len(), 12);
            }
            let cut = dig(&hythe.guest, family, "+notcp +ignore +bufsize=1232 large.example TXT");
            assert!(cut.truncated, "{}", cut.text);
        }
        hythe.stop().assert_clean(0);
    }
}
