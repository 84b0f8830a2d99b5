//! The slow path: one thread for everything that needs names, files or patience.
//!
//! A current-thread tokio runtime. Workers mail it frames that are for hythe itself, streams to its services, and
//! what the guest answers at published ports; it mails frames back. It never touches what a worker owns.
//!
//! * [`neighbours`]: ARP, neighbour discovery, router advertisements
//! * [`dhcp`], [`dhcpv6`]: addresses for guests that ask
//! * [`dns`]: names of the link, everything else to the host's resolvers
//! * [`echo`]: the gateway answers ping
//! * [`fragments`]: packets of the guest that came in pieces
//! * [`proxy`]: streams whose way depends on a name, or goes by a proxy
//! * [`ports`]: the published ports, and how they change
//! * [`api`]: what users and programs may ask
//! * [`network`]: the host's network changes; [`current_addresses`]: the workers hear of it; [`events`]: so does who listens
//! * [`mailing`]: mail to workers that has to arrive

pub mod api;
mod broker;
mod current_addresses;
pub mod dhcp;
pub mod dhcpv6;
pub mod dns;
pub mod echo;
pub mod events;
pub mod fragments;
mod mailing;
pub mod neighbours;
mod network;
pub mod ports;
pub mod proxy;
mod readable;
mod shared_stream;

use std::cell::Cell;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::{LocalSet, spawn_local};

use crate::channel::Channel;
use crate::control::shapes::Event;
use crate::exchange::mail::{Service, ToSlow, ToWorker};
use crate::exchange::{Mailbox, Waker};
use crate::flow::slab::Slot;
use crate::frame::address::{Endpoint, Mac};
use crate::frame::build::Route;
use crate::frame::drop_reason::DropReason;
use crate::frame::protocol::UDP;
use crate::frame::view::{Content, IpHead, Packet, Transport, UdpView, View};
use crate::frame::{datagram, fragment};
use crate::netlink::{Netlink, NetworkWatch};
use crate::observe::counters::Counters;
use crate::policy::addresses::Addresses;
use crate::policy::guest_mac::GuestMac;
use crate::policy::names::NamePolicy;
use crate::time::Now;
use readable::Readable;

/// How long a lease of an address lasts, in seconds. The address is the guest's alone, so it need not be short.
const LEASE_S: u32 = 86_400;

/// Mail that is taken before what it has begun gets its turn: fewer things than the runtime runs in one.
const MAIL_A_TURN: usize = 32;

const DHCP_SERVER: u16 = 67;
const DHCPV6_SERVER: u16 = 547;

/// The system calls made here, by the runtime, and by its streams; those of [`dns`] come besides.
pub const SYSTEM_CALLS: &[libc::c_long] = &[
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_shutdown,
    libc::SYS_lseek,
    // The channel to the helper.
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_fcntl,
];

/// Everything the slow path is made from.
pub struct Parts {
    /// Its mail.
    pub mail: Mailbox<ToSlow>,
    /// What wakes it.
    pub waker: Arc<Waker>,
    /// What tells it to end.
    pub stop: Arc<Waker>,
    /// The workers' mail, by number.
    pub workers: Vec<Mailbox<ToWorker<OwnedFd>>>,
    /// Addresses and rules.
    pub addresses: Arc<Addresses>,
    /// The guest's MAC.
    pub guest_mac: GuestMac,
    /// The link's MTU.
    pub mtu: u16,
    /// The guest's host name.
    pub hostname: Option<String>,
    /// Resolvers to ask instead of the host's.
    pub dns: Vec<IpAddr>,
    /// What the user says about names.
    pub names: NamePolicy,
    /// The host's search domains.
    pub search: Vec<String>,
    /// Whether the host has a default route, for IPv4 and IPv6.
    pub host_has_default: [bool; 2],
    /// The published ports.
    pub ports: ports::table::Table,
    /// What leads the guest's streams out by name.
    pub proxy: proxy::Start,
    /// By which the kernel is asked for routes.
    pub routes: Netlink,
    /// What callers are told of this hythe, and how many there may be.
    pub api: api::Settings,
    /// Where callers of the host come from, if from anywhere.
    pub door: Option<api::Door>,
    /// The channel to the helper that opens sockets in the guest's namespace, where there is one.
    pub broker: Option<Channel>,
    /// Its counters.
    pub counters: Arc<Counters>,
}

