//! How long exchanges took.

use std::time::Duration;

use hdrhistogram::Histogram;

use crate::report;

/// Longer than any exchange that is waited for.
const LONGEST_NS: u64 = 60_000_000_000;

/// Three significant digits: finer than a clock read is.
const DIGITS: u8 = 3;

/// Two bars of the printed histogram for each doubling of the time, from one microsecond on.
const BARS_FROM_NS: u64 = 1_000;
const BAR_RATIO: f64 = std::f64::consts::SQRT_2;

/// The exchanges of one measurement.
pub struct Latencies {
    histogram: Histogram<u64>,
    /// Exchanges that failed or got no answer.
    lost: u64,
    elapsed: Duration,
}

impl Latencies {
    /// None yet.
    pub fn new() -> anyhow::Result<Self> {
        let histogram = Histogram::new_with_bounds(1, LONGEST_NS, DIGITS)?;
        Ok(Self { histogram, lost: 0, elapsed: Duration::ZERO })
    }

    /// One exchange took so long.
    pub fn record(&mut self, time: Duration) {
        self.histogram.saturating_record(time.as_nanos() as u64);
    }

    /// One exchange failed.
    pub fn lose(&mut self) {
        self.lost += 1;
    }

    /// All of them together took so long.
    #[must_use]
    pub fn within(mut self, elapsed: Duration) -> Self {
        self.elapsed = elapsed;
        self
    }

    /// Prints count, rate and quantiles; on request also the histogram, as pairs of upper bound (µs) and count.
    pub fn print(&self, test: &str, histogram: bool) {
        let at = |quantile: f64| self.histogram.value_at_quantile(quantile) as f64 / 1e3;
        let count = self.histogram.len() as f64;
        let members = report::members(
            test,
            &[
                ("n", count),
                ("lost", self.lost as f64),
                ("per_s", count / self.elapsed.as_secs_f64().max(1e-9)),
                ("min_us", self.histogram.min() as f64 / 1e3),
                ("p50_us", at(0.5)),
                ("p90_us", at(0.9)),
                ("p99_us", at(0.99)),
                ("p999_us", at(0.999)),
                ("p9999_us", at(0.9999)),
                ("max_us", self.histogram.max() as f64 / 1e3),
            ],
        );
        if histogram {
            println!("{{{members}, \"histogram\": [{}]}}", self.bars().join(", "));
        } else {
            println!("{{{members}}}");
        }
    }

    fn bars(&self) -> Vec<String> {
        let steps = self.histogram.iter_log(BARS_FROM_NS, BAR_RATIO);
        let bar = |upper_ns: u64, count: u64| format!("[{:.1}, {count}]", upper_ns as f64 / 1e3);
        steps.map(|step| bar(step.value_iterated_to() + 1, step.count_since_last_iteration())).collect()
    }
}
