//! What the Internet checksum costs where a link does not offload it.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hythe::frame::checksum::Sum;

/// A bare IPv4 header, a frame of the usual MTU, the largest segment.
const SIZES: [usize; 3] = [20, 1460, 65_160];

fn checksum(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("checksum");
    for size in SIZES {
        let bytes: Vec<u8> = (0..size).map(|index| index as u8).collect();
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter(|| Sum::default().with(black_box(&bytes)).finish());
        });
    }
    group.finish();
}

criterion_group!(benches, checksum);
criterion_main!(benches);
