//! The table of published ports: the one place that knows them.
//!
//! A row is a port of one address ([`Binding`]). Rows come by an [`Opening`](super::opening::Opening), all that belong together or none, and
//! go by their number. Sockets are the workers'; what the table keeps are handles of listeners that follow the guest
//! ([`super::refusal`]).
//!
//! Nothing here waits, and nothing looks at all rows but [`Table::matching`].

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::{Bound, RangeInclusive};
use std::os::fd::OwnedFd;

use tokio::sync::oneshot::{self, Receiver};

use crate::exchange::mail::Publication;
use crate::host::listen;
use crate::host::occupant::Occupant;
use crate::policy::guest_api::{GuestBounds, OutOfBounds};
use crate::policy::port_set::PortSet;
use crate::policy::publish::{ALL_ADDRESSES, Binding, HostPort, PublishRequest, PublishedProtocol};

use crate::port_broker::PortBroker;

use super::ephemeral::Ephemeral;
use super::held::Told;
use super::refusal::Follower;

/// Who has published a port, and may list and remove it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Publisher {
    /// The host's side: the start, and who may use the control socket.
    Host,
    /// The guest, at the gateway.
    Guest,
}

impl Publisher {
    /// Whether it may list and remove what another has published.
    fn may_touch(self, other: Self) -> bool {
        self == Self::Host || self == other
    }
}

/// A place of the host: an address, or all, and a port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// The address; none means all, of both families.
    pub address: Option<IpAddr>,
    /// The port.
    pub port: u16,
    /// The protocol.
    pub protocol: PublishedProtocol,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(address) => write!(f, "{}/{}", SocketAddr::new(address, self.port), self.protocol),
            None => write!(f, ":{}/{}", self.port, self.protocol),
        }
    }
}

/// A published port.
pub struct Row {
    /// What the workers know of it.
    pub publication: Publication,
    /// What it binds.
    pub binding: Binding,
    /// Who has published it.
    pub publisher: Publisher,
    /// Who holds it hears by this that it is gone.
    pub(super) held: Option<Told>,
    /// Its sockets' handles, where it follows the guest.
    pub(super) follower: Option<Follower>,
    /// Descriptors that it takes.
    pub(super) descriptors: u64,
}

/// All published ports.
pub struct Table {
    rows: BTreeMap<u32, Row>,
    /// Rows of a port, by their numbers.
    by_port: HashMap<(PublishedProtocol, u16), Vec<u32>>,
    next: u32,
    pub(super) ephemeral: Ephemeral,
    /// How many workers there are.
    pub(super) workers: usize,
    /// How many of them listen at a TCP port: all, or the first.
    listeners: usize,
    /// Whether TCP ports follow the guest.
    pub(super) follows: bool,
    /// Descriptors that are left for ports.
    descriptors_left: u64,
    /// What the guest may publish, if anything.
    guest_bounds: Option<GuestBounds>,
    /// The numbers of rows that are the guest's.
    guest_rows: BTreeSet<u32>,
    /// Binds what hythe may not bind any more.
    broker: Option<PortBroker>,
}

