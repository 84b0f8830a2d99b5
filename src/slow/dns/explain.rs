//! What the guest would be told about a name, who says so, and why they are asked. It is looked up as the guest's query would
//! be, and kept as its answer would be.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicU16, Ordering};

use hickory_proto::rr::RecordType;

use super::message::{self, Query};
use super::query_log::{Code, Source};
use super::{Dns, Transport, reply};
use crate::frame::address::Endpoint;
use crate::policy::egress::Verdict;
use crate::policy::names::DomainName;

/// Addresses that are told at the most.
const ADDRESSES_MAX: usize = 32;

/// What is said about a name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Said {
    /// `A` or `AAAA`.
    pub kind: RecordType,
    /// Who says so.
    pub from: String,
    /// Why they were asked.
    pub because: String,
    /// The response code.
    pub code: String,
    /// The addresses.
    pub addresses: Vec<IpAddr>,
}

impl Dns {
    /// What the guest would be told about a name's addresses, of the families that it has.
    pub async fn explain(&self, name: &DomainName) -> Vec<Said> {
        let of = |v4: bool, kind: RecordType| async move {
            match self.0.link.family(v4) {
                Some(_) => self.explain_kind(name, kind).await,
                None => None,
            }
        };
        let (v4, v6) = tokio::join!(of(true, RecordType::A), of(false, RecordType::AAAA));
        v4.into_iter().chain(v6).collect()
    }

    /// The addresses alone; none of what is no name.
    pub async fn addresses_of(&self, name: &str) -> Vec<IpAddr> {
        let Ok(name) = name.parse() else { return Vec::new() };
        let said = self.explain(&name).await;
        said.into_iter().flat_map(|said| said.addresses).take(ADDRESSES_MAX).collect()
    }

    /// What a rule makes of a name.
    fn refused(&self, name: &DomainName, kind: RecordType, answer: &[u8]) -> Said {
        let because = match self.0.settings.egress.for_name(&name.to_string()) {
            Verdict::Deny(rule) => format!("refused by '{rule}'"),
            Verdict::Allow => "a rule".to_string(),
        };
        Said {
            kind,
            from: Source::Policy.to_string(),
            because,
            code: Code(message::response_code(answer)).to_string(),
            addresses: reply::addresses(answer),
        }
    }

    async fn explain_kind(&self, name: &DomainName, kind: RecordType) -> Option<Said> {
        // Each a query of its own: two with the same number would be one that was sent again.
        static NUMBER: AtomicU16 = AtomicU16::new(0);
        let id = NUMBER.fetch_add(1, Ordering::Relaxed);
        let nobody = Endpoint::new(Ipv4Addr::UNSPECIFIED, 0);
        let message = [
            &id.to_be_bytes()[..],
            &[1, 0, 0, 1, 0, 0, 0, 0, 0, 0],
            name.wire(),
            &u16::from(kind).to_be_bytes(),
            &[0, 1],
        ]
        .concat();
        let query = Query::parse(&message).ok()?;
        let (mut answer, mut source) = self.find(&query, Transport::Udp(nobody)).await;
        // As the guest would, which is told that there is more.
        if answer.as_ref().is_some_and(|answer| answer.get(2).is_some_and(|flags| flags & 2 != 0)) {
            (answer, source) = self.find(&query, Transport::Tcp).await;
        }
        let answer = answer?;
        let because = match source {
            Source::Records => "a record of the user's",
            Source::Link => "a name of the link's",
            Source::Hosts => "the host's /etc/hosts",
            Source::Cache => "kept of what a resolver has said",
            Source::Policy => return Some(self.refused(name, kind, &answer)),
            Source::Filter => "left out (--dns-filter)",
            Source::Nobody => "nobody answers",
            Source::Server(_) if self.0.zones.servers(name.wire()).is_some() => "a server of its zone",
            Source::Server(_) if !self.0.settings.servers.is_empty() => "a resolver of the user's (--dns)",
            Source::Server(_) => "a resolver of the host's",
        };
        Some(Said {
            kind,
            from: source.to_string(),
            because: because.to_string(),
            code: Code(message::response_code(&answer)).to_string(),
            addresses: reply::addresses(&answer),
        })
    }
}
