//! DNS as others' tools see it: the same through hythe as without it; names that go where they belong and nowhere else;
//! and whatever a guest or a resolver may do wrong. What `names.rs` says of one answer is said of every kind here.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use crate::names::{SECOND, THIRD, site};
use crate::rig::cell::{ANY, Cell, on_every_cell};
use crate::rig::directory::Directory;
use crate::rig::dns_server::DnsServer;
use crate::rig::hythe::{Hythe, Start};
use crate::rig::netns::Netns;
use crate::rig::nsd::Nsd;
use crate::rig::site::{FAMILIES, Family, Site};
use crate::rig::socket::receive;
use crate::rig::wait::wait_until;

/// hythe on a host whose resolver is the far server.
fn asking_far(site: &Site, cell: Cell) -> Start<'_> {
    let resolvers = format!("nameserver {}\n", Family::V4.far());
    Hythe::of(&site.host, cell).mounts(move |mounts| mounts.resolv_conf(&resolvers))
}

/// What dig(1) shows in its short form, an address or so a line, and nothing where there is nothing.
fn dig(guest: &Netns, words: &str) -> Vec<String> {
    let fixed = ["dig", "@192.168.65.1", "+tries=1", "+time=20", "+short", "+nocookie"];
    let words: Vec<&str> = fixed.into_iter().chain(words.split_whitespace()).collect();
    guest.command(&words).lines().map(str::to_string).collect()
}

/// The response code that dig(1) shows.
fn status(guest: &Netns, words: &str) -> String {
    let fixed = ["dig", "@192.168.65.1", "+tries=1", "+time=20", "+nocookie"];
    let words: Vec<&str> = fixed.into_iter().chain(words.split_whitespace()).collect();
    let text = guest.command(&words);
    let status = text.split_once("status: ").unwrap_or_else(|| panic!("no answer: {text}")).1;
    status.split(',').next().unwrap().to_string()
}

