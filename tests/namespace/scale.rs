//! Many flows: what an idle one costs in memory and in time, and that nothing is left of those that are gone.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::rig::bytes::{accept, expect_echo};
use crate::rig::cell::{Cell, Engine, on_every_cell};
use crate::rig::process;
use crate::rig::quiet;
use crate::rig::site::{FAMILIES, Family};
use crate::rig::socket::receive;
use crate::rig::wait::{PATIENCE, pause, wait_for, wait_within};
use crate::streams::{Opened, Pair};

/// What is allowed for an idle flow.
const BYTES_PER_FLOW: u64 = 512;

/// How many connections or flows are held, by one test at a time.
const HELD: usize = 4000;
static MANY_DESCRIPTORS: Mutex<()> = Mutex::new(());

/// How many connections are opened and closed, and how many of them at the same time.
const CLOSED: usize = 50_000;
const AT_A_TIME: usize = 8;

/// Connections of the guest, each of which has carried a byte there and one back.
fn connections(pair: &Pair, count: usize) -> Vec<(TcpStream, TcpStream)> {
    let (listener, name) = pair.listen(Opened::ByGuest, Family::V4);
    pair.hythe.guest.run(|| {
        let open = |_| {
            let guest = TcpStream::connect(name).unwrap();
            let (mut far, _) = accept(&listener);
            (&guest).write_all(b"?").unwrap();
            far.read_exact(&mut [0]).unwrap();
            far.write_all(b"!").unwrap();
            (&guest).read_exact(&mut [0]).unwrap();
            (guest, far)
        };
        (0..count).map(open).collect()
    })
}

/// Sockets of the guest that have exchanged a datagram with the far server each.
fn datagram_flows(pair: &Pair, count: usize) -> Vec<UdpSocket> {
    let far = pair.site.far.udp(Family::V4.far(), 0);
    let to: SocketAddr = far.local_addr().unwrap();
    pair.hythe.guest.run(|| {
        let open = |_| {
            let guest = UdpSocket::bind((Family::V4.any(), 0)).unwrap();
            guest.set_read_timeout(Some(PATIENCE)).unwrap();
            guest.send_to(b"?", to).unwrap();
            let (_, from) = receive(&far, &mut [0]).unwrap();
            far.send_to(b"!", from).unwrap();
            receive(&guest, &mut [0]).unwrap();
            guest
        };
        (0..count).map(open).collect()
    })
}

/// Memory of hythe, once it does not change any more: what was closed is remembered for a while.
fn resident_at_rest_kib(pid: i32) -> u64 {
    wait_for("hythe's memory to settle", || {
        let before = process::resident_kib(pid);
        pause(Duration::from_secs(3));
        (process::resident_kib(pid) == before).then_some(before)
    })
}

/// What hythe grows by for each of the `count` things that `open` opens.
fn bytes_each<T>(pair: &Pair, what: &str, count: usize, open: impl FnOnce() -> Vec<T>) -> u64 {
    let before = resident_at_rest_kib(pair.hythe.pid());
    let held = open();
    let after = resident_at_rest_kib(pair.hythe.pid());
    let bytes = (after.saturating_sub(before) << 10) / count as u64;
    println!("{what}: {before} KiB, with {count} of them {after} KiB: {bytes} bytes each");
    drop(held);
    bytes
}

fn idle_flows_are_small(engine: Engine) {
    // Each of these tests has thousands of descriptors.
    let _alone = MANY_DESCRIPTORS.lock().unwrap_or_else(PoisonError::into_inner);
    let _busy = quiet::busy();
    let pair = Pair::new(Cell::new(engine, 2));
    // What the first ones need once is not theirs.
    drop((connections(&pair, 100), datagram_flows(&pair, 100)));
    let tcp = bytes_each(&pair, "a connection", HELD, || connections(&pair, HELD));
    assert!(tcp <= BYTES_PER_FLOW, "an idle connection takes {tcp} bytes");
    let udp = bytes_each(&pair, "a flow of datagrams", HELD, || datagram_flows(&pair, HELD));
    assert!(udp <= BYTES_PER_FLOW, "an idle flow of datagrams and its socket take {udp} bytes");
    pair.finish(&["out_of_window"]);
}

