//! `hythe explain`: what the running hythe would do with a destination, beside what it does.

use std::net::IpAddr;

use hythe::control::explanation::{Explanation, Meaning, Way};

use crate::publishing::{Control, printed};
use crate::rig::cell::ANY;
use crate::rig::dns_server::DnsServer;
use crate::rig::hythe::Hythe;
use crate::rig::site::{Family, Site};
use crate::rig::vpn::{INSIDE, Vpn};
use crate::rig::wait::wait_until;
use crate::vpn::dig;

fn explain(control: &Control, site: &Site, destination: &str) -> Explanation {
    let output = control.hythe(&site.host, "explain", &[destination, "--json"]);
    serde_json::from_str(&printed(&output)).unwrap()
}

fn way(control: &Control, site: &Site, destination: &str) -> Way {
    let explanation = explain(control, site, destination);
    assert_eq!(explanation.ways.len(), 1, "{explanation:?}");
    explanation.ways.into_iter().next().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn a_destination_is_explained_from_its_name_to_the_wire() {
    let site = Site::new();
    let far = Family::V4.far();
    let _office = DnsServer::start(&site.far, far, 1);
    let vpn = Vpn::up(&site.host);
    site.host.ip("link set vpn0 mtu 1280");
    let _inside = DnsServer::start(&vpn.0, Family::V4.elsewhere(INSIDE, 1), 7);
    let control = Control::new();
    let resolvers = format!("nameserver {far}\n");
    let hythe = Hythe::of(&site.host, ANY)
        .options(&control.option())
        .options("--record db.test=198.18.9.9,2001:db8:9::9 --zone whoami.test=198.18.9.1")
        .mounts(move |mounts| mounts.resolv_conf(&resolvers))
        .run();

    let db = explain(&control, &site, "DB.test:443");
    assert_eq!(db.destination, "db.test:443");
    let said: Vec<_> = db.names.iter().map(|name| (name.kind.as_str(), name.from.as_str())).collect();
    assert_eq!(said, [("A", "records"), ("AAAA", "records")]);
    for (way, family) in db.ways.iter().zip([Family::V4, Family::V6]) {
        assert_eq!((way.address, way.meaning), (family.elsewhere(INSIDE, 9), Meaning::Outside));
        let route = way.route.as_ref().unwrap();
        assert_eq!((route.interface.as_str(), route.mtu, route.chosen), ("vpn0", 1280, false));
        assert_eq!(route.source, Some(Vpn::host(family)));
        let router = if family == Family::V4 { "10.99.0.1" } else { "fd99::1" };
        assert_eq!(route.gateway, Some(ip(router)));
    }

    let zone = explain(&control, &site, "whoami.test");
    let name = &zone.names[0];
    assert_eq!((name.from.as_str(), name.code.as_str()), ("198.18.9.1:53", "NOERROR"));
    assert_eq!(name.because, "a server of its zone");
    assert_eq!(zone.ways[0].address, ip("203.0.113.7"));
    assert_eq!(zone.ways[0].route.as_ref().unwrap().interface, "up0");

    for from in [format!("{far}:53"), "cache".to_string()] {
        let name = explain(&control, &site, "address.test").names.remove(0);
        assert_eq!((name.from, name.addresses), (from, vec![ip("203.0.113.10")]));
    }
    let none = explain(&control, &site, "absent.test");
    assert!(none.ways.is_empty() && none.names.iter().all(|name| name.code == "NXDOMAIN"), "{none:?}");

    for (destination, meaning, says) in [
        ("host.docker.internal:8080", Meaning::Host, "127.0.0.1"),
        ("gateway.docker.internal:53/udp", Meaning::Gateway, "resolves names"),
        ("192.168.65.1:80", Meaning::Gateway, "nothing serves port 80/tcp"),
        ("192.168.65.77", Meaning::Refused, "in the guest's subnet"),
        ("169.254.169.254:80", Meaning::Refused, "--allow-metadata"),
        ("169.254.1.1", Meaning::Refused, "link-local"),
        ("127.0.0.1", Meaning::Refused, "nobody can have"),
        ("10.77.0.2:22", Meaning::Outside, "the host's own"),
        ("198.51.100.1", Meaning::Outside, "routes"),
    ] {
        let explanation = explain(&control, &site, destination);
        let way = &explanation.ways[0];
        assert_eq!(way.meaning, meaning, "{destination}: {way:?}");
        assert!(way.because.contains(says), "{destination}: {way:?}");
    }
    assert_eq!(way(&control, &site, "10.77.0.2").route.unwrap().interface, "lo");
    let office = way(&control, &site, "[2001:db8::1]:80").route.unwrap();
    assert_eq!((office.interface.as_str(), office.source, office.mtu), ("up0", Some(ip("fd77::2")), 1500));

    // As the host's network changes.
    Vpn::down(&site.host);
    site.host.ip("route add unreachable 198.18.9.0/24");
    let gone = way(&control, &site, "198.18.9.9");
    assert!(gone.route.is_none() && gone.no_route.is_some(), "{gone:?}");

    let text = printed(&control.hythe(&site.host, "explain", &["198.51.100.1:443"]));
    let expected = "198.51.100.1:443\n  198.51.100.1 is outside: through the host's own sockets and routes\n    \
                    by up0 via 10.77.0.1 from 10.77.0.2, packets of up to 1500 bytes\n";
    assert_eq!(text, expected);
    let refused = control.hythe(&site.host, "explain", &["a:b:c"]);
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("'a:b:c' is no destination"));
    hythe.stop().assert_clean(0);
}