/// Why ports are not published, or not unpublished.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// Published already.
    #[error("Bind for {} failed: port is already allocated", .0.place())]
    Allocated(Binding),
    /// Another program has it.
    #[error("Bind for {} failed: address already in use{}; choose another port, or end the program that has it",
        .binding.place(), .occupant.as_ref().map_or(String::new(), |occupant| format!(" ({occupant})")))]
    InUse {
        /// What was to be bound.
        binding: Binding,
        /// Who has it, if that is known.
        occupant: Option<Occupant>,
    },
    /// Not for the guest.
    #[error(transparent)]
    OutOfBounds(#[from] OutOfBounds),
    /// It takes a right.
    #[error(
        "Bind for {} failed: permission denied; ports below 1024 take a hythe that was started by root, or with \
         CAP_NET_BIND_SERVICE: choose one above, or allow it (sysctl net.ipv4.ip_unprivileged_port_start={})",
        .0.place(), .0.host_port
    )]
    Privileged(Binding),
    /// The address is another host's.
    #[error("Bind for {} failed: the host does not have this address", .0.place())]
    NotHere(Binding),
    /// No port of a range is free.
    #[error("no port of {0}-{1} is free; choose another range")]
    RangeFull(u16, u16),
    /// No random port was free.
    #[error("no random port was free after {0} tries; name one")]
    NoRandom(u32),
    /// There are not enough descriptors.
    #[error("takes {needed} descriptors, and {left} are left for published ports (ulimit -n)")]
    Descriptors {
        /// So many are needed.
        needed: u64,
        /// So many are left.
        left: u64,
    },
    /// What is to be removed is not there.
    #[error("{0} is not published")]
    NotPublished(String),
    /// The workers do not take it.
    #[error("a worker takes no ports at the moment; nothing was changed, try again")]
    Busy,
    /// The kernel refuses for another reason.
    #[error("Bind for {} failed: {error}", .binding.place())]
    System {
        /// What was to be bound.
        binding: Binding,
        /// Why not.
        error: io::Error,
    },
}

impl Table {
    /// An empty table for ports that may take so many descriptors.
    pub fn new(ephemeral: Ephemeral, workers: usize, follows: bool, descriptors: u64) -> Self {
        Self {
            rows: BTreeMap::new(),
            by_port: HashMap::new(),
            next: 1,
            ephemeral,
            workers,
            listeners: workers,
            follows,
            descriptors_left: descriptors,
            guest_bounds: None,
            guest_rows: BTreeSet::new(),
            broker: None,
        }
    }

    /// Lets the guest publish, within bounds.
    #[must_use]
    pub fn with_guest_bounds(self, bounds: GuestBounds) -> Self {
        Self { guest_bounds: Some(bounds), ..self }
    }

    /// Has the first worker listen for all.
    #[must_use]
    pub fn with_one_listener(self) -> Self {
        Self { listeners: 1, ..self }
    }

    /// Which worker gets a socket of a port. A UDP port has one socket: ports are dealt in turn.
    pub(super) fn worker_of(&self, publication: Publication, index: usize) -> usize {
        let first = match publication.protocol {
            PublishedProtocol::Tcp => 0,
            PublishedProtocol::Udp => publication.id as usize,
        };
        (first + index) % self.workers
    }

    /// Has somebody who may still do it bind privileged ports.
    #[must_use]
    pub fn with_broker(self, broker: PortBroker) -> Self {
        Self { broker: Some(broker), ..self }
    }

    /// Whether somebody may publish these at all.
    pub(super) fn admit(&self, publisher: Publisher, requests: &[PublishRequest]) -> Result<(), PortError> {
        let (Publisher::Guest, Some(bounds)) = (publisher, &self.guest_bounds) else { return Ok(()) };
        requests.iter().try_for_each(|request| bounds.admit(request))?;
        let wanted: usize = requests.iter().map(|request| request.addresses().len()).sum();
        if self.guest_rows.len() + wanted > bounds.most {
            return Err(OutOfBounds::TooMany(bounds.most).into());
        }
        Ok(())
    }

    /// The ports from which somebody who names none gets one, where that is not the host's own range.
    pub(super) fn own_range(&self, publisher: Publisher) -> Option<RangeInclusive<u16>> {
        let bounds = self.guest_bounds.as_ref().filter(|_| publisher == Publisher::Guest)?;
        (!self.ephemeral.meets(&bounds.ports)).then(|| bounds.ports.clone())
    }

    /// Whether a port that nobody named may be somebody's.
    pub(super) fn allows(&self, publisher: Publisher, binding: &Binding) -> bool {
        let bounds = self.guest_bounds.as_ref().filter(|_| publisher == Publisher::Guest);
        bounds.is_none_or(|bounds| bounds.allows(binding))
    }

    /// Binds the sockets of a port.
    pub(super) fn bind(&self, binding: &Binding) -> io::Result<Vec<OwnedFd>> {
        let bound = listen::bind(binding.address, binding.host_port, binding.protocol, self.listeners);
        match (bound, &self.broker) {
            (Err(error), Some(broker)) if error.kind() == io::ErrorKind::PermissionDenied => {
                broker.bind(binding.endpoint(), binding.protocol, self.listeners)
            }
            (bound, _) => bound,
        }
    }

