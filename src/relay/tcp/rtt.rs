//! Retransmission and round-trip time, RFC 6298.
//!
//! The kernel's receive queue holds every byte until the guest acknowledges it, so a retransmission is a rewind of
//! the peek offset: nothing is stored here but numbers.

use std::time::Duration;

use crate::time::Now;

const INITIAL_US: u32 = 1_000_000;
/// RFC 6298, 2.4 asks for one second; like Linux, 200 ms: a guest on the same machine delays its acknowledgements
/// by no more than that.
const MIN_US: u32 = 200_000;
/// RFC 6298, 2.5.
const MAX_US: u32 = 60_000_000;
const BACKOFF_MAX: u8 = 10;

/// When to give up on the oldest unacknowledged byte.
#[derive(Clone, Copy, Debug, Default)]
pub struct RetransmitTimer {
    smoothed_rtt_us: u32,
    rtt_variance_us: u32,
    backoff: u8,
}

impl RetransmitTimer {
    /// RFC 6298 (2.2), (2.3): folds one sample in. Samples of retransmitted segments must not come here (Karn).
    pub fn sample(&mut self, rtt: Duration) {
        let rtt_us = (rtt.as_micros() as u32).clamp(1, MAX_US);
        if self.smoothed_rtt_us == 0 {
            self.smoothed_rtt_us = rtt_us;
            self.rtt_variance_us = rtt_us / 2;
        } else {
            let error = self.smoothed_rtt_us.abs_diff(rtt_us);
            self.rtt_variance_us = self.rtt_variance_us - self.rtt_variance_us / 4 + error / 4;
            self.smoothed_rtt_us = self.smoothed_rtt_us - self.smoothed_rtt_us / 8 + rtt_us / 8;
        }
        self.backoff = 0;
    }

    /// New data was acknowledged: the time-out is no longer backed off.
    pub fn progress(&mut self) {
        self.backoff = 0;
    }

    /// RFC 6298 (5.5): the time-out doubles.
    pub fn back_off(&mut self) {
        self.backoff = (self.backoff + 1).min(BACKOFF_MAX);
    }

    /// How often the time-out was doubled since the last progress.
    pub fn backoffs(&self) -> u8 {
        self.backoff
    }

    /// RFC 6298 (2.3), (2.4): the current time-out.
    pub fn timeout(&self) -> Duration {
        let base = if self.smoothed_rtt_us == 0 {
            INITIAL_US
        } else {
            (self.smoothed_rtt_us + 4 * self.rtt_variance_us).max(MIN_US)
        };
        Duration::from_micros((u64::from(base) << self.backoff).min(u64::from(MAX_US)))
    }

    /// The deadline of something sent at `now`.
    pub fn deadline(&self, now: Now) -> Now {
        now + self.timeout()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_sample_sets_and_later_ones_smooth() {
        let mut timer = RetransmitTimer::default();
        assert_eq!(timer.timeout(), Duration::from_secs(1));
        timer.sample(Duration::from_millis(400));
        assert_eq!(timer.timeout(), Duration::from_micros(400_000 + 4 * 200_000));
        for _ in 0..100 {
            timer.sample(Duration::from_micros(50));
        }
        assert_eq!(timer.timeout(), Duration::from_micros(u64::from(MIN_US)));
    }

    #[test]
    fn the_time_out_doubles_up_to_a_minute_and_falls_back_on_progress() {
        let mut timer = RetransmitTimer::default();
        for expected_s in [1, 2, 4, 8, 16, 32, 60, 60] {
            assert_eq!(timer.timeout(), Duration::from_secs(expected_s));
            timer.back_off();
        }
        timer.progress();
        assert_eq!(timer.timeout(), Duration::from_secs(1));
    }
}
