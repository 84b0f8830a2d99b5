//! Processors: pinning one thread, and how often it has lost its own.

use std::sync::Barrier;
use std::time::Duration;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::resource::{UsageWho, getrusage};
use nix::unistd::Pid;

const SELF: Pid = Pid::from_raw(0);

fn allowed() -> Vec<usize> {
    let set = sched_getaffinity(SELF).unwrap();
    (0..CpuSet::count()).filter(|number| set.is_set(*number).unwrap()).collect()
}

fn pin(processor: usize) {
    let mut set = CpuSet::new();
    set.set(processor).unwrap();
    sched_setaffinity(SELF, &set).unwrap();
}

#[test]
fn a_thread_is_pinned_without_the_others() {
    let before = allowed();
    let inside = std::thread::spawn(|| {
        let first = allowed()[0];
        pin(first);
        (first, allowed())
    });
    let (first, pinned) = inside.join().unwrap();
    assert_eq!(pinned, [first]);
    assert_eq!(allowed(), before);
}

/// Switches of the calling thread: of its own accord, and not.
fn switches() -> [i64; 2] {
    let usage = getrusage(UsageWho::RUSAGE_THREAD).unwrap();
    [usage.voluntary_context_switches(), usage.involuntary_context_switches()]
}

const SLEEPS: i64 = 2000;

/// A thread that wants a processor all the time beside one that sleeps: how often the first was put off.
fn times_put_off_by_a_sleeper() -> i64 {
    let processor = allowed()[0];
    std::thread::scope(|scope| {
        // Wants the processor now and then, and gives it back by itself.
        let other = scope.spawn(|| {
            pin(processor);
            let before = switches();
            for _ in 0..SLEEPS {
                std::thread::sleep(Duration::from_micros(100));
            }
            let after = switches();
            [after[0] - before[0], after[1] - before[1]]
        });
        pin(processor);
        let before = switches();
        while !other.is_finished() {}
        let [slept, put_off] = other.join().unwrap();
        assert!(slept >= SLEEPS && put_off < SLEEPS / 2, "{slept} sleeps, put off {put_off} times");
        switches()[1] - before[1]
    })
}

#[test]
fn a_thread_that_is_put_off_its_processor_counts_it_and_one_that_sleeps_does_not() {
    // The processor's other users may be put off in its place.
    let mut tries = (0..10).map(|_| std::thread::spawn(times_put_off_by_a_sleeper).join().unwrap());
    assert!(tries.any(|put_off| put_off >= SLEEPS / 2));
}

#[test]
fn who_lets_another_thread_go_first_is_counted_as_if_put_off() {
    const TURNS: i64 = 1000;
    let processor = allowed()[0];
    let both_are_there = Barrier::new(2);
    let turns = || {
        pin(processor);
        both_are_there.wait();
        let before = switches();
        for _ in 0..TURNS {
            std::thread::yield_now();
        }
        let after = switches();
        [after[0] - before[0], after[1] - before[1]]
    };
    let counted = std::thread::scope(|scope| {
        let both = [(); 2].map(|()| scope.spawn(turns));
        both.map(|thread| thread.join().unwrap())
    });
    // Who is left over at the end yields to nobody.
    let [of_own_accord, not] = [0, 1].map(|which| counted.iter().map(|of| of[which]).sum::<i64>());
    assert!(not > of_own_accord && not > TURNS / 2, "{counted:?}");
}
