//! Which processor a worker runs on.
//!
//! Workers are pinned, each to a processor that no other worker has. It is not theirs alone, though: the kernel likes to run a
//! program where the thread runs that wakes it, and programs that wait for bytes are woken by workers. Two busy threads then take
//! one processor from each other thousands of times a second, and the frames get small and many; the one that is not pinned would
//! be moved only after a while. So a worker that is put off its processor as often goes to another one itself.
//!
//! Who confines the thread to others than the worker has chosen (taskset(1)) has the last word: the worker stays there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::resource::{UsageWho, getrusage};
use nix::unistd::Pid;

/// The system calls made here.
pub const SYSTEM_CALLS: &[libc::c_long] =
    &[libc::SYS_getrusage, libc::SYS_sched_getaffinity, libc::SYS_sched_setaffinity];

/// Who is preempted so many times a second shares its processor with somebody busy.
const PREEMPTIONS_MAX: u128 = 1000;
/// When it is no better elsewhere, a worker moves again only after so many looks, twice as many each time.
const PAUSE_MAX: u32 = 4;

const THIS_THREAD: Pid = Pid::from_raw(0);

struct Processor {
    number: usize,
    taken: AtomicBool,
}

/// The processors that workers may run on, and which of them a worker has.
#[derive(Clone, Default)]
pub struct Processors(Arc<[Processor]>);

impl Processors {
    /// Those that this process may use. Each process begins with another one: the first worker has the most to do.
    pub fn allowed() -> Self {
        let mut numbers = numbers_allowed();
        let first = std::process::id() as usize % numbers.len().max(1);
        numbers.rotate_left(first);
        Self::of(numbers)
    }

    fn of(numbers: impl IntoIterator<Item = usize>) -> Self {
        let free = |number| Processor { number, taken: AtomicBool::default() };
        Self(numbers.into_iter().map(free).collect())
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The numbers of all, in order.
    fn numbers(&self) -> Vec<usize> {
        let mut numbers: Vec<usize> = self.0.iter().map(|processor| processor.number).collect();
        numbers.sort_unstable();
        numbers
    }

    /// Whether it was free; it is the caller's then.
    fn take(&self, index: usize) -> bool {
        let taken = &self.0[index].taken;
        !taken.load(Ordering::Relaxed) && !taken.swap(true, Ordering::Relaxed)
    }

    fn give_back(&self, index: usize) {
        self.0[index].taken.store(false, Ordering::Relaxed);
    }
}

/// How a thread is confined to processors.
pub trait Confine {
    /// Confines the calling thread to these. Returns whether that was possible.
    fn confine(&mut self, numbers: &[usize]) -> bool;
    /// What it is confined to.
    fn confined(&self) -> Vec<usize>;
    /// How often it has lost its processor while it had something to do, or has given it away
    /// (getrusage(2), `ru_nivcsw`: `sched_yield` counts).
    fn switches(&self) -> u64;
}

/// The kernel does it.
pub struct KernelThread;

impl Confine for KernelThread {
    fn confine(&mut self, numbers: &[usize]) -> bool {
        let mut set = CpuSet::new();
        let known = numbers.iter().all(|number| set.set(*number).is_ok());
        known && sched_setaffinity(THIS_THREAD, &set).is_ok()
    }

    fn confined(&self) -> Vec<usize> {
        numbers_allowed()
    }

    fn switches(&self) -> u64 {
        let usage = getrusage(UsageWho::RUSAGE_THREAD);
        usage.map_or(0, |usage| usage.involuntary_context_switches() as u64)
    }
}

fn numbers_allowed() -> Vec<usize> {
    let Ok(set) = sched_getaffinity(THIS_THREAD) else { return Vec::new() };
    (0..CpuSet::count()).filter(|number| set.is_set(*number).unwrap_or(false)).collect()
}

/// The processor of one worker, whose thread alone may call this.
pub struct Pinning<C = KernelThread> {
    processors: Processors,
    /// Which one the worker has, or had last.
    index: usize,
    /// No other worker has it. Where there are more workers than processors, some have none.
    holds: bool,
    /// The thread is confined to that one, or else to all of them.
    is_pinned: bool,
    /// The worker chooses where it runs.
    chooses: bool,
    /// It goes elsewhere when it is disturbed.
    moves: bool,
    /// Times the worker has let others go first.
    given_way: u64,
    /// Switches besides those, when last looked.
    preemptions: Option<u64>,
    /// Looks to wait for after the next move.
    pause: u32,
    /// Looks to wait for before it.
    wait: u32,
    thread: C,
}

impl Default for Pinning {
    /// Of a worker that runs anywhere.
    fn default() -> Self {
        Self::of(KernelThread, Processors::default(), 0, false)
    }
}

impl Pinning {
    /// Pins the calling thread, which is the worker of this number; whether it `moves` when it is disturbed.
    pub fn new(processors: Processors, worker: usize, moves: bool) -> Self {
        Self::of(KernelThread, processors, worker, moves)
    }
}

impl<C: Confine> Pinning<C> {
    fn of(thread: C, processors: Processors, worker: usize, moves: bool) -> Self {
        let count = processors.count();
        let mut pinning = Self {
            index: worker % count.max(1),
            holds: false,
            is_pinned: false,
            chooses: count > 0,
            moves: moves && count > 1,
            given_way: 0,
            preemptions: None,
            pause: 1,
            wait: 0,
            processors,
            thread,
        };
        pinning.take();
        if !pinning.holds && pinning.chooses {
            pinning.is_pinned = pinning.pin(pinning.index);
        }
        pinning
    }

