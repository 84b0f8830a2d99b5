//! What routers and hosts say by ICMP, through two routers behind the host.
//!
//! ```text
//! guest ─ hythe ─ host ── first router ── second router ── far
//!                 .0.2    .0.1    .1.2    .1.1     .2.2    .2.1        10.77.x.x, and the same of fd77::/16
//! ```

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use crate::rig::bytes::{accept, transfer};
use crate::rig::cell::{ANY, on_every_cell};
use crate::rig::hythe::Hythe;
use crate::rig::netns::Netns;
use crate::rig::site::{FAMILIES, Family, Site};
use crate::rig::socket;
use crate::rig::wait::wait_until;

/// What a router can say about a network.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Said {
    Unreachable,
    Prohibited,
}

use Said::{Prohibited, Unreachable};

/// The networks of [`Family::elsewhere`] about which the first router says something.
const SAYINGS: [(u8, Said); 2] = [(1, Unreachable), (2, Prohibited)];

/// Who of the host may send echo requests: everybody by ping sockets, or root alone by raw ones. A new namespace begins
/// with the latter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Echo {
    PingSockets,
    RawSockets,
}

const ECHOES: [Echo; 2] = [Echo::PingSockets, Echo::RawSockets];

/// Two routers that say everything as often as they are asked, and what they say about [`SAYINGS`].
fn site(echo: Echo) -> Site {
    let site = Site::with_routers(2);
    if echo == Echo::PingSockets {
        site.host.sysctl("ipv4/ping_group_range", "0 2147483647");
    }
    for netns in site.routers.iter().chain([&site.far, &site.host]) {
        netns.sysctl("ipv4/icmp_ratelimit", "0");
        netns.sysctl("ipv6/icmp/ratelimit", "0");
    }
    let rules = "table inet sayings {
        chain forward {
            type filter hook forward priority 0
            ip daddr 198.18.1.0/24 reject with icmp type host-unreachable
            ip daddr 198.18.2.0/24 reject with icmp type admin-prohibited
            ip6 daddr 2001:db8:1::/64 reject with icmpv6 type addr-unreachable
            ip6 daddr 2001:db8:2::/64 reject with icmpv6 type admin-prohibited
        }
    }";
    // Not by routes: the kernel tells of those five times, and then once a second.
    site.routers[0].command(&["nft", rules]);
    // The far server's networks have nobody else.
    site.far.ip("route add blackhole 198.51.100.0/24
         -6 route add blackhole 2001:db8::/64");
    site
}

/// The routers' and the server's addresses, as they answer from them.
fn hops(family: Family) -> [IpAddr; 3] {
    let second = if family == Family::V4 { "10.77.1.1" } else { "fd77:0:0:1::1" };
    [family.next_hop(), second.parse().unwrap(), family.far()]
}

fn version(family: Family) -> &'static str {
    if family == Family::V4 { "-4" } else { "-6" }
}

/// ping(8): what it prints, and whether it was answered.
fn ping(guest: &Netns, family: Family, options: &str, to: IpAddr) -> (String, bool) {
    let to = to.to_string();
    let words: Vec<&str> = ["ping", version(family), "-n"]
        .into_iter()
        .chain(options.split_whitespace())
        .chain([to.as_str()])
        .collect();
    let output = guest.output(&words);
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    (said.into_owned(), output.status.success())
}

/// traceroute(8): the words of each hop's line, its number first.
fn traceroute(guest: &Netns, family: Family, options: &str, to: IpAddr) -> Vec<Vec<String>> {
    let to = to.to_string();
    // One probe a hop, and one after the other.
    let words: Vec<&str> = ["traceroute", version(family), "-n", "-q", "1", "-N", "1", "-w", "10", "-m", "6"]
        .into_iter()
        .chain(options.split_whitespace())
        .chain([to.as_str()])
        .collect();
    let printed = guest.command(&words);
    // The first line says what follows.
    printed.lines().skip(1).map(|line| line.split_whitespace().map(str::to_string).collect()).collect()
}

