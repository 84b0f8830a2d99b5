//! Which request does what.
//!
//! ```text
//! GET    /v1/status
//! GET    /v1/events                 what changes from now on, a line each; for the host's programs
//! GET    /v1/explain?destination=…   what would become of the guest's traffic; for the host's programs
//! GET    /v1/ports                 those of the caller
//! POST   /v1/ports                 {"publish": [SPEC, …]}: all of them, or none
//! DELETE /v1/ports?spec=SPEC&…     all of them, or none
//! GET    /v1/ports/ID
//! DELETE /v1/ports/ID
//! GET    /v1/proxy                 which proxy the guest's connections go by; for the host's programs
//! PUT    /v1/proxy                 {"http": URL, …}: another one, for new connections
//! DELETE /v1/proxy                 none
//! /v1/dns, /services/dns/…         see [`super::records`]
//! /services/forwarder/…            see [`super::forwarder`]
//! ```
//! A page that a browser in the guest shows is not the guest: requests that tell where they come from (`Origin`) are refused, and so are
//! the guest's to a name that is not the gateway's (`Host`), by which a page would ask after its own name has been made to mean the gateway.

use std::net::IpAddr;
use std::rc::Rc;

use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Body, Bytes};
use hyper::header::{CONTENT_TYPE, HOST, HeaderMap, HeaderValue, LOCATION, ORIGIN};
use hyper::{Method, Request, Response, StatusCode};
use serde::Serialize;

use super::connection::PATIENCE;
use super::explain::Explainer;
use super::following::Following;
use super::forwarder;
use super::held::Lasting;
use super::list::{Answer, List};
use super::problem::Refusal;
use super::proxies;
use super::records;
use super::{About, Caller};
use crate::control::shapes::{BODY_MAX, Code, Port, Ports, Publish, REMOVED_MAX, SPECS_MAX, Status};
use crate::policy::guest_api::GuestApi;
use crate::policy::publish::{self, PublishRequest};
use crate::slow::dns::Dns;
use crate::slow::events::Events;
use crate::slow::ports::table::Publisher;
use crate::slow::ports::{Published, Publishing, Removal, Turn};
use crate::slow::proxy::Proxy;

const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// The gateway, as the guest's resolver knows it ([`crate::slow::dns`]).
const GATEWAY_NAMES: [&str; 2] = ["gateway.docker.internal", "gateway.containers.internal"];

/// JSON, a line each.
const LINES: HeaderValue = HeaderValue::from_static("application/x-ndjson");

const NOT_THE_GUEST: &str = "the guest may not publish ports (hythe --guest-api publish)";

/// Answers requests of every door.
pub struct Router {
    publishing: Rc<Publishing>,
    events: Rc<Events>,
    dns: Dns,
    proxy: Proxy,
    explainer: Explainer,
    about: About,
    /// What the guest may ask.
    guest: GuestApi,
}

/// What a path names.
enum Resource {
    Forwarder(forwarder::Call),
    Status,
    Events,
    Explain,
    Records,
    Zones,
    AddZone,
    Proxy,
    Ports,
    Port(u32),
}

impl Resource {
    fn at(path: &str) -> Option<Self> {
        match path {
            "/v1/dns" => Some(Self::Records),
            "/services/dns/all" => Some(Self::Zones),
            "/services/dns/add" => Some(Self::AddZone),
            "/v1/proxy" => Some(Self::Proxy),
            "/v1/events" => Some(Self::Events),
            "/v1/explain" => Some(Self::Explain),
            "/v1/status" => Some(Self::Status),
            "/v1/ports" => Some(Self::Ports),
            _ if path.starts_with(forwarder::PREFIX) => forwarder::Call::at(path).map(Self::Forwarder),
            _ => {
                let id = path.strip_prefix("/v1/ports/")?;
                let digits = !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_digit());
                id.parse().ok().filter(|_| digits).map(Self::Port)
            }
        }
    }

    fn methods(&self) -> &'static str {
        match self {
            Self::Forwarder(call) => call.method(),
            Self::Status | Self::Events | Self::Explain | Self::Zones => "GET",
            Self::AddZone => "POST",
            Self::Proxy => "GET, PUT, DELETE",
            Self::Records | Self::Ports => "GET, POST, DELETE",
            Self::Port(_) => "GET, DELETE",
        }
    }
}

