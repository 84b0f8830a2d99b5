//! A VPN of the host comes, is used, and goes, and the guest's traffic is the host's all the time. What `network.rs` says of
//! connections and datagrams is said here of names, of times and of sizes.

use std::io::Write;
use std::net::{IpAddr, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::rig::bytes::{accept, expect_reset, transfer};
use crate::rig::cell::{ANY, on_every_cell};
use crate::rig::dns_server::DnsServer;
use crate::rig::hythe::Hythe;
use crate::rig::netns::Netns;
use crate::rig::nsd::Nsd;
use crate::rig::site::{FAMILIES, Family, Site};
use crate::rig::socket;
use crate::rig::vpn::{INSIDE, Vpn};
use crate::rig::wait::wait_until;

/// A name that only the VPN's resolver knows, and what it means.
const INTERNAL: &str = "web.signed.test";
const MEANS: &str = "203.0.113.80\n203.0.113.81";

/// What "at once" is, on a machine that is busy with other tests.
const AT_ONCE: Duration = Duration::from_secs(1);

pub fn dig(guest: &Netns, words: &str) -> String {
    let fixed = ["dig", "@192.168.65.1", "+tries=1", "+time=20", "+nocookie", "+short"];
    let words: Vec<&str> = fixed.into_iter().chain(words.split_whitespace()).collect();
    let output = guest.command(&words);
    let mut lines: Vec<&str> = output.lines().collect();
    lines.sort_unstable();
    lines.join("\n")
}

/// A file of the host that hythe sees, as this process can reach it.
pub fn file_of(hythe: &Hythe, name: &str) -> PathBuf {
    format!("/proc/{}/root/etc/{name}", hythe.pid()).into()
}

/// The ways in which programs that manage resolv.conf change it.
#[derive(Clone, Copy, Debug)]
enum Change {
    Rewritten,
    RenamedOver,
    LinkSwitched,
    /// A link to the directory that the file lies in.
    DirectorySwitched,
}

impl Change {
    const ALL: [Self; 4] = [Self::Rewritten, Self::RenamedOver, Self::LinkSwitched, Self::DirectorySwitched];

    fn make(self, path: &Path, server: IpAddr) {
        let content = format!("nameserver {server}\n");
        let new = path.with_extension("new");
        match self {
            Self::Rewritten => return std::fs::write(path, content).unwrap(),
            Self::RenamedOver => std::fs::write(&new, content).unwrap(),
            Self::LinkSwitched => {
                let target = path.with_extension(server.to_string());
                std::fs::write(&target, content).unwrap();
                symlink(target.file_name().unwrap(), &new).unwrap();
            }
            Self::DirectorySwitched => {
                let (directory, link) = (path.with_extension("d"), path.with_extension("link"));
                let target = directory.join(server.to_string());
                std::fs::create_dir_all(&target).unwrap();
                std::fs::write(target.join("it"), content).unwrap();
                symlink(target.strip_prefix(path.parent().unwrap()).unwrap(), &new).unwrap();
                std::fs::rename(&new, &link).unwrap();
                if path.read_link().is_ok_and(|target| target.ends_with("it")) {
                    return;
                }
                symlink(Path::new(link.file_name().unwrap()).join("it"), &new).unwrap();
            }
        }
        std::fs::rename(&new, path).unwrap();
    }
}

/// The host knows no way to the VPN's network while there is no VPN.
fn no_other_way_inside(host: &Netns) {
    for family in FAMILIES {
        let network = family.elsewhere_network(INSIDE);
        host.ip(&format!("route add unreachable {network} metric 5000"));
    }
}

/// A VPN may come with a route, a rule or another default route, and with nothing else that is new: the addresses are there, and the
/// resolver has the address of the office's.
#[test]
fn names_follow_a_route_a_rule_and_another_default_route_at_once() {
    let site = Site::new();
    let far = Family::V4.far();
    let office = DnsServer::start(&site.far, far, 1);
    let vpn = Vpn::up(&site.host);
    vpn.0.ip(&format!("addr add {far}/32 dev lo"));
    let inside = DnsServer::start(&vpn.0, far, 7);
    let hythe = Hythe::of(&site.host, ANY)
        .mounts(move |mounts| mounts.resolv_conf(&format!("nameserver {far}\n")))
        .run();
    site.host.ip("route add default via 10.99.0.1 table 99");
    let (office_says, vpn_says) = ("203.0.113.1", "203.0.113.7");
    for (comes, goes) in [
        (format!("route add {far}/32 via 10.99.0.1"), format!("route del {far}/32")),
        (format!("rule add to {far} lookup 99"), format!("rule del to {far} lookup 99")),
        (
            "route replace default via 10.99.0.1".to_string(),
            "route replace default via 10.77.0.1".to_string(),
        ),
    ] {
        for (change, says) in [(&comes, vpn_says), (&goes, office_says)] {
            site.host.ip(change);
            wait_until(change, || dig(&hythe.guest, "whoami.test A") == says);
            wait_until("the answer to be kept", || {
                let asked = office.asked().len() + inside.asked().len();
                assert_eq!(dig(&hythe.guest, "whoami.test A"), says, "{change}");
                office.asked().len() + inside.asked().len() == asked
            });
        }
    }
    hythe.stop().assert_clean(0);
}

on_every_cell! {
    a_name_of_the_vpn_resolves_at_once_in_whichever_way_resolv_conf_changes(cell) {
        let site = Site::new();
        no_other_way_inside(&site.host);
        let far = Family::V4.far();
        let _office = DnsServer::start(&site.far, far, 1);
        let hythe = Hythe::of(&site.host, cell).mounts(move |mounts| mounts.etc(&[
            ("resolv.conf", &format!("nameserver {far}\n")),
        ])).run();
        let guest = &hythe.guest;
        let inside = Family::V4.elsewhere(INSIDE, 1);
        for change in Change::ALL {
            let path = file_of(&hythe, "resolv.conf");
            assert_eq!(dig(guest, &format!("{INTERNAL} A")), "", "{change:?}: the office does not know it");
            let vpn = Vpn::up(&site.host);
            let nsd = Nsd::start(&vpn.0, inside);
            let begun = Instant::now();
            change.make(&path, inside);
            wait_until("the VPN's name", || dig(guest, &format!("{INTERNAL} A")) == MEANS);
            let took = begun.elapsed();
            assert!(took < AT_ONCE, "{change:?}: {took:?}");
            // It goes, and its names with it.
            drop(nsd);
            Vpn::down(&site.host);
            let begun = Instant::now();
            change.make(&path, far);
            wait_until("the office's names", || dig(guest, "whoami.test A") == "203.0.113.1");
            assert_eq!(dig(guest, &format!("{INTERNAL} A")), "", "{change:?}: nothing of the VPN is left");
            let took = begun.elapsed();
            assert!(took < AT_ONCE, "{change:?}: {took:?}");
        }
        hythe.stop().assert_clean(0);
    }

    names_of_the_vpns_zone_are_never_asked_of_the_office(cell) {
        let site = Site::new();
        no_other_way_inside(&site.host);
        let far = Family::V4.far();
        let office = DnsServer::start(&site.far, far, 1);
        let inside = Family::V4.elsewhere(INSIDE, 1);
        let resolvers = format!("nameserver {far}\n");
        let hythe = Hythe::of(&site.host, cell).options(&format!("--zone signed.test={inside}"))
            .mounts(move |mounts| mounts.resolv_conf(&resolvers)).run();
        let guest = &hythe.guest;
        for _ in 0..2 {
            // Before, or after: nobody can say.
            for transport in ["+notcp", "+tcp"] {
                assert_eq!(dig(guest, &format!("{transport} {INTERNAL} A")), "");
                assert_eq!(dig(guest, &format!("{transport} whoami.test A")), "203.0.113.1");
            }
            let vpn = Vpn::up(&site.host);
            let nsd = Nsd::start(&vpn.0, inside);
            wait_until("the VPN's name", || dig(guest, &format!("{INTERNAL} A")) == MEANS);
            assert_eq!(dig(guest, &format!("+tcp {INTERNAL} A")), MEANS);
            assert_eq!(dig(guest, "absent.signed.test A"), "");
            drop(nsd);
            Vpn::down(&site.host);
            wait_until("the answer to be forgotten", || dig(guest, &format!("{INTERNAL} A")).is_empty());
        }
        hythe.stop().assert_clean(0);
        let asked: Vec<String> = office.asked().into_iter().map(|asked| asked.name).collect();
        assert!(!asked.is_empty() && asked.iter().all(|name| name == "whoami.test"), "{asked:?}");
    }

    a_transfer_over_the_vpn_ends_with_it_within_a_second_and_others_do_not_notice(cell) {
        let site = Site::new();
        let hythe = Hythe::of(&site.host, cell).run();
        let guest = &hythe.guest;
        for family in FAMILIES {
            let vpn = Vpn::up(&site.host);
            let pair = |server: &Netns, to: IpAddr| -> (TcpStream, TcpStream) {
                let listener = server.listen(family.any(), 80);
                (guest.connect((to, 80)).unwrap(), accept(&listener).0)
            };
            let (up, up_end) = pair(&vpn.0, family.elsewhere(INSIDE, 1));
            let (down, down_end) = pair(&vpn.0, family.elsewhere(INSIDE, 1));
            let office = pair(&site.far, family.far());
            let over = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let others = scope.spawn(|| {
                    let mut rounds = 0u64;
                    while !over.load(Ordering::Relaxed) || rounds < 2 {
                        transfer(&office.0, &office.1, rounds, 4 << 20);
                        transfer(&office.1, &office.0, !rounds, 4 << 20);
                        rounds += 1;
                    }
                });
                // Both directions are in the middle of it.
                let writer = scope.spawn(|| {
                    let bytes = vec![7; 1 << 20];
                    loop {
                        if let Err(error) = (&up).write_all(&bytes) {
                            return (Instant::now(), error.kind());
                        }
                    }
                });
                scope.spawn(|| std::io::copy(&mut &up_end, &mut std::io::sink()));
                scope.spawn(|| while (&down_end).write_all(&[9; 1 << 13]).is_ok() {});
                let reader = scope.spawn(|| {
                    expect_reset(&down);
                    Instant::now()
                });
                let sent = |stream: &TcpStream| socket::bytes_acknowledged(stream);
                wait_until("the transfer to be under way", || sent(&up) > 1 << 20 && sent(&down_end) > 1 << 20);
                let begun = Instant::now();
                Vpn::down(&site.host);
                let (ended, kind) = writer.join().unwrap();
                assert!(
                    matches!(kind, std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe),
                    "{kind:?}"
                );
                for (direction, ended) in [("to", ended), ("from", reader.join().unwrap())] {
                    let took = ended.saturating_duration_since(begun);
                    println!("{family:?}: reset {took:?} after the VPN was told to go, {direction} the VPN");
                    assert!(took < AT_ONCE, "{family:?}: {took:?}");
                }
                over.store(true, Ordering::Relaxed);
                others.join().unwrap();
                // The VPN's own end hears nothing any more.
                let _ = up_end.shutdown(std::net::Shutdown::Both);
                let _ = down_end.shutdown(std::net::Shutdown::Both);
            });
        }
        hythe.stop().assert_clean(0);
    }

    the_size_that_fits_a_vpn_is_told_and_streams_do_not_feel_it(cell) {
        const MTU: i32 = 1280;
        let site = Site::new();
        let vpn = Vpn::up(&site.host);
        site.host.ip("link set vpn0 mtu 1280");
        vpn.0.ip("link set vpn1 mtu 1280");
        for echo in ["1 0", "0 2147483647"] {
            site.host.sysctl("ipv4/ping_group_range", echo);
            let hythe = Hythe::of(&site.host, cell).run();
            for family in FAMILIES {
                let inside = family.elsewhere(INSIDE, 1);
                let to = inside.to_string();
                let version = if family == Family::V4 { "-4" } else { "-6" };
                let said = hythe.guest.command(&["tracepath", version, "-n", "-m", "4", &to]);
                assert!(said.contains("pmtu 1280") && said.contains("Resume: pmtu 1280"), "{said}");
                assert!(!said.contains("pmtu 1300"), "{said}");

                // What may not be cut and does not fit is told, and arrives when it fits.
                let server = vpn.0.udp(inside, 4000);
                let client = hythe.guest.udp(family.any(), 0);
                hythe.guest.run(|| client.connect((inside, 4000))).unwrap();
                socket::forbid_fragments(&client, family);
                wait_until("the guest to learn the VPN's MTU", || match client.send(&[7; 1400]) {
                    Err(error) => error.raw_os_error() == Some(libc::EMSGSIZE),
                    Ok(_) => false,
                });
                assert_eq!(socket::path_mtu(&client, family), MTU);
                let fits = MTU as usize - if family == Family::V4 { 28 } else { 48 };
                client.send(&vec![7; fits]).unwrap();
                let mut bytes = vec![0; 10_000];
                assert_eq!(socket::receive(&server, &mut bytes).unwrap().0, fits);
                // What may be cut arrives, whatever its size.
                socket::allow_fragments(&client, family);
                client.send(&[8; 9000]).unwrap();
                assert_eq!(socket::receive(&server, &mut bytes).unwrap().0, 9000);

                let fits = fits.to_string();
                for (size, passes) in [(fits.as_str(), true), ("1400", false)] {
                    let words = ["ping", version, "-n", "-c", "1", "-W", "10", "-M", "do", "-s", size, &to];
                    let output = hythe.guest.output(&words);
                    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
                    assert_eq!(output.status.success(), passes, "{said}");
                }

                let listener = vpn.0.listen(inside, 80);
                let near = hythe.guest.connect((inside, 80)).unwrap();
                let far = accept(&listener).0;
                let timeouts = || site.host.counter("TcpExtTCPTimeouts");
                let before = (timeouts(), hythe.counters().get("tcp_timeouts"));
                for (from, to, direction) in [(&near, &far, "to"), (&far, &near, "from")] {
                    let begun = Instant::now();
                    transfer(from, to, 3, 64 << 20);
                    let took = begun.elapsed().as_secs_f64();
                    println!("{family:?}: {:.0} MB/s {direction} the VPN", 67.1 / took);
                }
                // Nothing waits for a size to be found out.
                assert_eq!((timeouts(), hythe.counters().get("tcp_timeouts")), before);
            }
            hythe.stop().assert_clean(0);
        }
    }
}

