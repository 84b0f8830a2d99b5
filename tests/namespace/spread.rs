//! One worker has all that there is to do while it suffices, and all have it when it does not; and where they run.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::rig::bytes::{echo, expect_echo, transfer};
use crate::rig::cell::{Cell, Engine};
use crate::rig::hythe::Hythe;
use crate::rig::process;
use crate::rig::quiet;
use crate::rig::site::{Family, Site};
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
            little(&pair);
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

#[test]
fn clients_of_the_loopback_that_another_worker_joins_leave_no_sockets_behind() {
    const ROUNDS: usize = 5;
    const EACH: usize = 50;
    const AT_A_TIME: usize = 4;
    let _busy = quiet::busy();
    for engine in ENGINES {
        let site = Site::new();
        let hythe = Hythe::of(&site.host, Cell::new(engine, WORKERS)).options("-p 8000:80").run();
        let family = Family::V4;
        let served = ROUNDS * EACH * AT_A_TIME;
        let joined = echo(hythe.guest.listen(family.any(), 80), served);
        let far = site.far.listen(family.far(), 0);
        let beside = far.local_addr().unwrap();
        let far = echo(far, served);
        let used: Vec<usize> = (0..ROUNDS)
            .map(|_| {
                std::thread::scope(|scope| {
                    for _ in 0..AT_A_TIME {
                        // All take part because of these.
                        scope.spawn(|| {
                            (0..EACH)
                                .for_each(|_| expect_echo(&hythe.guest.connect(beside).unwrap(), b"beside"));
                        });
                        scope.spawn(|| {
                            let port = (family.loopback(), 8000);
                            (0..EACH).for_each(|_| expect_echo(&site.host.connect(port).unwrap(), b"joined"));
                        });
                    }
                });
                pause(Duration::from_millis(100));
                process::descriptors(hythe.pid()).len()
            })
            .collect();
        // Some are kept for the next clients.
        assert!(used[ROUNDS - 1] <= used[0] + 64, "{used:?}");
        let counters = hythe.counters();
        assert!(counters.get("tcp_joined") > (served / 2) as u64, "{counters:?}");
        joined.finish();
        far.finish();
        hythe.stop().assert_clean(0);
    }
}

/// Takes this processor for moments, thousands of times a second, until it is dropped.
struct Disturbance {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Disturbance {
    fn of(processor: usize) -> Self {
        let over: Arc<AtomicBool> = Arc::default();
        let mut set = CpuSet::new();
        set.set(processor).unwrap();
        let disturb = {
            let over = over.clone();
            move || {
                sched_setaffinity(Pid::from_raw(0), &set).unwrap();
                while !over.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_micros(100));
                }
            }
        };
        Self { over, thread: Some(std::thread::spawn(disturb)) }
    }
}

impl Drop for Disturbance {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        // One that has failed disturbs nobody, and the test fails.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// The processor that the first worker is pinned to.
fn processor_of_first(pair: &Pair) -> usize {
    let statuses = process::thread_statuses(pair.hythe.pid());
    let status = statuses.iter().find(|status| status.contains("worker-0\n")).unwrap();
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
    list.trim().parse().unwrap()
}

#[test]
fn a_worker_that_is_put_off_its_processor_again_and_again_goes_to_another_one() {
    let _busy = quiet::busy();
    for engine in ENGINES {
        let pair = Pair::new(Cell::new(engine, 1));
        let (guest, far) = pair.connect(OPENED[0], Family::V4);
        let first = processor_of_first(&pair);
        let disturbance = Disturbance::of(first);
        wait_until("the worker to go elsewhere", || {
            transfer(&far, &guest, 1, 64 << 20);
            processor_of_first(&pair) != first
        });
        drop(disturbance);
        assert!(pair.hythe.counters().get("processors_changed") > 0);
        pair.finish(&[]);
    }
}
