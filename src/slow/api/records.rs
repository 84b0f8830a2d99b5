//! The user's own names, while hythe runs.
//!
//! ```text
//! GET    /v1/dns                              {"records": [{"name", "addresses"}, …]}
//! POST   /v1/dns      {"name", "addresses"}    adds addresses to a name; without any, the name stands for nothing
//! DELETE /v1/dns?name=NAME[&address=…]         takes addresses from a name, or the name
//! GET    /services/dns/all                    the same names in gvproxy's words: zones, records, default addresses
//! POST   /services/dns/add                    a zone in its words: 200 and nothing, or 500 and the reason as text
//! ```
//! They are the host's: the guest is not told and changes nothing.

use std::net::{IpAddr, Ipv4Addr};

use hyper::StatusCode;
use serde::{Deserialize, Serialize};

use super::problem::Refusal;
use crate::control::shapes::{Code, Record, Records};
use crate::policy::names::DomainName;
use crate::slow::dns::Dns;

/// All records.
pub fn all(dns: &Dns) -> Records {
    let records = dns.records().into_iter();
    let records = records.map(|entry| Record { name: entry.name.to_string(), addresses: entry.values });
    Records { records: records.collect() }
}

/// Adds a record. Returns it as it is then.
pub fn add(dns: &Dns, body: &[u8]) -> Result<Record, Refusal> {
    let Record { name, addresses } = serde_json::from_slice(body).map_err(|error| {
        let detail =
            format!("the body is not as expected, like {{\"name\": \"db.test\", \"addresses\": [\"10.0.0.5\"]}}: {error}");
        Refusal::new(StatusCode::BAD_REQUEST, Code::Malformed, detail)
    })?;
    let name = domain_name(&name)?;
    dns.add_record(&name, &addresses).map_err(|error| {
        Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, Code::Exhausted, error.to_string())
    })?;
    let now = dns.records().into_iter().find(|entry| entry.name == name);
    Ok(Record { name: name.to_string(), addresses: now.map(|entry| entry.values).unwrap_or_default() })
}

/// Removes what a query names.
pub fn remove(dns: &Dns, query: &str) -> Result<Records, Refusal> {
    let malformed = |detail: String| Refusal::new(StatusCode::BAD_REQUEST, Code::Malformed, detail);
    let (mut name, mut addresses) = (None, Vec::new());
    for (key, value) in form_urlencoded::parse(query.as_bytes()) {
        match &*key {
            "name" if name.is_none() => name = Some(domain_name(&value)?),
            "address" => addresses.push(
                value
                    .parse::<IpAddr>()
                    .map_err(|_| malformed(format!("'{}' is no address", value.escape_debug())))?,
            ),
            _ => {
                return Err(malformed(format!(
                    "'{}' is no parameter here, or one too many",
                    key.escape_debug()
                )));
            }
        }
    }
    let name = name.ok_or_else(|| malformed("there must be a name".into()))?;
    if !dns.remove_record(&name, &addresses) {
        let detail = format!("{name} has no such record");
        return Err(Refusal::new(StatusCode::NOT_FOUND, Code::NoRecord, detail));
    }
    Ok(all(dns))
}

fn domain_name(text: &str) -> Result<DomainName, Refusal> {
    text.parse().map_err(|error: crate::policy::names::NameError| {
        Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, Code::Specification, error.to_string())
    })
}

/// A zone in gvproxy's words.
#[derive(Serialize, Deserialize, Debug)]
pub struct Zone {
    #[serde(rename = "Name", alias = "name", default)]
    name: String,
    #[serde(rename = "Records", alias = "records", default)]
    records: Option<Vec<ZoneRecord>>,
    #[serde(rename = "DefaultIP", alias = "defaultIP", alias = "defaultIp", default)]
    default_ip: String,
}

/// A record of a zone.
#[derive(Serialize, Deserialize, Debug)]
struct ZoneRecord {
    #[serde(rename = "Name", alias = "name", default)]
    name: String,
    #[serde(rename = "IP", alias = "ip", default)]
    ip: String,
    #[serde(rename = "Regexp", alias = "regexp", default, skip_serializing_if = "Option::is_none")]
    regexp: Option<serde_json::Value>,
}

/// All records as zones: each name one of its own, since where one zone ends and another begins is nobody's memory.
pub fn zones(dns: &Dns) -> Vec<Zone> {
    let zone = |record: Record| {
        let first = record.addresses.first().map(ToString::to_string).unwrap_or_default();
        let (name, default_ip, records) = match record.name.strip_prefix("*.") {
            Some(zone) => (zone.to_string(), first, Vec::new()),
            None => {
                let own = |ip: &IpAddr| ZoneRecord { name: String::new(), ip: ip.to_string(), regexp: None };
                (record.name.clone(), String::new(), record.addresses.iter().map(own).collect())
            }
        };
        Zone { name, records: Some(records), default_ip }
    };
    all(dns).records.into_iter().map(zone).collect()
}

/// Adds what a zone says, all of it that has a meaning here, or nothing.
pub fn add_zone(dns: &Dns, body: &[u8]) -> Result<(), String> {
    let zone: Zone = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    let address = |text: &str| match text {
        // What Go writes where there is none.
        "" => Ok(None),
        _ => text.parse::<IpAddr>().map(Some).map_err(|_| format!("'{}' is no address", text.escape_debug())),
    };
    let name = |host: &str| -> Result<DomainName, String> {
        let zone = zone.name.trim_end_matches('.');
        let text = if host.is_empty() { zone.to_string() } else { format!("{host}.{zone}") };
        text.parse().map_err(|error: crate::policy::names::NameError| error.to_string())
    };
    let mut wanted: Vec<(DomainName, IpAddr)> = Vec::new();
    for record in zone.records.iter().flatten() {
        if record.regexp.as_ref().is_some_and(|regexp| !regexp.is_null()) {
            return Err("names by regular expression are not served; *.NAME is".into());
        }
        if let Some(ip) = address(&record.ip)? {
            wanted.push((name(&record.name)?, ip));
        }
    }
    if let Some(ip) = address(&zone.default_ip)?.filter(|ip| *ip != IpAddr::V4(Ipv4Addr::UNSPECIFIED)) {
        wanted.push((name("*")?, ip));
    }
    for (index, (name, ip)) in wanted.iter().enumerate() {
        if let Err(error) = dns.add_record(name, &[*ip]) {
            wanted[..index].iter().for_each(|(name, ip)| {
                dns.remove_record(name, &[*ip]);
            });
            return Err(error.to_string());
        }
    }
    Ok(())
}
