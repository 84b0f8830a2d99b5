//! Names that stand for addresses, and addresses that have names: what a hosts file, or the user, says.
//!
//! A name that is here is here alone: of the types that it has no records of there are none, and nobody else is asked. So a name
//! given for one family does not lead elsewhere by the other.

use std::collections::HashMap;
use std::net::IpAddr;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::rdata::{A, AAAA, PTR};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use hickory_proto::serialize::binary::BinDecodable;

use super::message::{self, Query};
use super::names::Found;
use crate::policy::names::{ADDRESSES_MAX, DomainName, suffixes};

/// How long an answer may be kept, in seconds: these names may change at any time, and then soon for all.
const TTL_S: u32 = 10;
/// The label that stands for whatever is there (RFC 4592).
const ASTERISK: &[u8] = b"\x01*";

/// Names and addresses.
#[derive(Default, PartialEq, Debug)]
pub(super) struct AddressTable {
    names: HashMap<DomainName, Vec<IpAddr>>,
    /// By the names that addresses have in the reverse tree.
    pointers: HashMap<DomainName, DomainName>,
}

impl AddressTable {
    /// Adds addresses to a name, or a name without any.
    pub fn add(&mut self, name: &DomainName, addresses: &[IpAddr]) {
        let known = self.names.entry(name.clone()).or_default();
        for address in addresses {
            if known.len() < ADDRESSES_MAX && !known.contains(address) {
                known.push(*address);
            }
        }
    }

    /// Makes a name the one that is found by an address, unless it has one.
    pub fn point(&mut self, address: IpAddr, name: &DomainName) {
        self.pointers.entry(DomainName::of_address(address)).or_insert_with(|| name.clone());
    }

    /// What is known of a name, or `None` where nothing is.
    pub fn look_up(&self, query: &Query<'_>) -> Option<Found> {
        let addresses = self.addresses(query.name());
        let pointer = self.pointers.get(query.name());
        if addresses.is_none() && pointer.is_none() {
            return None;
        }
        let question = query.question();
        if !message::is_internet(question.query_class()) {
            return Some(Found { code: ResponseCode::Refused, answers: Vec::new(), authority: None });
        }
        let data = addresses.into_iter().flatten().map(|address| match address {
            IpAddr::V4(ip) => RData::A(A(*ip)),
            IpAddr::V6(ip) => RData::AAAA(AAAA(*ip)),
        });
        let pointer = pointer.and_then(|name| Some(RData::PTR(PTR(Name::from_bytes(name.wire()).ok()?))));
        let answers = data
            .chain(pointer)
            .filter(|data| [data.record_type(), RecordType::ANY].contains(&question.query_type()))
            .map(|data| Record::from_rdata(question.name().clone(), TTL_S, data))
            .collect();
        Some(Found { code: ResponseCode::NoError, answers, authority: None })
    }

    /// How many names there are.
    pub fn names(&self) -> usize {
        self.names.len()
    }

    /// The name itself counts more than an asterisk, and a nearer asterisk more than a farther one (RFC 4592).
    fn addresses(&self, name: &[u8]) -> Option<&Vec<IpAddr>> {
        if self.names.is_empty() {
            return None;
        }
        self.names.get(name).or_else(|| {
            let parents = suffixes(name).skip(1).take_while(|parent| parent.len() > 1);
            parents.map(|parent| [ASTERISK, parent].concat()).find_map(|name| self.names.get(&name[..]))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slow::dns::fake_server::query;

    fn table() -> AddressTable {
        let mut table = AddressTable::default();
        for (name, addresses) in [
            ("db.test", &["10.0.0.5", "fd00::5"][..]),
            ("four.test", &["10.0.0.4"]),
            ("nothing.test", &[]),
            ("*.apps.test", &["10.0.0.6"]),
            ("*.near.apps.test", &["10.0.0.7"]),
            ("own.apps.test", &["10.0.0.8"]),
        ] {
            let name: DomainName = name.parse().unwrap();
            let addresses: Vec<IpAddr> = addresses.iter().map(|address| address.parse().unwrap()).collect();
            table.add(&name, &addresses);
            for address in addresses {
                table.point(address, &name);
            }
        }
        table
    }

    /// What is said of a name, `None` where nothing is.
    fn look_up(name: &str, kind: RecordType) -> Option<Vec<String>> {
        let bytes = query(name, kind, 1);
        let found = table().look_up(&Query::parse(&bytes).unwrap())?;
        assert_eq!(found.code, ResponseCode::NoError);
        Some(found.answers.iter().map(|record| record.data.to_string()).collect())
    }

    #[allow(clippy::unnecessary_wraps, reason = "what look_up returns")]
    fn said<const N: usize>(texts: [&str; N]) -> Option<Vec<String>> {
        Some(texts.map(str::to_string).to_vec())
    }

    #[test]
    fn a_name_has_its_addresses_of_each_family_and_nothing_else() {
        assert_eq!(look_up("db.test.", RecordType::A), said(["10.0.0.5"]));
        assert_eq!(look_up("DB.Test.", RecordType::AAAA), said(["fd00::5"]));
        assert_eq!(look_up("db.test.", RecordType::ANY), said(["10.0.0.5", "fd00::5"]));
        for (name, kind) in
            [("four.test.", RecordType::AAAA), ("db.test.", RecordType::MX), ("nothing.test.", RecordType::A)]
        {
            assert_eq!(look_up(name, kind), said([]), "{name} {kind}");
        }
        for name in ["test.", "x.db.test.", "adb.test.", "apps.test."] {
            assert_eq!(look_up(name, RecordType::A), None, "{name}");
        }
    }

    #[test]
    fn an_asterisk_stands_for_all_that_is_below_and_has_nothing_nearer() {
        for (name, address) in [
            ("x.apps.test.", "10.0.0.6"),
            ("a.b.apps.test.", "10.0.0.6"),
            ("x.near.apps.test.", "10.0.0.7"),
            ("own.apps.test.", "10.0.0.8"),
        ] {
            assert_eq!(look_up(name, RecordType::A), said([address]), "{name}");
        }
    }

    #[test]
    fn an_address_has_its_first_name() {
        assert_eq!(look_up("5.0.0.10.in-addr.arpa.", RecordType::PTR), said(["db.test."]));
        let reverse = DomainName::of_address("fd00::5".parse().unwrap()).to_string() + ".";
        assert_eq!(look_up(&reverse, RecordType::PTR), said(["db.test."]));
        assert_eq!(look_up("5.0.0.10.in-addr.arpa.", RecordType::A), said([]));
        assert_eq!(look_up("9.0.0.10.in-addr.arpa.", RecordType::PTR), None);
    }

    #[test]
    fn in_other_classes_a_name_is_refused() {
        let mut bytes = query("db.test.", RecordType::A, 1);
        let class = bytes.len() - 1;
        bytes[class] = 3;
        let found = table().look_up(&Query::parse(&bytes).unwrap()).unwrap();
        assert_eq!((found.code, found.answers.len()), (ResponseCode::Refused, 0));
    }

    #[test]
    fn a_name_has_no_more_addresses_than_it_may() {
        let mut table = AddressTable::default();
        let name: DomainName = "many.test".parse().unwrap();
        for last in 0..=255 {
            table.add(&name, &[IpAddr::from([10, 0, 0, last]), IpAddr::from([10, 0, 0, 0])]);
        }
        assert_eq!(table.names[&name].len(), ADDRESSES_MAX);
    }
}
