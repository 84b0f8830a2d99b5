//! The host's own addresses come and go; the workers' rules about them follow.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::exchange::Mailbox;
use crate::exchange::mail::ToWorker;
use crate::netlink::AddressWatch;
use crate::policy::addresses::Addresses;

use super::readable::ReadableWatch;

/// How long a full mailbox is given.
const RETRY: Duration = Duration::from_millis(5);

/// Tells the workers about every change. Runs for ever; returns only when changes cannot be learnt any more, with the
/// reason.
pub async fn follow(
    watch: AddressWatch,
    mut addresses: Arc<Addresses>,
    workers: Vec<Mailbox<ToWorker<OwnedFd>>>,
) -> io::Error {
    let mut watch = match ReadableWatch::new(watch) {
        Ok(watch) => watch,
        Err(error) => return error,
    };
    loop {
        // Also before the first change: the addresses were read when nobody watched.
        let own = match watch.addresses() {
            Ok(own) => own,
            Err(error) => return error,
        };
        if own != addresses.own {
            tracing::info!(addresses = own.len(), "the host's addresses have changed");
            addresses = Arc::new(Addresses { own, ..Addresses::clone(&addresses) });
            for worker in &workers {
                while worker.put(ToWorker::Addresses(addresses.clone())).is_err() {
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
        if let Err(error) = watch.changed().await {
            return error;
        }
    }
}
