//! DNS for the guest: what is known here is answered here, everything else by the host's resolvers.
//!
//! ```text
//!                                        ┌── denial      names that the guest is not to reach
//!                                        ├── records     names that the user gave
//!  guest, UDP ── answer ───┐             ├── names       the link's own
//!  guest, TCP ── stream ───┴── message ──┼── hosts       the host's hosts file (file_watch)
//!                                        ├── filter      addresses that the guest is not told
//!                                        ├── cache       what a resolver has said, as long as it holds
//!                                        └── flights ── forward ── upstream ── a server of the name's zone,
//!                                            budget     which      one         or a resolver of the host
//!                                                       server     exchange    (resolv_conf, file_watch)
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
//! What must never happen: that a name of the link, or of a zone that has its own servers, is asked of the host's resolvers;
//! that hythe says "no such name" because nobody answered (it says SERVFAIL); that a stranger's datagram is taken for an answer.

mod address_table;
mod cache;
mod denial;
mod explain;
#[cfg(test)]
mod fake_server;
mod file_watch;
mod filter;
mod flights;
mod forward;
mod hosts;
mod message;
mod names;
mod query_log;
mod race;
mod records;
mod reply;
mod resolv_conf;
mod settings;
mod stream;
mod upstream;
mod zones;

use std::cell::RefCell;
use std::io;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{info, warn};

use crate::frame::address::Endpoint;
use crate::observe::counters::{Counters, Metric};
use crate::policy::addresses::Addresses;
use crate::policy::egress::{Rule, Verdict};
use crate::policy::names::{DomainName, Entry, WireText};

pub use explain::Said;
pub use file_watch::readable_directories;
pub use records::RecordError;
pub use resolv_conf::{DNS_PORT, ResolvConf};
pub use settings::{Limits, Patience, Settings};

use address_table::AddressTable;
use cache::{Cache, Kind, Place};
use file_watch::FileWatch;
use filter::Filter;
use flights::{Admission, Flights};
use forward::{Forwarder, Unanswered};
use message::{ExtendedError, Query, Unfit};
use names::{Found, LinkNames};
use query_log::Source;
use records::Records;
use zones::Zones;

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

