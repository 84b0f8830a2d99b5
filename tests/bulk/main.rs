//! Bulk over vhost-user in one process: the very worker, link, relay and sockets, with a guest and a peer of the tests'
//! own. What is promised of the path, and is seen in no capture.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod guest;
mod machine;
mod recorder;
mod ring;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hythe::host::engine::Engine;
use hythe::host::engine::epoll::Epoll;
use hythe::host::engine::uring::Uring;
use hythe::link::vhost_user::Takes;
use hythe::observe::counters::Metric;

use machine::Machine;
use recorder::{Record, Recorder};

const TAKES: Takes = Takes { merged: true, partial_checksums: true };

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
