//! As many workers as the traffic takes: one while it suffices, all when it does not.
//!
//! A guest's kernel spreads flows over the queues of its link. Where there is little to do, that has several workers woken for
//! what one could do without ever going to sleep: each wake-up takes the guest's and the peer's time too. So while the first
//! worker suffices, the others *rest*: the first one reads their queues ([`Link::rest`]), and has all that the guest begins. What
//! others hold stays with them. Frames to the guest pass a queue that rests; frames of the guest are handed over, until a stream
//! moves to the first worker for it ([`super::streams::moving`]), or they are so many that the worker takes part again.
//!
//! A worker that sees several streams begin side by side calls the others, and what begins then is spread by the guest's kernel;
//! clients of published ports the first worker spreads. It also measures how much of the time it had something to do, over windows
//! of some milliseconds. If it had hardly any rest it calls the others, too, and *deals* its streams: of those that are not new
//! and that the guest speaks in during the next window, every other one (or two of three, and so on) goes to a worker that has
//! time. The guest sends over the queue by which it was sent to, so it follows ([`Link::steers`]). One by which the guest sends
//! in bulk stays: what it sends on the new queue would overtake what lies in the old one. A worker whose queue brought nothing for
//! a while rests again, and so does one that could be done without for a while; the first never does.
//!
//! Datagrams stay where their socket is: nobody is called because of them, since a flow that nothing has come back on stays on the
//! queue that the kernel chose, and its datagrams would be handed over one by one from then on. A worker to whose sockets datagrams
//! come takes part by itself: the guest answers them by its queue.
//!
//! Where a worker runs is looked at once a window, too ([`crate::host::processors`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam::utils::CachePadded;

use super::Worker;
use super::outbound::FrameRef;
use crate::exchange::mail::ToWorker;
use crate::frame::address::Endpoint;
use crate::host::Sockets;
use crate::host::engine::Engine;
use crate::link::Link;
use crate::observe::counters::Metric;
use crate::time::Now;

/// Over this time at least the load is measured.
const WINDOW: Duration = Duration::from_millis(10);
/// A worker that had something to do for so many per cent of a window calls for help.
const OVERLOADED: u8 = 97;
/// One that had less to do than this takes streams.
const HAS_TIME: u8 = 50;
/// So many streams more than when a window began have others called: they are meant to run side by side.
const SURGE: u32 = 3;
/// A worker that rests takes part when it was handed so many frames in a window: its streams are many, or are busy.
const HANDED: u32 = 16;
/// After so many windows in a row in which it and the first one together had less to do than [`HAS_TIME`], a worker rests.
const LIGHT: u32 = 10;
/// A worker whose queue brought nothing for so long rests.
const QUIET: Duration = Duration::from_millis(100);
const NS_PER_MS: u64 = 1_000_000;

/// A load that was measured so long ago says nothing: who has nothing to do measures none.
const STALE: Duration = Duration::from_millis(100);
/// After streams were dealt they are not dealt again for so long; each time twice as long, while it does not suffice.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// What all workers know of each other's load.
#[derive(Clone)]
pub struct Loads(Arc<[CachePadded<AtomicU64>]>);

impl Loads {
    /// The load of a worker whose queue the first one reads. It has time.
    const RESTS: u8 = u8::MAX;

    /// Of so many workers.
    pub fn new(workers: usize) -> Self {
        Self((0..workers).map(|_| CachePadded::default()).collect())
    }

    /// One writes, a few hundred times a second at the most: the load, and above it the time in milliseconds.
    fn set(&self, worker: u8, load: u8, now: Now) {
        if let Some(own) = self.0.get(usize::from(worker)) {
            own.store((now.0 / NS_PER_MS) << 8 | u64::from(load), Ordering::Relaxed);
        }
    }

    /// The load, and when it was measured.
    fn of(&self, worker: u8) -> (u8, Now) {
        let load = self.0.get(usize::from(worker)).map_or(0, |load| load.load(Ordering::Relaxed));
        (load as u8, Now((load >> 8) * NS_PER_MS))
    }

    fn workers(&self) -> impl Iterator<Item = u8> {
        0..self.0.len() as u8
    }

    /// The load in per cent, of one that takes part.
    fn percent(&self, worker: u8, now: Now) -> u8 {
        let (load, at) = self.of(worker);
        if load == Self::RESTS || at + STALE <= now { 0 } else { load }
    }

    fn rests(&self, worker: u8) -> bool {
        self.of(worker).0 == Self::RESTS
    }

