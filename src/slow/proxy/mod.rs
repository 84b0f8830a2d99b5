//! The way out by a proxy, and what policy says of names.
//!
//! # Theory of operation
//! A stream of the guest's whose way depends on a name, or that goes by a proxy, comes here: its worker answers the guest's SYN at
//! once and gives away the other end of a socketpair ([`crate::exchange::mail::Service`]).
//!
//! ```text
//! to the world, on a transparent port ──▶ [transparent] looks at the first bytes ([peek]): TLS, a request, or neither
//!                                             │                        │ requests, one by one
//! to the gateway's port 3128 ─────────────────┼──────────────────────▶ [http] ──┐
//!                                             ▼                                 ▼
//!                                         [Proxy::route]: rules, bypass, script ▶ [tunnel]: straight, CONNECT, SOCKS
//!                                                                               │
//!                       the worker has the stream again ◀── [guest_stream] ────────┘
//! ```
//! Once a tunnel stands, the stream is given a new host side (`worker/streams/rehome.rs`): its bytes are a worker's work like any
//! other stream's. What stays here is requests that each are decided for themselves, and TLS to a proxy, whose keys no worker has.
//!
//! * [`place`]: where the guest wants to go, and whether it may
//! * [`dial`]: connections of the slow path, which [`lines`] ends when the host's address goes; [`authorization`]: who hythe is to a proxy
//! * [`body`]: bodies that may be needed twice; [`failure`]: what a guest is told; [`explain`]: what a user is

mod authorization;
mod body;
mod dial;
mod explain;
mod failure;
mod guest_stream;
mod http;
mod lines;
pub mod peek;
mod place;
pub mod script;
#[cfg(test)]
pub mod tests;
mod transparent;
mod tunnel;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use hyper::header::HeaderValue;
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio::task::spawn_local;
use tokio::time::timeout;

use super::current_addresses::CurrentAddresses;
use super::dns::Dns;
use super::shared_stream::SharedStream;
use crate::exchange::Mailbox;
use crate::exchange::mail::ToWorker;
use crate::flow::slab::Slot;
use crate::frame::address::{Address, Endpoint};
use crate::observe::counters::{Counters, Metric};
use crate::pac::Starter;
use crate::policy::addresses::{Addresses, Destination};
use crate::policy::egress::Verdict;
use crate::policy::proxy::{Choice, Kind, PacFailure, PacWord, ProxyMode, ProxySettings, ProxyUrl};
use authorization::Challenge;
pub use dial::certificate_directories;
use dial::{Tls, Wire};
pub use failure::Failure;
use guest_stream::GuestStream;
use http::Entry;
use lines::Lines;
use place::Place;
use script::{Script, ScriptError};
use tunnel::Way;

/// The system calls made here, besides those of sockets, the runtime and its streams.
pub const SYSTEM_CALLS: &[libc::c_long] = &[
    // What this process trusts.
    libc::SYS_openat,
    libc::SYS_statx,
    libc::SYS_getdents64,
    libc::SYS_newfstatat,
    libc::SYS_read,
    libc::SYS_getpeername,
    libc::SYS_shutdown,
    libc::SYS_fcntl,
    // What ends a connection.
    libc::SYS_connect,
];

/// How long a proxy may take to be there.
const CALL: Duration = Duration::from_secs(20);

/// How long a script may take to choose.
const SCRIPT: Duration = Duration::from_secs(12);

const NOT_THERE: &str = "the guest may not go there";

/// Proxies of which it is remembered what they ask for.
const CHALLENGES_MAX: usize = 64;

/// What leads streams of the guest's out. Clones are the same.
#[derive(Clone)]
pub struct Proxy(Rc<Inner>);

struct Inner {
    current: Rc<CurrentAddresses>,
    dns: Dns,
    workers: Vec<Mailbox<ToWorker<OwnedFd>>>,
    seats: Arc<Semaphore>,
    tls: Tls,
    script: Script,
    lines: Lines,
    challenges: RefCell<HashMap<String, Challenge>>,
    mode: Cell<ProxyMode>,
    log_refusals: bool,
    counters: Arc<Counters>,
}

/// How it begins.
pub struct Start {
    /// Streams at a time.
    pub streams: usize,
    /// Who has said which proxies there are.
    pub mode: ProxyMode,
    /// What starts evaluators of configuration scripts, if anything does.
    pub pac: Option<Starter>,
    /// The script, where it is a file.
    pub script: Option<String>,
    /// Whether each refusal by a rule is a line in the log.
    pub log_refusals: bool,
}

