//! How a guest gets its addresses: given by hythe, or asked for by DHCP, DHCPv6 and router solicitations.

use std::io::ErrorKind;
use std::net::IpAddr;
use std::time::Duration;

use crate::rig::bytes::{accept, transfer};
use crate::rig::cell::{ANY, Cell, on_every_cell};
use crate::rig::directory::Directory;
use crate::rig::hythe::{Hythe, PROGRAM};
use crate::rig::netns::Netns;
use crate::rig::site::{FAMILIES, Family, Site};
use crate::rig::wait::wait_until;

/// The guest's default MAC.
const MAC: &str = "5a:94:ef:e4:0c:ee";

/// hythe in a namespace whose interface has lost all that it was given.
fn unconfigured(site: &Site, cell: Cell, options: &str) -> Hythe {
    let guest = Netns::new();
    let target = format!("--netns {}", guest.path().display());
    let hythe = Hythe::of(&site.host, cell).options(options).attach(&target, &guest);
    guest.ip("addr flush dev eth0");
    assert_eq!(addresses(&guest, Family::V4), [""; 0]);
    assert!(
        guest
            .connect((Family::V4.far(), 80))
            .is_err_and(|error| error.kind() == ErrorKind::NetworkUnreachable)
    );
    hythe
}

/// The addresses of eth0 that are not link-local, with their prefixes.
fn addresses(guest: &Netns, family: Family) -> Vec<String> {
    let option = if family == Family::V4 { "-4" } else { "-6" };
    let printed = guest.command(&["ip", "-o", option, "addr", "show", "dev", "eth0", "scope", "global"]);
    printed.lines().filter_map(|line| line.split_whitespace().nth(3)).map(str::to_string).collect()
}

/// A shell script for a DHCP client: sets what it was given, and writes its variables down.
fn script(directory: &Directory, set: &str) -> String {
    let file = directory.path().join("given");
    let lines = format!("{set}\nset | sort > {0}.new && mv {0}.new {0}\n", file.display());
    directory.script("configure", &lines).to_string_lossy().into_owned()
}

/// What a client's script was told.
fn given(directory: &Directory, variable: &str) -> String {
    let text = std::fs::read_to_string(directory.path().join("given")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(variable)?.strip_prefix('='));
    line.unwrap_or_else(|| panic!("no {variable} in\n{text}")).trim_matches('\'').to_string()
}

fn reaches_far(guest: &Netns, far: &Netns, family: Family) {
    let listener = far.listen(family.far(), 0);
    let stream = guest.connect(listener.local_addr().unwrap()).unwrap();
    let (accepted, _) = accept(&listener);
    transfer(&stream, &accepted, 1, 100_000);
    transfer(&accepted, &stream, 2, 100_000);
}

/// udhcpc(8), once.
fn udhcpc(guest: &Netns, directory: &Directory) {
    let script = script(
        directory,
        r#"[ "$1" = bound ] || exit 0
           ip addr add "$ip/$mask" dev "$interface" && ip route add default via "$router" dev "$interface""#,
    );
    guest.command(&["udhcpc", "-i", "eth0", "-n", "-q", "-f", "-t", "20", "-T", "1", "-s", &script]);
}

on_every_cell! {
    udhcpc_gets_an_address_a_route_and_a_resolver(cell) {
        let (site, directory) = (Site::new(), Directory::new());
        let hythe = unconfigured(&site, cell, "--mtu 1400");
        udhcpc(&hythe.guest, &directory);
        assert_eq!(addresses(&hythe.guest, Family::V4), ["192.168.65.3/24"]);
        for (variable, value) in [
            ("subnet", "255.255.255.0"),
            ("router", "192.168.65.1"),
            ("dns", "192.168.65.1"),
            ("serverid", "192.168.65.1"),
            ("mtu", "1400"),
        ] {
            assert_eq!(given(&directory, variable), value, "{variable}");
        }
        assert!(given(&directory, "lease").parse::<u32>().unwrap() >= 3600);
        reaches_far(&hythe.guest, &site.far, Family::V4);
        // Asked again, it says the same.
        hythe.guest.ip("addr flush dev eth0");
        udhcpc(&hythe.guest, &directory);
        assert_eq!(addresses(&hythe.guest, Family::V4), ["192.168.65.3/24"]);
    }
}

