//! One connection of a caller, from its first byte to its last.
//!
//! hyper speaks HTTP. What it leaves to us: a client that stops in the middle of a head is told so (408) before it is
//! left, and one that does not read what it asked for is left too.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::{Instant, Sleep, sleep, timeout};

use super::Caller;
use super::list::Answer;
use super::problem::{MEDIA_TYPE, Refusal};
use super::router::Router;
use crate::control::shapes::Code;
use crate::slow::shared_stream::SharedStream;

/// How long a request may take to come, and its answer to be read, each without a sign of life.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// The longest head of a request, in bytes.
const HEAD_MAX: usize = 64 << 10;

type Answered = Pin<Box<dyn Future<Output = Result<Response<Answer>, Infallible>>>>;

/// Answers a caller until it goes.
pub async fn serve(stream: SharedStream, router: Rc<Router>, caller: Caller) {
    let service = service_fn(move |request: Request<Incoming>| -> Answered {
        let (router, caller) = (router.clone(), caller.clone());
        Box::pin(async move { Ok(router.answer(&caller, request).await) })
    });
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        // One that has said all may still listen. Whether it does shows when it is answered.
        .half_close(true)
        .max_buf_size(HEAD_MAX)
        .serve_connection(TokioIo::new(Patient::new(stream)), service);
    let ended = poll_fn(|cx| connection.poll_without_shutdown(cx)).await;
    let parts = connection.into_parts();
    let mut stream = parts.io.into_inner();
    // One that has said nothing was done.
    if ended.is_err_and(|error| error.is_timeout()) && !parts.read_buf.is_empty() {
        let detail = "the request did not come to its end";
        let words = plain(&Refusal::new(StatusCode::REQUEST_TIMEOUT, Code::TooSlow, detail));
        let _ = stream.write_all(&words).await;
    }
    stream.stream.leave().await;
}

/// Tells a caller that there is no seat.
pub async fn send_away(stream: &SharedStream) {
    let detail = "too many callers at a time; try again";
    let refusal = Refusal::new(StatusCode::SERVICE_UNAVAILABLE, Code::Exhausted, detail);
    // A new connection's buffer has room, which is to be waited for only because nobody has looked yet.
    if timeout(PATIENCE, stream.get().writable()).await.is_ok() {
        let _ = stream.get().try_write(&plain(&refusal));
        stream.leave().await;
    }
}

/// A whole answer, for where hyper writes none.
fn plain(refusal: &Refusal) -> Vec<u8> {
    let body = refusal.json();
    let (status, len) = (refusal.status(), body.len());
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: {MEDIA_TYPE}\r\ncontent-length: {len}\r\nconnection: close\r\n\r\n"
    );
    [head.as_bytes(), &body].concat()
}

/// A stream whose peer has to read what is written, within a time each bit.
struct Patient {
    stream: SharedStream,
    deadline: Pin<Box<Sleep>>,
    waits: bool,
}

impl Patient {
    fn new(stream: SharedStream) -> Self {
        Self { stream, deadline: Box::pin(sleep(PATIENCE)), waits: false }
    }

    /// Lets a write through, or gives up waiting for it.
    fn wait<T>(&mut self, cx: &mut Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.waits = false;
            return polled;
        }
        if !self.waits {
            self.waits = true;
            self.deadline.as_mut().reset(Instant::now() + PATIENCE);
        }
        ready!(self.deadline.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Patient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Patient {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, pieces);
        self.wait(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
