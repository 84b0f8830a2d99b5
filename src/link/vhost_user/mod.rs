//! vhost-user: a virtual machine's frames, straight from and into its memory.
//!
//! ```text
//! front-end (QEMU, …) ── unix socket ── session ── commands ── queue ── worker
//!        └────────── the guest's memory, its rings, eventfds ───┘
//! ```
//! The *session* ([`crate::monitor`]) speaks the protocol, on a thread of its own because its socket blocks; it holds all
//! that the front-end has said. A *queue* is a worker's link: one pair of virtqueues and what belongs to them, which the
//! session attaches and detaches. Whatever the front-end changes, memory, addresses, descriptors, is changed while the
//! pair is detached, and the session answers only once the worker has let go. So a worker never sees half a change, and
//! never a map that is gone.
//!
//! The guest's payload is never copied here: from its buffers into `sendmsg`, from `recvmsg` into its buffers. Heads are
//! copied, so that they are read once; and complete small frames that come in between are ([`to_guest`] says why).

pub mod control_queue;
mod from_guest;
#[cfg(test)]
mod hostile;
pub mod memory;
pub mod pairs;
mod queue;
#[cfg(test)]
mod tests;
mod to_guest;

pub use queue::{Attachment, Control, Queue, Ring};
pub use to_guest::Takes;
