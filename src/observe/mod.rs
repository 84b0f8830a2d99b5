//! What hythe tells about itself: counters by cause, latency histograms, captures.

pub mod capture;
pub mod counters;
