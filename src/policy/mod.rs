//! Who may speak as whom, and what may be reached.

pub mod addresses;
