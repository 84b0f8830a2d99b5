//! The host's network changes: the workers' rules follow, connections that are over are ended, and it is told.
//!
//! ```text
//! kernel ──▶ news ──▶ addresses    the workers hear at once what is the host's own
//!                │                 those that went and stay away: connections from them are reset
//!                ├──▶ routes       one that overlaps the guest's subnet is told; default routes: the guest's router is one
//!                │                 for IPv6 where the host has one
//!                └──▶ all          one line of the log, one event; answers of resolvers are forgotten, and resolv.conf is read
//!                                  again: it may name a link. The hosts file has nothing to do with the network.
//! ```
//! Nothing polls. News that comes while the last is worked on is taken together, and looks have a pause between them: a storm of
//! changes costs as much as its length, and not as its number.
//!
//! Most of what a change means for the guest's traffic is the kernel's business, since nothing here binds an address: a new
//! connection takes the route that there is, and a datagram too.

use std::cell::RefCell;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use tokio::sync::watch;
use tokio::task::spawn_local;
use tokio::time::{Instant, sleep};

use super::current_addresses::CurrentAddresses;
use super::dns::Dns;
use super::events::Events;
use super::proxy::Proxy;
use super::readable::ReadableWatch;
use crate::control::shapes::Event;
use crate::frame::address::Address;
use crate::netlink::{HostRoute, NetworkWatch, News, interface_index};
use crate::policy::addresses::Addresses;
use crate::policy::outbound::Interface;

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(50);

/// After a failure.
const AGAIN: Duration = Duration::from_secs(1);

/// An address that is back within this time was not gone: some programs remove what they are about to set.
const GRACE: Duration = Duration::from_millis(250);

/// Those of some addresses that are not among others, which are sorted.
fn missing(of: &[Address], among: &[Address]) -> Vec<Address> {
    of.iter().filter(|address| among.binary_search(address).is_err()).copied().collect()
}

/// Whether the host has an address at this moment, as far as binding to it tells.
fn is_here(address: IpAddr) -> bool {
    // Reserved (RFC 1112, 4), and for discarding (RFC 6666): nobody's.
    let nobodys: IpAddr = if address.is_ipv4() {
        Ipv4Addr::new(240, 0, 0, 1).into()
    } else {
        Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 1).into()
    };
    // Where what is nobody's can be bound (ip_nonlocal_bind) it tells nothing.
    UdpSocket::bind((address, 0)).is_ok() && UdpSocket::bind((nobodys, 0)).is_err()
}

/// Follows the host's network.
pub struct Network {
    current: Rc<CurrentAddresses>,
    events: Rc<Events>,
    dns: Dns,
    proxy: Proxy,
    /// Whether the host has default routes: of IPv4, of IPv6.
    has_default: watch::Sender<[bool; 2]>,
    /// Default routes, and pieces of them, as they were last seen.
    wide: RefCell<Vec<HostRoute>>,
    /// Overlaps that were told, and are there.
    overlaps: RefCell<Vec<(IpNet, IpNet)>>,
}

impl Network {
    /// Follows on from the start, when the host had these default routes.
    pub fn new(
        current: Rc<CurrentAddresses>,
        events: Rc<Events>,
        dns: Dns,
        proxy: Proxy,
        has_default: [bool; 2],
    ) -> Self {
        let has_default = watch::Sender::new(has_default);
        Self {
            current,
            events,
            dns,
            proxy,
            has_default,
            wide: RefCell::default(),
            overlaps: RefCell::default(),
        }
    }

    /// What was learnt by way of another network may be wrong now. `ways`: the world may be reached in other ways.
    fn forget(&self, ways: bool) {
        self.dns.network_has_changed(ways);
        if ways {
            self.proxy.network_has_changed();
        }
    }

    /// Whether the host has default routes, and when that changes.
    pub fn default_routes(&self) -> watch::Receiver<[bool; 2]> {
        self.has_default.subscribe()
    }

    /// Runs for ever; returns only when nothing can be learnt at all, with the reason.
    pub async fn follow(&self, watch: NetworkWatch) -> io::Error {
        let mut watch = match ReadableWatch::new(watch) {
            Ok(watch) => watch,
            Err(error) => return error,
        };
        // Also before the first change: everything was read when nobody watched.
        let mut news = News { lost: true, ..News::default() };
        loop {
            let begun = Instant::now();
            let looked = self.look(watch.get(), &mut news).await;
            // Where there is very much to read, others have as much time.
            sleep(PAUSE.max(begun.elapsed())).await;
            let next = match looked {
                Ok(()) => watch.changed().await.and_then(|()| watch.get().news()),
                Err(error) => Err(error),
            };
            news = match next {
                Ok(news) => news,
                Err(error) => {
                    tracing::warn!(%error, "the host's network cannot be read; trying again");
                    sleep(AGAIN).await;
                    News { lost: true, ..News::default() }
                }
            };
            self.tell(&news);
        }
    }

