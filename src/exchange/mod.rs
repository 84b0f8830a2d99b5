//! Mailboxes between threads: bounded, lock-free, never waited on.
//!
//! A mailbox is a `crossbeam` queue and a share in its owner's [`Waker`]. Whoever puts something in wakes the owner only
//! if it sleeps; a full mailbox gives the thing back, and the caller counts it. The owner announces its sleep, looks
//! once more, and then sleeps: so a thing that was put in is either seen in that look or its sender sees the
//! announcement ([`announcement`], which `loom` checks).
#![allow(unsafe_code)]

mod announcement;
pub mod mail;

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use announcement::Announcement;
use crossbeam::queue::ArrayQueue;

/// Wakes one thread out of its sleep in the kernel, by an eventfd.
pub struct Waker {
    announcement: Announcement,
    event: OwnedFd,
}

/// The system calls made here.
pub const SYSTEM_CALLS: &[libc::c_long] = &[libc::SYS_eventfd2, libc::SYS_write, libc::SYS_read];

impl Waker {
    /// A new waker.
    pub fn new() -> std::io::Result<Self> {
        // SAFETY: no memory is passed.
        let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let event = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { announcement: Announcement::new(), event })
    }

    /// The descriptor, borrowed.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.event)
    }

    /// The descriptor that becomes readable when the thread is to wake.
    pub fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// The owner is about to sleep; it must look at its mailboxes after this.
    pub fn announce_sleep(&self) {
        self.announcement.announce();
    }

    /// The owner is awake.
    pub fn awake(&self) {
        self.announcement.withdraw();
    }

    /// Takes the wake-up out of the descriptor.
    pub fn clear(&self) {
        let mut count = [0u8; 8];
        // SAFETY: eight bytes of valid memory. The descriptor does not block; an error means there was nothing.
        let _ = unsafe { libc::read(self.fd(), count.as_mut_ptr().cast(), count.len()) };
    }

    /// Wakes the owner if it sleeps.
    pub fn wake(&self) {
        if self.announcement.must_wake() {
            self.signal();
        }
    }

    /// Makes the descriptor readable, asleep or not: for owners that do not announce their sleep.
    pub fn signal(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight bytes of valid memory. It fails only when the counter is full, and then a wake-up is due anyway.
        let _ = unsafe { libc::write(self.fd(), one.as_ptr().cast(), one.len()) };
    }
}

/// A mailbox of things for one thread. Clones are handles to the same box.
pub struct Mailbox<T> {
    queue: Arc<ArrayQueue<T>>,
    waker: Arc<Waker>,
}

impl<T> Clone for Mailbox<T> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone(), waker: self.waker.clone() }
    }
}

impl<T> Mailbox<T> {
    /// A mailbox for `capacity` things whose owner sleeps on `waker`.
    pub fn new(capacity: usize, waker: Arc<Waker>) -> Self {
        Self { queue: Arc::new(ArrayQueue::new(capacity)), waker }
    }

    /// Puts a thing in and wakes the owner, or gives it back when the mailbox is full.
    pub fn put(&self, thing: T) -> Result<(), T> {
        self.queue.push(thing)?;
        self.waker.wake();
        Ok(())
    }

    /// Takes the oldest thing out. The owner only.
    pub fn take(&self) -> Option<T> {
        self.queue.pop()
    }

    /// How many things are in it.
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_mailbox_gives_back_what_does_not_fit() {
        let mailbox = Mailbox::new(2, Arc::new(Waker::new().unwrap()));
        assert_eq!((mailbox.put(1), mailbox.put(2), mailbox.put(3)), (Ok(()), Ok(()), Err(3)));
        assert_eq!((mailbox.take(), mailbox.take(), mailbox.take()), (Some(1), Some(2), None));
    }

    #[test]
    fn only_a_sleeper_is_woken_and_once() {
        let waker = Arc::new(Waker::new().unwrap());
        let mailbox = Mailbox::new(8, waker.clone());
        let signalled = || {
            let mut poll = [nix::poll::PollFd::new(
                std::os::fd::AsFd::as_fd(&waker.event),
                nix::poll::PollFlags::POLLIN,
            )];
            nix::poll::poll(&mut poll, nix::poll::PollTimeout::ZERO).unwrap() == 1
        };
        mailbox.put(1).unwrap();
        assert!(!signalled());
        waker.announce_sleep();
        mailbox.put(2).unwrap();
        assert!(signalled());
        waker.clear();
        mailbox.put(3).unwrap();
        assert!(!signalled());
    }
}
