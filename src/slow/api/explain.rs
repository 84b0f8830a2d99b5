//! What would become of the guest's traffic to a destination, and why.
//!
//! ```text
//! GET /v1/explain?destination=DEST[:PORT][/tcp|udp]      for the host's programs
//! ```
//! Asked of those who decide: the guest's resolver, the rules about addresses, and the kernel for the route.

use std::cell::RefCell;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::rc::Rc;

use hyper::StatusCode;

use super::problem::Refusal;
use crate::control::explanation::{Explanation, Further, Meaning, NameAnswer, Route, Way};
use crate::control::shapes::Code;
use crate::exchange::mail::PROXY_PORT;
use crate::frame::address::Address;
use crate::netlink::Netlink;
use crate::policy::addresses::{Addresses, Destination};
use crate::policy::destination::{Asked, AskedError, Host};
use crate::policy::publish::PublishedProtocol;
use crate::policy::target::TargetProtocol;
use crate::slow::current_addresses::CurrentAddresses;
use crate::slow::dns::{DNS_PORT, Dns};
use crate::slow::proxy::Proxy;

/// Addresses of a name that are looked at.
const ADDRESSES_MAX: usize = 32;

/// The port of the API at the gateway.
const API_PORT: u16 = 80;

/// Explains.
pub struct Explainer {
    dns: Dns,
    current: Rc<CurrentAddresses>,
    proxy: Proxy,
    netlink: RefCell<Netlink>,
}

impl Explainer {
    /// One that asks these.
    pub fn new(dns: Dns, current: Rc<CurrentAddresses>, proxy: Proxy, netlink: Netlink) -> Self {
        Self { dns, current, proxy, netlink: RefCell::new(netlink) }
    }

    /// Explains the destination that a request's query names.
    pub async fn answer(&self, query: &str) -> Result<Explanation, Refusal> {
        let mut destination = None;
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            if key != "destination" || destination.is_some() {
                let detail = format!("'{}' is no parameter here, or one too many", key.escape_debug());
                return Err(Refusal::new(StatusCode::BAD_REQUEST, Code::Malformed, detail));
            }
            destination = Some(value);
        }
        let destination = destination.ok_or_else(|| {
            Refusal::new(StatusCode::BAD_REQUEST, Code::Malformed, "there must be a destination")
        })?;
        let asked: Asked = destination.parse().map_err(|error: AskedError| {
            Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, Code::Specification, error.to_string())
        })?;
        let (names, addresses) = match &asked.host {
            Host::Address(ip) => (Vec::new(), vec![*ip]),
            Host::Name(name) => {
                let said = self.dns.explain(name).await;
                let addresses =
                    said.iter().flat_map(|said| said.addresses.clone()).take(ADDRESSES_MAX).collect();
                let names = said.into_iter().map(|said| NameAnswer {
                    kind: said.kind.to_string(),
                    from: said.from,
                    because: said.because,
                    code: said.code,
                    addresses: said.addresses,
                });
                (names.collect(), addresses)
            }
        };
        let rules = self.current.get();
        let mut ways = Vec::new();
        for ip in addresses {
            let mut way = self.way(&rules, ip, &asked);
            way.further = self.further(&way, &asked).await;
            ways.push(way);
        }
        Ok(Explanation { destination: asked.to_string(), names, ways })
    }

    fn way(&self, rules: &Addresses, ip: IpAddr, asked: &Asked) -> Way {
        let address = Address::from(ip);
        let (meaning, because, leads_to) = match rules.classify(address) {
            Ok(Destination::Gateway) => (Meaning::Gateway, at_the_gateway(rules, asked), None),
            Ok(Destination::Host) => {
                let loopback: IpAddr =
                    if ip.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
                (Meaning::Host, format!("the host's loopback, {loopback}"), Some(loopback))
            }
            Ok(Destination::Outside) if rules.own.binary_search(&address).is_ok() => {
                (Meaning::Outside, "an address of the host's own".to_string(), Some(ip))
            }
            Ok(Destination::Outside) => {
                (Meaning::Outside, "through the host's own sockets and routes".to_string(), Some(ip))
            }
            Err(_) => (Meaning::Refused, rules.why_not(address).to_string(), None),
        };
        let route = leads_to.map(|to| self.route(rules, to));
        let (route, no_route) = match route {
            None => (None, None),
            Some(Ok(route)) => (Some(route), None),
            Some(Err(error)) => (None, Some(error.to_string())),
        };
        Way { address: ip, meaning, because, route, no_route, further: Vec::new() }
    }

    /// What egress rules and proxies make of it; they are about what goes to a port.
    async fn further(&self, way: &Way, asked: &Asked) -> Vec<Further> {
        let Some(port) = asked.port.filter(|_| matches!(way.meaning, Meaning::Outside | Meaning::Host))
        else {
            return Vec::new();
        };
        let name = match &asked.host {
            Host::Name(name) => Some(name.to_string()),
            Host::Address(_) => None,
        };
        let protocol = match asked.protocol {
            PublishedProtocol::Tcp => TargetProtocol::Tcp,
            PublishedProtocol::Udp => TargetProtocol::Udp,
        };
        self.proxy.explain(name.as_deref(), way.address, port, protocol).await
    }

    fn route(&self, rules: &Addresses, to: IpAddr) -> io::Result<Route> {
        let way = rules.way_out(to.into());
        let source = way.source.map(Address::ip);
        let found = self.netlink.borrow_mut().route_to(to, way.interface, source)?;
        Ok(Route {
            interface: found.interface,
            source: found.source,
            gateway: found.gateway,
            mtu: found.mtu,
            chosen: way.interface.is_some() || way.source.is_some(),
        })
    }
}

/// What hythe itself serves.
fn at_the_gateway(rules: &Addresses, asked: &Asked) -> String {
    match (asked.port, asked.protocol) {
        (None, _) => "hythe itself: it answers ping and resolves names".to_string(),
        (Some(DNS_PORT), _) => "hythe itself, which resolves names there".to_string(),
        (Some(API_PORT), PublishedProtocol::Tcp) if rules.guest_api => "hythe's API".to_string(),
        (Some(PROXY_PORT), PublishedProtocol::Tcp) => "hythe's proxy".to_string(),
        (Some(port), protocol) => format!("hythe itself, where nothing serves port {port}/{protocol}"),
    }
}