    fn has_time(&self, worker: u8, now: Now) -> bool {
        self.percent(worker, now) < HAS_TIME
    }
}

/// Some milliseconds that are over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Window {
    lasted: Duration,
    /// How much of it there was something to do.
    percent: u8,
}

/// How much of the time there was something to do.
struct Meter {
    since: Now,
    idle_since: Option<Now>,
    idle: Duration,
}

impl Meter {
    fn new(now: Now) -> Self {
        Self { since: now, idle_since: None, idle: Duration::ZERO }
    }

    /// There is nothing to do from now on, until the next pass.
    fn idles(&mut self, now: Now) {
        self.idle_since.get_or_insert(now);
    }

    /// A pass begins. Returns the window that is over, if one is.
    fn pass(&mut self, now: Now) -> Option<Window> {
        if let Some(since) = self.idle_since.take() {
            self.idle += now - since;
        }
        let lasted = now - self.since;
        if lasted < WINDOW {
            return None;
        }
        let busy = lasted.saturating_sub(self.idle);
        (self.since, self.idle) = (now, Duration::ZERO);
        let percent = (busy.as_nanos() * 100 / lasted.as_nanos()).min(100) as u8;
        Some(Window { lasted, percent })
    }
}

/// A deal under way: to whom streams go, in turns.
struct Deal {
    hands: Vec<u8>,
    next: usize,
}

/// What a worker knows of its load, and does about it.
pub struct Load {
    loads: Loads,
    meter: Meter,
    /// Whether there is one worker while that suffices.
    shares: bool,
    /// Whether the first worker may read its queue.
    may_rest: bool,
    rests: bool,
    /// When its queue has last brought something.
    heard: Now,
    deal: Option<Deal>,
    /// Tells the streams of this deal from those of others.
    number: u8,
    deals_again: Now,
    pause: Duration,
    /// What had passed when the window began.
    passed: [u64; 2],
    /// Frames of this window with datagrams.
    datagrams: u64,
    /// Windows in a row with little to do.
    light: u32,
    /// Frames that it was handed in this window.
    handed: u32,
    /// Streams that there were when the window began, or when others were called for them.
    streams: u32,
}

impl Load {
    /// Of a worker that `shares` what there is to do with others, and takes part alone if it is the first.
    pub(super) fn new(loads: Loads, shares: bool, own: u8, now: Now) -> Self {
        let meter = Meter::new(now);
        Self {
            loads,
            meter,
            shares,
            may_rest: shares && own != 0,
            rests: false,
            heard: now,
            deal: None,
            number: 0,
            deals_again: now,
            pause: PAUSE_MIN,
            passed: [0; 2],
            datagrams: 0,
            light: 0,
            handed: 0,
            streams: 0,
        }
    }

    /// Who is to have the client that the first worker has accepted, if not that one itself: one of those that take part, the same
    /// for the same port of the client, which may call again. Where all listen each keeps its own.
    pub(super) fn whose(&self, client: Endpoint, own: u8) -> Option<u8> {
        if !self.shares {
            return None;
        }
        let take_part = || self.loads.workers().filter(|worker| *worker == own || !self.loads.rests(*worker));
        // A kernel may give all its callers even ports.
        let spread = u32::from(client.port).wrapping_mul(0x9e37_79b1) >> 16;
        let count = take_part().count().max(1);
        take_part().nth(spread as usize % count).filter(|worker| *worker != own)
    }

    /// There is nothing to do from now on, until the next pass.
    pub(super) fn idles(&mut self, now: Now) {
        self.meter.idles(now);
    }

    /// Frames came over the link.
    pub(super) fn hears(&mut self, now: Now) {
        self.heard = now;
    }

    /// A frame is a datagram's.
    pub(super) fn carries_datagrams(&mut self, frame: FrameRef) {
        self.datagrams += u64::from(matches!(frame, FrameRef::Link(_)));
    }

    /// When the queue will have been quiet for long enough.
    pub(super) fn deadline(&self) -> Option<Now> {
        (self.may_rest && !self.rests).then(|| self.heard + QUIET)
    }

    /// How many deals there were. A stream that begins remembers it, and is in later ones.
    pub(super) fn number(&self) -> u8 {
        self.number
    }

    /// Where a stream goes in which the guest speaks: to another worker, if there is a deal and it was not in it yet. `dealt` is
    /// the stream's own memory of that.
    pub(super) fn deals(&mut self, own: u8, dealt: &mut u8) -> Option<u8> {
        let deal = self.deal.as_mut().filter(|_| *dealt != self.number)?;
        *dealt = self.number;
        let to = deal.hands[deal.next];
        deal.next = (deal.next + 1) % deal.hands.len();
        Some(to).filter(|to| *to != own)
    }