/// Runs until it is told to stop; `limit` takes rights from the thread once its runtime is made.
pub fn run(parts: Parts, network_watch: NetworkWatch, limit: impl FnOnce() -> io::Result<()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let served = runtime
        .and_then(|runtime| limit().map(|()| runtime))
        .and_then(|runtime| LocalSet::new().block_on(&runtime, serve(parts, network_watch)));
    if let Err(error) = served {
        tracing::error!(%error, "the slow path has ended");
    }
}

async fn serve(mut parts: Parts, network_watch: NetworkWatch) -> io::Result<()> {
    let mail = parts.mail.clone();
    let waker = parts.waker.clone();
    let wake = Readable::new(waker.clone())?;
    let stop = Readable::new(parts.stop.clone())?;
    let door = parts.door.take();
    let has_default = parts.host_has_default;
    let mut slow = Slow::new(parts)?;
    spawn_local({
        let ports = slow.ports.clone();
        async move { ports.take_back_unheld().await }
    });
    if let Some(door) = door {
        let api = slow.api.clone();
        spawn_local(async move {
            if let Err(error) = api.serve_host(door).await {
                tracing::error!(%error, "nobody is answered at the control socket");
            }
        });
    }
    spawn_local({
        let dns = slow.dns.clone();
        async move { dns.run().await }
    });
    let network = network::Network::new(
        slow.current.clone(),
        slow.events.clone(),
        slow.dns.clone(),
        slow.proxy.clone(),
        has_default,
    );
    let mut default_routes = network.default_routes();
    spawn_local(async move {
        let error = network.follow(network_watch).await;
        tracing::warn!(%error, "changes of the host's network will not be seen");
    });
    if let Some(broker) = slow.broker.clone() {
        spawn_local(async move { broker.serve().await });
    }
    let mut resolvers = slow.dns.resolv_conf();
    let mut hosts = slow.dns.hosts();
    let mut advertise = tokio::time::interval(Duration::from_secs(neighbours::ADVERTISEMENT_INTERVAL_S));
    // After hours in which nobody ran, one is enough.
    advertise.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        waker.announce_sleep();
        if mail.is_empty() {
            let deadline = slow.fragments.deadline().map(|at| at - Now::read());
            tokio::select! {
                result = stop.signalled() => return result,
                result = wake.signalled() => result?,
                _ = advertise.tick() => slow.advertise(),
                Ok(()) = default_routes.changed() => slow.routes_ipv6(default_routes.borrow_and_update()[1]),
                Ok(()) = resolvers.changed() => slow.follow_resolvers(&resolvers.borrow_and_update()),
                Ok(()) = hosts.changed() => slow.events.tell(Event::Hosts { names: *hosts.borrow_and_update() }),
                () = tokio::time::sleep(deadline.unwrap_or(Duration::MAX)) => slow.expire_fragments(),
            }
        }
        waker.awake();
        // A guest may send faster than its queries are answered, and each of them holds its message.
        for thing in std::iter::from_fn(|| mail.take()).take(MAIL_A_TURN) {
            slow.take(thing);
        }
        // Queries and streams that the mail has begun get their turn.
        tokio::task::yield_now().await;
    }
}

struct Slow {
    to_guest: Rc<ToGuest>,
    /// What the workers know about addresses; those above are as the link was set up.
    current: Rc<current_addresses::CurrentAddresses>,
    /// The guest has the IPv6 address that it is offered.
    guest_has_given: Cell<bool>,
    mtu: u16,
    dns: dns::Dns,
    router: neighbours::RouterConfig,
    dhcp: dhcp::DhcpConfig,
    dhcpv6: dhcpv6::Dhcpv6Config,
    fragments: fragments::Fragments,
    ports: Rc<ports::Publishing>,
    api: Rc<api::Api>,
    events: Rc<events::Events>,
    proxy: proxy::Proxy,
    broker: Option<Rc<broker::Broker>>,
}

