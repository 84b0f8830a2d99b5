//! Readers that stop: nothing stalls, nothing spins, nobody else notices.

use std::time::{Duration, Instant};

use crate::rig::bytes::{accept, echo, expect_echo, expect_end, transfer};
use crate::rig::cell::{Cell, Engine, on_every_cell};
use crate::rig::pattern::Pattern;
use crate::rig::process;
use crate::rig::quiet;
use crate::rig::site::Family;
use crate::rig::wait::{pause, wait_until};
use crate::streams::{Opened, Pair};

const MIB: u64 = 1 << 20;

/// One run of a bulk stream whose reader stops for three seconds in the middle.
fn run_with_pause(from: &std::net::TcpStream, to: &std::net::TcpStream, seed: u64) {
    const BYTES: u64 = 16 * MIB;
    let pattern = Pattern(seed);
    std::thread::scope(|scope| {
        let sender = scope.spawn(move || pattern.send(from, 0, BYTES));
        pattern.expect(to, 0, 4 * MIB).unwrap();
        pause(Duration::from_secs(3));
        pattern.expect(to, 4 * MIB, BYTES - 4 * MIB).unwrap();
        sender.join().unwrap().unwrap();
    });
}

on_every_cell! {
    a_reader_that_pauses_costs_no_retransmission_timeout(cell) {
        const RUNS_EACH_WAY: usize = 20;
        // A time-out is also what a guest sees whose hythe gets no processor for 200 ms.
        let _alone = quiet::alone();
        let pair = Pair::new(cell);
        for batch in 0..RUNS_EACH_WAY / 10 {
            let family = if batch % 2 == 0 { Family::V4 } else { Family::V6 };
            let streams: Vec<_> = (0..20).map(|_| pair.connect(Opened::ByGuest, family)).collect();
            std::thread::scope(|scope| {
                for (number, (guest, far)) in streams.iter().enumerate() {
                    let (from, to) = if number % 2 == 0 { (guest, far) } else { (far, guest) };
                    scope.spawn(move || run_with_pause(from, to, number as u64));
                }
            });
        }
        assert_eq!(pair.hythe.guest.counter("TcpExtTCPTimeouts"), 0, "time-outs of the guest's kernel");
        // Probes of a closed window are outside it.
        pair.finish(&["out_of_window"]);
    }
}

/// What others notice of readers that stop for a minute, when all share one queue.
fn others_are_unaffected(engine: Engine) {
    const PAUSE: Duration = Duration::from_mins(1);
    const MEANWHILE: Duration = Duration::from_secs(55);
    let pair = Pair::new(Cell::new(engine, 1));
    let stopped = [Opened::ByGuest, Opened::ByFar].map(|opened| pair.connect(opened, Family::V4));
    let (listener, name) = pair.listen(Opened::ByGuest, Family::V6);
    let server = echo(listener, 1);
    let talker = pair.call(Opened::ByGuest, name).unwrap();
    std::thread::scope(|scope| {
        let [to_far, to_guest] = &stopped;
        for (from, to) in [(&to_far.0, &to_far.1), (&to_guest.1, &to_guest.0)] {
            scope.spawn(move || {
                let sender = scope.spawn(move || Pattern(1).send(from, 0, 32 * MIB));
                Pattern(1).expect(to, 0, MIB).unwrap();
                pause(PAUSE);
                Pattern(1).expect(to, MIB, 31 * MIB).unwrap();
                sender.join().unwrap().unwrap();
            });
        }
        let (begun, mut slowest) = (Instant::now(), Duration::ZERO);
        while begun.elapsed() < MEANWHILE {
            let asked = Instant::now();
            expect_echo(&talker, b"still there?");
            slowest = slowest.max(asked.elapsed());
            pause(Duration::from_millis(20));
        }
        assert!(slowest < Duration::from_secs(2), "an exchange took {slowest:?}");
        let (guest, far) = pair.connect(Opened::ByGuest, Family::V4);
        transfer(&guest, &far, 2, 16 * MIB);
        transfer(&far, &guest, 3, 16 * MIB);
    });
    drop(talker);
    server.finish();
    pair.finish(&["out_of_window"]);
}

#[test]
fn readers_that_stop_for_a_minute_leave_others_alone_on_io_uring() {
    others_are_unaffected(Engine::IoUring);
}

#[test]
fn readers_that_stop_for_a_minute_leave_others_alone_on_epoll() {
    others_are_unaffected(Engine::Epoll);
}

on_every_cell! {
    a_thousand_flows_that_nobody_reads_take_no_thread_and_no_time(cell) {
        const FLOWS: usize = 1000;
        const BYTES: u64 = 64 << 10;
        let _busy = quiet::busy();
        let pair = Pair::new(cell);
        // Less than the far server sends, so that the rest stays in hythe's sockets.
        pair.hythe.guest.sysctl("ipv4/tcp_rmem", "4096 8192 8192");
        let threads = process::threads(pair.hythe.pid());
        let (listener, name) = pair.listen(Opened::ByGuest, Family::V4);
        let mut flows: Vec<_> = (0..FLOWS)
            .map(|number| {
                let guest = pair.call(Opened::ByGuest, name).unwrap();
                let (far, _) = accept(&listener);
                Pattern(number as u64).send(&far, 0, BYTES).unwrap();
                (guest, far)
            })
            .collect();
        let waiting = || {
            let sockets = pair.site.host.command(&["ss", "-tnH", "state", "established"]);
            let queued = |line: &str| line.split_whitespace().next()?.parse::<u64>().ok();
            sockets.lines().filter_map(queued).filter(|bytes| *bytes > 0).count()
        };
        wait_until("bytes to wait in a thousand sockets", || waiting() == FLOWS);
        let pid = pair.hythe.pid();
        let used_in_3_s = || {
            let before = process::cpu_ticks(pid);
            pause(Duration::from_secs(3));
            process::cpu_ticks(pid) - before
        };
        // What was begun comes to an end; whoever spins or asks again and again never rests.
        wait_until("hythe to rest", || used_in_3_s() <= 2);
        assert_eq!(waiting(), FLOWS, "nobody has read them");
        assert_eq!(process::threads(pid), threads);

        // None of them is lost: each goes on when it is read.
        for (number, (guest, far)) in flows.iter_mut().enumerate().step_by(100) {
            Pattern(number as u64).expect(&*guest, 0, BYTES).unwrap();
            far.shutdown(std::net::Shutdown::Write).unwrap();
            expect_end(guest);
        }
        drop(flows);
        pair.finish(&["out_of_window", "reset", "no_flow"]);
    }
}
