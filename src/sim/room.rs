//! The room that the guest offers for frames to it.
//!
//! On a plain link there is room or there is none, and whoever wants some looks again. On a ring as virtio has it, the guest
//! adds buffers whenever it likes: a worker may find them at any look, and hears of them in its sleep only if it has asked.

use crate::host::engine::Token;
use crate::random::Random;

/// How often, in a million, a look finds what the guest is about to add.
const FOUND: u64 = 600_000;

/// Room for frames, in their number.
#[derive(Default)]
pub struct Room {
    /// The worker is told of room, and has to ask for that.
    pub is_told: bool,
    /// The room that is there.
    free: usize,
    /// What the guest is about to add.
    coming: usize,
    /// The guest offers nothing for now.
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
    pub fn new(frames: usize, is_told: bool) -> Self {
        Self { is_told, free: frames, ..Self::default() }
    }

    /// Whether there is some.
    pub fn is_there(&self) -> bool {
        self.free > 0 && !self.stalled
    }

    /// Takes room for a frame, if there is some.
    pub fn take(&mut self) -> bool {
        let is_there = self.is_there();
        self.free -= usize::from(is_there);
        is_there
    }

    /// Room that was taken is not needed.
    pub fn put_back(&mut self, frames: usize) {
        self.free += frames;
    }

    /// The guest has taken so many frames, and will add as much room again.
    pub fn will_come(&mut self, frames: usize) {
        self.coming += frames;
    }

    /// The guest adds room that was to come, unless it was found before.
    pub fn comes(&mut self, frames: usize) {
        if !self.stalled {
            let added = frames.min(self.coming);
            self.coming -= added;
            self.free += added;
            self.tell();
        }
    }

    /// The guest offers nothing from now on, or does again.
    pub fn stall(&mut self, on: bool) {
        self.stalled = on;
        self.comes(self.coming);
    }

    /// Whether looking again is all that a worker without room can do.
    pub fn is_looked_for(&self) -> bool {
        self.stalled && !self.is_told
    }

    /// A look at the ring: the guest may just have added something.
    pub fn look(&mut self, random: &mut Random) -> bool {
        if self.is_told && random.chance(FOUND) {
            self.comes(self.coming);
        }
        self.is_there()
    }

    /// The worker wants to be told, or not.
    pub fn ask(&mut self, asked: bool) {
        self.asked = asked;
    }

    /// Whether the worker hears of room once there is some, or is about to.
    pub fn will_be_told(&self) -> bool {
        (self.asked || self.rung) && self.armed.is_some()
    }

    fn tell(&mut self) {
        if self.is_there() && std::mem::take(&mut self.asked) {
            self.rung = true;
        }
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
