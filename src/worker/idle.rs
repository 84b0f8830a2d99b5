//! When there is nothing to do: look a little longer, then sleep.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use crossbeam::utils::CachePadded;

use crate::host::Sockets;
use crate::host::engine::{Engine, Interest};
use crate::link::{Link, Ready, VirtqueueCounts};
use crate::observe::counters::Metric;
use crate::time::Now;

use super::Worker;

/// How long to look for work before sleeping.
///
/// A wake-up out of the kernel costs several microseconds, so a worker that will have work again within that time does
/// better to look. Whether it will is judged by how often looking has paid lately; when it does not pay, looking is
/// tried only now and then. A look that took much longer than its limit was interrupted: somebody else needs the
/// processor, and looking stops at once. After many bytes there is no look: their wake-up is a small part of what they
/// cost, and a guest or a peer that is busy with them needs the processor more.
///
/// What a worker waits for is done by others, and on a machine whose processors all look nobody does it. So whoever the
/// worker has just woken, and the kernel has put behind it on its own processor, goes first;
/// and of two processors one may look, see [`Seat`].
pub struct Spinner {
    limit: Duration,
    seat: Seat,
    /// How well it has paid: up when work came in time, down when it did not.
    credit: u8,
    skipped: u8,
    /// Bytes that had passed at the last idle moment.
    bytes: u64,
}

/// A place for one worker that looks. There is one for two processors, and the worker that came last has it: that is the
/// one that has just had traffic. Who loses it sleeps.
#[derive(Clone, Default)]
pub struct Seat(Arc<CachePadded<AtomicU8>>);

impl Seat {
    /// Seats for a machine of so many processors.
    pub fn for_processors(processors: usize) -> Vec<Self> {
        std::iter::repeat_with(Self::default).take((processors / 2).max(1)).collect()
    }

    /// Writes only if another worker had it: the line stays with the one processor that looks again and again.
    fn take(&self, id: u8) {
        if !self.is_of(id) {
            self.0.store(id, Ordering::Relaxed);
        }
    }

    fn is_of(&self, id: u8) -> bool {
        self.0.load(Ordering::Relaxed) == id
    }
}

/// As many bytes between two idle moments are bulk.
const BULK: u64 = 32 << 10;

const CREDIT_MAX: u8 = 16;
/// Without credit, one idle moment in so many is a trial.
const TRIAL_EVERY: u8 = 64;

impl Spinner {
    /// Looks for at most `limit` (zero means never), while it has the seat.
    pub fn new(limit: Duration, seat: Seat) -> Self {
        Self { limit, seat, credit: 0, skipped: 0, bytes: 0 }
    }

    /// Whether to look, after so many `bytes` have passed in all.
    fn wants_to_look(&mut self, bytes: u64) -> bool {
        let passed = bytes - std::mem::replace(&mut self.bytes, bytes);
        if self.limit.is_zero() || passed >= BULK {
            return false;
        }
        if self.credit > 0 {
            return true;
        }
        self.skipped += 1;
        if self.skipped >= TRIAL_EVERY {
            self.skipped = 0;
            return true;
        }
        false
    }

    /// Takes in what a look of `took` has brought.
    fn looked(&mut self, found: bool, took: Duration) {
        self.credit = if took > self.limit * 2 {
            0
        } else if found {
            (self.credit + 2).min(CREDIT_MAX)
        } else {
            self.credit.saturating_sub(1)
        };
    }
}

impl<L: Link, E: Engine, S: Sockets> Worker<L, E, S> {
    /// Runs until the worker is stopped.
    pub fn run(&mut self) {
        loop {
            let busy = self.pass(Now::read());
            if self.is_stopped() {
                return;
            }
            self.wait(busy);
        }
    }

    /// What comes behind a pass: sleeps if there is nothing to do, and takes in what the engine has to report.
    pub fn wait(&mut self, busy: bool) {
        if self.may_sleep(busy) {
            self.counters.add(Metric::Sleeps, 1);
            let now = Now::read();
            self.load.idles(now);
            let timeout = self.deadline().map(|at| at - now);
            self.engine.wait(timeout, &mut self.events);
            self.awake();
        }
    }

    /// Whether there is nothing to do but to sleep. The sleep is announced then, and [`Self::awake`] ends it.
    pub(super) fn may_sleep(&mut self, busy: bool) -> bool {
        if busy {
            self.engine.wait(Some(Duration::ZERO), &mut self.events);
            return false;
        }
        if !self.arm_link() {
            self.link_ready = true;
            return false;
        }
        if self.look() {
            return false;
        }
        if !self.link.prepare_sleep() {
            self.link_ready = true;
            return false;
        }
        self.waker.announce_sleep();
        if self.has_mail() || self.link.has_news() {
            self.awake();
            return false;
        }
        true
    }

