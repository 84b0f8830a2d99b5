//! Descriptors that the runtime waits for.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use tokio::io::unix::AsyncFd;

use crate::exchange::Waker;

struct Kept(Arc<Waker>);

impl AsRawFd for Kept {
    fn as_raw_fd(&self) -> RawFd {
        self.0.fd()
    }
}

/// A waker's descriptor, to be waited for.
pub struct Readable(AsyncFd<Kept>);

impl Readable {
    /// Registers the waker with the current runtime.
    pub fn new(waker: Arc<Waker>) -> io::Result<Self> {
        // SAFETY: `Kept` holds the waker, so its descriptor stays the same and open as long as the registration.
        unsafe { AsyncFd::register(Kept(waker)) }.map(Self).map_err(|error| error.into_parts().1)
    }

    /// Waits until the waker was signalled; the signal is taken out.
    pub async fn signalled(&self) -> io::Result<()> {
        let mut ready = self.0.readable().await?;
        self.0.get_ref().0.clear();
        ready.clear_ready();
        Ok(())
    }
}