on_every_cell! {
    dhclient_gets_an_address_of_each_family(cell) {
        let (site, directory) = (Site::new(), Directory::new());
        let hythe = unconfigured(&site, cell, "");
        let guest = &hythe.guest;
        // The kernel's link-local address, from which DHCPv6 is spoken, went with the others.
        guest.ip("link set eth0 down
                  link set eth0 up");
        wait_until("a link-local address", || {
            let shown = guest.command(&["ip", "-6", "addr", "show", "dev", "eth0", "scope", "link"]);
            shown.contains("fe80::") && !shown.contains("tentative")
        });
        let lease = directory.path().join("lease").to_string_lossy().into_owned();
        let pid = directory.path().join("pid").to_string_lossy().into_owned();
        for (option, set, expected) in [
            (
                "-4",
                r#"[ "$reason" = BOUND ] || exit 0
                   ip addr add "$new_ip_address/$new_subnet_mask" dev "$interface"
                   ip route add default via "$new_routers" dev "$interface""#,
                [("new_ip_address", "192.168.65.3"), ("new_domain_name_servers", "192.168.65.1")],
            ),
            (
                "-6",
                r#"[ "$reason" = BOUND6 ] || exit 0
                   ip addr add "$new_ip6_address/$new_ip6_prefixlen" dev "$interface""#,
                [("new_ip6_address", "fdc4:f303:9324::3"), ("new_dhcp6_name_servers", "fdc4:f303:9324::1")],
            ),
        ] {
            let script = script(&directory, set);
            let words = ["dhclient", option, "-1", "-d", "-sf", &script, "-lf", &lease, "-pf", &pid, "eth0"];
            // It stays in the foreground; what counts is what it was given.
            let client = crate::rig::program::Program::start(guest, &words);
            wait_until("dhclient to be given an address", || directory.names().contains(&"given".to_string()));
            for (variable, value) in expected {
                assert_eq!(given(&directory, variable), value);
            }
            drop(client);
            std::fs::remove_file(directory.path().join("given")).unwrap();
            std::fs::remove_file(&lease).unwrap();
        }
        reaches_far(guest, &site.far, Family::V4);
    }
}

on_every_cell! {
    the_guests_kernel_makes_itself_an_address_from_router_advertisements(cell) {
        let site = Site::new();
        let hythe = unconfigured(&site, cell, "");
        let guest = &hythe.guest;
        guest.sysctl("ipv6/conf/eth0/accept_ra", "2");
        guest.sysctl("ipv6/conf/eth0/autoconf", "1");
        guest.sysctl("ipv6/conf/eth0/addr_gen_mode", "0");
        // An interface that comes up solicits routers (RFC 4861, 6.3.7).
        guest.ip("link set eth0 down
                  link set eth0 up");
        // RFC 4291, appendix A: the MAC, one bit turned, with ff:fe in the middle.
        let expected = "fdc4:f303:9324:0:5894:efff:fee4:cee/64";
        wait_until("an address and a route", || {
            addresses(guest, Family::V6) == [expected]
                && guest.command(&["ip", "-6", "route", "show", "default"]).contains("via fe80::5894:efff:fee4:cdd")
        });
        wait_until("the address to be the guest's own", || {
            !guest.command(&["ip", "-6", "addr", "show", "dev", "eth0"]).contains("tentative")
        });
        reaches_far(guest, &site.far, Family::V6);
        let link = guest.command(&["ip", "link", "show", "eth0"]);
        assert!(link.contains(MAC), "{link}");
    }
}

#[test]
fn a_host_without_a_route_for_ipv6_is_no_router_for_it() {
    let site = Site::new();
    site.host.ip("-6 route del default");
    let hythe = unconfigured(&site, ANY, "");
    let guest = &hythe.guest;
    guest.sysctl("ipv6/conf/eth0/accept_ra", "2");
    guest.sysctl("ipv6/conf/eth0/autoconf", "1");
    guest.ip("link set eth0 down
              link set eth0 up");
    wait_until("an address", || !addresses(guest, Family::V6).is_empty());
    assert_eq!(guest.command(&["ip", "-6", "route", "show", "default"]), "");
}

on_every_cell! {
    a_guest_may_have_one_family_only(cell) {
        let site = Site::new();
        for (option, on, off) in [("-4", Family::V4, Family::V6), ("-6", Family::V6, Family::V4)] {
            let hythe = Hythe::of(&site.host, cell).options(option).run();
            assert_eq!(addresses(&hythe.guest, off), [""; 0], "{option}");
            assert_eq!(addresses(&hythe.guest, on).len(), 1, "{option}");
            reaches_far(&hythe.guest, &site.far, on);
            let error = hythe.guest.connect((off.far(), 80)).unwrap_err();
            // A kernel whose IPv6 is off has not even an address to send from.
            let kinds = [ErrorKind::NetworkUnreachable, ErrorKind::AddrNotAvailable];
            assert!(kinds.contains(&error.kind()), "{option}: {error}");
            hythe.stop().assert_clean(0);
        }
    }
}

/// Options that change everything about the link.
const CHOSEN: [(&str, &str); 9] = [
    ("mtu", "9000"),
    ("mac", "52:54:00:12:34:56"),
    ("hostname", "web"),
    ("interface", "net7"),
    ("subnet", "10.9.8.0/24"),
    ("subnet6", "fd00:1:2:3::/64"),
    ("guest-ip", "10.9.8.77"),
    ("gateway-ip", "10.9.8.2"),
    ("host-ip", "10.9.8.9"),
];

fn assert_chosen(site: &Site, hythe: &Hythe) {
    let guest = &hythe.guest;
    let link = guest.command(&["ip", "link", "show", "net7"]);
    assert!(link.contains("mtu 9000") && link.contains("52:54:00:12:34:56"), "{link}");
    let shown = guest.command(&["ip", "addr", "show", "net7"]);
    assert!(shown.contains("inet 10.9.8.77/24") && shown.contains("inet6 fd00:1:2:3::3/64"), "{shown}");
    let routes = guest.command(&["ip", "route", "show", "default"]);
    assert!(routes.contains("via 10.9.8.2 dev net7"), "{routes}");
    let routes = guest.command(&["ip", "-6", "route", "show", "default"]);
    assert!(routes.contains("via fd00:1:2:3::1 dev net7"), "{routes}");
    for gateway in ["10.9.8.2", "fd00:1:2:3::1"] {
        guest.command(&["ping", "-n", "-c", "1", "-W", "10", gateway]);
    }
    // Each on a port of its own: a process that is being started may have a copy of the first listener a little longer, and
    // 127.0.0.1 is asked first, whichever family the guest has used.
    for ((host, port), family) in [("10.9.8.9", 7000), ("fd00:1:2:3::254", 7001)].into_iter().zip(FAMILIES) {
        let listener = site.host.listen(family.loopback(), port);
        let stream = guest.connect((host.parse::<IpAddr>().unwrap(), port)).unwrap();
        let (accepted, _) = accept(&listener);
        transfer(&stream, &accepted, 1, 100_000);
        reaches_far(guest, &site.far, family);
    }
}

on_every_cell! {
    the_links_options_are_honoured(cell) {
        let site = Site::new();
        let options: Vec<String> = CHOSEN.iter().map(|(key, value)| format!("--{key} {value}")).collect();
        let hythe = Hythe::of(&site.host, cell).options(&options.join(" ")).run();
        assert_chosen(&site, &hythe);
        hythe.stop().assert_clean(0);
    }
}

#[test]
fn a_configuration_file_has_the_same_keys_and_the_command_line_counts_more() {
    let (site, directory) = (Site::new(), Directory::new());
    let value = |value: &str| value.parse::<u16>().map_or_else(|_| format!("'{value}'"), |n| n.to_string());
    let lines: Vec<String> = CHOSEN
        .iter()
        .map(|(key, text)| format!("{key} = {}", value(if *key == "mtu" { "1400" } else { text })))
        .chain(["publish = ['8000:80']".to_string()])
        .collect();
    let file = directory.file("hythe.toml", &lines.join("\n"));
    let hythe = Hythe::of(&site.host, ANY).options(&format!("--mtu 9000 --config {}", file.display())).run();
    assert_chosen(&site, &hythe);
    let listener = hythe.guest.listen(Family::V4.any(), 80);
    site.far.connect((Family::V4.host(), 8000)).unwrap();
    accept(&listener);
    hythe.stop().assert_clean(0);
}

#[test]
fn a_command_sees_its_host_name_its_resolvers_and_its_interface() {
    let site = Site::new();
    let command = ["sh", "-c", "hostname; cat /etc/resolv.conf; ip -o link show | wc -l"];
    let outside = std::fs::read_to_string("/etc/resolv.conf").unwrap();
    let start = Hythe::of(&site.host, ANY).options("--hostname web");
    let ended =
        start.mounts(|mounts| mounts.resolv_conf("search one.test two.test\n")).command(&command).end();
    ended.assert_clean(0);
    let expected = [
        "web",
        "# made by hythe",
        "nameserver 192.168.65.1",
        "nameserver fdc4:f303:9324::1",
        "search one.test two.test",
        "2",
    ];
    assert_eq!(ended.stdout.lines().collect::<Vec<_>>(), expected);
    assert_eq!(std::fs::read_to_string("/etc/resolv.conf").unwrap(), outside, "the host keeps its own");
}

#[test]
fn everything_is_configured_before_the_command_starts() {
    let site = Site::new();
    let _listener = site.far.listen(Family::V4.far(), 7000);
    // Its first act is to connect.
    let ended = Hythe::of(&site.host, ANY).command(&["nc", "-z", "-w", "20", "198.51.100.1", "7000"]).end();
    ended.assert_clean(0);
}

on_every_cell! {
    a_default_subnet_that_the_host_uses_gives_way_and_hythe_says_so(cell) {
        let site = Site::new();
        site.host.ip("route add 192.168.64.0/20 via 10.77.0.1");
        let hythe = Hythe::of(&site.host, cell).run();
        assert_eq!(addresses(&hythe.guest, Family::V4), ["192.168.127.3/24"]);
        let log = hythe.log();
        let said = "a route of the host covers 192.168.65.0/24: the link's subnet is 192.168.127.0/24";
        assert!(log.contains(said), "{log}");
        for family in FAMILIES {
            reaches_far(&hythe.guest, &site.far, family);
        }
        // What the default subnet would have hidden is reached.
        site.far.ip("addr add 192.168.65.3/32 dev lo");
        let listener = site.far.listen("192.168.65.3".parse::<IpAddr>().unwrap(), 0);
        hythe.guest.connect_within(listener.local_addr().unwrap(), Duration::from_secs(20)).unwrap();
        accept(&listener);
        hythe.stop().assert_clean(0);
    }
}

#[test]
fn help_says_what_there_is() {
    for words in [&["--help"][..], &["run", "--help"], &["attach", "--help"], &["--version"]] {
        let output = std::process::Command::new(PROGRAM).args(words).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{words:?}");
        assert!(!output.stdout.is_empty());
    }
}
