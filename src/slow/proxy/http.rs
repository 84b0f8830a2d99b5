//! Requests of the guest's, one by one: each is decided for itself, and goes on as its way wants it.
//!
//! hyper parses what the guest says and writes what the next hop is told, each with framing of its own (RFC 9112, 6 and 11.2): a
//! request that two readers could read in two ways is not passed on as it came. Bodies stream through, with bounded memory, and
//! nothing of them is read before somebody wants it.
//!
//! ```text
//! to a proxy of HTTP     GET http://name:port/path    (absolute-form, RFC 9112, 3.2.2), with hythe's credentials
//! straight, or by SOCKS  GET /path
//! ```
//! One connection to the next hop lasts as long as the next request goes the same way. `Upgrade` and `CONNECT` end the requests:
//! what follows is relayed by a worker.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1 as client;
use hyper::header::{
    CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue, PROXY_AUTHORIZATION,
    TE, TRANSFER_ENCODING, UPGRADE,
};
use hyper::http::uri::Authority;
use hyper::server::conn::http1 as server;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode, Uri, Version};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::task::spawn_local;
use tokio::time::timeout;

use super::authorization::Challenge;
use super::body::{Body, Outgoing};
use super::dial::Wire;
use super::guest_stream::GuestStream;
use super::place::Place;
use super::tunnel::Way;
use super::{Failure, Proxy};
use crate::policy::proxy::{Kind, ProxyUrl, Scheme};
use crate::slow::shared_stream::SharedStream;

/// The longest head of a message, in bytes, and its fields.
pub const HEAD_MAX: usize = 64 << 10;
/// See [`HEAD_MAX`].
pub const HEADERS_MAX: usize = 128;

/// How long a connection of the guest's may wait for its next request.
const IDLE: Duration = Duration::from_secs(300);

/// How long the next hop may take to answer a request that it has.
const ANSWER: Duration = Duration::from_secs(120);

const PLAIN: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

/// What goes back to the guest.
pub type Answer = UnsyncBoxBody<Bytes, hyper::Error>;

/// A whole answer.
pub fn whole(bytes: impl Into<Bytes>) -> Answer {
    Full::new(bytes.into()).map_err(|never: Infallible| match never {}).boxed_unsync()
}

/// How a guest's connection came.
pub enum Entry {
    /// To the gateway's port: the guest knows that it speaks to a proxy.
    Gateway,
    /// To a place in the world, by its address.
    Through(Place),
}

/// One connection of a guest's.
struct Session {
    proxy: Proxy,
    entry: Entry,
    end: SharedStream,
    stream: GuestStream,
    next: RefCell<Option<NextHop>>,
    /// Requests are over, and the stream is somebody else's.
    given_away: Cell<bool>,
}

/// The connection on which the last request went.
struct NextHop {
    way: Way,
    /// For whom it is, where it leads to one place alone.
    place: Option<Place>,
    sender: client::SendRequest<Outgoing>,
}

type Answered = Pin<Box<dyn Future<Output = Result<Response<Answer>, Infallible>>>>;

/// Answers the requests of one connection.
pub async fn serve(proxy: Proxy, entry: Entry, end: SharedStream, stream: GuestStream) {
    let session = Rc::new(Session {
        proxy,
        entry,
        end: end.clone(),
        stream,
        next: RefCell::new(None),
        given_away: Cell::new(false),
    });
    let served_by = session.clone();
    let service = service_fn(move |request: Request<Incoming>| -> Answered {
        let session = served_by.clone();
        Box::pin(async move { Ok(session.answer(request).await) })
    });
    let connection = server::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE)
        .half_close(true)
        .preserve_header_case(true)
        .max_buf_size(HEAD_MAX)
        .max_headers(HEADERS_MAX)
        .serve_connection(TokioIo::new(end.clone()), service)
        .with_upgrades();
    let served = tokio::select! {
        served = connection => served,
        // What is still to come would be heard by nobody.
        () = end.gone() => Ok(()),
    };
    if let Err(error) = served {
        tracing::debug!(%error, "a connection to the proxy has ended");
    }
    if !session.given_away.get() {
        end.leave().await;
    }
}

impl Session {
    async fn answer(self: Rc<Self>, request: Request<Incoming>) -> Response<Answer> {
        let answered = if request.method() == Method::CONNECT {
            self.clone().connect(request).await
        } else {
            self.clone().forward(request).await
        };
        answered.unwrap_or_else(|failure| match failure {
            Failure::Answered(response) => *response,
            failure => problem(failure.status(), &failure.to_string()),
        })
    }

