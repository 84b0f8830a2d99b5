//! One exchange with one resolver of the host.
//!
//! RFC 5452, 9.2: every query has an unpredictable message ID and goes out of a connected socket at a port that the kernel
//! draws at random, so that only datagrams of the resolver's address and port come in. A message that does not answer the
//! question is passed over, and the wait goes on: a forger who guesses wrong gains nothing.
//!
//! Opening and closing a socket costs more than asking by it. So while queries crowd, one whose answer has come hands its socket
//! to the next one to the same resolver: a few times, for a second at the most, and not one at which somebody has guessed. A query
//! that is alone has a socket of its own.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv, send, setsockopt, sockopt};
use rand::rngs::{StdRng, SysRng};
use rand::{RngExt, SeedableRng};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{TcpSocket, UdpSocket};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use super::message::{MESSAGE_MAX, Query};
use super::{DnsError, Transport};
use crate::host::tcp;
use crate::observe::counters::{Counters, Metric};
use crate::policy::addresses::Addresses;
use crate::policy::outbound::WayOut;

/// How many queries a socket serves, one after the other, and for how long.
const USES_MAX: u8 = 16;
const AGE_MAX: Duration = Duration::from_secs(1);
/// Sockets of one resolver that wait for the next query.
const SPARE_MAX: usize = 64;

/// What exchanges share.
pub(super) struct Upstream {
    ids: RefCell<StdRng>,
    /// Datagram exchanges under way.
    under_way: Cell<usize>,
    /// Sockets whose query has been answered, by the resolver they are connected to.
    spare: RefCell<HashMap<SocketAddr, Vec<Line>>>,
    /// There are such sockets.
    kept: Notify,
    /// Where datagrams land before their length is known: one for all, since none stays there.
    landing: RefCell<Box<[u8]>>,
    /// Which of the host's sides a resolver is on.
    addresses: RefCell<Option<Arc<Addresses>>>,
}

/// A connected socket, and what it has served.
struct Line {
    socket: UdpSocket,
    opened: Instant,
    uses: u8,
}

impl Line {
    /// Whether nothing came since its last answer. What came is no answer to the next query: somebody guesses, or the network
    /// has changed.
    fn is_quiet(&self) -> bool {
        matches!(recv(self.socket.as_raw_fd(), &mut [0], MsgFlags::MSG_DONTWAIT), Err(nix::Error::EAGAIN))
    }
}

/// An exchange under way.
struct UnderWay<'u>(&'u Upstream);

impl<'u> UnderWay<'u> {
    fn new(upstream: &'u Upstream) -> Self {
        upstream.under_way.set(upstream.under_way.get() + 1);
        Self(upstream)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.under_way.set(self.0.under_way.get() - 1);
    }
}

impl Upstream {
    /// Draws a seed from the kernel.
    pub fn new() -> Result<Self, DnsError> {
        let ids = StdRng::try_from_rng(&mut SysRng)
            .map_err(|error| DnsError::Random(io::Error::other(error.to_string())))?;
        Ok(Self {
            ids: RefCell::new(ids),
            under_way: Cell::new(0),
            spare: RefCell::default(),
            kept: Notify::new(),
            landing: RefCell::new(vec![0; MESSAGE_MAX].into()),
            addresses: RefCell::default(),
        })
    }

    /// The addresses of the host, and the way out of it, are these now.
    pub fn learn(&self, addresses: Arc<Addresses>) {
        self.addresses.replace(Some(addresses));
    }

    /// The way to a resolver.
    pub fn way_to(&self, server: SocketAddr) -> WayOut {
        let addresses = self.addresses.borrow();
        addresses.as_ref().map(|addresses| addresses.way_out(server.ip().into())).unwrap_or_default()
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
            Transport::Tcp => ask_over_tcp(server, self.way_to(server), query, id, counters).await?,
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
        let _under_way = UnderWay::new(self);
        let mut line = match self.take_spare(server) {
            Some(line) => line,
            None => Line { socket: open_udp(server, self.way_to(server))?, opened: Instant::now(), uses: 0 },
        };
        line.uses += 1;
        let message = query.under_id(id);
        match send(line.socket.as_raw_fd(), &message, MsgFlags::MSG_DONTWAIT) {
            Ok(_) => {}
            Err(nix::Error::EAGAIN) => drop(line.socket.send(&message).await?),
            Err(error) => return Err(error.into()),
        }
        let receive = || {
            let mut landing = self.landing.borrow_mut();
            let len = recv(line.socket.as_raw_fd(), &mut landing, MsgFlags::empty())?;
            let reply = &landing[..len];
            Ok(query.is_answered_by(reply, id).then(|| reply.to_vec()))
        };
        loop {
            // An ICMP error makes a socket neither readable nor closed (udp_poll in the kernel): it must be waited for by
            // name, or a refused port would look like silence. The one call takes either.
            if let Some(reply) = line.socket.async_io(Interest::READABLE | Interest::ERROR, receive).await? {
                self.keep_spare(server, line);
                return Ok(reply);
            }
            line.uses = USES_MAX;
            counters.add(Metric::DnsMismatched, 1);
        }
    }

    fn take_spare(&self, server: SocketAddr) -> Option<Line> {
        let mut spare = self.spare.borrow_mut();
        let lines = spare.get_mut(&server)?;
        std::iter::from_fn(|| lines.pop()).find(|line| line.opened.elapsed() < AGE_MAX && line.is_quiet())
    }

