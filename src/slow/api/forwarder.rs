//! The same ports in the words of gvproxy's forwarder, as podman and others call it (gvisor-tap-vsock, `pkg/services/forwarder`).
//!
//! ```text
//! GET  /services/forwarder/all                                            [{"local", "remote", "protocol"}, …]
//! POST /services/forwarder/expose    {"local", "remote", "protocol"}      200 and nothing, or 500 and the reason as text
//! POST /services/forwarder/unexpose  {"local", "protocol"}                the same
//! ```
//! `local` is `ADDRESS:PORT` or `:PORT` of the host; `remote` is `ADDRESS:PORT` of the guest, `:PORT` means the caller's. What leads
//! elsewhere than to the guest is refused, and so are sockets and pipes of the host's file system.

use std::net::IpAddr;
use std::rc::Rc;

use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Response, StatusCode};
use serde::{Deserialize, Serialize};

use super::list::Answer;
use crate::policy::publish::{Binding, HostPort, PublishRequest, PublishedProtocol};
use crate::slow::ports::table::{Place, Publisher};
use crate::slow::ports::{Publishing, Removal};

/// What all paths begin with.
pub const PREFIX: &str = "/services/forwarder/";

/// What is shown of words that mean nothing, at the most.
const SHOWN_MAX: usize = 128;

/// What may be called.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Call {
    /// Tells all.
    All,
    /// Publishes.
    Expose,
    /// Unpublishes.
    Unexpose,
}

impl Call {
    /// What a path calls.
    pub fn at(path: &str) -> Option<Self> {
        match path {
            "/services/forwarder/all" => Some(Self::All),
            "/services/forwarder/expose" => Some(Self::Expose),
            "/services/forwarder/unexpose" => Some(Self::Unexpose),
            _ => None,
        }
    }

    /// How it is called.
    pub fn method(self) -> &'static str {
        match self {
            Self::All => Method::GET.as_str(),
            Self::Expose | Self::Unexpose => Method::POST.as_str(),
        }
    }
}

/// One forward, as it is told.
#[derive(Serialize)]
pub struct Forward {
    local: String,
    remote: String,
    protocol: PublishedProtocol,
}

impl Forward {
    /// A published port of a guest with these addresses.
    pub fn of(binding: &Binding, guest: &[IpAddr]) -> Self {
        let same_family = guest.iter().find(|ip| ip.is_ipv4() == binding.address.is_ipv4());
        let ip = same_family.or(guest.first()).copied().unwrap_or(binding.address);
        Self {
            local: binding.endpoint().to_string(),
            remote: std::net::SocketAddr::new(ip, binding.guest_port).to_string(),
            protocol: binding.protocol,
        }
    }
}

/// One forward, as it is asked for.
#[derive(Deserialize, Debug)]
struct Wanted {
    local: String,
    #[serde(default)]
    remote: String,
    #[serde(default)]
    protocol: String,
}

/// Makes a change that a caller wants, whose ports lead to these addresses of the guest's.
pub async fn change(
    call: Call,
    body: &[u8],
    publishing: &Rc<Publishing>,
    publisher: Publisher,
    guest: &[IpAddr],
) -> Result<(), String> {
    let turn = publishing.turn(publisher).await;
    let wanted: Wanted = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    let place = place(&wanted)?;
    let changed = if call == Call::Unexpose {
        publishing.unpublish(Removal::Place(place), publisher, turn).await
    } else {
        let request = PublishRequest {
            address: place.address,
            host_port: HostPort::One(place.port),
            guest_port: guest_port(&wanted.remote, guest)?,
            protocol: place.protocol,
        };
        publishing.publish(vec![request], publisher, turn).await
    };
    changed.map(drop).map_err(|error| error.to_string())
}

