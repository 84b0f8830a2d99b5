//! What a virtqueue costs: a chain taken, given back and published, and the driver considered for an interrupt.
//!
//! The driver makes a batch available by one store. Both sides are on one processor, so the rings lie in its cache; what
//! it costs to bring them from another one is the guest's and the machine's.
#![allow(missing_docs)]

#[path = "steps/chains.rs"]
mod chains;
#[path = "../tests/rig/driver_ring.rs"]
mod ring;

use chains::{Chains, Form};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const BATCHES: [u16; 3] = [1, 16, 64];

fn take_and_publish(criterion: &mut Criterion) {
    for (name, form) in [("indirect", Form::Indirect), ("direct", Form::Direct), ("writable", Form::Writable)]
    {
        let mut group = criterion.benchmark_group(format!("ring/{name}"));
        for batch in BATCHES {
            let mut chains = Chains::new(form);
            group.throughput(Throughput::Elements(batch.into()));
            group.bench_function(BenchmarkId::from_parameter(batch), |bencher| {
                bencher.iter(|| chains.step(batch));
            });
        }
        group.finish();
    }
}

criterion_group!(benches, take_and_publish);
criterion_main!(benches);
