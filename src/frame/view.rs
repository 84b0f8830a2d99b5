//! The one parse of a frame from the guest.
//!
//! The caller hands in the frame's head, a private copy of its first bytes, and the length of the whole frame; the
//! payload is never read here. Everything a header claims is checked against that length.

use etherparse::{
    Ethernet2HeaderSlice, Ipv4HeaderSlice, Ipv6FragmentHeaderSlice, Ipv6HeaderSlice, Ipv6RawExtHeaderSlice,
    UdpHeaderSlice, ether_type, ip_number,
};

use super::address::{Address, Mac};
use super::checksum;
use super::drop_reason::DropReason;
use super::tcp::{self, TcpView};

/// The length of an Ethernet header, in bytes.
pub const ETHERNET_LEN: usize = 14;

/// As many bytes as a frame's head must hold (or the whole frame, where it is shorter): Ethernet, IPv6, a few
/// extension headers, TCP with all its options.
pub const HEAD_LEN: usize = 192;

/// A frame, parsed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct View<'f> {
    /// Source MAC.
    pub source_mac: Mac,
    /// Destination MAC.
    pub destination_mac: Mac,
    /// What the frame carries.
    pub content: Content<'f>,
}

/// What a frame carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(
    clippy::large_enum_variant,
    reason = "a view lives on the stack for one frame; boxing would allocate"
)]
pub enum Content<'f> {
    /// An ARP packet: the bytes behind the Ethernet header.
    Arp(&'f [u8]),
    /// An IPv4 or IPv6 packet.
    Ip(Packet<'f>),
}

/// The fields of an IPv4 or IPv6 header that hythe uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IpHead {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Time to live, hop limit.
    pub hop_limit: u8,
    /// Type of service, traffic class: DSCP in the upper six bits, ECN in the lower two.
    pub traffic_class: u8,
    /// The packet may not be fragmented on its way. Always so in IPv6.
    pub dont_fragment: bool,
}

/// An IP packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet<'f> {
    /// The IP header.
    pub ip: IpHead,
    /// Where the upper layer begins, in bytes from the start of the frame.
    pub transport_start: usize,
    /// Bytes of the upper layer, its header included.
    pub transport_len: usize,
    /// The upper layer.
    pub transport: Transport<'f>,
}

/// The upper layer of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(
    clippy::large_enum_variant,
    reason = "a view lives on the stack for one frame; boxing would allocate"
)]
pub enum Transport<'f> {
    /// TCP.
    Tcp(TcpView),
    /// UDP.
    Udp(UdpView),
    /// ICMP or ICMPv6: the part of the message that the head holds.
    Icmp(&'f [u8]),
    /// A piece of a larger packet.
    Fragment(Fragment),
    /// Another protocol.
    Other(u8),
}

/// A UDP header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UdpView {
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// Payload bytes.
    pub len: usize,
    /// The checksum field; zero says that there is none (IPv4 only).
    pub checksum: u16,
}

/// Which piece of which packet a fragment is (RFC 791, 3.1; RFC 8200, 4.5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fragment {
    /// Identification.
    pub id: u32,
    /// Where the piece belongs, in bytes.
    pub offset: usize,
    /// Whether more pieces follow it.
    pub more: bool,
    /// The protocol of the whole.
    pub protocol: u8,
}

impl<'f> View<'f> {
    /// Parses a frame of `frame_len` bytes, the first of which are `head` (all, or at least [`HEAD_LEN`] of them).
    pub fn parse(head: &'f [u8], frame_len: usize) -> Result<Self, DropReason> {
        let ethernet = Ethernet2HeaderSlice::from_slice(head).map_err(|_| DropReason::Truncated)?;
        let content = match ethernet.ether_type() {
            ether_type::IPV4 => Content::Ip(parse_v4(head, frame_len)?),
            ether_type::IPV6 => Content::Ip(parse_v6(head, frame_len)?),
            ether_type::ARP => Content::Arp(&head[ETHERNET_LEN..]),
            _ => return Err(DropReason::EtherType),
        };
        Ok(Self { source_mac: Mac(ethernet.source()), destination_mac: Mac(ethernet.destination()), content })
    }
}

fn parse_v4(head: &[u8], frame_len: usize) -> Result<Packet<'_>, DropReason> {
    let header = Ipv4HeaderSlice::from_slice(&head[ETHERNET_LEN..]).map_err(|error| match error {
        etherparse::err::ipv4::HeaderSliceError::Len(_) => DropReason::Truncated,
        etherparse::err::ipv4::HeaderSliceError::Content(_) => DropReason::Malformed,
    })?;
    let total_len = header.total_len() as usize;
    let header_len = header.slice().len();
    if ETHERNET_LEN + total_len > frame_len {
        return Err(DropReason::Truncated);
    }
    let transport_len = total_len.checked_sub(header_len).ok_or(DropReason::Malformed)?;
    if checksum::Sum::default().with(header.slice()).partial() != 0xffff {
        return Err(DropReason::Checksum);
    }
    let ip = IpHead {
        source: Address::v4(header.source()),
        destination: Address::v4(header.destination()),
        hop_limit: header.ttl(),
        traffic_class: head[ETHERNET_LEN + 1],
        dont_fragment: header.dont_fragment(),
    };
    let fragment = header.is_fragmenting_payload().then(|| Fragment {
        id: u32::from(header.identification()),
        offset: header.fragments_offset().value() as usize * 8,
        more: header.more_fragments(),
        protocol: header.protocol().0,
    });
    let transport_start = ETHERNET_LEN + header_len;
    transport(head, ip, transport_start, transport_len, header.protocol().0, fragment)
}

