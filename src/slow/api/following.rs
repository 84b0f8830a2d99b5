//! The answer to who listens to what changes: a line of JSON for each event, until the listener goes.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use hyper::body::Bytes;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;

use super::presence::Presence;
use crate::control::shapes::Event;

type Next = Pin<Box<dyn Future<Output = (Result<Event, RecvError>, Receiver<Event>)>>>;

/// An answer that goes on.
pub struct Following {
    next: Next,
    presence: Presence,
}

fn next(mut events: Receiver<Event>) -> Next {
    Box::pin(async move { (events.recv().await, events) })
}

impl Following {
    /// Tells these events as long as the caller is there.
    pub fn new(events: Receiver<Event>, presence: Presence) -> Self {
        Self { next: next(events), presence }
    }

    /// The next line; none at the end.
    pub fn poll_line(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if self.presence.poll_gone(cx).is_ready() {
            return Poll::Ready(None);
        }
        let (event, events) = ready!(self.next.as_mut().poll(cx));
        self.next = next(events);
        let event = match event {
            Ok(event) => event,
            Err(RecvError::Lagged(count)) => Event::Missed { count },
            Err(RecvError::Closed) => return Poll::Ready(None),
        };
        // No map among events has keys that are no strings, which is what could fail.
        let mut line = serde_json::to_vec(&event).unwrap_or_default();
        line.push(b'\n');
        Poll::Ready(Some(line.into()))
    }
}