    /// The guest wants a tunnel.
    async fn connect(self: Rc<Self>, mut request: Request<Incoming>) -> Result<Response<Answer>, Failure> {
        let authority = request.uri().authority().cloned();
        let place = authority.and_then(|authority| {
            Place::of_host(authority.host(), authority.port_u16()?)
                .filter(|_| !authority.as_str().contains('@'))
        });
        let (Entry::Gateway, Some(place)) = (&self.entry, place) else {
            return Ok(problem(StatusCode::BAD_REQUEST, "CONNECT is for the name of a host and a port"));
        };
        let ways = self.proxy.route(Kind::Tunnel, &place).await?;
        let guests = request.headers().get(PROXY_AUTHORIZATION);
        let tunnel = self.proxy.tunnel(&ways, &place, guests).await?;
        let upgrade = hyper::upgrade::on(&mut request);
        self.given_away.set(true);
        spawn_local(async move {
            if let Some((end, said)) = upgraded::<SharedStream>(upgrade).await {
                let joined = self.stream.hand_over(end, &said, tunnel.wire, &tunnel.early).await;
                self.end_of(joined).await;
            }
        });
        Ok(Response::new(whole(Bytes::new())))
    }

    async fn end_of(&self, joined: std::io::Result<()>) {
        if joined.is_err() {
            self.stream.reset().await;
        }
    }

