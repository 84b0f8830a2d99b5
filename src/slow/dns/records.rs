//! Names that the user gives to addresses, at the start and while hythe runs.

use std::collections::HashMap;
use std::net::IpAddr;

use super::address_table::AddressTable;
use super::message::Query;
use super::names::Found;
use crate::policy::names::{ADDRESSES_MAX, DomainName, Entry, RECORDS_MAX};

/// Why a record cannot be added.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RecordError {
    /// There are too many names.
    #[error("{RECORDS_MAX} names have records, and no more can: remove some first")]
    Names,
    /// The name has too many addresses.
    #[error("{0} would have more than {ADDRESSES_MAX} addresses")]
    Addresses(DomainName),
}

/// The user's records, by name.
#[derive(Default)]
pub(super) struct Records {
    entries: HashMap<DomainName, Vec<IpAddr>>,
    /// The same, as it is looked up.
    table: AddressTable,
}

impl Records {
    /// Those of the start.
    pub fn new(entries: &[Entry<IpAddr>]) -> Result<Self, RecordError> {
        let mut records = Self::default();
        for Entry { name, values } in entries {
            records.insert(name, values)?;
        }
        records.index();
        Ok(records)
    }

    /// Adds addresses to a name; without any, the name is there and stands for nothing. All or none are added.
    pub fn add(&mut self, name: &DomainName, addresses: &[IpAddr]) -> Result<(), RecordError> {
        self.insert(name, addresses)?;
        self.index();
        Ok(())
    }

    fn insert(&mut self, name: &DomainName, addresses: &[IpAddr]) -> Result<(), RecordError> {
        let mut all = match self.entries.get(name) {
            Some(known) => known.clone(),
            None if self.entries.len() >= RECORDS_MAX => return Err(RecordError::Names),
            None => Vec::new(),
        };
        for address in addresses {
            if !all.contains(address) {
                all.push(*address);
            }
        }
        if all.len() > ADDRESSES_MAX {
            return Err(RecordError::Addresses(name.clone()));
        }
        self.entries.insert(name.clone(), all);
        Ok(())
    }

    /// Takes addresses from a name, and with its last one, or where none are given, the name. Returns whether anything
    /// was there to be taken.
    pub fn remove(&mut self, name: &DomainName, addresses: &[IpAddr]) -> bool {
        let Some(known) = self.entries.get_mut(name) else { return false };
        let before = known.len();
        known.retain(|address| !addresses.contains(address));
        let taken = addresses.is_empty() || known.len() < before;
        if addresses.is_empty() || (taken && known.is_empty()) {
            self.entries.remove(name);
        }
        self.index();
        taken
    }

    /// All of them, in the order of their names.
    pub fn list(&self) -> Vec<Entry<IpAddr>> {
        let entry =
            |(name, values): (&DomainName, &Vec<_>)| Entry { name: name.clone(), values: values.clone() };
        let mut all: Vec<_> = self.entries.iter().map(entry).collect();
        all.sort_by_cached_key(|entry| entry.name.to_string());
        all
    }

    /// What is known of a name.
    pub fn look_up(&self, query: &Query<'_>) -> Option<Found> {
        self.table.look_up(query)
    }

    fn index(&mut self) {
        self.table = AddressTable::default();
        for Entry { name, values: addresses } in &self.list() {
            self.table.add(name, addresses);
            // What an asterisk stands for has no one name.
            if !name.wire().starts_with(b"\x01*") {
                for address in addresses {
                    self.table.point(*address, name);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> DomainName {
        text.parse().unwrap()
    }

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    fn list(records: &Records) -> Vec<(String, usize)> {
        records.list().into_iter().map(|entry| (entry.name.to_string(), entry.values.len())).collect()
    }

    #[test]
    fn records_are_added_listed_and_removed() {
        let mut records = Records::new(&["db.test=10.0.0.1".parse().unwrap()]).unwrap();
        records.add(&name("DB.test"), &[ip(1), ip(2)]).unwrap();
        records.add(&name("a.test"), &[ip(3)]).unwrap();
        records.add(&name("blocked.test"), &[]).unwrap();
        assert_eq!(list(&records), [("a.test".into(), 1), ("blocked.test".into(), 0), ("db.test".into(), 2)]);

        assert!(!records.remove(&name("db.test"), &[ip(9)]));
        assert!(records.remove(&name("db.test"), &[ip(1)]));
        assert!(records.remove(&name("db.test"), &[ip(2)]), "and with the last address the name goes");
        assert!(records.remove(&name("blocked.test"), &[]));
        assert!(!records.remove(&name("blocked.test"), &[]));
        assert_eq!(list(&records), [("a.test".into(), 1)]);
    }

    #[test]
    fn there_are_no_more_than_there_may_be_and_what_is_too_much_changes_nothing() {
        let many: Vec<IpAddr> = (0..=64).map(ip).collect();
        let mut records = Records::default();
        assert_eq!(records.add(&name("x.test"), &many), Err(RecordError::Addresses(name("x.test"))));
        records.add(&name("x.test"), &many[1..]).unwrap();
        assert!(records.add(&name("x.test"), &many[..1]).is_err());
        assert_eq!(list(&records), [("x.test".into(), ADDRESSES_MAX)]);

        let entry = |number| Entry { name: name(&format!("n{number}.test")), values: vec![] };
        let entries: Vec<_> = (0..RECORDS_MAX).map(entry).collect();
        let mut records = Records::new(&entries).unwrap();
        assert_eq!(records.add(&name("more.test"), &[ip(1)]), Err(RecordError::Names));
        records.add(&name("n1.test"), &[ip(1)]).unwrap();
        assert_eq!(records.list().len(), RECORDS_MAX);
    }
}