#[test]
fn an_idle_flow_takes_half_a_kilobyte_of_memory_at_the_most_on_io_uring() {
    idle_flows_are_small(Engine::IoUring);
}

#[test]
fn an_idle_flow_takes_half_a_kilobyte_of_memory_at_the_most_on_epoll() {
    idle_flows_are_small(Engine::Epoll);
}

/// Answers each client with a byte and ends the connection, so that the guest's ports are free again.
fn answer(listener: &TcpListener, clients: usize) {
    for _ in 0..clients {
        let (mut client, _) = accept(listener);
        client.read_exact(&mut [0]).unwrap();
        client.write_all(b"!").unwrap();
    }
}

/// Opens and closes so many connections, `AT_A_TIME` at a time.
fn open_and_close(pair: &Pair, count: usize) {
    let (listener, name) = pair.listen(Opened::ByGuest, Family::V4);
    let share = count / AT_A_TIME;
    pair.hythe.guest.run(|| {
        std::thread::scope(|scope| {
            for _ in 0..AT_A_TIME {
                scope.spawn(|| answer(&listener, share));
                scope.spawn(|| {
                    for _ in 0..share {
                        let mut stream = TcpStream::connect(name).unwrap();
                        stream.write_all(b"?").unwrap();
                        assert_eq!(stream.read_to_end(&mut Vec::new()).unwrap(), 1);
                    }
                });
            }
        });
    });
}

fn memory_returns(engine: Engine) {
    let _busy = quiet::busy();
    let pair = Pair::new(Cell::new(engine, 2));
    // What a program that works has, and keeps: tables and records of a few connections.
    open_and_close(&pair, 2000);
    let before = resident_at_rest_kib(pair.hythe.pid());
    open_and_close(&pair, CLOSED);
    let most = process::resident_kib(pair.hythe.pid());
    let after = resident_at_rest_kib(pair.hythe.pid());
    println!("{before} KiB; after {CLOSED} connections {most} KiB, and at rest {after} KiB");
    assert!(after <= before + before / 20, "{before} KiB have become {after} KiB");
    pair.finish(&["out_of_window", "no_flow"]);
}

#[test]
fn memory_returns_after_fifty_thousand_connections_on_io_uring() {
    memory_returns(Engine::IoUring);
}

#[test]
fn memory_returns_after_fifty_thousand_connections_on_epoll() {
    memory_returns(Engine::Epoll);
}

/// How often each thread of hythe has left a processor. One of which this stays the same has not run, so it has made no
/// system call either.
fn switches(pair: &Pair) -> Vec<String> {
    let of_one = |status: String| {
        let wanted = |line: &&str| line.starts_with("Name:") || line.contains("voluntary_ctxt_switches:");
        status.lines().filter(wanted).collect::<Vec<_>>().join(" ")
    };
    process::thread_statuses(pair.hythe.pid()).into_iter().map(of_one).collect()
}

on_every_cell! {
    an_idle_hythe_with_idle_flows_does_nothing_at_all(cell) {
        const WINDOW: Duration = Duration::from_secs(6);
        let pair = Pair::new(cell);
        let held = (connections(&pair, 500), datagram_flows(&pair, 500), pair.every_connection());
        // At first the kernels at both ends look for their neighbours, and the last acknowledgements are on their way.
        let quiet = wait_within(Duration::from_secs(40), || {
            let before = switches(&pair);
            pause(WINDOW);
            let after = switches(&pair);
            println!("{before:?}\n{after:?}");
            (before == after).then_some(())
        });
        assert!(quiet.is_some(), "no {WINDOW:?} without anything");
        for family in FAMILIES {
            let (guest, far) = pair.connect(Opened::ByGuest, family);
            let echo = std::thread::spawn(move || {
                let mut byte = [0];
                (&far).read_exact(&mut byte).unwrap();
                (&far).write_all(&byte).unwrap();
            });
            expect_echo(&guest, b"x");
            echo.join().unwrap();
        }
        drop(held);
        pair.finish(&["out_of_window"]);
    }
}
