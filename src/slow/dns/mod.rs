//! DNS for the guest: the names of the link answered here, everything else by the host's resolvers.
//!
//! ```text
//!  guest, UDP ── answer ───┐             ┌── names      the link's own, answered here
//!  guest, TCP ── stream ───┴── message ──┤
//!                                        └── flights ── forward ── upstream ── a resolver of the host
//!                                            budget     which      one         (resolv_conf,
//!                                                       server     exchange     resolv_watch)
//! ```
//!
//! A query is read only as far as its question and its OPT record (RFC 6891); what is forwarded is forwarded byte for
//! byte, in both directions, but for the message ID. So every record type, EDNS option and response code survives,
//! those included that nobody has thought of yet. The reply keeps the guest's transport: UDP is asked over UDP, with
//! the guest's own payload size in it, and a truncated answer brings the guest back over TCP.
//!
//! Nothing here starts a task or a thread: every future holds all that it needs, and dropping it ends its sockets and
//! gives its budget back. Time comes from the runtime.
//!
//! What must never happen: that a name of the link is asked of the host's resolvers; that hythe says "no such name"
//! because nobody answered (it says SERVFAIL); that a stranger's datagram is taken for an answer.

#[cfg(test)]
mod fake_server;
mod flights;
mod forward;
mod message;
mod names;
mod race;
mod resolv_conf;
mod resolv_watch;
mod stream;
mod upstream;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::frame::address::Endpoint;
use crate::host::RESOLV_CONF;
use crate::observe::counters::{Counters, Metric};
use crate::policy::addresses::Addresses;

pub use resolv_conf::{DNS_PORT, ResolvConf};
pub use resolv_watch::watched_directories;

use flights::{Admission, Flights};
use forward::{Forwarder, Unanswered};
use message::{ExtendedError, Query, Unfit};
use names::LinkNames;
use resolv_watch::ResolvWatch;

/// The system calls made here, besides those of the runtime's own loop (epoll, its eventfd).
///
/// Sockets are IPv4 and IPv6, datagram and stream; the C library opens an `AF_UNIX` one besides, for `ioctl`
/// (`SIOCGIFINDEX`), where resolv.conf names a server with a scope. `fcntl` is how the standard library checks, in debug
/// builds, what it closes.
pub const SYSTEM_CALLS: &[libc::c_long] = &[
    libc::SYS_socket,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_setsockopt,
    libc::SYS_getsockopt,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_close,
    libc::SYS_epoll_ctl,
    libc::SYS_openat,
    libc::SYS_statx,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_ioctl,
    libc::SYS_fcntl,
    libc::SYS_inotify_init1,
    libc::SYS_inotify_add_watch,
    libc::SYS_inotify_rm_watch,
    libc::SYS_getrandom,
];

/// How a query came, and so how it is asked upstream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    /// In a datagram of this endpoint of the guest's. The endpoint is part of what makes a query a retransmission.
    Udp(Endpoint),
    /// In a stream.
    Tcp,
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// How long a resolver is alone with a query before the next one is asked too.
    pub attempt: Duration,
    /// How long a query may take in all.
    pub total: Duration,
    /// How long a resolver that kept silent is asked only after the others.
    pub silent_last: Duration,
    /// How long a stream may go without progress: RFC 7766, 6.2.3, asks for "at least a few seconds".
    pub stream_idle: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            attempt: Duration::from_secs(2),
            total: Duration::from_secs(8),
            silent_last: Duration::from_secs(30),
            stream_idle: Duration::from_secs(10),
        }
    }
}

/// How much may be under way.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Queries that wait for a resolver. Each holds a socket for every resolver that it waits for, up to
    /// [`Patience::total`] / [`Patience::attempt`] of them.
    pub in_flight: usize,
    /// Queries of one stream whose answers the guest has not taken yet.
    pub per_stream: usize,
    /// Streams.
    pub streams: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { in_flight: 256, per_stream: 64, streams: 64 }
    }
}

/// What is configured.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where the host's resolvers are written down.
    pub resolv_conf: PathBuf,
    /// Resolvers that the user named; where there are any, those of the file do not count.
    pub servers: Vec<SocketAddr>,
    /// The guest's own name.
    pub hostname: Option<String>,
    /// How long things may take.
    pub patience: Patience,
    /// How much may be under way.
    pub limits: Limits,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            resolv_conf: PathBuf::from(RESOLV_CONF),
            servers: Vec::new(),
            hostname: None,
            patience: Patience::default(),
            limits: Limits::default(),
        }
    }
}

/// Why there can be no DNS.
#[derive(Debug, thiserror::Error)]
pub enum DnsError {
    /// Message IDs could not be made unpredictable.
    #[error(
        "the kernel gives no random numbers (getrandom), without which DNS would be open to forgery: {0}"
    )]
    Random(#[source] io::Error),
}

/// The DNS service of one guest. Clones are the same service.
#[derive(Clone)]
pub struct Dns(Rc<Service>);

struct Service {
    settings: Settings,
    names: LinkNames,
    resolvers: watch::Sender<ResolvConf>,
    forwarder: Forwarder,
    flights: Flights,
    streams: Flights,
    counters: Arc<Counters>,
}

