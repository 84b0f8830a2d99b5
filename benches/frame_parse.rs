//! What it costs to read a frame's headers.

#[path = "steps/frames.rs"]
mod frames;

use criterion::{Criterion, criterion_group, criterion_main};
use frames::{build_tcp, build_udp, head, routes};

fn parse(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("frame_parse");
    for (family, route) in &routes() {
        for (name, head) in [("tcp", head(build_tcp, route)), ("udp", head(build_udp, route))] {
            assert!(frames::parse(&head), "{name}_{family}");
            group.bench_function(format!("{name}_{family}"), |bencher| bencher.iter(|| frames::parse(&head)));
        }
    }
    group.finish();
}

criterion_group!(benches, parse);
criterion_main!(benches);
