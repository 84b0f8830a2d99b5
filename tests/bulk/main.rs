//! Bulk over vhost-user in one process: the very worker, link, relay and sockets, with a guest and a peer of the tests'
//! own. What is promised of the path, and is seen in no capture: no copy, no allocation.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod guest;
mod instruments;
mod machine;
mod parts;
mod recorder;
#[path = "../rig/driver_ring.rs"]
mod ring;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hythe::host::engine::Engine;
use hythe::host::engine::epoll::Epoll;
use hythe::host::engine::uring::Uring;
use hythe::link::vhost_user::Takes;
use hythe::observe::counters::Metric;

use instruments::{SHORT, Watched};
use machine::Machine;
use recorder::{Record, Recorder};

const TAKES: Takes = Takes { merged: true, partial_checksums: true };

/// Until sockets, windows and tables are as large as they get.
const WARM_UP: u64 = 64 << 20;
const BULK: u64 = 256 << 20;

/// Bulk in both directions, each byte of it by way of the guest's memory alone.
fn assert_payload_stays_where_it_is<E: Engine>(engine: impl FnOnce() -> io::Result<E> + Send + 'static) {
    let record = Arc::new(Record::default());
    let mut machine = {
        let record = record.clone();
        Machine::start(TAKES, |memory| Recorder { engine: engine().unwrap(), memory, record })
    };
    machine.send(BULK);
    machine.receive(BULK);
    let buffered = machine.metric(Metric::BytesBuffered);
    drop(machine);
    let read = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
    println!(
        "{} bytes out, {} in, {} pieces",
        read(&record.sent),
        read(&record.received),
        read(&record.pieces)
    );
    assert_eq!((read(&record.sent), buffered), (BULK as usize, 0));
    assert!(read(&record.received) >= BULK as usize, "what is peeked twice counts twice");
    assert_eq!(read(&record.astray), 0, "of {} pieces", read(&record.pieces));
}

#[test]
fn every_byte_of_bulk_goes_by_way_of_the_guests_memory_alone() {
    assert_payload_stays_where_it_is(Epoll::new);
    assert_payload_stays_where_it_is(Uring::new);
}

/// What the worker did while so much was moved in each direction, once it was warm.
fn watch_bulk<E: Engine>(
    takes: Takes,
    engine: impl FnOnce() -> io::Result<E> + Send + 'static,
) -> &'static Watched {
    let watched = Watched::new();
    let mut machine = Machine::start(takes, |_| {
        watched.watch();
        engine().unwrap()
    });
    machine.send(WARM_UP);
    machine.receive(WARM_UP);
    let before = [Metric::FramesOut, Metric::FramesIn].map(|metric| machine.metric(metric));
    watched.count(|| {
        machine.send(BULK);
        machine.receive(BULK);
    });
    let after = [Metric::FramesOut, Metric::FramesIn].map(|metric| machine.metric(metric));
    println!(
        "{} MiB each way: {} frames out, {} in; {} allocations, {} copies, {} above {SHORT} bytes, longest {}",
        BULK >> 20,
        after[0] - before[0],
        after[1] - before[1],
        Watched::read(&watched.allocations),
        Watched::read(&watched.copies),
        Watched::read(&watched.long_copies),
        Watched::read(&watched.longest),
    );
    watched
}

#[test]
fn a_warm_path_allocates_nothing() {
    for watched in [watch_bulk(TAKES, Epoll::new), watch_bulk(TAKES, Uring::new)] {
        assert_eq!(Watched::read(&watched.allocations), 0);
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn nothing_longer_than_a_head_is_copied() {
    for watched in [watch_bulk(TAKES, Epoll::new), watch_bulk(TAKES, Uring::new)] {
        assert_eq!(
            Watched::read(&watched.long_copies),
            0,
            "the longest has {} bytes",
            Watched::read(&watched.longest)
        );
        assert!(Watched::read(&watched.copies) > 0, "of heads");
    }
}

/// A guest that wants whole checksums gets its frames by way of a copy: were it not seen, the test above would prove
/// nothing.
#[test]
#[cfg(target_arch = "x86_64")]
fn where_payload_has_to_be_copied_it_is_seen() {
    let watched = watch_bulk(Takes { partial_checksums: false, ..TAKES }, Epoll::new);
    assert!(Watched::read(&watched.long_copies) as u64 > BULK / 65_536);
}
