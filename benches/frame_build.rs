//! What it costs to write a frame's headers, with the checksum left to the link's offload.

#[path = "steps/frames.rs"]
mod frames;

use criterion::{Criterion, criterion_group, criterion_main};
use frames::{build_tcp, build_udp, routes};
use hythe::frame::build::HEAD_MAX;

fn build(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("frame_build");
    let mut out = [0; HEAD_MAX];
    for (family, route) in &routes() {
        group.bench_function(format!("tcp_{family}"), |bencher| bencher.iter(|| build_tcp(&mut out, route)));
        group.bench_function(format!("udp_{family}"), |bencher| bencher.iter(|| build_udp(&mut out, route)));
    }
    group.finish();
}

criterion_group!(benches, build);
criterion_main!(benches);
