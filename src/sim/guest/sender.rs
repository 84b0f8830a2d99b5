//! What the guest sends on one connection: windows, loss recovery, probes.
//!
//! Positions count from the guest's SYN, which is 0. Loss is found by three duplicate acknowledgements or by SACK (RFC
//! 5681, RFC 6675 in outline) and by time-out (RFC 6298).

use crate::frame::tcp::{SegmentHead, Seq};
use crate::time::Now;

use super::super::plan::{MS, S};

const TIMEOUT_MIN_NS: u64 = 200 * MS;
const TIMEOUT_MAX_NS: u64 = 120 * S;
/// Time-outs in a row after which the other side counts as gone.
const TIMEOUTS_MAX: u32 = 15;

/// The sending half of a connection of the guest's.
#[derive(Clone, Debug)]
pub struct Sender {
    isn: Seq,
    una: u64,
    next: u64,
    max: u64,
    /// One past the last byte that the program has written.
    end: u64,
    /// The program has closed: FIN stands at `end`.
    closed: bool,
    edge: u64,
    window_seq: Seq,
    congestion: u64,
    congestion_max: u64,
    sacked: Vec<(u64, u64)>,
    duplicates: u32,
    recover: Option<u64>,
    repeated: u64,
    rtt_ns: Option<(u64, u64)>,
    timed: Option<(u64, Now)>,
    timeouts: u32,
    deadline: Option<Now>,
    probes_with_byte: bool,
    probe_due: bool,
}

/// What is to be sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Burst {
    /// The first position.
    pub start: u64,
    /// Payload bytes.
    pub len: u64,
    /// FIN follows them.
    pub fin: bool,
}

impl Sender {
    /// A sender whose SYN is due.
    pub fn new(isn: Seq, congestion_max: u64, probes_with_byte: bool) -> Self {
        Self {
            isn,
            una: 0,
            next: 0,
            max: 0,
            end: 1,
            closed: false,
            edge: 1,
            window_seq: Seq(0),
            congestion: 10 * 1460,
            congestion_max,
            sacked: Vec::new(),
            duplicates: 0,
            recover: None,
            repeated: 0,
            rtt_ns: None,
            timed: None,
            timeouts: 0,
            deadline: None,
            probes_with_byte,
            probe_due: false,
        }
    }

    /// The sequence number of a position.
    pub fn seq(&self, position: u64) -> Seq {
        self.isn + position as u32
    }

    fn position(&self, seq: Seq) -> Option<u64> {
        let distance = i64::from(seq.distance(self.seq(self.una)));
        u64::try_from(self.una as i64 + distance).ok()
    }

    /// One past the last position that was ever sent.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The oldest position that is not acknowledged.
    pub fn una(&self) -> u64 {
        self.una
    }

    /// Bytes written that are not acknowledged.
    pub fn outstanding(&self) -> u64 {
        self.end - self.una.clamp(1, self.end)
    }

    /// Whether the other side has acknowledged the guest's FIN.
    pub fn is_finished(&self) -> bool {
        self.closed && self.una > self.end
    }

    /// Whether the other side was given up.
    pub fn is_given_up(&self) -> bool {
        self.timeouts > TIMEOUTS_MAX
    }

    /// Whatever is not acknowledged counts as acknowledged.
    pub fn finish(&mut self) {
        self.una = self.end + u64::from(self.closed);
        self.max = self.max.max(self.una);
        self.next = self.max;
        self.deadline = None;
    }

    /// The program writes.
    pub fn write(&mut self, len: u64) {
        self.end += len;
    }

    /// The program closes its direction.
    pub fn close(&mut self) {
        self.closed = true;
    }

    /// SYN, or SYN-ACK, goes out.
    pub fn syn_sent(&mut self, now: Now) {
        if self.max == 0 {
            self.timed = Some((1, now));
        }
        (self.next, self.max) = (self.next.max(1), self.max.max(1));
        self.arm(now);
    }

    /// The window of the other side's SYN or SYN-ACK, which is not scaled.
    pub fn open_window(&mut self, segment: &SegmentHead) {
        self.edge = 1 + u64::from(segment.window);
        self.window_seq = segment.seq;
    }

    /// An acknowledgement comes. Returns whether it is about something that was sent.
    pub fn acknowledge(&mut self, segment: &SegmentHead, scale: u8, now: Now) -> bool {
        let Some(ack) = self.position(segment.ack) else { return true };
        if ack > self.max {
            return false;
        }
        let edge = ack + (u64::from(segment.window) << scale);
        if ack > self.una {
            self.advance(ack, now);
        } else if ack == self.una && self.max > self.una && segment.sequence_len() == 0 && edge == self.edge {
            self.duplicates += 1;
        }
        if ack >= self.una && !segment.seq.before(self.window_seq) {
            self.window_seq = segment.seq;
            self.edge = self.edge.max(edge);
        }
        if ack == self.una && self.is_blocked() {
            // An answer to a probe shows that the other side lives.
            self.timeouts = 0;
        }
        for block in segment.options.sack.as_slice() {
            if let (Some(start), Some(end)) = (self.position(block.start), self.position(block.end))
                && start > self.una
                && end <= self.max
                && start < end
            {
                self.sacked.push((start, end));
            }
        }
        self.sacked.sort_unstable();
        self.sacked.dedup();
        true
    }