    /// Begins a deal among these and itself.
    pub(super) fn begin(&mut self, own: u8, others: impl Iterator<Item = u8>, now: Now) {
        // It lasts for a window.
        self.meter = Meter::new(now);
        self.deal = Some(Deal { hands: std::iter::once(own).chain(others).collect(), next: 0 });
        self.number = self.number.wrapping_add(1);
    }
}

impl<L: Link, E: Engine, S: Sockets> Worker<L, E, S> {
    /// A pass begins: looks whether there is too much to do here, or nothing.
    pub(super) fn weigh(&mut self, now: Now) {
        // Without those that are over in all but name.
        let streams = self.admission.streams();
        if let Some(window) = self.load.meter.pass(now) {
            self.window_is_over(window, now);
            self.load.streams = streams;
        } else if self.load.shares && streams >= self.load.streams.saturating_add(SURGE) {
            self.load.streams = streams;
            self.call_those_that_rest();
        }
        if self.load.deadline().is_some_and(|at| at <= now) {
            self.rest(true, now);
        }
    }

    fn window_is_over(&mut self, Window { lasted, percent }: Window, now: Now) {
        let is_disturbed = !self.load.rests && self.is_disturbed(lasted);
        self.load.deal = None;
        self.load.handed = 0;
        let datagrams = std::mem::take(&mut self.load.datagrams);
        let [frames, to_guest] = self.passed_in_window();
        let of_datagrams = datagrams > frames / 2;
        // While the worker waits for its processor, a sender of datagrams fills the queue, and one pass then takes them all.
        if is_disturbed && !of_datagrams && self.pinning.move_on() {
            self.counters.add(Metric::ProcessorsChanged, 1);
        }
        if !self.load.rests {
            self.load.loads.set(self.id, percent, now);
        }
        if to_guest > 0 {
            // The guest answers by this worker's queue.
            self.take_part(now);
        } else if percent + self.load.loads.percent(0, now) < HAS_TIME {
            self.load.light += 1;
            if self.load.light >= LIGHT {
                self.rest(true, now);
            }
        } else {
            self.load.light = 0;
        }
        if percent < OVERLOADED {
            self.load.pause = PAUSE_MIN;
        } else if self.load.shares && !of_datagrams {
            self.call_those_that_rest();
            if now >= self.load.deals_again {
                self.deal(now);
            }
        }
    }

    /// Whether others kept the worker from its processor in the window that is over.
    fn is_disturbed(&mut self, lasted: Duration) -> bool {
        // Where there were not enough for all workers, one may be free now.
        self.pinning.take();
        self.pinning.is_disturbed(lasted)
    }

    /// What has passed in the window that is over: frames of the guest's, datagrams to the guest.
    fn passed_in_window(&mut self) -> [u64; 2] {
        let passed = [Metric::FramesOut, Metric::DatagramsIn].map(|metric| self.counters.metric(metric));
        let before = std::mem::replace(&mut self.load.passed, passed);
        std::array::from_fn(|index| passed[index] - before[index])
    }

    fn call_those_that_rest(&self) {
        let loads = &self.load.loads;
        for other in loads.workers().filter(|other| *other != self.id && loads.rests(*other)) {
            if let Some(mailbox) = self.workers.get(usize::from(other)) {
                // One whose mail is full has something to do already.
                let _ = mailbox.put(ToWorker::TakePart);
            }
        }
    }

    /// Deals streams to those that have time.
    fn deal(&mut self, now: Now) {
        let loads = &self.load.loads;
        let has_time = |other: &u8| *other != self.id && loads.has_time(*other, now);
        let others: Vec<u8> = loads.workers().filter(has_time).collect();
        if others.is_empty() {
            return;
        }
        self.load.begin(self.id, others.into_iter(), now);
        self.load.deals_again = now + self.load.pause;
        self.load.pause = (self.load.pause * 2).min(PAUSE_MAX);
    }

    /// The worker has part in what the guest does, for a while at least.
    pub(super) fn take_part(&mut self, now: Now) {
        self.load.hears(now);
        self.load.light = 0;
        self.rest(false, now);
    }

    /// Another worker has read a frame that is for this one.
    pub(super) fn was_handed_a_frame(&mut self, now: Now) {
        self.load.handed += 1;
        if self.load.handed == HANDED {
            self.take_part(now);
        }
    }

