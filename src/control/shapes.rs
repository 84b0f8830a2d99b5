//! What is said at the control socket, in JSON. `docs/openapi.json` describes the same.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize};

use crate::policy::proxy::{PacFailure, ProxyMode};
use crate::policy::publish::Binding;

/// The longest request body, in bytes.
pub const BODY_MAX: usize = 64 << 10;
/// Specifications of one request.
pub const SPECS_MAX: usize = 1024;

/// Specifications of one removal, which come in the head of a request.
pub const REMOVED_MAX: usize = 32;

/// A published port.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Port {
    /// Its number, which no other port of the same process ever has.
    pub id: u32,
    /// What it binds, and where it leads.
    #[serde(flatten)]
    pub binding: Binding,
}

/// Published ports.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Ports {
    /// By number.
    pub ports: Vec<Port>,
}

/// What is to be published.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Publish {
    /// In the words of `-p`: all of them, or none.
    pub publish: Vec<String>,
    /// For as long as the caller listens to the answer, which lasts as long as the ports.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub while_connected: bool,
}

/// What hythe is and does.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The name by which it is told apart from others.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Its process; the guest is not told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// `io-uring` or `epoll`.
    pub engine: String,
    /// Worker threads.
    pub workers: usize,
    /// The guest's addresses.
    pub guest: Vec<IpAddr>,
    /// The gateway's addresses.
    pub gateway: Vec<IpAddr>,
    /// How many ports are published, each address for itself.
    pub ports: usize,
}

/// A name and what it stands for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// The name; `*.NAME` stands for all names below one.
    pub name: String,
    /// Its addresses.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
}

/// Names of the user's own.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Records {
    /// By name.
    pub records: Vec<Record>,
}

/// Which proxy the guest's connections go by. No password is told.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Proxy {
    /// Who has said so.
    pub mode: ProxyMode,
    /// The proxy for http.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<String>,
    /// The proxy for everything else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub https: Option<String>,
    /// Where none leads, as in `NO_PROXY`.
    pub bypass: String,
    /// Where the script is that chooses one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pac: Option<String>,
    /// What becomes of connections about which it fails to say something.
    pub pac_failure: PacFailure,
    /// The ports that go by it.
    pub transparent_ports: String,
}

/// Which proxy they are to go by: what is not said is not there.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProxyChange {
    /// The proxy for http: `http://`, `https://`, `socks5://` or `socks5h://`, with user and password if need be.
    #[serde(default, deserialize_with = "there", skip_serializing_if = "Option::is_none")]
    pub http: Option<String>,
    /// The proxy for everything else.
    #[serde(default, deserialize_with = "there", skip_serializing_if = "Option::is_none")]
    pub https: Option<String>,
    /// Where none leads, as in `NO_PROXY`.
    #[serde(default, deserialize_with = "there", skip_serializing_if = "Option::is_none")]
    pub bypass: Option<String>,
    /// Where a script is that chooses one: `http://…`, or the path of [`Self::script`].
    #[serde(default, deserialize_with = "there", skip_serializing_if = "Option::is_none")]
    pub pac: Option<String>,
    /// The script itself, where it is a file: the running hythe sees no files.
    #[serde(default, deserialize_with = "there", skip_serializing_if = "Option::is_none")]
    pub script: Option<String>,
    /// What becomes of connections about which it fails to say something.
    #[serde(default, deserialize_with = "there", skip_serializing_if = "Option::is_none")]
    pub pac_failure: Option<PacFailure>,
    /// The ports that go by it; those of the start if it is not said.
    #[serde(default, deserialize_with = "there", skip_serializing_if = "Option::is_none")]
    pub transparent_ports: Option<String>,
    /// What proxies are told that ask who calls: lines `[HOST[:PORT] ]USER:PASSWORD`.
    #[serde(default, deserialize_with = "there", skip_serializing_if = "Option::is_none")]
    pub credentials: Option<String>,
}

/// A value that is there: what is left out is none, and `null` is no value.
fn there<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    T::deserialize(deserializer).map(Some)
}

/// What has changed around hythe. Several changes that come at once are told as one.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The host's own addresses.
    Addresses {
        /// Which came.
        added: Vec<IpAddr>,
        /// Which went. Connections from them are reset, unless they come back at once.
        removed: Vec<IpAddr>,
    },
    /// Links of the host, and routes and rules, so many of each.
    Network {
        /// Links.
        links: u32,
        /// Routes.
        routes: u32,
        /// Rules.
        rules: u32,
    },
    /// Whether the host has default routes.
    DefaultRoutes {
        /// For IPv4.
        ipv4: bool,
        /// For IPv6.
        ipv6: bool,
    },
    /// Whom the host asks for names, and in which domains it looks for short ones.
    Resolvers {
        /// The servers, in order.
        servers: Vec<SocketAddr>,
        /// The domains.
        search: Vec<String>,
    },
    /// The host's own file of names.
    Hosts {
        /// How many names it has.
        names: usize,
    },
    /// A route of the host is in the way of the guest's subnet: the guest does not reach that network.
    Overlap {
        /// Where the route leads.
        route: IpNet,
        /// The guest's subnet.
        subnet: IpNet,
    },
    /// The listener was too slow for so many events.
    Missed {
        /// How many.
        count: u64,
    },
}

/// Why something was not done: problem details (RFC 9457). The type is `about:blank`, so that the title is the status's.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Problem {
    /// The status's phrase.
    pub title: String,
    /// The status.
    pub status: u16,
    /// What happened, and what can be done.
    pub detail: String,
    /// The same for programs.
    pub code: Code,
    /// The port that it is about, if it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<Binding>,
}

/// What may go wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// The request is not understood.
    Malformed,
    /// Nothing has this path.
    UnknownPath,
    /// What has this path cannot do that.
    Method,
    /// The body is no JSON, by its media type.
    MediaType,
    /// The body is too large.
    TooLarge,
    /// The request did not come to its end.
    TooSlow,
    /// Not for this caller.
    Forbidden,
    /// A specification means nothing, or what hythe cannot do.
    Specification,
    /// Published already.
    PortAllocated,
    /// Another program has the port.
    AddressInUse,
    /// It takes a right that hythe does not have.
    Privileged,
    /// The address is not the host's.
    AddressNotAvailable,
    /// No port of a range, or no random port, is free.
    NoneFree,
    /// Not published, or not by the caller.
    NotPublished,
    /// No such record of a name.
    NoRecord,
    /// There are not enough descriptors, or too many callers.
    Exhausted,
    /// The kernel refused.
    System,
}
