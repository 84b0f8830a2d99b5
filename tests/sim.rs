//! The simulation: seeds, one after the other or one by itself, and bugs planted on purpose.
//!
//! `HYTHE_SEEDS=10000` runs so many seeds instead of 300; `HYTHE_FIRST_SEED` says from which on. `HYTHE_SEED=n` runs
//! that one alone and prints its trace (with `--nocapture`); `HYTHE_FAULT=Name` plants a bug in it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use hythe::frame::address::Endpoint;
use hythe::sim::application::{Close, Pace, Reset, Script};
use hythe::sim::plan::{DatagramPlan, Opening, Outcome as ConnectOutcome, S, Server};
use hythe::sim::{Fault, Outcome, Plan, Tracing, run};

/// Seeds of a plain run. Every planted bug must be caught within the first half of them.
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
    let totals = Mutex::new((0, 0, 0, 0, 0));
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
        totals.4 += outcome.moves;
    });
    let (seconds, passes, wakes, bytes, moves) = totals.into_inner().unwrap();
    println!(
        "{count} seeds in {:.1} s: {seconds} virtual seconds, {passes} passes, {wakes} wake-ups, {bytes} bytes, {moves} moves",
        start.elapsed().as_secs_f64()
    );
    let mut failures = failures.into_inner().unwrap();
    failures.sort_unstable();
    if let Some(seed) = failures.first() {
        panic!("{} of {count} seeds fail: {failures:?}\n{}", failures.len(), describe(*seed));
    }
}

#[test]
fn a_seed_does_the_same_twice() {
    for seed in 0..20 {
        assert_eq!(run_seed(seed, None).fingerprint, run_seed(seed, None).fingerprint, "seed {seed}");
    }
}

/// One connection of the guest's, on a link and a wire that do nothing of their own.
fn quiet_plan(guest: Script, peer: Script) -> Plan {
    let mut plan = Plan::of_seed(0);
    let connects = |plan: &Plan| {
        matches!(plan.connections[0].opening, Opening::Outbound { outcome: ConnectOutcome::Connects, .. })
    };
    let model = (0..1_000).map(Plan::of_seed).find(connects);
    let mut connection = model
        .map_or_else(|| panic!("no seed begins with a connect"), |mut plan| plan.connections.swap_remove(0));
    connection.start_ns = 0;
    connection.guest_vanishes = None;
    connection.tcp.keep_alive_ns = None;
    connection.tcp.mss = 1440;
    (connection.guest, connection.peer) = (guest, peer);
    plan.workers = 1;
    plan.wrong_queue = 0;
    plan.mtu = 1500;
    plan.preempted = 0;
    plan.link.refused = 0;
    plan.link.stalls = None;
    plan.link.ring = 64;
    (plan.wire.lost, plan.wire.doubled, plan.wire.late) = (0, 0, 0);
    plan.host.late_reports = 0;
    plan.jump = None;
    plan.deals = None;
    plan.horizon_ns = 3 * 3600 * S;
    plan.connections = vec![connection];
    plan.datagrams = Vec::new();
    plan
}

fn script(total: u64, gap_ns: u64) -> Script {
    Script {
        total,
        pace: Pace::Stream,
        write_bytes: (1_000, 1_000),
        write_gap_ns: (gap_ns, gap_ns),
        read_bytes: (1, 1 << 20),
        read_gap_ns: (0, 0),
        pause: None,
        close: Close::AfterWriting,
        reset: Reset::No,
    }
}

#[test]
fn an_established_connection_idle_for_ten_minutes_still_works() {
    // Both ends write once, say nothing for ten minutes, and write again.
    let plan = quiet_plan(script(2_000, 600 * S), script(2_000, 600 * S));
    let outcome = run(&plan, None, Tracing::Last(100));
    assert_eq!(outcome.failure, None, "{}", outcome.trace.join("\n"));
    assert_eq!(outcome.bytes, 4_000);
    assert!(outcome.time_ns > 600 * S, "{}", outcome.time_ns);
    // An idle flow costs memory only.
    assert!(outcome.passes < 100, "{} passes", outcome.passes);
}

/// A plan in which the clock jumps by nine hours, on a link that takes longer than a worker's next passes.
fn with_a_night(mut plan: Plan, at_s: u64) -> Plan {
    plan.wire.latency_ns = (30_000_000, 40_000_000);
    plan.jump = Some((at_s * S, 9 * 3600 * S));
    plan.horizon_ns += 9 * 3600 * S;
    plan
}

#[test]
fn a_night_ends_no_connection_and_brings_no_storm() {
    // Idle when the night comes; with a guest that probes, too.
    for keep_alive_ns in [None, Some(60 * S)] {
        let mut plan = with_a_night(quiet_plan(script(2_000, 600 * S), script(2_000, 600 * S)), 100);
        plan.connections[0].tcp.keep_alive_ns = keep_alive_ns;
        let outcome = run(&plan, None, Tracing::Last(100));
        assert_eq!(outcome.failure, None, "{}", outcome.trace.join("\n"));
        assert_eq!(outcome.bytes, 4_000, "{}", outcome.trace.join("\n"));
        assert!(outcome.time_ns > 9 * 3600 * S, "{}", outcome.time_ns);
        assert!(outcome.frames_to_guest < 40, "{} frames", outcome.frames_to_guest);
    }
    // In the middle of a transfer, at any moment of it.
    for seed in 0..20 {
        let mut plan = with_a_night(quiet_plan(script(200_000, 0), script(200_000, 0)), 0);
        plan.seed = seed;
        plan.jump = Some((100_000_000 + seed * 20_000_000, 9 * 3600 * S));
        let outcome = run(&plan, None, Tracing::Last(100));
        assert_eq!(outcome.failure, None, "seed {seed}: {}", outcome.trace.join("\n"));
        assert_eq!(outcome.bytes, 400_000, "seed {seed}: {}", outcome.trace.join("\n"));
        assert!(outcome.time_ns > 9 * 3600 * S, "the night came too late: {}", outcome.time_ns);
    }
}