impl Proxy {
    /// What leads out by the rules and settings among these addresses.
    pub fn new(
        start: Start,
        current: Rc<CurrentAddresses>,
        dns: Dns,
        workers: Vec<Mailbox<ToWorker<OwnedFd>>>,
        counters: Arc<Counters>,
    ) -> Self {
        let script = Script::new(start.pac, dns.clone(), current.clone());
        script.expect(current.get().proxy.as_ref().and_then(|settings| settings.pac.clone()), start.script);
        Self(Rc::new(Inner {
            current,
            dns,
            workers,
            seats: Arc::new(Semaphore::new(start.streams)),
            tls: Tls::default(),
            script,
            lines: Lines::default(),
            challenges: RefCell::default(),
            mode: Cell::new(start.mode),
            log_refusals: start.log_refusals,
            counters,
        }))
    }

    /// Takes a stream that worker `worker` has given away. `through`: where the guest has called, unless it is the gateway.
    pub fn serve(&self, stream: UnixStream, worker: u8, slot: Slot, through: Option<Endpoint>) {
        let Some(mail) = self.0.workers.get(usize::from(worker)).cloned() else { return };
        let end = SharedStream::new(stream);
        let Ok(seat) = self.0.seats.clone().try_acquire_owned() else {
            self.0.counters.add(Metric::ProxyOverBudget, 1);
            spawn_local(async move { GuestStream::new(mail, slot, None).reset().await });
            return;
        };
        let stream = GuestStream::new(mail, slot, Some(seat));
        self.0.counters.add(Metric::ProxyStreams, 1);
        let proxy = self.clone();
        spawn_local(async move {
            match through {
                None => http::serve(proxy, Entry::Gateway, end, stream).await,
                Some(remote) => {
                    let address = Some(remote.address.ip());
                    let place = Place { name: None, address, port: remote.port };
                    transparent::serve(proxy, place, end, stream).await;
                }
            }
        });
    }

    /// What holds for new connections, and who has said so.
    pub fn settings(&self) -> (ProxyMode, ProxySettings) {
        let addresses = self.addresses();
        let settings = addresses.proxy.as_deref().cloned().unwrap_or_default();
        (self.0.mode.get(), ProxySettings { transparent: addresses.transparent.clone(), ..settings })
    }

    /// Has new connections go another way. Those that stand go on.
    pub async fn set(
        &self,
        mode: ProxyMode,
        settings: ProxySettings,
        script: Option<String>,
    ) -> Result<(), ScriptError> {
        self.0.script.set(settings.pac.clone(), script).await?;
        self.0.mode.set(mode);
        self.0.challenges.borrow_mut().clear();
        let change = |addresses: &mut Addresses| {
            addresses.transparent = settings.transparent.clone();
            addresses.proxy = (!settings.is_off()).then(|| Arc::new(settings));
        };
        self.0.current.change(change).await;
        Ok(())
    }

    /// The host's network is another: so may the script be that lies at a URL.
    pub fn network_has_changed(&self) {
        self.0.script.network_has_changed();
    }

    fn addresses(&self) -> Arc<Addresses> {
        self.0.current.get()
    }

    fn dns(&self) -> &Dns {
        &self.0.dns
    }

    /// The host has these addresses no more.
    pub fn addresses_gone(&self, gone: &[Address]) {
        self.0.lines.addresses_gone(gone);
    }

    fn lines(&self) -> &Lines {
        &self.0.lines
    }

    fn tls(&self) -> &Tls {
        &self.0.tls
    }

    /// The ways that lead to a place, the best one first, if it may be gone to at all.
    async fn route(&self, kind: Kind, place: &Place) -> Result<Vec<Way>, Failure> {
        let addresses = self.addresses();
        if let Verdict::Deny(rule) = addresses.egress.decide(&place.target()) {
            rule.count_refusal();
            self.0.counters.add(Metric::EgressRefused, 1);
            if self.0.log_refusals {
                tracing::info!(%place, rule = %rule, "refused");
            }
            return Err(Failure::Refused(rule.text().to_string()));
        }
        // A proxy may reach what is the host's alone: whoever leads there, the guest may not.
        let means = place.address.map(|address| addresses.classify(address.into()));
        if matches!(means, Some(Err(_) | Ok(Destination::Gateway))) {
            return Err(Failure::Refused(NOT_THERE.into()));
        }
        let ways = self.ways(&addresses, kind, place).await?;
        if place.is_loopback() && ways.iter().any(|way| *way != Way::Direct) {
            return Err(Failure::Refused(NOT_THERE.into()));
        }
        Ok(ways)
    }

