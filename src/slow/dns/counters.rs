//! What DNS has done.

use std::cell::Cell;

/// Counts since the start, each named after its cause.
#[derive(Default, Debug)]
pub struct Counters {
    /// Messages from the guest.
    pub queries: Cell<u64>,
    /// Messages that got no answer: too short, or not a query.
    pub garbage: Cell<u64>,
    /// Messages answered with a code alone: malformed, another opcode, a transfer.
    pub unfit: Cell<u64>,
    /// Queries for names of the link.
    pub own_names: Cell<u64>,
    /// Queries handed to the host's resolvers.
    pub forwarded: Cell<u64>,
    /// Queries that were still under way when they came again.
    pub retransmissions: Cell<u64>,
    /// Queries refused because too many were under way.
    pub over_budget: Cell<u64>,
    /// Forwarded queries that nobody answered.
    pub unanswered: Cell<u64>,
    /// Times that a resolver let its time pass.
    pub server_timeouts: Cell<u64>,
    /// Times that a resolver could not be reached, or refused the port.
    pub server_unreachable: Cell<u64>,
    /// Answers of a resolver that only count when no other does better: SERVFAIL, NOTIMP, REFUSED.
    pub server_failures: Cell<u64>,
    /// Replies from a resolver's address that do not answer what was asked.
    pub mismatched: Cell<u64>,
    /// Streams served.
    pub streams: Cell<u64>,
    /// Streams closed at once because there were too many.
    pub streams_refused: Cell<u64>,
    /// Streams closed because nothing moved on them.
    pub streams_idle: Cell<u64>,
}

/// One more.
pub(super) fn count(counter: &Cell<u64>) {
    counter.set(counter.get() + 1);
}
