//! The monitor of a virtual machine (QEMU, User-Mode Linux, libkrun, vfkit, …): how it comes, and what it says.
//!
//! As the front-end of vhost-user it calls at a [`door`] and in a [`session`] tells of the guest's memory and rings, which
//! [`crate::link::vhost_user`] then works on. Or its frames come over [`sockets`], for [`crate::link::socket`].
//!
//! On a thread of its own, because a front-end may stop in the middle of a message; it must keep nobody else waiting.

mod config_space;
pub mod device;
pub mod door;
mod inflight;
pub mod place;
pub mod session;
pub mod sockets;

use std::io;
use std::sync::Arc;
use std::time::Duration;

/// How long what has failed is left alone before it is tried again.
const PAUSE: Duration = Duration::from_millis(100);

/// What was got, unless it failed. Then it is tried again, but not at once.
fn tried<T>(result: io::Result<T>) -> Option<T> {
    result
        .inspect_err(|error| {
            tracing::error!(%error, "no virtual machine can be accepted");
            std::thread::sleep(PAUSE);
        })
        .ok()
}

/// How a worker is woken.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// A worker's link, as this thread holds it.
pub struct Worker<C> {
    /// The way to it.
    pub control: C,
    /// Wakes it.
    pub wake: Wake,
}
