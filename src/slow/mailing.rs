//! Mail to workers that has to arrive, and that has to have been read.
//!
//! A worker is never waited for longer than some seconds: it may have ended, and would never answer.

use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::time::sleep;

use crate::exchange::Mailbox;
use crate::exchange::mail::{Receipt, ToWorker};

/// How often a mailbox is tried that is full, and a receipt looked for that is not back.
const TRIES: u32 = 5000;
/// The time between two tries.
pub const PAUSE: Duration = Duration::from_millis(1);

/// A worker has taken no mail for seconds.
#[derive(Debug)]
pub struct Silent;

/// Puts mail into a worker's box, once there is room.
pub async fn deliver(worker: &Mailbox<ToWorker<OwnedFd>>, mut mail: ToWorker<OwnedFd>) -> Result<(), Silent> {
    for _ in 0..TRIES {
        match worker.put(mail) {
            Ok(()) => return Ok(()),
            Err(back) => mail = back,
        }
        sleep(PAUSE).await;
    }
    Err(Silent)
}

/// Waits until everybody has done what the receipt is for.
pub async fn wait_for(receipt: &Receipt) -> Result<(), Silent> {
    for _ in 0..TRIES {
        if receipt.is_back() {
            return Ok(());
        }
        sleep(PAUSE).await;
    }
    Err(Silent)
}