/// An OPT record: payload size, version, DO and options.
#[derive(Clone, Copy, Debug)]
struct Opt(u16, u8, bool, &'static [u8]);

/// A query, bit by bit.
#[derive(Clone, Debug)]
struct Kind {
    name: &'static str,
    record: u16,
    class: u16,
    flags: [u8; 2],
    opt: Option<Opt>,
    tcp: bool,
}

/// RD, as stub resolvers set it.
const RD: [u8; 2] = [1, 0];

fn kind(name: &'static str, record: u16) -> Kind {
    Kind { name, record, class: 1, flags: RD, opt: None, tcp: false }
}

impl Kind {
    fn bytes(&self, id: u16) -> Vec<u8> {
        let mut bytes = [id.to_be_bytes(), self.flags, [0, 1], [0; 2], [0; 2]].concat();
        bytes.extend([0, u8::from(self.opt.is_some())]);
        for label in self.name.split('.').filter(|label| !label.is_empty()) {
            bytes.push(label.len() as u8);
            bytes.extend(label.as_bytes());
        }
        bytes.push(0);
        bytes.extend([self.record, self.class].map(u16::to_be_bytes).concat());
        if let Some(Opt(size, version, dnssec_ok, options)) = self.opt {
            bytes.extend([0, 0, 41]);
            bytes.extend(size.to_be_bytes());
            bytes.extend([0, version, u8::from(dnssec_ok) << 7, 0]);
            bytes.extend((options.len() as u16).to_be_bytes());
            bytes.extend(options);
        }
        bytes
    }

    /// Asks; returns the answer without its ID, which must be that of the query.
    fn ask(&self, from: &Netns, server: IpAddr, id: u16) -> Vec<u8> {
        let query = self.bytes(id);
        let server = SocketAddr::new(server, 53);
        let answer = if self.tcp {
            let mut stream = from.connect(server).unwrap();
            stream.write_all(&[&(query.len() as u16).to_be_bytes()[..], &query].concat()).unwrap();
            let mut length = [0; 2];
            stream.read_exact(&mut length).unwrap();
            let mut answer = vec![0; u16::from_be_bytes(length).into()];
            stream.read_exact(&mut answer).unwrap();
            answer
        } else {
            let any = if server.is_ipv4() { Family::V4 } else { Family::V6 }.any();
            let socket = from.udp(any, 0);
            socket.send_to(&query, server).unwrap();
            let mut answer = vec![0; 65_535];
            let (len, _) = receive(&socket, &mut answer).unwrap_or_else(|error| panic!("{self:?}: {error}"));
            answer.truncate(len);
            answer
        };
        assert_eq!(answer[..2], query[..2], "{self:?}");
        answer[2..].to_vec()
    }
}

/// Every kind of query that differs in what a forwarder might get wrong.
fn kinds() -> Vec<Kind> {
    let names = [
        ("signed.test", 1),
        ("signed.test", 6),
        ("signed.test", 2),
        ("signed.test", 15),
        ("signed.test", 16),
        ("signed.test", 257),
        ("signed.test", 48),
        ("signed.test", 46),
        ("signed.test", 255),
        ("signed.test", 51),
        ("web.signed.test", 1),
        ("WeB.sIgNeD.tEsT", 28),
        ("web.signed.test", 15),
        ("www.signed.test", 28),
        ("www.signed.test", 5),
        ("chain1.signed.test", 1),
        ("dangling.signed.test", 1),
        ("_http._tcp.signed.test", 33),
        ("sip.signed.test", 35),
        ("ssh.signed.test", 44),
        ("_443._tcp.web.signed.test", 52),
        ("svc.signed.test", 65),
        ("svc.signed.test", 64),
        ("here.signed.test", 29),
        ("uri.signed.test", 256),
        ("info.signed.test", 13),
        ("rp.signed.test", 17),
        ("key.signed.test", 61),
        ("odd.signed.test", 65_400),
        ("odd.signed.test", 65_401),
        ("x.y.wild.signed.test", 1),
        ("deep.signed.test", 1),
        ("b.deep.signed.test", 28),
        ("leaf.tree.signed.test", 1),
        ("x.child.signed.test", 1),
        ("secure.signed.test", 43),
        ("x.secure.signed.test", 1),
        ("absent.signed.test", 1),
        ("many.signed.test", 1),
        ("elsewhere.test", 1),
        ("", 2),
    ];
    let mut kinds: Vec<Kind> = names.into_iter().map(|(name, number)| kind(name, number)).collect();
    let web = || kind("web.signed.test", 1);
    for name in [
        "web.signed.test",
        "absent.signed.test",
        "x.wild.signed.test",
        "many.signed.test",
        "secure.signed.test",
    ] {
        kinds.push(Kind { opt: Some(Opt(4096, 0, true, &[])), ..kind(name, 1) });
        kinds.push(Kind { opt: Some(Opt(512, 0, true, &[])), ..kind(name, 1) });
        kinds.push(Kind { tcp: true, opt: Some(Opt(1232, 0, true, &[])), ..kind(name, 1) });
    }
    for flags in [[0, 0], [1, 0x10], [1, 0x20], [0, 0x30]] {
        kinds.push(Kind { flags, ..web() });
    }
    // A client's cookie, a request for the server's name, a client's subnet, padding, and one that nobody knows.
    let options: [&[u8]; 5] = [
        b"\0\x0a\0\x0812345678",
        b"\0\x03\0\0",
        b"\0\x08\0\x07\0\x01\x18\0\xc6\x33\x64",
        b"\0\x0c\0\x04\0\0\0\0",
        b"\xff\xee\0\x02hi",
    ];
    kinds.extend(options.map(|options| Kind { opt: Some(Opt(1232, 0, false, options)), ..web() }));
    kinds.extend(
        [0, 100, 1232, u16::MAX]
            .map(|size| Kind { opt: Some(Opt(size, 0, false, &[])), ..kind("many.signed.test", 1) }),
    );
    kinds.push(Kind { opt: Some(Opt(1232, 1, false, &[])), ..web() });
    kinds.push(Kind { tcp: true, ..kind("many.signed.test", 1) });
    kinds.push(Kind { tcp: true, ..kind("signed.test", 255) });
    for (name, class) in
        [("version.bind", 3), ("id.server", 3), ("version.bind", 4), ("web.signed.test", 255)]
    {
        kinds.push(Kind { class, ..kind(name, 16) });
    }
    kinds
}

/// The two are the same but for times to live of an hour that a minute or less has passed of.
fn same_but_for_age(first: &[u8], second: &[u8]) -> bool {
    const HOUR_S: u32 = 3600;
    let number = |bytes: &[u8], at: usize| Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
    let mut at = 0;
    while at < first.len().min(second.len()) {
        if first[at] == second[at] {
            at += 1;
            continue;
        }
        let aged = |start: &usize| {
            number(first, *start) == Some(HOUR_S)
                && number(second, *start).is_some_and(|ttl| (HOUR_S - 60..HOUR_S).contains(&ttl))
        };
        let Some(start) = (at.saturating_sub(3)..=at).find(aged) else { return false };
        at = start + 4;
    }
    first.len() == second.len()
}

#[test]
fn every_kind_of_query_is_answered_byte_for_byte_as_without_hythe_and_from_the_cache_too() {
    let site = site();
    let _nsd = Nsd::start(&site.far, Family::V4.far());
    let kinds = kinds();
    assert!(kinds.len() >= 60, "{}", kinds.len());
    let hythe = asking_far(&site, ANY).run();
    for (number, kind) in kinds.iter().enumerate() {
        let id = 0x1234 + number as u16;
        let direct = kind.ask(&site.host, Family::V4.far(), id);
        for family in FAMILIES {
            let passed = kind.ask(&hythe.guest, family.gateway(), !id);
            assert!(
                same_but_for_age(&direct, &passed),
                "{kind:?} over {family:?}\ndirect {direct:02x?}\nhythe  {passed:02x?}"
            );
        }
    }
    let hits = hythe.counters().get("dns_cache_hits");
    assert!(hits > 40, "{hits} of {} were answered from the cache", kinds.len());
    let forwarded = hythe.counters().get("dns_forwarded");
    assert_eq!(forwarded + hits, 2 * kinds.len() as u64);
    hythe.stop().assert_clean(0);

    // And where nothing is kept, to the byte.
    let hythe = asking_far(&site, ANY).options("--dns-cache 0").run();
    for (number, kind) in kinds.iter().enumerate() {
        let id = number as u16;
        let direct = kind.ask(&site.host, Family::V4.far(), id);
        assert_eq!(kind.ask(&hythe.guest, Family::V4.gateway(), id), direct, "{kind:?}");
    }
    assert_eq!(hythe.counters().get("dns_cache_hits"), 0);
    hythe.stop().assert_clean(0);
}

/// What a tool shows, without what is of the moment.
fn shown(from: &Netns, words: &str) -> String {
    const OF_THE_MOMENT: [&str; 7] =
        ["; <<>>", ";; Query time", ";; SERVER", ";; WHEN", ";; From", ";; Time", "; (1 server"];
    let words: Vec<&str> = words.split_whitespace().collect();
    let lines = from.command(&words);
    let lines = lines.lines().filter(|line| !OF_THE_MOMENT.iter().any(|mark| line.starts_with(mark)));
    lines.map(|line| without_id(line) + "\n").collect()
}

fn without_id(line: &str) -> String {
    let Some((before, id)) = line.split_once("id: ") else { return line.to_string() };
    format!("{before}id{}", id.trim_start_matches(|c: char| c.is_ascii_digit()))
}

#[test]
fn dig_kdig_drill_and_delv_show_the_same_as_without_hythe() {
    let site = site();
    let nsd = Nsd::start(&site.far, Family::V4.far());
    let anchor = nsd.anchor();
    // Of a kept answer the times to live differ.
    let hythe = asking_far(&site, ANY).options("--dns-cache 0").run();
    for words in [
        "dig @ADDRESS web.signed.test A",
        "dig @ADDRESS +nocookie +dnssec web.signed.test A",
        "dig @ADDRESS +nocookie +tcp +dnssec signed.test ANY",
        "dig @ADDRESS +nocookie +dnssec many.signed.test A",
        "dig @ADDRESS +nocookie +noedns many.signed.test A",
        "dig @ADDRESS +nocookie +nsid +cdflag +adflag absent.signed.test TXT",
        "dig @ADDRESS +nocookie CH TXT version.bind",
        "dig @ADDRESS +nocookie elsewhere.test",
        "kdig @ADDRESS +dnssec x.wild.signed.test",
        "kdig @ADDRESS +tcp +padding=64 web.signed.test AAAA",
        "kdig @ADDRESS +nsid +subnet=203.0.113.0/24 svc.signed.test HTTPS",
        "kdig @ADDRESS odd.signed.test TYPE65400",
        "drill -D @ADDRESS web.signed.test A",
        "drill -t @ADDRESS many.signed.test A",
        "drill @ADDRESS chain1.signed.test AAAA",
        "delv @ADDRESS -a ANCHOR +root=signed.test web.signed.test A",
        "delv @ADDRESS -a ANCHOR +root=signed.test chain1.signed.test AAAA",
        "delv @ADDRESS -a ANCHOR +root=signed.test x.wild.signed.test A",
        "delv @ADDRESS -a ANCHOR +root=signed.test absent.signed.test A",
    ] {
        let words = words.replace("ANCHOR", &anchor);
        let of = |from: &Netns, address: IpAddr| shown(from, &words.replace("ADDRESS", &address.to_string()));
        let direct = of(&site.host, Family::V4.far());
        assert_eq!(of(&hythe.guest, Family::V4.gateway()), direct, "{words}");
        let is_validated =
            direct.contains("; fully validated") || direct.contains("negative response, fully");
        assert_eq!(words.starts_with("delv"), is_validated, "{words}: {direct}");
    }
    // No zone is given away, whatever the server would do.
    for transfer in ["+tcp signed.test AXFR", "+tcp signed.test IXFR=1", "+notcp signed.test IXFR=1"] {
        let words = format!("dig @192.168.65.1 +noall +comments +answer {transfer}");
        let words: Vec<&str> = words.split_whitespace().collect();
        let output = hythe.guest.output(&words);
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains("status: REFUSED") || text.contains("Transfer failed"), "{transfer}: {text}");
        assert!(!text.contains("203.0.113"), "{transfer}: {text}");
    }
    hythe.stop().assert_clean(0);
}

