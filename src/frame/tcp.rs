//! TCP segment heads (RFC 9293, 3.1) and their options (RFC 7323, RFC 2018), parsed and written.

use std::fmt;
use std::ops::{Add, Sub};

use etherparse::{TcpHeaderSlice, TcpOptionElement};

use super::drop_reason::DropReason;

/// A sequence number: comparisons are modulo 2^32 (RFC 9293, 3.4).
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Seq(pub u32);

impl Seq {
    /// The distance from `earlier` to `self`, negative when `self` comes first.
    pub fn distance(self, earlier: Seq) -> i32 {
        self.0.wrapping_sub(earlier.0) as i32
    }

    /// Bytes from `earlier` to `self`, zero when `self` comes first.
    pub fn since(self, earlier: Seq) -> u32 {
        self.distance(earlier).max(0) as u32
    }

    /// Whether `self` comes before `other`.
    pub fn before(self, other: Seq) -> bool {
        self.distance(other) < 0
    }

    /// The later of two.
    #[must_use]
    pub fn max(self, other: Seq) -> Seq {
        if self.before(other) { other } else { self }
    }

    /// The earlier of two.
    #[must_use]
    pub fn min(self, other: Seq) -> Seq {
        if self.before(other) { self } else { other }
    }
}

impl Add<u32> for Seq {
    type Output = Seq;
    fn add(self, bytes: u32) -> Seq {
        Seq(self.0.wrapping_add(bytes))
    }
}

impl Sub<u32> for Seq {
    type Output = Seq;
    fn sub(self, bytes: u32) -> Seq {
        Seq(self.0.wrapping_sub(bytes))
    }
}

impl fmt::Debug for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The control bits that hythe reads and writes.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Flags(u8);

impl Flags {
    /// No more data from the sender.
    pub const FIN: Flags = Flags(0x01);
    /// Synchronize sequence numbers.
    pub const SYN: Flags = Flags(0x02);
    /// Reset the connection.
    pub const RST: Flags = Flags(0x04);
    /// Push.
    pub const PSH: Flags = Flags(0x08);
    /// The acknowledgement number is significant.
    pub const ACK: Flags = Flags(0x10);
    /// The urgent pointer is significant.
    pub const URG: Flags = Flags(0x20);

    /// Whether every bit of `other` is set.
    pub fn has(self, other: Flags) -> bool {
        self.0 & other.0 == other.0
    }

    /// The wire's byte.
    pub fn bits(self) -> u8 {
        self.0
    }
}

impl std::ops::BitOr for Flags {
    type Output = Flags;
    fn bitor(self, other: Flags) -> Flags {
        Flags(self.0 | other.0)
    }
}

impl fmt::Debug for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (bit, letter) in [
            (Flags::SYN, 'S'),
            (Flags::FIN, 'F'),
            (Flags::RST, 'R'),
            (Flags::PSH, 'P'),
            (Flags::URG, 'U'),
            (Flags::ACK, '.'),
        ] {
            if self.has(bit) {
                write!(f, "{letter}")?;
            }
        }
        Ok(())
    }
}

/// A range of sequence numbers, `start` included, `end` not.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Range {
    /// The first byte.
    pub start: Seq,
    /// One past the last byte.
    pub end: Seq,
}

/// Ranges as SACK blocks: at most four.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Ranges {
    ranges: [Range; SACK_BLOCKS_MAX],
    count: u8,
}

impl Ranges {
    /// The ranges.
    pub fn as_slice(&self) -> &[Range] {
        &self.ranges[..self.count as usize]
    }

    /// The ranges, to change.
    pub fn as_mut_slice(&mut self) -> &mut [Range] {
        &mut self.ranges[..self.count as usize]
    }

    /// Adds a range at the end; says whether there was room.
    pub fn push(&mut self, range: Range) -> bool {
        let room = (self.count as usize) < SACK_BLOCKS_MAX;
        if room {
            self.ranges[self.count as usize] = range;
            self.count += 1;
        }
        room
    }

