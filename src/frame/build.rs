//! Headers of frames to the guest, written into caller's bytes.
//!
//! The TCP and UDP writers leave the payload to the caller (it lies in the link's buffers): with `partial` the
//! checksum field gets the pseudo-header's sum and the link's offload completes it; without, it gets the sum that
//! [`finish_checksum`] completes over the payload.

use super::address::Mac;
use super::checksum::{self, Sum};
use super::protocol::{self, IPV6_FRAGMENT, TCP, UDP};
use super::tcp::{self, SegmentHead};
use super::view::{ETHERNET_LEN, Fragment, IpHead};

/// Where a frame goes: both MACs and the IP header.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    /// Source MAC: the gateway's.
    pub source_mac: Mac,
    /// Destination MAC: the guest's.
    pub destination_mac: Mac,
    /// The IP header.
    pub ip: IpHead,
}

/// Headers that were written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Head {
    /// Their length in bytes: the payload comes after.
    pub len: usize,
    /// Where the transport header starts.
    pub transport_start: usize,
    /// Where the checksum lies, from the transport header's start.
    pub checksum_offset: usize,
}

/// The longest head that is written here: Ethernet, IPv6, TCP with all options.
pub const HEAD_MAX: usize = ETHERNET_LEN + 40 + tcp::HEADER_MAX;

/// The length of the head of a TCP segment whose own header has `header_len` bytes.
pub fn tcp_head_len(v4: bool, header_len: usize) -> usize {
    ETHERNET_LEN + if v4 { 20 } else { 40 } + header_len
}

/// The length of the head of a UDP datagram.
pub fn udp_head_len(v4: bool) -> usize {
    ETHERNET_LEN + if v4 { 20 } else { 40 } + 8
}

/// Writes Ethernet and IP for `payload_len` bytes behind them; returns the length written.
fn ip(out: &mut [u8], route: &Route, protocol: u8, payload_len: usize, fragment: Option<Fragment>) -> usize {
    out[0..6].copy_from_slice(&route.destination_mac.0);
    out[6..12].copy_from_slice(&route.source_mac.0);
    let ip = &route.ip;
    if ip.source.is_v4() {
        out[12..14].copy_from_slice(&[0x08, 0x00]);
        let header = &mut out[ETHERNET_LEN..ETHERNET_LEN + 20];
        let (id, flags_offset) = match fragment {
            Some(piece) => (piece.id as u16, (u16::from(piece.more) << 13) | (piece.offset / 8) as u16),
            None => (0, u16::from(ip.dont_fragment) << 14),
        };
        header[0] = 0x45;
        header[1] = ip.traffic_class;
        header[2..4].copy_from_slice(&((20 + payload_len) as u16).to_be_bytes());
        header[4..6].copy_from_slice(&id.to_be_bytes());
        header[6..8].copy_from_slice(&flags_offset.to_be_bytes());
        header[8] = ip.hop_limit;
        header[9] = protocol;
        header[10..12].fill(0);
        header[12..16].copy_from_slice(&ip.source.v4_octets());
        header[16..20].copy_from_slice(&ip.destination.v4_octets());
        let sum = Sum::default().with(header).finish();
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        return ETHERNET_LEN + 20;
    }
    out[12..14].copy_from_slice(&[0x86, 0xdd]);
    let extension = if fragment.is_some() { 8 } else { 0 };
    let header = &mut out[ETHERNET_LEN..ETHERNET_LEN + 40 + extension];
    header[0] = 0x60 | (ip.traffic_class >> 4);
    header[1] = ip.traffic_class << 4;
    header[2..4].fill(0);
    header[4..6].copy_from_slice(&((extension + payload_len) as u16).to_be_bytes());
    header[6] = protocol;
    header[7] = ip.hop_limit;
    header[8..24].copy_from_slice(&ip.source.octets());
    header[24..40].copy_from_slice(&ip.destination.octets());
    if let Some(piece) = fragment {
        header[6] = IPV6_FRAGMENT;
        header[40] = protocol;
        header[41] = 0;
        header[42..44].copy_from_slice(&(piece.offset as u16 | u16::from(piece.more)).to_be_bytes());
        header[44..48].copy_from_slice(&piece.id.to_be_bytes());
    }
    ETHERNET_LEN + 40 + extension
}

