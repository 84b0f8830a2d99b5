//! Setting the guest's interface up, from inside its namespace.

use std::fs;
use std::io;
use std::path::Path;

use nix::net::if_::if_nametoindex;

use crate::netlink::{LinkSettings, Netlink};

use super::Plan;

/// Frames that the guest's kernel queues for hythe before it drops: connections by the thousand may each have a burst
/// under way.
const QUEUE_LEN: u32 = 4096;

/// Configures loopback and the tap device. Returns what the user should know.
pub fn interface(plan: &Plan) -> io::Result<Vec<String>> {
    let mut notes = Vec::new();
    let mut netlink = Netlink::open()?;
    let loopback = if_nametoindex("lo")?;
    netlink.set_link(loopback, &LinkSettings { up: true, ..LinkSettings::default() })?;

    let v6 = plan.addresses.iter().any(|address| address.addr().is_ipv6());
    let name = &plan.interface;
    // The addresses are given; what the kernel would make up from router advertisements would be others besides.
    let settings: &[(&str, &str)] =
        if v6 { &[("accept_ra", "0"), ("autoconf", "0")] } else { &[("disable_ipv6", "1")] };
    for (key, value) in settings {
        sysctl(&format!("net/ipv6/conf/{name}/{key}"), value);
    }
    // A new namespace shuts everybody out of unprivileged ping. Where not all groups exist, root's alone.
    if !sysctl("net/ipv4/ping_group_range", "0 2147483647") {
        sysctl("net/ipv4/ping_group_range", "0 0");
    }

    let index = if_nametoindex(name.as_str())?;
    let settings =
        LinkSettings { mac: Some(plan.mac), mtu: Some(plan.mtu), queue_len: Some(QUEUE_LEN), up: true };
    netlink.set_link(index, &settings)?;
    for address in &plan.addresses {
        if let Err(error) = netlink.add_address(index, *address) {
            let problem = format!("{name}: the address {address} cannot be set ({error})");
            if address.addr().is_ipv4() {
                return Err(io::Error::new(error.kind(), problem));
            }
            notes.push(problem);
        }
    }
    for gateway in &plan.gateways {
        let family = if gateway.is_ipv4() { "IPv4" } else { "IPv6" };
        match netlink.add_default_route(index, *gateway) {
            Ok(true) => {}
            // Whoever lives in a namespace that was joined may have a way out already.
            Ok(false) => notes.push(format!(
                "the namespace has a default route of {family} already, which is kept: {name} leads to the link alone \
                 (ip route replace default via {gateway} dev {name})"
            )),
            Err(error) => notes.push(format!("{name}: no default route through {gateway} ({error})")),
        }
    }
    Ok(notes)
}

/// Sets a kernel parameter of the namespace; says whether that worked. On a kernel without the family there is none.
fn sysctl(path: &str, value: &str) -> bool {
    fs::write(Path::new("/proc/sys").join(path), value).is_ok()
}
