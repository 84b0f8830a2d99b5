//! What a worker costs as a whole: frames out of a guest's rings to sockets, bytes of sockets back, and the
//! acknowledgements; with a guest and sockets in memory, so that no system call, copy of payload or other program is in it.
//!
//! Timed are the worker's steps alone, from a wake-up until it would sleep again; what guest and host do in between is not.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../tests/bulk/guest.rs"]
mod guest;
#[path = "steps/host.rs"]
mod host;
#[path = "steps/machine.rs"]
mod machine;
#[path = "../tests/bulk/parts.rs"]
mod parts;
#[path = "../tests/rig/driver_ring.rs"]
mod ring;

use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use machine::{Machine, Work};

fn step(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("worker_step");
    for (name, work, elements) in [
        ("one_segment_out", Work::Out(1), 1),
        ("four_segments_out", Work::Out(4), 4),
        ("one_segment_back", Work::Back(1), 1),
        ("four_segments_back", Work::Back(4), 4),
        ("one_byte_there_and_back", Work::RoundTrip, 1),
    ] {
        let mut machine = Machine::new();
        group.throughput(Throughput::Elements(elements));
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|rounds| {
                let mut time = Duration::ZERO;
                for _ in 0..rounds {
                    machine.round(work, |steps| {
                        let start = Instant::now();
                        steps.step();
                        time += start.elapsed();
                    });
                }
                time
            });
        });
    }
    group.finish();
}

criterion_group!(benches, step);
criterion_main!(benches);