type Answered = Result<Response<Answer>, Refusal>;

impl Router {
    /// A router for the ports of one hythe.
    pub fn new(
        publishing: Rc<Publishing>,
        events: Rc<Events>,
        dns: Dns,
        proxy: Proxy,
        explainer: Explainer,
        about: About,
        guest: GuestApi,
    ) -> Self {
        Self { publishing, events, dns, proxy, explainer, about, guest }
    }

    /// Answers a request of a caller.
    pub async fn answer<B>(&self, caller: &Caller, request: Request<B>) -> Response<Answer>
    where
        B: Body<Data = Bytes>,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        self.route(caller, request).await.unwrap_or_else(Refusal::answer)
    }

    async fn route<B>(&self, caller: &Caller, request: Request<B>) -> Answered
    where
        B: Body<Data = Bytes>,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let is_pages = request.headers().contains_key(ORIGIN)
            || (caller.publisher == Publisher::Guest && !is_for_the_gateway(request.headers()));
        if is_pages {
            let detail = "pages of a browser have nothing to ask here";
            return Err(Refusal::new(StatusCode::FORBIDDEN, Code::Forbidden, detail));
        }
        let Some(resource) = Resource::at(request.uri().path()) else {
            return Err(Refusal::new(
                StatusCode::NOT_FOUND,
                Code::UnknownPath,
                "nothing is here; there are /v1/ports, /v1/dns, /v1/explain, /v1/proxy, /v1/status, /v1/events and /services/",
            ));
        };
        let method = request.method().clone();
        if resource.methods().split(", ").all(|known| known != method) {
            return Err(Refusal::method(resource.methods()));
        }
        let is_hosts = matches!(
            resource,
            Resource::Events
                | Resource::Explain
                | Resource::Records
                | Resource::Zones
                | Resource::AddZone
                | Resource::Proxy
        );
        if is_hosts && caller.publisher == Publisher::Guest {
            let detail = "this is the host's, and not the guest's to know or to change";
            return Err(Refusal::new(StatusCode::FORBIDDEN, Code::Forbidden, detail));
        }
        if let Resource::Forwarder(call) = resource {
            return Ok(self.forward(call, caller, request).await);
        }
        if method != Method::GET && !self.may_change(caller) {
            return Err(Refusal::new(StatusCode::FORBIDDEN, Code::Forbidden, NOT_THE_GUEST));
        }
        let publisher = caller.publisher;
        match (resource, method) {
            (Resource::Status, Method::GET) => Ok(json(StatusCode::OK, &self.status(publisher))),
            (Resource::Events, Method::GET) => {
                let events = Following::new(self.events.listen(), caller.presence.clone());
                let mut response = Response::new(Answer::Events(events));
                response.headers_mut().insert(CONTENT_TYPE, LINES);
                Ok(response)
            }
            (Resource::Explain, Method::GET) => {
                let query = request.uri().query().unwrap_or_default();
                Ok(json(StatusCode::OK, &self.explainer.answer(query).await?))
            }
            (Resource::Records, Method::GET) => Ok(json(StatusCode::OK, &records::all(&self.dns))),
            (Resource::Records, Method::POST) => {
                let body = json_body(request).await?;
                Ok(json(StatusCode::CREATED, &records::add(&self.dns, &body)?))
            }
            (Resource::Records, Method::DELETE) => {
                let query = request.uri().query().unwrap_or_default();
                Ok(json(StatusCode::OK, &records::remove(&self.dns, query)?))
            }
            (Resource::Zones, Method::GET) => Ok(json(StatusCode::OK, &records::zones(&self.dns))),
            (Resource::AddZone, Method::POST) => {
                Ok(forwarder::response(match body(request.into_body()).await {
                    Ok(bytes) => records::add_zone(&self.dns, &bytes),
                    Err(refusal) => Err(refusal.detail().to_string()),
                }))
            }
            (Resource::Proxy, Method::GET) => Ok(json(StatusCode::OK, &proxies::shown(&self.proxy))),
            (Resource::Proxy, Method::PUT) => {
                let body = json_body(request).await?;
                Ok(json(StatusCode::OK, &proxies::set(&self.proxy, &body).await?))
            }
            (Resource::Proxy, Method::DELETE) => {
                Ok(json(StatusCode::OK, &proxies::clear(&self.proxy).await?))
            }
            (Resource::Ports, Method::GET) => {
                Ok(list(StatusCode::OK, List::of_table(self.publishing.clone(), publisher)))
            }
            (Resource::Ports, Method::POST) => self.publish(caller, request).await,
            (Resource::Ports, Method::DELETE) => {
                let turn = self.publishing.turn(caller.publisher).await;
                let meant = meant(request.uri().query().unwrap_or_default())?;
                self.unpublish(publisher, Removal::Meant(meant), turn).await
            }
            (Resource::Port(id), Method::GET) => self.port(publisher, id),
            (Resource::Port(id), Method::DELETE) => {
                let turn = self.publishing.turn(caller.publisher).await;
                self.unpublish(publisher, Removal::Numbered(id), turn).await
            }
            (resource, _) => Err(Refusal::method(resource.methods())),
        }
    }

    /// Whether a caller may change anything.
    fn may_change(&self, caller: &Caller) -> bool {
        caller.publisher == Publisher::Host || self.guest == GuestApi::Publish
    }

    /// A call in gvproxy's words.
    async fn forward<B>(
        &self,
        call: forwarder::Call,
        caller: &Caller,
        request: Request<B>,
    ) -> Response<Answer>
    where
        B: Body<Data = Bytes>,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let guest: Vec<IpAddr> = caller.address.iter().chain(&self.about.guest).copied().collect();
        let (publishing, publisher) = (&self.publishing, caller.publisher);
        if call == forwarder::Call::All {
            return list(StatusCode::OK, List::of_forwards(publishing.clone(), publisher, guest));
        }
        if !self.may_change(caller) {
            return forwarder::response(Err(NOT_THE_GUEST.into()));
        }
        let changed = match body(request.into_body()).await {
            Ok(bytes) => forwarder::change(call, &bytes, publishing, publisher, &guest).await,
            Err(refusal) => Err(refusal.detail().to_string()),
        };
        forwarder::response(changed)
    }

    fn status(&self, caller: Publisher) -> Status {
        let about = &self.about;
        Status {
            name: about.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_string(),
            pid: (caller == Publisher::Host).then(std::process::id),
            engine: about.engine.to_string(),
            workers: about.workers,
            guest: about.guest.clone(),
            gateway: about.gateway.clone(),
            ports: self.publishing.look(|table| table.count(caller)),
        }
    }

    fn port(&self, caller: Publisher, id: u32) -> Answered {
        let port = self.publishing.look(|table| {
            let row = table.seen_by(id, caller)?;
            Some(Port { id, binding: row.binding })
        });
        let port = port.ok_or_else(|| {
            let detail = format!("port {id} is not published");
            Refusal::new(StatusCode::NOT_FOUND, Code::NotPublished, detail)
        })?;
        Ok(json(StatusCode::OK, &port))
    }

    async fn publish<B>(&self, caller: &Caller, request: Request<B>) -> Answered
    where
        B: Body<Data = Bytes>,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let bytes = json_body(request).await?;
        let turn = self.publishing.turn(caller.publisher).await;
        let Publish { publish: specs, while_connected } =
            serde_json::from_slice(&bytes).map_err(|error| {
                let detail =
                    format!("the body is not as expected, like {{\"publish\": [\"8000:80\"]}}: {error}");
                Refusal::new(StatusCode::BAD_REQUEST, Code::Malformed, detail)
            })?;
        let requests = understood(specs, SPECS_MAX)?.into_iter().map(|(_, request)| request).collect();
        if while_connected {
            let (published, held) = self.publishing.publish_held(requests, caller.publisher, turn).await?;
            let answer = Lasting::new(line(published), held, caller.presence.clone());
            return Ok(with_type(StatusCode::CREATED, Answer::Lasting(answer)));
        }
        let published = self.publishing.publish(requests, caller.publisher, turn).await?;
        let location = match published[..] {
            [Published { id, .. }] => Some(format!("/v1/ports/{id}")),
            _ => None,
        };
        let mut response = list(StatusCode::CREATED, List::of(published));
        if let Some(location) = location.and_then(|location| HeaderValue::try_from(location).ok()) {
            response.headers_mut().insert(LOCATION, location);
        }
        Ok(response)
    }

    async fn unpublish(&self, caller: Publisher, removal: Removal, turn: Turn) -> Answered {
        let removed = self.publishing.unpublish(removal, caller, turn).await?;
        Ok(list(StatusCode::OK, List::of(removed)))
    }
}