on_every_cell! {
    ping_is_answered_by_whoever_was_asked(cell) {
        for echo in ECHOES {
            let site = site(echo);
            let hythe = Hythe::of(&site.host, cell).run();
            for family in FAMILIES {
                for to in [family.far(), hops(family)[0], hops(family)[1], family.gateway(), family.host_internal()] {
                    let (said, answered) = ping(&hythe.guest, family, "-c 3 -i 0.5 -W 10", to);
                    assert!(answered && said.contains("3 received, 0% packet loss"), "{said}");
                    assert!(said.contains(&format!("bytes from {to}: icmp_seq=1 ")), "{said}");
                }
                // In fragments, both ways.
                let (said, answered) = ping(&hythe.guest, family, "-c 1 -W 10 -s 20000", family.far());
                assert!(answered && said.contains("20008 bytes from"), "{said}");
            }
            hythe.stop().assert_clean(0);
        }
    }
}

on_every_cell! {
    a_host_that_is_not_there_does_not_answer(cell) {
        for echo in ECHOES {
            let site = site(echo);
            let hythe = Hythe::of(&site.host, cell).run();
            for family in FAMILIES {
                // The network is the far server's, and the server is silent about what is not itself.
                let nobody = if family == Family::V4 { "198.51.100.77" } else { "2001:db8::77" };
                let (said, answered) = ping(&hythe.guest, family, "-c 2 -i 0.01 -W 1", nobody.parse().unwrap());
                assert!(!answered && said.contains("2 packets transmitted, 0 received, 100% packet loss"), "{said}");
                assert!(!said.contains("From"), "{said}");
            }
            hythe.stop().assert_clean(0);
        }
    }
}

on_every_cell! {
    traceroute_shows_the_true_hops(cell) {
        for echo in ECHOES {
            let site = site(echo);
            let hythe = Hythe::of(&site.host, cell).run();
            for family in FAMILIES {
                for method in ["-U", "-I", ""] {
                    let lines = traceroute(&hythe.guest, family, method, family.far());
                    let seen: Vec<&str> = lines.iter().map(|words| words[1].as_str()).collect();
                    assert_eq!(seen, hops(family).map(|hop| hop.to_string()), "{family:?} {method}");
                    assert!(lines.iter().flatten().all(|word| !word.starts_with('!')), "{lines:?}");
                }
            }
            hythe.stop().assert_clean(0);
        }
    }
}

on_every_cell! {
    a_router_that_knows_no_way_is_heard_by_datagrams_echo_and_streams(cell) {
        for echo in ECHOES {
            let site = site(echo);
            let hythe = Hythe::of(&site.host, cell).run();
            for family in FAMILIES {
                let router = family.next_hop().to_string();
                for (net, said) in SAYINGS {
                    let to = family.elsewhere(net, 9);
                    // RFC 792 and RFC 1812, 5.2.7.1: codes 1 and 13; RFC 4443, 3.1: codes 3 and 1.
                    let (mark, words) = match (family, said) {
                        (Family::V4, Unreachable) => ("!H", "Destination Host Unreachable"),
                        (Family::V4, Prohibited) => ("!X", "Packet filtered"),
                        (Family::V6, Unreachable) => ("!H", "Destination unreachable: Address unreachable"),
                        (Family::V6, Prohibited) => ("!X", "Destination unreachable: Administratively prohibited"),
                    };
                    let (printed, answered) = ping(&hythe.guest, family, "-c 1 -W 10", to);
                    assert!(!answered && printed.contains(&format!("From {router} icmp_seq=1 {words}")), "{printed}");
                    for method in ["-U", "-I", "-T"] {
                        let lines = traceroute(&hythe.guest, family, method, to);
                        // The router passes on nothing, neither what ends there anyway nor what would go further.
                        assert!(lines.iter().all(|words| words[1] == router), "{method} {lines:?}");
                        assert_eq!(lines.last().unwrap().last().unwrap(), mark, "{method} {lines:?}");
                    }
                    let kind = match (family, said) {
                        (Family::V6, Prohibited) => ErrorKind::PermissionDenied,
                        _ => ErrorKind::HostUnreachable,
                    };
                    let error = hythe.guest.connect((to, 80)).unwrap_err();
                    assert_eq!(error.kind(), kind, "{to}: {error}");
                    let socket = connected(&hythe.guest, family, to, 80);
                    // A host that is out of reach may be back soon: of this a kernel tells only those who ask.
                    socket::report_errors(&socket, family);
                    socket.send(b"anybody there").unwrap();
                    assert_eq!(socket::receive(&socket, &mut [0; 20]).unwrap_err().kind(), kind);
                }
            }
            hythe.stop().assert_clean(0);
        }
    }
}

