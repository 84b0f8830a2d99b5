//! Names, as the guest's own resolver sees them.

use crate::machine::Vm;
use crate::rig::dns_server::Over;
use crate::rig::site::{FAMILIES, Family};
use crate::world::with_every_guest;

/// The addresses of a name, by nslookup(1).
pub fn look_up(vm: &Vm, name: &str) -> Vec<String> {
    let said = vm.command(&format!("nslookup {name}"));
    // The server's own address comes first, before an empty line.
    let (_, answers) = said.split_once("\n\n").unwrap_or_else(|| panic!("{said}"));
    let mut addresses: Vec<String> =
        answers.lines().filter_map(|line| Some(line.strip_prefix("Address: ")?.trim().to_string())).collect();
    addresses.sort_unstable();
    addresses
}

with_every_guest! {
    names_of_the_link_are_known(world) {
        for (name, addresses) in [
            ("host.docker.internal", FAMILIES.map(Family::host_internal)),
            ("gateway.docker.internal", FAMILIES.map(Family::gateway)),
        ] {
            assert_eq!(look_up(&world.vm, name), addresses.map(|address| address.to_string()), "{name}");
        }
        assert!(world.dns.asked().is_empty(), "{:?}", world.dns.asked());
        world.finish();
    }
}

with_every_guest! {
    other_names_are_asked_of_the_hosts_resolvers(world) {
        assert_eq!(look_up(&world.vm, "address.test"), ["2001:db8::10", "203.0.113.10"]);
        assert_eq!(world.dns.count("address.test", Over::Udp), 2);
        world.finish();
    }
}
