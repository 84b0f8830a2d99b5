//! ICMP (RFC 792) and ICMPv6 (RFC 4443): echo, and the errors that hythe reads from the host and tells the guest.
//!
//! One type for both families: [`IcmpError`] names what went wrong, and its two codings lie here.

use super::address::Endpoint;
use super::view::IpHead;

/// An error that a router or host on the way (or hythe itself) has about a packet of the guest's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IcmpError {
    /// No route to the network.
    NetworkUnreachable,
    /// The host does not answer on its link.
    HostUnreachable,
    /// Nobody listens on the port.
    PortUnreachable,
    /// The protocol is not spoken there.
    ProtocolUnreachable,
    /// A filter or a policy forbids it.
    Prohibited,
    /// Larger than the next link's MTU, in bytes.
    TooBig {
        /// The MTU of the narrow link.
        mtu: u32,
    },
    /// The hop limit reached zero on the way.
    HopLimit,
    /// The fragments did not all come in time.
    ReassemblyTime,
    /// Another error: its type and code as they stand on the wire, of the packet's own family.
    Other {
        /// The message's type.
        kind: u8,
        /// The message's code.
        code: u8,
    },
}

impl IcmpError {
    /// From the type, code and extra word of an ICMP message or a socket's error queue.
    pub fn from_wire(v4: bool, kind: u8, code: u8, info: u32) -> Self {
        match (v4, kind, code) {
            (true, 3, 0 | 6 | 11) | (false, 1, 0) => Self::NetworkUnreachable,
            (true, 3, 1 | 7 | 12) | (false, 1, 3) => Self::HostUnreachable,
            (true, 3, 2) | (false, 4, 1) => Self::ProtocolUnreachable,
            (true, 3, 3) | (false, 1, 4) => Self::PortUnreachable,
            (true, 3, 9 | 10 | 13) | (false, 1, 1) => Self::Prohibited,
            (true, 3, 4) | (false, 2, 0) => Self::TooBig { mtu: info },
            (true, 11, 0) | (false, 3, 0) => Self::HopLimit,
            (true, 11, 1) | (false, 3, 1) => Self::ReassemblyTime,
            _ => Self::Other { kind, code },
        }
    }

    /// Type, code and the second word of the message in a family.
    fn to_wire(self, v4: bool) -> (u8, u8, u32) {
        match (self, v4) {
            (Self::NetworkUnreachable, true) => (3, 0, 0),
            (Self::NetworkUnreachable, false) => (1, 0, 0),
            (Self::HostUnreachable, true) => (3, 1, 0),
            (Self::HostUnreachable, false) => (1, 3, 0),
            (Self::ProtocolUnreachable, true) => (3, 2, 0),
            // RFC 4443, 3.4: the pointer names the next-header field of the quoted packet.
            (Self::ProtocolUnreachable, false) => (4, 1, 6),
            (Self::PortUnreachable, true) => (3, 3, 0),
            (Self::PortUnreachable, false) => (1, 4, 0),
            (Self::Prohibited, true) => (3, 13, 0),
            (Self::Prohibited, false) => (1, 1, 0),
            // RFC 1191, 4: the MTU is the lower half of the word.
            (Self::TooBig { mtu }, true) => (3, 4, mtu & 0xffff),
            (Self::TooBig { mtu }, false) => (2, 0, mtu),
            (Self::HopLimit, true) => (11, 0, 0),
            (Self::HopLimit, false) => (3, 0, 0),
            (Self::ReassemblyTime, true) => (11, 1, 0),
            (Self::ReassemblyTime, false) => (3, 1, 0),
            (Self::Other { kind, code }, _) => (kind, code, 0),
        }
    }
}

/// The packet that an error is about, as the guest sent it, as far as it can be told again.
#[derive(Clone, Copy, Debug)]
pub struct Quoted<'q> {
    /// Its IP header.
    pub ip: IpHead,
    /// Its protocol.
    pub protocol: u8,
    /// Its whole length behind the IP header.
    pub len: usize,
    /// Its first bytes behind the IP header.
    pub bytes: &'q [u8],
}

/// The longest error message: RFC 4443, 2.4 (c) bounds it by the minimum IPv6 MTU of 1280 bytes, RFC 1812, 4.3.2.3
/// the whole packet in IPv4 by 576.
pub const ERROR_MAX: usize = 1280 - 40;

