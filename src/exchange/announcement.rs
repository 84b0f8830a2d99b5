//! No wake-up is lost: the announcement of a sleep.
//!
//! The owner announces, then looks at its mailboxes once more; a sender puts its thing in, then looks at the announcement.
//! The two fences put one of the two looks last, so at least one of them sees what the other did.

#[cfg(not(feature = "loom"))]
use std::sync::atomic::{AtomicBool, Ordering, fence};

#[cfg(feature = "loom")]
use loom::sync::atomic::{AtomicBool, Ordering, fence};

/// The announcement of a sleep: written by the owner of a mailbox, read by all who put something in.
pub struct Announcement(AtomicBool);

impl Announcement {
    /// The owner is awake.
    pub fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// The owner is about to sleep; it must look at its mailboxes after this.
    pub fn announce(&self) {
        self.0.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// The owner is awake.
    pub fn withdraw(&self) {
        self.0.store(false, Ordering::Relaxed);
    }

    /// Something was put in: whether the owner must be woken. True for one of several senders.
    pub fn must_wake(&self) -> bool {
        fence(Ordering::SeqCst);
        self.0.load(Ordering::Relaxed) && self.0.swap(false, Ordering::Relaxed)
    }
}

#[cfg(all(test, feature = "loom"))]
mod loom_tests {
    use super::*;
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicU32;

    #[test]
    fn no_wake_up_is_lost() {
        loom::model(|| {
            let announcement = Arc::new(Announcement::new());
            let queue = Arc::new(AtomicU32::new(0));
            let signalled = Arc::new(AtomicBool::new(false));
            let sender = {
                let (announcement, queue, signalled) =
                    (announcement.clone(), queue.clone(), signalled.clone());
                loom::thread::spawn(move || {
                    queue.store(1, Ordering::Release);
                    if announcement.must_wake() {
                        signalled.store(true, Ordering::Release);
                    }
                })
            };
            announcement.announce();
            let seen = queue.load(Ordering::Acquire) == 1;
            sender.join().unwrap();
            assert!(seen || signalled.load(Ordering::Acquire), "the owner would sleep on a full mailbox");
        });
    }
}
