//! What it costs to hand something to another thread.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use criterion::{Criterion, criterion_group, criterion_main};
use hythe::exchange::{Mailbox, Waker};

const CAPACITY: usize = 1024;

fn mailbox() -> std::io::Result<Mailbox<u64>> {
    Ok(Mailbox::new(CAPACITY, Arc::new(Waker::new()?)))
}

/// The owner is awake: no system call.
fn put_and_take(criterion: &mut Criterion) {
    let Ok(mailbox) = mailbox() else { return };
    criterion.bench_function("mailbox/put_and_take", |bencher| {
        bencher.iter(|| {
            let full = mailbox.put(black_box(1)).is_err();
            (full, mailbox.take())
        });
    });
}

/// There and back between two threads that look all the time, as busy workers do, but let others run in between.
fn between_threads(criterion: &mut Criterion) {
    let (Ok(there), Ok(back)) = (mailbox(), mailbox()) else { return };
    let over = Arc::new(AtomicBool::new(false));
    let echo = {
        let (there, back, over) = (there.clone(), back.clone(), over.clone());
        thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                match there.take() {
                    Some(thing) => drop(back.put(thing)),
                    None => thread::yield_now(),
                }
            }
        })
    };
    criterion.bench_function("mailbox/there_and_back", |bencher| {
        bencher.iter(|| {
            let full = there.put(1).is_err();
            while back.take().is_none() {
                thread::yield_now();
            }
            full
        });
    });
    over.store(true, Ordering::Relaxed);
    // A thread that has failed has made the loop above endless; it cannot come here.
    drop(echo.join());
}

criterion_group!(benches, put_and_take, between_threads);
criterion_main!(benches);
