//! What a guest is told about its network: by DHCP, by router advertisements, and by what answers there.

use crate::rig::site::FAMILIES;
use crate::world::with_every_guest;

with_every_guest! {
    a_guest_gets_its_addresses_and_routes(world) {
        // That it has them is what every world begins with. The gateway is who it says it is.
        for family in FAMILIES {
            world.vm.command(&format!("ping -c 1 -W 30 {}", family.gateway()));
        }
        let neighbours = world.vm.command("ip neigh show dev eth0");
        assert!(neighbours.contains("192.168.65.1 lladdr"), "{neighbours}");
        world.finish();
    }
}

with_every_guest! {
    echoes_come_back(world) {
        for family in FAMILIES {
            let said = world.vm.command(&format!("ping -c 5 -i 0.2 -W 30 {}", family.far()));
            assert!(said.contains("5 packets transmitted, 5 packets received"), "{said}");
        }
        world.finish();
    }
}