impl Dns {
    /// A service for the guest behind these addresses. Reads the file of resolvers once; [`Self::follow_resolv_conf`]
    /// keeps it current.
    pub fn new(settings: Settings, addresses: &Addresses, counters: Arc<Counters>) -> Result<Self, DnsError> {
        let service = Service {
            names: LinkNames::new(addresses, settings.hostname.as_deref()),
            resolvers: watch::Sender::new(resolvers(&settings)),
            forwarder: Forwarder::new(settings.patience)?,
            flights: Flights::new(settings.limits.in_flight),
            streams: Flights::new(settings.limits.streams),
            counters,
            settings,
        };
        Ok(Self(Rc::new(service)))
    }

    /// The answer to one message, or `None` where it deserves none: it is no query, or it is a retransmission of one
    /// that is still under way, whose answer serves both.
    ///
    /// An answer may have up to 65,535 bytes, over UDP too: it is as large as the guest allowed the resolver.
    pub async fn answer(&self, message: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let counters = &self.0.counters;
        counters.add(Metric::DnsQueries, 1);
        let query = match Query::parse(message) {
            Ok(query) => query,
            Err(Unfit::Silence) => {
                counters.add(Metric::DnsGarbage, 1);
                return None;
            }
            Err(Unfit::Code(code)) => {
                counters.add(Metric::DnsUnfit, 1);
                return message::bare(message, code);
            }
        };
        // A transfer is many messages for one question, and no resolver gives one.
        if query.is_transfer() {
            counters.add(Metric::DnsUnfit, 1);
            return query.fail(ResponseCode::Refused, None);
        }
        let found = self.0.names.look_up(query.question());
        if let Some(found) = found {
            counters.add(Metric::DnsOwnNames, 1);
            return query.answer_with(found);
        }
        self.forward(&query, transport).await
    }

    async fn forward(&self, query: &Query<'_>, transport: Transport) -> Option<Vec<u8>> {
        let counters = &self.0.counters;
        let _ticket = match self.0.flights.admit(query.flight(transport)) {
            Admission::Go(ticket) => ticket,
            Admission::Duplicate => {
                counters.add(Metric::DnsRetransmissions, 1);
                return None;
            }
            Admission::Full => {
                counters.add(Metric::DnsOverBudget, 1);
                return query.fail(ResponseCode::ServFail, Some(ExtendedError::BUSY));
            }
        };
        counters.add(Metric::DnsForwarded, 1);
        let servers = self.0.resolvers.borrow().servers.clone();
        match self.0.forwarder.forward(query, &servers, transport, counters).await {
            Ok(reply) => Some(reply),
            Err(why) => {
                counters.add(Metric::DnsUnanswered, 1);
                let why = match why {
                    Unanswered::NoServers => ExtendedError::NO_SERVERS,
                    Unanswered::Unreachable => ExtendedError::UNREACHABLE,
                    Unanswered::Silent => ExtendedError::SILENT,
                };
                query.fail(ResponseCode::ServFail, Some(why))
            }
        }
    }

    /// Serves one end of a stream (RFC 7766) until the guest closes it or lets it lie.
    pub async fn serve_stream(&self, stream: UnixStream) {
        let Admission::Go(_ticket) = self.0.streams.admit(None) else {
            self.0.counters.add(Metric::DnsStreamsRefused, 1);
            return;
        };
        self.0.counters.add(Metric::DnsStreams, 1);
        stream::serve(self, stream, self.0.settings.limits.per_stream).await;
    }

    /// Reads the file of resolvers anew whenever it changes. Runs for ever; returns only if the file cannot be watched,
    /// which it reports.
    pub async fn follow_resolv_conf(&self) {
        let path = &self.0.settings.resolv_conf;
        let error = match ResolvWatch::new(path) {
            Ok(mut watch) => loop {
                // Also before the first change: the file may have changed since it was read, unwatched.
                self.reload();
                if let Err(error) = watch.changed().await {
                    break error;
                }
            },
            Err(error) => error,
        };
        warn!(path = %path.display(), %error, "resolv.conf cannot be watched: changes of it will not be seen");
    }

    fn reload(&self) {
        let new = resolvers(&self.0.settings);
        self.0.resolvers.send_if_modified(|current| {
            if *current == new {
                return false;
            }
            info!(servers = ?new.servers, search = ?new.search, "resolvers of the host");
            *current = new;
            true
        });
    }

    /// The resolvers and search domains in use, now and whenever they change.
    pub fn resolv_conf(&self) -> watch::Receiver<ResolvConf> {
        self.0.resolvers.subscribe()
    }

    /// What has happened so far.
    #[cfg(test)]
    fn counters(&self) -> &Counters {
        &self.0.counters
    }
}

fn resolvers(settings: &Settings) -> ResolvConf {
    let mut conf = ResolvConf::read(&settings.resolv_conf);
    if !settings.servers.is_empty() {
        conf.servers.clone_from(&settings.servers);
    }
    conf
}

#[cfg(test)]
mod tests;
