//! The kernel's routes, addresses and links, asked and set by rtnetlink in the calling thread's network namespace.
//!
//! Blocking, for setting up; a [`NetworkWatch`] follows what changes afterwards.

mod lookup;
mod watch;

use std::io;
use std::net::{IpAddr, Ipv6Addr};

use ipnet::{IpNet, Ipv6Net};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST,
    NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::frame::address::{Address, Mac};
pub use lookup::FoundRoute;
pub use watch::{NetworkWatch, News};

/// How often is asked for what changes while it is told.
const DUMPS_MAX: usize = 5;

/// A connection to the kernel's routing.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

/// A route of the host.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct HostRoute {
    /// The destinations; of length zero for a default route.
    pub destination: IpNet,
    /// The interface.
    pub interface: Option<u32>,
    /// The routing table.
    pub table: u32,
}

impl Netlink {
    /// Opens a connection.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Asks for all there is of a kind. What changes while it is told makes the kernel say so (`NLM_F_DUMP_INTR`): it is asked again.
    fn dump<T>(
        &mut self,
        message: &RouteNetlinkMessage,
        take: impl Fn(&RouteNetlinkMessage) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        for _ in 0..DUMPS_MAX {
            let mut found = Vec::new();
            let is_whole = self.request(message.clone(), NLM_F_DUMP, |answer| found.extend(take(&answer)))?;
            if is_whole {
                return Ok(found);
            }
        }
        Err(io::Error::from(io::ErrorKind::Interrupted))
    }

    /// Sends a request and gives every message of the answer to `take`. Returns whether nothing changed in between.
    fn request(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
        mut take: impl FnMut(RouteNetlinkMessage),
    ) -> io::Result<bool> {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut is_whole = true;
        loop {
            let (received, _) = self.socket.recv_from_full()?;
            let mut rest = received.as_slice();
            while let Some(length) = rest.first_chunk::<4>() {
                let length = u32::from_ne_bytes(*length) as usize;
                let message;
                (message, rest) = rest.split_at(length.next_multiple_of(4).clamp(4, rest.len()));
                // One that nobody understands yet is not what is looked for.
                let Ok(answer) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(message) else {
                    continue;
                };
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                is_whole &= answer.header.flags & NLM_F_DUMP_INTR == 0;
                match answer.payload {
                    NetlinkPayload::InnerMessage(message) => take(message),
                    NetlinkPayload::Done(_) => return Ok(is_whole),
                    NetlinkPayload::Error(error) => {
                        return match error.code {
                            None => Ok(is_whole),
                            Some(_) => Err(error.to_io()),
                        };
                    }
                    _ => {}
                }
            }
        }
    }

