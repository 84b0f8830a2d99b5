//! The link's addresses and the host's, as they are now. The workers hear of every change.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::exchange::Mailbox;
use crate::exchange::mail::ToWorker;
use crate::frame::address::Address;
use crate::policy::addresses::Addresses;

/// How long a full mailbox is given.
const RETRY: Duration = Duration::from_millis(5);

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

    /// Changes them, and tells every worker.
    pub async fn change(&self, change: impl FnOnce(&mut Addresses)) {
        let mut changed = Addresses::clone(&self.get());
        change(&mut changed);
        self.now.replace(Arc::new(changed));
        for worker in &self.workers {
            // What is told is what holds then: it may have changed again while the mailbox was full.
            while worker.put(ToWorker::Addresses(self.get())).is_err() {
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    /// Tells every worker that the host has these addresses no more.
    pub async fn tell_gone(&self, gone: &Arc<[Address]>) {
        for worker in &self.workers {
            while worker.put(ToWorker::AddressesGone(gone.clone())).is_err() {
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
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
                    if let Some(ToWorker::Addresses(told)) = mailbox.take() {
                        break told;
                    }
                    tokio::time::sleep(RETRY).await;
                }
            };
            let ((), told, ()) = tokio::join!(first, take, second);
            assert!(told.metadata && !told.host_loopback);
        });
    }
}