/// The way back: whole frames, to the worker whose link the question came by.
struct ToGuest {
    workers: Vec<Mailbox<ToWorker<OwnedFd>>>,
    addresses: Arc<Addresses>,
    guest_mac: GuestMac,
    mtu: u16,
    counters: Arc<Counters>,
    fragment_id: Cell<u32>,
}

impl ToGuest {
    fn frame(&self, worker: u8, frame: Vec<u8>) {
        let Some(mailbox) = self.workers.get(worker as usize) else { return };
        if mailbox.put(ToWorker::FrameToGuest(frame)).is_err() {
            self.counters.count_drop(DropReason::WorkerFull);
        }
    }

    fn next_fragment_id(&self) -> u32 {
        self.fragment_id.set(self.fragment_id.get().wrapping_add(1));
        self.fragment_id.get()
    }

    /// Sends a datagram, in fragments where it is larger than the MTU.
    fn datagram(&self, worker: u8, source: Endpoint, destination: Endpoint, payload: &[u8]) {
        let route = Route {
            source_mac: self.addresses.gateway_mac,
            destination_mac: self.guest_mac.get(),
            ip: IpHead {
                source: source.address,
                destination: destination.address,
                hop_limit: 64,
                traffic_class: 0,
                dont_fragment: false,
            },
        };
        let Some(frame) = datagram::whole(&route, source.port, destination.port, payload) else {
            self.counters.count_drop(DropReason::TooLarge);
            return;
        };
        for frame in fragment::frames(&frame, &route, UDP, self.mtu, self.next_fragment_id()) {
            self.frame(worker, frame);
        }
    }
}

impl Slow {
    fn new(parts: Parts) -> io::Result<Self> {
        let settings = dns::Settings {
            servers: parts.dns.iter().map(|ip| SocketAddr::new(*ip, dns::DNS_PORT)).collect(),
            hostname: parts.hostname.clone(),
            names: parts.names,
            egress: parts.addresses.egress.clone(),
            ..dns::Settings::default()
        };
        let dns =
            dns::Dns::new(settings, &parts.addresses, parts.counters.clone()).map_err(io::Error::other)?;
        let search = neighbours::search_names(&parts.search);
        let broker =
            parts.broker.map(|channel| broker::Broker::new(channel, parts.workers.clone())).transpose()?;
        let ports = ports::Publishing::new(parts.ports, parts.workers.clone());
        let events: Rc<events::Events> = Rc::default();
        let current =
            Rc::new(current_addresses::CurrentAddresses::new(parts.addresses.clone(), parts.workers.clone()));
        let proxy = proxy::Proxy::new(
            parts.proxy,
            current.clone(),
            dns.clone(),
            parts.workers.clone(),
            parts.counters.clone(),
        );
        let explainer = api::Explainer::new(dns.clone(), current.clone(), proxy.clone(), parts.routes);
        let api =
            api::Api::new(parts.api, ports.clone(), events.clone(), dns.clone(), proxy.clone(), explainer);
        let api = Rc::new(api);
        let to_guest = ToGuest {
            workers: parts.workers,
            addresses: parts.addresses,
            guest_mac: parts.guest_mac,
            mtu: parts.mtu,
            counters: parts.counters,
            fragment_id: Cell::new(Now::read().0 as u32),
        };
        Ok(Self {
            to_guest: Rc::new(to_guest),
            current,
            guest_has_given: Cell::new(false),
            mtu: parts.mtu,
            dns,
            router: neighbours::RouterConfig {
                mtu: parts.mtu,
                search: search.clone(),
                withdrawn: Vec::new(),
                has_route: parts.host_has_default[1],
            },
            dhcp: dhcp::DhcpConfig {
                lease_s: LEASE_S,
                mtu: parts.mtu,
                hostname: parts.hostname,
                dns: Vec::new(),
                search: search.clone(),
            },
            dhcpv6: dhcpv6::Dhcpv6Config { lease_s: LEASE_S, dns: Vec::new(), search },
            fragments: fragments::Fragments::default(),
            ports,
            api,
            events,
            proxy,
            broker: broker.map(Rc::new),
        })
    }

