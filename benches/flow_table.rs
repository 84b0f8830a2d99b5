//! What it costs to find a flow, in a table with room for 262,144 that holds one or 200,000.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use hythe::flow::key::{FlowKey, HashSecret, Protocol};
use hythe::flow::slab::Slot;
use hythe::flow::table::{FlowTable, Handle};
use hythe::frame::address::{Address, Endpoint};

const CAPACITY: u32 = 262_144;
const FLOWS: [u32; 2] = [1, 200_000];

/// Odd, so that its multiples visit every flow; large, so that a lookup finds little of the table in a cache.
const STRIDE: u32 = 7_919;

fn key(number: u32) -> FlowKey {
    let guest = Endpoint::new(Address::v4([192, 168, 65, 3]), number as u16);
    let remote = Endpoint::new(Address::v4(number.to_be_bytes()), 443);
    FlowKey { guest, remote, protocol: Protocol::Tcp }
}

fn filled(flows: u32) -> FlowTable {
    let table = FlowTable::new(CAPACITY, HashSecret([1, 2]));
    for number in 0..flows {
        let handle = Handle { owner: 0, slot: Slot { index: number, generation: 0 } };
        assert!(table.insert(&table.hash(&key(number)), handle).is_ok(), "flow {number} has no place");
    }
    table
}

fn lookup(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("flow_table");
    for flows in FLOWS {
        let table = filled(flows);
        let mut number = 0;
        let mut next = move || {
            number = (number + STRIDE) % flows;
            number
        };
        group.bench_function(BenchmarkId::new("hit", flows), |bencher| {
            bencher.iter(|| table.find(&table.hash(black_box(&key(next())))));
        });
        group.bench_function(BenchmarkId::new("miss", flows), |bencher| {
            bencher.iter(|| table.find(&table.hash(black_box(&key(flows + next())))));
        });
    }
    group.finish();
}

fn open_and_close(criterion: &mut Criterion) {
    let table = filled(200_000);
    let handle = Handle { owner: 0, slot: Slot { index: 200_000, generation: 0 } };
    let new = table.hash(&key(200_000));
    criterion.bench_function("flow_table/insert_and_remove/200000", |bencher| {
        bencher.iter(|| {
            if let Ok(position) = table.insert(black_box(&new), handle) {
                table.remove(position);
            }
        });
    });
}

criterion_group!(benches, lookup, open_and_close);
criterion_main!(benches);