/// How a change went, as gvproxy tells it.
pub fn response(changed: Result<(), String>) -> Response<Answer> {
    let (status, text) = match changed {
        Ok(()) => (StatusCode::OK, String::new()),
        Err(reason) => (StatusCode::INTERNAL_SERVER_ERROR, reason + "\n"),
    };
    let mut response = Response::new(Answer::Whole(Some(text.into())));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

fn place(wanted: &Wanted) -> Result<Place, String> {
    let protocol = match wanted.protocol.as_str() {
        "" | "tcp" => PublishedProtocol::Tcp,
        "udp" => PublishedProtocol::Udp,
        "unix" | "npipe" => {
            return Err(format!(
                "protocol {}: sockets and pipes of the host's file system are not served; tcp and udp are",
                wanted.protocol
            ));
        }
        other => return Err(format!("protocol '{}' is neither tcp nor udp", shown(other))),
    };
    let (address, port) = endpoint(&wanted.local)
        .ok_or_else(|| format!("local '{}' is no ADDRESS:PORT of the host", shown(&wanted.local)))?;
    Ok(Place { address, port, protocol })
}

fn guest_port(remote: &str, guest: &[IpAddr]) -> Result<u16, String> {
    let (address, port) = endpoint(remote)
        .ok_or_else(|| format!("remote '{}' is no ADDRESS:PORT of the guest", shown(remote)))?;
    match address.filter(|address| !guest.contains(address)) {
        Some(address) => Err(format!("remote {address} is not the guest, which has {}", list(guest))),
        None => Ok(port),
    }
}

/// `ADDRESS:PORT`, or `:PORT`; IPv6 in brackets.
fn endpoint(text: &str) -> Option<(Option<IpAddr>, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    let port = port.parse().ok().filter(|port| *port > 0)?;
    let address = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        // One that stands for an IPv4 address is that address.
        Some(v6) => Some(IpAddr::V6(v6.parse().ok()?).to_canonical()),
        None if host.is_empty() => None,
        None if host == "localhost" => Some(IpAddr::from([127, 0, 0, 1])),
        None => Some(IpAddr::V4(host.parse().ok()?)),
    };
    Some((address, port))
}

fn list(guest: &[IpAddr]) -> String {
    guest.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn shown(text: &str) -> String {
    text.chars().take(SHOWN_MAX).flat_map(char::escape_debug).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(json: &str) -> Wanted {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn places_are_understood_as_gvproxys_callers_write_them() {
        for (json, expected) in [
            (r#"{"local": ":8000"}"#, ":8000/tcp"),
            (r#"{"local": "127.0.0.1:8000", "protocol": "udp"}"#, "127.0.0.1:8000/udp"),
            (r#"{"local": "0.0.0.0:8000", "protocol": "tcp", "more": 1}"#, "0.0.0.0:8000/tcp"),
            (r#"{"local": "[::1]:8000"}"#, "[::1]:8000/tcp"),
            (r#"{"local": "[::ffff:10.0.0.1]:8000"}"#, "10.0.0.1:8000/tcp"),
            (r#"{"local": "localhost:8000"}"#, "127.0.0.1:8000/tcp"),
        ] {
            assert_eq!(place(&wanted(json)).unwrap().to_string(), expected);
        }
        for (json, expected) in [
            (r#"{"local": "/run/x.sock", "protocol": "unix"}"#, "file system"),
            (r#"{"local": "x", "protocol": "npipe"}"#, "file system"),
            (r#"{"local": ":1", "protocol": "sctp"}"#, "neither tcp nor udp"),
            (r#"{"local": ":0"}"#, "no ADDRESS:PORT"),
            (r#"{"local": "8000"}"#, "no ADDRESS:PORT"),
            (r#"{"local": "::1:8000"}"#, "no ADDRESS:PORT"),
            (r#"{"local": "example.org:8000"}"#, "no ADDRESS:PORT"),
            (r#"{"local": ":65536"}"#, "no ADDRESS:PORT"),
            ("{\"local\": \"\\u0007:x\"}", "'\\u{7}:x'"),
        ] {
            let error = place(&wanted(json)).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_remote_is_the_guest_or_nobody() {
        let guest = ["192.168.65.3".parse().unwrap(), "fdc4:f303:9324::3".parse().unwrap()];
        for remote in [":80", "192.168.65.3:80", "[fdc4:f303:9324::3]:80"] {
            assert_eq!(guest_port(remote, &guest), Ok(80));
        }
        for remote in ["192.168.65.4:80", "127.0.0.1:80", "[::1]:80"] {
            let error = guest_port(remote, &guest).unwrap_err();
            assert!(error.contains("is not the guest, which has 192.168.65.3"), "{error}");
        }
        for remote in ["", "80", ":0", "tcp://192.168.65.3:80"] {
            assert!(guest_port(remote, &guest).unwrap_err().contains("no ADDRESS:PORT"));
        }
    }

    #[test]
    fn a_forward_is_told_with_the_guests_address_of_its_family() {
        let guest = ["192.168.65.3".parse().unwrap(), "fdc4:f303:9324::3".parse().unwrap()];
        let binding = |address: &str| Binding {
            address: address.parse().unwrap(),
            host_port: 8000,
            guest_port: 80,
            protocol: PublishedProtocol::Tcp,
        };
        let told = |address| serde_json::to_string(&Forward::of(&binding(address), &guest)).unwrap();
        assert_eq!(
            told("0.0.0.0"),
            r#"{"local":"0.0.0.0:8000","remote":"192.168.65.3:80","protocol":"tcp"}"#
        );
        assert_eq!(
            told("::1"),
            r#"{"local":"[::1]:8000","remote":"[fdc4:f303:9324::3]:80","protocol":"tcp"}"#
        );
    }
}
