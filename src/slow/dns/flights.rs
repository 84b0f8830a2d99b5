//! What is under way, bounded, and each thing once.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;

use crate::frame::address::Endpoint;

/// What makes a datagram a retransmission: the same endpoint asks the same under the same ID.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Flight {
    /// The guest's endpoint.
    pub guest: Endpoint,
    /// The message ID.
    pub id: u16,
    /// The question as it was asked.
    pub question: Box<[u8]>,
}

/// The things under way.
pub(super) struct Flights {
    limit: usize,
    under_way: Cell<usize>,
    known: RefCell<HashSet<Flight>>,
}

/// Whether something may go.
pub(super) enum Admission<'f> {
    /// It may, until the ticket is dropped.
    Go(Ticket<'f>),
    /// It already goes.
    Duplicate,
    /// There are too many.
    Full,
}

/// The place of one thing under way, given back when dropped.
pub(super) struct Ticket<'f> {
    flights: &'f Flights,
    flight: Option<Flight>,
}

impl Flights {
    /// At most `limit` at a time.
    pub fn new(limit: usize) -> Self {
        Self { limit, under_way: Cell::new(0), known: RefCell::default() }
    }

    /// How many are under way.
    #[cfg(test)]
    pub fn under_way(&self) -> usize {
        self.under_way.get()
    }

    /// Asks for a place; a thing without identity is never a duplicate.
    pub fn admit(&self, flight: Option<Flight>) -> Admission<'_> {
        if flight.as_ref().is_some_and(|flight| self.known.borrow().contains(flight)) {
            return Admission::Duplicate;
        }
        if self.under_way.get() >= self.limit {
            return Admission::Full;
        }
        self.under_way.set(self.under_way.get() + 1);
        self.known.borrow_mut().extend(flight.clone());
        Admission::Go(Ticket { flights: self, flight })
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.flights.under_way.set(self.flights.under_way.get() - 1);
        if let Some(flight) = &self.flight {
            self.flights.known.borrow_mut().remove(flight);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[allow(clippy::unnecessary_wraps, reason = "what admit takes")]
    fn flight(port: u16, id: u16) -> Option<Flight> {
        let guest = "192.168.65.3:0".parse::<std::net::SocketAddr>().unwrap();
        Some(Flight { guest: Endpoint { port, ..guest.into() }, id, question: Box::default() })
    }

    #[test]
    fn a_flight_is_admitted_once_until_it_has_landed() {
        let flights = Flights::new(10);
        let Admission::Go(ticket) = flights.admit(flight(1000, 7)) else { panic!("refused") };
        assert!(matches!(flights.admit(flight(1000, 7)), Admission::Duplicate));
        for other in [flight(1001, 7), flight(1000, 8), None] {
            assert!(matches!(flights.admit(other), Admission::Go(_)));
        }
        drop(ticket);
        assert!(matches!(flights.admit(flight(1000, 7)), Admission::Go(_)));
    }

    #[test]
    fn no_more_than_the_limit_are_under_way_and_nothing_stays_behind() {
        let flights = Flights::new(2);
        for _ in 0..3 {
            let tickets = [flights.admit(flight(1, 1)), flights.admit(None)];
            assert!(tickets.iter().all(|ticket| matches!(ticket, Admission::Go(_))));
            assert!(matches!(flights.admit(flight(2, 2)), Admission::Full));
        }
        assert_eq!((flights.under_way.get(), flights.known.borrow().len()), (0, 0));
    }
}
