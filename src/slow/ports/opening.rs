//! Ports on their way into the table: all that were asked for together, or none.
//!
//! ```text
//! begin    conflicts with the table and among each other; descriptors        nothing has been done yet
//! bind     every socket of every port; random ports and ranges find theirs    nobody has been let in
//! listen   every listener
//! commit   rows of the table, and sockets for the workers
//! ```
//! `bind` and `listen` go port by port ([`Opening::step`]), so that the slow path can do something else in between. One that is
//! dropped on the way leaves nothing.

use std::collections::HashMap;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::exchange::mail::Publication;
use crate::host::listen;
use crate::policy::publish::{Binding, HostPort, PublishRequest, PublishedProtocol};

use super::refusal::Follower;
use super::table::{PortError, Publisher, Row, Table, bind_error, is_family_missing};

/// Random ports that others have are passed over so many times, as Docker does.
const RANDOM_TRIES: u32 = 10;

/// Ports that are being opened.
pub struct Opening {
    requests: Vec<PublishRequest>,
    publisher: Publisher,
    /// What is claimed by these requests themselves, by port.
    claimed: HashMap<(PublishedProtocol, u16), Vec<Binding>>,
    /// How many requests have their sockets.
    bound: usize,
    /// How often the present request has met a port that another program has.
    tries: u32,
    opened: Vec<Opened>,
    /// How many of the opened ones listen.
    listening: usize,
}

/// A binding and its sockets.
struct Opened {
    binding: Binding,
    sockets: Vec<OwnedFd>,
    /// Handles of them, where the port follows the guest.
    handles: Option<Vec<OwnedFd>>,
}

/// The sockets of a new row, each with the number of the worker that is to have it.
pub struct Delivery {
    /// What they serve.
    pub publication: Publication,
    /// What they bind.
    pub binding: Binding,
    /// The sockets.
    pub sockets: Vec<(usize, OwnedFd)>,
}

impl Opening {
    /// Begins, unless something that is known already is in the way.
    pub fn begin(
        mut requests: Vec<PublishRequest>,
        publisher: Publisher,
        table: &Table,
    ) -> Result<Self, PortError> {
        if let Some(range) = table.own_range(publisher) {
            for request in requests.iter_mut().filter(|request| request.host_port == HostPort::Random) {
                request.host_port = HostPort::FirstFree(*range.start(), *range.end());
            }
        }
        table.admit(publisher, &requests)?;
        table.afford(&requests)?;
        let mut opening = Self {
            requests,
            publisher,
            claimed: HashMap::new(),
            bound: 0,
            tries: 0,
            opened: Vec::new(),
            listening: 0,
        };
        for index in 0..opening.requests.len() {
            if let HostPort::One(port) = opening.requests[index].host_port {
                for binding in bindings(&opening.requests[index], port) {
                    if table.is_allocated(&binding) || opening.has_claimed(&binding) {
                        return Err(PortError::Allocated(binding));
                    }
                    opening.claim(binding);
                }
            }
        }
        Ok(opening)
    }

    fn claim(&mut self, binding: Binding) {
        self.claimed.entry((binding.protocol, binding.host_port)).or_default().push(binding);
    }

    fn has_claimed(&self, binding: &Binding) -> bool {
        let claimed = self.claimed.get(&(binding.protocol, binding.host_port)).into_iter().flatten();
        claimed.into_iter().any(|claimed| claimed.meets(binding))
    }

    /// Does the next piece of work. Returns whether there is more.
    pub fn step(&mut self, table: &mut Table) -> Result<bool, PortError> {
        if let Some(request) = self.requests.get(self.bound).cloned() {
            self.bind_next(&request, table)?;
            return Ok(true);
        }
        let Some(opened) = self.opened.get(self.listening) else { return Ok(false) };
        if opened.binding.protocol == PublishedProtocol::Tcp {
            for socket in &opened.sockets {
                listen::listen(socket.as_raw_fd()).map_err(|error| bind_error(opened.binding, error))?;
            }
        }
        self.listening += 1;
        Ok(true)
    }

