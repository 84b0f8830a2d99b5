//! A few futures, polled together; whichever ends first is next.
//!
//! Polls all of them at every wake-up, which is right for the handful that one query or one stream has under way, and
//! lets them borrow: nothing is spawned, and dropping the race drops them.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;

/// Futures under way.
pub(super) struct Race<'a, T>(Vec<Pin<Box<dyn Future<Output = T> + 'a>>>);

impl<T> Default for Race<'_, T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'a, T> Race<'a, T> {
    /// Lets one more in.
    pub fn push(&mut self, future: impl Future<Output = T> + 'a) {
        self.0.push(Box::pin(future));
    }

    /// How many are under way.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether none is under way.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The result of the next one that ends. Never ends where none is under way; may be dropped and called again.
    pub async fn next(&mut self) -> T {
        poll_fn(|context| {
            for (index, future) in self.0.iter_mut().enumerate() {
                if let Poll::Ready(result) = future.as_mut().poll(context) {
                    drop(self.0.swap_remove(index));
                    return Poll::Ready(result);
                }
            }
            Poll::Pending
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::oneshot;

    #[tokio::test(flavor = "current_thread")]
    async fn results_come_in_the_order_in_which_they_are_ready() {
        let (first, second) = (oneshot::channel(), oneshot::channel());
        let mut race = Race::default();
        race.push(async { first.1.await.unwrap() });
        race.push(async { second.1.await.unwrap() });
        second.0.send(2).unwrap();
        assert_eq!(race.next().await, 2);
        first.0.send(1).unwrap();
        assert_eq!(race.next().await, 1);
        assert!(race.is_empty());
    }
}
