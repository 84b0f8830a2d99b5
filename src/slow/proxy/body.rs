//! The body of a request on its way to the next hop.
//!
//! It streams. But a proxy that asks who hythe is wants the request again, with the body, so where that may happen a short body is
//! kept whole, and a long one waits a moment for the proxy's word. One that the guest itself holds back (`Expect: 100-continue`)
//! waits as well: hyper asks the guest for it when it is wanted.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Full};
use hyper::Request;
use hyper::body::{Body as _, Bytes, Frame, Incoming, SizeHint};
use hyper::header::{EXPECT, HeaderMap};
use tokio::sync::Notify;
use tokio::time::timeout;

use super::Failure;

/// As long a body is kept, in bytes.
const KEPT_MAX: u64 = 64 << 10;

/// How long it may take to come.
const COLLECT: Duration = Duration::from_secs(30);

/// How long the next hop may take to say that it wants a body (RFC 9110, 10.1.1: a client waits no longer than it wants).
const EXPECTED: Duration = Duration::from_secs(1);

/// How long a proxy may take to ask who hythe is.
const ASKED: Duration = Duration::from_millis(300);

type Held = Arc<Mutex<Option<Incoming>>>;

/// A body that may have to be sent more than once.
pub enum Body {
    /// There is none.
    None,
    /// It streams, once.
    Once(Option<Incoming>),
    /// It is all here.
    Kept(Bytes),
    /// It is held back for so long, or until the next hop wants it.
    Held(Held, Duration),
}

impl Body {
    /// The body of a request with these fields, which may be needed again if `again`.
    pub async fn of(headers: &HeaderMap, body: Incoming, again: bool) -> Result<Self, Failure> {
        if body.is_end_stream() {
            return Ok(Self::None);
        }
        let is_held =
            headers.get(EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"));
        if is_held {
            return Ok(Self::Held(Arc::new(Mutex::new(Some(body))), EXPECTED));
        }
        if !again {
            return Ok(Self::Once(Some(body)));
        }
        if body.size_hint().exact().is_none_or(|bytes| bytes > KEPT_MAX) {
            return Ok(Self::Held(Arc::new(Mutex::new(Some(body))), ASKED));
        }
        let collected = timeout(COLLECT, body.collect()).await.map_err(|_| Failure::Silent)?;
        Ok(Self::Kept(collected.map_err(|_| Failure::Silent)?.to_bytes()))
    }

    /// Whether it can be sent now.
    pub fn is_there(&self) -> bool {
        match self {
            Self::None | Self::Kept(_) => true,
            Self::Once(body) => body.is_some(),
            Self::Held(held, _) => held.lock().unwrap_or_else(PoisonError::into_inner).is_some(),
        }
    }

    /// Whether it takes no time to be sent.
    pub fn is_short(&self) -> bool {
        matches!(self, Self::None | Self::Kept(_))
    }

    /// One that went out was not taken.
    pub fn restore(&mut self, unsent: Outgoing) {
        if let (Self::Once(body @ None), Outgoing::Streamed(unsent)) = (self, unsent) {
            *body = Some(unsent);
        }
    }

    /// The body of a request that goes out now.
    pub fn outgoing<B>(&mut self, request: &mut Request<B>) -> Outgoing {
        match self {
            Self::None => Outgoing::default(),
            Self::Once(body) => body.take().map_or_else(Outgoing::default, Outgoing::Streamed),
            Self::Kept(bytes) => Outgoing::Kept(Full::new(bytes.clone())),
            Self::Held(held, patience) => {
                let wanted = Arc::new(Notify::new());
                let signal = wanted.clone();
                hyper::ext::on_informational(request, move |_| signal.notify_one());
                let patience = *patience;
                let size = {
                    let held = held.lock().unwrap_or_else(PoisonError::into_inner);
                    held.as_ref().map_or_else(SizeHint::default, hyper::body::Body::size_hint)
                };
                let gate = Box::pin(async move {
                    let _ = timeout(patience, wanted.notified()).await;
                });
                Outgoing::Held { gate, held: held.clone(), size }
            }
        }
    }
}

/// A body as hyper's client takes it.
pub enum Outgoing {
    /// None.
    None(Empty<Bytes>),
    /// All at once.
    Kept(Full<Bytes>),
    /// As it comes.
    Streamed(Incoming),
    /// As it comes, once it is wanted.
    Held {
        /// Ready when it is.
        gate: Pin<Box<dyn Future<Output = ()> + Send>>,
        /// The body.
        held: Held,
        /// How long it is.
        size: SizeHint,
    },
}

impl Default for Outgoing {
    fn default() -> Self {
        Self::None(Empty::new())
    }
}

impl hyper::body::Body for Outgoing {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        if let Self::Held { gate, held, .. } = &mut *self {
            ready!(gate.as_mut().poll(cx));
            let body = held.lock().unwrap_or_else(PoisonError::into_inner).take();
            *self = body.map_or_else(Self::default, Self::Streamed);
        }
        match &mut *self {
            Self::None(_) | Self::Held { .. } => Poll::Ready(None),
            Self::Kept(body) => Pin::new(body).poll_frame(cx).map_err(|never| match never {}),
            Self::Streamed(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::None(_) => true,
            Self::Kept(body) => body.is_end_stream(),
            Self::Streamed(body) => body.is_end_stream(),
            Self::Held { .. } => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::None(_) => SizeHint::with_exact(0),
            Self::Kept(body) => body.size_hint(),
            Self::Streamed(body) => body.size_hint(),
            Self::Held { size, .. } => *size,
        }
    }
}