#[test]
fn published_ports_of_the_office_answer_within_a_second_of_its_link() {
    let site = Site::new();
    let hythe =
        Hythe::of(&site.host, ANY).options("-p 10.77.0.2:8000:80 -p [fd77::2]:8000:80 -p 8001:80").run();
    for family in FAMILIES {
        let server = hythe.guest.listen(family.any(), 80);
        let stays = site.far.connect((family.host(), 8000)).unwrap();
        let served = accept(&server).0;
        transfer(&stays, &served, 1, 100_000);
        site.host.ip("link set up0 down");
        site.host.ip("link set up0 up
                      addr replace fd77::2/64 dev up0 nodad
                      route replace default via 10.77.0.1
                      -6 route replace default via fd77::1");
        let host = family.host().to_string();
        wait_until("the link to be ready", || {
            site.far.output(&["ping", "-c1", "-W1", &host]).status.success()
        });
        let begun = Instant::now();
        for port in [8000, 8001] {
            let client = site.far.connect((family.host(), port)).unwrap();
            transfer(&client, &accept(&server).0, 2, 10_000);
        }
        let took = begun.elapsed();
        println!("{family:?}: answered after {took:?}");
        assert!(took < AT_ONCE, "{took:?}");
        // IPv4's address stays while its link is down, and so do its connections. IPv6's goes and is set again.
        if family == Family::V4 {
            transfer(&stays, &served, 3, 1_000_000);
        }
    }
    hythe.stop().assert_clean(0);
}