    /// The worker has something to do: if there is a processor that no other one has, it gets that.
    pub fn take(&mut self) {
        if !self.holds && self.chooses && self.take_from(self.index) {
            self.preemptions = None;
        }
    }

    /// The worker has nothing to do for a while: others may take its processor, and it runs anywhere.
    pub fn leave(&mut self) {
        if std::mem::take(&mut self.holds) {
            self.processors.give_back(self.index);
            if self.still_chooses() {
                self.is_pinned = !self.thread.confine(&self.processors.numbers());
            }
        }
    }

    /// Whoever else waits for this processor goes first.
    pub fn give_way(&mut self) {
        self.given_way += 1;
        std::thread::yield_now();
    }

    /// Whether others put the worker off its processor too often since this was last called, which is so long ago, and it may be
    /// better off elsewhere.
    pub fn is_disturbed(&mut self, elapsed: Duration) -> bool {
        if !self.moves || !self.holds {
            return false;
        }
        let preemptions = self.thread.switches().saturating_sub(self.given_way);
        let Some(before) = self.preemptions.replace(preemptions) else { return false };
        if !is_too_often(preemptions.saturating_sub(before), elapsed) {
            (self.pause, self.wait) = (1, 0);
            return false;
        }
        self.wait = self.wait.saturating_sub(1);
        self.wait == 0
    }

    /// Goes to another processor, if there is one that no worker has. Returns whether it did.
    pub fn move_on(&mut self) -> bool {
        let left = self.index;
        if !self.holds || !self.take_from(left + 1) {
            return false;
        }
        self.processors.give_back(left);
        self.wait = self.pause;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        true
    }

    /// Takes the first free processor from this one on, and from the beginning again.
    fn take_from(&mut self, first: usize) -> bool {
        let count = self.processors.count();
        let free = (first..first + count).map(|index| index % count).find(|index| {
            if !self.processors.take(*index) {
                return false;
            }
            // It may not be there any more, or not for this process.
            let is_there = self.still_chooses() && self.pin(*index);
            if !is_there {
                self.processors.give_back(*index);
            }
            is_there
        });
        let Some(index) = free else { return false };
        (self.index, self.holds, self.is_pinned) = (index, true, true);
        true
    }

    fn pin(&mut self, index: usize) -> bool {
        self.thread.confine(&[self.processors.0[index].number])
    }

