//! The guest's driver lets go of the device, and takes it again.

use crate::rig::bytes::{echo, expect_echo};
use crate::rig::process;
use crate::rig::site::Family;
use crate::rig::wait::wait_until;
use crate::streams::while_conversing;
use crate::world::{GUEST_PORT, PORT, World, expect_network, expect_service, with_every_guest};

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

/// So often is the driver reloaded.
const ROUNDS: usize = 50;

/// Unloads the driver and loads it. The interface gets its addresses at once: nothing waits for a lease.
const RELOAD: &str = "rmmod virtio_net && modprobe virtio_net && ip link set eth0 up && \
                      ip addr add 192.168.65.3/24 dev eth0 && ip route add default via 192.168.65.1";

/// How many sockets and other things hythe has.
fn descriptors(world: &World) -> usize {
    process::descriptors(world.hythe.pid()).len()
}

/// Connections that are not over.
fn flows(world: &World) -> u64 {
    let counters = world.hythe.counters();
    counters.get("tcp_opened_out") + counters.get("tcp_opened_in") - counters.get("tcp_over")
}

with_every_guest! {
    conversations_outlast_a_driver_that_is_reloaded(world) {
        world.vm.serve(GUEST_PORT);
        world.vm.command("kill $(cat /tmp/udhcpc)");
        wait_until("nothing to be left of the guest's start", || flows(&world) == 0);
        let before = descriptors(&world);
        let listener = world.site.far.listen(Family::V4.far(), 0);
        let name = listener.local_addr().unwrap();
        let server = echo(listener, ROUNDS);
        // One that says nothing while the driver is away, and one that never stops.
        let quiet = world.site.far.connect((Family::V4.host(), PORT)).unwrap();
        while_conversing(&world, &[Family::V4], || {
            for round in 0..ROUNDS {
                let message = format!("round {round}");
                let new = format!("echo {message} | nc {} {}", name.ip(), name.port());
                assert_eq!(world.vm.command(&format!("{RELOAD} && {new}")), message);
                expect_echo(&quiet, message.as_bytes());
            }
        });
        drop(quiet);
        server.finish();
        wait_until("every connection to be over", || flows(&world) == 0);
        wait_until("all of them to be closed", || descriptors(&world) == before);
        world.vm.command("network >/tmp/network 2>&1 &");
        expect_network(&world.vm);
        expect_service(&world.vm, &world.site);
        let is_user_mode_linux = world.machine == Machine::UserModeLinux;
        world.finish_with(|cause| match cause {
            // What was on its way when the queue went.
            "link_full" => true,
            // Of such a loss: a guest that has not heard the last acknowledgement of a connection ends it once more.
            "no_flow" => true,
            // User-Mode Linux 7.2 stops a queue only after its driver has taken the buffers back, and the index with them.
            "queue_fault" => is_user_mode_linux,
            _ => false,
        });
    }
}
