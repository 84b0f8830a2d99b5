//! What all models share: the time, the bytes of streams, the trace, and the verdict.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

use crate::time::Now;

use super::check::Books;
use super::memory::Memory;
use super::pattern::Pattern;

/// What becomes of the trace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tracing {
    /// Only its fingerprint is kept.
    Fingerprint,
    /// The last lines are kept, to be shown with a failure.
    Last(usize),
    /// It is printed as it happens.
    Print,
}

/// The ground that all models stand on.
pub struct Stage {
    now: Cell<Now>,
    tracing: Tracing,
    lines: RefCell<VecDeque<String>>,
    fingerprint: Cell<u64>,
    failure: RefCell<Option<String>>,
    /// Counts what comes of passes: bytes that move, reports, frames.
    pub activity: Cell<u64>,
    /// The bytes of streams.
    pub pattern: Pattern,
    /// Which memory of the links may be touched.
    pub memory: RefCell<Memory>,
    /// What the checkers know.
    pub books: RefCell<Books>,
}

impl Stage {
    /// A stage at `now`.
    pub fn new(now: Now, tracing: Tracing, pattern: Pattern, books: Books) -> Self {
        Self {
            now: Cell::new(now),
            tracing,
            lines: RefCell::default(),
            fingerprint: Cell::new(0xcbf2_9ce4_8422_2325),
            failure: RefCell::default(),
            activity: Cell::new(0),
            pattern,
            memory: RefCell::default(),
            books: RefCell::new(books),
        }
    }

    /// The time.
    pub fn now(&self) -> Now {
        self.now.get()
    }

    /// Moves time on.
    pub fn set_now(&self, now: Now) {
        self.now.set(now);
    }

    /// Something came of a pass.
    pub fn note_activity(&self) {
        self.activity.set(self.activity.get() + 1);
    }

    /// Something is not as it must be. The first thing counts.
    pub fn fail(&self, what: impl Into<String>) {
        let mut failure = self.failure.borrow_mut();
        if failure.is_none() {
            let what = what.into();
            self.trace(0, || format!("FAILURE: {what}"));
            *failure = Some(what);
        }
    }

    /// Fails unless `holds`.
    pub fn check(&self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.fail(what());
        }
    }

    /// Fails with the error of a result.
    pub fn expect(&self, result: Result<(), String>) {
        if let Err(what) = result {
            self.fail(what);
        }
    }

    /// What is not as it must be.
    pub fn failure(&self) -> Option<String> {
        self.failure.borrow().clone()
    }

    /// Whether something is not as it must be.
    pub fn has_failed(&self) -> bool {
        self.failure.borrow().is_some()
    }

    /// Something happened: `mark` goes into the fingerprint, `line` into the trace.
    pub fn trace(&self, mark: u64, line: impl FnOnce() -> String) {
        let time = self.now.get().0;
        for word in [mark, time] {
            self.fingerprint
                .set((self.fingerprint.get() ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23));
        }
        if self.tracing == Tracing::Fingerprint {
            return;
        }
        let line = format!("{:>14.6} ms  {}", time as f64 / 1e6, line());
        match self.tracing {
            Tracing::Last(lines) => {
                let mut kept = self.lines.borrow_mut();
                if kept.len() == lines {
                    kept.pop_front();
                }
                kept.push_back(line);
            }
            _ => eprintln!("{line}"),
        }
    }

    /// A number that two runs share only if the same things happened in them at the same times.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint.get()
    }

    /// The last lines of the trace.
    pub fn last_lines(&self) -> Vec<String> {
        self.lines.borrow().iter().cloned().collect()
    }
}
