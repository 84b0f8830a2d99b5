//! Which resolver is asked, when, and whose answer counts.
//!
//! The resolvers are asked in order. Each has [`Patience::attempt`] alone with the query; then the next is asked too,
//! while the earlier ones may still answer: a resolver that takes three seconds over a recursion is slow, not dead. When
//! all were asked and none spoke, they are asked once more, until [`Patience::total`] has passed. One that cannot be
//! reached, or refuses the port, is passed over at once, and so is one that says SERVFAIL, NOTIMP or REFUSED; the last
//! such answer is given where nobody does better: not those that were asked before either and have not spoken, for as long again as each
//! had alone.
//! Every other answer is the answer, whatever its code.
//!
//! A resolver that let its time pass is asked after the others for a while. Then it is tried by a copy of one query, beside it and
//! with all the time that a query gives ([`Patience::attempt`]): no query waits for a dead resolver again, and one that is slow, but
//! there, is found out to be. When the host's network changes, all are tried anew; when the world may be reached in other ways, they are all trusted again.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use hickory_proto::op::ResponseCode;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};
use tracing::debug;

use super::message::{self, Query};
use super::race::Race;
use super::upstream::Upstream;
use super::{DnsError, Patience, Transport};
use crate::frame::address::Endpoint;
use crate::observe::counters::{Counters, Metric};
use crate::policy::addresses::Addresses;
use crate::policy::outbound::WayOut;

/// Resolvers whose silence is remembered. Who changes more than these in [`Patience::silent_last`] is asked anew.
const REMEMBERED_MAX: usize = 64;