    fn addresses(&self) -> &Addresses {
        &self.to_guest.addresses
    }

    fn take(&mut self, mail: ToSlow) {
        match mail {
            ToSlow::Frame { worker, frame } => self.frame(worker, &frame),
            ToSlow::Stream { worker, stream, service, socket, guest, remote } => {
                self.serve_stream(worker, stream, service, socket, guest, remote);
            }
            ToSlow::WantSockets { worker, count, v4 } => {
                if let Some(broker) = &self.broker {
                    broker.ask(worker, count, v4);
                }
            }
            ToSlow::QueueFailed(words) => tracing::error!("{words}"),
            ToSlow::Unserved { publication } => self.ports.worker_refuses(publication),
            ToSlow::Listens { publication, listens } => self.ports.guest_answers(publication, listens),
        }
    }

    /// A frame from the guest for hythe itself.
    fn frame(&mut self, worker: u8, frame: &[u8]) {
        let Ok(view) = View::parse(frame, frame.len()) else { return };
        let Content::Ip(packet) = view.content else { return self.neighbour(worker, frame) };
        match packet.transport {
            Transport::Udp(udp) => self.datagram(worker, view.source_mac, &packet, &udp, frame),
            Transport::Fragment(_) => self.fragment(worker, frame),
            Transport::Icmp(&[133..=137, ..]) if !packet.ip.source.is_v4() => self.neighbour(worker, frame),
            Transport::Icmp(_) => {
                let id = self.to_guest.next_fragment_id();
                for answer in
                    echo::answer(self.addresses(), self.to_guest.guest_mac.get(), self.mtu, id, frame)
                {
                    self.to_guest.frame(worker, answer);
                }
            }
            Transport::Tcp(_) | Transport::Other(_) => {}
        }
    }

    /// Connections to published ports go to the address that the guest has. Over IPv6 it chooses one itself (RFC 4862),
    /// unless it asks for the one that it is offered, or hythe has set its interface up.
    fn note_guest_address(&self, frame: &[u8]) {
        let (Some(v6), None) = (&self.addresses().v6, &self.broker) else { return };
        let Some(seen) = neighbours::learn(self.addresses(), frame).filter(|seen| !seen.is_v4()) else {
            return;
        };
        if seen == v6.guest {
            self.guest_has_given.set(true);
        } else if self.guest_has_given.get() {
            return;
        }
        if self.current.get().v6.as_ref().is_some_and(|v6| v6.guest != seen) {
            tracing::info!(address = %seen, "the guest has an IPv6 address");
            let current = self.current.clone();
            spawn_local(async move {
                let set = |addresses: &mut Addresses| {
                    if let Some(v6) = &mut addresses.v6 {
                        v6.guest = seen;
                    }
                };
                current.change(set).await;
            });
        }
    }

    fn neighbour(&self, worker: u8, frame: &[u8]) {
        self.note_guest_address(frame);
        if let Some(answer) =
            neighbours::answer(self.addresses(), &self.router, self.to_guest.guest_mac.get(), frame)
        {
            self.to_guest.frame(worker, answer);
        }
    }

