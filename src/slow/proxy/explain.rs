//! What rules and proxies make of a destination, in words.

use std::net::IpAddr;

use super::Proxy;
use super::place::Place;
use super::tunnel::Way;
use crate::control::explanation::Further;
use crate::policy::egress::Verdict;
use crate::policy::proxy::{Choice, Kind, Why};
use crate::policy::target::{Target, TargetProtocol};

impl Proxy {
    /// What is decided about a connection or a datagram to an address under a name.
    pub async fn explain(
        &self,
        name: Option<&str>,
        address: IpAddr,
        port: u16,
        protocol: TargetProtocol,
    ) -> Vec<Further> {
        let rules = self.addresses();
        let mut said = Vec::new();
        let mut say = |about: &str, says: String| said.push(Further { about: about.into(), says });
        if !rules.egress.is_empty() {
            let says = match rules.egress.decide(&Target { name, address: Some(address), port, protocol }) {
                Verdict::Deny(rule) => format!("refused by '{rule}'"),
                Verdict::Allow => "no rule refuses it".to_string(),
            };
            say("egress rules", says);
        }
        let place = Place { name: name.map(str::to_string), address: Some(address), port };
        let Some(settings) = rules.proxy.as_ref().filter(|_| protocol == TargetProtocol::Tcp) else {
            return said;
        };
        if place.is_own(&rules) {
            say("proxy", "none: it is of the link".to_string());
        } else if rules.transparent.contains(port) {
            for (kind, what) in [(Kind::Http, "http"), (Kind::Tunnel, "everything else")] {
                let says = match settings.choose(kind, &place.target()) {
                    Choice::Direct(Why::Bypassed) => "none: the bypass list names it".to_string(),
                    Choice::Direct(Why::NoProxy) => "none".to_string(),
                    Choice::Via(proxy) => proxy.to_string(),
                    Choice::Pac => match self.by_script(kind, &place, settings).await {
                        Ok(ways) => format!("by script: {}", words(&ways)),
                        Err(failure) => failure.to_string(),
                    },
                };
                say(&format!("proxy for {what}"), says);
            }
        } else {
            say("proxy", format!("none: port {port} is not among {}", rules.transparent));
        }
        said
    }
}

fn words(ways: &[Way]) -> String {
    let word = |way: &Way| match way {
        Way::Direct => "none".to_string(),
        Way::Via(proxy) => proxy.to_string(),
    };
    ways.iter().map(word).collect::<Vec<_>>().join(", else ")
}
