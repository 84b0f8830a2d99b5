//! The clock as an argument.
//!
//! Nothing below the worker reads a clock: the worker reads it once per pass of its loop and hands the value
//! down, and the simulation hands down a virtual one.

use std::ops::{Add, Sub};
use std::time::Duration;

/// A point on a monotonic clock, in nanoseconds since an arbitrary start.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Hash)]
pub struct Now(pub u64);

impl Now {
    /// Reads the kernel's monotonic clock (`CLOCK_MONOTONIC`).
    pub fn read() -> Self {
        match nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC) {
            Ok(time) => Self(time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64),
            // The monotonic clock exists on every Linux; were it refused, time would stand still.
            Err(_) => Self(0),
        }
    }

    /// Whole milliseconds since the clock's start, wrapping at 32 bits: the granularity of TCP timestamps.
    pub fn millis32(self) -> u32 {
        (self.0 / 1_000_000) as u32
    }

    /// Nanoseconds from `earlier` to `self`, zero when `earlier` is later.
    pub fn since(self, earlier: Now) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Duration> for Now {
    type Output = Now;
    fn add(self, rest: Duration) -> Now {
        Now(self.0.saturating_add(rest.as_nanos() as u64))
    }
}

impl Sub<Now> for Now {
    type Output = Duration;
    fn sub(self, earlier: Now) -> Duration {
        Duration::from_nanos(self.since(earlier))
    }
}

/// How long the machine has slept since it was started: what `CLOCK_BOOTTIME` counts and `CLOCK_MONOTONIC` does not.
pub fn slept() -> Duration {
    use nix::time::{ClockId, clock_gettime};
    let read = |clock| clock_gettime(clock).map(Duration::from);
    let (awake, in_all) = (read(ClockId::CLOCK_MONOTONIC), read(ClockId::CLOCK_BOOTTIME));
    // Both exist on every Linux that hythe runs on. Read in this order the difference is never too small, and too large by the
    // time between the readings.
    in_all.unwrap_or_default().saturating_sub(awake.unwrap_or_default())
}

/// A point in time or none, in the room of the point alone: what many idle flows have several of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Alarm(u64);

impl Alarm {
    /// None.
    pub const NONE: Self = Self(u64::MAX);

    /// The point.
    pub fn get(self) -> Option<Now> {
        (self != Self::NONE).then_some(Now(self.0))
    }
}

impl From<Now> for Alarm {
    fn from(at: Now) -> Self {
        // The last point of the clock is centuries away.
        Self(at.0.min(u64::MAX - 1))
    }
}