#[test]
fn mappings_end_in_a_night_and_datagrams_go_on() {
    let echoes = |plan: &Plan| plan.datagrams.first().is_some_and(|one| one.server == Server::Echoes);
    let model = (0..1_000).map(Plan::of_seed).find(echoes).map(|plan| plan.datagrams[0]).unwrap();
    for echo in [false, true] {
        let mut plan = quiet_plan(script(1, 0), script(1, 0));
        plan.connections.clear();
        let port = if echo { 0 } else { 4_000 };
        let remote = Endpoint { port, ..model.remote };
        plan.datagrams = vec![DatagramPlan {
            start_ns: 0,
            echo,
            remote,
            count: 6,
            size: 100,
            run: 1,
            gap_ns: 20 * S,
            ..model
        }];
        let plan = with_a_night(plan, 50);
        let outcome = run(&plan, None, Tracing::Last(100));
        assert_eq!(outcome.failure, None, "{}", outcome.trace.join("\n"));
        assert_eq!(outcome.datagrams_back, 6);
        assert_eq!(outcome.mappings_opened, 2, "before the night, and after it");
    }
}

#[test]
fn the_guests_keep_alives_are_answered_and_passed_on() {
    let mut plan = quiet_plan(script(2_000, 600 * S), script(2_000, 600 * S));
    plan.connections[0].tcp.keep_alive_ns = Some(60 * S);
    let outcome = run(&plan, None, Tracing::Last(100));
    assert_eq!(outcome.failure, None, "{}", outcome.trace.join("\n"));
    assert!(outcome.keep_alives > 0, "the host's socket was not told to probe");
}

#[test]
fn payload_goes_to_the_socket_straight_from_the_frame() {
    let mut plan = quiet_plan(script(1_000_000, 0), script(1_000_000, 0));
    plan.host.short_sends = 0;
    plan.connections[0].send_buffer = 1 << 20;
    let outcome = run(&plan, None, Tracing::Last(100));
    assert_eq!(outcome.failure, None, "{}", outcome.trace.join("\n"));
    let (from_frames, from_own_memory) = outcome.sent_bytes;
    assert!(from_frames >= 1_000_000, "{from_frames}");
    assert!(from_own_memory < 100_000, "{from_own_memory} of {from_frames}");
}

#[test]
fn streams_are_dealt_while_they_carry_bytes() {
    let carried = |deals| {
        let mut plan = quiet_plan(script(100_000, 1_000_000), script(100_000, 1_000_000));
        // One of two streams stays.
        let mut other = plan.connections[0].clone();
        let Opening::Outbound { guest, remote, host, .. } = &mut other.opening else { unreachable!() };
        for end in [guest, remote, host] {
            end.port ^= 1;
        }
        plan.connections.push(other);
        plan.workers = 2;
        plan.deals = deals;
        let outcome = run(&plan, None, Tracing::Last(100));
        assert_eq!(outcome.failure, None, "{}", outcome.trace.join("\n"));
        assert_eq!(outcome.bytes, 400_000);
        outcome.moves
    };
    assert_eq!(carried(None), 0);
    assert!(carried(Some(20_000_000)) > 0);
}

#[test]
fn a_stream_that_moves_to_another_socket_takes_the_guests_end_along() {
    // The guest says everything and closes at once; the service reads that little by little and moves meanwhile.
    let serves = |plan: &Plan| matches!(plan.connections[0].opening, Opening::Service { .. });
    let service = (0..1_000).map(Plan::of_seed).find(serves).map(|plan| plan.connections[0].opening).unwrap();
    for seed in 0..20 {
        let slow = Script { read_bytes: (1, 200), read_gap_ns: (1_000_000, 1_000_000), ..script(2_000, 0) };
        let mut plan = quiet_plan(script(2_000, 0), Script { close: Close::AfterEnd, ..slow });
        plan.seed = seed;
        plan.connections[0].opening = service;
        let outcome = run(&plan, None, Tracing::Last(100));
        assert_eq!(outcome.failure, None, "{}", outcome.trace.join("\n"));
        assert_eq!(outcome.bytes, 4_000);
    }
}

/// The test of the test: each planted bug is caught.
#[test]
fn every_planted_bug_is_caught() {
    let lines = Mutex::new(Vec::new());
    let missed = Mutex::new(Vec::new());
    share(0..Fault::ALL.len() as u64, |index| {
        let fault = Fault::ALL[index as usize];
        // A world that hangs together by a hair panics loudly; that, too, is being caught.
        let caught = (0..SEEDS / 2).find_map(|seed| Some((seed, run_seed(seed, Some(fault)).failure?)));
        match caught {
            Some((seed, what)) => {
                let what: String = what.chars().take(120).collect();
                lines.lock().unwrap().push(format!("{fault:?}: caught by seed {seed}: {what}"));
            }
            None => missed.lock().unwrap().push(fault),
        }
    });
    let mut lines = lines.into_inner().unwrap();
    lines.sort();
    println!("{}", lines.join("\n"));
    let missed = missed.into_inner().unwrap();
    assert!(missed.is_empty(), "not caught within {} seeds: {missed:?}", SEEDS / 2);
    assert!(Fault::ALL.len() >= 10);
}
