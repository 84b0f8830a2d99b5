//! What one destination, or nobody at all, may take from the others: black holes, and connections that do nothing.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};

use crate::rig::bytes::{accept, echo, expect_echo, transfer};
use crate::rig::cell::{Cell, Engine, on_every_cell};
use crate::rig::process;
use crate::rig::quiet;
use crate::rig::site::{FAMILIES, Family};
use crate::rig::wait::{pause, wait_for, wait_until};
use crate::streams::{Opened, Pair};

/// How many descriptors hythe has once it rests: its threads are still opening theirs when the guest begins.
fn descriptors_at_rest(pid: i32) -> usize {
    let count = || process::descriptors(pid).len();
    wait_for("hythe to rest", || {
        let before = count();
        pause(Duration::from_secs(1));
        (count() == before).then_some(before)
    })
}

/// An address on the host's wire that is never answered: its neighbour is nobody's MAC.
fn black_hole(pair: &Pair, family: Family) -> SocketAddr {
    let address = if family == Family::V4 { "10.77.0.99" } else { "fd77::99" };
    pair.site.host.ip(&format!("neigh add {address} lladdr 02:00:00:00:00:99 dev up0 nud permanent"));
    SocketAddr::new(address.parse().unwrap(), 80)
}

/// Begins a connection and does not wait for it.
fn begin(pair: &Pair, to: SocketAddr) -> Socket {
    pair.hythe.guest.run(|| {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
        socket.set_nonblocking(true).unwrap();
        let error = socket.connect(&to.into()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINPROGRESS), "{error}");
        socket
    })
}

on_every_cell! {
    connects_into_a_black_hole_delay_nobody_else_and_leave_nothing(cell) {
        const CONNECTS: usize = 2000;
        let _busy = quiet::busy();
        let pair = Pair::new(cell);
        // The host gives up after 15 s instead of two minutes.
        pair.site.host.sysctl("ipv4/tcp_syn_retries", "3");
        let (listener, name) = pair.listen(Opened::ByGuest, Family::V4);
        let server = echo(listener, 201);
        let exchange = || {
            let stream = pair.call(Opened::ByGuest, name).unwrap();
            expect_echo(&stream, b"and now?");
        };
        exchange();
        let pid = pair.hythe.pid();
        let (memory_kib, descriptors) = (process::resident_kib(pid), descriptors_at_rest(pid));

        let holes = FAMILIES.map(|family| black_hole(&pair, family));
        let connects: Vec<Socket> = (0..CONNECTS).map(|number| begin(&pair, holes[number % 2])).collect();
        wait_until("connects under way", || process::descriptors(pid).len() > descriptors + 500);
        for _ in 0..200 {
            let begun = Instant::now();
            exchange();
            assert!(begun.elapsed() < Duration::from_secs(2), "an exchange took {:?}", begun.elapsed());
        }
        assert!(process::descriptors(pid).len() > descriptors + 500, "the exchanges were not beside the connects");
        server.finish();
        // What is over the budget is refused, honestly and at once.
        let refused = connects.iter().filter_map(|socket| socket.take_error().unwrap());
        let refused = refused.inspect(|error| assert_eq!(error.kind(), ErrorKind::ConnectionRefused)).count();
        assert_eq!(pair.hythe.counters().get("dropped_connect_budget") > 0, refused > 0, "{refused} refused");
        drop(connects);

        wait_until("the host to give up", || process::descriptors(pid).len() <= descriptors);
        let grown_kib = process::resident_kib(pid).saturating_sub(memory_kib);
        assert!(grown_kib < 12 << 10, "{grown_kib} KiB are not given back");
        pair.finish(&["connect_budget", "host_refused", "no_flow", "reset", "out_of_window"]);
    }
}

/// Has the kernel probe the other side after ten idle seconds.
fn keep_alive(stream: &TcpStream) {
    let probes = TcpKeepalive::new().with_time(Duration::from_secs(10)).with_interval(Duration::from_secs(5));
    SockRef::from(stream).set_tcp_keepalive(&probes).unwrap();
}

fn idle_connections_last(engine: Engine) {
    let pair = Pair::new(Cell::new(engine, 2));
    let probed = pair.every_connection();
    let silent = pair.every_connection();
    for (guest, far) in probed.iter().chain(&silent) {
        transfer(guest, far, 1, 1 << 20);
    }
    for (guest, _) in &probed {
        keep_alive(guest);
    }
    pause(Duration::from_mins(3));
    for (guest, far) in probed.iter().chain(&silent) {
        transfer(guest, far, 2, 1 << 20);
        transfer(far, guest, 3, 1 << 20);
    }
    // Four connections were probed every ten seconds, and hythe's probes go on to the far server every minute.
    let (by_guest, by_host) =
        (pair.hythe.guest.counter("TcpExtTCPKeepAlive"), pair.site.host.counter("TcpExtTCPKeepAlive"));
    assert!(by_guest >= 4 * 10, "the guest has sent {by_guest} probes");
    assert!(by_host >= 4, "the host has sent {by_host} probes");
    drop((probed, silent));
    // A probe is a byte that was acknowledged before.
    pair.finish(&["out_of_window"]);
}

#[test]
fn connections_that_idle_for_three_minutes_last_on_io_uring() {
    idle_connections_last(Engine::IoUring);
}

#[test]
fn connections_that_idle_for_three_minutes_last_on_epoll() {
    idle_connections_last(Engine::Epoll);
}

on_every_cell! {
    closed_connections_leave_no_descriptor(cell) {
        let _busy = quiet::busy();
        let pair = Pair::new(cell);
        let (listener, name) = pair.listen(Opened::ByGuest, Family::V6);
        let before = descriptors_at_rest(pair.hythe.pid());
        for _ in 0..10 {
            let streams: Vec<_> = (0..50)
                .map(|_| {
                    let stream = pair.call(Opened::ByGuest, name).unwrap();
                    (stream, accept(&listener))
                })
                .collect();
            assert!(process::descriptors(pair.hythe.pid()).len() >= before + 50);
            drop(streams);
        }
        wait_until("all descriptors to be closed", || process::descriptors(pair.hythe.pid()).len() <= before);
        pair.finish(&["out_of_window"]);
    }
}
