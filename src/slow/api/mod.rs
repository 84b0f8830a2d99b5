//! The control API: HTTP/1.1 and JSON, one router for all doors.
//!
//! ```text
//! control socket ──▶ [connection] ──▶ [router] ──▶ the table of ports
//! ```
//! A door has a number of seats; who finds none is told so (503) and sent away. A connection costs a bounded amount of memory, whatever
//! it sends: a head of 64 KiB, a body of 64 KiB, and a list of ports is written as fast as it is read ([`list`]). A
//! client that stops in the middle of a request, or of reading its answer, has ten seconds ([`connection`]).
//!
//! Who calls is known by the door ([`Publisher`]): it sees and removes what it has published itself.
//! What is said is in [`crate::control::shapes`] and docs/openapi.json.

mod connection;
mod list;
mod problem;
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

use super::ports::Publishing;
use super::ports::table::Publisher;
use crate::host::engine::EngineKind;
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

/// A door by which callers come.
pub struct Door {
    /// The control socket; it does not block.
    pub listener: UnixListener,
    /// What is told of this hythe.
    pub about: About,
    /// Connections at a time.
    pub connections: usize,
    /// The user whose processes may call, besides root's.
    pub user: u32,
}

/// Answers callers for ever.
pub async fn serve(door: Door, publishing: Rc<Publishing>) -> io::Result<()> {
    let Door { listener, about, connections, user } = door;
    let listener = tokio::net::UnixListener::from_std(listener)?;
    let router = Rc::new(Router::new(publishing, about));
    let seats = Arc::new(Semaphore::new(connections));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "a caller of the control socket is not taken");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if !may_call(&stream, user) {
            tracing::warn!("another user's process has called the control socket");
            continue;
        }
        let Ok(seat) = seats.clone().try_acquire_owned() else {
            connection::send_away(&stream);
            continue;
        };
        let router = router.clone();
        spawn_local(async move {
            connection::serve(stream, router, Publisher::Host).await;
            drop(seat);
        });
    }
}

/// The socket's permissions say it already; a descriptor that somebody else was given says it not.
fn may_call(stream: &UnixStream, user: u32) -> bool {
    stream.peer_cred().is_ok_and(|peer| [0, user].contains(&peer.uid()))
}