on_every_cell! {
    a_hop_limit_that_ends_on_the_way_is_told_by_the_router_where_it_ended(cell) {
        for echo in ECHOES {
            let site = site(echo);
            let hythe = Hythe::of(&site.host, cell).run();
            for family in FAMILIES {
                for (limit, router) in (1..).zip(&hops(family)[..2]) {
                    let (said, _) = ping(&hythe.guest, family, &format!("-c 1 -W 10 -t {limit}"), family.far());
                    assert!(said.contains(&format!("From {router} icmp_seq=1 Time")), "{said}");
                }
            }
            hythe.stop().assert_clean(0);
        }
    }
}

/// A UDP socket of the guest's that is connected.
fn connected(guest: &Netns, family: Family, to: IpAddr, port: u16) -> UdpSocket {
    let socket = guest.udp(family.any(), 0);
    guest.run(|| socket.connect((to, port))).unwrap();
    socket
}

/// Sends datagrams that may not be cut until the kernel knows better; the path's MTU as the guest has learnt it.
fn learnt_mtu(guest: &Netns, family: Family, bytes: usize) -> i32 {
    let socket = connected(guest, family, family.far(), 4000);
    socket::forbid_fragments(&socket, family);
    wait_until("the guest to learn the path's MTU", || match socket.send(&vec![7; bytes]) {
        Err(error) => error.raw_os_error() == Some(libc::EMSGSIZE),
        Ok(_) => false,
    });
    socket::path_mtu(&socket, family)
}

on_every_cell! {
    a_narrow_link_behind_the_host_is_told_to_the_guest(cell) {
        for echo in ECHOES {
            let site = site(echo);
            site.routers[0].ip("link set up1 mtu 1300");
            site.routers[1].ip("link set down1 mtu 1300");
            let hythe = Hythe::of(&site.host, cell).run();
            for family in FAMILIES {
                let router = family.next_hop();
                // Echo is told by whom, too. The host's kernel does not know yet.
                let (said, answered) = ping(&hythe.guest, family, "-c 1 -W 10 -M do -s 1400", family.far());
                let words = match family {
                    Family::V4 => "Frag needed and DF set (mtu = 1300)",
                    Family::V6 => "Packet too big: mtu=1300",
                };
                assert!(!answered && said.contains(&format!("From {router} icmp_seq=1 {words}")), "{said}");
                assert_eq!(learnt_mtu(&hythe.guest, family, 1400), 1300);
                // What may be cut arrives, and so does what fits.
                let server = site.far.udp(family.far(), 4000);
                let socket = connected(&hythe.guest, family, family.far(), 4000);
                socket::allow_fragments(&socket, family);
                for len in [1400, 1200, 9000] {
                    socket.send(&vec![len as u8; len]).unwrap();
                }
                let mut datagram = vec![0; 10_000];
                wait_until("the largest datagram", || socket::receive(&server, &mut datagram).unwrap().0 == 9000);
            }
            for family in FAMILIES {
                let listener = site.far.listen(family.far(), 0);
                let near = hythe.guest.connect(listener.local_addr().unwrap()).unwrap();
                let (far, _) = accept(&listener);
                transfer(&near, &far, 1, 1 << 20);
                transfer(&far, &near, 2, 1 << 20);
            }
            hythe.stop().assert_clean(0);
        }
    }
}

on_every_cell! {
    datagrams_that_may_be_cut_arrive_whatever_their_socket_sends_beside_them(cell) {
        let site = site(Echo::PingSockets);
        for family in FAMILIES {
            let gateway = family.next_hop();
            site.host.ip(&format!("{} route replace default via {gateway} mtu 1300", version(family)));
        }
        let hythe = Hythe::of(&site.host, cell).run();
        for family in FAMILIES {
            let server = site.far.udp(family.far(), 4000);
            let socket = connected(&hythe.guest, family, family.far(), 4000);
            // Routers cut no packet of IPv6: its sender does.
            let cut = if family == Family::V4 { 1400 } else { 3000 };
            let mut datagram = vec![0; 10_000];
            // As many at a time as lie in the server's buffer.
            for _ in 0..20 {
                for _ in 0..5 {
                    socket::allow_fragments(&socket, family);
                    socket.send(&vec![1; cut]).unwrap();
                    socket::forbid_fragments(&socket, family);
                    socket.send(&[2; 1200]).unwrap();
                }
                let lens = (0..10).map(|_| socket::receive(&server, &mut datagram).unwrap().0);
                let mut lens: Vec<usize> = lens.collect();
                lens.sort_unstable();
                assert_eq!(lens, [[1200; 5], [cut; 5]].concat());
            }
        }
        hythe.stop().assert_clean(0);
    }
}