/// The widest link there is.
const LINK_MTU_MAX: usize = 65_520;

fn parse_v6(head: &[u8], frame_len: usize) -> Result<Packet<'_>, DropReason> {
    let header = Ipv6HeaderSlice::from_slice(&head[ETHERNET_LEN..]).map_err(|error| match error {
        etherparse::err::ipv6::HeaderSliceError::Len(_) => DropReason::Truncated,
        etherparse::err::ipv6::HeaderSliceError::Content(_) => DropReason::Malformed,
    })?;
    let mut ip = IpHead {
        source: Address::v6(header.source()),
        destination: Address::v6(header.destination()),
        hop_limit: header.hop_limit(),
        traffic_class: header.traffic_class(),
        // RFC 8200, 4.5: only the sender may cut a packet. One that no link is wide enough for has been cut.
        dont_fragment: 40 + usize::from(header.payload_length()) <= LINK_MTU_MAX,
    };
    // A mapped address in an IPv6 header would be an IPv4 address to everything behind this point.
    if ip.source.is_v4() || ip.destination.is_v4() {
        return Err(DropReason::Martian);
    }
    let mut start = ETHERNET_LEN + 40;
    let end = start + header.payload_length() as usize;
    if end > frame_len {
        return Err(DropReason::Truncated);
    }
    let mut next = header.next_header();
    let mut fragment = None;
    // RFC 8200, 4.1: hop-by-hop and destination options may precede the upper layer. They carry nothing for a host
    // that ends the packet. Routing headers are not followed: nothing is forwarded.
    while fragment.is_none() {
        let rest = &head[start.min(head.len())..end.min(head.len())];
        match next {
            ip_number::IPV6_HOP_BY_HOP | ip_number::IPV6_DEST_OPTIONS => {
                let options =
                    Ipv6RawExtHeaderSlice::from_slice(rest).map_err(|_| DropReason::ExtensionHeaders)?;
                start += options.slice().len();
                next = options.next_header();
            }
            ip_number::IPV6_FRAG => {
                let piece =
                    Ipv6FragmentHeaderSlice::from_slice(rest).map_err(|_| DropReason::ExtensionHeaders)?;
                start += piece.slice().len();
                next = piece.next_header();
                // Its sender cuts what is too long for the path.
                ip.dont_fragment = false;
                // RFC 6946: an "atomic" fragment is a whole packet.
                if piece.is_fragmenting_payload() {
                    fragment = Some(Fragment {
                        id: piece.identification(),
                        offset: piece.fragment_offset().value() as usize * 8,
                        more: piece.more_fragments(),
                        protocol: next.0,
                    });
                }
            }
            ip_number::IPV6_ROUTE | ip_number::AUTH => return Err(DropReason::ExtensionHeaders),
            _ => break,
        }
    }
    transport(head, ip, start, end - start, next.0, fragment)
}

fn transport(
    head: &[u8],
    ip: IpHead,
    start: usize,
    len: usize,
    protocol: u8,
    fragment: Option<Fragment>,
) -> Result<Packet<'_>, DropReason> {
    let bytes = &head[start.min(head.len())..(start + len).min(head.len())];
    let transport = match ip_number_of(protocol, ip.source.is_v4()) {
        _ if fragment.is_some() => match fragment {
            Some(piece) => Transport::Fragment(piece),
            None => return Err(DropReason::Malformed),
        },
        Upper::Tcp => Transport::Tcp(tcp::parse(bytes, len)?),
        Upper::Udp => Transport::Udp(parse_udp(bytes, len)?),
        Upper::Icmp => Transport::Icmp(bytes),
        Upper::Other => Transport::Other(protocol),
    };
    Ok(Packet { ip, transport_start: start, transport_len: len, transport })
}

enum Upper {
    Tcp,
    Udp,
    Icmp,
    Other,
}

fn ip_number_of(protocol: u8, v4: bool) -> Upper {
    match (etherparse::IpNumber(protocol), v4) {
        (ip_number::TCP, _) => Upper::Tcp,
        (ip_number::UDP, _) => Upper::Udp,
        (ip_number::ICMP, true) | (ip_number::IPV6_ICMP, false) => Upper::Icmp,
        _ => Upper::Other,
    }
}

