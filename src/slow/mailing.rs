//! Mail to workers that has to arrive, and that has to have been read.
//!
//! A worker is never waited for longer than some seconds: it may have ended, and would never answer.

use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use crate::exchange::Mailbox;
use crate::exchange::mail::{Receipt, ToWorker};

/// How long a worker is waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// The time between two tries.
pub const RETRY: Duration = Duration::from_millis(1);

/// A worker has taken no mail for seconds.
#[derive(Debug)]
pub struct Silent;

/// Puts mail into a worker's box, once there is room.
pub async fn deliver(worker: &Mailbox<ToWorker<OwnedFd>>, mail: ToWorker<OwnedFd>) -> Result<(), Silent> {
    let mut mail = Some(mail);
    until(|| {
        mail = mail.take().and_then(|mail| worker.put(mail).err());
        mail.is_none()
    })
    .await
}

/// The same with what is to be told at the moment when there is room.
pub async fn deliver_latest(
    worker: &Mailbox<ToWorker<OwnedFd>>,
    mail: impl Fn() -> ToWorker<OwnedFd>,
) -> Result<(), Silent> {
    until(|| worker.put(mail()).is_ok()).await
}

/// Waits until everybody has done what the receipt is for.
pub async fn wait_for(receipt: &Receipt) -> Result<(), Silent> {
    until(|| receipt.is_back()).await
}

async fn until(mut done: impl FnMut() -> bool) -> Result<(), Silent> {
    let tries = async {
        while !done() {
            sleep(RETRY).await;
        }
    };
    timeout(PATIENCE, tries).await.map_err(|_| Silent)
}
