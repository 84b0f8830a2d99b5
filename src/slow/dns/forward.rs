//! Which resolver is asked, when, and whose answer counts.
//!
//! The resolvers are asked in order. Each has [`Patience::attempt`] alone with the query; then the next is asked too,
//! while the earlier ones may still answer: a resolver that takes three seconds over a recursion is slow, not dead. When
//! all were asked and none spoke, they are asked once more, until [`Patience::total`] has passed. One that cannot be
//! reached, or refuses the port, is passed over at once, and so is one that says SERVFAIL, NOTIMP or REFUSED; the last
//! such answer is given where nobody does better. Every other answer is the answer, whatever its code.
//!
//! A resolver that let its time pass is asked after the others for a while. Then one query tries it again, and gives it
//! [`Patience::trial`] before the next one is asked too; so a dead resolver costs one query in such a while that short time, and
//! the others nothing.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use tokio::time::{Instant, timeout_at};
use tracing::debug;

use super::message::{self, Query};
use super::race::Race;
use super::upstream::Upstream;
use super::{DnsError, Patience, Transport};
use crate::observe::counters::{Counters, Metric};

/// Resolvers whose silence is remembered. Who changes more than these in [`Patience::silent_last`] is asked anew.
const REMEMBERED_MAX: usize = 64;

/// Asks resolvers and remembers how they behaved.
pub(super) struct Forwarder {
    patience: Patience,
    upstream: Upstream,
    /// Resolvers that kept silent and have not spoken since, and until when they are asked last.
    silent: RefCell<HashMap<SocketAddr, Instant>>,
}

/// Why there is no answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Unanswered {
    /// There is nobody to ask.
    NoServers,
    /// Nobody could be asked.
    Unreachable,
    /// Somebody was asked and kept silent.
    Silent,
}

impl Forwarder {
    /// One that knows nothing of any resolver yet.
    pub fn new(patience: Patience) -> Result<Self, DnsError> {
        Ok(Self { patience, upstream: Upstream::new()?, silent: RefCell::default() })
    }

    /// The answer of these resolvers, byte for byte but for the ID, which is the guest's, and which of them gave it.
    pub async fn forward(
        &self,
        query: &Query<'_>,
        servers: &[SocketAddr],
        transport: Transport,
        counters: &Counters,
    ) -> Result<(SocketAddr, Vec<u8>), Unanswered> {
        let mut why = if servers.is_empty() { Unanswered::NoServers } else { Unanswered::Unreachable };
        let deadline = Instant::now() + self.patience.total;
        let mut waiting = self.in_order(servers);
        let mut again = VecDeque::new();
        let mut attempts = Race::default();
        let mut poor = None;
        while let Some(server) = waiting.pop_front() {
            attempts
                .push(async move { (server, self.upstream.ask(server, query, transport, counters).await) });
            let until = deadline.min(Instant::now() + self.time_alone(server));
            loop {
                let Ok((from, result)) = timeout_at(until, attempts.next()).await else {
                    counters.add(Metric::DnsServerTimeouts, 1);
                    self.remember_silence(server);
                    again.push_back(server);
                    why = Unanswered::Silent;
                    break;
                };
                match result {
                    Ok(reply) => {
                        self.forget_silence(from);
                        if !is_poor(&reply) {
                            return Ok((from, reply));
                        }
                        counters.add(Metric::DnsServerFailures, 1);
                        poor = Some((from, reply));
                    }
                    Err(error) => {
                        counters.add(Metric::DnsServerUnreachable, 1);
                        debug!(server = %from, %error, "a resolver of the host cannot be asked");
                    }
                }
                again.retain(|server| *server != from);
                if from == server {
                    break;
                }
            }
            if Instant::now() >= deadline {
                break;
            }
            if waiting.is_empty() && poor.is_none() {
                waiting.append(&mut again);
            }
        }
        poor.ok_or(why)
    }

    /// What goes on without queries. Runs for ever.
    pub async fn run(&self) {
        self.upstream.close_spare().await;
    }

    fn in_order(&self, servers: &[SocketAddr]) -> VecDeque<SocketAddr> {
        let silent = self.silent.borrow();
        let now = Instant::now();
        let is_silent = |server: &&SocketAddr| silent.get(*server).is_some_and(|until| *until > now);
        let (last, first): (Vec<_>, Vec<_>) = servers.iter().partition(is_silent);
        first.into_iter().chain(last).copied().collect()
    }

    /// How long a resolver is alone with a query. Whoever tries one again that kept silent does so for all others too.
    fn time_alone(&self, server: SocketAddr) -> Duration {
        let now = Instant::now();
        match self.silent.borrow_mut().get_mut(&server) {
            Some(until) if *until <= now => {
                *until = now + self.patience.silent_last;
                self.patience.trial
            }
            _ => self.patience.attempt,
        }
    }

    /// One that let its time pass is asked last for a while.
    pub fn remember_silence(&self, server: SocketAddr) {
        let until = Instant::now() + self.patience.silent_last;
        let mut silent = self.silent.borrow_mut();
        silent.insert(server, until);
        if silent.len() > REMEMBERED_MAX
            && let Some(oldest) = silent.iter().min_by_key(|(_, until)| **until).map(|(server, _)| *server)
        {
            silent.remove(&oldest);
        }
    }

    fn forget_silence(&self, server: SocketAddr) {
        self.silent.borrow_mut().remove(&server);
    }
}

/// Whether another resolver might do better: this one failed, or will not serve, but says nothing about the name.
fn is_poor(reply: &[u8]) -> bool {
    matches!(
        message::response_code(reply),
        ResponseCode::ServFail | ResponseCode::NotImp | ResponseCode::Refused
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silent_resolvers_come_last_in_their_own_order_and_are_forgotten_in_time() {
        let server = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let forwarder = Forwarder::new(Patience::default()).unwrap();
        forwarder.remember_silence(server(1));
        forwarder.remember_silence(server(3));
        assert_eq!(forwarder.in_order(&[1, 2, 3, 4].map(server)), [2, 4, 1, 3].map(server));
        forwarder.forget_silence(server(1));
        assert_eq!(forwarder.in_order(&[1, 2, 3, 4].map(server)), [1, 2, 4, 3].map(server));

        for port in 1..=1000 {
            forwarder.remember_silence(server(port));
        }
        assert_eq!(forwarder.silent.borrow().len(), REMEMBERED_MAX);
        assert_eq!(forwarder.in_order(&[1000, 1].map(server)), [1, 1000].map(server));
    }

    #[test]
    fn one_that_kept_silent_is_tried_for_a_short_time_by_one_query() {
        let server = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let patience = Patience { silent_last: Duration::from_millis(50), ..Patience::default() };
        let forwarder = Forwarder::new(patience).unwrap();
        assert_eq!(forwarder.time_alone(server(1)), patience.attempt);
        forwarder.remember_silence(server(1));
        assert_eq!(forwarder.in_order(&[1, 2].map(server)), [2, 1].map(server));
        assert_eq!(forwarder.time_alone(server(1)), patience.attempt, "asked last, it is given its time");
        std::thread::sleep(patience.silent_last);
        assert_eq!(forwarder.in_order(&[1, 2].map(server)), [1, 2].map(server));
        assert_eq!(forwarder.time_alone(server(1)), patience.trial);
        assert_eq!(forwarder.in_order(&[1, 2].map(server)), [2, 1].map(server), "the next one does not wait");
        forwarder.forget_silence(server(1));
        assert_eq!(forwarder.time_alone(server(1)), patience.attempt);
    }
}
