//! The guest changes its interface's MTU while connections go on.

use crate::rig::site::{FAMILIES, Family};
use crate::streams::while_conversing;
use crate::world::{GUEST_PORT, expect_network, expect_service, with_every_guest};

with_every_guest! {
    conversations_outlast_a_change_of_the_mtu(world) {
        world.vm.serve(GUEST_PORT);
        // IPv6 goes on where every packet of 1280 bytes fits (RFC 8200, 5).
        while_conversing(&world, &FAMILIES, || {
            for mtu in [1280, 1500, 1280, 1400, 1500] {
                world.vm.command(&format!("ip link set eth0 mtu {mtu}"));
                expect_service(&world.vm, &world.site);
            }
        });
        while_conversing(&world, &[Family::V4], || {
            world.vm.command("ip link set eth0 mtu 576");
            world.vm.command(&format!("ping -c 1 -s 3000 -W 30 {}", Family::V4.far()));
            world.vm.command("ip link set eth0 mtu 1500");
            expect_network(&world.vm);
            expect_service(&world.vm, &world.site);
        });
        world.finish();
    }
}
