//! From the guest to the host: which bytes are taken, which window is offered.
//!
//! The right edge that was offered is a promise: bytes up to it are taken, into the socket or into the flow's buffer,
//! and it never moves back (RFC 9293, 3.8.6). Rounding by the window scale may show a little less than was
//! promised; the promise is what counts (RFC 7323, 2.4).
//!
//! Segments that come out of order are held, within bounds, and reported by SACK: the order of frames can be lost
//! when a guest moves a connection from one queue to another.

use crate::frame::drop_reason::DropReason;
use crate::frame::tcp::{Flags, Range, Ranges, SegmentHead, Seq};

use super::Config;

/// A guest with less window than this is about to stop: one large segment.
const SMALL_WINDOW: u32 = 64 << 10;

/// After so many turns of question and answer, a question's acknowledgement waits for its answer.
const PINGPONG_AFTER: u8 = 3;

/// What is to become of a segment's payload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Payload {
    /// Nothing to take.
    Nothing,
    /// In order: `len` bytes from `skip`; then `held` bytes that were held from before follow them directly.
    Take {
        /// Payload bytes to leave out at the start.
        skip: u32,
        /// Payload bytes to take.
        len: u32,
        /// Held bytes that are in order now.
        held: u32,
    },
    /// Out of order: the `len` bytes that belong at `seq` are to be held.
    Hold {
        /// Where the bytes belong: perhaps not at the segment's start.
        seq: Seq,
        /// Payload bytes to hold.
        len: u32,
    },
    /// Outside the window, or no room to hold it.
    Refuse(DropReason),
}

/// Whether an acknowledgement is due.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Due {
    No,
    /// It may wait for data to ride on.
    Delayed,
    Now,
}

/// The receiving half of the relay.
#[derive(Clone, Debug)]
pub struct Receive {
    /// RCV.NXT: everything before it was taken.
    next: Seq,
    /// The right edge that is promised.
    edge: Seq,
    /// The right edge that the guest was told last.
    told: Seq,
    /// The last acknowledgement number that was sent.
    acknowledged: Seq,
    /// The size of the window when it was last computed.
    offered: u32,
    /// Bytes taken that are not in the socket yet.
    buffered: u32,
    /// What is held out of order, the newest first. Boxed: it is rare, and idle connections are many.
    held: Option<Box<Ranges>>,
    due: Due,
    /// Turns of question and answer so far, without two questions in a row.
    pingpong: u8,
    /// The guest has sent data to which nothing was sent back yet.
    unanswered: bool,
    fin: bool,
    shut_down: bool,
}

impl Receive {
    /// Expects the byte after the guest's SYN; promises what the flow's buffer alone can keep.
    pub fn new(guest_syn: Seq, config: &Config) -> Self {
        let next = guest_syn + 1;
        let offered = config.buffer_max.min(u32::from(u16::MAX));
        Self {
            next,
            edge: next + offered,
            told: next + offered,
            acknowledged: next,
            offered,
            buffered: 0,
            held: None,
            due: Due::No,
            pingpong: 0,
            unanswered: false,
            fin: false,
            shut_down: false,
        }
    }

    /// RCV.NXT.
    pub fn next(&self) -> Seq {
        self.next
    }

    /// The acknowledgement that the guest saw last.
    pub fn acknowledged(&self) -> Seq {
        self.acknowledged
    }

    /// The promised right edge.
    pub fn edge(&self) -> Seq {
        self.edge
    }

    /// Bytes that were taken and are not in the socket yet.
    pub fn buffered(&self) -> u32 {
        self.buffered
    }

    /// Whether the guest has closed its direction.
    pub fn finished(&self) -> bool {
        self.fin
    }

    /// RFC 9293, 3.10.7.4, first step: whether any part of a segment lies in the window. A FIN needs no room, so it
    /// is taken at a closed window too.
    pub fn is_acceptable(&self, segment: &SegmentHead) -> bool {
        let len = segment.sequence_len();
        let (first, end) = (segment.seq, segment.seq + len);
        if self.edge == self.next {
            return first == self.next && segment.len == 0;
        }
        if len == 0 {
            return !first.before(self.next) && first.before(self.edge);
        }
        first.before(self.edge) && self.next.before(end)
    }

    /// Takes the payload and FIN of an acceptable segment.
    pub fn accept(&mut self, segment: &SegmentHead, mss: u16, config: &Config) -> Payload {
        if segment.sequence_len() == 0 {
            return Payload::Nothing;
        }
        if self.fin {
            // RFC 9293, 3.10.7.4, seventh step: after FIN there is nothing to take.
            self.acknowledge_now();
            return Payload::Nothing;
        }
        let skip = self.next.since(segment.seq).min(segment.len);
        let end = (segment.seq + segment.len).min(self.edge);
        if self.next.before(segment.seq) {
            self.acknowledge_now();
            return self.hold(segment.seq, end.since(segment.seq), config.held_max);
        }
        let len = end.since(segment.seq + skip);
        self.next = self.next + len;
        let held = self.release();
        self.buffered += len + held;
        if std::mem::replace(&mut self.unanswered, true) {
            self.pingpong = 0;
        }
        let whole = skip + len == segment.len && held == 0;
        if segment.flags.has(Flags::FIN) && whole && segment.seq + segment.len == self.next {
            self.next = self.next + 1;
            self.edge = self.edge.max(self.next);
            self.fin = true;
            self.acknowledge_now();
        } else if len == 0 || held > 0 || self.held.is_some() {
            // RFC 5681, 4.2: duplicates and segments that fill a gap are acknowledged at once.
            self.acknowledge_now();
        } else if self.pingpong < PINGPONG_AFTER || self.next.since(self.acknowledged) >= 2 * u32::from(mss) {
            self.acknowledge_now();
        } else if self.due == Due::No {
            self.due = Due::Delayed;
        }
        if len + held == 0 { Payload::Nothing } else { Payload::Take { skip, len, held } }
    }

