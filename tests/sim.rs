//! The simulation: seeds, one after the other or one by itself, and bugs planted on purpose.
//!
//! `HYTHE_SEEDS=10000` runs so many seeds instead of 300; `HYTHE_FIRST_SEED` says from which on. `HYTHE_SEED=n` runs
//! that one alone and prints its trace (with `--nocapture`); `HYTHE_FAULT=Name` plants a bug in it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use hythe::sim::{Fault, Outcome, Plan, Tracing, run};

/// Seeds of a plain run, and those within which every planted bug must be caught.
const SEEDS: u64 = 300;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

fn run_seed(seed: u64, fault: Option<Fault>) -> Outcome {
    run(&Plan::of_seed(seed), fault, Tracing::Fingerprint)
}

/// What a failed seed looks like: the end of its trace, and how to see all of it.
fn describe(seed: u64) -> String {
    let again = run(&Plan::of_seed(seed), None, Tracing::Last(60));
    let what = again.failure.unwrap_or_else(|| "it does not fail the second time".into());
    format!("{}\nseed {seed}: {what}\nHYTHE_SEED={seed} shows all of it", again.trace.join("\n"))
}

/// Hands the numbers of a range to threads, one a core.
fn share(range: std::ops::Range<u64>, work: impl Fn(u64) + Sync) {
    let next = AtomicU64::new(range.start);
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= range.end {
                        return;
                    }
                    work(seed);
                }
            });
        }
    });
}

#[test]
fn every_seed_ends_well() {
    if let Some(seed) = number("HYTHE_SEED") {
        let fault = std::env::var("HYTHE_FAULT").ok();
        let fault = fault.map(|name| *Fault::ALL.iter().find(|fault| format!("{fault:?}") == name).unwrap());
        let plan = Plan::of_seed(seed);
        eprintln!("{plan:#?}");
        let outcome = run(&plan, fault, Tracing::Print);
        eprintln!("{outcome:#?}");
        assert_eq!(outcome.failure, None);
        return;
    }
    let first = number("HYTHE_FIRST_SEED").unwrap_or(0);
    let count = number("HYTHE_SEEDS").unwrap_or(SEEDS);
    let start = Instant::now();
    let failures = Mutex::new(Vec::new());
    let totals = Mutex::new((0, 0, 0, 0));
    share(first..first + count, |seed| {
        let outcome = run_seed(seed, None);
        if let Some(what) = &outcome.failure {
            println!("seed {seed}: {what}");
            failures.lock().unwrap().push(seed);
        }
        let mut totals = totals.lock().unwrap();
        totals.0 += outcome.time_ns / 1_000_000_000;
        totals.1 += outcome.passes;
        totals.2 += outcome.wakes;
        totals.3 += outcome.bytes;
    });
    let (seconds, passes, wakes, bytes) = totals.into_inner().unwrap();
    println!(
        "{count} seeds in {:.1} s: {seconds} virtual seconds, {passes} passes, {wakes} wake-ups, {bytes} bytes",
        start.elapsed().as_secs_f64()
    );
    let mut failures = failures.into_inner().unwrap();
    failures.sort_unstable();
    if let Some(seed) = failures.first() {
        panic!("{} of {count} seeds fail: {failures:?}\n{}", failures.len(), describe(*seed));
    }
}
