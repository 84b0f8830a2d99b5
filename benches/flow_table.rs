//! What it costs to find a flow, and to find that there is none, in a table with room for 262,144 that holds one, 200,000 or
//! all of them; and to open one more and close it.

#[path = "steps/flows.rs"]
mod flows;

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use flows::{CAPACITY, Flows};
use hythe::flow::slab::Slot;
use hythe::flow::table::Handle;

const MANY: u32 = 200_000;

fn lookup(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("flow_table");
    for count in [1, MANY, CAPACITY] {
        let mut flows = Flows::new(count);
        group.bench_function(BenchmarkId::new("hit", count), |bencher| {
            bencher.iter(|| assert!(flows.hit()));
        });
        group.bench_function(BenchmarkId::new("miss", count), |bencher| {
            bencher.iter(|| assert!(flows.miss()));
        });
    }
    group.finish();
}

fn open_and_close(criterion: &mut Criterion) {
    let flows = Flows::new(MANY);
    let handle = Handle { owner: 0, slot: Slot { index: MANY, generation: 0 } };
    let new = flows.new_flow();
    criterion.bench_function("flow_table/insert_and_remove/200000", |bencher| {
        bencher.iter(|| {
            if let Ok(position) = flows.table.insert(black_box(&new), handle) {
                flows.table.remove(position);
            }
        });
    });
}

criterion_group!(benches, lookup, open_and_close);
criterion_main!(benches);