    /// Descriptors that ports may take from now on, besides those that they have.
    pub fn allow_descriptors(&mut self, descriptors: u64) {
        self.descriptors_left = descriptors;
    }

    /// Descriptors that all ports take.
    pub fn descriptors(&self) -> u64 {
        self.rows.values().map(|row| row.descriptors).sum()
    }

    /// Descriptors that a port of one address takes: its listeners, and a handle of each where it follows the guest.
    pub(super) fn descriptors_of(&self, protocol: PublishedProtocol) -> u64 {
        match protocol {
            PublishedProtocol::Tcp => self.listeners as u64 * (1 + u64::from(self.follows)),
            PublishedProtocol::Udp => 1,
        }
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// A row by its number.
    pub fn get(&self, id: u32) -> Option<&Row> {
        self.rows.get(&id)
    }

    /// A row by its number, if somebody may see it.
    pub fn seen_by(&self, id: u32, who: Publisher) -> Option<&Row> {
        self.get(id).filter(|row| who.may_touch(row.publisher))
    }

    /// Rows after a number that somebody may see, by number: the table may change between two looks.
    pub fn after(&self, id: u32, who: Publisher) -> Box<dyn Iterator<Item = &Row> + '_> {
        let after = (Bound::Excluded(id), Bound::Unbounded);
        match who {
            Publisher::Host => Box::new(self.rows.range(after).map(|(_, row)| row)),
            Publisher::Guest => Box::new(self.guest_rows.range(after).filter_map(|id| self.rows.get(id))),
        }
    }

    /// How many rows somebody may see.
    pub fn count(&self, who: Publisher) -> usize {
        match who {
            Publisher::Host => self.rows.len(),
            Publisher::Guest => self.guest_rows.len(),
        }
    }

    /// Rows at a place of the host that somebody may remove.
    pub(super) fn at(&self, place: &Place, who: Publisher) -> Vec<u32> {
        let addresses = match place.address {
            Some(address) => vec![address],
            None => ALL_ADDRESSES.to_vec(),
        };
        let ids = self.by_port.get(&(place.protocol, place.port)).into_iter().flatten();
        let rows = ids.filter_map(|id| Some((*id, self.seen_by(*id, who)?)));
        rows.filter(|(_, row)| addresses.contains(&row.binding.address)).map(|(id, _)| id).collect()
    }

    /// Has somebody hear when these rows are gone.
    pub(super) fn tell_removal(&mut self, ids: &[u32]) -> Vec<Receiver<Infallible>> {
        let mut rows = Vec::new();
        for id in ids {
            if let Some(row) = self.rows.get_mut(id) {
                let (told, removed) = oneshot::channel();
                row.held = Some(told);
                rows.push(removed);
            }
        }
        rows
    }

    /// Whether a row is in the way of a binding.
    pub(super) fn is_allocated(&self, binding: &Binding) -> bool {
        let ids = self.by_port.get(&(binding.protocol, binding.host_port)).into_iter().flatten();
        ids.filter_map(|id| self.rows.get(id)).any(|row| row.binding.meets(binding))
    }

    /// Ports that flows of the guest must leave alone: the administrator's, and the published ones.
    pub fn excluded(&self) -> PortSet {
        let mut excluded = self.ephemeral.reserved().clone();
        self.by_port.keys().for_each(|(_, port)| excluded.insert(*port));
        excluded
    }

    /// Whether flows of the guest must leave a port alone.
    pub(super) fn excludes(&self, port: u16) -> bool {
        let published = [PublishedProtocol::Tcp, PublishedProtocol::Udp]
            .iter()
            .any(|protocol| self.by_port.contains_key(&(*protocol, port)));
        published || self.ephemeral.reserved().contains(port)
    }