    /// Takes over what has changed.
    async fn look(&self, watch: &mut NetworkWatch, news: &mut News) -> io::Result<()> {
        // Another default route may be in the place of the one before.
        let mut ways = news.default_route;
        if news.links > 0 || news.lost {
            ways |= self.follow_outbound_interface().await;
        }
        if news.addresses > 0 || news.lost {
            ways |= self.set_addresses(watch.addresses()?, std::mem::take(&mut news.removed)).await;
        }
        if news.default_route || news.link_lost || news.lost {
            let network = watch.network()?;
            self.set_default_routes(network.has_default);
            // Those of IPv4 go with their link, without a word, and another one may be left.
            ways |= self.wide.replace(network.wide.clone()) != network.wide;
            self.overlaps.borrow_mut().retain(|(route, _)| network.networks.contains(route));
            network.networks.iter().for_each(|route| self.check_overlap(*route));
        }
        self.overlaps.borrow_mut().retain(|(route, _)| !news.old_routes.contains(route));
        news.new_routes.iter().for_each(|route| self.check_overlap(*route));
        if ways {
            self.forget(true);
        }
        Ok(())
    }

    fn tell(&self, news: &News) {
        let News { links, routes, rules, lost, .. } = *news;
        if links + routes + rules > 0 || lost {
            tracing::info!(links, routes, rules, "the host's network has changed");
            self.forget(false);
            self.events.tell(Event::Network { links, routes, rules });
        }
    }

    /// The host has these addresses; `went` are some that it had since the last look. Returns whether the world may be reached in other
    /// ways now: the links of containers come and go with addresses that lead nowhere.
    async fn set_addresses(&self, own: Vec<Address>, mut went: Vec<Address>) -> bool {
        let before = self.current.get();
        let (added, removed) = (missing(&own, &before.own), missing(&before.own, &own));
        went.extend(&removed);
        let ways = added.iter().chain(&removed).any(|address| !address.is_link_local());
        if !added.is_empty() || !removed.is_empty() {
            let ips = |of: &[Address]| of.iter().map(|address| address.ip()).collect::<Vec<IpAddr>>();
            let (added, removed) = (ips(&added), ips(&removed));
            tracing::info!(?added, ?removed, "the host's addresses have changed");
            self.current.change(|addresses| addresses.own = own).await;
            self.dns.learn(self.current.get());
            self.events.tell(Event::Addresses { added, removed });
        }
        if !went.is_empty() {
            let (current, proxy) = (self.current.clone(), self.proxy.clone());
            spawn_local(async move {
                sleep(GRACE).await;
                // Twice: a connection may be on its way from one worker to another, or waits to be accepted.
                for _ in 0..2 {
                    let mut gone = missing(&went, &current.get().own);
                    // It may have come back since the last look, and have connections already.
                    gone.retain(|address| !is_here(address.ip()));
                    if !gone.is_empty() {
                        proxy.addresses_gone(&gone);
                        current.tell_gone(&Arc::from(gone)).await;
                    }
                    sleep(AGAIN).await;
                }
            });
        }
        ways
    }

    /// The interface that the user has chosen comes again under another number. Returns whether it does.
    async fn follow_outbound_interface(&self) -> bool {
        let Some(known) = self.current.get().outbound.interface.clone() else { return false };
        let Some(index) = interface_index(&known.name).filter(|index| *index != known.index) else {
            return false;
        };
        tracing::info!(interface = known.name, "the interface by which traffic leaves is there again");
        let set = |addresses: &mut Addresses| {
            addresses.outbound.interface = Some(Interface { index, ..known });
        };
        self.current.change(set).await;
        self.dns.learn(self.current.get());
        true
    }

    fn set_default_routes(&self, now: [bool; 2]) {
        let changed = self.has_default.send_if_modified(|known| std::mem::replace(known, now) != now);
        if changed {
            let [ipv4, ipv6] = now;
            tracing::info!(ipv4, ipv6, "the host's default routes have changed");
            self.events.tell(Event::DefaultRoutes { ipv4, ipv6 });
        }
    }

    /// Tells a route of the host that is in the way of the guest's subnet; each once.
    fn check_overlap(&self, route: IpNet) {
        /// Overlaps that are remembered.
        const MOST: usize = 64;
        let addresses = self.current.get();
        for subnet in addresses.families().map(|family| family.subnet) {
            let overlaps = route.contains(&subnet.network()) || subnet.contains(&route.network());
            let mut told = self.overlaps.borrow_mut();
            if overlaps && !told.contains(&(route, subnet)) && told.len() < MOST {
                told.push((route, subnet));
                tracing::warn!(
                    %route, %subnet,
                    "a route of the host overlaps the guest's subnet: the guest does not reach that network; choose another by --subnet"
                );
                self.events.tell(Event::Overlap { route, subnet });
            }
        }
    }
}