on_every_cell! {
    dnsperf_gets_an_answer_to_every_query(cell) {
        let site = site();
        let directory = Directory::new();
        let _nsd = Nsd::start(&site.far, Family::V4.far());
        let names = ["web", "www", "absent", "x.wild", "many", "svc", "chain1", "mail"];
        let lines = (0..400).map(|n| format!("{}.signed.test {}\n", names[n % 8], ["A", "AAAA", "HTTPS"][n % 3]));
        let unknown = (0..400).map(|n| format!("n{n}.wild.signed.test A\n"));
        let file = directory.file("queries", &lines.chain(unknown).collect::<String>());
        let hythe = asking_far(&site, cell).run();
        for (family, mode) in [(Family::V4, "udp"), (Family::V6, "udp"), (Family::V4, "tcp")] {
            let (server, file) = (family.gateway().to_string(), file.to_string_lossy());
            let words = ["dnsperf", "-s", &server, "-m", mode, "-d", &file, "-n", "5", "-c", "8", "-q", "60", "-t", "30", "-D"];
            let report = hythe.guest.command(&words);
            assert!(report.contains("Queries completed:    4000 (100.00%)"), "{mode}: {report}");
            assert!(report.contains("Queries lost:         0"), "{mode}: {report}");
        }
        let counters = hythe.counters();
        assert!(counters.get("dns_cache_hits") > 0);
        assert_eq!(counters.get("dns_over_budget"), 0);
        hythe.stop().assert_clean(0);
    }
}

