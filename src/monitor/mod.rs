//! The monitor of a virtual machine (QEMU, User-Mode Linux, …), as the front-end of vhost-user: what it says about the
//! guest's memory and rings, which [`crate::link::vhost_user`] then works on.
//!
//! On a thread of its own, because a front-end may stop in the middle of a message; it must keep nobody else waiting.

mod config_space;
pub mod door;
pub mod session;
