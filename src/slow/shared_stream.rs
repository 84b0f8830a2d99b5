//! A stream of the guest's, or of a caller's, that more than one part of the slow path looks at.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;
use tokio::task::yield_now;
use tokio::time::{sleep, timeout};

/// How long what a peer still says is heard after the last word to it.
const FAREWELL: Duration = Duration::from_secs(1);

/// So many bytes are, at the most.
const FORGOTTEN_MAX: usize = 1 << 20;

/// How often one who waits for an answer is looked at: the kernel tells of a peer that goes only who watches for nothing else.
const LOOK: Duration = Duration::from_secs(1);

/// A stream. Clones are the same.
#[derive(Clone)]
pub struct SharedStream(Arc<UnixStream>);

impl SharedStream {
    /// A stream to be looked at by many.
    pub fn new(stream: UnixStream) -> Self {
        Self(Arc::new(stream))
    }

    /// The stream itself.
    pub fn get(&self) -> &UnixStream {
        &self.0
    }

    /// Says that nothing more comes.
    pub fn shut_down(&self) {
        // One that is gone needs no word.
        let _ = SockRef::from(&*self.0).shutdown(Shutdown::Write);
    }

    /// Ends the stream so that its peer hears what was said last. Closing it while there is something to read would break it off
    /// (RFC 9112, 9.6): what still comes is read and forgotten, for a while.
    pub async fn leave(&self) {
        self.shut_down();
        let forget = async {
            let mut bytes = [0; 4096];
            for _ in 0..FORGOTTEN_MAX / bytes.len() {
                if self.0.readable().await.is_err() {
                    return;
                }
                match self.0.try_read(&mut bytes) {
                    Ok(0) => return,
                    Err(error) if error.kind() != io::ErrorKind::WouldBlock => return,
                    _ => {}
                }
                // One that never stops is not the only one to be served.
                yield_now().await;
            }
        };
        let _ = timeout(FAREWELL, forget).await;
    }

    /// Waits until there are more than `known` bytes to look at, or the peer has said all; gives what there is, as far as
    /// `bytes` has room, and whether it is all.
    pub async fn peek(&self, bytes: &mut [u8], known: usize) -> io::Result<(usize, bool)> {
        loop {
            let ended = self.0.ready(Interest::READABLE).await?.is_read_closed();
            let looked = self.0.try_io(Interest::READABLE, || {
                let len = recv(self.0.as_raw_fd(), bytes, MsgFlags::MSG_PEEK)?;
                // Nothing new: wait until there is.
                if len <= known && !ended { Err(io::ErrorKind::WouldBlock.into()) } else { Ok((len, ended)) }
            });
            match looked {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                looked => return looked,
            }
        }
    }

    /// Returns when the peer is gone altogether: nobody will read an answer.
    pub async fn gone(&self) {
        loop {
            match self.0.ready(Interest::READABLE | Interest::WRITABLE).await {
                Ok(ready) if !ready.is_write_closed() && !ready.is_error() => {}
                _ => return,
            }
            sleep(LOOK).await;
        }
    }
}

impl AsyncRead for SharedStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(cx))?;
            match self.0.try_read(buffer.initialize_unfilled()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return Poll::Ready(read.map(|len| buffer.advance(len))),
            }
        }
    }
}

impl AsyncWrite for SharedStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(cx))?;
            match self.0.try_write_vectored(pieces) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(SockRef::from(&*self.0).shutdown(Shutdown::Write))
    }
}