    /// Has the engine report the link's descriptors. A link that cannot be watched any more shows it in the next read.
    fn arm_link(&mut self) -> bool {
        for (which, wanted) in self.link.ready_fds().into_iter().enumerate() {
            let token = Self::link_token(which);
            if let Some(armed) = self.armed[which].take_if(|armed| wanted != Some(*armed)) {
                self.engine.unwatch(armed.fd, token);
            }
            let Some(Ready { fd, or_writable }) = wanted else { continue };
            let interest = if or_writable { Interest::Both } else { Interest::Readable };
            if self.engine.arm(fd, token, interest).is_err() {
                return false;
            }
            self.armed[which] = wanted;
        }
        true
    }

    /// When the worker has to wake by itself.
    pub(super) fn deadline(&self) -> Option<Now> {
        let timers = [
            self.stream_timers.next(),
            self.datagram_timers.next(),
            self.listeners_resume,
            self.load.deadline(),
        ];
        timers.into_iter().flatten().min()
    }

    fn has_mail(&self) -> bool {
        !self.mail.is_empty() || self.moves.get(self.id as usize).is_some_and(|moves| !moves.is_empty())
    }

    /// The sleep is over.
    pub(super) fn awake(&mut self) {
        self.waker.awake();
        let counts = self.engine.counts();
        self.counters.set(Metric::SystemCalls, counts.system_calls);
        self.counters.set(Metric::Operations, counts.operations);
        let VirtqueueCounts { chains, kicks, interrupts } = self.link.counts();
        self.counters.set(Metric::VirtqueueChains, chains);
        self.counters.set(Metric::VirtqueueKicks, kicks);
        self.counters.set(Metric::VirtqueueInterrupts, interrupts);
    }

    /// Looks for work for a moment, if that is likely to pay; returns whether there is some.
    fn look(&mut self) -> bool {
        let bytes = [Metric::BytesIn, Metric::BytesOut, Metric::BytesJoined]
            .map(|metric| self.counters.metric(metric));
        if !self.spinner.wants_to_look(bytes.iter().sum()) {
            return false;
        }
        let start = Now::read();
        self.load.idles(start);
        self.spinner.seat.take(self.id);
        self.pinning.give_way();
        loop {
            self.engine.wait(Some(Duration::ZERO), &mut self.events);
            let in_ring = self.link.has_work();
            self.link_ready |= in_ring;
            let found = in_ring || self.link.has_news() || !self.events.is_empty() || self.has_mail();
            let took = Now::read() - start;
            if found || took >= self.spinner.limit {
                self.spinner.looked(found, took);
                return found;
            }
            if !self.spinner.seat.is_of(self.id) {
                return false;
            }
            std::hint::spin_loop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(20);

    /// How many of so many idle moments are spent looking, when each look ends as told.
    fn looks(spinner: &mut Spinner, moments: u32, found: bool, took: Duration) -> u32 {
        let look = |spinner: &mut Spinner| {
            let wants = spinner.wants_to_look(0);
            if wants {
                spinner.looked(found, took);
            }
            u32::from(wants)
        };
        (0..moments).map(|_| look(spinner)).sum()
    }

    #[test]
    fn looking_goes_on_while_it_pays_and_stops_when_it_does_not() {
        let mut spinner = Spinner::new(LIMIT, Seat::default());
        assert_eq!(looks(&mut spinner, 63, true, LIMIT / 2), 0, "nothing speaks for it yet");
        assert_eq!(looks(&mut spinner, 100, true, LIMIT / 2), 100);
        assert_eq!(looks(&mut spinner, 1000, false, LIMIT), u32::from(CREDIT_MAX) + 984 / 64);
    }

    #[test]
    fn looking_stops_at_once_where_others_need_the_processor() {
        let mut spinner = Spinner::new(LIMIT, Seat::default());
        looks(&mut spinner, 200, true, LIMIT / 2);
        assert_eq!(looks(&mut spinner, 60, true, LIMIT * 5), 1);
    }

    #[test]
    fn nobody_looks_for_more_after_many_bytes() {
        let mut spinner = Spinner::new(LIMIT, Seat::default());
        looks(&mut spinner, 200, true, LIMIT / 2);
        assert!(!spinner.wants_to_look(BULK));
        assert!(spinner.wants_to_look(2 * BULK - 1));
        assert!(!spinner.wants_to_look(4 * BULK));
    }

    #[test]
    fn of_two_processors_one_may_look() {
        assert_eq!(
            [1, 2, 3, 4, 16].map(|processors| Seat::for_processors(processors).len()),
            [1, 1, 1, 2, 8]
        );
        let seat = Seat::default();
        seat.take(0);
        seat.clone().take(1);
        assert_eq!([0, 1].map(|id| seat.is_of(id)), [false, true], "who came last has it");
    }

    #[test]
    fn a_limit_of_zero_is_never() {
        assert_eq!(looks(&mut Spinner::new(Duration::ZERO, Seat::default()), 1000, true, Duration::ZERO), 0);
    }
}