/// Writes an ICMP error message (without IP header, checksum zero) into `out`, which holds [`ERROR_MAX`] bytes;
/// returns its length.
pub fn write_error(out: &mut [u8], error: IcmpError, quoted: &Quoted<'_>) -> usize {
    let v4 = quoted.ip.source.is_v4();
    let (kind, code, word) = error.to_wire(v4);
    out[..8].fill(0);
    out[0] = kind;
    out[1] = code;
    out[4..8].copy_from_slice(&word.to_be_bytes());
    let limit = if v4 { 576 - 20 } else { ERROR_MAX };
    let inner = &mut out[8..limit];
    let header_len = if v4 {
        inner[..20].fill(0);
        inner[0] = 0x45;
        inner[1] = quoted.ip.traffic_class;
        inner[2..4].copy_from_slice(&((20 + quoted.len) as u16).to_be_bytes());
        inner[6] = u8::from(quoted.ip.dont_fragment) << 6;
        inner[8] = quoted.ip.hop_limit;
        inner[9] = quoted.protocol;
        inner[12..16].copy_from_slice(&quoted.ip.source.v4_octets());
        inner[16..20].copy_from_slice(&quoted.ip.destination.v4_octets());
        let sum = super::checksum::Sum::default().with(&inner[..20]).finish();
        inner[10..12].copy_from_slice(&sum.to_be_bytes());
        20
    } else {
        inner[0] = 0x60 | (quoted.ip.traffic_class >> 4);
        inner[1] = quoted.ip.traffic_class << 4;
        inner[2..4].fill(0);
        inner[4..6].copy_from_slice(&(quoted.len as u16).to_be_bytes());
        inner[6] = quoted.protocol;
        inner[7] = quoted.ip.hop_limit;
        inner[8..24].copy_from_slice(&quoted.ip.source.octets());
        inner[24..40].copy_from_slice(&quoted.ip.destination.octets());
        40
    };
    let kept = quoted.bytes.len().min(inner.len() - header_len);
    inner[header_len..header_len + kept].copy_from_slice(&quoted.bytes[..kept]);
    8 + header_len + kept
}

/// The first eight bytes of a UDP datagram, for quoting one whose header the kernel kept for itself.
pub fn quoted_udp_header(source: Endpoint, destination: Endpoint, len: usize) -> [u8; 8] {
    let mut header = [0; 8];
    header[0..2].copy_from_slice(&source.port.to_be_bytes());
    header[2..4].copy_from_slice(&destination.port.to_be_bytes());
    header[4..6].copy_from_slice(&((8 + len) as u16).to_be_bytes());
    header
}

/// An echo request or reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Echo {
    /// The identifier.
    pub id: u16,
    /// The sequence number.
    pub sequence: u16,
}

/// The length of an echo header, in bytes.
pub const ECHO_LEN: usize = 8;

/// Reads an echo request at the start of an ICMP message, or `None` for another message.
pub fn parse_echo_request(message: &[u8], v4: bool) -> Option<Echo> {
    parse_echo(message, if v4 { 8 } else { 128 })
}

/// Reads an echo reply at the start of an ICMP message, or `None` for another message.
pub fn parse_echo_reply(message: &[u8], v4: bool) -> Option<Echo> {
    parse_echo(message, if v4 { 0 } else { 129 })
}

fn parse_echo(message: &[u8], expected: u8) -> Option<Echo> {
    let [kind, 0, _, _, id_high, id_low, sequence_high, sequence_low, ..] = *message else { return None };
    (kind == expected).then_some(Echo {
        id: u16::from_be_bytes([id_high, id_low]),
        sequence: u16::from_be_bytes([sequence_high, sequence_low]),
    })
}

/// The header of an echo request, checksum zero.
pub fn echo_request(v4: bool, echo: Echo) -> [u8; ECHO_LEN] {
    echo_header(if v4 { 8 } else { 128 }, echo)
}

/// The header of an echo reply, checksum zero.
pub fn echo_reply(v4: bool, echo: Echo) -> [u8; ECHO_LEN] {
    echo_header(if v4 { 0 } else { 129 }, echo)
}

fn echo_header(kind: u8, echo: Echo) -> [u8; ECHO_LEN] {
    let [id_high, id_low] = echo.id.to_be_bytes();
    let [sequence_high, sequence_low] = echo.sequence.to_be_bytes();
    [kind, 0, 0, 0, id_high, id_low, sequence_high, sequence_low]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::address::Address;

    fn quoted(v4: bool, bytes: &[u8]) -> Quoted<'_> {
        let (source, destination) = if v4 {
            (Address::v4([192, 168, 65, 3]), Address::v4([198, 51, 100, 1]))
        } else {
            (Address::v6([0xfd; 16]), Address::v6([0x20; 16]))
        };
        let ip = IpHead { source, destination, hop_limit: 7, traffic_class: 0, dont_fragment: true };
        Quoted { ip, protocol: 17, len: bytes.len(), bytes }
    }

    #[test]
    fn every_error_survives_the_round_trip_in_both_families() {
        use IcmpError::*;
        for error in [
            NetworkUnreachable,
            HostUnreachable,
            PortUnreachable,
            ProtocolUnreachable,
            Prohibited,
            TooBig { mtu: 1300 },
            HopLimit,
            ReassemblyTime,
            Other { kind: 12, code: 2 },
        ] {
            for v4 in [true, false] {
                let (kind, code, word) = error.to_wire(v4);
                assert_eq!(IcmpError::from_wire(v4, kind, code, word), error);
            }
        }
    }

    #[test]
    fn an_error_quotes_within_the_bounds_of_its_family() {
        let bytes = [7; 3000];
        let mut out = [0; ERROR_MAX];
        assert_eq!(write_error(&mut out, IcmpError::PortUnreachable, &quoted(true, &bytes)), 576 - 20);
        assert_eq!(&out[..4], &[3, 3, 0, 0]);
        assert_eq!(write_error(&mut out, IcmpError::PortUnreachable, &quoted(false, &bytes)), ERROR_MAX);
        assert_eq!(&out[..4], &[1, 4, 0, 0]);
        let length = write_error(&mut out, IcmpError::TooBig { mtu: 1300 }, &quoted(true, &bytes[..28]));
        assert_eq!(length, 8 + 20 + 28);
        assert_eq!(&out[4..8], &[0, 0, 5, 20]);
    }
}
