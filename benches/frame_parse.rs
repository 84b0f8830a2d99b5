//! What it costs to read a frame's headers.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use hythe::frame::address::{Address, Mac};
use hythe::frame::build::{self, HEAD_MAX, Route};
use hythe::frame::tcp::{Flags, Options, SegmentHead, Seq};
use hythe::frame::view::{IpHead, View};

const PAYLOAD: u32 = 64_000;

fn route(source: Address, destination: Address) -> Route {
    let ip = IpHead { source, destination, hop_limit: 64, traffic_class: 0, dont_fragment: true };
    Route { source_mac: Mac([2, 0, 0, 0, 0, 1]), destination_mac: Mac([2, 0, 0, 0, 0, 2]), ip }
}

fn v4() -> Route {
    route(Address::v4([192, 168, 65, 3]), Address::v4([198, 51, 100, 1]))
}

fn v6() -> Route {
    let address = |last| Address::v6([0xfd, 0xc4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
    route(address(3), address(1))
}

fn tcp_head(route: &Route) -> Vec<u8> {
    let options = Options { timestamps: Some((1, 2)), ..Options::default() };
    let segment =
        SegmentHead { seq: Seq(1), ack: Seq(2), flags: Flags::ACK, window: 502, options, len: PAYLOAD };
    let mut bytes = vec![0; HEAD_MAX];
    let head = build::tcp(&mut bytes, route, 40_000, 443, &segment, true);
    bytes.truncate(head.len);
    bytes
}

fn udp_head(route: &Route) -> Vec<u8> {
    let mut bytes = vec![0; HEAD_MAX];
    let head = build::udp(&mut bytes, route, 40_000, 53, PAYLOAD as usize, true);
    bytes.truncate(head.len);
    bytes
}

fn parse(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("frame_parse");
    let heads = [
        ("tcp_v4", tcp_head(&v4())),
        ("tcp_v6", tcp_head(&v6())),
        ("udp_v4", udp_head(&v4())),
        ("udp_v6", udp_head(&v6())),
    ];
    for (name, head) in heads {
        let frame_len = head.len() + PAYLOAD as usize;
        assert!(View::parse(&head, frame_len).is_ok(), "{name}");
        group.bench_function(name, |bencher| {
            bencher.iter(|| View::parse(black_box(&head), frame_len).is_ok());
        });
    }
    group.finish();
}

criterion_group!(benches, parse);
criterion_main!(benches);
