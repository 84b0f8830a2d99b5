//! One exchange with one resolver of the host.
//!
//! RFC 5452, 9.2: every query has an unpredictable message ID and goes out of a socket of its own, from a port that
//! the kernel draws at random, connected, so that only datagrams of the resolver's address and port come in. A message
//! that does not answer the question is passed over, and the wait goes on: a forger who guesses wrong gains nothing.

use std::cell::RefCell;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;

use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};
use rand::rngs::{StdRng, SysRng};
use rand::{RngExt, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{TcpStream, UdpSocket};

use super::message::{MESSAGE_MAX, Query};
use super::{DnsError, Transport};
use crate::observe::counters::{Counters, Metric};

/// What exchanges share.
pub(super) struct Upstream {
    ids: RefCell<StdRng>,
    /// Where datagrams land before their length is known: one for all, since none stays there.
    landing: RefCell<Box<[u8]>>,
}

impl Upstream {
    /// Draws a seed from the kernel.
    pub fn new() -> Result<Self, DnsError> {
        let ids = StdRng::try_from_rng(&mut SysRng)
            .map_err(|error| DnsError::Random(io::Error::other(error.to_string())))?;
        Ok(Self { ids: RefCell::new(ids), landing: RefCell::new(vec![0; MESSAGE_MAX].into()) })
    }

    /// Asks one resolver, and waits for its answer for as long as the caller does. The answer bears the guest's ID.
    pub async fn ask(
        &self,
        server: SocketAddr,
        query: &Query<'_>,
        transport: Transport,
        counters: &Counters,
    ) -> io::Result<Vec<u8>> {
        let id = self.ids.borrow_mut().random();
        let reply = match transport {
            Transport::Udp(_) => self.ask_over_udp(server, query, id, counters).await?,
            Transport::Tcp => ask_over_tcp(server, query, id, counters).await?,
        };
        Ok(query.under_own_id(reply))
    }

    async fn ask_over_udp(
        &self,
        server: SocketAddr,
        query: &Query<'_>,
        id: u16,
        counters: &Counters,
    ) -> io::Result<Vec<u8>> {
        let socket = open_udp(server).await?;
        socket.send(&query.under_id(id)).await?;
        let receive = || {
            let mut landing = self.landing.borrow_mut();
            let len = recv(socket.as_raw_fd(), &mut landing, MsgFlags::empty())?;
            let reply = &landing[..len];
            Ok(query.is_answered_by(reply, id).then(|| reply.to_vec()))
        };
        loop {
            // An ICMP error makes a socket neither readable nor closed (udp_poll in the kernel): it must be waited for by
            // name, or a refused port would look like silence. The one call takes either.
            if let Some(reply) = socket.async_io(Interest::READABLE | Interest::ERROR, receive).await? {
                return Ok(reply);
            }
            counters.add(Metric::DnsMismatched, 1);
        }
    }
}

async fn open_udp(server: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).await?;
    // Without it the kernel keeps "host unreachable" to itself (ip(7), IP_RECVERR), and the query would sit its time
    // out. A refused port is told in any case, so a kernel without it costs only that time.
    let _ = match server {
        SocketAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4RecvErr, &true),
        SocketAddr::V6(_) => setsockopt(&socket, sockopt::Ipv6RecvErr, &true),
    };
    socket.connect(server).await?;
    Ok(socket)
}

/// RFC 7766: two bytes of length before each message, both sent at once (8).
async fn ask_over_tcp(
    server: SocketAddr,
    query: &Query<'_>,
    id: u16,
    counters: &Counters,
) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    let message = query.under_id(id);
    // A query is never longer than a message may be: its parser saw to that.
    let length = (message.len() as u16).to_be_bytes();
    stream.write_all(&[&length[..], &message].concat()).await?;
    loop {
        let length = stream.read_u16().await?;
        let mut reply = vec![0; length.into()];
        stream.read_exact(&mut reply).await?;
        if query.is_answered_by(&reply, id) {
            return Ok(reply);
        }
        counters.add(Metric::DnsMismatched, 1);
    }
}