/// Asks resolvers and remembers how they behaved.
pub(super) struct Forwarder {
    patience: Patience,
    upstream: Upstream,
    /// Resolvers that kept silent and have not spoken since, and until when they are asked last.
    silent: RefCell<HashMap<SocketAddr, Instant>>,
    /// Those that are to be tried, each by a query.
    trials: RefCell<Vec<(SocketAddr, Vec<u8>)>>,
    /// There are such.
    to_try: Notify,
    /// When all that kept silent were, or are, to be tried last.
    doubted: Cell<Option<Instant>>,
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
        Ok(Self {
            patience,
            upstream: Upstream::new()?,
            silent: RefCell::default(),
            trials: RefCell::default(),
            to_try: Notify::new(),
            doubted: Cell::default(),
        })
    }

    /// The answer of these resolvers, byte for byte but for the ID, which is the guest's, and which of them gave it; until the deadline.
    pub async fn forward(
        &self,
        query: &Query<'_>,
        servers: &[SocketAddr],
        transport: Transport,
        counters: &Counters,
        deadline: Instant,
    ) -> Result<(SocketAddr, Vec<u8>), Unanswered> {
        let mut why = if servers.is_empty() { Unanswered::NoServers } else { Unanswered::Unreachable };
        self.begin_trials(query, servers);
        let mut waiting = self.in_order(servers);
        let mut again = VecDeque::new();
        let mut attempts = Race::default();
        let mut poor = None;
        while let Some(server) = waiting.pop_front() {
            let is_last = waiting.is_empty();
            attempts
                .push(async move { (server, self.upstream.ask(server, query, transport, counters).await) });
            let until = deadline.min(Instant::now() + self.patience.attempt);
            let mut has_spoken = false;
            // Somebody who was asked before, and has not spoken, may yet do better than the last one, who has refused.
            while !has_spoken || is_last && poor.is_some() && !again.is_empty() {
                let Ok((from, result)) = timeout_at(until, attempts.next()).await else {
                    if !has_spoken {
                        counters.add(Metric::DnsServerTimeouts, 1);
                        self.remember_silence(server);
                        again.push_back(server);
                        why = Unanswered::Silent;
                    }
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
                has_spoken |= from == server;
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

    /// The addresses of the host, and the way out of it, are these now.
    pub fn learn(&self, addresses: Arc<Addresses>) {
        self.upstream.learn(addresses);
    }

    /// The host's network has changed: who was silent may not be any more, and sockets may have the wrong address.
    pub fn doubt_silence(&self) {
        let now = Instant::now();
        // Changes may come faster than a trial is over.
        let due = match self.doubted.get() {
            Some(before) if before > now => before,
            Some(before) => now.max(before + self.patience.attempt),
            None => now,
        };
        self.doubted.set(Some(due));
        self.silent.borrow_mut().values_mut().for_each(|until| *until = due.min(*until));
        self.upstream.close_all_spare();
    }

    /// The ways to all resolvers are others: nothing is known of any.
    pub fn forget_all(&self) {
        self.silent.borrow_mut().clear();
        self.trials.borrow_mut().clear();
        self.upstream.close_all_spare();
    }

    /// By which way the host sends there.
    pub fn way_to(&self, to: SocketAddr) -> WayOut {
        self.upstream.way_to(to)
    }

    /// What goes on without queries. Runs for ever.
    pub async fn run(&self, counters: &Counters) {
        tokio::join!(self.upstream.close_spare(), self.run_trials(counters));
    }

    async fn run_trials(&self, counters: &Counters) {
        let mut under_way = Race::default();
        loop {
            if under_way.is_empty() {
                self.to_try.notified().await;
            } else {
                tokio::select! {
                    () = under_way.next() => {}
                    () = self.to_try.notified() => {}
                }
            }
            for (server, message) in self.trials.take() {
                under_way.push(self.run_trial(server, message, counters));
            }
        }
    }

    /// Gives a resolver that kept silent its time. Whatever it says, it speaks.
    async fn run_trial(&self, server: SocketAddr, message: Vec<u8>, counters: &Counters) {
        let Ok(query) = Query::parse(&message) else { return };
        let nobody = Endpoint::new(Ipv4Addr::UNSPECIFIED, 0);
        let asked = self.upstream.ask(server, &query, Transport::Udp(nobody), counters);
        if let Ok(Ok(_)) = timeout_at(Instant::now() + self.patience.attempt, asked).await {
            self.forget_silence(server);
        }
    }

    /// Resolvers that kept silent a while ago are tried beside this query, where another one is asked first.
    fn begin_trials(&self, query: &Query<'_>, servers: &[SocketAddr]) {
        let now = Instant::now();
        let mut silent = self.silent.borrow_mut();
        if servers.iter().all(|server| silent.contains_key(server)) {
            return;
        }
        for server in servers {
            let Some(until) = silent.get_mut(server).filter(|until| **until <= now) else { continue };
            // Who tries one does so for all others, too.
            *until = now + self.patience.silent_last;
            let mut trials = self.trials.borrow_mut();
            if trials.len() < REMEMBERED_MAX {
                trials.push((*server, query.under_id(0)));
                self.to_try.notify_one();
            }
        }
    }

    fn in_order(&self, servers: &[SocketAddr]) -> VecDeque<SocketAddr> {
        let silent = self.silent.borrow();
        let now = Instant::now();
        let is_silent = |server: &&SocketAddr| silent.get(*server).is_some_and(|until| *until > now);
        let (last, first): (Vec<_>, Vec<_>) = servers.iter().partition(is_silent);
        first.into_iter().chain(last).copied().collect()
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

    /// Whether it is asked in its turn.
    #[cfg(test)]
    pub fn is_trusted(&self, server: SocketAddr) -> bool {
        !self.silent.borrow().contains_key(&server)
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
    use crate::slow::dns::fake_server::query;
    use hickory_proto::rr::RecordType;
    use std::time::Duration;

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
    fn one_that_kept_silent_is_tried_beside_one_query_where_others_are_asked() {
        let server = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let patience = Patience { silent_last: Duration::from_millis(50), ..Patience::default() };
        let forwarder = Forwarder::new(patience).unwrap();
        let asked = query("example.com.", RecordType::A, 9);
        let asked = Query::parse(&asked).unwrap();
        let trials = |servers: &[u16]| {
            let servers: Vec<SocketAddr> = servers.iter().copied().map(server).collect();
            forwarder.begin_trials(&asked, &servers);
            let order: Vec<u16> = forwarder.in_order(&servers).iter().map(SocketAddr::port).collect();
            (forwarder.trials.take().len(), order)
        };
        assert_eq!(trials(&[1, 2]), (0, vec![1, 2]));
        forwarder.remember_silence(server(1));
        assert_eq!(trials(&[1, 2]), (0, vec![2, 1]), "it is left alone for a while");
        std::thread::sleep(patience.silent_last);
        assert_eq!(trials(&[1]), (0, vec![1]), "there is nobody else: the query itself waits for it");
        assert_eq!(trials(&[1, 2]), (1, vec![2, 1]));
        assert_eq!(trials(&[1, 2]), (0, vec![2, 1]), "one trial is enough");
        forwarder.forget_silence(server(1));
        assert_eq!(trials(&[1, 2]), (0, vec![1, 2]));
    }
}