fn asked(server: &DnsServer) -> Vec<String> {
    server.asked().into_iter().map(|asked| asked.name).collect()
}

on_every_cell! {
    names_of_a_zone_reach_its_servers_alone(cell) {
        let site = site();
        let world = DnsServer::start(&site.far, Family::V4.far(), 1);
        let office = DnsServer::start(&site.far, SECOND.parse().unwrap(), 2);
        let silent = DnsServer::silent(&site.far, THIRD.parse().unwrap());
        let directory = Directory::new();
        // The same by the command line, and by a file.
        let file = directory.file("hythe.toml", &format!(
            "[zones]\n'office.test' = ['{SECOND}']\n'whoami.test' = ['{SECOND}']\n\
             'silent.test' = ['{THIRD}', '{THIRD}:5300']\n'dead.test' = ['10.77.0.1']\n"
        ));
        let line = format!(
            "--zone office.test={SECOND} --zone whoami.test={SECOND} --zone silent.test={THIRD},{THIRD}:5300 \
             --zone dead.test=10.77.0.1"
        );
        for options in [line, format!("--config {}", file.display())] {
            let hythe = asking_far(&site, cell).options(&options).run();
            assert_eq!(dig(&hythe.guest, "whoami.test A"), ["203.0.113.2"]);
            for transport in ["+notcp", "+tcp"] {
                for (name, code) in [
                    ("git.office.test", "NXDOMAIN"),
                    ("Secret.OFFICE.test", "NXDOMAIN"),
                    ("secret.dead.test", "SERVFAIL"),
                    ("secret.silent.test", "SERVFAIL"),
                    ("notoffice.test", "NXDOMAIN"),
                    ("address.test", "NOERROR"),
                ] {
                    assert_eq!(status(&hythe.guest, &format!("{transport} {name} A")), code, "{name}");
                }
            }
            hythe.stop().assert_clean(0);
        }
        let [world, office, silent] = [&world, &office, &silent].map(asked);
        assert!(world.iter().all(|name| ["notoffice.test", "address.test"].contains(&&name[..])), "{world:?}");
        assert!(office.iter().all(|name| name.ends_with(".office.test") || name == "whoami.test"), "{office:?}");
        assert!(silent.iter().all(|name| name == "secret.silent.test"), "{silent:?}");
        assert!(world.len() >= 4 && office.len() >= 9 && !silent.is_empty());
    }
}