fn parse_udp(bytes: &[u8], total: usize) -> Result<UdpView, DropReason> {
    let header = UdpHeaderSlice::from_slice(bytes).map_err(|_| DropReason::Truncated)?;
    let length = header.length() as usize;
    if length > total {
        return Err(DropReason::Truncated);
    }
    Ok(UdpView {
        source_port: header.source_port(),
        destination_port: header.destination_port(),
        len: length.checked_sub(8).ok_or(DropReason::Malformed)?,
        checksum: header.checksum(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::build;
    use crate::frame::tcp::{Flags, SegmentHead};
    use proptest::prelude::*;

    fn frame(source: &str, destination: &str, payload: &[u8]) -> Vec<u8> {
        let route = build::Route {
            source_mac: Mac([2, 0, 0, 0, 0, 1]),
            destination_mac: Mac([2, 0, 0, 0, 0, 2]),
            ip: IpHead {
                source: source.parse::<std::net::IpAddr>().unwrap().into(),
                destination: destination.parse::<std::net::IpAddr>().unwrap().into(),
                hop_limit: 64,
                traffic_class: 0xb8,
                dont_fragment: true,
            },
        };
        let segment = SegmentHead { flags: Flags::SYN, len: payload.len() as u32, ..SegmentHead::default() };
        let mut out = vec![0; 256];
        let head = build::tcp(&mut out, &route, 1000, 2000, &segment, false);
        out.truncate(head.len);
        out.extend_from_slice(payload);
        out
    }

    #[test]
    fn a_frame_of_either_family_is_read_as_it_was_built() {
        for (source, destination) in [("192.0.2.1", "198.51.100.7"), ("2001:db8::1", "2001:db8::2")] {
            let bytes = frame(source, destination, b"payload");
            let view = View::parse(&bytes, bytes.len()).unwrap();
            let Content::Ip(packet) = view.content else { panic!("not IP: {view:?}") };
            assert_eq!(packet.ip.source.to_string(), source);
            assert_eq!(packet.ip.destination.to_string(), destination);
            assert_eq!(
                (packet.ip.hop_limit, packet.ip.traffic_class, packet.ip.dont_fragment),
                (64, 0xb8, true)
            );
            let Transport::Tcp(tcp) = packet.transport else { panic!("not TCP: {packet:?}") };
            assert_eq!((tcp.source_port, tcp.destination_port, tcp.segment.len), (1000, 2000, 7));
            assert_eq!(packet.transport_start + tcp.header_len, bytes.len() - 7);
        }
    }

    #[test]
    fn ethernet_padding_is_not_payload() {
        let mut bytes = frame("192.0.2.1", "198.51.100.7", b"");
        bytes.resize(bytes.len() + 6, 0);
        let Content::Ip(packet) = View::parse(&bytes, bytes.len()).unwrap().content else { panic!() };
        let Transport::Tcp(tcp) = packet.transport else { panic!() };
        assert_eq!(tcp.segment.len, 0);
    }

    #[test]
    fn a_mapped_address_in_an_ipv6_header_is_refused() {
        let mut bytes = frame("2001:db8::1", "2001:db8::2", b"");
        bytes[ETHERNET_LEN + 24..ETHERNET_LEN + 40]
            .copy_from_slice(&"::ffff:127.0.0.1".parse::<std::net::Ipv6Addr>().unwrap().octets());
        assert_eq!(View::parse(&bytes, bytes.len()), Err(DropReason::Martian));
    }

    #[test]
    fn a_wrong_ipv4_header_checksum_is_refused() {
        let mut bytes = frame("192.0.2.1", "198.51.100.7", b"");
        bytes[ETHERNET_LEN + 8] ^= 1;
        assert_eq!(View::parse(&bytes, bytes.len()), Err(DropReason::Checksum));
    }

    #[test]
    fn a_routing_header_is_refused() {
        let mut bytes = frame("2001:db8::1", "2001:db8::2", b"");
        bytes[ETHERNET_LEN + 6] = 43;
        assert_eq!(View::parse(&bytes, bytes.len()), Err(DropReason::ExtensionHeaders));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic_or_reach_beyond_the_frame(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..300),
            kind in 0u8..4,
            longer in 0usize..70_000,
        ) {
            if bytes.len() > ETHERNET_LEN {
                let (ether_type, version) = [([8, 0], 0x45), ([0x86, 0xdd], 0x60), ([8, 6], 0), ([8, 0], 0x4f)][kind as usize];
                bytes[12..14].copy_from_slice(&ether_type);
                bytes[ETHERNET_LEN] = version;
            }
            let frame_len = if bytes.len() >= HEAD_LEN { bytes.len() + longer } else { bytes.len() };
            if let Ok(View { content: Content::Ip(packet), .. }) = View::parse(&bytes, frame_len) {
                prop_assert!(packet.transport_start + packet.transport_len <= frame_len);
                if let Transport::Udp(udp) = packet.transport {
                    prop_assert!(udp.len + 8 <= packet.transport_len);
                }
                if let Transport::Tcp(tcp) = packet.transport {
                    prop_assert_eq!(tcp.header_len + tcp.segment.len as usize, packet.transport_len);
                }
            }
        }
    }
}
