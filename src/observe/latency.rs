//! What hythe itself adds to a frame's way, recorded by each worker for itself.
//!
//! ```text
//! frame to socket   a batch has come from the link  ->  its payload was handed to host sockets
//! socket to frame   host sockets were read          ->  what came of it lies in the guest's queue
//! ```
//! All that is decided and submitted together takes one time, which counts once for each of its frames. Not in it is how
//! long a frame, or a byte in a socket, waited until a sleeping worker was woken: that is the kernel's. A pass in which
//! frames go both ways reads the clock three times; one without frames and sockets not at all.

use std::fmt::Write;

use hdrhistogram::Histogram;

use crate::time::Now;

/// The longest latency that is told apart, in nanoseconds.
const LONGEST: u64 = 10_000_000_000;

/// The directions, by their names in print.
const DIRECTIONS: [&str; 2] = ["frame_to_socket", "socket_to_frame"];
const FRAME_TO_SOCKET: usize = 0;
const SOCKET_TO_FRAME: usize = 1;

/// Latencies in nanoseconds, to two significant digits, by direction.
#[derive(Clone)]
pub struct Latencies(pub [Histogram<u64>; 2]);

impl Default for Latencies {
    fn default() -> Self {
        // The bounds are constants that fit.
        #[expect(clippy::unwrap_used)]
        let histogram = Histogram::new_with_bounds(1, LONGEST, 2).unwrap();
        Self([histogram.clone(), histogram])
    }
}

impl Latencies {
    /// Takes in what another worker has recorded.
    pub fn add(&mut self, other: &Self) {
        for (all, others) in self.0.iter_mut().zip(&other.0) {
            // Both have the same bounds.
            let _ = all.add(others);
        }
    }

    /// Lines `name value`, in nanoseconds; none of a direction in which nothing went.
    pub fn report(&self) -> String {
        let mut lines = String::new();
        for (direction, histogram) in DIRECTIONS.iter().zip(&self.0).filter(|(_, all)| !all.is_empty()) {
            for (quantile, share) in [("p50", 0.5), ("p99", 0.99), ("p999", 0.999), ("max", 1.0)] {
                // Writing to a string cannot fail.
                let _ = writeln!(lines, "{direction}_{quantile}_ns {}", histogram.value_at_quantile(share));
            }
        }
        lines
    }
}

/// Measures the passes of one worker. Each moment is read from `clock`, if it is needed at all.
#[derive(Default)]
pub struct Stopwatch {
    latencies: Latencies,
    /// When this pass's batch had come from the link.
    taken: Option<Now>,
    /// When the sockets were read, until what came of it is published with the next pass.
    exchanged: Option<Now>,
    /// Frames that are not published yet.
    frames: u64,
}

impl Stopwatch {
    /// What was recorded so far.
    pub fn latencies(&self) -> &Latencies {
        &self.latencies
    }

    /// The link's next batch is here, of so many frames, and what the last pass made is published.
    pub fn taken(&mut self, frames: usize, clock: impl FnOnce() -> Now) {
        (self.taken, self.exchanged) = ((frames > 0).then(clock), None);
    }

    /// The host's sockets have got the payload of so many frames, and were read.
    pub fn exchanged(&mut self, sent: u64, clock: impl FnOnce() -> Now) {
        let now = clock();
        if let Some(taken) = self.taken.take()
            && sent > 0
        {
            self.latencies.0[FRAME_TO_SOCKET].saturating_record_n(now.since(taken), sent);
        }
        (self.exchanged, self.frames) = (Some(now), 0);
    }

    /// A frame to the guest is complete.
    pub fn committed(&mut self) {
        self.frames += 1;
    }

    /// What is complete lies in the guest's queue.
    pub fn published(&mut self, clock: impl FnOnce() -> Now) {
        let frames = std::mem::take(&mut self.frames);
        if let Some(exchanged) = self.exchanged
            && frames > 0
        {
            self.latencies.0[SOCKET_TO_FRAME].saturating_record_n(clock().since(exchanged), frames);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(time: u64) -> impl FnOnce() -> Now {
        move || Now(time)
    }

    fn count_and_max(histogram: &Histogram<u64>) -> (u64, u64) {
        (histogram.len(), histogram.max())
    }

    #[test]
    fn each_frame_counts_with_the_time_of_its_batch() {
        let mut stopwatch = Stopwatch::default();
        stopwatch.taken(2, at(1000));
        stopwatch.exchanged(3, at(1100));
        stopwatch.committed();
        // In the middle of a pass, to make room.
        stopwatch.published(at(1105));
        stopwatch.committed();
        stopwatch.published(at(1107));
        assert_eq!(count_and_max(&stopwatch.latencies().0[FRAME_TO_SOCKET]), (3, 100));
        assert_eq!(count_and_max(&stopwatch.latencies().0[SOCKET_TO_FRAME]), (2, 7));
    }

    #[test]
    fn what_came_of_no_exchange_has_no_latency() {
        let mut stopwatch = Stopwatch::default();
        // Acknowledgements alone go to no socket.
        stopwatch.taken(1, at(1));
        stopwatch.exchanged(0, at(2));
        stopwatch.published(|| unreachable!("nothing was complete"));
        // A frame for which there is nothing to do at a socket, and long after another worker's.
        stopwatch.taken(1, at(3));
        stopwatch.taken(0, || unreachable!("nothing has come"));
        stopwatch.exchanged(1, at(900_000));
        // A frame of a timer's, long after.
        stopwatch.taken(0, || unreachable!("nothing has come"));
        stopwatch.committed();
        stopwatch.published(|| unreachable!("no socket was read"));
        // A frame of the slow path's in front of the next exchange.
        stopwatch.committed();
        stopwatch.exchanged(0, at(1_000_000));
        stopwatch.published(|| unreachable!("nothing was complete"));
        assert_eq!(stopwatch.latencies().report(), "");
    }

    #[test]
    fn workers_latencies_add_up() {
        let record = |nanoseconds| {
            let mut stopwatch = Stopwatch::default();
            stopwatch.taken(1, at(0));
            stopwatch.exchanged(1, at(nanoseconds));
            stopwatch.latencies().clone()
        };
        let mut all = record(10);
        all.add(&record(u64::MAX));
        assert_eq!(all.0[FRAME_TO_SOCKET].len(), 2);
        let report = all.report();
        assert!(report.starts_with("frame_to_socket_p50_ns 10\n"), "{report}");
        assert_eq!(report.lines().count(), 4, "{report}");
    }
}
