//! A guest with everything around it: the machine, hythe, the host and the far server.
//!
//! ```text
//! guest ── eth0 ─ vhost-user ─ hythe ─ host ── far          host and far are those of the rig's site
//! ```

use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;

use crate::machine::{Machine, Vm};
use crate::rig::bytes::echo;
use crate::rig::cell::Cell;
use crate::rig::directory::Directory;
use crate::rig::dns_server::DnsServer;
use crate::rig::hythe::Hythe;
use crate::rig::site::{FAMILIES, Family, Site};
use crate::rig::wait::{PATIENCE, wait_until, wait_within};

/// The port of the host that is published, for TCP and UDP, and the guest's.
pub const PORT: u16 = 8000;
pub const GUEST_PORT: u16 = 80;

/// Makes a test of each kind of guest from a claim: `with_every_guest! { a_claim(world) { … } }`.
macro_rules! with_every_guest {
    ($($name:ident($world:ident) $body:block)*) => {$(
        mod $name {
            use super::*;
            use $crate::machine::Machine;
            use $crate::rig::cell::{Cell, Engine};
            use $crate::world::World;

            fn claim($world: World) $body

            #[test]
            fn user_mode_linux_on_io_uring() {
                claim(World::new(Machine::UserModeLinux, Cell::new(Engine::IoUring, 1)));
            }

            #[test]
            fn user_mode_linux_on_epoll() {
                claim(World::new(Machine::UserModeLinux, Cell::new(Engine::Epoll, 1)));
            }

            #[test]
            fn qemu_on_io_uring() {
                claim(World::new(Machine::Qemu, Cell::new(Engine::IoUring, 1)));
            }
        }
    )*};
}

pub(crate) use with_every_guest;

/// A guest that has booted and has a network. The machine ends first.
pub struct World {
    pub vm: Vm,
    pub machine: Machine,
    pub hythe: Hythe<PathBuf>,
    pub dns: DnsServer,
    pub site: Site,
    _directory: Directory,
}

/// The option for as many pairs of queues as there are workers.
pub fn queues(cell: Cell) -> String {
    if cell.workers > 1 { format!(" --queues {}", cell.workers) } else { String::new() }
}

/// Starts hythe in the host, with the far server as its resolver, for a machine at a door; waits for nothing.
fn start_at(site: &Site, cell: Cell, door: &str, socket: &Path, options: &str) -> Hythe<PathBuf> {
    Hythe::of(&site.host, cell)
        .options(&format!("-p {PORT}:{GUEST_PORT} -p {PORT}:{GUEST_PORT}/udp"))
        .mounts(|mounts| mounts.resolv_conf(&format!("nameserver {}\n", Family::V4.far())))
        .serve("vm", &format!("{door} {} {options}{}", socket.display(), queues(cell)), socket.to_path_buf())
}

/// Starts hythe for a machine at a vhost-user socket; waits for nothing.
pub fn start(site: &Site, cell: Cell, socket: &Path, options: &str) -> Hythe<PathBuf> {
    start_at(site, cell, "--vhost-user", socket, options)
}

/// Starts hythe; waits until a machine may attach at the vhost-user socket.
pub fn serve(site: &Site, cell: Cell, socket: &Path) -> Hythe<PathBuf> {
    serve_at(site, cell, "--vhost-user", socket)
}

/// Starts hythe; waits until a machine may attach at the socket of a door.
pub fn serve_at(site: &Site, cell: Cell, door: &str, socket: &Path) -> Hythe<PathBuf> {
    let hythe = start_at(site, cell, door, socket, "");
    wait_until("the socket of the link", || {
        assert!(hythe.is_running(), "{}", hythe.log());
        socket.exists()
    });
    hythe
}

/// Waits until a guest has its addresses and routes of both families.
pub fn expect_network(vm: &Vm) {
    let wanted = [
        "inet 192.168.65.3/24 ",
        "inet6 fdc4:f303:9324:",
        "default via 192.168.65.1 ",
        // A router is known by its address of the link (RFC 4861, 6.1.2).
        "default via fe80::",
        "nameserver 192.168.65.1",
    ];
    let mut shown = String::new();
    let complete = wait_within(PATIENCE, || {
        shown = vm.command(
            "sleep 0.1; ip -o addr show dev eth0; ip route; ip -6 route; cat /etc/resolv.conf; cat /tmp/network",
        );
        let has = |word: &str| shown.lines().any(|line| line.contains(word));
        (wanted.into_iter().all(has) && !has("tentative")).then_some(())
    });
    assert!(complete.is_some(), "the guest has no network:\n{shown}");
}

/// A guest that has booted and has a network.
pub fn boot(machine: Machine, socket: &Path) -> Vm {
    let vm = Vm::start(machine, socket);
    vm.wait_until_booted();
    expect_network(&vm);
    vm
}

/// A guest reaches the far server, and the far server it.
pub fn expect_service(vm: &Vm, site: &Site) {
    for family in FAMILIES {
        let listener = site.far.listen(family.far(), 0);
        let name = listener.local_addr().unwrap();
        let server = echo(listener, 1);
        assert_eq!(vm.command(&format!("echo hello | nc {} {}", name.ip(), name.port())), "hello");
        server.finish();
        vm.command(&format!("ping -c 1 -W 30 {}", family.far()));
    }
}

impl World {
    pub fn new(machine: Machine, cell: Cell) -> Self {
        let (site, directory) = (Site::new(), Directory::new());
        let dns = DnsServer::start(&site.far, Family::V4.far(), 1);
        let socket = directory.path().join("link");
        let hythe = serve_at(&site, cell, machine.door(), &socket);
        let vm = boot(machine, &socket);
        hythe.assert_engine();
        Self { vm, machine, hythe, dns, site, _directory: directory }
    }

    /// Ends hythe, and then the guest. Nothing of a guest with this one's habits was dropped.
    pub fn finish(self) {
        self.finish_with(|_| false);
    }

    /// The same for a guest of which frames may be dropped because of `expected` causes.
    pub fn finish_with(self, expected: impl Fn(&str) -> bool) {
        let counters = self.hythe.counters();
        let sent_again = self.vm.counter("snmp", "RetransSegs")
            + ["TCPWinProbe", "TCPKeepAlive"]
                .map(|name| self.vm.counter("netstat", name))
                .iter()
                .sum::<u64>();
        for (cause, count) in counters.drops() {
            let is_expected = match cause {
                // The guest tells its multicast groups to routers (MLD), of which there are none.
                "icmp_type" => true,
                // The router advertises itself when it starts, and there is no machine yet.
                "link_full" if count <= 1 => true,
                // What the guest's kernel sent once more on its own account, on a busy machine: data, and probes of a window
                // that was shut, which begin before it. And where the window is full, it numbers an acknowledgement by
                // the edge that it knew, which is rounded to the window's scale and may have moved: a few at the most.
                "out_of_window" => count <= sent_again + 8 || expected(cause),
                _ => expected(cause),
            };
            assert!(is_expected, "{count} dropped because of {cause}: {counters:?}");
        }
        self.hythe.signal(Signal::SIGTERM);
        self.hythe.end().assert_clean(0);
    }
}
