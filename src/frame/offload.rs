//! The virtio-net header (virtio 1.3, 5.1.6): what each side leaves to the other.
//!
//! Every link of hythe carries this header or stands in for it.

use super::drop_reason::DropReason;

/// The length of the header with `num_buffers`, as virtio 1.0 and `TUNSETVNETHDRSZ` 12 use it, in bytes.
pub const HEADER_LEN: usize = 12;

const NEEDS_CHECKSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// How a frame larger than the MTU is to be cut by whoever needs it cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Segmentation {
    /// The frame is one packet.
    #[default]
    None,
    /// TCP segments of at most `size` payload bytes.
    Tcp {
        /// Payload bytes of one segment.
        size: u16,
    },
    /// UDP datagrams of `size` payload bytes, the last one perhaps shorter.
    Udp {
        /// Payload bytes of one datagram.
        size: u16,
    },
}

/// What the virtio-net header of one frame says.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Offload {
    /// The transport checksum holds only the pseudo-header's sum; whoever puts the packet on a wire completes it.
    pub checksum_partial: bool,
    /// How to cut the frame.
    pub segmentation: Segmentation,
}

impl Offload {
    /// Reads the header of a frame that the guest sent. Offsets are the guest's claim about bytes that the parser
    /// reads itself, so they are not used.
    pub fn parse(header: &[u8]) -> Result<Self, DropReason> {
        let [flags, gso, _, _, size_low, size_high, ..] = *header else { return Err(DropReason::Truncated) };
        let size = u16::from_le_bytes([size_low, size_high]);
        let segmentation = match gso & !GSO_ECN {
            GSO_NONE => Segmentation::None,
            _ if size == 0 => return Err(DropReason::Offload),
            GSO_TCPV4 | GSO_TCPV6 => Segmentation::Tcp { size },
            GSO_UDP_L4 => Segmentation::Udp { size },
            _ => return Err(DropReason::Offload),
        };
        Ok(Self { checksum_partial: flags & NEEDS_CHECKSUM != 0, segmentation })
    }

    /// Writes the header of a frame to the guest into the first [`HEADER_LEN`] bytes of `header`.
    /// `headers_len` is the length of the frame's own headers, `checksum_start` and `checksum_offset` say where the
    /// partial checksum lies, `buffers` how many buffers the frame fills.
    pub fn write(self, header: &mut [u8], v4: bool, headers_len: u16, checksum: (u16, u16), buffers: u16) {
        let (gso, size) = match self.segmentation {
            Segmentation::None => (GSO_NONE, 0),
            Segmentation::Tcp { size } if v4 => (GSO_TCPV4, size),
            Segmentation::Tcp { size } => (GSO_TCPV6, size),
            Segmentation::Udp { size } => (GSO_UDP_L4, size),
        };
        let (start, offset) = if self.checksum_partial { checksum } else { (0, 0) };
        header[0] = if self.checksum_partial { NEEDS_CHECKSUM } else { 0 };
        header[1] = gso;
        header[2..4].copy_from_slice(&headers_len.to_le_bytes());
        header[4..6].copy_from_slice(&size.to_le_bytes());
        header[6..8].copy_from_slice(&start.to_le_bytes());
        header[8..10].copy_from_slice(&offset.to_le_bytes());
        header[10..12].copy_from_slice(&buffers.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_what_is_read() {
        for segmentation in
            [Segmentation::None, Segmentation::Tcp { size: 1448 }, Segmentation::Udp { size: 1200 }]
        {
            for v4 in [false, true] {
                let offload = Offload { checksum_partial: true, segmentation };
                let mut header = [0; HEADER_LEN];
                offload.write(&mut header, v4, 54, (34, 16), 1);
                assert_eq!(Offload::parse(&header), Ok(offload));
            }
        }
    }

    #[test]
    fn a_header_that_lies_is_refused() {
        assert_eq!(Offload::parse(&[0; 4]), Err(DropReason::Truncated));
        assert_eq!(Offload::parse(&[0, GSO_TCPV4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), Err(DropReason::Offload));
        assert_eq!(Offload::parse(&[0, 0x7f, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]), Err(DropReason::Offload));
    }
}