    /// Leaves the link's queue to the first worker, or reads it again. Where that is not possible it stays as it is, for good.
    fn rest(&mut self, rests: bool, now: Now) {
        if !self.load.may_rest || self.load.rests == rests {
            return;
        }
        if self.link.rest(rests).is_err() {
            self.load.may_rest = false;
            return;
        }
        self.load.rests = rests;
        if rests {
            self.pinning.leave();
        } else {
            self.pinning.take();
        }
        (self.load.heard, self.load.light) = (now, 0);
        // What has come since nobody reads it wakes nobody.
        self.link_ready = true;
        self.load.loads.set(self.id, if rests { Loads::RESTS } else { 0 }, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::address::Address;

    const START: Now = Now(1_000_000_000);

    fn ms(ms: u64) -> Now {
        START + Duration::from_millis(ms)
    }

    #[test]
    fn load_is_the_part_of_a_window_in_which_there_was_something_to_do() {
        let mut meter = Meter::new(START);
        let window = |lasted, percent| Some(Window { lasted: Duration::from_millis(lasted), percent });
        assert_eq!(meter.pass(ms(1)), None);
        meter.idles(ms(2));
        assert_eq!(meter.pass(ms(6)), None);
        assert_eq!(meter.pass(ms(10)), window(10, 60));
        meter.idles(ms(10));
        meter.idles(ms(15));
        assert_eq!(meter.pass(ms(1010)), window(1000, 0), "a long sleep ends its window");
        assert_eq!(meter.pass(ms(1019)), None);
        assert_eq!(meter.pass(ms(1020)), window(10, 100));
    }

    #[test]
    fn streams_are_dealt_in_turns_and_each_once() {
        let mut load = Load::new(Loads::new(3), true, 0, START);
        let mut streams = [0u8; 6];
        assert!(streams.iter_mut().all(|dealt| load.deals(0, dealt).is_none()), "there is no deal");
        for _ in 0..300 {
            load.begin(0, [1, 2].into_iter(), START);
            let dealt: Vec<_> = streams.iter_mut().map(|dealt| load.deals(0, dealt)).collect();
            assert_eq!(dealt, [None, Some(1), Some(2), None, Some(1), Some(2)]);
            assert!(streams.iter_mut().all(|dealt| load.deals(0, dealt).is_none()));
            assert_eq!(load.deals(0, &mut load.number()), None, "one that has just begun");
        }
    }

    #[test]
    fn those_that_rest_or_had_little_to_do_or_have_slept_have_time() {
        let loads = Loads::new(5);
        for (worker, load) in [(0, 100), (1, Loads::RESTS), (2, HAS_TIME), (3, HAS_TIME - 1)] {
            loads.set(worker, load, START);
        }
        let with_time =
            |now| loads.workers().filter(|worker| loads.has_time(*worker, now)).collect::<Vec<_>>();
        assert_eq!(with_time(ms(99)), [1, 3, 4]);
        assert_eq!(with_time(ms(100)), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn clients_are_spread_over_those_that_take_part() {
        let load = Load::new(Loads::new(3), true, 0, START);
        let client = |port| Endpoint { address: Address::v4([192, 0, 2, 1]), port };
        // Of every other port, as Linux gives them.
        let ports = || (32_768..60_999).step_by(2);
        let has = |worker| ports().filter(|port| load.whose(client(*port), 0) == worker).count();
        let fair = ports().count() / 3;
        let is_fair = |count: usize| (fair * 9 / 10..fair * 11 / 10).contains(&count);
        assert!([None, Some(1), Some(2)].into_iter().all(|worker| is_fair(has(worker))));
        load.loads.set(2, Loads::RESTS, START);
        assert_eq!(has(None) + has(Some(1)), ports().count());
        load.loads.set(1, Loads::RESTS, START);
        assert_eq!(has(None), ports().count());
        let each_its_own = Load::new(Loads::new(3), false, 0, START);
        assert!(ports().all(|port| each_its_own.whose(client(port), 0).is_none()));
    }

    #[test]
    fn the_first_worker_never_rests() {
        assert_eq!(Load::new(Loads::new(2), true, 0, START).deadline(), None);
    }

    #[test]
    fn a_queue_rests_after_it_was_quiet_unless_it_may_not() {
        let mut load = Load::new(Loads::new(2), true, 1, START);
        load.hears(ms(7));
        assert_eq!(load.deadline(), Some(ms(7) + QUIET));
        load.rests = true;
        assert_eq!(load.deadline(), None);
        assert_eq!(Load::new(Loads::new(2), false, 1, START).deadline(), None);
    }
}
