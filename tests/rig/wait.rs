//! Waiting for things, with a deadline.

use std::time::{Duration, Instant};

/// How long anything that should happen soon may take on a machine that is busy with other tests. A test that waits
/// this long has failed.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// Waits until `thing` gives something; `what` is what it waited for when that does not come.
pub fn wait_for<T>(what: &str, thing: impl FnMut() -> Option<T>) -> T {
    wait_within(PATIENCE, thing).unwrap_or_else(|| panic!("waited {PATIENCE:?} in vain for {what}"))
}

/// Waits until `condition` holds.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    wait_for(what, || condition().then_some(()));
}

/// Waits for at most `time`.
pub fn wait_within<T>(time: Duration, mut thing: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + time;
    loop {
        if let Some(found) = thing() {
            return Some(found);
        }
        if Instant::now() > deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// A pause that is part of what a test is about: a reader that stops, a peer that is slow.
pub fn pause(time: Duration) {
    std::thread::sleep(time);
}
