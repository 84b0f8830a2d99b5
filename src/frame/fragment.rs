//! Cutting a datagram that is larger than the guest's MTU into fragments (RFC 791, 3.2; RFC 8200, 4.5).

use std::ops::Range;

use super::build::{self, Route};
use super::view::{ETHERNET_LEN, Fragment};

/// The pieces of `len` bytes of an upper layer for a guest with `mtu`, each with the bytes that it carries.
/// `mtu` is at least 576, so that a piece always has room.
pub fn cut(
    len: usize,
    mtu: usize,
    v4: bool,
    id: u32,
    protocol: u8,
) -> impl Iterator<Item = (Fragment, Range<usize>)> {
    let header = if v4 { 20 } else { 40 + 8 };
    // Offsets count in units of eight bytes.
    let piece = mtu.saturating_sub(header).max(8) & !7;
    (0..len).step_by(piece).map(move |offset| {
        let end = (offset + piece).min(len);
        (Fragment { id, offset, more: end < len, protocol }, offset..end)
    })
}

/// The frames in which the packet of `frame` goes to a guest with `mtu`: itself, or its fragments.
pub fn frames(frame: &[u8], route: &Route, protocol: u8, mtu: u16, id: u32) -> Vec<Vec<u8>> {
    let v4 = route.ip.source.is_v4();
    let transport_start = ETHERNET_LEN + if v4 { 20 } else { 40 };
    let Some(upper) = frame.get(transport_start..).filter(|_| frame.len() - ETHERNET_LEN > mtu as usize)
    else {
        return vec![frame.to_vec()];
    };
    cut(upper.len(), mtu as usize, v4, id, protocol)
        .map(|(piece, bytes)| {
            let mut out = vec![0; build::HEAD_MAX];
            let head_len = build::fragment(&mut out, route, piece, bytes.len());
            out.truncate(head_len);
            out.extend_from_slice(&upper[bytes]);
            out
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pieces_are_whole_and_fit() {
        for (len, mtu, v4) in
            [(65_515, 1500, true), (1481, 1500, true), (65_515, 1280, false), (8, 576, true)]
        {
            let pieces: Vec<_> = cut(len, mtu, v4, 9, 17).collect();
            let mut at = 0;
            for (index, (piece, bytes)) in pieces.iter().enumerate() {
                assert_eq!((piece.offset, bytes.start), (at, at));
                assert_eq!(piece.more, index + 1 < pieces.len());
                assert!(bytes.len() + if v4 { 20 } else { 48 } <= mtu);
                assert!(!piece.more || bytes.len() % 8 == 0);
                at = bytes.end;
            }
            assert_eq!(at, len);
        }
    }
}
