//! What comes to the guest on one connection: order, window, acknowledgements.
//!
//! Positions count from the other side's SYN, which is 0, so that nothing wraps: the first byte is 1.

use crate::frame::tcp::{Range, Ranges, SegmentHead, Seq};
use crate::random::Random;

/// The receiving half of a connection of the guest's.
#[derive(Clone, Debug)]
pub struct Receiver {
    /// The other side's initial sequence number.
    isn: Seq,
    /// The next position that is expected.
    next: u64,
    /// Bytes that the program has read.
    read: u64,
    /// The furthest right edge that was offered.
    edge: u64,
    /// What came out of order, the newest first.
    held: Vec<(u64, u64)>,
    /// Where the other side's FIN stands.
    fin: Option<u64>,
    buffer: u64,
    scale: u8,
    mss: u64,
    unacknowledged: u64,
}

/// What a segment meant to the receiver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arrival {
    /// Nothing to acknowledge.
    Nothing,
    /// It is to be acknowledged, with company if that comes soon.
    Soon,
    /// It is to be acknowledged at once.
    Now,
}

impl Receiver {
    /// A receiver with room for `buffer` bytes.
    pub fn new(buffer: u64, scale: u8, mss: u16) -> Self {
        let mss = u64::from(mss);
        Self {
            isn: Seq(0),
            next: 0,
            read: 0,
            edge: 0,
            held: Vec::new(),
            fin: None,
            buffer,
            scale,
            mss,
            unacknowledged: 0,
        }
    }

    /// The other side's SYN has come.
    pub fn synchronize(&mut self, isn: Seq, window: u64) {
        self.isn = isn;
        self.next = 1;
        self.edge = 1 + window;
    }

    /// The shift of windows turned out to be another one.
    pub fn set_scale(&mut self, scale: u8) {
        self.scale = scale;
    }

    /// The sequence number of a position.
    pub fn seq(&self, position: u64) -> Seq {
        self.isn + position as u32
    }

    /// The position of a sequence number, where it can have one.
    fn position(&self, seq: Seq) -> Option<u64> {
        let distance = i64::from(seq.distance(self.seq(self.next)));
        u64::try_from(self.next as i64 + distance).ok()
    }

    /// The next position that is expected.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Bytes that came in order.
    pub fn bytes(&self) -> u64 {
        self.next.saturating_sub(1 + u64::from(self.has_ended()))
    }

    /// Bytes that the program can read.
    pub fn available(&self) -> u64 {
        self.bytes() - self.read
    }

    /// Whether everything up to the other side's FIN has come.
    pub fn has_ended(&self) -> bool {
        self.fin.is_some_and(|fin| fin < self.next)
    }

    /// Whether a segment lies in the window (RFC 9293, 3.10.7.4), or repeats what was there.
    pub fn is_acceptable(&self, segment: &SegmentHead) -> bool {
        let Some(start) = self.position(segment.seq) else { return false };
        let end = start + u64::from(segment.sequence_len());
        let edge = self.edge.max(self.next);
        if start == end {
            start >= self.next && start <= edge
        } else {
            start < edge.max(self.next + 1) && end > self.next
        }
    }

    /// Whether a reset stands exactly where the next byte is expected (RFC 5961, 3.2).
    pub fn is_next(&self, seq: Seq) -> bool {
        seq == self.seq(self.next)
    }

    /// Takes payload and FIN of an acceptable segment.
    pub fn accept(&mut self, segment: &SegmentHead, reneges: u64, random: &mut Random) -> Arrival {
        let Some(start) = self.position(segment.seq) else { return Arrival::Nothing };
        let end = start + u64::from(segment.len);
        let fin = segment.flags.has(crate::frame::tcp::Flags::FIN);
        if segment.len == 0 && !fin {
            return Arrival::Nothing;
        }
        if !self.held.is_empty() && random.chance(reneges) {
            self.held.clear();
        }
        let edge = self.edge.max(self.next);
        let cut = end.min(edge);
        if fin && cut == end {
            self.fin = Some(end);
        }
        if start > self.next {
            self.hold(start, cut);
            return Arrival::Now;
        }
        let had_holes = !self.held.is_empty();
        let before = self.next;
        self.next = self.next.max(cut);
        self.fill_from_held();
        if self.fin == Some(self.next) {
            self.next += 1;
        }
        self.unacknowledged += self.next - before;
        let whole = self.next > before && !had_holes && !self.has_ended();
        if whole && self.unacknowledged < 2 * self.mss { Arrival::Soon } else { Arrival::Now }
    }

    fn hold(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        let (mut start, mut end) = (start, end);
        self.held.retain(|(from, to)| {
            let touches = *from <= end && start <= *to;
            if touches {
                (start, end) = (start.min(*from), end.max(*to));
            }
            !touches
        });
        self.held.insert(0, (start, end));
    }

    fn fill_from_held(&mut self) {
        while let Some(at) = self.held.iter().position(|(start, _)| *start <= self.next) {
            let (_, end) = self.held.remove(at);
            self.next = self.next.max(end);
        }
    }

    /// The program has read `len` bytes. Returns whether the other side should hear of the room at once.
    pub fn read(&mut self, len: u64) -> bool {
        self.read += len;
        let step = (2 * self.mss).min(self.buffer / 2);
        let small = self.edge.saturating_sub(self.next) < 2 * step;
        small && self.offered() >= self.edge + step
    }

    /// The right edge that could be offered now.
    fn offered(&self) -> u64 {
        let free = self.buffer.saturating_sub(self.available());
        let edge = self.next + free.min(0xffff << self.scale);
        // RFC 9293, 3.8.6.2.2: no silly small steps.
        if edge >= self.edge + self.mss.min(self.buffer / 2) { edge } else { self.edge }
    }

    /// The window field of a segment that goes out now, and the edge that it says.
    pub fn offer(&mut self) -> (u16, u64) {
        self.edge = self.offered();
        self.unacknowledged = 0;
        let field = (self.edge.saturating_sub(self.next) >> self.scale).min(0xffff);
        (field as u16, self.next + (field << self.scale))
    }

    /// SACK blocks.
    pub fn blocks(&self) -> Ranges {
        let mut blocks = Ranges::default();
        for (start, end) in self.held.iter().take(4) {
            blocks.push(Range { start: self.seq(*start), end: self.seq(*end) });
        }
        blocks
    }
}
