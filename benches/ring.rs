//! What a virtqueue costs: a chain taken, given back and published, and the driver considered for an interrupt.
//!
//! The driver makes a batch available by one store. Both sides are on one processor, so the rings lie in its cache; what
//! it costs to bring them from another one is the guest's and the machine's.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../tests/rig/driver_ring.rs"]
mod ring;

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hythe::io::Piece;
use hythe::link::virtqueue::{Chain, Direction, Parts, SplitQueue};
use ring::{INDIRECT, Memory, NEXT, Ring, START, WRITE};

const SIZE: u16 = 256;
const BATCHES: [u16; 3] = [1, 16, 64];
const TABLES: u64 = START + Ring::LEN;
const BUFFERS: u64 = TABLES + SIZE as u64 * 64;
const MEMORY: usize = 4 << 20;

/// How a chain is written down.
#[derive(Clone, Copy)]
enum Form {
    /// A table of a head and payload.
    Indirect,
    /// The same in descriptors of the queue.
    Direct,
    /// One buffer to be written, as receive queues have them.
    Writable,
}

/// A queue and its driver, with as many chains as there is room for.
fn queue(form: Form) -> (SplitQueue, Ring) {
    let memory = Memory::new(MEMORY);
    let ring = Ring::new(&memory, START, SIZE);
    for slot in 0..SIZE {
        let buffer = BUFFERS + u64::from(slot) * 4096;
        match form {
            Form::Indirect => {
                let table = TABLES + u64::from(slot) * 64;
                memory.describe(table, buffer, 66, NEXT, 1);
                memory.describe(table + 16, buffer + 1024, 1448, 0, 0);
                ring.describe(slot, table, 32, INDIRECT, 0);
            }
            Form::Direct => {
                // Two descriptors a chain: the second half of the ring's entries names the same chains again.
                let head = slot * 2 % SIZE;
                ring.describe(head, buffer, 66, NEXT, head + 1);
                ring.describe(head + 1, buffer + 1024, 1448, 0, 0);
                ring.set_entry(slot, head);
            }
            Form::Writable => ring.describe(slot, buffer, 1536, WRITE, 0),
        }
    }
    let parts = Parts { event_index: true, indirect: true, ..ring.parts() };
    (SplitQueue::new(memory.map.clone(), &parts).unwrap(), ring)
}

fn take_and_publish(criterion: &mut Criterion) {
    for (name, form) in [("indirect", Form::Indirect), ("direct", Form::Direct), ("writable", Form::Writable)]
    {
        let mut group = criterion.benchmark_group(format!("ring/{name}"));
        let direction =
            if matches!(form, Form::Writable) { Direction::ToDriver } else { Direction::FromDriver };
        for batch in BATCHES {
            let (mut queue, mut ring) = queue(form);
            let (mut pieces, mut chains): (Vec<Piece>, Vec<Chain>) = (Vec::new(), Vec::new());
            group.throughput(Throughput::Elements(batch.into()));
            group.bench_function(BenchmarkId::from_parameter(batch), |bencher| {
                bencher.iter(|| {
                    ring.offer(batch);
                    ring.set_used_event(batch - 1);
                    while let Ok(Some(chain)) = queue.take(direction, &mut pieces) {
                        chains.push(chain);
                    }
                    assert_eq!(black_box(&chains).len(), usize::from(batch));
                    black_box(&pieces);
                    for chain in chains.drain(..) {
                        queue.give_back(chain, chain.bytes);
                    }
                    pieces.clear();
                    queue.publish();
                    assert!(queue.wants_interrupt());
                    ring.skip_used();
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, take_and_publish);
criterion_main!(benches);
