//! Word of the kernel's about what changes in the host's network.
//!
//! The kernel sends a message a change. Messages are taken all at once and told together ([`News`]): a storm of changes
//! costs what its messages cost to read, and one look at what there is afterwards. Where the kernel's buffer was too small
//! (`ENOBUFS`) something was lost, and everything may have changed.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use ipnet::IpNet;
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkFlags;
use netlink_packet_route::route::RouteMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::{HostNetwork, Netlink, destination, is_wide, own_address, sorted};
use crate::frame::address::Address;

/// Links; addresses, routes and rules of IPv4 (rtnetlink(7), `RTMGRP_*`); addresses and routes of IPv6.
const GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400;
/// `RTNLGRP_IPV6_RULE`, which has no bit among those.
const IPV6_RULE: u32 = 19;

/// The longest run of messages that the kernel sends at once, in bytes.
const ROOM: usize = 1 << 16;

/// Room for messages that are not taken yet.
const BUFFER_BYTES: u32 = 1 << 20;

/// Runs of messages that are taken at once.
const RUNS_MAX: usize = 1024;

/// Routes that came or went, and addresses that went, that are told one by one.
const ROUTES_MAX: usize = 64;
const REMOVED_MAX: usize = 64;

/// What has changed since the last look.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct News {
    /// Messages about addresses.
    pub addresses: u32,
    /// Addresses that went, as far as there is room. They may have come back, and may have come after the last look.
    pub removed: Vec<Address>,
    /// Messages about links.
    pub links: u32,
    /// A link is gone or does not run any more. Its routes of IPv4 go without a message.
    pub link_lost: bool,
    /// Messages about routes.
    pub routes: u32,
    /// Messages about rules.
    pub rules: u32,
    /// A default route, or a piece of one, was among the routes.
    pub default_route: bool,
    /// Networks to which there are new routes. Where there is no room for all, [`Self::lost`] says so.
    pub new_routes: Vec<IpNet>,
    /// Networks to which a route has gone, likewise.
    pub old_routes: Vec<IpNet>,
    /// Some messages were lost: anything may have changed.
    pub lost: bool,
}

impl News {
    fn take(&mut self, message: &RouteNetlinkMessage) {
        match message {
            RouteNetlinkMessage::NewAddress(_) => self.addresses += 1,
            RouteNetlinkMessage::DelAddress(address) => {
                self.addresses += 1;
                if self.removed.len() < REMOVED_MAX {
                    self.removed.extend(own_address(address).map(|net| Address::from(net.addr())));
                }
            }
            RouteNetlinkMessage::NewLink(link) => {
                self.links += 1;
                self.link_lost |= !link.header.flags.contains(LinkFlags::Running);
            }
            RouteNetlinkMessage::DelLink(_) => {
                self.links += 1;
                self.link_lost = true;
            }
            RouteNetlinkMessage::NewRule(_) | RouteNetlinkMessage::DelRule(_) => self.rules += 1,
            RouteNetlinkMessage::NewRoute(route) => self.route(route, true),
            RouteNetlinkMessage::DelRoute(route) => self.route(route, false),
            _ => {}
        }
    }

    fn route(&mut self, route: &RouteMessage, is_new: bool) {
        let Some(destination) = destination(route) else { return };
        self.routes += 1;
        let told = if is_new { &mut self.new_routes } else { &mut self.old_routes };
        if is_wide(&destination) {
            self.default_route = true;
        } else if told.len() < ROUTES_MAX {
            told.push(destination);
        } else {
            self.lost = true;
        }
    }
}

/// A watch of the host's network.
pub struct NetworkWatch {
    changes: Socket,
    netlink: Netlink,
}

impl NetworkWatch {
    /// Begins to listen.
    pub fn open() -> io::Result<Self> {
        let mut changes = Socket::new(NETLINK_ROUTE)?;
        changes.bind(&SocketAddr::new(0, GROUPS))?;
        changes.add_membership(IPV6_RULE)?;
        // As far as the kernel lets it (net.core.rmem_max).
        let _ = changes.set_rx_buf_sz(BUFFER_BYTES);
        changes.set_non_blocking(true)?;
        Ok(Self { changes, netlink: Netlink::open()? })
    }

    /// All word that has come so far.
    pub fn news(&mut self) -> io::Result<News> {
        let mut news = News::default();
        let mut room = Vec::with_capacity(ROOM);
        for _ in 0..RUNS_MAX {
            room.clear();
            match self.changes.recv(&mut room, 0) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(news),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    news.lost = true;
                    continue;
                }
                Err(error) => return Err(error),
            }
            let mut rest = room.as_slice();
            while !rest.is_empty() {
                let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest) else {
                    // One of a kind that nobody knows yet.
                    news.lost = true;
                    break;
                };
                let len = (message.header.length as usize).next_multiple_of(4).clamp(4, rest.len());
                rest = &rest[len..];
                if let NetlinkPayload::InnerMessage(message) = &message.payload {
                    news.take(message);
                }
            }
        }
        // They come faster than they are taken: enough of it, and everything is looked at.
        news.lost = true;
        Ok(news)
    }

    /// The host's own addresses as they are now, sorted.
    pub fn addresses(&mut self) -> io::Result<Vec<Address>> {
        self.netlink.addresses().map(|addresses| sorted(&addresses))
    }

    /// Everything as it is now. It takes longer the more routes there are.
    pub fn network(&mut self) -> io::Result<HostNetwork> {
        HostNetwork::ask(&mut self.netlink)
    }
}

impl AsRawFd for NetworkWatch {
    fn as_raw_fd(&self) -> RawFd {
        self.changes.as_raw_fd()
    }
}
