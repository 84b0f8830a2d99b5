//! Addresses that the guest is not told, because it could do nothing with them.

use std::cell::Cell;
use std::net::{Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::time::Duration;

use hickory_proto::op;
use hickory_proto::rr::RecordType;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::time::Instant;

use super::message;
use crate::host::tcp;
use crate::policy::names::AddressFilter;
use crate::policy::outbound::WayOut;

/// Where global unicast addresses begin (RFC 4291, 2.4): what the host would need a route to.
const INTERNET: Ipv6Addr = Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 1);
/// How long the kernel's word about that counts.
const LOOK: Duration = Duration::from_secs(1);

/// What is not told.
pub(super) struct Filter {
    wanted: AddressFilter,
    /// Whether the host has a route, and when that was asked.
    has_route: Cell<Option<(bool, Instant)>>,
}

impl Filter {
    /// What the user wants.
    pub fn new(wanted: AddressFilter) -> Self {
        Self { wanted, has_route: Cell::new(None) }
    }

    /// Whether a question is for what is not told; `way` is by which way the host would send to an address.
    pub fn drops(&self, question: &op::Query, way: impl FnOnce(SocketAddr) -> WayOut) -> bool {
        if !message::is_internet(question.query_class()) {
            return false;
        }
        match (self.wanted, question.query_type()) {
            (AddressFilter::Ipv4, RecordType::A) | (AddressFilter::Ipv6, RecordType::AAAA) => true,
            (AddressFilter::Auto, RecordType::AAAA) => !self.has_route(way),
            _ => false,
        }
    }

    fn has_route(&self, way: impl FnOnce(SocketAddr) -> WayOut) -> bool {
        let now = Instant::now();
        if let Some((has_route, at)) = self.has_route.get()
            && now - at < LOOK
        {
            return has_route;
        }
        // Connecting a datagram socket looks for a route, and sends nothing.
        let internet = SocketAddr::from((INTERNET, 9));
        let socket = Socket::new(Domain::IPV6, Type::DGRAM.nonblocking(), Some(Protocol::UDP));
        let has_route = socket
            .and_then(|socket| {
                tcp::choose_way(socket.as_raw_fd(), false, &way(internet), None)?;
                socket.connect(&internet.into())
            })
            .is_ok();
        self.has_route.set(Some((has_route, now)));
        has_route
    }
}