#[test]
fn a_way_that_was_chosen_is_explained_as_chosen() {
    let site = Site::new();
    let _vpn = Vpn::up(&site.host);
    site.host.ip("route add default via 10.99.0.1 metric 500");
    let control = Control::new();
    let hythe = Hythe::of(&site.host, ANY)
        .options(&control.option())
        .options("--outbound-interface vpn0 --outbound-address 10.99.0.2")
        .run();
    let outside = way(&control, &site, "198.51.100.1").route.unwrap();
    assert_eq!((outside.interface.as_str(), outside.source), ("vpn0", Some(ip("10.99.0.2"))));
    assert!(outside.chosen);
    let own = way(&control, &site, "10.77.0.2").route.unwrap();
    assert_eq!((own.interface.as_str(), own.chosen), ("lo", false));
    // What is away is told, and what is there again, too.
    Vpn::down(&site.host);
    let gone = way(&control, &site, "198.51.100.1");
    assert!(gone.route.is_none() && gone.no_route.is_some(), "{gone:?}");
    let _again = Vpn::up(&site.host);
    site.host.ip("route add default via 10.99.0.1 metric 500");
    wait_until("the interface to be known again", || way(&control, &site, "198.51.100.1").route.is_some());
    hythe.stop().assert_clean(0);
}

#[test]
fn the_proxy_of_a_destination_is_explained() {
    let site = Site::new();
    let control = Control::new();
    let hythe = Hythe::of(&site.host, ANY)
        .options(&control.option())
        .options("--proxy-http http://198.51.100.1:3001 --proxy-https http://198.51.100.1:3002 --proxy-bypass .straight.test")
        .options("--record web.test=198.18.9.9 --record a.straight.test=198.18.9.9")
        .run();
    let said = |destination: &str| {
        let way = explain(&control, &site, destination).ways.swap_remove(0);
        way.further
            .into_iter()
            .map(|further| format!("{}: {}", further.about, further.says))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        said("web.test:80"),
        ["proxy for http: http://198.51.100.1:3001", "proxy for everything else: http://198.51.100.1:3002"]
    );
    assert_eq!(said("a.straight.test:80")[0], "proxy for http: none: the bypass list names it");
    assert_eq!(said("web.test:22"), ["proxy: none: port 22 is not among 80,443"]);
    assert_eq!(said("host.docker.internal:80"), ["proxy: none: it is of the link"]);
    assert!(said("web.test:80/udp").is_empty());
    hythe.stop().assert_clean(0);
}

#[test]
fn names_that_programs_add_are_the_guests_at_once() {
    let site = Site::new();
    let control = Control::new();
    let hythe = Hythe::of(&site.host, ANY).options(&control.option()).run();
    let socket = control.path.display().to_string();
    let curl = |words: &[&str]| {
        site.host.command(
            &[&["curl", "-sSf", "--unix-socket", &socket, "-H", "content-type: application/json"], words]
                .concat(),
        )
    };
    curl(&["http://hythe/v1/dns", "-d", r#"{"name": "new.test", "addresses": ["192.0.2.9"]}"#]);
    assert_eq!(dig(&hythe.guest, "new.test A"), "192.0.2.9");
    let zone = r#"{"Name": "zone.test.", "Records": [{"Name": "db", "IP": "192.0.2.10"}]}"#;
    curl(&["http://hythe/services/dns/add", "-d", zone]);
    assert_eq!(dig(&hythe.guest, "db.zone.test A"), "192.0.2.10");
    assert!(curl(&["http://hythe/services/dns/all"]).contains("192.0.2.10"));
    curl(&["-X", "DELETE", "http://hythe/v1/dns?name=new.test"]);
    assert_eq!(dig(&hythe.guest, "new.test A"), "");
    hythe.stop().assert_clean(0);
}
