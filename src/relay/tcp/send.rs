//! From the host to the guest: which bytes are peeked next, which may be discarded, what is sent again.
//!
//! The numbers run over the kernel's receive queue:
//!
//! ```text
//!        discarded      una            next          max          una + window
//!   ─────────┼───────────┼──────────────┼─────────────┼──────────────┼───────▶
//!   gone     │ ack'ed    │  in flight   │  sent once, │  may be sent │
//!            │           │              │  to repeat  │              │
//! ```
//!
//! Loss: three duplicate acknowledgements, or SACK blocks more than three segments ahead, send the first hole again
//! (RFC 5681, RFC 6582, RFC 6675 without its pipe: a link inside one machine has no congestion to respond to); a
//! time-out sends everything again from `una` (RFC 6298), SACK or not (RFC 2018, 8: the receiver may renege).

use crate::frame::tcp::{Range, Ranges, SegmentHead, Seq};
use crate::time::{Alarm, Now};

use super::rtt::RetransmitTimer;

/// After a time-out no more than this is in flight until the guest acknowledges something.
const AFTER_TIMEOUT_BYTES: u32 = 64 << 10;

/// The sending half of the relay.
#[derive(Clone, Debug)]
pub struct Send {
    una: Seq,
    next: Seq,
    max: Seq,
    /// The start of the kernel's receive queue.
    discarded: Seq,
    window: u32,
    window_max_seen: u32,
    /// SND.WL1 and SND.WL2.
    window_seq: Seq,
    window_ack: Seq,
    /// Where the host's stream ends, once that is known: the sequence number of FIN.
    end: Option<Seq>,
    /// Fast recovery lasts until this is acknowledged.
    recover: Option<Seq>,
    /// What fast recovery has sent again.
    repeated: Seq,
    /// What the guest has out of order. Boxed: it is rare, and idle connections are many.
    sacked: Option<Box<Ranges>>,
    duplicates: u8,
    after_timeout: bool,
    /// The host socket may have bytes beyond `max`.
    readable: bool,
    /// The end of the segment whose round trip is timed, and when it was sent; that is zero while none is timed.
    timed: Seq,
    timed_since: Now,
    pub(super) timer: RetransmitTimer,
    /// When the oldest unacknowledged byte, or the window probe, is due again.
    deadline: Alarm,
}

/// What an acknowledgement did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Acknowledged {
    /// It is about something that was never sent.
    TooFar,
    /// It is fine.
    Fine,
}

impl Send {
    /// The SYN at `isn` is about to be sent; `window` is what the guest has offered, unscaled.
    pub fn new(isn: Seq, window: u32, guest_seq: Seq) -> Self {
        Self {
            una: isn,
            next: isn,
            max: isn,
            discarded: isn + 1,
            window,
            window_max_seen: window,
            window_seq: guest_seq,
            window_ack: isn,
            end: None,
            recover: None,
            repeated: isn,
            sacked: None,
            duplicates: 0,
            after_timeout: false,
            readable: false,
            timed: isn,
            timed_since: Now(0),
            timer: RetransmitTimer::default(),
            deadline: Alarm::NONE,
        }
    }

    /// SND.UNA.
    pub fn una(&self) -> Seq {
        self.una
    }

    /// SND.NXT in the RFC's sense: one past the last byte ever sent.
    pub fn max(&self) -> Seq {
        self.max
    }

    /// Where the next segment starts.
    pub fn next(&self) -> Seq {
        self.next
    }

    /// Where the kernel's receive queue starts.
    pub fn discarded(&self) -> Seq {
        self.discarded
    }

    /// How often the time-out was doubled since the last progress.
    pub fn backoffs(&self) -> u8 {
        self.timer.backoffs()
    }

    /// Whether everything sent was acknowledged.
    pub fn is_quiet(&self) -> bool {
        self.una == self.max
    }

    /// Whether FIN was sent.
    pub fn fin_sent(&self) -> bool {
        self.end.is_some_and(|end| end.before(self.max))
    }

    /// Whether FIN was acknowledged.
    pub fn fin_acknowledged(&self) -> bool {
        self.end.is_some_and(|end| end.before(self.una))
    }

    /// Whether the host's stream has ended.
    pub fn ended(&self) -> bool {
        self.end.is_some()
    }

    /// The host socket has, or may have, more to read.
    pub fn readable(&mut self) {
        // What a socket says after the end of its stream is about the other direction.
        self.readable = self.end.is_none();
    }

    /// A peek found less than it asked for: nothing more until the socket says so.
    pub fn drained(&mut self) {
        self.readable = false;
    }

    /// The peek at `max` found the end of the stream.
    pub fn end_of_stream(&mut self) {
        self.end.get_or_insert(self.max);
        self.readable = false;
    }

