//! What it costs to write a frame's headers, with the checksum left to the link's offload.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use hythe::frame::address::{Address, Mac};
use hythe::frame::build::{self, HEAD_MAX, Route};
use hythe::frame::tcp::{Flags, Options, SegmentHead, Seq};
use hythe::frame::view::IpHead;

const PAYLOAD: u32 = 64_000;

fn routes() -> [(&'static str, Route); 2] {
    let v6 = |last| Address::v6([0xfd, 0xc4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
    let route = |source, destination| {
        let ip = IpHead { source, destination, hop_limit: 64, traffic_class: 0, dont_fragment: true };
        Route { source_mac: Mac([2, 0, 0, 0, 0, 1]), destination_mac: Mac([2, 0, 0, 0, 0, 2]), ip }
    };
    let v4 = route(Address::v4([198, 51, 100, 1]), Address::v4([192, 168, 65, 3]));
    [("v4", v4), ("v6", route(v6(1), v6(3)))]
}

fn build(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("frame_build");
    let options = Options { timestamps: Some((1, 2)), ..Options::default() };
    let segment =
        SegmentHead { seq: Seq(1), ack: Seq(2), flags: Flags::ACK, window: 502, options, len: PAYLOAD };
    let mut out = [0; HEAD_MAX];
    for (family, route) in &routes() {
        group.bench_function(format!("tcp_{family}"), |bencher| {
            bencher.iter(|| build::tcp(&mut out, black_box(route), 443, 40_000, black_box(&segment), true));
        });
        group.bench_function(format!("udp_{family}"), |bencher| {
            bencher.iter(|| build::udp(&mut out, black_box(route), 53, 40_000, PAYLOAD as usize, true));
        });
    }
    group.finish();
}

criterion_group!(benches, build);
criterion_main!(benches);
