//! TCP: each end of a conversation ends by itself, and a reset is one on both sides.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// Conversations at a time; who comes after waits. Each has two buffers.
const CONVERSATIONS_MAX: usize = 1024;
const BUFFER_BYTES: usize = 16 << 10;
/// How long the container may take to answer: it is on this machine.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);
/// A client or a server that is gone is noticed, as it is by the real docker-proxy.
const PROBE_EVERY: Duration = Duration::from_secs(15);
/// How long nobody is taken when there is no descriptor.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves until it is dropped. Conversations that have begun go on.
pub async fn serve(listener: TcpListener, container: SocketAddr) {
    let seats = Arc::new(Semaphore::new(CONVERSATIONS_MAX));
    loop {
        let Ok(seat) = Arc::clone(&seats).acquire_owned().await else { return };
        let Ok((client, _)) = listener.accept().await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        tokio::spawn(async move {
            let mut client = client;
            if converse(&mut client, container).await.is_err() {
                reset(&client);
            }
            drop(seat);
        });
    }
}

async fn converse(client: &mut TcpStream, container: SocketAddr) -> io::Result<()> {
    let connected = tokio::time::timeout(CONNECT_PATIENCE, TcpStream::connect(container)).await;
    let mut server = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
    for stream in [&*client, &server] {
        stream.set_nodelay(true)?;
        SockRef::from(stream)
            .set_tcp_keepalive(&TcpKeepalive::new().with_time(PROBE_EVERY).with_interval(PROBE_EVERY))?;
    }
    let copied = copy_bidirectional_with_sizes(client, &mut server, BUFFER_BYTES, BUFFER_BYTES).await;
    copied.map(|_| ()).inspect_err(|_| reset(&server))
}

/// The end of this connection is a reset.
fn reset(stream: &TcpStream) {
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}
