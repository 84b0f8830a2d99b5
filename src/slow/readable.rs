//! Descriptors that the runtime waits for.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use tokio::io::unix::AsyncFd;

use crate::channel::Channel;
use crate::exchange::Waker;
use crate::frame::address::Address;
use crate::netlink::AddressWatch;

/// Something whose descriptor is waited for; it owns the descriptor, so that it stays open and the same.
trait Owner {
    fn fd(&self) -> RawFd;
}

impl Owner for Arc<Waker> {
    fn fd(&self) -> RawFd {
        Waker::fd(self)
    }
}

impl Owner for Channel {
    fn fd(&self) -> RawFd {
        std::os::fd::AsFd::as_fd(self).as_raw_fd()
    }
}

impl Owner for AddressWatch {
    fn fd(&self) -> RawFd {
        self.as_raw_fd()
    }
}

struct Kept<T>(T);

impl<T: Owner> AsRawFd for Kept<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.0.fd()
    }
}

fn register<T: Owner>(owner: T) -> io::Result<AsyncFd<Kept<T>>> {
    // SAFETY: `Kept` holds the owner, so the descriptor stays the same and open as long as the registration.
    unsafe { AsyncFd::register(Kept(owner)) }.map_err(|error| error.into_parts().1)
}

/// A waker, to be waited for.
pub struct Readable(AsyncFd<Kept<Arc<Waker>>>);

impl Readable {
    /// Registers the waker with the current runtime.
    pub fn new(waker: Arc<Waker>) -> io::Result<Self> {
        register(waker).map(Self)
    }

    /// Waits until the waker was signalled; the signal is taken out.
    pub async fn signalled(&self) -> io::Result<()> {
        let mut ready = self.0.readable().await?;
        self.0.get_ref().0.clear();
        ready.clear_ready();
        Ok(())
    }
}

/// A channel to the helper, to be waited for.
pub struct ReadableChannel(AsyncFd<Kept<Channel>>);

impl ReadableChannel {
    /// Registers the channel, which must not block, with the current runtime.
    pub fn new(channel: Channel) -> io::Result<Self> {
        register(channel).map(Self)
    }

    /// The channel.
    pub fn channel(&self) -> &Channel {
        &self.0.get_ref().0
    }

    /// Waits for the next message and reads it with `read`.
    pub async fn receive<T>(&self, mut read: impl FnMut(&Channel) -> io::Result<T>) -> io::Result<T> {
        loop {
            let mut ready = self.0.readable().await?;
            if let Ok(result) = ready.try_io(|fd| read(&fd.get_ref().0)) {
                return result;
            }
        }
    }
}

/// A watch of the host's addresses, to be waited for.
pub struct ReadableWatch(AsyncFd<Kept<AddressWatch>>);

impl ReadableWatch {
    /// Registers the watch with the current runtime.
    pub fn new(watch: AddressWatch) -> io::Result<Self> {
        register(watch).map(Self)
    }

    /// The addresses as they are now.
    pub fn addresses(&mut self) -> io::Result<Vec<Address>> {
        self.0.get_mut().0.addresses()
    }

    /// Waits for a change since [`Self::addresses`].
    pub async fn changed(&self) -> io::Result<()> {
        self.0.readable().await?.clear_ready();
        Ok(())
    }
}
