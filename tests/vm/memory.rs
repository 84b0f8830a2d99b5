//! The machine's memory grows and shrinks while connections go on.

use crate::machine::Machine;
use crate::rig::cell::{Cell, Engine};
use crate::rig::site::FAMILIES;
use crate::rig::wait::wait_until;
use crate::streams::while_conversing;
use crate::world::{GUEST_PORT, World, expect_service};

/// Memory of the guest, in KiB.
fn memory(world: &World) -> u64 {
    let line = world.vm.command("grep MemTotal /proc/meminfo");
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Pages above 4 GiB that are in use.
fn pages_above(world: &World) -> u64 {
    let used = "/zone +Normal/ { on = 1 } on && /pages free/ { free = $3 } on && /managed/ { print $2 - free; exit }";
    world.vm.command(&format!("awk '{used}' /proc/zoneinfo")).parse().unwrap()
}

/// Has QEMU execute a command.
fn execute(world: &World, command: &str, arguments: &str) -> String {
    world.vm.monitor(&format!(r#"{{"execute": "{command}", "arguments": {{{arguments}}}}}"#))
}

/// Plugs 256 MiB in, which the guest uses at once: for everything, or only for what it can move elsewhere.
fn plug(world: &World, id: &str, online: &str) {
    let before = memory(world);
    world.vm.command(&format!("echo {online} >/sys/devices/system/memory/auto_online_blocks"));
    execute(
        world,
        "object-add",
        &format!(r#""qom-type": "memory-backend-memfd", "id": "{id}", "size": 268435456, "share": true"#),
    );
    execute(world, "device_add", &format!(r#""driver": "pc-dimm", "id": "dimm-{id}", "memdev": "{id}""#));
    wait_until("the guest to have more memory", || memory(world) > before + 200_000);
}

/// Takes them out again.
fn unplug(world: &World, id: &str) {
    let plugged = memory(world);
    execute(world, "device_del", &format!(r#""id": "dimm-{id}""#));
    wait_until("the guest to let go", || {
        !world.vm.monitor(r#"{"execute": "query-memory-devices"}"#).contains(id)
    });
    execute(world, "object-del", &format!(r#""id": "{id}""#));
    wait_until("the guest to have less memory", || memory(world) < plugged - 200_000);
}

#[test]
fn conversations_outlast_memory_that_is_plugged_and_unplugged() {
    let world = World::new(Machine::QemuThatGrows, Cell::new(Engine::IoUring, 1));
    world.vm.serve(GUEST_PORT);
    while_conversing(&world, &FAMILIES, || {
        for _ in 0..3 {
            plug(&world, "lent", "online_movable");
            expect_service(&world.vm, &world.site);
            unplug(&world, "lent");
            expect_service(&world.vm, &world.site);
        }
        // It lies above 4 GiB, and the guest's kernel takes it for frames before any other.
        plug(&world, "kept", "online_kernel");
        expect_service(&world.vm, &world.site);
        wait_until("the guest's kernel to use it", || pages_above(&world) > 200);
        expect_service(&world.vm, &world.site);
    });
    world.finish();
}

/// A balloon in the guest takes pages of it, which QEMU gives back to the host; hythe has them mapped.
#[test]
fn conversations_outlast_a_balloon() {
    let world = World::new(Machine::QemuThatGrows, Cell::new(Engine::IoUring, 1));
    world.vm.command("modprobe virtio_balloon");
    world.vm.serve(GUEST_PORT);
    let before = memory(&world);
    while_conversing(&world, &FAMILIES, || {
        for _ in 0..3 {
            execute(&world, "balloon", r#""value": 201326592"#);
            wait_until("the balloon to be full", || memory(&world) < before - 60_000);
            expect_service(&world.vm, &world.site);
            execute(&world, "balloon", r#""value": 268435456"#);
            wait_until("the balloon to be empty", || memory(&world) == before);
            expect_service(&world.vm, &world.site);
        }
    });
    world.finish();
}
