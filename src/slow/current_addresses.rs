//! The link's addresses and the host's, as they are now. The workers hear of every change.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::mailing::{deliver, deliver_latest, wait_for};
use crate::exchange::Mailbox;
use crate::exchange::mail::{Receipt, ToWorker};
use crate::frame::address::Address;
use crate::policy::addresses::Addresses;

/// What all threads are to know about addresses.
pub struct CurrentAddresses {
    now: RefCell<Arc<Addresses>>,
    workers: Vec<Mailbox<ToWorker<OwnedFd>>>,
}

impl CurrentAddresses {
    /// As they were at the start, which the workers know.
    pub fn new(start: Arc<Addresses>, workers: Vec<Mailbox<ToWorker<OwnedFd>>>) -> Self {
        Self { now: RefCell::new(start), workers }
    }

    /// As they are now.
    pub fn get(&self) -> Arc<Addresses> {
        self.now.borrow().clone()
    }

    /// Changes them, and tells every worker. Once this is over, whatever the guest begins is served by what holds now,
    /// unless a worker has not answered for seconds.
    pub async fn change(&self, change: impl FnOnce(&mut Addresses)) {
        let (receipt, mut is_heard) = (Receipt::default(), true);
        let mut changed = Addresses::clone(&self.get());
        change(&mut changed);
        self.now.replace(Arc::new(changed));
        for worker in &self.workers {
            // What is told is what holds then: it may have changed again while the mailbox was full.
            let told = deliver_latest(worker, || ToWorker::Addresses(self.get(), receipt.clone())).await;
            is_heard &= told.is_ok();
        }
        if wait_for(&receipt).await.is_err() || !is_heard {
            tracing::warn!("a worker has not heard of the new addresses and rules for seconds");
        }
    }

    /// Tells every worker that the host has these addresses no more.
    pub async fn tell_gone(&self, gone: &Arc<[Address]>) {
        for worker in &self.workers {
            // One that takes no mail has ended, and its connections with it.
            let _ = deliver(worker, ToWorker::AddressesGone(gone.clone())).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::mailing::RETRY;
    use super::*;
    use crate::exchange::Waker;
    use crate::slow::neighbours::tests::addresses;

    #[test]
    fn a_worker_whose_mailbox_was_full_hears_of_the_last_change() {
        let mailbox = Mailbox::new(1, Arc::new(Waker::new().unwrap()));
        mailbox.put(ToWorker::Stop).unwrap_or_else(|_| panic!("it is empty"));
        let current = CurrentAddresses::new(Arc::new(addresses()), vec![mailbox.clone()]);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let first = current.change(|addresses| addresses.metadata = true);
            let second = current.change(|addresses| addresses.host_loopback = false);
            let take = async {
                tokio::time::sleep(RETRY).await;
                assert!(matches!(mailbox.take(), Some(ToWorker::Stop)));
                loop {
                    if let Some(ToWorker::Addresses(told, _)) = mailbox.take() {
                        break told;
                    }
                    tokio::time::sleep(RETRY).await;
                }
            };
            let ((), told, ()) = tokio::join!(first, take, second);
            assert!(told.metadata && !told.host_loopback);
        });
    }

    #[test]
    fn a_change_is_over_when_every_worker_has_taken_it_in() {
        let waker = Arc::new(Waker::new().unwrap());
        let workers = vec![Mailbox::new(4, waker.clone()), Mailbox::new(4, waker)];
        let current = CurrentAddresses::new(Arc::new(addresses()), workers.clone());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut change = std::pin::pin!(current.change(|addresses| addresses.metadata = true));
            for worker in &workers {
                assert!(tokio::time::timeout(5 * RETRY, &mut change).await.is_err(), "not all have read it");
                let Some(ToWorker::Addresses(told, receipt)) = worker.take() else {
                    panic!("nothing was told")
                };
                assert!(told.metadata);
                assert!(
                    tokio::time::timeout(5 * RETRY, &mut change).await.is_err(),
                    "it is read, and not done"
                );
                drop(receipt);
            }
            change.await;
        });
    }
}