/// A file of the host that hythe sees, as this process can reach it.
fn file_of(hythe: &Hythe, name: &str) -> PathBuf {
    let path = format!("/proc/{}/root/etc/{name}", hythe.pid());
    assert!(fs::exists(&path).unwrap(), "{path}");
    path.into()
}

/// Makes a file the other way than by writing into it.
fn rename_over(path: &PathBuf, content: &str) {
    let new = path.with_extension("new");
    fs::write(&new, content).unwrap();
    fs::rename(&new, path).unwrap();
}

/// Makes a link point elsewhere.
fn switch(link: &PathBuf, target: &str) {
    let new = link.with_extension("new");
    std::os::unix::fs::symlink(target, &new).unwrap();
    fs::rename(&new, link).unwrap();
}

on_every_cell! {
    the_hosts_files_may_change_in_any_way_while_hythe_runs(cell) {
        let site = site();
        let servers = [(Family::V4.far(), 1), (SECOND.parse().unwrap(), 2), (THIRD.parse().unwrap(), 3)];
        let servers = servers.map(|(address, identity): (IpAddr, u8)| DnsServer::start(&site.far, address, identity));
        let far = Family::V4.far();
        let hythe = Hythe::of(&site.host, cell).mounts(move |mounts| mounts.etc(&[
            ("resolv.conf -> resolv.one", ""),
            ("resolv.one", &format!("nameserver {far}\n")),
            ("resolv.two", &format!("nameserver {far}\n")),
            ("hosts", "127.0.0.1 localhost\n203.0.113.61 box.test\n2001:db8::61 box.test\n127.0.1.1 me.test\n"),
        ])).run();
        let guest = &hythe.guest;
        // Whom to ask: every answer is kept, and none outlives a change.
        let who = || dig(guest, "whoami.test A");
        assert_eq!(who(), ["203.0.113.1"]);
        fs::write(file_of(&hythe, "resolv.one"), format!("nameserver {SECOND}\n")).unwrap();
        wait_until("a rewritten resolv.conf", || who() == ["203.0.113.2"]);
        rename_over(&file_of(&hythe, "resolv.one"), &format!("nameserver {THIRD}\n"));
        wait_until("a renamed resolv.conf", || who() == ["203.0.113.3"]);
        switch(&file_of(&hythe, "resolv.conf"), "resolv.two");
        wait_until("a switched resolv.conf", || who() == ["203.0.113.1"]);

        // What the host's own list says.
        assert_eq!(dig(guest, "box.test A"), ["203.0.113.61"]);
        assert_eq!(dig(guest, "BOX.test AAAA"), ["2001:db8::61"]);
        assert_eq!(dig(guest, "-x 203.0.113.61"), ["box.test."]);
        assert_eq!(dig(guest, "me.test A"), ["192.168.65.254"], "the host's loopback, as the guest reaches it");
        assert_eq!(status(guest, "box.test MX"), "NOERROR");
        assert_eq!(dig(guest, "box.test MX"), [""; 0]);
        let file = file_of(&hythe, "hosts");
        fs::write(&file, "203.0.113.62 box.test\n").unwrap();
        wait_until("rewritten hosts", || dig(guest, "box.test A") == ["203.0.113.62"]);
        assert_eq!(dig(guest, "box.test AAAA"), [""; 0]);
        rename_over(&file, "203.0.113.63 box.test\n");
        wait_until("renamed hosts", || dig(guest, "box.test A") == ["203.0.113.63"]);
        fs::write(file.with_extension("two"), "203.0.113.64 box.test\n").unwrap();
        switch(&file, "hosts.two");
        wait_until("switched hosts", || dig(guest, "box.test A") == ["203.0.113.64"]);
        for server in &servers {
            assert!(asked(server).iter().all(|name| name == "whoami.test"), "{:?}", asked(server));
        }
        fs::remove_file(&file).unwrap();
        wait_until("removed hosts", || status(guest, "box.test A") == "NXDOMAIN");
        hythe.stop().assert_clean(0);
    }
}

