//! What hythe tells about itself: counters by cause, latencies, and captures.

pub mod capture;
pub mod counters;
pub mod latency;
pub mod recorder;
