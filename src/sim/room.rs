//! The buffers that the guest offers for frames to it.
//!
//! On a plain link there is room or there is none, and whoever wants some looks again. On a ring as virtio has it
//! ([`RingPlan`]) the guest runs beside the worker: what it adds is there before the worker knows of it, it adds nothing
//! before it has a good part of its buffers back (as Linux does), and who sleeps hears of it only if he has asked since.

use crate::host::engine::Token;
use crate::random::Random;

use super::plan::RingPlan;

/// How often, in a million, a look falls behind what the guest is about to add.
const BESIDE: u64 = 500_000;

/// Room for frames, in their number.
#[derive(Default)]
pub struct Room {
    /// How the guest adds buffers, where it is a ring.
    pub ring: Option<RingPlan>,
    /// What the worker knows of.
    known: usize,
    /// What it has not seen yet.
    unseen: usize,
    /// Buffers that came back to the guest, which it has not added again.
    coming: usize,
    /// The guest does nothing for the queue for now.
    stalled: bool,
    /// The worker waits to be told.
    asked: bool,
    /// It was told, and nothing has reported that yet.
    rung: bool,
    /// The worker's engine is to report it.
    armed: Option<Token>,
}

impl Room {
    /// Room for so many frames.
    pub fn new(frames: usize, ring: Option<RingPlan>) -> Self {
        Self { ring, known: frames, ..Self::default() }
    }

    /// Takes room for a frame, if there is some.
    pub fn take(&mut self, random: &mut Random) -> bool {
        if self.ring.is_none() && self.stalled {
            return false;
        }
        if self.known == 0 && self.has_unseen(random) {
            self.known = std::mem::take(&mut self.unseen);
        }
        let is_there = self.known > 0;
        self.known -= usize::from(is_there);
        is_there
    }

    /// Room that was taken is not needed.
    pub fn put_back(&mut self, frames: usize) {
        self.known += frames;
    }

    /// Whether there is room that was not seen yet: a look at the ring's index.
    pub fn has_unseen(&mut self, random: &mut Random) -> bool {
        if self.ring.is_some() && random.chance(BESIDE) {
            self.add();
        }
        self.unseen > 0
    }

    /// The guest has taken so many frames out of their buffers.
    pub fn comes_back(&mut self, frames: usize) {
        if self.ring.is_some() {
            self.coming += frames;
        } else {
            self.known += frames;
        }
    }

    /// The guest adds what it has, if that is enough to be worth it.
    pub fn add(&mut self) {
        let Some(ring) = self.ring.filter(|ring| !self.stalled && self.coming >= ring.added_at_once) else {
            return;
        };
        debug_assert!(ring.added_at_once > 0, "it would tell of nothing");
        self.unseen += std::mem::take(&mut self.coming);
        self.rung |= std::mem::take(&mut self.asked);
    }

    /// The guest does nothing for the queue from now on, or does again.
    pub fn stall(&mut self, on: bool) {
        self.stalled = on;
        self.add();
    }

    /// Whether looking again is all that a worker without room can do.
    pub fn is_looked_for(&self) -> bool {
        self.stalled && self.ring.is_none()
    }

    /// The worker wants to be told, or not.
    pub fn ask(&mut self, asked: bool) {
        self.asked = asked;
    }

    /// Whether a worker that sleeps now, and waits for room, hears of the next that the guest adds, and has used all that there is.
    pub fn is_waited_for(&self) -> bool {
        let in_time = self.asked && self.known == 0 && self.unseen == 0;
        self.armed.is_some() && (in_time || self.rung)
    }

    /// The engine is to report with this token that there is room, or is not to.
    pub fn arm(&mut self, token: Option<Token>) {
        self.armed = token;
    }

    /// Whether a report is due.
    pub fn rings(&self) -> bool {
        self.rung && self.armed.is_some()
    }

    /// The token of a report that is due. It is reported once.
    pub fn ring(&mut self) -> Option<Token> {
        let token = self.armed.take_if(|_| self.rung)?;
        self.rung = false;
        Some(token)
    }
}