on_every_cell! {
    a_narrow_route_of_the_host_is_told_to_the_guest(cell) {
        for echo in ECHOES {
            let site = site(echo);
            for family in FAMILIES {
                let gateway = family.next_hop();
                site.host.ip(&format!("{} route replace default via {gateway} mtu 1300", version(family)));
            }
            let hythe = Hythe::of(&site.host, cell).run();
            for family in FAMILIES {
                assert_eq!(learnt_mtu(&hythe.guest, family, 1400), 1300);
                let (said, answered) = ping(&hythe.guest, family, "-c 1 -W 10 -M do -s 1252", family.far());
                // 1300 less the headers: 28 bytes of IPv4, 48 of IPv6.
                assert!(answered, "{said}");
                let (said, answered) = ping(&hythe.guest, family, "-c 1 -W 10 -M do -s 1280", family.far());
                assert!(!answered, "{said}");
            }
            hythe.stop().assert_clean(0);
        }
    }
}

on_every_cell! {
    tracepath_finds_the_paths_mtu(cell) {
        let site = site(Echo::PingSockets);
        site.routers[0].ip("link set up1 mtu 1400");
        site.routers[1].ip("link set down1 mtu 1400");
        let hythe = Hythe::of(&site.host, cell).run();
        for family in FAMILIES {
            let to = family.far().to_string();
            let said = hythe.guest.command(&["tracepath", version(family), "-n", "-m", "5", &to]);
            assert!(said.contains("Resume: pmtu 1400 hops 3"), "{said}");
        }
        hythe.stop().assert_clean(0);
    }
}

#[test]
fn a_plain_users_guest_hears_as_much_where_ping_sockets_are_allowed() {
    let site = site(Echo::PingSockets);
    let hythe = Hythe::of(&site.host, ANY.as_nobody()).run();
    for family in FAMILIES {
        for method in ["-U", "-I"] {
            let lines = traceroute(&hythe.guest, family, method, family.far());
            let seen: Vec<&str> = lines.iter().map(|words| words[1].as_str()).collect();
            assert_eq!(seen, hops(family).map(|hop| hop.to_string()), "{family:?} {method}");
        }
    }
    hythe.stop().assert_clean(0);
}

#[test]
fn where_nobody_may_ping_the_user_is_told_why() {
    let site = site(Echo::RawSockets);
    let hythe = Hythe::of(&site.host, ANY.as_nobody()).run();
    for family in FAMILIES {
        let (said, answered) = ping(&hythe.guest, family, "-c 1 -W 1", family.far());
        assert!(!answered, "{said}");
        // What hythe answers itself takes no right.
        let (said, answered) = ping(&hythe.guest, family, "-c 1 -W 10", family.gateway());
        assert!(answered, "{said}");
    }
    let log = hythe.log();
    assert!(log.contains("net.ipv4.ping_group_range") && log.contains("CAP_NET_RAW"), "{log}");
    assert_eq!(hythe.counters().get("dropped_echo_unavailable"), 2);
    hythe.stop().assert_clean(0);
}

on_every_cell! {
    a_closed_port_beyond_the_routers_refuses_datagrams(cell) {
        let site = site(Echo::PingSockets);
        let hythe = Hythe::of(&site.host, cell).run();
        for family in FAMILIES {
            let socket = connected(&hythe.guest, family, family.far(), 4001);
            for _ in 0..3 {
                socket.send(b"anybody there").unwrap();
                let refused = socket::receive(&socket, &mut [0; 20]).unwrap_err();
                assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
            }
            // An error of one destination is not one of another, from the same port.
            let server = site.far.udp(family.far(), 4002);
            let socket = hythe.guest.udp(family.any(), 0);
            for round in 0..3u8 {
                socket.send_to(b"lost", SocketAddr::new(family.far(), 4001)).unwrap();
                socket.send_to(&[round], server.local_addr().unwrap()).unwrap();
                let mut byte = [0xff];
                socket::receive(&server, &mut byte).unwrap();
                assert_eq!(byte, [round]);
            }
        }
        hythe.stop().assert_clean(0);
    }
}