    /// Is there enough of what ports take? Says which descriptors are missing otherwise.
    pub(super) fn afford(&self, requests: &[PublishRequest]) -> Result<(), PortError> {
        let each = |request: &PublishRequest| {
            self.descriptors_of(request.protocol) * if request.address.is_some() { 1 } else { 2 }
        };
        let (needed, left) = (requests.iter().map(each).sum(), self.descriptors_left);
        if needed > left { Err(PortError::Descriptors { needed, left }) } else { Ok(()) }
    }

    /// The number of the next row.
    pub(super) fn next_id(&mut self) -> u32 {
        loop {
            let id = self.next;
            self.next = self.next.wrapping_add(1).max(1);
            // After four thousand million ports, some of the first may still be there.
            if !self.rows.contains_key(&id) {
                return id;
            }
        }
    }

    pub(super) fn insert(&mut self, row: Row) {
        let Row { publication: Publication { id, .. }, binding, .. } = row;
        self.descriptors_left = self.descriptors_left.saturating_sub(row.descriptors);
        if row.publisher == Publisher::Guest {
            self.guest_rows.insert(id);
        }
        self.by_port.entry((binding.protocol, binding.host_port)).or_default().push(id);
        self.rows.insert(id, row);
    }

    /// Takes a row out.
    pub(super) fn remove(&mut self, id: u32) -> Option<Row> {
        let row = self.rows.remove(&id)?;
        self.descriptors_left += row.descriptors;
        self.guest_rows.remove(&id);
        let key = (row.binding.protocol, row.binding.host_port);
        if let Some(ids) = self.by_port.get_mut(&key) {
            ids.retain(|known| *known != id);
            if ids.is_empty() {
                self.by_port.remove(&key);
            }
        }
        Some(row)
    }

    /// The rows that a request means and its publisher may remove. Without a port of the host, whichever leads to the
    /// guest's.
    pub fn matching(&self, request: &PublishRequest, publisher: Publisher) -> Vec<u32> {
        let is_meant = |row: &Row| publisher.may_touch(row.publisher) && request.covers(&row.binding);
        match request.host_port {
            HostPort::One(port) => {
                let ids = self.by_port.get(&(request.protocol, port)).into_iter().flatten();
                ids.filter(|id| self.rows.get(id).is_some_and(is_meant)).copied().collect()
            }
            HostPort::Random | HostPort::FirstFree(..) => {
                self.after(0, publisher).filter(|row| is_meant(row)).map(|row| row.publication.id).collect()
            }
        }
    }

    /// The guest refuses at a port. Returns the port and the refusal's number if that is new.
    pub(super) fn guest_refuses(&mut self, id: u32) -> Option<(Publication, u32)> {
        let row = self.rows.get_mut(&id)?;
        let refusal = row.follower.as_mut()?.guest_refuses()?;
        Some((row.publication, refusal))
    }

    /// The guest listens at a port.
    pub(super) fn guest_listens(&mut self, id: u32) {
        let Some(row) = self.rows.get_mut(&id) else { return };
        if let Some(error) = row.follower.as_mut().and_then(Follower::guest_listens) {
            tracing::warn!(port = %row.binding, %error, "a published port cannot listen again");
        }
    }

    /// Whether a refusal lasts.
    pub(super) fn lasts(&self, id: u32, refusal: u32) -> bool {
        let follower = self.rows.get(&id).and_then(|row| row.follower.as_ref());
        follower.is_some_and(|follower| follower.lasts(refusal))
    }
}

/// The error of a bind in the words of the table.
pub(super) fn bind_error(binding: Binding, error: io::Error) -> PortError {
    if error.kind() == io::ErrorKind::PermissionDenied && binding.host_port < 1024 {
        // Ports above take no right: something else forbids them, as a security module does.
        return PortError::Privileged(binding);
    }
    match error.raw_os_error() {
        Some(libc::EADDRINUSE) => PortError::InUse { binding, occupant: None },
        Some(libc::EADDRNOTAVAIL) => PortError::NotHere(binding),
        _ => PortError::System { binding, error },
    }
}

/// Whether a family that nobody named is missing from the host.
pub(super) fn is_family_missing(address: IpAddr, error: &io::Error) -> bool {
    address.is_ipv6() && matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}
