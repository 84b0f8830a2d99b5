//! The worker itself, with a virtual machine in front of it and a host behind it that are in memory: the very loop, link,
//! table and relay, and no kernel.
//!
//! A *step* is what the worker does from a wake-up until it would sleep again: a pass or more. The guest and the host do
//! their part between two steps.
#![allow(dead_code, clippy::unwrap_used)]

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use hythe::exchange::{Mailbox, Waker};
use hythe::link::vhost_user::pairs::Pairs;
use hythe::link::vhost_user::{Queue, Takes};
use hythe::observe::counters::{Counters, report};
use hythe::time::Now;
use hythe::worker::{Parts, Worker};

use crate::guest::{Guest, SEGMENT};
use crate::host::{Host, InMemory};
use crate::parts::{attachment, parts};

/// What is moved in a round.
#[derive(Clone, Copy, Debug)]
pub enum Work {
    /// So many segments of 64 KiB from the guest, and their acknowledgement.
    Out(u32),
    /// So many to the guest, and its acknowledgement.
    Back(u32),
    /// One byte there, one back, and its acknowledgement.
    RoundTrip,
}

/// The worker, and the time that it is told.
pub struct Steps {
    worker: Worker<Queue, InMemory, InMemory>,
    host: Rc<RefCell<Host>>,
    now: Now,
}

impl Steps {
    /// One step.
    pub fn step(&mut self) {
        loop {
            self.now = self.now + Duration::from_micros(10);
            let busy = self.worker.pass(self.now);
            self.host.borrow_mut().was_quiet = false;
            self.worker.wait(busy);
            if !busy && self.host.borrow().was_quiet {
                return;
            }
        }
    }
}

/// A guest with one connection, and the worker that serves it.
pub struct Machine {
    guest: Guest,
    steps: Steps,
    counters: Arc<Counters>,
}

impl Machine {
    pub fn new() -> Self {
        let in_memory = InMemory::default();
        let host = in_memory.0.clone();
        let (link, control) = Queue::new(1500, 0, Pairs::default());
        let waker = Arc::new(Waker::new().unwrap());
        let mail = Mailbox::new(64, waker.clone());
        let now = Now(1_000_000_000);
        let parts = Parts { now, ..parts(link, in_memory.clone(), in_memory, waker, mail) };
        let counters = parts.counters.clone();
        let mut worker = Worker::new(parts).unwrap();

        let mut guest = Guest::new(443);
        // The host's bytes are numbers.
        guest.looks = false;
        let attachment = attachment(&guest, Takes { merged: true, partial_checksums: true });
        // It is answered by the worker.
        let attached = std::thread::spawn(move || control.attach(attachment, || {}).is_ok_and(|done| done));
        while !attached.is_finished() {
            worker.pass(now);
            std::thread::yield_now();
        }
        assert!(attached.join().unwrap(), "the rings were refused");
        let mut steps = Steps { worker, host, now };
        steps.step();
        guest.connect();
        let mut machine = Self { guest, steps, counters };
        while !machine.guest.is_connected() {
            machine.turn(0, &mut Steps::step);
        }
        machine.turn(0, &mut Steps::step);
        // The window of the answer to a SYN is not scaled; the next one is.
        machine.round(Work::RoundTrip, Steps::step);
        machine
    }

    /// The guest's turn, in which it sends so many bytes; and the step that follows.
    fn turn(&mut self, bytes: u64, step: &mut impl FnMut(&mut Steps)) {
        self.guest.turn(self.guest.sent + bytes);
        for (which, kick) in self.guest.kicks.iter().enumerate() {
            if kick.read().is_ok() {
                self.steps.host.borrow_mut().kick(which);
            }
        }
        step(&mut self.steps);
    }

    /// Bytes come to the host's socket; and the step that follows.
    fn give(&mut self, bytes: u64, step: &mut impl FnMut(&mut Steps)) {
        self.steps.host.borrow_mut().give(bytes);
        step(&mut self.steps);
    }

    /// One round of some work; `step` has each step of the worker done. Everything arrives within the round.
    pub fn round(&mut self, work: Work, mut step: impl FnMut(&mut Steps)) {
        let before = (self.guest.sent, self.guest.received);
        let (sent, received) = match work {
            Work::Out(segments) => {
                let bytes = u64::from(segments * SEGMENT);
                self.turn(bytes, &mut step);
                (bytes, 0)
            }
            Work::Back(segments) => {
                let bytes = u64::from(segments * SEGMENT);
                self.give(bytes, &mut step);
                self.turn(0, &mut step);
                (0, bytes)
            }
            Work::RoundTrip => {
                self.turn(1, &mut step);
                self.give(1, &mut step);
                self.turn(0, &mut step);
                (1, 1)
            }
        };
        assert_eq!(
            (self.guest.sent, self.guest.received),
            (before.0 + sent, before.1 + received),
            "{work:?}"
        );
        let taken = self.steps.host.borrow().taken;
        assert_eq!(taken, self.guest.sent, "{work:?}: {}", report(&std::iter::once(&*self.counters)));
    }
}
