//! A host with two ways out, and a user who chooses one: `--outbound-interface`, `--outbound-address`.
//!
//! ```text
//! guest ── hythe ─ host ── up0 ─── far            where the routes lead
//!                       └─ vpn0 ── vpn            where the user wants to go; it has far's addresses, too
//! ```

use std::io::ErrorKind;
use std::net::IpAddr;

use crate::rig::bytes::{accept, transfer};
use crate::rig::cell::{ANY, on_every_cell};
use crate::rig::dns_server::DnsServer;
use crate::rig::hythe::Hythe;
use crate::rig::netns::Netns;
use crate::rig::site::{FAMILIES, Family, Site};
use crate::rig::socket;
use crate::rig::vpn::Vpn;
use crate::rig::wait::wait_until;

/// The second way out, to another server at far's addresses.
fn second_way(host: &Netns) -> Vpn {
    let vpn = Vpn::up(host);
    vpn.0.ip("addr add 198.51.100.1/32 dev lo
              addr add 2001:db8::1/128 dev lo");
    host.ip("route add default via 10.99.0.1 metric 500
             -6 route add default via fd99::1 metric 5000");
    vpn
}

/// Somebody at far's address answers a connection and a datagram; the source that they saw.
fn asked_of(guest: &Netns, server: &Netns, family: Family) -> IpAddr {
    let listener = server.listen(family.far(), 80);
    let near = guest.connect((family.far(), 80)).unwrap();
    let (far, by_stream) = accept(&listener);
    transfer(&near, &far, 1, 100_000);
    let datagrams = server.udp(family.far(), 4000);
    let client = guest.udp(family.any(), 0);
    let by_datagram = exchange(&client, &datagrams, (family.far(), 4000).into());
    assert_eq!(by_stream.ip(), by_datagram.ip());
    by_stream.ip()
}

fn exchange(
    client: &std::net::UdpSocket,
    server: &std::net::UdpSocket,
    to: std::net::SocketAddr,
) -> std::net::SocketAddr {
    let mut bytes = [0; 8];
    client.send_to(b"question", to).unwrap();
    let (_, peer) = socket::receive(server, &mut bytes).unwrap();
    server.send_to(b"answer", peer).unwrap();
    let (len, from) = socket::receive(client, &mut bytes).unwrap();
    assert_eq!((&bytes[..len], from), (&b"answer"[..], to));
    peer
}

/// The host's loopback is reached, by a connection and by a port that speaks with the world, too; so is an address of the
/// host's own.
fn the_host_is_reached(guest: &Netns, host: &Netns, world: &Netns, family: Family) {
    let outside = world.udp(family.far(), 4001);
    let inside = host.udp(family.loopback(), 4002);
    let client = guest.udp(family.any(), 0);
    for _ in 0..2 {
        exchange(&client, &outside, (family.far(), 4001).into());
        exchange(&client, &inside, (family.host_internal(), 4002).into());
    }
    for (bound, called) in [(family.loopback(), family.host_internal()), (family.host(), family.host())] {
        let listener = host.listen(bound, 8080);
        let near = guest.connect((called, 8080)).unwrap();
        transfer(&near, &accept(&listener).0, 2, 10_000);
    }
}

fn echoes_heard(netns: &Netns, family: Family) -> u64 {
    netns.counter(if family == Family::V4 { "IcmpInEchos" } else { "Icmp6InEchos" })
}

fn ping(guest: &Netns, family: Family) {
    let to = family.far().to_string();
    guest.command(&["ping", "-n", "-c", "1", "-W", "10", &to]);
}

fn whoami(guest: &Netns, transport: &str) -> String {
    let words = ["dig", "@192.168.65.1", "+short", "+tries=1", "+time=20", transport, "whoami.test", "A"];
    guest.command(&words).trim().to_string()
}

on_every_cell! {
    everything_leaves_by_the_interface_that_was_chosen(cell) {
        for ping_sockets in [true, false] {
            let site = Site::new();
            if ping_sockets {
                site.host.sysctl("ipv4/ping_group_range", "0 2147483647");
            }
            let vpn = second_way(&site.host);
            let _office = DnsServer::start(&site.far, Family::V4.far(), 1);
            let _inside = DnsServer::start(&vpn.0, Family::V4.far(), 2);
            let resolvers = format!("nameserver {}\n", Family::V4.far());
            for (options, chosen) in [("--dns-cache 0", false), ("--dns-cache 0 --outbound-interface vpn0", true)] {
                let resolvers = resolvers.clone();
                let start = Hythe::of(&site.host, cell).options(options);
                let hythe = start.mounts(move |mounts| mounts.resolv_conf(&resolvers)).run();
                let (server, other) = if chosen { (&vpn.0, &site.far) } else { (&site.far, &vpn.0) };
                for family in FAMILIES {
                    let source = if chosen { Vpn::host(family) } else { family.host() };
                    assert_eq!(asked_of(&hythe.guest, server, family), source);
                    let before = [server, other].map(|netns| echoes_heard(netns, family));
                    ping(&hythe.guest, family);
                    let after = [server, other].map(|netns| echoes_heard(netns, family));
                    assert_eq!(after, [before[0] + 1, before[1]]);
                    the_host_is_reached(&hythe.guest, &site.host, server, family);
                }
                for transport in ["+notcp", "+tcp"] {
                    let answer = if chosen { "203.0.113.2" } else { "203.0.113.1" };
                    assert_eq!(whoami(&hythe.guest, transport), answer, "{transport}");
                }
                hythe.stop().assert_clean(0);
            }
        }
    }

    everything_leaves_from_the_address_that_was_chosen(cell) {
        let site = Site::new();
        site.host.ip("addr add 10.77.0.5/24 dev up0
                      addr add fd77::5/64 dev up0 nodad");
        let hythe = Hythe::of(&site.host, cell).options("--outbound-address 10.77.0.5 --outbound-address fd77::5").run();
        for family in FAMILIES {
            let source: IpAddr = if family == Family::V4 { "10.77.0.5" } else { "fd77::5" }.parse().unwrap();
            assert_eq!(asked_of(&hythe.guest, &site.far, family), source);
            ping(&hythe.guest, family);
            the_host_is_reached(&hythe.guest, &site.host, &site.far, family);
        }
        hythe.stop().assert_clean(0);

        // One family's says nothing about the other's.
        let hythe = Hythe::of(&site.host, cell).options("--outbound-address fd77::5").run();
        assert_eq!(asked_of(&hythe.guest, &site.far, Family::V4), Family::V4.host());
        assert_eq!(asked_of(&hythe.guest, &site.far, Family::V6).to_string(), "fd77::5");
        hythe.stop().assert_clean(0);
    }

    a_way_that_is_away_is_told_until_it_is_back(cell) {
        let site = Site::new();
        let mut vpn = second_way(&site.host);
        site.host.ip("addr add 10.77.0.5/24 dev up0
                      addr add fd77::5/64 dev up0 nodad");
        let by_interface = Hythe::of(&site.host, cell).options("--outbound-interface vpn0").run();
        let by_address = Hythe::of(&site.host, cell)
            .options("--outbound-address 10.77.0.5 --outbound-address fd77::5").run();
        for _ in 0..2 {
            Vpn::down(&site.host);
            site.host.ip("addr del 10.77.0.5/24 dev up0
                          addr del fd77::5/64 dev up0");
            for family in FAMILIES {
                for guest in [&by_interface.guest, &by_address.guest] {
                    // Nothing takes the way that was not chosen, though there is one.
                    let error = guest.connect((family.far(), 80)).unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::NetworkUnreachable, "{family:?}: {error}");
                    let client = guest.udp(family.any(), 0);
                    guest.run(|| client.connect((family.far(), 4000))).unwrap();
                    socket::report_errors(&client, family);
                    client.send(b"anybody there").unwrap();
                    let error = socket::receive(&client, &mut [0; 8]).unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::NetworkUnreachable, "{family:?}: {error}");
                }
            }
            vpn = second_way(&site.host);
            site.host.ip("addr add 10.77.0.5/24 dev up0
                          addr add fd77::5/64 dev up0 nodad");
            for family in FAMILIES {
                for (guest, server) in [(&by_interface.guest, &vpn.0), (&by_address.guest, &site.far)] {
                    let listener = server.listen(family.far(), 80);
                    wait_until("the way to be taken", || guest.connect((family.far(), 80)).is_ok());
                    drop(listener);
                    asked_of(guest, server, family);
                }
            }
        }
        drop(vpn);
        by_interface.stop().assert_clean(0);
        by_address.stop().assert_clean(0);
    }
}

#[test]
fn it_takes_no_right() {
    let site = Site::new();
    let vpn = second_way(&site.host);
    let hythe = Hythe::of(&site.host, ANY.as_nobody()).options("--outbound-interface vpn0").run();
    for family in FAMILIES {
        assert_eq!(asked_of(&hythe.guest, &vpn.0, family), Vpn::host(family));
    }
    hythe.stop().assert_clean(0);
}

#[test]
fn what_the_host_does_not_have_is_told_at_the_start() {
    let site = Site::new();
    for (option, said) in [
        ("--outbound-interface=none0", "--outbound-interface none0: the host has no such interface"),
        ("--outbound-address=10.77.0.9", "--outbound-address 10.77.0.9: the host does not have this address"),
    ] {
        let ended = Hythe::of(&site.host, ANY).to_the_end("run", &[option, "--", "true"]);
        ended.assert_clean(125);
        assert!(ended.one_line().contains(said), "{}", ended.one_line());
    }
}

#[test]
fn addresses_that_the_chosen_way_does_not_reach_are_left_out() {
    let site = Site::new();
    let vpn = second_way(&site.host);
    site.host.ip("-6 route del default dev vpn0");
    let far = Family::V4.far();
    let _servers = [&site.far, &vpn.0].map(|netns| DnsServer::start(netns, far, 1));
    for (options, told) in
        [("--dns-filter auto", "2001:db8::10"), ("--dns-filter auto --outbound-interface vpn0", "")]
    {
        let start = Hythe::of(&site.host, ANY).options(options);
        let hythe = start.mounts(move |mounts| mounts.resolv_conf(&format!("nameserver {far}\n"))).run();
        let words = ["dig", "@192.168.65.1", "+short", "+tries=1", "+time=20", "address.test", "AAAA"];
        assert_eq!(hythe.guest.command(&words).trim(), told, "{options}");
        hythe.stop().assert_clean(0);
    }
}