    /// RFC 9293, 3.10.7.3: takes window and acknowledgement of the guest's SYN-ACK, whose window is not scaled.
    pub fn synchronize(&mut self, segment: &SegmentHead, now: Now) {
        self.window = u32::from(segment.window);
        self.window_max_seen = self.window;
        self.window_seq = segment.seq;
        self.window_ack = segment.ack;
        self.advance(segment.ack, now);
    }

    /// RFC 9293, 3.10.7.4, fifth step: takes acknowledgement, window and SACK blocks of a segment. `bare` says that
    /// the segment carries nothing else, so that it may count as a duplicate (RFC 5681, 2).
    pub fn acknowledge(
        &mut self,
        segment: &SegmentHead,
        scale: u8,
        bare: bool,
        mss: u16,
        now: Now,
    ) -> Acknowledged {
        let ack = segment.ack;
        if self.max.before(ack) {
            return Acknowledged::TooFar;
        }
        let window = u32::from(segment.window) << scale;
        let advances = self.una.before(ack);
        if advances {
            self.advance(ack, now);
        } else if ack == self.una && bare && window == self.window && !self.is_quiet() {
            self.duplicates = self.duplicates.saturating_add(1);
        }
        if !ack.before(self.una)
            && (advances
                || self.window_seq.before(segment.seq)
                || (self.window_seq == segment.seq && !ack.before(self.window_ack)))
        {
            let opens = self.window == 0 && window > 0 && !advances;
            self.window = window;
            self.window_max_seen = self.window_max_seen.max(window);
            if opens {
                self.end_back_off(now);
            }
            self.window_seq = segment.seq;
            self.window_ack = ack;
        }
        self.take_sack(segment);
        self.detect_loss(mss);
        Acknowledged::Fine
    }

    fn advance(&mut self, ack: Seq, now: Now) {
        self.una = ack;
        self.next = self.next.max(ack);
        self.duplicates = 0;
        self.after_timeout = false;
        self.timer.progress();
        if self.timed_since != Now(0) && !ack.before(self.timed) {
            self.timer.sample(now - self.timed_since);
            self.timed_since = Now(0);
        }
        if let Some(recover) = self.recover {
            if ack.before(recover) {
                // RFC 6582, 3.2: a partial acknowledgement shows the next hole.
                self.repeated = self.repeated.max(ack);
            } else {
                self.recover = None;
            }
        }
        if let Some(sacked) = &mut self.sacked {
            sacked.retain(|range| ack.before(range.end));
            if sacked.is_empty() {
                self.sacked = None;
            }
        }
        // RFC 6298, 5.2 and 5.3.
        self.deadline = if self.is_quiet() { Alarm::NONE } else { self.timer.deadline(now).into() };
    }

    /// A closed window has opened: what backed off while it was probed, or while it took nothing, waits no longer than usually.
    fn end_back_off(&mut self, now: Now) {
        self.timer.progress();
        let due = self.timer.deadline(now);
        if self.is_quiet() {
            self.deadline = Alarm::NONE;
        } else if self.deadline.get().is_none_or(|deadline| due < deadline) {
            self.deadline = due.into();
        }
    }

    fn take_sack(&mut self, segment: &SegmentHead) {
        for block in segment.options.sack.as_slice() {
            // RFC 2018, 8: blocks outside of what is in flight mean nothing (RFC 2883 uses them for duplicates).
            if !self.una.before(block.start) || self.max.before(block.end) || !block.start.before(block.end) {
                continue;
            }
            let sacked = self.sacked.get_or_insert_default();
            let touching =
                |range: &&mut Range| !range.end.before(block.start) && !block.end.before(range.start);
            match sacked.as_mut_slice().iter_mut().find(touching) {
                Some(range) => {
                    *range = Range { start: range.start.min(block.start), end: range.end.max(block.end) };
                }
                // More than fit are known again when the guest repeats them (RFC 2018, 4).
                None => {
                    sacked.push(*block);
                }
            }
        }
    }

    fn sacked(&self) -> &[Range] {
        self.sacked.as_deref().map_or(&[], Ranges::as_slice)
    }

    fn highest_sacked(&self) -> Option<Seq> {
        self.sacked().iter().map(|range| range.end).reduce(Seq::max)
    }

    fn detect_loss(&mut self, mss: u16) {
        let sack_says = self.highest_sacked().is_some_and(|high| high.since(self.una) > 3 * u32::from(mss));
        if self.recover.is_none() && !self.after_timeout && (self.duplicates >= 3 || sack_says) {
            self.recover = Some(self.max);
            self.repeated = self.una;
            self.timed_since = Now(0);
        }
    }

    /// The next hole to send again during recovery.
    fn hole(&self, mss: u16) -> Option<Range> {
        self.recover?;
        let start = self.una.max(self.repeated);
        let sacked = self.sacked();
        let Some(high) = self.highest_sacked() else {
            return (start == self.una).then(|| Range { start, end: (start + u32::from(mss)).min(self.max) });
        };
        // Step over what the guest has, then send up to what it has next.
        let mut start = start;
        while let Some(range) = sacked.iter().find(|r| !start.before(r.start) && start.before(r.end)) {
            start = range.end;
        }
        let end = sacked.iter().filter(|r| start.before(r.start)).map(|r| r.start).reduce(Seq::min)?;
        start.before(high).then_some(Range { start, end })
    }

