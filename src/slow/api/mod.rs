//! The control API: HTTP/1.1 and JSON, one router for all doors.
//!
//! ```text
//! control socket ────────┐
//!                        ├──▶ [connection] ──▶ [router] ──▶ the table of ports
//! the gateway's port 80 ─┘                 └──▶ [forwarder], the same in gvproxy's words
//! ```
//! The host's programs and the guest come by doors of their own. A door has a number of seats; who finds none is told so (503) and sent away. A connection costs a bounded amount of memory, whatever
//! it sends: a head of 64 KiB, a body of 64 KiB, and a list of ports is written as fast as it is read ([`list`]). A
//! client that stops in the middle of a request, or of reading its answer, has ten seconds ([`connection`]).
//!
//! Who calls is known by the door ([`Caller`]): the guest sees and removes what it has published itself, within the bounds that
//! the host's user has set; the host's user sees and removes everything. A caller may have ports for as long as it reads the
//! answer ([`held`]), so that what a container has published goes with the container.
//! What is said is in [`crate::control::shapes`] and docs/openapi.json.

mod connection;
mod explain;
mod following;
mod forwarder;
mod held;
mod list;
mod presence;
mod problem;
mod proxies;
mod records;
mod router;
#[cfg(test)]
mod tests;

use std::io;
use std::net::IpAddr;
use std::os::unix::net::UnixListener;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio::task::spawn_local;

use super::dns::Dns;
use super::events::Events;
use super::ports::Publishing;
use super::ports::table::Publisher;
use super::proxy::Proxy;
use super::shared_stream::SharedStream;
use crate::host::engine::EngineKind;
use crate::policy::guest_api::GuestApi;
pub use explain::Explainer;
use presence::Presence;
use router::Router;

/// The system calls made here, besides those of the runtime and its streams.
pub const SYSTEM_CALLS: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_getsockopt,
    libc::SYS_recvfrom,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_sendto,
    libc::SYS_shutdown,
];

/// Callers that are sent away with a word at a time.
const WAY_OUT: usize = 64;

/// How long no client is taken when there is no descriptor for it.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What `/v1/status` tells that does not change.
#[derive(Clone, Debug)]
pub struct About {
    /// The name that tells it apart.
    pub name: String,
    /// The engine that runs.
    pub engine: EngineKind,
    /// Worker threads.
    pub workers: usize,
    /// The guest's addresses.
    pub guest: Vec<IpAddr>,
    /// The gateway's addresses.
    pub gateway: Vec<IpAddr>,
}

/// The door by which the host's programs come.
pub struct Door {
    /// The control socket; it does not block.
    pub listener: UnixListener,
    /// The user whose processes may call, besides root's.
    pub user: u32,
}

/// How callers are answered.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What is told of this hythe.
    pub about: About,
    /// What the guest may ask.
    pub guest: GuestApi,
    /// Connections of the host's programs at a time.
    pub connections: usize,
    /// Connections of the guest at a time.
    pub guest_connections: usize,
}

/// Who calls.
#[derive(Clone)]
pub struct Caller {
    /// Whose ports it sees.
    publisher: Publisher,
    /// Its address, if it is the guest.
    address: Option<IpAddr>,
    /// Whether it is still there.
    presence: Presence,
}

/// Answers callers.
pub struct Api {
    router: Rc<Router>,
    host: Seats,
    guest: Seats,
}

/// How many may come by a door.
struct Seats {
    seats: Arc<Semaphore>,
    /// For those who are sent away.
    way_out: Arc<Semaphore>,
}

impl Seats {
    fn new(seats: usize) -> Self {
        Self { seats: Arc::new(Semaphore::new(seats)), way_out: Arc::new(Semaphore::new(WAY_OUT)) }
    }

    /// Tells a caller that there is no seat, unless very many are being told so.
    fn send_away(&self, stream: SharedStream) {
        let Ok(way_out) = self.way_out.clone().try_acquire_owned() else { return };
        spawn_local(async move {
            connection::send_away(&stream).await;
            drop(way_out);
        });
    }
}

impl Api {
    /// What answers callers about these ports.
    pub fn new(
        settings: Settings,
        publishing: Rc<Publishing>,
        events: Rc<Events>,
        dns: Dns,
        proxy: Proxy,
        explainer: Explainer,
    ) -> Self {
        let Settings { about, guest, connections, guest_connections } = settings;
        Self {
            router: Rc::new(Router::new(publishing, events, dns, proxy, explainer, about, guest)),
            host: Seats::new(connections),
            guest: Seats::new(guest_connections),
        }
    }

    /// Answers the host's programs for ever.
    pub async fn serve_host(&self, door: Door) -> io::Result<()> {
        let Door { listener, user } = door;
        let listener = tokio::net::UnixListener::from_std(listener)?;
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::debug!(%error, "a caller of the control socket is not taken");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            if may_call(&stream, user) {
                self.serve(stream, &self.host, Publisher::Host, None);
            } else {
                tracing::warn!("another user's process has called the control socket");
            }
        }
    }

    /// Answers the guest, which calls from `address`, on a stream.
    pub fn serve_guest(&self, stream: UnixStream, address: IpAddr) {
        self.serve(stream, &self.guest, Publisher::Guest, Some(address));
    }

    fn serve(&self, stream: UnixStream, door: &Seats, publisher: Publisher, address: Option<IpAddr>) {
        let stream = SharedStream::new(stream);
        let Ok(seat) = door.seats.clone().try_acquire_owned() else { return door.send_away(stream) };
        let caller = Caller { publisher, address, presence: Presence::of(stream.clone()) };
        let router = self.router.clone();
        spawn_local(async move {
            connection::serve(stream, router, caller).await;
            drop(seat);
        });
    }
}

/// The socket's permissions say it already; a descriptor that somebody else was given says it not.
fn may_call(stream: &UnixStream, user: u32) -> bool {
    stream.peer_cred().is_ok_and(|peer| [0, user].contains(&peer.uid()))
}
