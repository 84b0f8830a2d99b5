//! Cutting a datagram that is larger than the guest's MTU into fragments (RFC 791, 3.2; RFC 8200, 4.5).

use std::ops::Range;

use super::view::Fragment;

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