    /// All unicast routes of all tables but the local one.
    pub fn routes(&mut self) -> io::Result<Vec<HostRoute>> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            routes.extend(self.dump(&RouteNetlinkMessage::GetRoute(message), |answer| match answer {
                RouteNetlinkMessage::NewRoute(route) => host_route(route),
                _ => None,
            })?);
        }
        Ok(routes)
    }

    /// All addresses, each with its prefix.
    pub fn addresses(&mut self) -> io::Result<Vec<IpNet>> {
        self.dump(&RouteNetlinkMessage::GetAddress(AddressMessage::default()), |answer| match answer {
            RouteNetlinkMessage::NewAddress(message) => own_address(message),
            _ => None,
        })
    }

    /// Sets an interface's MAC, MTU and queue length, and brings it up.
    pub fn set_link(&mut self, index: u32, settings: &LinkSettings) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        if settings.up {
            message.header.flags = LinkFlags::Up;
            message.header.change_mask = LinkFlags::Up;
        }
        if let Some(mac) = settings.mac {
            message.attributes.push(LinkAttribute::Address(mac.0.to_vec()));
        }
        message.attributes.extend(settings.mtu.map(|mtu| LinkAttribute::Mtu(u32::from(mtu))));
        message.attributes.extend(settings.queue_len.map(LinkAttribute::TxQueueLen));
        self.request(RouteNetlinkMessage::SetLink(message), NLM_F_ACK, |_| {}).map(drop)
    }

    /// Gives an interface an address; without duplicate address detection.
    pub fn add_address(&mut self, index: u32, address: IpNet) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.index = index;
        message.header.prefix_len = address.prefix_len();
        message.header.scope = AddressScope::Universe;
        message.header.flags = AddressHeaderFlags::Nodad;
        message.attributes =
            vec![AddressAttribute::Address(address.addr()), AddressAttribute::Local(address.addr())];
        match address {
            IpNet::V4(net) => {
                message.header.family = AddressFamily::Inet;
                message.attributes.push(AddressAttribute::Broadcast(net.broadcast()));
            }
            IpNet::V6(_) => {
                message.header.family = AddressFamily::Inet6;
                message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
            }
        }
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        self.request(RouteNetlinkMessage::NewAddress(message), flags, |_| {}).map(drop)
    }

    /// Sets the default route of the gateway's family, unless the main table has one, whatever its metric. Returns
    /// whether it was set.
    pub fn add_default_route(&mut self, index: u32, gateway: IpAddr) -> io::Result<bool> {
        let has_one = self.routes()?.iter().any(|route| {
            route.table == u32::from(RouteHeader::RT_TABLE_MAIN)
                && route.destination.prefix_len() == 0
                && route.destination.addr().is_ipv4() == gateway.is_ipv4()
        });
        if has_one {
            return Ok(false);
        }
        let mut message = RouteMessage::default();
        message.header.address_family =
            if gateway.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Static;
        message.header.scope = RouteScope::Universe;
        message.header.kind = RouteType::Unicast;
        message.attributes =
            vec![RouteAttribute::Gateway(RouteAddress::from(gateway)), RouteAttribute::Oif(index)];
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        match self.request(RouteNetlinkMessage::NewRoute(message), flags, |_| {}) {
            // One came just now.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            done => done.map(|_| true),
        }
    }
}

/// What to set of an interface.
#[derive(Clone, Copy, Default, Debug)]
pub struct LinkSettings {
    /// Its MAC.
    pub mac: Option<Mac>,
    /// Its MTU.
    pub mtu: Option<u16>,
    /// Frames that its queue holds.
    pub queue_len: Option<u32>,
    /// Bring it up.
    pub up: bool,
}

fn host_route(route: &RouteMessage) -> Option<HostRoute> {
    if route.header.kind != RouteType::Unicast {
        return None;
    }
    let mut destination = None;
    let mut interface = None;
    let mut table = u32::from(route.header.table);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => destination = Some(IpAddr::V4(*ip)),
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => destination = Some(IpAddr::V6(*ip)),
            RouteAttribute::Oif(index) => interface = Some(*index),
            RouteAttribute::Table(number) => table = *number,
            _ => {}
        }
    }
    let v4 = route.header.address_family == AddressFamily::Inet;
    let unspecified: IpAddr =
        if v4 { std::net::Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let ip = destination.unwrap_or(unspecified);
    let destination = IpNet::new(ip, route.header.destination_prefix_length).ok()?;
    Some(HostRoute { destination, interface, table })
}

/// The host's own address that a message is about: of a link between two addresses, the near one.
fn own_address(message: &AddressMessage) -> Option<IpNet> {
    let own = |attribute: &AddressAttribute| match attribute {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    };
    let any = |attribute: &AddressAttribute| match attribute {
        AddressAttribute::Address(ip) => Some(*ip),
        _ => None,
    };
    let attributes = &message.attributes;
    let ip = attributes.iter().find_map(own).or_else(|| attributes.iter().find_map(any))?;
    IpNet::new(ip, message.header.prefix_len).ok()
}

/// The destination of a unicast route, of the family's length zero for a default route.
fn destination(route: &RouteMessage) -> Option<IpNet> {
    host_route(route).map(|route| route.destination)
}

/// The number of an interface of this name.
pub fn interface_index(name: &str) -> Option<u32> {
    nix::net::if_::if_nametoindex(name).ok()
}

/// What the host's network looks like, as far as the guest's addresses depend on it.
#[derive(Clone, Debug, Default)]
pub struct HostNetwork {
    /// Destinations of routes, those left out that are default routes or pieces of one.
    pub networks: Vec<IpNet>,
    /// These, in order.
    pub wide: Vec<HostRoute>,
    /// The host's own addresses, sorted.
    pub own: Vec<Address>,
    /// Whether there is a default route, for IPv4 and IPv6.
    pub has_default: [bool; 2],
    /// A /64 of the host that is globally reachable.
    pub global_prefix: Option<Ipv6Net>,
}