    /// Passes a request on, and its answer back.
    async fn forward(self: Rc<Self>, mut request: Request<Incoming>) -> Result<Response<Answer>, Failure> {
        let place = match self.place_of(&request) {
            Ok(place) => place,
            Err(words) => return Ok(problem(StatusCode::BAD_REQUEST, words)),
        };
        let ways = self.proxy.route(Kind::Http, &place).await?;
        let guests = matches!(self.entry, Entry::Gateway)
            .then(|| request.headers_mut().remove(PROXY_AUTHORIZATION))
            .flatten();
        request.headers_mut().remove(PROXY_AUTHORIZATION);
        let protocol = upgrade_of(request.headers());
        let guest_upgrade = protocol.is_some().then(|| hyper::upgrade::on(&mut request));
        strip(request.headers_mut());
        if let Some(protocol) = &protocol {
            request.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
            request.headers_mut().insert(UPGRADE, protocol.clone());
        }
        *request.version_mut() = Version::HTTP_11;
        let (head, body) = request.into_parts();
        let keeps_body = ways.iter().any(|way| matches!(way, Way::Via(proxy) if proxy.credentials.is_some()));
        let body = Body::of(&head.headers, body, keeps_body).await?;
        let attempt = Attempt { head, body, place, guests };
        let sent = async { self.send(&ways, attempt).await };
        let mut response = tokio::select! {
            response = sent => response?,
            // Nobody waits for the answer any more.
            () = self.end.gone() => return Err(Failure::Silent),
        };
        *response.version_mut() = Version::HTTP_11;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            // One that nobody has asked for leads nowhere.
            let guest = guest_upgrade.ok_or(Failure::Garbled)?;
            let far = hyper::upgrade::on(&mut response);
            self.given_away.set(true);
            spawn_local(self.join(guest, far));
        } else {
            strip(response.headers_mut());
        }
        Ok(response.map(BodyExt::boxed_unsync))
    }

    /// Both sides have changed the protocol: nobody here needs to understand what follows.
    async fn join(self: Rc<Self>, guest: OnUpgrade, far: OnUpgrade) {
        let (guest, far) = (upgraded::<SharedStream>(guest).await, upgraded::<Wire>(far).await);
        if let (Some((end, from_guest)), Some((wire, to_guest))) = (guest, far) {
            let joined = self.stream.hand_over(end, &from_guest, wire, &to_guest).await;
            self.end_of(joined).await;
        }
    }

    /// Where a request is to go.
    fn place_of<B>(&self, request: &Request<B>) -> Result<Place, &'static str> {
        let uri = request.uri();
        let mut hosts = request.headers().get_all(HOST).iter();
        let host = hosts.next();
        if hosts.next().is_some() {
            // RFC 9112, 3.2: whoever comes behind might believe the other one.
            return Err("a request names one Host");
        }
        if uri.scheme().is_some_and(|scheme| scheme.as_str() != "http") {
            return Err("a request in absolute form is for http; everything else takes CONNECT");
        }
        let named = match (uri.authority(), host) {
            (Some(authority), _) => Some(authority.clone()),
            (None, Some(host)) if !host.is_empty() => {
                Some(Authority::try_from(host.as_bytes()).map_err(|_| "the Host is none")?)
            }
            (None, _) => None,
        };
        if named.as_ref().is_some_and(|authority| authority.as_str().contains('@')) {
            return Err("a request tells no user's name before the host");
        }
        let port = match &named {
            Some(authority) if authority.port().is_some() => {
                Some(authority.port_u16().ok_or("the port is none")?)
            }
            _ => None,
        };
        let host = |authority: &Authority, port| {
            Place::of_host(authority.host(), port).ok_or("the host has no name, and is no address")
        };
        match (&self.entry, named) {
            (Entry::Gateway, Some(authority)) if uri.scheme().is_some() => {
                host(&authority, port.unwrap_or(80))
            }
            (Entry::Gateway, _) => {
                Err("this is a proxy: a request names the whole URI, or is a CONNECT (RFC 9112, 3.2)")
            }
            (Entry::Through(to), None) => Ok(to.clone()),
            (Entry::Through(to), Some(authority)) => {
                // The port is the one that the guest has called, whatever it says.
                let place = Place { name: host(&authority, to.port)?.name, ..to.clone() };
                Ok(place.held_to_its_name(&self.proxy.addresses().egress))
            }
        }
    }

    /// Sends a request by the first way that stands, and answers a proxy that asks who hythe is, once.
    async fn send(&self, ways: &[Way], mut attempt: Attempt) -> Result<Response<Incoming>, Failure> {
        let mut answered = false;
        let mut fresh = false;
        loop {
            let mut hop = self.hop(ways, &attempt.place).await?;
            let request = attempt.request(&self.proxy, &hop.way)?;
            let patience = if attempt.body.is_short() { ANSWER } else { Duration::MAX };
            let sent = timeout(patience, hop.sender.try_send_request(request)).await;
            let response = match sent.map_err(|_| Failure::Silent)? {
                Ok(response) => response,
                // One that was kept may have been closed meanwhile: it has not seen the request.
                Err(mut error) => match error.take_message() {
                    Some(unsent) if !fresh => {
                        fresh = true;
                        attempt.body.restore(unsent.into_body());
                        continue;
                    }
                    None if error.error().is_user() => return Err(Failure::Cut),
                    _ => return Err(Failure::Garbled),
                },
            };
            let asked = response.status() == StatusCode::PROXY_AUTHENTICATION_REQUIRED;
            if let Way::Via(proxy) = &hop.way
                && is_http(proxy)
                && asked
                && !answered
                && self.proxy.learn(proxy, Challenge::of(response.headers()))
                && attempt.body.is_there()
            {
                answered = true;
                continue;
            }
            self.next.replace(Some(hop));
            return Ok(response);
        }
    }

    /// A connection for a request: the last one, if it leads there and lives, or a new one.
    async fn hop(&self, ways: &[Way], place: &Place) -> Result<NextHop, Failure> {
        let kept = self.next.take();
        if let Some(mut kept) = kept
            && ways.contains(&kept.way)
            && kept.place.as_ref().is_none_or(|there| there == place)
            && kept.sender.ready().await.is_ok()
        {
            return Ok(kept);
        }
        let mut last = Failure::NoAddress;
        for way in ways {
            let opened = match way {
                Way::Via(proxy) if is_http(proxy) => self.proxy.call_in_time(proxy).await,
                way => {
                    let tunnel = self.proxy.tunnel(std::slice::from_ref(way), place, None).await;
                    tunnel.map(|tunnel| tunnel.wire)
                }
            };
            match opened {
                Ok(wire) => return open(way.clone(), place, wire).await,
                Err(refusal @ Failure::Refused(_)) => return Err(refusal),
                Err(failure) => last = failure,
            }
        }
        Err(last)
    }
}

async fn open(way: Way, place: &Place, wire: Wire) -> Result<NextHop, Failure> {
    let (sender, connection) = client::Builder::new()
        .preserve_header_case(true)
        .max_buf_size(HEAD_MAX)
        .max_headers(HEADERS_MAX)
        .handshake(TokioIo::new(wire))
        .await
        .map_err(|_| Failure::Garbled)?;
    spawn_local(connection.with_upgrades());
    let to_all = matches!(&way, Way::Via(proxy) if is_http(proxy));
    Ok(NextHop { way, place: (!to_all).then(|| place.clone()), sender })
}

