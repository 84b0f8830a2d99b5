//! How much work the queues of a thread do, for tests that bound it: a count, since a time proves nothing.

use std::cell::Cell;

thread_local! {
    static STEPS: Cell<u64> = const { Cell::new(0) };
}

/// One turn of a loop over what a driver wrote: a chain, a descriptor, a piece.
pub fn count() {
    STEPS.set(STEPS.get() + 1);
}

/// The steps of `task`.
pub fn of<T>(task: impl FnOnce() -> T) -> (T, u64) {
    let before = STEPS.get();
    (task(), STEPS.get() - before)
}
