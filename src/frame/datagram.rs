//! Whole UDP datagrams in frames, checksums complete.

use super::build::{self, Route};

/// The frame of a datagram, however long; `None` when it is longer than an IP packet can be. Larger than the link's
/// MTU, it is to be cut by [`super::fragment::frames`].
pub fn whole(route: &Route, source_port: u16, destination_port: u16, payload: &[u8]) -> Option<Vec<u8>> {
    let longest = if route.ip.source.is_v4() { 65_535 - 20 - 8 } else { 65_535 - 8 };
    if payload.len() > longest {
        return None;
    }
    let mut frame = vec![0; build::HEAD_MAX];
    let head = build::udp(&mut frame, route, source_port, destination_port, payload.len(), false);
    build::finish_checksum(&mut frame, head, std::iter::once(payload));
    frame.truncate(head.len);
    frame.extend_from_slice(payload);
    Some(frame)
}
