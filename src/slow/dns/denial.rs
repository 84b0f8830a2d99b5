//! What is said of a name that the guest is not to reach: what the rule chooses.

use std::net::IpAddr;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::rdata::{A, AAAA};
use hickory_proto::rr::{RData, Record, RecordType};

use super::Transport;
use super::message::{self, ExtendedError, Query};
use super::names::Found;
use crate::policy::egress::DnsAnswer;

/// How long an address that stands in for the name's own may be kept, in seconds: the rule may be another at the next start.
const TTL_S: u32 = 10;

/// The answer to a query for such a name.
pub(super) fn answer(query: &Query<'_>, said: DnsAnswer, transport: Transport) -> Option<Vec<u8>> {
    let is_internet = message::is_internet(query.question().query_class());
    match said {
        DnsAnswer::NxDomain if is_internet => query.fail(ResponseCode::NXDomain, Some(ExtendedError::DENIED)),
        DnsAnswer::Address(address) if is_internet => query.answer_with(stand_in(query, address), transport),
        // A name that is to be resolved is not denied here.
        DnsAnswer::Refused | DnsAnswer::NxDomain | DnsAnswer::Address(_) | DnsAnswer::Resolve => {
            query.fail(ResponseCode::Refused, Some(ExtendedError::DENIED))
        }
    }
}

/// The address, and nothing of any other type.
fn stand_in(query: &Query<'_>, address: IpAddr) -> Found {
    let question = query.question();
    let data = match address {
        IpAddr::V4(ip) => RData::A(A(ip)),
        IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
    };
    let is_asked = [data.record_type(), RecordType::ANY].contains(&question.query_type());
    let answers =
        if is_asked { vec![Record::from_rdata(question.name().clone(), TTL_S, data)] } else { Vec::new() };
    Found { code: ResponseCode::NoError, answers, authority: None }
}
