//! The host's own addresses come and go; the workers' rules about them follow.

use std::io;
use std::rc::Rc;

use crate::netlink::AddressWatch;

use super::current_addresses::CurrentAddresses;
use super::readable::ReadableWatch;

/// Tells the workers about every change. Runs for ever; returns only when changes cannot be learnt any more, with the
/// reason.
pub async fn follow(watch: AddressWatch, current: Rc<CurrentAddresses>) -> io::Error {
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
        if own != current.get().own {
            tracing::info!(addresses = own.len(), "the host's addresses have changed");
            current.change(|addresses| addresses.own = own).await;
        }
        if let Err(error) = watch.changed().await {
            return error;
        }
    }
}
