//! What a link leaves to the guest, done here for guests that do not take it.
//!
//! Frames are cut to size before they come to a link, which says in its [`super::Capabilities`] what it takes whole.

use crate::frame::checksum::Sum;

use super::InboundHead;

/// Completes the partial checksum of a frame, over its payload.
pub fn checksum(frame: &mut [u8], head: &InboundHead<'_>) {
    let at = head.head.transport_start + head.head.checksum_offset;
    let value = Sum::default().with(&frame[head.head.transport_start..]).finish();
    // RFC 768: a UDP checksum of zero is sent as all ones; to TCP both are the same number.
    frame[at..at + 2].copy_from_slice(&if value == 0 { 0xffff } else { value }.to_be_bytes());
}
