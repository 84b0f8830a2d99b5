//! What hythe tells about itself: counters by cause, and captures.

pub mod capture;
pub mod counters;
pub mod recorder;
