//! Answers of resolvers, kept as long as they hold.
//!
//! A kept answer is given to the same query only: the same question, flags and EDNS, over the same transport, the ID and the
//! case of the name's letters apart. So what a guest gets is what its resolver would say, byte for byte but for its own ID, its
//! own letters, and times to live that have passed. A query with EDNS options is asked anew each time: a cookie, a client's subnet
//! or a request for a server's name is meant for whom it is sent to.
//!
//! What is kept came from a resolver that was asked, under the checks of [`Query::is_answered_by`]; nothing that a guest sends is
//! kept. Entries and their bytes are bounded; the one that was not asked for longest goes first.

use std::hash::RandomState;
use std::time::Duration;

use lru::LruCache;
use tokio::time::Instant;

use super::Transport;
use super::message::Query;
use super::reply::{Keeping, age, keeping};
use crate::time::slept;

/// Bytes that may be kept, by entry that may be: three times what a common answer has.
const BYTES_PER_ENTRY: usize = 1024;
/// What an entry takes besides its answer, its query and its places.
const ENTRY_OVERHEAD: usize = 200;

/// What makes queries the same.
type Key = Box<[u8]>;

struct Kept {
    reply: Box<[u8]>,
    ttls: Box<[u16]>,
    since: Moment,
    lifetime: Duration,
}

/// A point in time by the runtime's clock, which stands still while the machine sleeps, and how long it has slept by then.
#[derive(Clone, Copy)]
struct Moment {
    awake: Instant,
    slept: Duration,
}

impl Moment {
    fn since(self, earlier: Self) -> Duration {
        self.awake - earlier.awake + self.slept.saturating_sub(earlier.slept)
    }
}

/// Answers that were kept.
pub(super) struct Cache {
    kept: LruCache<Key, Kept, RandomState>,
    entries_max: usize,
    bytes: usize,
    /// Which answers count: those that were asked for under an earlier number may be of a resolver that is not asked any
    /// more.
    era: u64,
    /// How long the machine has slept so far: answers grow old then, too.
    slept: fn() -> Duration,
}

/// Where an answer may be put that is not known yet.
pub(super) struct Place {
    key: Key,
    era: u64,
}

/// What the cache says to a query.
pub(super) enum Kind {
    /// It has an answer.
    Known(Vec<u8>),
    /// It has none; one may be put here.
    Unknown(Place),
    /// Queries of this kind are not for it.
    Foreign,
}

impl Cache {
    /// Keeps so many answers; with zero, none.
    pub fn new(entries_max: usize) -> Self {
        let kept = LruCache::unbounded_with_hasher(RandomState::new());
        Self { kept, entries_max, bytes: 0, era: 0, slept }
    }

    fn now(&self) -> Moment {
        Moment { awake: Instant::now(), slept: (self.slept)() }
    }

    /// Looks for an answer.
    pub fn look_up(&mut self, query: &Query<'_>, transport: Transport) -> Kind {
        let Some(key) = self.key(query, transport) else { return Kind::Foreign };
        let now = self.now();
        match self.kept.get(&key) {
            Some(kept) if now.since(kept.since) < kept.lifetime => {
                let mut reply = query.under_own_id_and_letters(&kept.reply);
                age(&mut reply, &kept.ttls, passed_s(now.since(kept.since)));
                Kind::Known(reply)
            }
            _ => Kind::Unknown(Place { key, era: self.era }),
        }
    }

    /// Keeps an answer, where it can be kept, until it does not hold any more or there is no room.
    pub fn keep(&mut self, place: Place, reply: &[u8]) {
        if place.era != self.era {
            return;
        }
        let Some(Keeping { ttls, lifetime }) = keeping(reply) else { return };
        let kept = Kept { reply: reply.into(), ttls, since: self.now(), lifetime };
        let bytes = bytes_of(&place.key, &kept);
        if bytes > self.bytes_max() / 4 {
            return;
        }
        self.bytes += bytes;
        if let Some((key, replaced)) = self.kept.push(place.key, kept) {
            self.bytes -= bytes_of(&key, &replaced);
        }
        while self.kept.len() > self.entries_max || self.bytes > self.bytes_max() {
            let Some((key, oldest)) = self.kept.pop_lru() else { break };
            self.bytes -= bytes_of(&key, &oldest);
        }
    }

    /// Forgets everything, also what is being asked.
    pub fn clear(&mut self) {
        self.kept.clear();
        self.bytes = 0;
        self.era += 1;
    }

    /// How many answers are kept.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.kept.len()
    }

    /// What they take.
    #[cfg(test)]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn bytes_max(&self) -> usize {
        // One answer of any length has room in the smallest.
        (self.entries_max * BYTES_PER_ENTRY).max(512 << 10)
    }

    fn key(&self, query: &Query<'_>, transport: Transport) -> Option<Key> {
        if self.entries_max == 0 {
            return None;
        }
        let way = match transport {
            Transport::Udp(_) => 0,
            Transport::Tcp => 1,
        };
        let [flags, rest] = query.without_name()?;
        Some([&[way], flags, query.name(), rest].concat().into())
    }
}

fn bytes_of(key: &Key, kept: &Kept) -> usize {
    key.len() + kept.reply.len() + 2 * kept.ttls.len() + ENTRY_OVERHEAD
}

fn passed_s(time: Duration) -> u32 {
    u32::try_from(time.as_secs()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::address::Endpoint;
    use crate::slow::dns::fake_server::{addresses, query, reply_to, with_record};
    use hickory_proto::rr::RecordType;
    use std::cell::Cell;

    thread_local! {
        static SLEPT: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    }

    #[test]
    fn answers_grow_old_while_the_machine_sleeps() {
        let mut cache = Cache { slept: || SLEPT.get(), ..Cache::new(10) };
        let asked = query("example.com.", RecordType::A, 1);
        let asked = Query::parse(&asked).unwrap();
        let transport = Transport::Udp(Endpoint::new(addresses().v4.unwrap().guest, 4000));
        let reply =
            with_record(reply_to(&query("example.com.", RecordType::A, 1)), 0, 1, 300, &[203, 0, 113, 1]);
        let Keeping { lifetime, .. } = keeping(&reply).unwrap();
        let Kind::Unknown(place) = cache.look_up(&asked, transport) else { panic!("it knows nothing yet") };
        cache.keep(place, &reply);
        SLEPT.set(lifetime / 2);
        let Kind::Known(aged) = cache.look_up(&asked, transport) else { panic!("it holds") };
        let ttl = |reply: &[u8]| keeping(reply).unwrap().lifetime;
        assert!(ttl(&aged) <= lifetime / 2, "{:?} of {lifetime:?}", ttl(&aged));
        SLEPT.set(lifetime);
        assert!(matches!(cache.look_up(&asked, transport), Kind::Unknown(_)), "it does not hold any more");
    }
}
