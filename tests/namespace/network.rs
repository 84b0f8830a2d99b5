//! The host's network changes while guests use it: a VPN comes and goes, addresses leave and return.
//!
//! ```text
//! guest ── hythe ─ host ── up0 ─── far            the office, as in every other test
//!                       └─ vpn0 ── vpn            a network that comes later: 10.99.0.0/24 and fd99::/64, the server is .1
//! ```

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use hythe::control::shapes::Event;

use crate::publishing::Control;
use crate::rig::bytes::{accept, expect_reset, transfer};
use crate::rig::cell::{ANY, on_every_cell};
use crate::rig::http::{Server, Talk, Then};
use crate::rig::hythe::Hythe;
use crate::rig::netns::Netns;
use crate::rig::process;
use crate::rig::site::{FAMILIES, Family, Site};
use crate::rig::socket;
use crate::rig::vpn::{INSIDE, Vpn};
use crate::rig::wait::{PATIENCE, pause, wait_until};
use crate::vpn::{dig, file_of};

/// What is told of changes.
struct Listener(BufReader<UnixStream>);

impl Listener {
    fn new(control: &Control) -> Self {
        let mut stream = UnixStream::connect(&control.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"GET /v1/events HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        let mut listener = Self(BufReader::new(stream));
        while !listener.line().is_empty() {}
        listener
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line.trim_end().to_string()
    }

    fn next(&mut self) -> Event {
        loop {
            // Chunks have their lengths and ends in lines of their own.
            let line = self.line();
            if line.starts_with('{') {
                return serde_json::from_str(&line).unwrap();
            }
        }
    }

    /// The first event that is wanted.
    fn wait<T>(&mut self, mut wanted: impl FnMut(Event) -> Option<T>) -> T {
        loop {
            if let Some(found) = wanted(self.next()) {
                return found;
            }
        }
    }
}

on_every_cell! {
    connections_take_the_vpn_that_there_is_and_end_with_it(cell) {
        let site = Site::new();
        let hythe = Hythe::of(&site.host, cell).run();
        let guest = &hythe.guest;
        for (round, family) in (0..).zip(FAMILIES) {
            let inside = (family.elsewhere(INSIDE, 1), 80);
            let office = site.far.listen(family.far(), 80);
            let stays = (guest.connect((family.far(), 80)).unwrap(), accept(&office).0);
            let vpn = Vpn::up(&site.host);
            let server = vpn.0.listen(family.any(), 80);
            let idle = guest.connect(inside).unwrap();
            let (served, peer) = accept(&server);
            assert_eq!(peer.ip(), Vpn::host(family), "the VPN's address");
            transfer(&idle, &served, 1, 100_000);
            // One that is busy when the VPN goes: nobody reads what it sends.
            let busy = guest.connect(inside).unwrap();
            let _unread = accept(&server);
            busy.set_nonblocking(true).unwrap();
            while (&busy).write(&[0; 16_384]).is_ok() {}
            busy.set_nonblocking(false).unwrap();
            Vpn::down(&site.host);
            expect_reset(&idle);
            expect_reset(&busy);
            transfer(&stays.0, &stays.1, 2, 1_000_000);
            transfer(&stays.1, &stays.0, 3, 1_000_000);
            wait_until("both to be counted", || hythe.counters().get("tcp_departed") == 2 * (round + 1));
        }
        hythe.stop().assert_clean(0);
    }

    datagrams_take_whatever_route_there_is(cell) {
        let site = Site::new();
        let hythe = Hythe::of(&site.host, cell).run();
        for family in FAMILIES {
            // Far is a place of the same address, where all go that the VPN does not take.
            let inside = family.elsewhere(INSIDE, 1);
            let prefix = if family == Family::V4 { 32 } else { 128 };
            site.far.ip(&format!("addr add {inside}/{prefix} dev lo"));
            let client = hythe.guest.udp(family.any(), 0);
            let exchange = |server: &Netns| {
                let server = server.udp(inside, 4000);
                let mut bytes = [0; 8];
                client.send_to(b"question", (inside, 4000)).unwrap();
                let (_, peer) = socket::receive(&server, &mut bytes).unwrap();
                server.send_to(b"answer", peer).unwrap();
                let (len, from) = socket::receive(&client, &mut bytes).unwrap();
                assert_eq!((&bytes[..len], from.ip()), (&b"answer"[..], inside));
                peer.ip()
            };
            assert_eq!(exchange(&site.far), family.host());
            let vpn = Vpn::up(&site.host);
            assert_eq!(exchange(&vpn.0), Vpn::host(family));
            Vpn::down(&site.host);
            assert_eq!(exchange(&site.far), family.host());
        }
        hythe.stop().assert_clean(0);
    }
}

#[test]
fn ports_of_an_address_answer_again_when_it_is_back() {
    let site = Site::new();
    let vpn = Vpn::up(&site.host);
    let options =
        "-p 10.99.0.2:8000:80 -p [fd99::2]:8000:80 -p 10.99.0.2:8000:80/udp -p [fd99::2]:8000:80/udp";
    let hythe = Hythe::of(&site.host, ANY).options(options).run();
    for family in FAMILIES {
        let published = (Vpn::host(family), 8000);
        let server = hythe.guest.listen(family.any(), 80);
        let datagrams = hythe.guest.udp(family.any(), 80);
        let works = || {
            // The two ends find each other first: that is theirs to do.
            let ping = ["ping", "-c1", "-W1", &published.0.to_string()];
            wait_until("the link to be ready", || vpn.0.output(&ping).status.success());
            let client = vpn.0.connect(published).unwrap();
            transfer(&client, &accept(&server).0, 1, 10_000);
            let client = vpn.0.udp(family.any(), 0);
            client.send_to(b"question", published).unwrap();
            let mut bytes = [0; 8];
            let (_, peer) = socket::receive(&datagrams, &mut bytes).unwrap();
            datagrams.send_to(b"answer", peer).unwrap();
            assert_eq!(socket::receive(&client, &mut bytes).unwrap().0, 6);
        };
        works();
        let (network, option) =
            if family == Family::V4 { ("10.99.0.2/24", "") } else { ("fd99::2/64", "nodad") };
        site.host.ip(&format!("addr del {network} dev vpn0"));
        site.host.ip(&format!("addr add {network} dev vpn0 {option}"));
        works();
        // The link goes and comes; IPv6's address goes with it, and somebody sets it again.
        site.host.ip("link set vpn0 down");
        site.host.ip("link set vpn0 up");
        site.host.ip("addr replace fd99::2/64 dev vpn0 nodad");
        works();
    }
    hythe.stop().assert_clean(0);
}

#[test]
fn an_address_that_is_back_at_once_has_not_been_away() {
    let site = Site::new();
    let vpn = Vpn::up(&site.host);
    let control = Control::new();
    let hythe = Hythe::of(&site.host, ANY).options(&control.option()).run();
    let mut listener = Listener::new(&control);
    let server = vpn.0.listen(Family::V4.any(), 80);
    let client = hythe.guest.connect((Family::V4.elsewhere(INSIDE, 1), 80)).unwrap();
    let served = accept(&server).0;
    // As some programs set addresses that are set already; the route goes with the address. Back within a moment.
    site.host.command(&[
        "sh",
        "-c",
        "ip -batch - <<'end'
        addr del 10.99.0.2/24 dev vpn0
        addr add 10.99.0.2/24 dev vpn0
        route replace 198.18.9.0/24 via 10.99.0.1
end",
    ]);
    listener.wait(|event| matches!(event, Event::Network { routes: 1.., .. }).then_some(()));
    // Longer than it takes to find out whether an address is back.
    pause(Duration::from_millis(600));
    transfer(&client, &served, 1, 1_000_000);
    transfer(&served, &client, 2, 1_000_000);
    assert_eq!(hythe.counters().get("tcp_departed"), 0);
    hythe.stop().assert_clean(0);
}

#[test]
fn changes_are_told_to_who_listens() {
    let site = Site::new();
    let control = Control::new();
    let hythe = Hythe::of(&site.host, ANY).options(&control.option()).run();
    let mut listener = Listener::new(&control);
    let vpn = Vpn::up(&site.host);
    let mut missing = vec![Vpn::host(Family::V4), Vpn::host(Family::V6)];
    while !missing.is_empty() {
        let added = listener.wait(|event| match event {
            Event::Addresses { added, .. } => Some(added),
            _ => None,
        });
        missing.retain(|address| !added.contains(address));
    }
    site.host.ip("route add 192.168.65.128/25 via 10.99.0.1");
    let overlap = listener.wait(|event| match event {
        Event::Overlap { route, subnet } => Some((route.to_string(), subnet.to_string())),
        _ => None,
    });
    assert_eq!(overlap, ("192.168.65.128/25".into(), "192.168.65.0/24".into()));
    // A default route of IPv4 goes with its link, without a word of its own.
    site.host.ip("link set up0 down");
    let routes = listener.wait(|event| match event {
        Event::DefaultRoutes { ipv4, .. } => Some(ipv4),
        _ => None,
    });
    assert!(!routes);
    site.host.ip("link set up0 up
                  addr replace fd77::2/64 dev up0 nodad
                  route replace default via 10.77.0.1
                  -6 route replace default via fd77::1");
    listener.wait(|event| matches!(event, Event::DefaultRoutes { ipv4: true, ipv6: true }).then_some(()));
    site.host.ip("-6 route del default");
    let routes = listener.wait(|event| match event {
        Event::DefaultRoutes { ipv4, ipv6 } => Some((ipv4, ipv6)),
        _ => None,
    });
    assert_eq!(routes, (true, false));
    Vpn::down(&site.host);
    listener.wait(|event| match event {
        Event::Addresses { removed, .. } => removed.contains(&Vpn::host(Family::V4)).then_some(()),
        _ => None,
    });
    drop(vpn);
    let log = hythe.log();
    assert_eq!(log.matches("a route of the host overlaps the guest's subnet").count(), 1, "{log}");
    hythe.stop().assert_clean(0);
}

#[test]
fn rules_resolvers_and_names_of_the_host_are_told_too() {
    let site = Site::new();
    let control = Control::new();
    let hythe = Hythe::of(&site.host, ANY)
        .options(&control.option())
        .mounts(|mounts| {
            mounts.etc(&[("resolv.conf", "nameserver 192.0.2.1\n"), ("hosts", "192.0.2.7 one.test\n")]);
        })
        .run();
    let mut listener = Listener::new(&control);
    site.host.ip("rule add to 192.0.2.0/24 lookup main");
    listener.wait(|event| matches!(event, Event::Network { rules: 1, .. }).then_some(()));
    std::fs::write(file_of(&hythe, "resolv.conf"), "nameserver 192.0.2.2\nsearch corp.test\n").unwrap();
    let told = listener.wait(|event| match event {
        Event::Resolvers { servers, search } if !search.is_empty() => Some((servers, search)),
        _ => None,
    });
    assert_eq!(told, (vec!["192.0.2.2:53".parse().unwrap()], vec!["corp.test".to_string()]));
    std::fs::write(file_of(&hythe, "hosts"), "192.0.2.7 one.test two.test\n").unwrap();
    listener.wait(|event| matches!(event, Event::Hosts { names: 2 }).then_some(()));
    assert_eq!(dig(&hythe.guest, "two.test A"), "192.0.2.7");
    hythe.stop().assert_clean(0);
}

#[test]
fn a_request_that_goes_by_the_vpns_proxy_ends_with_the_vpn() {
    let site = Site::new();
    let vpn = Vpn::up(&site.host);
    let inside = Family::V4.elsewhere(INSIDE, 1);
    let _proxy = Server::start(&vpn.0, inside, 3128, |talk, _| {
        // The rest never comes.
        talk.try_send("HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\na part")?;
        Ok(Then::Next)
    });
    let hythe = Hythe::of(&site.host, ANY).options(&format!("--proxy-http http://{inside}:3128")).run();
    let mut guest = Talk::to(&hythe.guest, Family::V4.far(), 80);
    guest.send("GET / HTTP/1.1\r\nHost: web.test\r\n\r\n");
    assert_eq!(guest.head().status(), 200);
    assert_eq!(guest.exact(6), b"a part");
    Vpn::down(&site.host);
    // Long before anybody's patience ends.
    guest.wait_for_end();
    hythe.stop().assert_clean(0);
}

#[test]
fn a_storm_of_routes_costs_a_few_looks() {
    const ROUTES: u32 = 1000;
    let site = Site::new();
    let control = Control::new();
    let hythe = Hythe::of(&site.host, ANY).options(&control.option()).run();
    let mut listener = Listener::new(&control);
    let server = site.far.listen(Family::V4.any(), 80);
    let client = hythe.guest.connect((Family::V4.far(), 80)).unwrap();
    let served = accept(&server).0;
    let batch: Vec<String> = (0..ROUTES)
        .map(|route| format!("route add 198.19.{}.{}/32 via 10.77.0.1", route / 250, route % 250))
        .collect();
    let before = process::cpu_ticks(hythe.pid());
    site.host.ip(&batch.join("\n"));
    let (mut told, mut events) = (0, 0);
    while told < ROUTES {
        told += listener.wait(|event| match event {
            Event::Network { routes, .. } => Some(routes),
            _ => None,
        });
        events += 1;
    }
    assert_eq!(told, ROUTES);
    assert!(events < ROUTES / 4, "{events}");
    let ticks = process::cpu_ticks(hythe.pid()) - before;
    println!("{ROUTES} routes: {events} looks, {ticks} ticks of a hundredth of a second");
    transfer(&client, &served, 1, 1_000_000);
    hythe.stop().assert_clean(0);
}
