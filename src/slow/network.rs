//! The host's network changes: the workers' rules follow, connections that are over are ended, and it is told.
//!
//! ```text
//! kernel ──▶ news ──▶ addresses    the workers hear at once what is the host's own
//!                │                 those that went and stay away: connections from them are reset
//!                ├──▶ routes       one that overlaps the guest's subnet is told; default routes: the guest's router is one
//!                │                 for IPv6 where the host has one
//!                └──▶ all          one line of the log, one event
//! ```
//! Nothing polls. News that comes while the last is worked on is taken together, and looks have a pause between them: a storm of
//! changes costs as much as its length, and not as its number.
//!
//! Most of what a change means for the guest's traffic is the kernel's business, since nothing here binds an address: a new
//! connection takes the route that there is, and a datagram too.

use std::cell::RefCell;
use std::io;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use tokio::sync::watch;
use tokio::task::spawn_local;
use tokio::time::sleep;

use super::current_addresses::CurrentAddresses;
use super::events::Events;
use super::readable::ReadableWatch;
use crate::control::shapes::Event;
use crate::frame::address::Address;
use crate::netlink::{NetworkWatch, News};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(50);

/// An address that is back within this time was not gone: some programs remove what they are about to set.
const GRACE: Duration = Duration::from_millis(250);

/// Those of some addresses that are not among others, which are sorted.
fn missing(of: &[Address], among: &[Address]) -> Vec<Address> {
    of.iter().filter(|address| among.binary_search(address).is_err()).copied().collect()
}

/// Follows the host's network.
pub struct Network {
    current: Rc<CurrentAddresses>,
    events: Rc<Events>,
    /// Whether the host has default routes: of IPv4, of IPv6.
    has_default: watch::Sender<[bool; 2]>,
    /// Overlaps that were told.
    overlaps: RefCell<Vec<(IpNet, IpNet)>>,
}

impl Network {
    /// Follows on from the start, when the host had these default routes.
    pub fn new(current: Rc<CurrentAddresses>, events: Rc<Events>, has_default: [bool; 2]) -> Self {
        Self { current, events, has_default: watch::Sender::new(has_default), overlaps: RefCell::default() }
    }

    /// Whether the host has default routes, and when that changes.
    pub fn default_routes(&self) -> watch::Receiver<[bool; 2]> {
        self.has_default.subscribe()
    }

    /// Runs for ever; returns only when changes cannot be learnt any more, with the reason.
    pub async fn follow(&self, watch: NetworkWatch) -> io::Error {
        let Err(error) = self.try_follow(watch).await;
        error
    }

    async fn try_follow(&self, watch: NetworkWatch) -> io::Result<std::convert::Infallible> {
        let mut watch = ReadableWatch::new(watch)?;
        // Also before the first change: everything was read when nobody watched.
        let mut news = News { lost: true, ..News::default() };
        loop {
            if news.addresses > 0 || news.lost {
                self.set_addresses(watch.get().addresses()?, std::mem::take(&mut news.removed)).await;
            }
            if news.default_route || news.lost {
                let network = watch.get().network()?;
                self.set_default_routes(network.has_default);
                network.networks.iter().for_each(|route| self.check_overlap(*route));
            }
            news.new_routes.iter().for_each(|route| self.check_overlap(*route));
            sleep(PAUSE).await;
            watch.changed().await?;
            news = watch.get().news()?;
            self.tell(&news);
        }
    }

    fn tell(&self, news: &News) {
        let News { links, routes, rules, .. } = *news;
        if links + routes + rules > 0 {
            tracing::debug!(links, routes, rules, "the host's network has changed");
            self.events.tell(Event::Network { links, routes, rules });
        }
    }

    /// The host has these addresses; `went` are some that it had since the last look.
    async fn set_addresses(&self, own: Vec<Address>, mut went: Vec<Address>) {
        let before = self.current.get();
        let (added, removed) = (missing(&own, &before.own), missing(&before.own, &own));
        went.extend(&removed);
        if !added.is_empty() || !removed.is_empty() {
            let ips = |of: &[Address]| of.iter().map(|address| address.ip()).collect::<Vec<IpAddr>>();
            let (added, removed) = (ips(&added), ips(&removed));
            tracing::info!(?added, ?removed, "the host's addresses have changed");
            self.current.change(|addresses| addresses.own = own).await;
            self.events.tell(Event::Addresses { added, removed });
        }
        if !went.is_empty() {
            let current = self.current.clone();
            spawn_local(async move {
                sleep(GRACE).await;
                let gone = missing(&went, &current.get().own);
                if !gone.is_empty() {
                    current.tell_gone(&Arc::from(gone)).await;
                }
            });
        }
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
