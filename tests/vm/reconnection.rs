//! The two ends of a link need not begin and end together.

use std::net::{SocketAddr, TcpListener, TcpStream};

use nix::sys::signal::Signal;

use crate::machine::{Machine, Vm};
use crate::rig::bytes::{accept, expect_end};
use crate::rig::cell::{Cell, Engine};
use crate::rig::directory::Directory;
use crate::rig::pattern::Pattern;
use crate::rig::site::{FAMILIES, Family, Site};
use crate::rig::wait::wait_until;
use crate::world::{PORT, boot, expect_network, expect_service, serve, serve_at, start};

pub const ENGINES: [Engine; 2] = [Engine::IoUring, Engine::Epoll];

/// The guest sees its link go, or come back.
fn expect_carrier(vm: &Vm, carrier: &str) {
    wait_until("the link to change", || vm.command("cat /sys/class/net/eth0/carrier") == carrier);
}

/// Nobody has the published port any more: the kernel closes what a ring of a killed process holds when it gets to it.
pub fn expect_free_port(site: &Site) {
    for family in FAMILIES {
        wait_until("the published port to be free", || site.far.connect((family.host(), PORT)).is_err());
    }
}

#[test]
fn a_machine_may_come_before_hythe() {
    let (site, directory) = (Site::new(), Directory::new());
    let socket = directory.path().join("link");
    let vm = Vm::start(Machine::Qemu, &socket);
    // It has found nobody, and goes on trying.
    wait_until("the machine to look for the link", || vm.said().contains("Failed to connect"));
    let hythe = serve(&site, Cell::new(Engine::IoUring, 1), &socket);
    vm.wait_until_booted();
    expect_network(&vm);
    expect_service(&vm, &site);
    hythe.signal(Signal::SIGTERM);
    hythe.end().assert_clean(0);
}

#[test]
fn what_waits_for_a_machine_keeps_nobody_busy() {
    for (door, engine) in ["--vhost-user", "--stream"].into_iter().zip(ENGINES) {
        let (site, directory) = (Site::new(), Directory::new());
        let hythe = serve_at(&site, Cell::new(engine, 1), door, &directory.path().join("link"));
        wait_until("the published port to be open", || hythe.counters().get("mappings_opened") == 2);
        let client = site.far.udp(Family::V4.next_hop(), 0);
        client.send_to(b"hello", SocketAddr::new(Family::V4.host(), PORT)).unwrap();
        // A report or two wake the worker, and so did the datagram.
        let [before, after] = [(); 2].map(|()| hythe.counters().get("passes"));
        assert!(after - before < 100, "{} passes without anything to do", after - before);
        hythe.signal(Signal::SIGTERM);
        hythe.end().assert_clean(0);
    }
}

#[test]
fn a_machine_may_follow_another() {
    let (site, directory) = (Site::new(), Directory::new());
    let socket = directory.path().join("link");
    let hythe = serve(&site, Cell::new(Engine::IoUring, 1), &socket);
    // Each has a MAC of its own.
    for _ in 0..3 {
        let vm = boot(Machine::UserModeLinux, &socket);
        expect_service(&vm, &site);
    }
    hythe.signal(Signal::SIGTERM);
    hythe.end().assert_clean(0);
}

/// A connection of the guest's to the far server, from which it reads until it is told.
fn connect_from_guest(vm: &Vm, listener: &TcpListener) -> TcpStream {
    let name = listener.local_addr().unwrap();
    vm.command(&format!(
        "rm -f /tmp/go /tmp/lost; mkfifo /tmp/go; talker lose {name} <>/tmp/go >/tmp/lost 2>&1 & \
         until grep ready /tmp/lost; do sleep 0.02; done"
    ));
    accept(listener).0
}

/// The guest is told, once it says something, that a connection of it is no more.
fn expect_lost_by_guest(vm: &Vm) {
    vm.command("echo >/tmp/go; until grep -E 'reset|panicked' /tmp/lost; do sleep 0.02; done");
    assert_eq!(vm.command("cat /tmp/lost"), "ready\nreset");
}

/// The guest has its link again with every hythe that comes after one that was killed, and does nothing for it itself.
fn outlives_hythe(machine: Machine, options: &str, rounds: usize) {
    let (site, directory) = (Site::new(), Directory::new());
    let socket = directory.path().join("link");
    let vm = Vm::start(machine, &socket);
    let mut hythe = start(&site, Cell::new(Engine::IoUring, 1), &socket, options);
    vm.wait_until_booted();
    expect_network(&vm);
    expect_service(&vm, &site);
    let listener = site.far.listen(Family::V4.far(), 0);
    for engine in ENGINES.into_iter().cycle().take(rounds) {
        let old = connect_from_guest(&vm, &listener);
        hythe.signal(Signal::SIGKILL);
        hythe.end();
        expect_end(&old);
        expect_carrier(&vm, "0");
        expect_free_port(&site);
        hythe = start(&site, Cell::new(engine, 1), &socket, options);
        expect_carrier(&vm, "1");
        expect_lost_by_guest(&vm);
        expect_connection(&vm, &listener);
    }
    expect_service(&vm, &site);
    hythe.signal(Signal::SIGTERM);
    hythe.end().assert_clean(0);
}

/// A few bytes go there and back over a connection of the guest's.
fn expect_connection(vm: &Vm, listener: &TcpListener) {
    let name = listener.local_addr().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (stream, _) = accept(listener);
            Pattern(1).expect(&stream, 0, 1000).unwrap();
            expect_end(&stream);
        });
        vm.command(&format!("talker send {name} 1 1000"));
    });
}

/// Here QEMU calls, once a second: a few rounds show it.
#[test]
fn a_guest_outlives_a_hythe_that_it_calls() {
    outlives_hythe(Machine::Qemu, "", 6);
}

/// And here hythe does, ten times a second.
#[test]
fn a_guest_outlives_a_hythe_that_calls_it() {
    outlives_hythe(Machine::QemuThatListens, "--client", 50);
}
