//! Which route the kernel would take.

use std::io;
use std::net::IpAddr;

use netlink_packet_core::NLM_F_ACK;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteMetric};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::Netlink;

/// The route that the kernel takes to a destination.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct FoundRoute {
    /// The interface's name.
    pub interface: String,
    /// The source address.
    pub source: Option<IpAddr>,
    /// The next router.
    pub gateway: Option<IpAddr>,
    /// The largest packet: the path's where that is known, the route's, or the interface's.
    pub mtu: u32,
}

impl Netlink {
    /// The route to a destination, as a socket with this interface and source would find it.
    pub fn route_to(
        &mut self,
        destination: IpAddr,
        interface: Option<u32>,
        source: Option<IpAddr>,
    ) -> io::Result<FoundRoute> {
        let mut message = RouteMessage::default();
        let (family, bits) =
            if destination.is_ipv4() { (AddressFamily::Inet, 32) } else { (AddressFamily::Inet6, 128) };
        message.header.address_family = family;
        message.header.destination_prefix_length = bits;
        message.attributes.push(RouteAttribute::Destination(RouteAddress::from(destination)));
        if let Some(source) = source {
            message.header.source_prefix_length = bits;
            message.attributes.push(RouteAttribute::Source(RouteAddress::from(source)));
        }
        message.attributes.extend(interface.map(RouteAttribute::Oif));
        let mut answers = Vec::new();
        self.request(RouteNetlinkMessage::GetRoute(message), NLM_F_ACK, |answer| answers.push(answer))?;
        let route = answers.into_iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewRoute(route) => Some(route),
            _ => None,
        });
        let route = route.ok_or_else(|| io::Error::from(io::ErrorKind::NetworkUnreachable))?;
        let mut found = FoundRoute { source, ..FoundRoute::default() };
        let mut index = None;
        for attribute in route.attributes {
            match attribute {
                RouteAttribute::Oif(oif) => index = Some(oif),
                RouteAttribute::PrefSource(address) => found.source = ip(&address).or(found.source),
                RouteAttribute::Gateway(address) => found.gateway = ip(&address),
                RouteAttribute::Metrics(metrics) => {
                    let mtu = metrics.iter().find_map(|metric| match metric {
                        RouteMetric::Mtu(mtu) => Some(*mtu),
                        _ => None,
                    });
                    found.mtu = mtu.unwrap_or(0);
                }
                _ => {}
            }
        }
        let (name, mtu) = self.link(index.unwrap_or(0))?;
        found.interface = name;
        // A route without one has the interface's.
        found.mtu = if found.mtu == 0 { mtu } else { found.mtu };
        Ok(found)
    }

    /// An interface's name and MTU.
    fn link(&mut self, index: u32) -> io::Result<(String, u32)> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        let (mut name, mut mtu) = (String::new(), 0);
        self.request(RouteNetlinkMessage::GetLink(message), NLM_F_ACK, |answer| {
            let RouteNetlinkMessage::NewLink(link) = answer else { return };
            for attribute in link.attributes {
                match attribute {
                    LinkAttribute::IfName(text) => name = text,
                    LinkAttribute::Mtu(bytes) => mtu = bytes,
                    _ => {}
                }
            }
        })?;
        Ok((name, mtu))
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_is_reached_by_itself() {
        let mut netlink = Netlink::open().unwrap();
        let loopback: IpAddr = "127.0.0.1".parse().unwrap();
        let found = netlink.route_to(loopback, None, None).unwrap();
        assert_eq!((found.interface.as_str(), found.source), ("lo", Some(loopback)));
        assert!(found.mtu > 1500 && found.gateway.is_none());
        // An interface that there is not.
        assert!(netlink.route_to("192.0.2.1".parse().unwrap(), Some(0x7fff_fff0), None).is_err());
        assert!(netlink.route_to(loopback, None, None).is_ok(), "an error leaves nothing behind");
    }
}