/// Whether a request is for an address, or for a name of the gateway's.
fn is_for_the_gateway(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(HOST) else { return true };
    let Ok(host) = host.to_str() else { return false };
    let is_port = |port: &str| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let name = host.rsplit_once(':').filter(|(_, port)| is_port(port)).map_or(host, |(name, _)| name);
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    GATEWAY_NAMES.iter().any(|known| name.eq_ignore_ascii_case(known)) || address.parse::<IpAddr>().is_ok()
}

/// Ports in a line of their own.
fn line(published: Vec<Published>) -> Bytes {
    let ports = published.into_iter().map(|Published { id, binding }| Port { id, binding }).collect();
    // As in `json`, below.
    let mut line = serde_json::to_vec(&Ports { ports }).unwrap_or_default();
    line.push(b'\n');
    line.into()
}

fn json<T: Serialize>(status: StatusCode, value: &T) -> Response<Answer> {
    // No map among what is told has keys that are no strings, which is what could fail.
    let bytes = serde_json::to_vec(value).unwrap_or_default();
    with_type(status, Answer::Whole(Some(bytes.into())))
}

fn list(status: StatusCode, ports: List) -> Response<Answer> {
    with_type(status, Answer::Ports(ports))
}

fn with_type(status: StatusCode, body: Answer) -> Response<Answer> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    response
}