#[test]
fn records_of_the_user_are_answered_and_hosts_can_be_left_out() {
    let site = site();
    let world = DnsServer::start(&site.far, Family::V4.far(), 1);
    let directory = Directory::new();
    let file = directory
        .file("hythe.toml", "[records]\n'db.test' = ['10.0.0.5', 'fd00::5']\n'*.apps.test' = ['10.0.0.6']\n");
    for options in [
        "--record db.test=10.0.0.5,fd00::5 --record *.apps.test=10.0.0.6 --no-hosts".to_string(),
        format!("--config {} --no-hosts", file.display()),
    ] {
        let far = Family::V4.far();
        let start = Hythe::of(&site.host, ANY).mounts(move |mounts| {
            mounts.etc(&[
                ("resolv.conf", &format!("nameserver {far}\n")),
                ("hosts", "203.0.113.61 absent.test db.test\n"),
            ]);
        });
        let hythe = start.options(&options).run();
        assert_eq!(dig(&hythe.guest, "db.test A"), ["10.0.0.5"]);
        assert_eq!(dig(&hythe.guest, "+tcp DB.test AAAA"), ["fd00::5"]);
        assert_eq!(dig(&hythe.guest, "-x 10.0.0.5"), ["db.test."]);
        assert_eq!(dig(&hythe.guest, "any.thing.apps.test A"), ["10.0.0.6"]);
        assert_eq!(status(&hythe.guest, "absent.test A"), "NXDOMAIN");
        hythe.stop().assert_clean(0);
    }
    assert_eq!(asked(&world), ["absent.test"; 2]);
}

#[test]
fn addresses_that_the_host_has_no_route_for_are_left_out_while_it_has_none() {
    let site = site();
    let _server = DnsServer::start(&site.far, Family::V4.far(), 1);
    let hythe = asking_far(&site, ANY).options("--dns-filter auto").run();
    let v6 = || dig(&hythe.guest, "address.test AAAA");
    assert_eq!(v6(), ["2001:db8::10"]);
    site.host.ip("-6 route del default");
    wait_until("the route to be gone", || v6().is_empty());
    assert_eq!(status(&hythe.guest, "address.test AAAA"), "NOERROR");
    assert_eq!(dig(&hythe.guest, "address.test A"), ["203.0.113.10"]);
    site.host.ip("-6 route add default via fd77::1");
    wait_until("the route to be back", || v6() == ["2001:db8::10"]);
    hythe.stop().assert_clean(0);
}

