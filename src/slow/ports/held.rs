//! Ports that are published as long as somebody holds them.
//!
//! What is held is let go by dropping it, whenever and wherever that happens; the ports are taken back by a task of their own.
//! Who holds ports learns when somebody else has taken them back.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot::{Receiver, Sender};

/// What a row has of who holds it: gone with the row.
pub type Told = Sender<Infallible>;

/// Ports that go when this goes.
pub struct Held {
    ids: Vec<u32>,
    /// One for each that is still there.
    removed: Vec<Receiver<Infallible>>,
    let_go: UnboundedSender<Vec<u32>>,
}

impl Held {
    /// Holds these ports; `removed` end when they are taken back.
    pub fn new(ids: Vec<u32>, removed: Vec<Receiver<Infallible>>, let_go: UnboundedSender<Vec<u32>>) -> Self {
        Self { ids, removed, let_go }
    }

    /// Ready when all of them have been taken back.
    pub fn poll_removed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while let Some(last) = self.removed.last_mut() {
            if Pin::new(last).poll(cx).is_pending() {
                return Poll::Pending;
            }
            self.removed.pop();
        }
        Poll::Ready(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Nobody hears it when hythe ends, and the ports go then, too.
        let _ = self.let_go.send(std::mem::take(&mut self.ids));
    }
}