    /// Keeps the ranges that `keep` approves.
    pub fn retain(&mut self, keep: impl Fn(&Range) -> bool) {
        let old = *self;
        *self = Self::default();
        for range in old.as_slice().iter().filter(|range| keep(range)) {
            self.push(*range);
        }
    }

    /// Forgets all ranges.
    pub fn clear(&mut self) {
        self.count = 0;
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

/// SACK blocks in a segment (RFC 2018, 3): four fit, three beside timestamps.
pub const SACK_BLOCKS_MAX: usize = 4;

/// The options of one segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Options {
    /// Maximum segment size; on SYN only (RFC 9293, 3.7.1).
    pub mss: Option<u16>,
    /// Window scale; on SYN only (RFC 7323, 2).
    pub window_scale: Option<u8>,
    /// SACK permitted; on SYN only (RFC 2018, 2).
    pub sack_permitted: bool,
    /// TSval and TSecr (RFC 7323, 3).
    pub timestamps: Option<(u32, u32)>,
    /// SACK blocks.
    pub sack: Ranges,
}

/// A segment without its bytes: what the TCP relay takes and gives.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SegmentHead {
    /// Sequence number of the first byte, or of SYN.
    pub seq: Seq,
    /// Acknowledgement number.
    pub ack: Seq,
    /// Control bits.
    pub flags: Flags,
    /// The window field as it stands on the wire, not scaled.
    pub window: u16,
    /// Options.
    pub options: Options,
    /// Payload bytes.
    pub len: u32,
}

impl SegmentHead {
    /// Sequence space that the segment takes up: payload, SYN and FIN.
    pub fn sequence_len(&self) -> u32 {
        self.len + u32::from(self.flags.has(Flags::SYN)) + u32::from(self.flags.has(Flags::FIN))
    }
}

/// A parsed TCP header with its ports.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TcpView {
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// Header length with options, in bytes.
    pub header_len: usize,
    /// Numbers and flags.
    pub segment: SegmentHead,
}

/// Parses a TCP header at the start of `bytes`; `total` is the length of header and payload together, which may
/// reach beyond `bytes`.
pub fn parse(bytes: &[u8], total: usize) -> Result<TcpView, DropReason> {
    let header = TcpHeaderSlice::from_slice(bytes).map_err(|error| match error {
        etherparse::err::tcp::HeaderSliceError::Len(_) => DropReason::Truncated,
        etherparse::err::tcp::HeaderSliceError::Content(_) => DropReason::Malformed,
    })?;
    let header_len = header.slice().len();
    let len = total.checked_sub(header_len).ok_or(DropReason::Truncated)?;
    let mut options = Options::default();
    for element in header.options_iterator() {
        // RFC 9293, 3.2: an option that cannot be read ends the list; the segment still counts.
        let Ok(element) = element else { break };
        match element {
            TcpOptionElement::MaximumSegmentSize(mss) => options.mss = Some(mss),
            TcpOptionElement::WindowScale(shift) => options.window_scale = Some(shift),
            TcpOptionElement::SelectiveAcknowledgementPermitted => options.sack_permitted = true,
            TcpOptionElement::Timestamp(value, echo) => options.timestamps = Some((value, echo)),
            TcpOptionElement::SelectiveAcknowledgement(first, rest) => {
                for (start, end) in std::iter::once(first).chain(rest.into_iter().flatten()) {
                    options.sack.push(Range { start: Seq(start), end: Seq(end) });
                }
            }
            TcpOptionElement::Noop => {}
        }
    }
    Ok(TcpView {
        source_port: header.source_port(),
        destination_port: header.destination_port(),
        header_len,
        segment: SegmentHead {
            seq: Seq(header.sequence_number()),
            ack: Seq(header.acknowledgment_number()),
            flags: Flags(bytes[13] & 0x3f),
            window: header.window_size(),
            options,
            len: len as u32,
        },
    })
}

/// The longest TCP header, in bytes.
pub const HEADER_MAX: usize = 60;