    fn datagram(&self, worker: u8, source_mac: Mac, packet: &Packet<'_>, udp: &UdpView, frame: &[u8]) {
        let start = packet.transport_start + 8;
        let Some(payload) = frame.get(start..start + udp.len) else { return };
        let answer = match udp.destination_port {
            DHCP_SERVER => dhcp::answer(self.addresses(), &self.dhcp, source_mac, payload),
            DHCPV6_SERVER => {
                dhcpv6::answer(self.addresses(), &self.dhcpv6, source_mac, packet.ip.source, payload)
            }
            dns::DNS_PORT => {
                let guest = Endpoint { address: packet.ip.source, port: udp.source_port };
                let gateway = Endpoint { address: packet.ip.destination, port: udp.destination_port };
                self.resolve(worker, guest, gateway, payload.to_vec());
                None
            }
            _ => None,
        };
        if let Some(answer) = answer {
            self.to_guest.frame(worker, answer);
        }
    }

    fn resolve(&self, worker: u8, guest: Endpoint, gateway: Endpoint, query: Vec<u8>) {
        let (dns, to_guest) = (self.dns.clone(), self.to_guest.clone());
        spawn_local(async move {
            if let Some(answer) = dns.answer(&query, dns::Transport::Udp(guest)).await {
                to_guest.datagram(worker, gateway, guest, &answer);
            }
        });
    }

    /// A stream that the guest has opened to a service of hythe's.
    fn serve_stream(
        &self,
        worker: u8,
        slot: Slot,
        service: Service,
        socket: OwnedFd,
        guest: Endpoint,
        remote: Endpoint,
    ) {
        let stream = std::os::unix::net::UnixStream::from(socket);
        let Ok(stream) = tokio::net::UnixStream::from_std(stream) else { return };
        match service {
            Service::Dns => {
                let dns = self.dns.clone();
                spawn_local(async move { dns.serve_stream(stream).await });
            }
            Service::Api => self.api.serve_guest(stream, guest.address.ip()),
            Service::Proxy => self.proxy.serve(stream, worker, slot, None),
            Service::Through => self.proxy.serve(stream, worker, slot, Some(remote)),
        }
    }

    fn fragment(&mut self, worker: u8, frame: &[u8]) {
        let to_guest = self.to_guest.clone();
        let outcome = self.fragments.frame(&to_guest.addresses, to_guest.guest_mac.get(), frame, Now::read());
        self.fragments_done(worker, outcome);
    }

    fn expire_fragments(&mut self) {
        let to_guest = self.to_guest.clone();
        let outcome = self.fragments.expire(&to_guest.addresses, to_guest.guest_mac.get(), Now::read());
        self.fragments_done(0, outcome);
    }

    fn fragments_done(&self, worker: u8, outcome: fragments::Outcome) {
        outcome.drops.into_iter().for_each(|reason| self.to_guest.counters.count_drop(reason));
        outcome.to_guest.into_iter().for_each(|frame| self.to_guest.frame(worker, frame));
        if let (Some(whole), Some(mailbox)) = (outcome.whole, self.to_guest.workers.get(worker as usize))
            && mailbox.put(ToWorker::FrameFromGuest(whole)).is_err()
        {
            self.to_guest.counters.count_drop(DropReason::WorkerFull);
        }
    }

    /// The host has a default route of IPv6 now, or none: the guest's router is one for it, or none (RFC 4861, 4.2).
    fn routes_ipv6(&mut self, routes: bool) {
        if std::mem::replace(&mut self.router.has_route, routes) != routes {
            self.advertise();
        }
    }

    /// The host asks others now, or looks elsewhere for short names: the guest hears of the domains from the router at once, by
    /// DHCP when it asks.
    fn follow_resolvers(&mut self, conf: &dns::ResolvConf) {
        let dns::ResolvConf { servers, search } = conf.clone();
        self.events.tell(Event::Resolvers { servers, search });
        let search = neighbours::search_names(&conf.search);
        if search == self.router.search {
            return;
        }
        self.router.search_in(search.clone());
        self.dhcp.search.clone_from(&search);
        self.dhcpv6.search = search;
        self.advertise();
    }

    fn advertise(&self) {
        if let Some(advertisement) = neighbours::router_advertisement(self.addresses(), &self.router) {
            self.to_guest.frame(0, advertisement);
        }
    }
}