#[test]
fn each_query_is_logged_where_that_is_asked_for() {
    let site = site();
    let _server = DnsServer::start(&site.far, Family::V4.far(), 1);
    let hythe = asking_far(&site, ANY).options("--dns-log").run();
    dig(&hythe.guest, "address.test A");
    dig(&hythe.guest, "address.test A");
    dig(&hythe.guest, "host.docker.internal A");
    dig(&hythe.guest, "+tcp a\\010b.test TXT");
    let server = Family::V4.far();
    for (query, answer) in [
        ("name=address.test kind=A from=192.168.65.3:", format!("server={server}:53 rcode=NOERROR ms=")),
        ("name=address.test kind=A from=192.168.65.3:", "server=cache rcode=NOERROR ms=".to_string()),
        ("name=host.docker.internal kind=A from=192.168.65.3:", "server=link rcode=NOERROR ms=".to_string()),
        ("name=a\\010b.test kind=TXT from=tcp ", format!("server={server}:53 rcode=NXDOMAIN ms=")),
    ] {
        wait_until(&format!("{query} {answer}"), || {
            hythe.log().lines().any(|line| line.contains(query) && line.contains(&answer))
        });
    }
    hythe.stop().assert_clean(0);

    let hythe = asking_far(&site, ANY).run();
    dig(&hythe.guest, "address.test A");
    assert!(!hythe.stop().stderr.contains("address.test"), "names are nobody's business");
}

#[test]
fn a_host_without_resolvers_fails_at_once_and_one_with_too_many_in_time() {
    let site = site();
    for (resolvers, counter) in
        [(String::new(), "dns_server_unreachable"), ("# nothing\n".into(), "dns_server_unreachable")]
    {
        let start = Hythe::of(&site.host, ANY).mounts(move |mounts| mounts.resolv_conf(&resolvers));
        let hythe = start.run();
        assert_eq!(status(&hythe.guest, "address.test A"), "SERVFAIL");
        let counters = hythe.counters();
        assert_eq!((counters.get("dns_unanswered"), counters.get(counter)), (1, 1));
        hythe.stop().assert_clean(0);
    }
    // Nobody has any of these but the last.
    let _server = DnsServer::start(&site.far, Family::V4.far(), 1);
    let many = (1..20).map(|last| format!("nameserver 10.77.0.1{last:02}\n"));
    let many = many.chain([format!("nameserver {}\n", Family::V4.far())]).collect::<Vec<_>>().concat();
    let hythe = Hythe::of(&site.host, ANY).mounts(move |mounts| mounts.resolv_conf(&many)).run();
    wait_until("all but the last to be known as dead", || {
        status(&hythe.guest, "address.test A") == "NOERROR"
    });
    assert_eq!(status(&hythe.guest, "whoami.test A"), "NOERROR");
    hythe.stop().assert_clean(0);
}

fn resident_kib(hythe: &Hythe) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/status", hythe.pid())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