    /// Nobody else has confined the thread meanwhile.
    fn still_chooses(&mut self) -> bool {
        if self.chooses {
            let confined = self.thread.confined();
            self.chooses = if self.is_pinned {
                confined == [self.processors.0[self.index].number]
            } else {
                confined == self.processors.numbers()
            };
        }
        self.chooses
    }
}

fn is_too_often(preemptions: u64, elapsed: Duration) -> bool {
    u128::from(preemptions) * 1_000_000_000 > PREEMPTIONS_MAX * elapsed.as_nanos()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_millis(10);

    /// A thread that may run on some processors.
    struct Model {
        there: Vec<usize>,
        confined: Vec<usize>,
        switches: u64,
    }

    impl Confine for Model {
        fn confine(&mut self, numbers: &[usize]) -> bool {
            let numbers: Vec<usize> =
                numbers.iter().copied().filter(|number| self.there.contains(number)).collect();
            let is_possible = !numbers.is_empty();
            if is_possible {
                self.confined = numbers;
            }
            is_possible
        }

        fn confined(&self) -> Vec<usize> {
            self.confined.clone()
        }

        fn switches(&self) -> u64 {
            self.switches
        }
    }

    /// The pinnings of so many workers on processors 10, 11, and so on.
    fn pinnings(processors: usize, workers: usize) -> Vec<Pinning<Model>> {
        let there: Vec<usize> = (10..10 + processors).collect();
        let all = Processors::of(there.iter().copied());
        let model = || Model { there: there.clone(), confined: there.clone(), switches: 0 };
        (0..workers).map(|worker| Pinning::of(model(), all.clone(), worker, true)).collect()
    }

    fn confined(pinnings: &[Pinning<Model>]) -> Vec<&[usize]> {
        pinnings.iter().map(|pinning| &pinning.thread.confined[..]).collect()
    }

    #[test]
    fn a_worker_moves_to_a_processor_that_no_other_one_has() {
        let mut pinnings = pinnings(4, 3);
        assert_eq!(confined(&pinnings), [[10], [11], [12]]);
        assert!(pinnings[0].move_on());
        assert_eq!(confined(&pinnings), [[13], [11], [12]]);
        assert!(pinnings[2].move_on() && pinnings[1].move_on());
        assert_eq!(confined(&pinnings), [[13], [12], [10]]);
        assert!(pinnings[1].move_on() && !pinnings[1].processors.take(0));
    }

    #[test]
    fn a_worker_that_rests_leaves_its_processor_to_others_and_takes_a_free_one_afterwards() {
        let mut pinnings = pinnings(2, 2);
        assert!(!pinnings[0].move_on(), "each has one");
        pinnings[1].leave();
        assert!(pinnings[0].move_on());
        assert_eq!(confined(&pinnings), [&[11][..], &[10, 11]]);
        pinnings[1].take();
        pinnings[1].take();
        assert_eq!(confined(&pinnings), [[11], [10]]);
        assert!(!pinnings[0].move_on() && !pinnings[1].move_on());
    }

    #[test]
    fn a_worker_without_a_processor_of_its_own_takes_one_when_it_can() {
        let mut pinnings = pinnings(2, 3);
        assert_eq!(confined(&pinnings), [[10], [11], [10]]);
        pinnings[2].take();
        assert!(pinnings.iter_mut().all(|pinning| !pinning.move_on()));
        pinnings[1].leave();
        pinnings[2].take();
        assert_eq!(confined(&pinnings), [&[10][..], &[10, 11], &[11]]);
    }

    #[test]
    fn a_processor_that_is_gone_is_passed_over_and_stays_free() {
        let mut pinnings = pinnings(4, 1);
        pinnings[0].thread.there = vec![10, 12];
        assert!(pinnings[0].move_on());
        assert_eq!(confined(&pinnings), [[12]]);
        assert!(pinnings[0].processors.take(1), "nobody has it");
        pinnings[0].thread.there = vec![12];
        assert!(!pinnings[0].move_on());
        assert_eq!(confined(&pinnings), [[12]]);
        assert!(!pinnings[0].processors.take(2), "it is still this worker's");
    }

    #[test]
    fn who_else_confines_the_thread_has_the_last_word() {
        let mut pinnings = pinnings(4, 2);
        pinnings[0].thread.confined = vec![11, 12];
        assert!(!pinnings[0].move_on());
        pinnings[0].leave();
        pinnings[0].take();
        assert_eq!(confined(&pinnings)[0], [11, 12]);
        pinnings[1].leave();
        pinnings[1].thread.confined = vec![13];
        pinnings[1].take();
        assert_eq!(confined(&pinnings)[1], [13]);
    }

    /// In how many of so many windows the worker moves, when it is preempted so often in each.
    fn moves(pinning: &mut Pinning<Model>, windows: u32, switches: u64) -> u32 {
        let window = |_| {
            pinning.thread.switches += switches;
            u32::from(pinning.is_disturbed(WINDOW) && pinning.move_on())
        };
        (0..windows).map(window).sum()
    }

    #[test]
    fn who_is_put_off_too_often_moves_and_less_and_less_while_that_does_not_help() {
        let mut pinning = pinnings(2, 1).remove(0);
        assert_eq!(moves(&mut pinning, 100, 10), 0);
        assert_eq!(moves(&mut pinning, 1, 11), 1);
        assert_eq!(moves(&mut pinning, 100, 10), 0);
        let many = moves(&mut pinning, 1000, 11);
        assert!((1000 / PAUSE_MAX / 2..1000 / PAUSE_MAX + 10).contains(&many), "{many}");
        assert_eq!(moves(&mut pinning, 1, 0), 0);
        assert_eq!(moves(&mut pinning, 1, 11), 1, "at once after a quiet window");
    }

    #[test]
    fn to_let_others_go_first_is_not_to_be_put_off() {
        let mut pinning = pinnings(2, 1).remove(0);
        for _ in 0..10 {
            (0..100).for_each(|_| pinning.give_way());
            assert_eq!(moves(&mut pinning, 1, 100), 0);
        }
    }

    #[test]
    fn nobody_moves_who_shall_not_or_has_nowhere_to_go() {
        let model = |there: &[usize]| Model { there: there.to_vec(), confined: there.to_vec(), switches: 0 };
        let two = Processors::of([10, 11]);
        assert_eq!(moves(&mut Pinning::of(model(&[10, 11]), two, 0, false), 100, 1000), 0);
        assert_eq!(moves(&mut pinnings(1, 1)[0], 100, 1000), 0);
        assert_eq!(moves(&mut Pinning::of(model(&[]), Processors::default(), 0, true), 100, 1000), 0);
    }

    #[test]
    fn too_often_is_a_matter_of_time() {
        assert!(!is_too_often(10, WINDOW) && is_too_often(11, WINDOW));
        assert!(!is_too_often(100, WINDOW * 10) && is_too_often(101, WINDOW * 10));
    }
}
