//! The answer to who has published ports for as long as it is there.
//!
//! ```text
//! {"ports": […]}\n          at once
//! \n                        now and then: a caller that has vanished without a word is found out
//! the end                   somebody else has unpublished the ports
//! ```
//! The ports go with the answer: when the caller has closed its stream, when the stream breaks, or when nothing can be
//! written to it.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::Bytes;
use tokio::time::{Interval, MissedTickBehavior, interval};

use super::presence::Presence;
use crate::slow::ports::held::Held;

/// How often something is written.
const SIGN_OF_LIFE: Duration = Duration::from_secs(30);

/// An answer that lasts.
pub struct Lasting {
    first: Option<Bytes>,
    held: Held,
    presence: Presence,
    signs: Pin<Box<Interval>>,
}

impl Lasting {
    /// Begins with `first`, and lasts until the caller goes or the ports do.
    pub fn new(first: Bytes, held: Held, presence: Presence) -> Self {
        let mut signs = Box::pin(interval(SIGN_OF_LIFE));
        signs.set_missed_tick_behavior(MissedTickBehavior::Delay);
        signs.reset();
        Self { first: Some(first), held, presence, signs }
    }

    /// The next piece; none at the end.
    pub fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(first));
        }
        if self.presence.poll_gone(cx).is_ready() || self.held.poll_removed(cx).is_ready() {
            return Poll::Ready(None);
        }
        self.signs.poll_tick(cx).map(|_| Some(Bytes::from_static(b"\n")))
    }
}
