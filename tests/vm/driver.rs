//! The guest's driver lets go of the device, and takes it again.

use crate::world::{expect_network, expect_service, with_every_guest};

with_every_guest! {
    an_interface_that_was_down_works_again(world) {
        expect_service(&world.vm, &world.site);
        for _ in 0..3 {
            world.vm.command("ip link set eth0 down && ip link set eth0 up");
        }
        // Its routes are gone with it.
        world.vm.command("network >/tmp/network 2>&1 &");
        expect_network(&world.vm);
        expect_service(&world.vm, &world.site);
        world.finish();
    }
}

with_every_guest! {
    a_driver_that_was_reloaded_works_again(world) {
        expect_service(&world.vm, &world.site);
        for _ in 0..3 {
            world.vm.command("rmmod virtio_net && modprobe virtio_net");
        }
        world.vm.command("network >/tmp/network 2>&1 &");
        expect_network(&world.vm);
        expect_service(&world.vm, &world.site);
        world.finish();
    }
}
