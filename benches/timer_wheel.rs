//! What a deadline costs: to arm, to move, and to come due, among 200,000 others.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use hythe::flow::timer::TimerWheel;
use hythe::time::Now;

const OTHERS: u32 = 200_000;
const TICK: Duration = Duration::from_millis(1);

/// A wheel whose other deadlines lie hours ahead, as those of idle flows do.
fn filled() -> TimerWheel {
    let mut wheel = TimerWheel::new(Now(0));
    for index in 0..OTHERS {
        wheel.arm(index, Now(0) + Duration::from_secs(7200 + u64::from(index % 600)));
    }
    wheel
}

fn move_deadline(criterion: &mut Criterion) {
    let mut wheel = filled();
    let mut round = 0u64;
    criterion.bench_function("timer_wheel/move", |bencher| {
        bencher.iter(|| {
            round += 1;
            wheel.arm(black_box(OTHERS), Now(0) + Duration::from_millis(200 + round % 100));
        });
    });
}

fn arm_and_cancel(criterion: &mut Criterion) {
    let mut wheel = filled();
    criterion.bench_function("timer_wheel/arm_and_cancel", |bencher| {
        bencher.iter(|| {
            wheel.arm(black_box(OTHERS), Now(0) + Duration::from_millis(200));
            wheel.cancel(black_box(OTHERS));
        });
    });
}

fn arm_and_fire(criterion: &mut Criterion) {
    criterion.bench_function("timer_wheel/arm_and_fire_1000_times", |bencher| {
        // Time goes on with every round, so each measurement starts with a wheel of its own.
        bencher.iter_batched_ref(
            || (TimerWheel::new(Now(0)), Now(0)),
            |(wheel, now)| {
                let mut fired = 0;
                for _ in 0..1000 {
                    *now = *now + TICK;
                    wheel.arm(0, *now);
                    wheel.advance(*now, |_| fired += 1);
                }
                assert_eq!(fired, 1000);
            },
            criterion::BatchSize::SmallInput,
        );
    });
}

fn idle_tick(criterion: &mut Criterion) {
    let mut wheel = filled();
    let mut now = Now(0);
    criterion.bench_function("timer_wheel/tick_with_nothing_due", |bencher| {
        bencher.iter(|| {
            // An hour of ticks, over and over: the deadlines stay ahead.
            now = if now.0 < 3_600_000_000_000 { now + TICK } else { now };
            wheel.advance(black_box(now), |_| {});
        });
    });
}

criterion_group!(benches, move_deadline, arm_and_cancel, arm_and_fire, idle_tick);
criterion_main!(benches);
