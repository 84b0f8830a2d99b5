//! Whether a caller is still there, who has asked and listens to the answer.
//!
//! HTTP cannot tell one that has said everything from one that has gone (RFC 9112, 9.6). One that holds ports has nothing
//! more to say, so its end of the stream counts as its going, and so do bytes that nobody waits for.

use std::io;
use std::task::{Context, Poll, ready};

use socket2::SockRef;
use tokio::io::Interest;

use crate::slow::shared_stream::SharedStream;

/// A caller's stream, to be looked at.
#[derive(Clone)]
pub struct Presence(SharedStream);

impl Presence {
    /// The presence of who is at the other end.
    pub fn of(stream: SharedStream) -> Self {
        Self(stream)
    }

    /// Ready when the caller has gone. What polls must be the task that reads from the stream otherwise.
    pub fn poll_gone(&self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if ready!(self.0.get().poll_read_ready(cx)).is_err() {
                return Poll::Ready(());
            }
            let mut byte = [std::mem::MaybeUninit::uninit()];
            let looked =
                self.0.get().try_io(Interest::READABLE, || SockRef::from(self.0.get()).peek(&mut byte));
            match looked {
                // It was ready before and is not now: poll again.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                _ => return Poll::Ready(()),
            }
        }
    }
}
