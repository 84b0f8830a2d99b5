//! The Internet checksum (RFC 1071, RFC 1624) and the pseudo-headers of RFC 9293 (3.1) and RFC 8200 (8.1).
//!
//! Payload is summed only for links and frames without checksum offload.

use super::address::Address;

/// A running one's-complement sum. Chunks may have any length; odd ones may stand only at the end.
#[derive(Clone, Copy, Default, Debug)]
pub struct Sum(u64);

impl Sum {
    /// Folds the carries of the sum into 16 bits, without complementing it.
    pub fn partial(self) -> u16 {
        let mut sum = self.0;
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    /// The value that stands in a header's checksum field.
    pub fn finish(self) -> u16 {
        !self.partial()
    }

    /// With bytes added; an odd last byte is padded with zero.
    #[must_use]
    pub fn with(mut self, bytes: &[u8]) -> Self {
        let mut words = bytes.chunks_exact(8);
        let mut sum: u64 = 0;
        for word in &mut words {
            // 32-bit halves: four billion of them fit before the sum can overflow.
            let word =
                u64::from_ne_bytes([word[0], word[1], word[2], word[3], word[4], word[5], word[6], word[7]]);
            sum += (word & 0xffff_ffff) + (word >> 32);
        }
        let mut last = [0; 8];
        let rest = words.remainder();
        last[..rest.len()].copy_from_slice(rest);
        let word = u64::from_ne_bytes(last);
        sum += (word & 0xffff_ffff) + (word >> 32);
        // The sum is the same in either byte order (RFC 1071, 1.B): swap once at the end.
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        self.0 += u64::from((sum as u16).to_be());
        self
    }

    /// With a 16-bit word, in host order, added.
    #[must_use]
    pub fn with_word(mut self, word: u16) -> Self {
        self.0 += u64::from(word);
        self
    }
}

/// The sum of the pseudo-header for `length` bytes of the upper layer, header included.
pub fn pseudo_header(source: Address, destination: Address, protocol: u8, length: usize) -> Sum {
    let sum = if source.is_v4() {
        Sum::default().with(&source.v4_octets()).with(&destination.v4_octets())
    } else {
        Sum::default().with(&source.octets()).with(&destination.octets())
    };
    sum.with_word((length >> 16) as u16).with_word(length as u16).with_word(u16::from(protocol))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 1071, section 3: the worked example.
    #[test]
    fn the_rfc_example_sums_to_ddf2() {
        let sum = Sum::default().with(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.partial(), 0xddf2);
        assert_eq!(sum.finish(), !0xddf2);
    }

    #[test]
    fn every_length_agrees_with_the_plain_definition() {
        let bytes: Vec<u8> = (0..2000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        for length in 0..bytes.len() {
            let plain = bytes[..length].chunks(2).fold(0u64, |sum, pair| {
                sum + (u64::from(pair[0]) << 8) + u64::from(*pair.get(1).unwrap_or(&0))
            });
            assert_eq!(
                Sum::default().with(&bytes[..length]).partial(),
                Sum(plain).partial(),
                "length {length}"
            );
        }
    }

    #[test]
    fn a_packet_with_its_checksum_in_place_sums_to_all_ones() {
        let mut header = [
            0x45, 0, 0, 0x3c, 0x1c, 0x46, 0x40, 0, 0x40, 6, 0, 0, 0xac, 0x10, 0x0a, 0x63, 0xac, 0x10, 0x0a,
            0x0c,
        ];
        let checksum = Sum::default().with(&header).finish();
        header[10..12].copy_from_slice(&checksum.to_be_bytes());
        assert_eq!(Sum::default().with(&header).partial(), 0xffff);
    }
}