fn place_checksum(
    out: &mut [u8],
    route: &Route,
    head: Head,
    protocol: u8,
    payload_len: usize,
    partial: bool,
) {
    let transport_len = head.len - head.transport_start + payload_len;
    let mut sum = checksum::pseudo_header(route.ip.source, route.ip.destination, protocol, transport_len);
    if !partial {
        sum = sum.with(&out[head.transport_start..head.len]);
    }
    let at = head.transport_start + head.checksum_offset;
    out[at..at + 2].copy_from_slice(&sum.partial().to_be_bytes());
}

/// Writes the headers of a TCP segment of `segment.len` payload bytes.
pub fn tcp(
    out: &mut [u8],
    route: &Route,
    source: u16,
    destination: u16,
    segment: &SegmentHead,
    partial: bool,
) -> Head {
    let v4 = route.ip.source.is_v4();
    let transport_start = ETHERNET_LEN + if v4 { 20 } else { 40 };
    let tcp_len = tcp::write(&mut out[transport_start..], source, destination, segment);
    ip(out, route, TCP, tcp_len + segment.len as usize, None);
    let head = Head { len: transport_start + tcp_len, transport_start, checksum_offset: 16 };
    place_checksum(out, route, head, TCP, segment.len as usize, partial);
    head
}

/// Writes the headers of a UDP datagram of `len` payload bytes.
pub fn udp(out: &mut [u8], route: &Route, source: u16, destination: u16, len: usize, partial: bool) -> Head {
    let transport_start = ip(out, route, UDP, 8 + len, None);
    let header = &mut out[transport_start..transport_start + 8];
    header[0..2].copy_from_slice(&source.to_be_bytes());
    header[2..4].copy_from_slice(&destination.to_be_bytes());
    header[4..6].copy_from_slice(&((8 + len) as u16).to_be_bytes());
    header[6..8].fill(0);
    let head = Head { len: transport_start + 8, transport_start, checksum_offset: 6 };
    place_checksum(out, route, head, UDP, len, partial);
    head
}

/// Completes the checksum of a head that was written without `partial`, over the payload's pieces. Pieces but the
/// last must be of even length.
pub fn finish_checksum<'p>(out: &mut [u8], head: Head, payload: impl Iterator<Item = &'p [u8]>) {
    let at = head.transport_start + head.checksum_offset;
    let sum = Sum::default().with(&out[at..at + 2]);
    let value = payload.fold(sum, Sum::with).finish();
    // RFC 768: a UDP checksum of zero is sent as all ones. To TCP and ICMP both are the same number.
    out[at..at + 2].copy_from_slice(&if value == 0 { 0xffff } else { value }.to_be_bytes());
}

/// Writes a whole frame with an ICMP or ICMPv6 `message` whose checksum field (bytes 2 and 3) is filled in here.
/// Returns the frame's length.
pub fn icmp(out: &mut [u8], route: &Route, message: &[u8]) -> usize {
    let v4 = route.ip.source.is_v4();
    let protocol = protocol::icmp(v4);
    let start = ip(out, route, protocol, message.len(), None);
    let body = &mut out[start..start + message.len()];
    body.copy_from_slice(message);
    body[2..4].fill(0);
    let sum = if v4 {
        Sum::default()
    } else {
        // RFC 4443, 2.3: ICMPv6 sums the pseudo-header, ICMP does not.
        checksum::pseudo_header(route.ip.source, route.ip.destination, protocol, message.len())
    };
    let sum = sum.with(body).finish();
    body[2..4].copy_from_slice(&sum.to_be_bytes());
    start + message.len()
}

/// Writes Ethernet and IP headers, and IPv6's fragment header, for one fragment of `len` bytes of a packet of
/// `piece.protocol`; returns the length written, behind which the fragment's bytes belong.
pub fn fragment(out: &mut [u8], route: &Route, piece: Fragment, len: usize) -> usize {
    ip(out, route, piece.protocol, len, Some(piece))
}