    /// Binds the present request's port, or finds out that one of several is taken.
    fn bind_next(&mut self, request: &PublishRequest, table: &mut Table) -> Result<(), PortError> {
        let is_taken = |opening: &Self, table: &Table, port: u16| {
            let mut wanted = bindings(request, port);
            wanted.any(|binding| {
                table.is_allocated(&binding)
                    || opening.has_claimed(&binding)
                    || !table.allows(opening.publisher, &binding)
            })
        };
        let port = match request.host_port {
            HostPort::One(port) => return self.bind(request, port, table),
            HostPort::Random => {
                let mut ephemeral = table.ephemeral.clone();
                let drawn = ephemeral.draw(request.protocol, |port| is_taken(self, table, port));
                table.ephemeral = ephemeral;
                drawn.filter(|_| self.tries < RANDOM_TRIES).ok_or(PortError::NoRandom(self.tries))?
            }
            HostPort::FirstFree(first, last) => {
                let from = first.saturating_add(self.tries as u16);
                let left = (self.tries <= u32::from(last - first)).then_some(from..=last);
                left.into_iter().flatten().next().ok_or(PortError::RangeFull(first, last))?
            }
        };
        let taken = is_taken(self, table, port);
        let bound = if taken { Ok(()) } else { self.bind(request, port, table) };
        match bound {
            Err(PortError::InUse { .. }) => self.tries += 1,
            Ok(()) if taken => self.tries += 1,
            other => return other,
        }
        Ok(())
    }

    /// Binds the sockets of a request on a port, on all of its addresses or on none.
    fn bind(&mut self, request: &PublishRequest, port: u16, table: &Table) -> Result<(), PortError> {
        let mut opened = Vec::new();
        for binding in bindings(request, port) {
            match open(binding, table) {
                Ok(one) => opened.push(one),
                // A host without IPv6 publishes on IPv4 when no address was named.
                Err(error) if request.address.is_none() && is_family_missing(binding.address, &error) => {}
                Err(error) => return Err(bind_error(binding, error)),
            }
        }
        for binding in opened.iter().map(|one| one.binding) {
            if !matches!(request.host_port, HostPort::One(_)) {
                self.claim(binding);
            }
        }
        self.opened.append(&mut opened);
        self.bound += 1;
        self.tries = 0;
        Ok(())
    }

    /// Closes the sockets of one port. Returns whether there was one.
    pub fn close_one(&mut self) -> bool {
        self.opened.pop().is_some()
    }

    /// Puts everything into the table.
    pub fn commit(self, table: &mut Table) -> Vec<Delivery> {
        let publisher = self.publisher;
        let rows = self.opened.into_iter().map(|Opened { binding, sockets, handles }| {
            let publication = Publication {
                id: table.next_id(),
                guest_port: binding.guest_port,
                protocol: binding.protocol,
            };
            let descriptors = table.descriptors_of(binding.protocol);
            let follower = handles.map(Follower::new);
            table.insert(Row { publication, binding, publisher, held: None, follower, descriptors });
            let sockets = sockets.into_iter().enumerate();
            let sockets =
                sockets.map(|(index, socket)| (table.worker_of(publication, index), socket)).collect();
            Delivery { publication, binding, sockets }
        });
        rows.collect()
    }
}

fn bindings(request: &PublishRequest, host_port: u16) -> impl Iterator<Item = Binding> + use<> {
    let (guest_port, protocol) = (request.guest_port, request.protocol);
    let addresses: Vec<IpAddr> = request.addresses();
    addresses.into_iter().map(move |address| Binding { address, host_port, guest_port, protocol })
}

fn open(binding: Binding, table: &Table) -> std::io::Result<Opened> {
    let sockets = table.bind(&binding)?;
    let follows = table.follows && binding.protocol == PublishedProtocol::Tcp;
    let handles = follows.then(|| sockets.iter().map(OwnedFd::try_clone).collect()).transpose()?;
    Ok(Opened { binding, sockets, handles })
}
