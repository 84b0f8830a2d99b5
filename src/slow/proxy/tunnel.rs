//! A way to a place that carries any bytes: straight, by `CONNECT` (RFC 9110, 9.3.6), or by SOCKS (RFC 1928).

use std::time::Duration;

use http_body_util::{BodyExt, Collected, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{CONTENT_LENGTH, HOST, HeaderValue, PROXY_AUTHORIZATION};
use hyper::{Request, Response, StatusCode, Version};
use hyper_util::rt::TokioIo;
use tokio::task::spawn_local;
use tokio::time::timeout;
use tokio_socks::TargetAddr;
use tokio_socks::tcp::Socks5Stream;

use super::authorization::Challenge;
use super::dial::{self, Wire};
use super::http::{HEAD_MAX, HEADERS_MAX, whole};
use super::place::Place;
use super::{Failure, Proxy};
use crate::policy::proxy::{ProxyUrl, Scheme};

/// How long a proxy may take until its tunnel stands.
const HANDSHAKE: Duration = Duration::from_secs(20);

/// How long all ways may take together.
const ALL_WAYS: Duration = Duration::from_secs(45);

/// What a proxy says when it refuses is shown, up to so many bytes.
const REFUSAL_MAX: usize = 64 << 10;

/// One of the ways to a place.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Way {
    /// As the host itself would go.
    Direct,
    /// By a proxy.
    Via(ProxyUrl),
}

/// A way that stands.
pub struct Tunnel {
    /// What leads there.
    pub wire: Wire,
    /// What the far side has said already.
    pub early: Bytes,
}

impl Proxy {
    /// Opens the first of these ways that stands. `authorization` is what the guest itself says to a proxy.
    pub async fn tunnel(
        &self,
        ways: &[Way],
        place: &Place,
        authorization: Option<&HeaderValue>,
    ) -> Result<Tunnel, Failure> {
        timeout(ALL_WAYS, self.first_that_stands(ways, place, authorization))
            .await
            .unwrap_or(Err(Failure::Silent))
    }

    async fn first_that_stands(
        &self,
        ways: &[Way],
        place: &Place,
        authorization: Option<&HeaderValue>,
    ) -> Result<Tunnel, Failure> {
        let mut last = Failure::NoAddress;
        for way in ways {
            let opened = timeout(HANDSHAKE, self.open(way, place, authorization)).await;
            match opened.unwrap_or(Err(Failure::Silent)) {
                Ok(tunnel) => return Ok(tunnel),
                // Another proxy will not say otherwise, and is not to be asked what this one has refused.
                Err(refusal @ (Failure::Answered(_) | Failure::Refused(_))) => return Err(refusal),
                Err(failure) => {
                    tracing::debug!(%place, way = ?way, %failure, "a way that does not stand");
                    last = failure;
                }
            }
        }
        Err(last)
    }

    async fn open(
        &self,
        way: &Way,
        place: &Place,
        authorization: Option<&HeaderValue>,
    ) -> Result<Tunnel, Failure> {
        match way {
            Way::Direct => {
                let addresses = place.reach(&self.addresses(), self.dns()).await?;
                let line = self.lines().add(dial::connect(&addresses, &self.addresses()).await?)?;
                Ok(Tunnel { wire: Wire::Plain(line), early: Bytes::new() })
            }
            Way::Via(proxy) => match proxy.scheme {
                Scheme::Http | Scheme::Https => self.connect(proxy, place, authorization).await,
                Scheme::Socks5 | Scheme::Socks5h => self.socks(proxy, place).await,
            },
        }
    }

    /// A connection to a proxy itself.
    pub async fn call(&self, proxy: &ProxyUrl) -> Result<Wire, Failure> {
        let addresses = self.addresses_of_proxy(&proxy.host, proxy.port).await?;
        let line = self.lines().add(dial::connect(&addresses, &self.addresses()).await?)?;
        match proxy.scheme {
            Scheme::Https => Ok(self.tls().open(&proxy.host, line).await?),
            Scheme::Http | Scheme::Socks5 | Scheme::Socks5h => Ok(Wire::Plain(line)),
        }
    }

    async fn socks(&self, proxy: &ProxyUrl, place: &Place) -> Result<Tunnel, Failure> {
        let by_name = proxy.scheme == Scheme::Socks5h;
        let target = match (&place.name, place.address) {
            (Some(name), _) if by_name => TargetAddr::Domain(name.into(), place.port),
            (_, Some(address)) => TargetAddr::Ip((address, place.port).into()),
            _ => {
                let reached = place.reach(&self.addresses(), self.dns()).await?;
                TargetAddr::Ip(*reached.first().ok_or(Failure::NoAddress)?)
            }
        };
        let wire = self.call(proxy).await?;
        let opened = match &proxy.credentials {
            None => Socks5Stream::connect_with_socket(wire, target).await,
            Some(known) => {
                let (user, password) = (known.user.as_str(), known.password());
                Socks5Stream::connect_with_password_and_socket(wire, target, user, password).await
            }
        };
        // It reads its answers to the byte: nothing of the far side's is left behind.
        opened
            .map(|stream| Tunnel { wire: stream.into_inner(), early: Bytes::new() })
            .map_err(|error| Failure::Socks(error.to_string()))
    }

    async fn connect(
        &self,
        proxy: &ProxyUrl,
        place: &Place,
        guests: Option<&HeaderValue>,
    ) -> Result<Tunnel, Failure> {
        let mut answered = false;
        loop {
            let target = place.to_string();
            let own = self.authorization(proxy, "CONNECT", &target);
            let response = self.ask(proxy, &target, own.as_ref().or(guests)).await?;
            if response.status().is_success() {
                let upgraded = hyper::upgrade::on(response).await.map_err(|_| Failure::Garbled)?;
                let parts = upgraded.downcast::<TokioIo<Wire>>().map_err(|_| Failure::Garbled)?;
                return Ok(Tunnel { wire: parts.io.into_inner(), early: parts.read_buf });
            }
            let asked = response.status() == StatusCode::PROXY_AUTHENTICATION_REQUIRED;
            if asked && !answered && self.learn(proxy, Challenge::of(response.headers())) {
                answered = true;
                continue;
            }
            let (head, body) = response.into_parts();
            let said = Limited::new(body, REFUSAL_MAX).collect().await;
            let said = said.map(Collected::to_bytes).unwrap_or_default();
            let mut shown = Response::from_parts(head, whole(said));
            super::http::strip(shown.headers_mut());
            // It may have been cut.
            shown.headers_mut().remove(CONTENT_LENGTH);
            return Err(Failure::Answered(Box::new(shown)));
        }
    }

    async fn ask(
        &self,
        proxy: &ProxyUrl,
        target: &str,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response<hyper::body::Incoming>, Failure> {
        let wire = self.call(proxy).await?;
        let (mut sender, connection) = http1::Builder::new()
            .max_buf_size(HEAD_MAX)
            .max_headers(HEADERS_MAX)
            .handshake(TokioIo::new(wire))
            .await
            .map_err(|_| Failure::Garbled)?;
        spawn_local(connection.with_upgrades());
        let mut request = Request::connect(target).version(Version::HTTP_11).header(HOST, target);
        if let Some(value) = authorization {
            request = request.header(PROXY_AUTHORIZATION, value);
        }
        let request = request.body(Empty::<Bytes>::new()).map_err(|_| Failure::Garbled)?;
        sender.send_request(request).await.map_err(|_| Failure::Garbled)
    }
}