fn is_http(proxy: &ProxyUrl) -> bool {
    matches!(proxy.scheme, Scheme::Http | Scheme::Https)
}

/// A request that may have to be sent more than once.
struct Attempt {
    head: hyper::http::request::Parts,
    body: Body,
    place: Place,
    /// What the guest itself says to a proxy.
    guests: Option<HeaderValue>,
}

impl Attempt {
    fn request(&mut self, proxy: &Proxy, way: &Way) -> Result<Request<Outgoing>, Failure> {
        let path = self.head.uri.path_and_query().map_or("/", |path| path.as_str());
        let authority = match (self.place.port, self.place.host()) {
            (80, host) => host,
            (port, host) => format!("{host}:{port}"),
        };
        let mut headers = self.head.headers.clone();
        let to_proxy = matches!(way, Way::Via(next) if is_http(next));
        if to_proxy || !headers.contains_key(HOST) || self.head.uri.authority().is_some() {
            // RFC 9112, 3.2.2: what the request's target says counts, and nobody is to believe anything else.
            headers.insert(HOST, HeaderValue::try_from(&authority).map_err(|_| Failure::Garbled)?);
        }
        let target = match way {
            Way::Via(next) if is_http(next) => {
                let target = format!("http://{authority}{}", if path == "*" { "" } else { path });
                let own = proxy.authorization(next, self.head.method.as_str(), &target);
                if let Some(value) = own.or_else(|| self.guests.clone()) {
                    headers.insert(PROXY_AUTHORIZATION, value);
                }
                target
            }
            _ => path.to_string(),
        };
        let mut request = Request::new(Outgoing::default());
        *request.method_mut() = self.head.method.clone();
        *request.uri_mut() = Uri::try_from(target).map_err(|_| Failure::Garbled)?;
        *request.headers_mut() = headers;
        // Names of fields as the guest has written them.
        *request.extensions_mut() = self.head.extensions.clone();
        let body = self.body.outgoing(&mut request);
        *request.body_mut() = body;
        Ok(request)
    }
}

/// The other end of an upgrade, and what was read behind it.
async fn upgraded<T: hyper_io::Io>(upgrade: OnUpgrade) -> Option<(T, Bytes)> {
    let parts = upgrade.await.ok()?.downcast::<TokioIo<T>>().ok()?;
    Some((parts.io.into_inner(), parts.read_buf))
}

/// What an upgraded connection may be.
mod hyper_io {
    use tokio::io::{AsyncRead, AsyncWrite};

    pub trait Io: AsyncRead + AsyncWrite + Unpin + Send + 'static {}
    impl<T: AsyncRead + AsyncWrite + Unpin + Send + 'static> Io for T {}
}

/// The protocol that a message wants to change to.
fn upgrade_of(headers: &HeaderMap) -> Option<HeaderValue> {
    let wants = tokens(headers, &CONNECTION).any(|token| token.eq_ignore_ascii_case("upgrade"));
    headers.get(UPGRADE).filter(|_| wants).cloned()
}

fn tokens<'h>(headers: &'h HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'h str> {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim)
}

/// Takes out what is for one hop alone (RFC 9110, 7.6.1); each hop's framing is hyper's.
pub fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> =
        tokens(headers, &CONNECTION).filter_map(|token| HeaderName::try_from(token).ok()).collect();
    let trailers = tokens(headers, &TE).any(|token| token.eq_ignore_ascii_case("trailers"));
    if headers.contains_key(TRANSFER_ENCODING) {
        // RFC 9112, 6.3: it counts, and a length beside it is a lie.
        headers.remove(CONTENT_LENGTH);
    }
    for name in named.iter().filter(|name| ![HOST, CONTENT_LENGTH].contains(name)) {
        headers.remove(name);
    }
    for name in [CONNECTION, TRANSFER_ENCODING, UPGRADE, TE] {
        headers.remove(name);
    }
    for name in ["keep-alive", "proxy-connection"] {
        headers.remove(name);
    }
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
}

/// What hythe itself says.
fn problem(status: StatusCode, words: &str) -> Response<Answer> {
    let mut response = Response::new(whole(format!("hythe: {words}\n")));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, PLAIN);
    response
}