/// Writes a TCP header with a zero checksum into `out` and returns its length.
pub fn write(out: &mut [u8], source_port: u16, destination_port: u16, segment: &SegmentHead) -> usize {
    let mut at = 20;
    let options = &segment.options;
    if let Some(mss) = options.mss {
        out[at..at + 4].copy_from_slice(&[2, 4, (mss >> 8) as u8, mss as u8]);
        at += 4;
    }
    if options.sack_permitted {
        out[at..at + 4].copy_from_slice(&[1, 1, 4, 2]);
        at += 4;
    }
    if let Some((value, echo)) = options.timestamps {
        out[at..at + 4].copy_from_slice(&[1, 1, 8, 10]);
        out[at + 4..at + 8].copy_from_slice(&value.to_be_bytes());
        out[at + 8..at + 12].copy_from_slice(&echo.to_be_bytes());
        at += 12;
    }
    if let Some(shift) = options.window_scale {
        out[at..at + 4].copy_from_slice(&[1, 3, 3, shift]);
        at += 4;
    }
    // RFC 2018, 3: as many blocks as the 40 bytes of options hold.
    let room = (HEADER_MAX - at).saturating_sub(4) / 8;
    let blocks = options.sack.as_slice();
    let blocks = &blocks[..blocks.len().min(room)];
    if !blocks.is_empty() {
        out[at..at + 4].copy_from_slice(&[1, 1, 5, 2 + 8 * blocks.len() as u8]);
        at += 4;
        for block in blocks {
            out[at..at + 4].copy_from_slice(&block.start.0.to_be_bytes());
            out[at + 4..at + 8].copy_from_slice(&block.end.0.to_be_bytes());
            at += 8;
        }
    }
    out[0..2].copy_from_slice(&source_port.to_be_bytes());
    out[2..4].copy_from_slice(&destination_port.to_be_bytes());
    out[4..8].copy_from_slice(&segment.seq.0.to_be_bytes());
    out[8..12].copy_from_slice(&segment.ack.0.to_be_bytes());
    out[12] = ((at / 4) as u8) << 4;
    out[13] = segment.flags.bits();
    out[14..16].copy_from_slice(&segment.window.to_be_bytes());
    out[16..20].fill(0);
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequence_numbers_wrap() {
        let last = Seq(u32::MAX);
        assert!(last.before(last + 1));
        assert_eq!((last + 10).since(last), 10);
        assert_eq!(last.since(last + 10), 0);
        assert_eq!(last.max(last + 1), last + 1);
    }

    #[test]
    fn every_option_survives_the_round_trip() {
        let mut segment = SegmentHead {
            seq: Seq(1),
            ack: Seq(2),
            flags: Flags::SYN | Flags::ACK,
            window: 512,
            options: Options {
                mss: Some(1460),
                window_scale: Some(7),
                sack_permitted: true,
                timestamps: Some((11, 12)),
                ..Options::default()
            },
            len: 3,
        };
        let mut out = [0; HEADER_MAX];
        let length = write(&mut out, 80, 443, &segment);
        let view = parse(&out[..length], length + 3).unwrap();
        assert_eq!((view.source_port, view.destination_port, view.header_len), (80, 443, length));
        assert_eq!(view.segment, segment);

        segment.options = Options { timestamps: Some((1, 2)), ..Options::default() };
        for i in 0..3 {
            segment.options.sack.push(Range { start: Seq(i * 100), end: Seq(i * 100 + 50) });
        }
        let length = write(&mut out, 80, 443, &segment);
        assert_eq!(length, HEADER_MAX);
        assert_eq!(parse(&out, HEADER_MAX + 3).unwrap().segment, segment);
    }

    #[test]
    fn a_header_longer_than_the_packet_is_refused() {
        let mut out = [0; HEADER_MAX];
        let length = write(&mut out, 1, 2, &SegmentHead::default());
        assert_eq!(parse(&out[..length - 1], length), Err(DropReason::Truncated));
        assert_eq!(parse(&out[..length], length - 1), Err(DropReason::Truncated));
        out[12] = 0x40;
        assert_eq!(parse(&out, 60), Err(DropReason::Malformed));
    }
}
