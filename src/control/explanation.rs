//! What would become of the guest's traffic to a destination, and why: as `/v1/explain` tells it, and as people read it.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// What would become of the guest's traffic to a destination.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Explanation {
    /// The destination.
    pub destination: String,
    /// Where it is a name: what the guest's resolver says, a type each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<NameAnswer>,
    /// What becomes of each address.
    pub ways: Vec<Way>,
}

/// What is said about a name.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NameAnswer {
    /// `A` or `AAAA`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Who says so: `records`, `link`, `hosts`, `cache`, `filter`, `nobody`, or the address of a server.
    pub from: String,
    /// Why they were asked.
    pub because: String,
    /// The response code, like `NOERROR`.
    pub code: String,
    /// The addresses.
    pub addresses: Vec<IpAddr>,
}

/// What becomes of traffic to an address.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Way {
    /// The address.
    pub address: IpAddr,
    /// What it means.
    pub meaning: Meaning,
    /// Why it means that.
    pub because: String,
    /// By which route it leaves the host, where it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route: Option<Route>,
    /// Why there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_route: Option<String>,
    /// What else decides about it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub further: Vec<Further>,
}

/// What an address means.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Meaning {
    /// hythe itself.
    Gateway,
    /// The host's loopback.
    Host,
    /// The world, and the host's other addresses.
    Outside,
    /// It is not reached.
    Refused,
}

/// A route of the host.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Route {
    /// The interface.
    pub interface: String,
    /// The source address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<IpAddr>,
    /// The next router.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// The largest packet that is known to pass.
    pub mtu: u32,
    /// The user has chosen the interface or the source.
    pub chosen: bool,
}

/// Another rule that decides.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Further {
    /// Which.
    pub about: String,
    /// What it says.
    pub says: String,
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.destination)?;
        for NameAnswer { kind, from, because, code, addresses } in &self.names {
            let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
            let addresses = if addresses.is_empty() { "nothing".to_string() } else { addresses.join(", ") };
            writeln!(f, "  {kind}: {addresses} ({code}; {from}: {because})")?;
        }
        self.ways.iter().try_for_each(|way| way.fmt(f))
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let meaning = match self.meaning {
            Meaning::Gateway => "gateway",
            Meaning::Host => "host",
            Meaning::Outside => "outside",
            Meaning::Refused => "refused",
        };
        writeln!(f, "  {} is {meaning}: {}", self.address, self.because)?;
        if let Some(Route { interface, source, gateway, mtu, chosen }) = &self.route {
            write!(f, "    by {interface}")?;
            gateway.iter().try_for_each(|gateway| write!(f, " via {gateway}"))?;
            source.iter().try_for_each(|source| write!(f, " from {source}"))?;
            writeln!(f, ", packets of up to {mtu} bytes{}", if *chosen { " (--outbound-…)" } else { "" })?;
        }
        self.no_route.iter().try_for_each(|why| writeln!(f, "    no route: {why}"))?;
        self.further.iter().try_for_each(|Further { about, says }| writeln!(f, "    {about}: {says}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_explanation_reads_from_the_name_to_the_wire() {
        let text = r#"{"destination": "git.corp.example:443",
            "names": [{"type": "A", "from": "10.8.0.53:53", "because": "a server of its zone", "code": "NOERROR",
                "addresses": ["10.8.0.7"]}],
            "ways": [{"address": "10.8.0.7", "meaning": "outside", "because": "through the host's routes",
                "route": {"interface": "tun0", "source": "10.8.0.2", "mtu": 1280, "chosen": false},
                "further": [{"about": "proxy", "says": "none"}]}]}"#;
        let explanation: Explanation = serde_json::from_str(text).unwrap();
        let expected = "git.corp.example:443
  A: 10.8.0.7 (NOERROR; 10.8.0.53:53: a server of its zone)
  10.8.0.7 is outside: through the host's routes
    by tun0 from 10.8.0.2, packets of up to 1280 bytes
    proxy: none
";
        assert_eq!(explanation.to_string(), expected);
    }
}
