//! Connections of the slow path, and their end when the host has their address no more.
//!
//! A worker resets what it has itself. What stays here, because it is decided request by request or goes by TLS to a proxy, is
//! disconnected here: whoever reads or writes it hears of a reset. The guest's end of a tunnel is reset, too; an answer to a request ends
//! before it is whole, so that what of it has come is not lost.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::frame::address::Address;
use crate::host::tcp;

/// A connection as others find it. It lives no longer than its socket.
struct Known {
    fd: RawFd,
    own: Address,
}

/// All connections that stay here.
#[derive(Clone, Default)]
pub struct Lines(Rc<RefCell<Vec<Weak<Known>>>>);

impl Lines {
    /// Takes a connection in.
    pub fn add(&self, stream: TcpStream) -> io::Result<Line> {
        let known = Arc::new(Known { fd: stream.as_raw_fd(), own: stream.local_addr()?.ip().into() });
        let mut all = self.0.borrow_mut();
        all.retain(|line| line.strong_count() > 0);
        all.push(Arc::downgrade(&known));
        Ok(Line { stream, _known: known })
    }

    /// The host has these addresses no more: what came from them is over.
    pub fn addresses_gone(&self, gone: &[Address]) {
        for line in self.0.borrow().iter().filter_map(Weak::upgrade).filter(|line| gone.contains(&line.own)) {
            tcp::disconnect(line.fd);
        }
    }
}

/// A connection that stays here.
pub struct Line {
    stream: TcpStream,
    _known: Arc<Known>,
}

impl Line {
    /// The connection, for a worker to take it over.
    pub fn into_stream(self) -> TcpStream {
        self.stream
    }
}

impl AsyncRead for Line {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Line {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn a_connection_from_an_address_that_is_gone_is_reset_at_both_ends() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        let lines = Lines::default();
        let mut ends = Vec::new();
        for _ in 0..3 {
            let line = lines.add(TcpStream::connect(to).await.unwrap()).unwrap();
            ends.push((line, listener.accept().await.unwrap().0));
        }
        let [mut first, mut second, taken] = <[_; 3]>::try_from(ends).unwrap_or_else(|_| panic!("three"));
        let mut taken = (taken.0.into_stream(), taken.1);
        lines.addresses_gone(&[IpAddr::from(Ipv4Addr::new(127, 0, 0, 2)).into()]);
        second.1.write_all(b"still").await.unwrap();
        let mut bytes = [0; 5];
        second.0.read_exact(&mut bytes).await.unwrap();

        let reader = async { first.0.read(&mut [0; 9]).await.map_err(|error| error.kind()) };
        let going = async { lines.addresses_gone(&[IpAddr::from(Ipv4Addr::LOCALHOST).into()]) };
        let (read, ()) = tokio::join!(reader, going);
        assert_eq!(read, Err(io::ErrorKind::ConnectionReset), "who waits hears of it");
        let far = second.1.read(&mut bytes).await.map_err(|error| error.kind());
        assert_eq!(far, Err(io::ErrorKind::ConnectionReset));
        taken.1.write_all(b"a worker's").await.unwrap();
        assert_eq!(taken.0.read(&mut [0; 99]).await.unwrap(), 10);
    }
}
