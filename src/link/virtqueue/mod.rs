//! Split virtqueues of a device (virtio 1.3, section 2.7): our own, because every frame goes through them.
//!
//! Both sides share the memory, and the other side is hostile: what lies in it is copied once, then checked, then used.
//! What cannot be is a [`Fault`], after which the queue is not touched any more.
//!
//! Chains are given back in the order in which they were taken. So the used index says all there is to know about what
//! was in flight when a device died, and another one goes on from there without a record of its own.

#[cfg(test)]
pub mod driver;
mod notify;
mod split;
#[cfg(test)]
pub mod steps;
#[cfg(test)]
mod tests;

pub use split::{Chain, Direction, Parts, SplitQueue};

/// What a driver did that no driver may do (virtio 1.3, section).
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Fault {
    /// 2.7.6: more chains are available than the queue has descriptors.
    #[error("its available index is further ahead than the queue is long")]
    AvailableIndex,
    /// 2.7.6: an entry of the available ring is no descriptor.
    #[error("it offers a descriptor that the queue does not have")]
    Head,
    /// 2.7.13.1: a chain was made available that was not given back.
    #[error("it offers a chain once more that it has not got back")]
    HeadTwice,
    /// 2.7.5: a chain with a loop, or longer than the queue.
    #[error("a chain is longer than the queue, or goes round")]
    ChainLength,
    /// 2.7.5: a next descriptor that does not exist.
    #[error("a chain goes on at a descriptor that does not exist")]
    Next,
    /// 2.7.5: memory that is not the guest's.
    #[error("a buffer lies outside of the guest's memory")]
    Address,
    /// A buffer of no bytes, of which a driver could offer without end. No driver does: QEMU takes it for a fault, too.
    #[error("a buffer has no bytes")]
    Empty,
    /// 2.7.4.2: a readable buffer where a writable one belongs, or the other way round.
    #[error("a buffer is for the wrong direction")]
    Direction,
    /// 2.7.5.3.1: an indirect table of no whole number of descriptors, in a table, behind a table, or not negotiated.
    #[error("an indirect table is malformed, or stands where none may")]
    Indirect,
    /// 2.7.4: more bytes than a chain may have.
    #[error("a chain is longer than 4 GiB")]
    Bytes,
}