    /// The bytes to peek and send next, FIN not counted, or `None`: nothing to send, no window, or nothing to read.
    pub fn wanted(&self, mss: u16, unacknowledged_max: u32) -> Option<Range> {
        let last_byte = |end: Seq| self.end.map_or(end, |fin| end.min(fin));
        if let Some(hole) = self.hole(mss) {
            let hole = Range { end: last_byte(hole.end), ..hole };
            return hole.start.before(hole.end).then_some(hole);
        }
        let mut allowance = self.window.min(unacknowledged_max);
        if self.after_timeout {
            allowance = allowance.min(AFTER_TIMEOUT_BYTES);
        }
        let mut end = last_byte(self.una + allowance);
        if !self.readable {
            end = end.min(self.max);
        }
        if !self.next.before(end) {
            return None;
        }
        // RFC 9293, 3.8.6.2.1: no small segment because of a small window while others are in flight.
        let usable = end.since(self.next);
        let window_bound = end == self.una + allowance;
        // What is sent again is exempt: nothing else would ever move the window.
        let new = self.next == self.max;
        if window_bound && new && usable < u32::from(mss).min(self.window_max_seen / 2) && !self.is_quiet() {
            return None;
        }
        Some(Range { start: self.next, end })
    }

    /// Whether FIN is to be sent now: everything before it was, and the window has room for it. One that was sent
    /// before is sent again at any window.
    pub fn wants_fin(&self) -> bool {
        self.end == Some(self.next) && (self.next.before(self.una + self.window) || self.fin_sent())
    }

    /// Goes back to the start of what is unacknowledged.
    pub fn rewind(&mut self) {
        self.next = self.una;
    }

    /// A segment of `len` sequence numbers from `seq` goes out.
    pub fn sent(&mut self, seq: Seq, len: u32, now: Now) {
        let end = seq + len;
        if self.recover.is_some() && seq.before(self.next) {
            self.repeated = self.repeated.max(end);
        } else {
            self.next = self.next.max(end);
        }
        if self.max.before(end) {
            if self.timed_since == Now(0) && self.max == seq {
                (self.timed, self.timed_since) = (end, now);
            }
            self.max = end;
        }
        if self.deadline == Alarm::NONE {
            self.deadline = self.timer.deadline(now).into();
        }
    }

    /// When a retransmission or a window probe is due.
    pub fn deadline(&self) -> Option<Now> {
        self.deadline.get()
    }

    /// Whether the window is closed to data that waits, so that it must be probed (RFC 9293, 3.8.6.1).
    fn is_blocked(&self) -> bool {
        self.is_quiet() && self.window == 0 && (self.readable || self.end == Some(self.next))
    }

    /// Starts or stops the probing of a closed window.
    pub fn watch_window(&mut self, now: Now) {
        if !self.is_quiet() {
            return;
        }
        if !self.is_blocked() {
            self.deadline = Alarm::NONE;
        } else if self.deadline == Alarm::NONE {
            self.deadline = self.timer.deadline(now).into();
        }
    }

    /// The deadline may have come. Returns whether a window probe is to be sent; a retransmission shows in
    /// [`Self::wanted`].
    pub fn expired(&mut self, now: Now) -> bool {
        if self.deadline.get().is_none_or(|deadline| now < deadline) {
            return false;
        }
        if self.is_quiet() && !self.is_blocked() {
            self.deadline = Alarm::NONE;
            return false;
        }
        self.timer.back_off();
        self.deadline = self.timer.deadline(now).into();
        if self.is_quiet() {
            return true;
        }
        // RFC 6298, 5.4: from the oldest unacknowledged byte on; by Karn's rule no sample comes from it.
        self.rewind();
        self.timed_since = Now(0);
        self.recover = None;
        self.sacked = None;
        self.duplicates = 0;
        self.after_timeout = true;
        self.window == 0
    }

    /// Bytes at the start of the kernel's receive queue that the guest has, to be discarded. Counts them as gone.
    pub fn take_discard(&mut self) -> u32 {
        let end = self.end.map_or(self.una, |fin| self.una.min(fin));
        let bytes = end.since(self.discarded);
        self.discarded = self.discarded.max(end);
        bytes
    }

    /// `bytes` of those that [`Self::take_discard`] gave are there still.
    pub fn return_discard(&mut self, bytes: u32) {
        self.discarded = self.discarded - bytes;
    }

    /// Bytes that [`Self::take_discard`] would give.
    pub fn discardable(&self) -> u32 {
        self.end.map_or(self.una, |fin| self.una.min(fin)).since(self.discarded)
    }
}
