//! Heads of frames between a guest and the world.
#![allow(dead_code)]

use std::hint::black_box;

use hythe::frame::address::{Address, Mac};
use hythe::frame::build::{self, HEAD_MAX, Head, Route};
use hythe::frame::tcp::{Flags, Options, SegmentHead, Seq};
use hythe::frame::view::{IpHead, View};

/// A segment for the guest's kernel to cut.
pub const PAYLOAD: u32 = 64_000;

/// By the names of the families.
pub fn routes() -> [(&'static str, Route); 2] {
    let v6 = |last| Address::v6([0xfd, 0xc4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
    let route = |source, destination| {
        let ip = IpHead { source, destination, hop_limit: 64, traffic_class: 0, dont_fragment: true };
        Route { source_mac: Mac([2, 0, 0, 0, 0, 1]), destination_mac: Mac([2, 0, 0, 0, 0, 2]), ip }
    };
    let v4 = route(Address::v4([198, 51, 100, 1]), Address::v4([192, 168, 65, 3]));
    [("v4", v4), ("v6", route(v6(1), v6(3)))]
}

/// With timestamps, as nearly every segment is.
fn segment() -> SegmentHead {
    let options = Options { timestamps: Some((1, 2)), ..Options::default() };
    SegmentHead { seq: Seq(1), ack: Seq(2), flags: Flags::ACK, window: 502, options, len: PAYLOAD }
}

/// Writes a TCP head, its checksum left to the link's offload.
pub fn build_tcp(out: &mut [u8; HEAD_MAX], route: &Route) -> Head {
    build::tcp(out, black_box(route), 443, 40_000, black_box(&segment()), true)
}

/// The same of UDP.
pub fn build_udp(out: &mut [u8; HEAD_MAX], route: &Route) -> Head {
    build::udp(out, black_box(route), 53, 40_000, PAYLOAD as usize, true)
}

/// A head's bytes.
pub fn head(build: fn(&mut [u8; HEAD_MAX], &Route) -> Head, route: &Route) -> Vec<u8> {
    let mut bytes = [0; HEAD_MAX];
    let head = build(&mut bytes, route);
    bytes[..head.len].to_vec()
}

/// Reads a head.
pub fn parse(head: &[u8]) -> bool {
    View::parse(black_box(head), head.len() + PAYLOAD as usize).is_ok()
}
