//! What a unit of work costs in system calls and in operations of the engine: counted, so the same on every machine.
//!
//! `perf/syscalls` prints what was counted. The limits are what it was when they were set, and a little more for what a
//! busy machine does: acknowledgements that come late, and batches of bulk that are cut short (a frame at a time would be
//! above forty). A change that needs more for good reasons changes them here, for all to see.

use std::net::SocketAddr;

use crate::rig::bytes::{accept, echo, expect_echo, transfer};
use crate::rig::cell::{Cell, Engine};
use crate::rig::hythe::Hythe;
use crate::rig::site::{Family, Site};
use crate::rig::socket::receive;

/// What one unit may cost at the most.
struct Limits {
    /// One byte there and back over a connection that stands.
    round_trip: Cost,
    /// Connect, one byte there and back, close.
    connection: Cost,
    /// A datagram there and one back.
    datagrams: Cost,
    /// 64 KiB of bulk from the guest.
    segment_out: Cost,
    /// 64 KiB of bulk to the guest.
    segment_back: Cost,
}

/// System calls and operations of a unit.
#[derive(Clone, Copy, Debug)]
struct Cost {
    system_calls: f64,
    operations: f64,
}

const fn cost(system_calls: f64, operations: f64) -> Cost {
    Cost { system_calls, operations }
}

const EPOLL: Limits = Limits {
    round_trip: cost(12.0, 9.5),
    connection: cost(42.0, 28.0),
    datagrams: cost(14.0, 9.5),
    segment_out: cost(12.0, 10.0),
    segment_back: cost(12.0, 11.0),
};

const IO_URING: Limits = Limits {
    round_trip: cost(11.0, 9.5),
    connection: cost(31.0, 28.0),
    datagrams: cost(11.0, 9.5),
    segment_out: cost(8.0, 9.0),
    segment_back: cost(10.0, 10.0),
};

const ROUND_TRIPS: u32 = 2000;
const CONNECTIONS: u32 = 300;
const SEGMENTS: u32 = 2048;
const SEGMENT: u64 = 64 << 10;

/// What so many units of `work` cost, each; not above the limit.
fn expect_cost(hythe: &Hythe, what: &str, units: u32, limit: Cost, work: impl FnOnce()) {
    let read = || {
        let counters = hythe.counters();
        [counters.get("system_calls"), counters.get("operations")]
    };
    let before = read();
    work();
    let after = read();
    let [system_calls, operations] =
        [0, 1].map(|index| (after[index] - before[index]) as f64 / f64::from(units));
    println!("{what:28} {system_calls:6.2} system calls {operations:6.2} operations");
    assert!(
        system_calls <= limit.system_calls && operations <= limit.operations,
        "{what}: {system_calls:.2} system calls and {operations:.2} operations, where {limit:?} is allowed"
    );
}

fn expect_costs(engine: Engine, limits: &Limits) {
    let site = Site::new();
    // How often a worker looks before it sleeps depends on the machine.
    let hythe = Hythe::of(&site.host, Cell::new(engine, 1)).options("--spin-us 0").run();
    println!("{engine:?}");

    let listener = site.far.listen(Family::V4.far(), 0);
    let name = listener.local_addr().unwrap();
    let server = echo(listener, 1);
    let stream = hythe.guest.connect(name).unwrap();
    stream.set_nodelay(true).unwrap();
    expect_echo(&stream, b"x");
    expect_cost(&hythe, "a round trip", ROUND_TRIPS, limits.round_trip, || {
        (0..ROUND_TRIPS).for_each(|_| expect_echo(&stream, b"x"));
    });
    drop(stream);
    server.finish();

    let listener = site.far.listen(Family::V4.far(), 0);
    let name = listener.local_addr().unwrap();
    let server = echo(listener, CONNECTIONS as usize);
    expect_cost(&hythe, "a connection", CONNECTIONS, limits.connection, || {
        (0..CONNECTIONS).for_each(|_| expect_echo(&hythe.guest.connect(name).unwrap(), b"x"));
        server.finish();
    });

    expect_datagrams(&site, &hythe, limits.datagrams);

    let listener = site.far.listen(Family::V4.far(), 0);
    let guest = hythe.guest.connect(listener.local_addr().unwrap()).unwrap();
    let (far, _) = accept(&listener);
    let len = SEGMENT * u64::from(SEGMENTS);
    for (what, limit, from, to) in [
        ("64 KiB from the guest", limits.segment_out, &guest, &far),
        ("64 KiB to the guest", limits.segment_back, &far, &guest),
    ] {
        transfer(from, to, 1, len);
        expect_cost(&hythe, what, SEGMENTS, limit, || transfer(from, to, 2, len));
    }
    drop((guest, far));
    hythe.stop().assert_clean(0);
}

fn expect_datagrams(site: &Site, hythe: &Hythe, limit: Cost) {
    let far = site.far.udp(Family::V4.far(), 0);
    let guest = hythe.guest.udp(Family::V4.any(), 0);
    let to: SocketAddr = far.local_addr().unwrap();
    let exchange = || {
        let mut byte = [0];
        guest.send_to(b"x", to).unwrap();
        let (_, from) = receive(&far, &mut byte).unwrap();
        far.send_to(b"y", from).unwrap();
        receive(&guest, &mut byte).unwrap();
    };
    exchange();
    expect_cost(hythe, "a datagram there and one back", ROUND_TRIPS, limit, || {
        (0..ROUND_TRIPS).for_each(|_| exchange());
    });
}

#[test]
fn work_costs_no_more_system_calls_than_it_should_on_epoll() {
    expect_costs(Engine::Epoll, &EPOLL);
}

#[test]
fn work_costs_no_more_system_calls_than_it_should_on_io_uring() {
    expect_costs(Engine::IoUring, &IO_URING);
}