    fn keep_spare(&self, server: SocketAddr, line: Line) {
        if line.uses >= USES_MAX || self.under_way.get() < 2 {
            return;
        }
        let mut spare = self.spare.borrow_mut();
        let lines = spare.entry(server).or_default();
        if lines.len() < SPARE_MAX {
            lines.push(line);
            self.kept.notify_one();
        }
    }

    /// Closes sockets that nobody took. Runs for ever, and only while there are any.
    pub async fn close_spare(&self) {
        loop {
            self.kept.notified().await;
            while !self.spare.borrow().is_empty() {
                sleep(AGE_MAX).await;
                self.close_old();
            }
        }
    }

    /// The way to a resolver may be another now: what is connected keeps the source address that it has.
    pub fn close_all_spare(&self) {
        self.spare.borrow_mut().clear();
    }

    fn close_old(&self) {
        self.spare.borrow_mut().retain(|_, lines| {
            lines.retain(|line| line.opened.elapsed() < AGE_MAX);
            !lines.is_empty()
        });
    }
}

/// A socket at a port that the kernel draws when it connects.
fn open_udp(server: SocketAddr, way: WayOut) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(server), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    // Without it the kernel keeps "host unreachable" to itself (ip(7), IP_RECVERR), and the query would sit its time
    // out. A refused port is told in any case, so a kernel without it costs only that time.
    let _ = match server {
        SocketAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4RecvErr, &true),
        SocketAddr::V6(_) => setsockopt(&socket, sockopt::Ipv6RecvErr, &true),
    };
    tcp::choose_way(socket.as_raw_fd(), server.is_ipv4(), &way, None)?;
    socket.connect(&server.into())?;
    UdpSocket::from_std(socket.into())
}

/// RFC 7766: two bytes of length before each message, both sent at once (8).
async fn ask_over_tcp(
    server: SocketAddr,
    way: WayOut,
    query: &Query<'_>,
    id: u16,
    counters: &Counters,
) -> io::Result<Vec<u8>> {
    let socket = if server.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    tcp::choose_way(socket.as_raw_fd(), server.is_ipv4(), &way, None)?;
    let mut stream = socket.connect(server).await?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::address::Endpoint;
    use crate::slow::dns::fake_server::{addresses, query, reply_to};
    use hickory_proto::rr::RecordType;
    use std::collections::HashSet;

    /// Asks so often, so many at a time; returns the ports that the resolver has seen.
    async fn ports(upstream: &Upstream, rounds: usize, at_a_time: usize, forged: bool) -> Vec<u16> {
        let server = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = server.local_addr().unwrap();
        let asked = query("example.com.", RecordType::A, 1);
        let asked = Query::parse(&asked).unwrap();
        let transport = Transport::Udp(Endpoint::new(addresses().v4.unwrap().guest, 4000));
        let counters = Counters::default();
        let mut ports = Vec::new();
        let serve = async {
            let mut bytes = [0; 512];
            loop {
                let (len, from) = server.recv_from(&mut bytes).await.unwrap();
                ports.push(from.port());
                if forged {
                    server.send_to(&[0; 20], from).await.unwrap();
                }
                server.send_to(&reply_to(&bytes[..len]), from).await.unwrap();
            }
        };
        let ask = async {
            // One that stays, so that others are never the last.
            let silent = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let stays = upstream.ask(silent.local_addr().unwrap(), &asked, transport, &counters);
            let rounds = async {
                for _ in 0..rounds {
                    let mut race = super::super::race::Race::default();
                    (0..at_a_time)
                        .for_each(|_| race.push(upstream.ask(address, &asked, transport, &counters)));
                    while !race.is_empty() {
                        race.next().await.unwrap();
                    }
                }
            };
            if at_a_time > 1 {
                tokio::select! { biased; _ = stays => panic!("an answer of nobody"), () = rounds => {} }
            } else {
                rounds.await;
            }
        };
        tokio::select! { () = ask => {}, () = serve => {} }
        ports
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_query_alone_has_a_port_of_its_own_and_leaves_none_behind() {
        let upstream = Upstream::new().unwrap();
        let seen = ports(&upstream, 20, 1, false).await;
        assert!(seen.iter().collect::<HashSet<_>>().len() >= 19, "{seen:?}");
        assert!(upstream.spare.borrow().is_empty());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn crowding_queries_hand_sockets_on_a_few_times() {
        let upstream = Upstream::new().unwrap();
        let seen = ports(&upstream, 64, 8, false).await;
        assert_eq!(seen.len(), 512);
        let ports: HashSet<_> = seen.iter().copied().collect();
        assert!((32..=64).contains(&ports.len()), "{} ports", ports.len());
        for port in ports {
            assert!(seen.iter().filter(|seen| **seen == port).count() <= usize::from(USES_MAX));
        }
        assert!(!upstream.spare.borrow().is_empty());
        tokio::time::pause();
        let closed = async {
            while !upstream.spare.borrow().is_empty() {
                sleep(AGE_MAX / 10).await;
            }
        };
        tokio::select! { () = upstream.close_spare() => {}, () = closed => {} }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_socket_at_which_somebody_has_guessed_is_not_handed_on() {
        let upstream = Upstream::new().unwrap();
        let seen = ports(&upstream, 10, 8, true).await;
        assert!(seen.iter().collect::<HashSet<_>>().len() >= 76, "{seen:?}");
    }
}
