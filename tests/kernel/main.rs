//! What hythe takes the kernel to do, each thing proved by itself: when a namespace test fails on a new kernel, these
//! say whether it was the kernel that changed.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod calls;
mod datagrams;
mod joined;
mod ports;
mod processors;
mod readiness;
mod ring;
mod streams;
mod tap;
