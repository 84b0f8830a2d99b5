//! What a program at one end of a connection does: writes, reads, pauses, closes, resets, as its script says.
//!
//! The guest's programs and the world's peers follow the same scripts.

use crate::random::Random;
use crate::time::Now;

use super::clock::earliest;

/// When the program may write the next bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pace {
    /// Whenever there is room.
    Stream,
    /// Requests of `own` bytes, each after the answer of `other` bytes to the one before.
    Ask {
        /// Bytes of a request.
        own: u64,
        /// Bytes of its answer.
        other: u64,
    },
    /// Answers of `own` bytes, each after a request of `other` bytes.
    Answer {
        /// Bytes of an answer.
        own: u64,
        /// Bytes of its request.
        other: u64,
    },
}

/// When the program closes its direction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Close {
    /// As soon as everything is written: the other direction may go on.
    AfterWriting,
    /// When everything is written and the other side has closed.
    AfterEnd,
}

/// When the program ends the connection with a reset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reset {
    /// Never.
    No,
    /// When so many bytes were written.
    AfterWriting(u64),
    /// When so many bytes were read.
    AfterReading(u64),
}

/// What a program does with its connection.
#[derive(Clone, Debug)]
pub struct Script {
    /// Bytes to write in all.
    pub total: u64,
    /// When.
    pub pace: Pace,
    /// Bytes of one write.
    pub write_bytes: (u64, u64),
    /// Time between two writes, in nanoseconds.
    pub write_gap_ns: (u64, u64),
    /// Bytes of one read.
    pub read_bytes: (u64, u64),
    /// Time between two reads, in nanoseconds.
    pub read_gap_ns: (u64, u64),
    /// After so many bytes nothing is read for so many nanoseconds.
    pub pause: Option<(u64, u64)>,
    /// When to close.
    pub close: Close,
    /// When to reset.
    pub reset: Reset,
}

/// A program that follows its script.
#[derive(Clone, Debug)]
pub struct Application {
    script: Script,
    random: Random,
    written: u64,
    read: u64,
    next_write: Now,
    next_read: Now,
    paused: bool,
    ended: bool,
    closed: bool,
    reset: bool,
}

fn after(now: Now, ns: u64) -> Now {
    Now(now.0.saturating_add(ns))
}

impl Application {
    /// A program that begins at `now`.
    pub fn new(script: Script, random: Random, now: Now) -> Self {
        Self {
            script,
            random,
            written: 0,
            read: 0,
            next_write: now,
            next_read: now,
            paused: false,
            ended: false,
            closed: false,
            reset: false,
        }
    }

    /// Bytes written so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Bytes read so far.
    pub fn read(&self) -> u64 {
        self.read
    }

    /// Whether the program has closed its direction.
    pub fn has_closed(&self) -> bool {
        self.closed
    }

    /// Whether the program has seen the other side's end.
    pub fn has_seen_end(&self) -> bool {
        self.ended
    }

    /// Bytes that may be written now as far as the pace goes.
    fn allowed(&self) -> u64 {
        let limit = match self.script.pace {
            Pace::Stream => self.script.total,
            Pace::Ask { own, other } => (self.read / other.max(1) + 1).saturating_mul(own),
            Pace::Answer { own, other } => (self.read / other.max(1)).saturating_mul(own),
        };
        limit.min(self.script.total).saturating_sub(self.written)
    }

    /// Writes, where it is time and there is `room`; returns how many bytes.
    pub fn write(&mut self, now: Now, room: u64) -> u64 {
        let allowed = self.allowed().min(room);
        if self.closed || allowed == 0 || now < self.next_write {
            return 0;
        }
        let bytes = self.random.within(self.script.write_bytes).clamp(1, allowed);
        self.written += bytes;
        self.next_write = after(now, self.random.within(self.script.write_gap_ns));
        bytes
    }

    /// Reads, where it is time and bytes are `available`; returns how many.
    pub fn read_some(&mut self, now: Now, available: u64) -> u64 {
        if available == 0 || now < self.next_read {
            return 0;
        }
        if let Some((at, ns)) = self.script.pause
            && !self.paused
            && self.read >= at
        {
            self.paused = true;
            self.next_read = after(now, ns);
            return 0;
        }
        let bytes = self.random.within(self.script.read_bytes).clamp(1, available);
        self.read += bytes;
        self.next_read = after(now, self.random.within(self.script.read_gap_ns));
        // An answer takes its time, too.
        self.next_write = self.next_write.max(after(now, self.random.within(self.script.write_gap_ns) / 8));
        bytes
    }

    /// The other side has closed its direction, and everything before that was read.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// Whether the program closes its direction now. True once.
    pub fn closes(&mut self) -> bool {
        let written = self.written >= self.script.total || (self.ended && self.script.pace != Pace::Stream);
        let due = match self.script.close {
            Close::AfterWriting => written,
            Close::AfterEnd => written && self.ended,
        };
        let now = due && !self.closed;
        self.closed |= due;
        now
    }

    /// Whether the program resets the connection now. True once.
    pub fn resets(&mut self) -> bool {
        let due = match self.script.reset {
            Reset::No => false,
            Reset::AfterWriting(bytes) => self.written >= bytes,
            Reset::AfterReading(bytes) => self.read >= bytes,
        };
        let now = due && !self.reset;
        self.reset |= due;
        now
    }

    /// When the program has something to do next, given `room` to write and bytes `available` to read.
    pub fn next(&self, room: u64, available: u64) -> Option<Now> {
        let writes = (!self.closed && self.allowed().min(room) > 0).then_some(self.next_write);
        let reads = (available > 0).then_some(self.next_read);
        earliest([writes, reads])
    }
}