/// Whether the body says that it is JSON, or does not say what it is.
fn is_json<B>(request: &Request<B>) -> bool {
    let Some(media_type) = request.headers().get(CONTENT_TYPE) else { return true };
    let essence = media_type.to_str().ok().and_then(|text| text.split(';').next());
    essence.is_some_and(|essence| essence.trim().eq_ignore_ascii_case("application/json"))
}

/// The whole body of a request whose body is JSON, by its media type.
async fn json_body<B>(request: Request<B>) -> Result<Bytes, Refusal>
where
    B: Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    if !is_json(&request) {
        let detail = "the body is to be JSON: content-type: application/json";
        return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, Code::MediaType, detail));
    }
    body(request.into_body()).await
}

/// The whole body, if it is short enough and comes soon enough.
async fn body<B>(body: B) -> Result<Bytes, Refusal>
where
    B: Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let too_large = || {
        let detail = format!("the body is longer than {BODY_MAX} bytes");
        Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, Code::TooLarge, detail)
    };
    if body.size_hint().lower() > BODY_MAX as u64 {
        return Err(too_large());
    }
    match tokio::time::timeout(PATIENCE, Limited::new(body, BODY_MAX).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => {
            let detail = format!("the body cannot be read: {error}");
            Err(Refusal::new(StatusCode::BAD_REQUEST, Code::Malformed, detail))
        }
        Err(_) => {
            let detail = "the body did not come to its end";
            Err(Refusal::new(StatusCode::REQUEST_TIMEOUT, Code::TooSlow, detail))
        }
    }
}

/// The specifications of a query.
fn meant(query: &str) -> Result<Vec<(String, PublishRequest)>, Refusal> {
    let mut specs = Vec::new();
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        if name != "spec" {
            let detail = format!("'{}' is no parameter here; there is spec", name.escape_debug());
            return Err(Refusal::new(StatusCode::BAD_REQUEST, Code::Malformed, detail));
        }
        specs.push(value.into_owned());
    }
    understood(specs, REMOVED_MAX)
}

/// Specifications with what they mean: at least one, and not too many.
fn understood(specs: Vec<String>, most: usize) -> Result<Vec<(String, PublishRequest)>, Refusal> {
    if !(1..=most).contains(&specs.len()) {
        let detail = format!("{} specifications; there must be from 1 to {most}", specs.len());
        return Err(Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, Code::Specification, detail));
    }
    let mut understood = Vec::new();
    for spec in specs {
        let requests = publish::parse(&spec).map_err(|error| {
            Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, Code::Specification, error.to_string())
        })?;
        // So many ports there are of each protocol.
        if understood.len() + requests.len() > 2 * usize::from(u16::MAX) {
            let detail = "more ports than there are";
            return Err(Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, Code::Specification, detail));
        }
        understood.extend(requests.into_iter().map(|request| (spec.clone(), request)));
    }
    Ok(understood)
}