    /// The ways that lead to a place by the proxy's settings.
    async fn ways(&self, addresses: &Addresses, kind: Kind, place: &Place) -> Result<Vec<Way>, Failure> {
        let Some(settings) = addresses.proxy.as_ref().filter(|_| !place.is_own(addresses)) else {
            return Ok(vec![Way::Direct]);
        };
        Ok(match settings.choose(kind, &place.target()) {
            Choice::Direct(_) => vec![Way::Direct],
            Choice::Via(proxy) => vec![Way::Via(proxy.clone())],
            Choice::Pac => self.by_script(kind, place, settings).await?,
        })
    }

    async fn by_script(
        &self,
        kind: Kind,
        place: &Place,
        settings: &ProxySettings,
    ) -> Result<Vec<Way>, Failure> {
        let url = match (kind, place.port) {
            (Kind::Http, 80) => format!("http://{}/", place.host()),
            (Kind::Http, port) => format!("http://{}:{port}/", place.host()),
            (Kind::Tunnel, 443) => format!("https://{}/", place.host()),
            (Kind::Tunnel, port) => format!("https://{}:{port}/", place.host()),
        };
        let asked = timeout(SCRIPT, self.0.script.find(&url, &place.host())).await;
        match asked.unwrap_or(Err(ScriptError::Silent)) {
            Ok(words) => {
                let way = |word| match word {
                    PacWord::Direct => Way::Direct,
                    PacWord::Via(mut proxy) => {
                        proxy.credentials = settings.credentials.of_place(&proxy);
                        Way::Via(proxy)
                    }
                };
                Ok(words.into_iter().map(way).collect())
            }
            Err(error) => {
                self.0.counters.add(Metric::ProxyScriptFailed, 1);
                tracing::warn!(%place, %error, "the proxy's configuration script has failed");
                match settings.pac_failure {
                    PacFailure::Direct => Ok(vec![Way::Direct]),
                    PacFailure::Block => Err(Failure::Script),
                }
            }
        }
    }

    /// Whether requests of a stream have to be decided one by one, whose first one names this place.
    async fn decides_by_request(&self, place: &Place) -> bool {
        let addresses = self.addresses();
        let refused = addresses.egress.decide(&place.target()).is_deny();
        let straight = self.ways(&addresses, Kind::Http, place).await.is_ok_and(|ways| ways == [Way::Direct]);
        refused || !straight || addresses.egress.asks_names()
    }

    /// What hythe says to a proxy of who it is, as far as that proxy has asked.
    fn authorization(&self, proxy: &ProxyUrl, method: &str, target: &str) -> Option<HeaderValue> {
        let credentials = proxy.credentials.as_ref()?;
        let mut challenges = self.0.challenges.borrow_mut();
        challenges.get_mut(&proxy.to_string())?.answer(credentials, method, target)
    }

    /// Remembers what a proxy asks for. Returns whether it can be answered.
    fn learn(&self, proxy: &ProxyUrl, challenge: Option<Challenge>) -> bool {
        let (Some(challenge), Some(_)) = (challenge, &proxy.credentials) else { return false };
        let mut challenges = self.0.challenges.borrow_mut();
        if challenges.len() >= CHALLENGES_MAX {
            challenges.clear();
        }
        challenges.insert(proxy.to_string(), challenge);
        true
    }

    /// A connection to a proxy, if it comes in time.
    async fn call_in_time(&self, proxy: &ProxyUrl) -> Result<Wire, Failure> {
        timeout(CALL, self.call(proxy)).await.unwrap_or(Err(Failure::Silent))
    }

    /// Where a proxy is.
    async fn addresses_of_proxy(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, Failure> {
        let addresses = addresses_of_host(host, port, &self.0.dns).await;
        if addresses.is_empty() { Err(Failure::NoAddress) } else { Ok(addresses) }
    }
}

/// Where a host is as the host itself sees it: its loopback is its own.
async fn addresses_of_host(host: &str, port: u16, dns: &Dns) -> Vec<SocketAddr> {
    let plain = host.trim_start_matches('[').trim_end_matches(']');
    let ips: Vec<IpAddr> = match plain.parse() {
        Ok(ip) => vec![ip],
        Err(_) if plain.eq_ignore_ascii_case("localhost") => {
            vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]
        }
        Err(_) => dns.addresses_of(plain).await,
    };
    ips.into_iter().map(|ip| SocketAddr::new(ip, port)).collect()
}