impl HostNetwork {
    /// Asks the kernel.
    pub fn read() -> io::Result<Self> {
        Self::ask(&mut Netlink::open()?)
    }

    fn ask(netlink: &mut Netlink) -> io::Result<Self> {
        let routes = netlink.routes()?;
        let addresses = netlink.addresses()?;
        let (mut wide, networks): (Vec<_>, Vec<_>) =
            routes.into_iter().partition(|route| is_wide(&route.destination));
        wide.sort_unstable();
        let networks = networks.iter().map(|route| route.destination).collect();
        let leads = |v4, net: &IpNet| net.addr().is_ipv4() == v4 && leads_out(net);
        let has_default = [true, false].map(|v4| wide.iter().any(|route| leads(v4, &route.destination)));
        let own = sorted(&addresses);
        let global = |net: &IpNet| match net {
            IpNet::V6(net) if GLOBAL.contains(&net.addr()) && net.prefix_len() <= 64 => {
                Ipv6Net::new(net.addr(), 64).ok().map(|net| net.trunc())
            }
            _ => None,
        };
        let global_prefix = addresses.iter().find_map(global).filter(|_| has_default[1]);
        Ok(Self { networks, wide, own, has_default, global_prefix })
    }

    /// The network of the host that covers, or lies in, `subnet`.
    pub fn overlap(&self, subnet: IpNet) -> Option<IpNet> {
        let overlaps = |net: &&IpNet| net.contains(&subnet.network()) || subnet.contains(&net.network());
        self.networks.iter().find(overlaps).copied()
    }
}

fn sorted(addresses: &[IpNet]) -> Vec<Address> {
    let mut own: Vec<Address> = addresses.iter().map(|net| net.addr().into()).collect();
    own.sort_unstable();
    own.dedup();
    own
}

/// RFC 4291, 2.4 and RFC 3587: global unicast is assigned from here.
const GLOBAL: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3);

/// Wider than any network: a default route, or a piece of one, as VPNs set them (0.0.0.0/1 and 128.0.0.0/1) to take
/// precedence over another without removing it. The widest that counts as a network is a class A, or a /16 of IPv6.
fn is_wide(net: &IpNet) -> bool {
    net.prefix_len() < if net.addr().is_ipv4() { 8 } else { 16 }
}

/// Whether a wide route is for the world's addresses, not for private ones only (fc00::/7).
fn leads_out(net: &IpNet) -> bool {
    match net {
        IpNet::V4(_) => true,
        IpNet::V6(net) => net.contains(&GLOBAL) || GLOBAL.contains(net),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_address_is_among_the_hosts_own() {
        let network = HostNetwork::read().unwrap();
        let loopback: Address = std::net::Ipv4Addr::LOCALHOST.into();
        assert!(network.own.binary_search(&loopback).is_ok(), "{network:?}");
    }

    #[test]
    fn an_overlap_is_found_in_either_direction() {
        let network =
            HostNetwork { networks: vec!["192.168.0.0/16".parse().unwrap()], ..HostNetwork::default() };
        assert!(network.overlap("192.168.65.0/24".parse().unwrap()).is_some());
        assert!(network.overlap("192.0.0.0/8".parse().unwrap()).is_some());
        assert!(network.overlap("10.0.0.0/24".parse().unwrap()).is_none());
    }

    #[test]
    fn a_default_route_in_pieces_is_a_default_route() {
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        for (piece, out) in [
            ("0.0.0.0/0", true),
            ("0.0.0.0/1", true),
            ("128.0.0.0/1", true),
            ("::/0", true),
            ("::/1", true),
            ("2000::/3", true),
            ("2000::/4", true),
            ("8000::/1", false),
            ("fc00::/7", false),
        ] {
            assert!(is_wide(&net(piece)), "{piece}");
            assert_eq!(leads_out(&net(piece)), out, "{piece}");
        }
        for network in ["10.0.0.0/8", "192.168.0.0/16", "fd00:1::/32", "2001::/16"] {
            assert!(!is_wide(&net(network)), "{network}");
        }
    }
}