    fn advance(&mut self, ack: u64, now: Now) {
        self.congestion = (self.congestion + (ack - self.una)).min(self.congestion_max);
        self.una = ack;
        self.next = self.next.max(ack);
        self.duplicates = 0;
        self.timeouts = 0;
        self.sacked.retain(|(_, end)| *end > ack);
        if let Some((position, since)) = self.timed
            && ack >= position
        {
            self.timed = None;
            let sample = now.since(since);
            let (smoothed, variance) = self.rtt_ns.unwrap_or((sample, sample / 2));
            let variance = (3 * variance + smoothed.abs_diff(sample)) / 4;
            self.rtt_ns = Some(((7 * smoothed + sample) / 8, variance));
        }
        match self.recover {
            Some(recover) if ack >= recover => self.recover = None,
            Some(_) => self.repeated = self.repeated.max(ack),
            None => {}
        }
        self.deadline = None;
        if self.max > self.una {
            self.arm(now);
        }
    }

    fn arm(&mut self, now: Now) {
        if self.deadline.is_none() {
            let (smoothed, variance) = self.rtt_ns.unwrap_or((S, 0));
            let base = (smoothed + 4 * variance).max(TIMEOUT_MIN_NS);
            let timeout = base.saturating_mul(1 << self.timeouts.min(16)).min(TIMEOUT_MAX_NS);
            self.deadline = Some(Now(now.0.saturating_add(timeout)));
        }
    }

    /// Everything that the window held is acknowledged, and there is more (RFC 9293, 3.8.6.1).
    fn is_blocked(&self) -> bool {
        self.una >= 1 && self.una >= self.edge && self.una < self.end + u64::from(self.closed)
    }

    fn look_for_loss(&mut self, mss: u64) {
        let ahead = self.sacked.last().is_some_and(|(_, end)| *end > self.una + 3 * mss);
        if self.recover.is_none() && self.una >= 1 && self.max > self.una && (self.duplicates >= 3 || ahead) {
            self.recover = Some(self.max);
            self.repeated = self.una;
            self.congestion = (self.congestion / 2).max(2 * mss);
            self.timed = None;
        }
    }

    /// The next hole to send again.
    fn hole(&self, mss: u64) -> Option<Burst> {
        self.recover?;
        let mut start = self.una.max(self.repeated);
        let highest = self.sacked.last().map_or(self.una + 1, |(_, end)| *end);
        for (from, to) in &self.sacked {
            if (*from..*to).contains(&start) {
                start = *to;
            }
        }
        let limit = self.sacked.iter().map(|(from, _)| *from).find(|from| *from > start).unwrap_or(self.max);
        (start < highest && start < self.max).then(|| self.burst(start, mss.min(limit - start)))
    }

    fn burst(&self, start: u64, len: u64) -> Burst {
        let bytes = len.min(self.end.saturating_sub(start));
        Burst { start, len: bytes, fin: self.closed && start + bytes == self.end && len > bytes }
    }

    /// The next segment with payload or FIN, of at most `large` bytes.
    pub fn next_burst(&mut self, mss: u64, large: u64, now: Now) -> Option<Burst> {
        self.look_for_loss(mss);
        if let Some(hole) = self.hole(mss) {
            self.repeated = hole.start + hole.len + u64::from(hole.fin);
            self.arm(now);
            return Some(hole);
        }
        if self.next < 1 {
            return None;
        }
        let last = self.end + u64::from(self.closed);
        let fin_alone =
            self.closed && self.next == self.end && self.una >= self.end && !self.probes_with_byte;
        let edge = if fin_alone { last } else { self.edge };
        let limit = edge.min(self.una + self.congestion).min(last);
        if self.next >= limit {
            return None;
        }
        let len = (limit - self.next).min(large.max(1));
        let all = self.next + len == last;
        // RFC 9293, 3.8.6.2.1: no small segment because of a small window while others are in flight.
        if len < mss && !all && self.max > self.una && self.next == self.max {
            return None;
        }
        let burst = self.burst(self.next, len);
        let end = burst.start + burst.len + u64::from(burst.fin);
        if end > self.max {
            if self.timed.is_none() && self.next == self.max {
                self.timed = Some((end, now));
            }
            self.max = end;
        }
        self.next = end;
        self.arm(now);
        Some(burst)
    }

    /// A probe that is due: the position and the bytes of it.
    pub fn take_probe(&mut self) -> Option<Burst> {
        if !std::mem::take(&mut self.probe_due) {
            return None;
        }
        if self.probes_with_byte && self.una < self.end {
            self.max = self.max.max(self.una + 1);
            return Some(Burst { start: self.una, len: 1, fin: false });
        }
        Some(Burst { start: self.una - 1, len: 0, fin: false })
    }

    /// When a time-out or a probe is due.
    pub fn deadline(&self) -> Option<Now> {
        self.deadline
    }

    /// Sees to it that a deadline stands while one is needed.
    pub fn watch(&mut self, now: Now) {
        if self.max > self.una || self.is_blocked() {
            self.arm(now);
        } else {
            self.deadline = None;
        }
    }

    /// The deadline may have come. Returns whether a SYN is to be sent again.
    pub fn expire(&mut self, mss: u64, now: Now) -> bool {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return false;
        }
        self.deadline = None;
        self.timeouts += 1;
        self.timed = None;
        if self.una == 0 {
            self.arm(now);
            return true;
        }
        if self.is_blocked() {
            self.probe_due = true;
        }
        self.next = self.una;
        self.recover = None;
        self.sacked.clear();
        self.duplicates = 0;
        self.congestion = 2 * mss;
        self.arm(now);
        false
    }
}