    /// Notes as held what no held range covers yet: the first such stretch, so that no byte is held twice. The rest,
    /// or all where there is no room, comes again.
    fn hold(&mut self, seq: Seq, len: u32, held_max: u32) -> Payload {
        let known = self.sack_blocks();
        let total: u32 = known.iter().map(|range| range.end.since(range.start)).sum();
        let mut new = Range { start: seq, end: seq + len };
        if let Some(range) = known.iter().find(|r| !new.start.before(r.start) && new.start.before(r.end)) {
            new.start = range.end;
        }
        let following = known.iter().filter(|range| !range.start.before(new.start));
        new.end = following.fold(new.end, |end, range| end.min(range.start));
        let (seq, len) = (new.start, new.end.distance(new.start).max(0) as u32);
        if len == 0 || total + len > held_max {
            return Payload::Refuse(DropReason::OutOfWindow);
        }
        // Ranges that touch become one; the newest stands first (RFC 2018, 4).
        let touches = |range: &Range| !range.end.before(new.start) && !new.end.before(range.start);
        let merged = known.iter().filter(|range| touches(range)).fold(new, |merged, range| Range {
            start: merged.start.min(range.start),
            end: merged.end.max(range.end),
        });
        let mut ranges = Ranges::default();
        ranges.push(merged);
        if !known.iter().filter(|range| !touches(range)).all(|range| ranges.push(*range)) {
            return Payload::Refuse(DropReason::OutOfWindow);
        }
        self.held = Some(Box::new(ranges));
        Payload::Hold { seq, len }
    }

    /// Moves `next` over held bytes that are in order now; returns how many.
    fn release(&mut self) -> u32 {
        let start = self.next;
        let Some(held) = &mut self.held else { return 0 };
        // A range can be reached only after an earlier one was passed, so the lowest goes first.
        let mut lowest = *held.as_ref();
        lowest.as_mut_slice().sort_by_key(|range| range.start.distance(start));
        let mut next = start;
        for range in lowest.as_slice() {
            if !next.before(range.start) {
                next = next.max(range.end);
            }
        }
        held.retain(|range| next.before(range.start));
        if held.is_empty() {
            self.held = None;
        }
        self.next = next;
        next.since(start)
    }

    /// SACK blocks to send.
    pub fn sack_blocks(&self) -> &[Range] {
        self.held.as_deref().map_or(&[], Ranges::as_slice)
    }

    /// Asks for an acknowledgement with the next chance.
    pub fn acknowledge_now(&mut self) {
        self.due = Due::Now;
    }

    /// Whether an acknowledgement must go out in this pass.
    pub fn must_acknowledge(&self) -> bool {
        self.due == Due::Now
    }

    /// Whether an acknowledgement waits for data to ride on.
    pub fn may_acknowledge(&self) -> bool {
        self.due == Due::Delayed
    }

    /// The delay of a waiting acknowledgement is over: no answer came that could have carried it.
    pub fn delay_over(&mut self) {
        if self.due == Due::Delayed {
            self.due = Due::Now;
            self.pingpong = 0;
        }
    }

    /// A segment with the current acknowledgement and window goes out; `with_data` says whether it carries payload.
    pub fn acknowledgement_sent(&mut self, with_data: bool) {
        if with_data && std::mem::take(&mut self.unanswered) {
            self.pingpong = (self.pingpong + 1).min(PINGPONG_AFTER);
        }
        self.due = Due::No;
        self.acknowledged = self.next;
        self.told = self.edge;
    }

    /// The window field of a segment that goes out now: rounded down, so that it promises no more than the edge.
    pub fn window_field(&self, scale: u8) -> u16 {
        (self.edge.since(self.next) >> scale).min(u32::from(u16::MAX)) as u16
    }

    /// The socket took `len` bytes of those that were accepted.
    pub fn taken(&mut self, len: u32) {
        self.buffered = self.buffered.saturating_sub(len);
    }

    /// Whether the room in the socket should be sampled: a good part of the window is used up, or it is small.
    pub fn wants_room(&self) -> bool {
        let left = self.told.since(self.next);
        !self.fin && (self.buffered > 0 || left < SMALL_WINDOW || left < self.offered - self.offered / 4)
    }

    /// Offers what the socket has room for, and what is free of the buffer. A guest that could not send much
    /// is told at once (RFC 9293, 3.8.6.2.2: by no less than two segments).
    pub fn offer(&mut self, socket_room: u32, mss: u16, scale: u8, config: &Config) {
        let largest = (u32::from(u16::MAX) << scale).min(config.window_max);
        self.offered =
            (socket_room.saturating_add(config.buffer_max.saturating_sub(self.buffered))).min(largest);
        self.edge = self.edge.max(self.next + self.offered);
        let growth = self.edge.since(self.told);
        let nearly_closed = self.told.since(self.next) < largest.min(SMALL_WINDOW);
        if nearly_closed && growth >= (2 * u32::from(mss)).min(SMALL_WINDOW).min(largest / 2).max(1) {
            self.acknowledge_now();
        }
    }

    /// Whether the host's direction is to be shut down now: FIN came and everything before it is in the socket.
    /// True once.
    pub fn wants_shutdown(&mut self) -> bool {
        let due = self.fin && self.buffered == 0 && !self.shut_down;
        self.shut_down |= due;
        due
    }

    /// Whether the host has been told that the guest closed its direction.
    pub fn is_shut_down(&self) -> bool {
        self.shut_down
    }
}
