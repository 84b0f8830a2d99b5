//! UDP: each client has a socket of its own towards the container, as long as something goes over it.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use socket2::SockRef;
use tokio::net::UdpSocket;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval};

/// Clients at a time; for one more, the one that was silent for longest goes.
const CLIENTS_MAX: usize = 1024;
/// How long a client may be silent: as long as the real docker-proxy has patience.
const IDLE: Duration = Duration::from_secs(90);
/// The longest datagram.
const DATAGRAM_MAX: usize = 64 << 10;

struct Client {
    socket: Arc<UdpSocket>,
    /// Milliseconds after the start at which something went over it.
    used_ms: Arc<AtomicU64>,
    answers: JoinHandle<()>,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.answers.abort();
    }
}

/// Serves until it is dropped.
pub async fn serve(socket: Arc<UdpSocket>, container: SocketAddr) {
    let start = Instant::now();
    let mut clients: HashMap<SocketAddr, Client> = HashMap::new();
    let mut datagram = vec![0; DATAGRAM_MAX];
    let mut sweep = interval(IDLE / 3);
    sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let received = tokio::select! {
            received = socket.recv_from(&mut datagram) => received,
            _ = sweep.tick(), if !clients.is_empty() => {
                let now = elapsed_ms(start);
                clients.retain(|_, client| now < client.used_ms.load(Ordering::Relaxed) + IDLE.as_millis() as u64);
                continue;
            }
        };
        // An error is one of an answer that could not be delivered.
        let Ok((length, peer)) = received else { continue };
        if !clients.contains_key(&peer) {
            make_room(&mut clients);
            // Without a descriptor the datagram is lost, as datagrams may be.
            let Ok(client) = Client::new(&socket, peer, container, start).await else { continue };
            clients.insert(peer, client);
        }
        if let Some(client) = clients.get(&peer) {
            client.used_ms.store(elapsed_ms(start), Ordering::Relaxed);
            // A full queue loses datagrams, as queues do.
            let _ = SockRef::from(&*client.socket).send(&datagram[..length]);
        }
    }
}

fn elapsed_ms(start: Instant) -> u64 {
    start.elapsed().as_millis() as u64
}

fn make_room(clients: &mut HashMap<SocketAddr, Client>) {
    if clients.len() >= CLIENTS_MAX {
        let last_use = |client: &Client| client.used_ms.load(Ordering::Relaxed);
        let oldest = clients.iter().min_by_key(|(_, client)| last_use(client)).map(|(peer, _)| *peer);
        oldest.map(|peer| clients.remove(&peer));
    }
}

impl Client {
    async fn new(
        listener: &Arc<UdpSocket>,
        peer: SocketAddr,
        container: SocketAddr,
        start: Instant,
    ) -> io::Result<Self> {
        let any: SocketAddr =
            if container.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" }.parse().map_err(io::Error::other)?;
        let socket = Arc::new(UdpSocket::bind(any).await?);
        socket.connect(container).await?;
        let used_ms = Arc::new(AtomicU64::new(elapsed_ms(start)));
        let answers = answer(Arc::clone(&socket), Arc::clone(listener), peer, Arc::clone(&used_ms), start);
        Ok(Self { socket, used_ms, answers: tokio::spawn(answers) })
    }
}

/// Brings the container's answers to a client.
async fn answer(
    from: Arc<UdpSocket>,
    to: Arc<UdpSocket>,
    peer: SocketAddr,
    used_ms: Arc<AtomicU64>,
    start: Instant,
) {
    while from.readable().await.is_ok() {
        // An error is the container's refusal of what was sent, and has been taken now.
        if pass_on(&from, &to, peer).is_ok() {
            used_ms.store(elapsed_ms(start), Ordering::Relaxed);
        }
        tokio::task::yield_now().await;
    }
}

/// Waits for nothing, so that a client who waits has no memory for a datagram.
fn pass_on(from: &UdpSocket, to: &UdpSocket, peer: SocketAddr) -> io::Result<usize> {
    let mut datagram = Vec::with_capacity(DATAGRAM_MAX);
    from.try_recv_buf(&mut datagram)?;
    SockRef::from(to).send_to(&datagram, &peer.into())
}
