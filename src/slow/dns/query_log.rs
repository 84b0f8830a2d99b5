//! One line a query, for those who ask for it: what was asked, by whom, and who said what.
//!
//! A name is a guest's to choose, so that it may hold anything: it is shown as zone files show it, and nothing in it reaches a
//! terminal or a parser of the log.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use hickory_proto::rr::RecordType;

use super::Transport;
use super::message::{self, Query};
use crate::policy::names::WireText;

/// Who answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Source {
    /// A resolver.
    Server(SocketAddr),
    /// The user's records.
    Records,
    /// The names of the link.
    Link,
    /// The host's hosts file.
    Hosts,
    /// What a resolver said before.
    Cache,
    /// The filter of addresses.
    Filter,
    /// A rule about where the guest may go.
    Policy,
    /// hythe: what was asked is not answered, or nobody answers it.
    Nobody,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Server(address) => address.fmt(f),
            Self::Records => f.write_str("records"),
            Self::Link => f.write_str("link"),
            Self::Hosts => f.write_str("hosts"),
            Self::Cache => f.write_str("cache"),
            Self::Filter => f.write_str("filter"),
            Self::Policy => f.write_str("policy"),
            Self::Nobody => f.write_str("nobody"),
        }
    }
}

/// Writes the line about one query.
pub(super) fn line(
    query: &Query<'_>,
    transport: Transport,
    source: Source,
    answer: Option<&[u8]>,
    took: Duration,
) {
    let name = WireText(query.name());
    let kind = Kind(query.question().query_type());
    let from: &dyn fmt::Display = match &transport {
        Transport::Udp(endpoint) => endpoint,
        Transport::Tcp => &"tcp",
    };
    // A retransmission of a query under way has none of its own.
    let code: &dyn fmt::Display = match answer {
        Some(answer) => &Code(message::response_code(answer)),
        None => &"-",
    };
    let ms = (took.as_secs_f64() * 1e6).round() / 1e3;
    tracing::info!(target: "dns", %name, %kind, %from, server = %source, rcode = %code, ms, "query");
}

/// A type by its name, or its number (RFC 3597, 5).
struct Kind(RecordType);

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            RecordType::Unknown(number) => write!(f, "TYPE{number}"),
            named => named.fmt(f),
        }
    }
}

/// A response code by its name (RFC 6895, 2.3).
pub(super) struct Code(pub(super) hickory_proto::op::ResponseCode);

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use hickory_proto::op::ResponseCode as Named;
        f.write_str(match self.0 {
            Named::NoError => "NOERROR",
            Named::FormErr => "FORMERR",
            Named::ServFail => "SERVFAIL",
            Named::NXDomain => "NXDOMAIN",
            Named::NotImp => "NOTIMP",
            Named::Refused => "REFUSED",
            other => return write!(f, "RCODE{}", u16::from(other)),
        })
    }
}