/// Why there can be no DNS.
#[derive(Debug, thiserror::Error)]
pub enum DnsError {
    /// Message IDs could not be made unpredictable.
    #[error(
        "the kernel gives no random numbers (getrandom), without which DNS would be open to forgery: {0}"
    )]
    Random(#[source] io::Error),
    /// There are more records than can be.
    #[error("--record: {0}")]
    Records(#[from] RecordError),
}

/// How often one query is begun, if the ways to the resolvers change while it is under way.
const STARTS_MAX: u32 = 8;

/// The host's files are not read more often than this.
const READ_APART: Duration = Duration::from_millis(50);

/// The DNS service of one guest. Clones are the same service.
#[derive(Clone)]
pub struct Dns(Rc<Service>);

struct Service {
    settings: Settings,
    link: Addresses,
    records: RefCell<Records>,
    names: LinkNames,
    hosts: RefCell<AddressTable>,
    filter: Filter,
    cache: RefCell<Cache>,
    zones: Zones,
    resolvers: watch::Sender<ResolvConf>,
    /// How many names the host's own file has.
    hosts_changed: watch::Sender<usize>,
    /// Told when queries under way are to be asked anew.
    ways_changed: watch::Sender<()>,
    forwarder: Forwarder,
    flights: Flights,
    streams: Flights,
    counters: Arc<Counters>,
}

/// What a query gets, and from whom. Nothing is what a retransmission gets of a query under way.
type Answered = (Option<Vec<u8>>, Source);

impl Dns {
    /// A service for the guest behind these addresses. Reads the host's files once; [`Self::run`] keeps what they say
    /// current.
    pub fn new(settings: Settings, addresses: &Addresses, counters: Arc<Counters>) -> Result<Self, DnsError> {
        let service = Service {
            link: addresses.clone(),
            records: RefCell::new(Records::new(&settings.names.records)?),
            names: LinkNames::new(addresses, settings.hostname.as_deref()),
            hosts: RefCell::new(hosts_of(&settings, addresses)),
            filter: Filter::new(settings.names.filter),
            cache: RefCell::new(Cache::new(settings.names.cache)),
            zones: Zones::new(&settings.names.zones),
            resolvers: watch::Sender::new(resolvers(&settings)),
            hosts_changed: watch::Sender::default(),
            ways_changed: watch::Sender::default(),
            forwarder: Forwarder::new(settings.patience)?,
            flights: Flights::new(settings.limits.in_flight),
            streams: Flights::new(settings.limits.streams),
            counters,
            settings,
        };
        service.forwarder.learn(Arc::new(addresses.clone()));
        Ok(Self(Rc::new(service)))
    }

    /// The answer to one message, or `None` where it deserves none: it is no query, or it is a retransmission of one
    /// that is still under way, whose answer serves both.
    ///
    /// An answer may have up to 65,535 bytes, over UDP too: it is as large as the guest allowed the resolver.
    pub async fn answer(&self, message: &[u8], transport: Transport) -> Option<Vec<u8>> {
        self.count(Metric::DnsQueries);
        let query = match Query::parse(message) {
            Ok(query) => query,
            Err(Unfit::Silence) => {
                self.count(Metric::DnsGarbage);
                return None;
            }
            Err(Unfit::Code(code)) => {
                self.count(Metric::DnsUnfit);
                return message::bare(message, code);
            }
        };
        let begun = Instant::now();
        let (answer, source) = self.find(&query, transport).await;
        if self.0.settings.names.log {
            query_log::line(&query, transport, source, answer.as_deref(), begun.elapsed());
        }
        answer
    }

    async fn find(&self, query: &Query<'_>, transport: Transport) -> Answered {
        // A transfer is many messages for one question, and no resolver gives one.
        if query.is_transfer() {
            self.count(Metric::DnsUnfit);
            return (query.fail(ResponseCode::Refused, None), Source::Nobody);
        }
        if let Some(rule) = self.denied(query) {
            self.count(Metric::DnsDenied);
            rule.count_refusal();
            return (denial::answer(query, rule.dns(), transport), Source::Policy);
        }
        if let Some((found, source)) = self.known(query) {
            self.count(Metric::DnsOwnNames);
            return (query.answer_with(found, transport), source);
        }
        if self.0.filter.drops(query.question(), |to| self.0.forwarder.way_to(to)) {
            self.count(Metric::DnsFiltered);
            return (query.fail(ResponseCode::NoError, Some(ExtendedError::FILTERED)), Source::Filter);
        }
        let kind = self.0.cache.borrow_mut().look_up(query, transport);
        match kind {
            Kind::Known(answer) => {
                self.count(Metric::DnsCacheHits);
                (Some(answer), Source::Cache)
            }
            Kind::Unknown(place) => self.forward(query, transport, Some(place)).await,
            Kind::Foreign => self.forward(query, transport, None).await,
        }
    }

    /// The rule that denies a name, whatever may be known of it. The names of the link are nobody's to deny: the guest needs them.
    fn denied(&self, query: &Query<'_>) -> Option<&Rule> {
        let rules = &self.0.settings.egress;
        if rules.is_empty() || self.0.names.look_up(query.question()).is_some() {
            return None;
        }
        match rules.for_name(&WireText(query.name()).to_string()) {
            Verdict::Deny(rule) => Some(rule),
            Verdict::Allow => None,
        }
    }

    /// What is known here, by the order in which it counts: the user's word, the link's, the host's.
    fn known(&self, query: &Query<'_>) -> Option<(Found, Source)> {
        let records = || Some((self.0.records.borrow().look_up(query)?, Source::Records));
        let link = || Some((self.0.names.look_up(query.question())?, Source::Link));
        let hosts = || Some((self.0.hosts.borrow().look_up(query)?, Source::Hosts));
        records().or_else(link).or_else(hosts)
    }

    async fn forward(&self, query: &Query<'_>, transport: Transport, place: Option<Place>) -> Answered {
        let counters = &self.0.counters;
        let _ticket = match self.0.flights.admit(query.flight(transport)) {
            Admission::Go(ticket) => ticket,
            Admission::Duplicate => {
                self.count(Metric::DnsRetransmissions);
                return (None, Source::Nobody);
            }
            Admission::Full => {
                self.count(Metric::DnsOverBudget);
                return (query.fail(ResponseCode::ServFail, Some(ExtendedError::BUSY)), Source::Nobody);
            }
        };
        self.count(Metric::DnsForwarded);
        let of_zone = self.0.zones.servers(query.name());
        let mut ways_changed = self.0.ways_changed.subscribe();
        let patience = self.0.settings.patience;
        let deadline = Instant::now() + patience.total;
        let mut starts = 0;
        let outcome = loop {
            starts += 1;
            let servers =
                of_zone.clone().unwrap_or_else(|| self.0.resolvers.borrow().servers.as_slice().into());
            let outcome = tokio::select! {
                biased;
                outcome = self.0.forwarder.forward(query, &servers, transport, counters, deadline) => outcome,
                Ok(()) = ways_changed.changed(), if starts < STARTS_MAX => continue,
            };
            // Between two networks there is no way for a moment.
            let may_come = (2..STARTS_MAX).contains(&starts) && Instant::now() < deadline;
            if outcome != Err(Unanswered::Unreachable) || !may_come {
                break outcome;
            }
            let _ = timeout_at(deadline.min(Instant::now() + patience.attempt), ways_changed.changed()).await;
        };
        match outcome {
            Ok((server, reply)) => {
                if let Some(place) = place {
                    self.0.cache.borrow_mut().keep(place, &reply);
                }
                (Some(reply), Source::Server(server))
            }
            Err(why) => {
                self.count(Metric::DnsUnanswered);
                let why = match why {
                    _ if of_zone.is_some() => ExtendedError::ZONE_SILENT,
                    Unanswered::NoServers => ExtendedError::NO_SERVERS,
                    Unanswered::Unreachable => ExtendedError::UNREACHABLE,
                    Unanswered::Silent => ExtendedError::SILENT,
                };
                (query.fail(ResponseCode::ServFail, Some(why)), Source::Nobody)
            }
        }
    }

    fn count(&self, metric: Metric) {
        self.0.counters.add(metric, 1);
    }

    /// The user's records, in the order of their names.
    pub fn records(&self) -> Vec<Entry<IpAddr>> {
        self.0.records.borrow().list()
    }

    /// Adds addresses to a name, all or none of them; without any, the name is there and stands for nothing. `*.NAME` stands
    /// for all names below it that have no records of their own.
    pub fn add_record(&self, name: &DomainName, addresses: &[IpAddr]) -> Result<(), RecordError> {
        self.0.records.borrow_mut().add(name, addresses)
    }

    /// Takes addresses from a name, and with its last one the name; where none are given, the name. Returns whether
    /// anything was there to be taken.
    pub fn remove_record(&self, name: &DomainName, addresses: &[IpAddr]) -> bool {
        self.0.records.borrow_mut().remove(name, addresses)
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

    /// What goes on without queries: the host's files are followed, sockets that nobody needs are closed. Runs for ever.
    pub async fn run(&self) {
        tokio::join!(self.follow_files(), self.0.forwarder.run(&self.0.counters));
    }

    /// Reads the host's files anew whenever they change. Returns only if they cannot be watched, which it reports.
    async fn follow_files(&self) {
        let Settings { resolv_conf, hosts, resolved_conf, .. } = &self.0.settings;
        let paths = vec![resolv_conf.clone(), hosts.clone(), resolved_conf.clone()];
        let error = match FileWatch::new(paths) {
            Ok(mut watch) => loop {
                // Also before the first change: a file may have changed since it was read, unwatched.
                let begun = Instant::now();
                self.reload();
                // Who writes a file again and again has it read as often as that leaves time for others.
                sleep(READ_APART.max(begun.elapsed())).await;
                if let Err(error) = watch.changed().await {
                    break error;
                }
            },
            Err(error) => error,
        };
        warn!(%error, "resolv.conf and hosts cannot be watched: changes of them will not be seen");
    }

    /// Whatever has changed, what resolvers said before may be wrong now.
    fn reload(&self) {
        let hosts = hosts_of(&self.0.settings, &self.0.link);
        let names = hosts.names();
        let before = self.0.hosts.replace(hosts);
        if before != *self.0.hosts.borrow() {
            info!(names, "names of the host's hosts file");
            self.0.hosts_changed.send_replace(names);
        }
        self.read_resolvers();
        self.0.cache.borrow_mut().clear();
    }

    fn read_resolvers(&self) {
        let new = resolvers(&self.0.settings);
        let is_other = self.0.resolvers.send_if_modified(|current| {
            if *current == new {
                return false;
            }
            info!(servers = ?new.servers, search = ?new.search, "resolvers of the host");
            *current = new;
            true
        });
        if is_other {
            self.start_anew();
        }
    }

    /// Nothing is known of any resolver any more, and who waits for one has the query asked again.
    fn start_anew(&self) {
        self.0.forwarder.forget_all();
        self.0.ways_changed.send_replace(());
    }

    /// The host's network has changed: what resolvers said was true of another one, since a VPN's names are others, whoever is
    /// asked; and a resolver that is named by its link may have another number. `ways`: the world may be reached in other ways.
    pub fn network_has_changed(&self, ways: bool) {
        self.read_resolvers();
        self.0.cache.borrow_mut().clear();
        self.0.forwarder.doubt_silence();
        if ways {
            self.start_anew();
        }
    }

    /// The addresses of the host, and the way out of it, are these now.
    pub fn learn(&self, addresses: Arc<Addresses>) {
        self.0.forwarder.learn(addresses);
    }

    /// The resolvers and search domains in use, now and whenever they change.
    pub fn resolv_conf(&self) -> watch::Receiver<ResolvConf> {
        self.0.resolvers.subscribe()
    }

    /// How many names the host's hosts file has, whenever it is another.
    pub fn hosts(&self) -> watch::Receiver<usize> {
        self.0.hosts_changed.subscribe()
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

fn hosts_of(settings: &Settings, link: &Addresses) -> AddressTable {
    if settings.names.hosts { hosts::read(&settings.hosts, link) } else { AddressTable::default() }
}

#[cfg(test)]
mod tests;