on_every_cell! {
    what_a_hostile_guest_sends_costs_it_answers_and_hythe_nothing(cell) {
        let site = site();
        let _nsd = Nsd::start(&site.far, Family::V4.far());
        let hythe = asking_far(&site, cell).options("--dns-cache 100").run();
        let socket = hythe.guest.udp(Family::V4.any(), 0);
        let gateway = (Family::V4.gateway(), 53);
        let good = kind("web.signed.test", 1).bytes(1);
        let mut pointer = good[..12].to_vec();
        pointer.extend([0xc0, 12, 0, 1, 0, 1]);
        let mut records = good.clone();
        records[11] = 0xff;
        let mut chain = good.clone();
        chain[10..12].copy_from_slice(&[0x0f, 0xff]);
        chain.extend([0xc0, 12, 0, 41, 0, 0, 0, 0, 0, 0, 0, 0].repeat(4000));
        let hostile = [vec![], vec![0; 11], good[..20].to_vec(), pointer, records, chain, vec![0xff; 1400]];
        let flood = |rounds: usize| {
            for round in 0..rounds {
                for message in &hostile {
                    let _ = socket.send_to(message, gateway);
                }
                // Names that nobody has asked for before.
                let mut query = kind("aaaaaaaa.wild.signed.test", 1).bytes(round as u16);
                query[13..21].copy_from_slice(format!("{round:08}").as_bytes());
                let _ = socket.send_to(&query, gateway);
            }
        };
        // Right behind a flood a query may be one too many: dropped, or refused by SERVFAIL.
        let is_answered = || {
            wait_until("an answer", || {
                let shown = dig(&hythe.guest, "+tries=20 +time=1 mail.signed.test A");
                shown.last().is_some_and(|line| line == "203.0.113.25")
            });
        };
        // As much as a flood takes at a time is taken by the first; the next ones take no more.
        flood(3000);
        is_answered();
        let before = resident_kib(&hythe);
        for _ in 0..2 {
            flood(3000);
            is_answered();
        }
        let after = resident_kib(&hythe);
// Some 300 MB were sent. What waits at a time differs, and so does what the allocator keeps of it.
        assert!(after < before + (64 << 10), "{before} KiB have become {after}");
        let counters = hythe.counters();
        assert!(counters.get("dns_garbage") > 0 && counters.get("dns_unfit") > 0);
        hythe.stop().assert_clean(0);
    }
}

/// An answer to a query: its question, and an address.
fn address_for(query: &[u8], last: u8) -> Vec<u8> {
    let name_len = query[12..].iter().position(|byte| *byte == 0).unwrap() + 1;
    let mut answer = query[..12 + name_len + 4].to_vec();
    answer[2] |= 0x80;
    // One question, one answer, and nothing else.
    answer[4..12].copy_from_slice(&[0, 1, 0, 1, 0, 0, 0, 0]);
    answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 1, 44, 0, 4, 203, 0, 113, last]);
    answer
}

#[test]
fn forged_answers_are_counted_and_neither_given_nor_kept() {
    const ROUNDS: usize = 20;
    let site = site();
    let far = Family::V4.far();
    let true_one = site.far.udp(far, 53);
    let other_port = site.far.udp(far, 5353);
    let other_address = site.far.udp(SECOND.parse::<IpAddr>().unwrap(), 53);
    let resolver = std::thread::spawn(move || {
        let mut query = [0; 512];
        for _ in 0..ROUNDS {
            let (len, client) = receive(&true_one, &mut query).unwrap();
            let forged = address_for(&query[..len], 66);
            let changed = |at: usize, by: u8| {
                let mut forged = forged.clone();
                forged[at] ^= by;
                forged
            };
            // Right in everything but where they come from.
            other_port.send_to(&forged, client).unwrap();
            other_address.send_to(&forged, client).unwrap();
            // From the right place, with another ID, about another name, about another type, and no answer at all.
            for wrong in [changed(1, 1), changed(13, 2), changed(len - 3, 1), changed(2, 0x80)] {
                true_one.send_to(&wrong, client).unwrap();
            }
            true_one.send_to(&address_for(&query[..len], 1), client).unwrap();
        }
    });
    let hythe = asking_far(&site, ANY).run();
    for round in 0..ROUNDS {
        assert_eq!(dig(&hythe.guest, &format!("+noedns name{round}.test A")), ["203.0.113.1"]);
    }
    resolver.join().unwrap();
    let counters = hythe.counters();
    assert_eq!(counters.get("dns_mismatched"), 4 * ROUNDS as u64);
    // What is kept is the truth, too.
    for round in 0..ROUNDS {
        assert_eq!(dig(&hythe.guest, &format!("+noedns name{round}.test A")), ["203.0.113.1"]);
    }
    assert_eq!(hythe.counters().get("dns_cache_hits"), ROUNDS as u64);
    hythe.stop().assert_clean(0);
}
