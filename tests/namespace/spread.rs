//! One worker has all that there is to do while it suffices, and all have it when it does not.

use std::time::Duration;

use crate::rig::bytes::transfer;
use crate::rig::cell::{Cell, Engine};
use crate::rig::process;
use crate::rig::quiet;
use crate::rig::site::Family;
use crate::rig::wait::{pause, wait_until};
use crate::streams::{OPENED, Pair};

const ENGINES: [Engine; 2] = [Engine::IoUring, Engine::Epoll];
const WORKERS: u8 = 3;

fn pair(engine: Engine) -> Pair {
    Pair::new(Cell::new(engine, WORKERS))
}

/// How often each worker but the first has left a processor. One of which this stays the same has not run.
fn switches_of_others(pair: &Pair) -> Vec<String> {
    let of_worker = |status: &String| (1..WORKERS).any(|id| status.contains(&format!("worker-{id}\n")));
    let statuses = process::thread_statuses(pair.hythe.pid()).into_iter().filter(of_worker);
    let count = |status: String| {
        status.lines().filter(|line| line.contains("ctxt_switches:")).collect::<Vec<_>>().join(" ")
    };
    statuses.map(count).collect()
}

/// Connections of both kinds, one after the other, each of which carries a little.
fn little(pair: &Pair) {
    for opened in OPENED {
        for number in 0..50 {
            let (guest, far) = pair.connect(opened, Family::V4);
            transfer(&guest, &far, number, 100);
            transfer(&far, &guest, !number, 100);
        }
    }
}

#[test]
fn while_there_is_little_to_do_one_worker_runs() {
    // Where it has to wait for a processor it is as if there were much.
    let _alone = quiet::alone();
    for engine in ENGINES {
        let pair = pair(engine);
        let handed_over = || pair.hythe.counters().get("frames_handed_over");
        wait_until("a while in which one worker suffices", || {
            // Asking wakes all of them.
            let handed_before = handed_over();
            pause(Duration::from_millis(200));
            let before = switches_of_others(&pair);
            assert_eq!(before.len(), usize::from(WORKERS) - 1);
            little(&pair);
            switches_of_others(&pair) == before && handed_over() == handed_before
        });
        pair.finish(&[]);
    }
}

#[test]
fn streams_that_are_too_much_for_one_worker_are_dealt_to_others() {
    let _busy = quiet::busy();
    for engine in ENGINES {
        let pair = pair(engine);
        for opened in OPENED {
            // All begin where one worker has everything.
            pause(Duration::from_millis(200));
            let moved = || pair.hythe.counters().get("tcp_moved");
            let before = moved();
            let streams: Vec<_> = (0..6).map(|_| pair.connect(opened, Family::V4)).collect();
            wait_until("streams to be dealt", || {
                std::thread::scope(|scope| {
                    for (number, (guest, far)) in streams.iter().enumerate() {
                        scope.spawn(move || transfer(guest, far, number as u64, 16 << 20));
                        scope.spawn(move || transfer(far, guest, !(number as u64), 16 << 20));
                    }
                });
                moved() > before
            });
        }
        pair.finish(&[]);
    }
}
