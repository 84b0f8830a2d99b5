//! Zones about which the user names who is to be asked.
//!
//! Names of a zone are asked of its servers and of nobody else, whether those answer or not: what a company calls its machines
//! is nobody else's business, and nobody else could say.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;

use crate::policy::names::{DomainName, Entry, Server, suffixes};

/// Zones and their servers.
#[derive(Default)]
pub(super) struct Zones(HashMap<DomainName, Rc<[SocketAddr]>>);

impl Zones {
    /// What the user named; a zone named twice has the servers of both.
    pub fn new(entries: &[Entry<Server>]) -> Self {
        let mut servers = HashMap::<DomainName, Vec<SocketAddr>>::new();
        for entry in entries {
            servers.entry(entry.name.clone()).or_default().extend(entry.values.iter().map(|server| server.0));
        }
        Self(servers.into_iter().map(|(zone, servers)| (zone, servers.into())).collect())
    }

    /// The servers of the innermost zone that a name lies in.
    pub fn servers(&self, name: &[u8]) -> Option<Rc<[SocketAddr]>> {
        if self.0.is_empty() {
            return None;
        }
        suffixes(name).find_map(|zone| self.0.get(zone)).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_zone_counts_and_a_zone_ends_at_a_point() {
        let zones = Zones::new(&[
            "corp.example=10.8.0.53".parse().unwrap(),
            "lab.corp.example=10.9.0.53,10.9.0.54".parse().unwrap(),
            "corp.example=10.8.0.54".parse().unwrap(),
            "8.10.in-addr.arpa=10.8.0.53".parse().unwrap(),
        ]);
        let servers = |name: &str| {
            let name: DomainName = name.parse().unwrap();
            let servers = zones.servers(name.wire());
            servers.map(|servers| servers.iter().map(|server| server.ip().to_string()).collect::<Vec<_>>())
        };
        let of = |servers: &[&str]| Some(servers.iter().map(ToString::to_string).collect());
        assert_eq!(servers("corp.example"), of(&["10.8.0.53", "10.8.0.54"]));
        assert_eq!(servers("a.b.Corp.Example."), of(&["10.8.0.53", "10.8.0.54"]));
        assert_eq!(servers("x.lab.corp.example"), of(&["10.9.0.53", "10.9.0.54"]));
        assert_eq!(servers("7.0.8.10.in-addr.arpa"), of(&["10.8.0.53"]));
        for name in ["example", "notcorp.example", "corp.example.com", "corp.test"] {
            assert_eq!(servers(name), None, "{name}");
        }
        assert!(Zones::default().servers(b"\0").is_none());
    }
}
