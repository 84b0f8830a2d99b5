//! What another thread says to a worker's link: commands, each of which is answered once it is done.

use crossbeam::channel::{Receiver, Sender, bounded};

/// The worker has ended, and its link with it.
#[derive(Debug)]
pub struct Ended;

/// The other thread's end.
pub struct Commander<C, A>(Sender<(C, Sender<A>)>);

/// The link's end.
pub struct Commands<C, A>(Receiver<(C, Sender<A>)>);

/// Both ends.
pub fn channel<C, A>() -> (Commander<C, A>, Commands<C, A>) {
    // The answer to each command is waited for, so there is never more than one.
    let (sender, receiver) = bounded(1);
    (Commander(sender), Commands(receiver))
}

impl<C, A> Commander<C, A> {
    /// Says something to the worker, which `wake` wakes, and waits until it has done it.
    pub fn ask(&self, command: C, wake: impl FnOnce()) -> Result<A, Ended> {
        let (sender, answer) = bounded(1);
        self.0.send((command, sender)).map_err(|_| Ended)?;
        wake();
        answer.recv().map_err(|_| Ended)
    }
}

impl<C, A> Commands<C, A> {
    /// Whether nothing was said.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What was said, and where the answer goes. One at a time: what the worker makes of a command comes before the next.
    pub fn take(&self) -> Option<(C, Sender<A>)> {
        self.0.try_recv().ok()
    }
}
