//! The flow table: from a key to who owns the flow, found by any thread without waiting.
//!
//! # How it works
//! A few set-associative hash tables of fixed sizes, the *levels*, each four times as large as the one before. In every
//! level a key belongs to two buckets of eight slots each, chosen by parts of a keyed hash; it lies in one of these slots
//! or it is not there. So there are no chains to follow and no tombstones, a removed slot is free at once, and with two
//! choices a level fills to nine tenths before keys spill into the next. The last level alone has room for all; when a
//! key's buckets are full there too, an insertion fails, which is a counted refusal.
//!
//! ```text
//! level 0  ▒▒▒▒        bucket      = [ meta × 8 | (fingerprint, handle) × 8 ]    one cache line of metas, two of entries
//! level 1  ▒▒▒▒▒▒▒▒…   meta        = version:32 | tag:24 | state:8               EMPTY → CLAIMED → TENTATIVE → LIVE → EMPTY
//! level 2  …           fingerprint = 64 more bits of the hash
//!                      handle      = owner:8 | generation:24 | index:32          the worker, and the slot in its slab
//! ```
//!
//! *Why levels*: keys lie wherever the hash says, so in one large table each of a few thousand flows would keep a page of
//! memory (4 KiB) for itself. An insertion takes the lowest level that has a free slot, so that few flows lie close
//! together; a level that holds nothing is not looked at, and its memory goes back.
//!
//! *Why fingerprints*: an entry holds no key but 128 bits of its keyed hash, less those that name the bucket. Three
//! cache lines are touched by a look-up where the key itself would take four or five, and a flow takes less than half the
//! memory. Two keys with one fingerprint are not to be expected in the life of the universe, nor can anybody look for
//! them who does not know the secret; and an owner compares the key of the record that a handle leads it to.
//!
//! *Readers* take a meta that is LIVE and has the key's tag, read the fingerprint, and read the meta again: unchanged
//! means that the entry was whole (a sequence lock, made of atomics, so that there is no data race to argue away). A
//! changed meta means that the entry went away meanwhile, which is as good as not there. No reader ever waits or writes.
//!
//! *Writers*: the worker that accepts a flow inserts it. Its owner, which may give it to another worker by one store to the
//! handle, is the only one to remove it. Two workers may insert the same key at the same moment (two copies of a SYN on
//! two queues). Each publishes its entry as TENTATIVE and then looks for others, in all levels. Of two that see each other the one in the lower slot wins: it withdraws the other by
//! compare-and-swap, the other withdraws itself and reports the winner. Nobody waits for anybody. An entry becomes LIVE
//! by compare-and-swap too, so one of "promoted" and "withdrawn" happens, not both. The publication and the look are
//! separated by sequentially consistent fences, so at least one of two sees the other. `loom` checks this (tests below).
//!
//! *Memory that goes back*: whoever removes the last entry of a level closes the level, which takes a count of zero,
//! has the system take its pages, after which they are zero, and opens it again. Who finds a level closed uses the next
//! one. Versions begin elsewhere after each such turn, so that a reader never takes a new entry for the one that it saw.
#![allow(unsafe_code)]

#[cfg(feature = "loom")]
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
#[cfg(not(feature = "loom"))]
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use std::num::NonZeroU32;

use super::key::{FlowKey, HashSecret};
use super::slab::{GENERATION_MASK, Slot};

/// Slots of a bucket: one cache line of metas. Fewer under `loom`, which tries every interleaving of every load.
const WAYS: usize = if cfg!(feature = "loom") { 2 } else { 8 };

const EMPTY: u64 = 0;
const CLAIMED: u64 = 1;
const TENTATIVE: u64 = 2;
const LIVE: u64 = 3;

const STATE_MASK: u64 = 0xff;
const TAG_MASK: u64 = 0xffff_ff00;
const VERSION_ONE: u64 = 1 << 32;

/// Who owns a flow, and where in its slab it lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Handle {
    /// The worker.
    pub owner: u8,
    /// The slot in that worker's slab.
    pub slot: Slot,
}

impl Handle {
    /// Of a flow that is mailed to its new owner and lies nowhere yet.
    pub const fn on_its_way_to(owner: u8) -> Self {
        Self { owner, slot: Slot { index: u32::MAX, generation: GENERATION_MASK } }
    }

    fn pack(self) -> u64 {
        u64::from(self.owner) << 56
            | u64::from(self.slot.generation & GENERATION_MASK) << 32
            | u64::from(self.slot.index)
    }

    fn unpack(word: u64) -> Self {
        let generation = (word >> 32) as u32 & GENERATION_MASK;
        Self { owner: (word >> 56) as u8, slot: Slot { index: word as u32, generation } }
    }
}

/// Where an entry lies in the table (counted from one, so that an `Option` of it is no larger); its owner keeps it to
/// remove the entry.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Position(NonZeroU32);

impl Position {
    fn new(index: usize) -> Self {
        Self(NonZeroU32::MIN.saturating_add(index as u32))
    }

    fn index(self) -> usize {
        self.0.get() as usize - 1
    }
}

/// Why an insertion did not happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InsertError {
    /// The key is there: its flow.
    Exists(Handle),
    /// No room in the key's buckets, or the capacity is reached.
    Full,
}

struct Entry {
    fingerprint: AtomicU64,
    handle: AtomicU64,
}

#[repr(align(64))]
struct Bucket {
    metas: [AtomicU64; WAYS],
    entries: [Entry; WAYS],
}

impl Bucket {
    /// One bit for each slot whose meta has a tag and a state.
    fn matching(&self, wanted: u64) -> u32 {
        self.metas.iter().enumerate().fold(0, |found, (way, meta)| {
            let same = meta.load(Ordering::Relaxed) & (TAG_MASK | STATE_MASK) == wanted;
            found | u32::from(same) << way
        })
    }
}

/// Has the system take the pages that lie in some words, which read as zero afterwards.
pub type Discard = fn(&[std::sync::atomic::AtomicU64]);

/// The table.
pub struct FlowTable {
    levels: Box<[Level]>,
    secret: HashSecret,
    len: AtomicU32,
    capacity: u32,
    discard: Option<Discard>,
}

/// A key's hash: hashing happens once a frame.
#[derive(Clone, Copy)]
pub struct HashedKey {
    /// The buckets (twenty bits each, more in the largest tables) and the tag.
    place: u64,
    fingerprint: u64,
}

impl HashedKey {
    fn tag(&self) -> u64 {
        (self.place >> 32) & TAG_MASK
    }
}

/// All buckets, empty. They lie in memory that was asked for without their alignment: only such comes zeroed and untouched
/// from the kernel, so that the part of a table that is not used costs no memory.
#[cfg(not(feature = "loom"))]
struct Buckets {
    words: Box<[AtomicU64]>,
    /// Words before the first bucket.
    skipped: usize,
    count: usize,
}

#[cfg(not(feature = "loom"))]
impl Buckets {
    /// Has their memory taken: all words are zero afterwards.
    fn discard(&self, discard: Discard) {
        discard(&self.words);
    }

    fn new(count: usize) -> Self {
        const WORDS: usize = size_of::<Bucket>() / size_of::<AtomicU64>();
        const ALIGN_WORDS: usize = align_of::<Bucket>() / size_of::<AtomicU64>();
        // SAFETY: all-zero bytes are a valid AtomicU64 (zero).
        let words =
            unsafe { Box::<[AtomicU64]>::new_zeroed_slice(count * WORDS + ALIGN_WORDS).assume_init() };
        let past = words.as_ptr().addr() % align_of::<Bucket>() / size_of::<AtomicU64>();
        Self { words, skipped: (ALIGN_WORDS - past) % ALIGN_WORDS, count }
    }
}

#[cfg(not(feature = "loom"))]
impl std::ops::Deref for Buckets {
    type Target = [Bucket];

    fn deref(&self) -> &[Bucket] {
        #[expect(clippy::cast_ptr_alignment, reason = "`skipped` words in, it is aligned")]
        // SAFETY: a bucket is made of AtomicU64 alone; `count` of them fit behind `skipped` words, where they are aligned
        // (`new`). A meta of zero is EMPTY.
        unsafe {
            std::slice::from_raw_parts(self.words.as_ptr().add(self.skipped).cast::<Bucket>(), self.count)
        }
    }
}

#[cfg(feature = "loom")]
struct Buckets(Box<[Bucket]>);

#[cfg(feature = "loom")]
impl Buckets {
    fn new(count: usize) -> Self {
        let word = || AtomicU64::new(0);
        let entry = || Entry { fingerprint: word(), handle: word() };
        let bucket =
            |_| Bucket { metas: std::array::from_fn(|_| word()), entries: std::array::from_fn(|_| entry()) };
        Self((0..count).map(bucket).collect())
    }

    fn discard(&self, _: Discard) {
        self.iter().flat_map(|bucket| &bucket.metas).for_each(|meta| meta.store(0, Ordering::Relaxed));
    }
}

#[cfg(feature = "loom")]
impl std::ops::Deref for Buckets {
    type Target = [Bucket];

    fn deref(&self) -> &[Bucket] {
        &self.0
    }
}

/// Memory that a flow takes in a table filled to its capacity, in bytes, when the capacity is a power of two: twice as
/// many slots in the last level, and a third of that in those before.
pub const BYTES_PER_FLOW: usize = size_of::<Bucket>() / WAYS * 2 * 4 / 3;

/// One of the table's sizes.
struct Level {
    buckets: Buckets,
    /// The slots of the levels before.
    first: usize,
    /// Slots that are taken, or are being taken; CLOSED while its memory goes back.
    used: AtomicU32,
    /// How often its memory went back.
    turn: AtomicU32,
}

const CLOSED: u32 = 1 << 31;

impl Level {
    fn new(buckets: usize, first: usize) -> Self {
        Self { buckets: Buckets::new(buckets), first, used: AtomicU32::new(0), turn: AtomicU32::new(0) }
    }

    /// Whether nothing is to be found here. Who was told of an entry in any way is told of its count too.
    fn is_unused(&self) -> bool {
        self.used.load(Ordering::Relaxed) & !CLOSED == 0
    }

    /// Counts a slot in that is about to be taken, unless the level is closed.
    fn enter(&self) -> bool {
        if self.used.fetch_add(1, Ordering::Acquire) & CLOSED == 0 {
            return true;
        }
        self.used.fetch_sub(1, Ordering::Relaxed);
        false
    }

    /// Counts a slot out; returns whether it was the last one.
    fn leave(&self) -> bool {
        self.used.fetch_sub(1, Ordering::Release) == 1
    }

    /// Gives the memory back if nothing was inserted meanwhile.
    fn give_back(&self, discard: Discard) {
        if self.used.compare_exchange(0, CLOSED, Ordering::Acquire, Ordering::Relaxed).is_err() {
            return;
        }
        self.turn.store(self.turn.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        self.buckets.discard(discard);
        self.used.fetch_sub(CLOSED, Ordering::Release);
    }

    fn homes(&self, key: &HashedKey) -> [usize; 2] {
        let mask = self.buckets.len() - 1;
        let first = key.place as usize & mask;
        let second = (key.place >> 20) as usize & mask;
        [first, if second == first { first ^ (mask & 1) } else { second }]
    }

    fn meta(&self, position: usize) -> &AtomicU64 {
        &self.buckets[position / WAYS].metas[position % WAYS]
    }

    fn entry(&self, position: usize) -> &Entry {
        &self.buckets[position / WAYS].entries[position % WAYS]
    }

    /// The slots in which the key may lie, bucket after bucket.
    fn candidates(&self, key: &HashedKey) -> impl Iterator<Item = usize> + use<> {
        let [first, second] = self.homes(key);
        let second = (second != first).then_some(second);
        std::iter::once(first).chain(second).flat_map(|bucket| bucket * WAYS..(bucket + 1) * WAYS)
    }

    /// Compares the entry in a slot whose meta was read as `meta` with a key.
    fn compare(&self, position: usize, meta: u64, key: &HashedKey) -> Comparison {
        let entry = self.entry(position);
        let same = entry.fingerprint.load(Ordering::Relaxed) == key.fingerprint;
        let handle = entry.handle.load(Ordering::Relaxed);
        // Pairs with the release fence in `claim`: whoever read a word of a newer entry sees a newer meta here.
        fence(Ordering::Acquire);
        if self.meta(position).load(Ordering::Relaxed) != meta {
            Comparison::Changed
        } else if same {
            Comparison::Same(Handle::unpack(handle))
        } else {
            Comparison::Other
        }
    }

    fn find(&self, key: &HashedKey) -> Option<Handle> {
        let wanted = key.tag() | LIVE;
        let homes = self.homes(key);
        // Neither bucket's line is waited for before the other one is asked for.
        let matching = homes.map(|bucket| self.buckets[bucket].matching(wanted));
        for (bucket, mut ways) in homes.into_iter().zip(matching) {
            while ways != 0 {
                let position = bucket * WAYS + ways.trailing_zeros() as usize;
                ways &= ways - 1;
                let meta = self.meta(position).load(Ordering::Acquire);
                if meta & (TAG_MASK | STATE_MASK) == wanted
                    && let Comparison::Same(handle) = self.compare(position, meta, key)
                {
                    return Some(handle);
                }
            }
        }
        None
    }

    /// Takes a free slot in the emptier of the key's buckets and publishes the entry as TENTATIVE.
    fn claim(&self, key: &HashedKey, handle: Handle) -> Option<(usize, u64)> {
        let homes = self.homes(key);
        let used = homes.map(|bucket| {
            self.buckets[bucket]
                .metas
                .iter()
                .filter(|m| m.load(Ordering::Relaxed) & STATE_MASK != EMPTY)
                .count()
        });
        if used == [WAYS; 2] || !self.enter() {
            return None;
        }
        let order = if used[1] < used[0] { [homes[1], homes[0]] } else { homes };
        for position in order.into_iter().flat_map(|bucket| bucket * WAYS..(bucket + 1) * WAYS) {
            let meta = self.meta(position).load(Ordering::Relaxed);
            if meta & STATE_MASK != EMPTY {
                continue;
            }
            let version = self.version_after(meta);
            let claimed = version | key.tag() | CLAIMED;
            let taken =
                self.meta(position).compare_exchange(meta, claimed, Ordering::AcqRel, Ordering::Relaxed);
            if taken.is_err() {
                continue;
            }
            // A reader that sees a word written below must see the claim too (see `compare`).
            fence(Ordering::Release);
            let entry = self.entry(position);
            entry.fingerprint.store(key.fingerprint, Ordering::Relaxed);
            entry.handle.store(handle.pack(), Ordering::Relaxed);
            let tentative = version | key.tag() | TENTATIVE;
            self.meta(position).store(tentative, Ordering::Release);
            return Some((position, tentative));
        }
        self.leave();
        None
    }

    /// The version of the next entry in a slot with this meta. One whose memory went back begins far from where it was.
    fn version_after(&self, meta: u64) -> u64 {
        let before = match meta & !(TAG_MASK | STATE_MASK) {
            0 => u64::from(self.turn.load(Ordering::Relaxed)) << 56,
            version => version,
        };
        before.wrapping_add(VERSION_ONE)
    }

    /// Empties a slot if it is still as it was read.
    fn withdraw(&self, position: usize, meta: u64) -> bool {
        let empty = meta & !(TAG_MASK | STATE_MASK);
        self.meta(position).compare_exchange(meta, empty, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }
}

/// Buckets of the smallest level, where there is more than one: room for 8,192 flows in 192 KiB.
const SMALLEST: usize = if cfg!(feature = "loom") { 1 } else { 1024 };

/// How many times larger a level is than the one before.
const GROWTH: usize = if cfg!(feature = "loom") { 8 } else { 4 };

/// A slot: its level, and the place in it.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place {
    level: usize,
    position: usize,
}

impl FlowTable {
    /// A table for `capacity` flows; its last level has a third more slots than that at the least.
    pub fn new(capacity: u32, secret: HashSecret) -> Self {
        let last = (capacity as usize * 4 / 3).div_ceil(WAYS).next_power_of_two();
        let mut sizes = vec![last];
        while let Some(smaller) = sizes.last().map(|size| size / GROWTH).filter(|size| *size >= SMALLEST) {
            sizes.push(smaller);
        }
        let mut levels = Vec::new();
        let mut first = 0;
        for buckets in sizes.into_iter().rev() {
            levels.push(Level::new(buckets, first));
            first += buckets * WAYS;
        }
        Self { levels: levels.into(), secret, len: AtomicU32::new(0), capacity, discard: None }
    }

    /// The same table, whose unused memory goes back to the system.
    #[must_use]
    pub fn with_discard(self, discard: Discard) -> Self {
        Self { discard: Some(discard), ..self }
    }

    /// How many flows are in the table.
    pub fn len(&self) -> u32 {
        self.len.load(Ordering::Relaxed)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many flows may be in the table.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Hashes a key for the calls below.
    pub fn hash(&self, key: &FlowKey) -> HashedKey {
        let [place, fingerprint] = self.secret.hash(key);
        HashedKey { place, fingerprint }
    }

    /// Finds a flow. Wait-free; any thread.
    pub fn find(&self, key: &HashedKey) -> Option<Handle> {
        let used = self.levels.iter().rev().filter(|level| !level.is_unused());
        used.into_iter().find_map(|level| level.find(key))
    }

    /// Inserts a flow. On success the caller owns the entry and must [`Self::remove`] it once.
    /// [`InsertError::Exists`] may name a flow that another worker is inserting at this moment.
    pub fn insert(&self, key: &HashedKey, handle: Handle) -> Result<Position, InsertError> {
        if self.len.fetch_add(1, Ordering::Relaxed) >= self.capacity {
            self.len.fetch_sub(1, Ordering::Relaxed);
            return Err(InsertError::Full);
        }
        let result = loop {
            if let Some(existing) = self.find(key) {
                break Err(InsertError::Exists(existing));
            }
            let Some((mine, meta)) = self.claim(key, handle) else { break Err(InsertError::Full) };
            match self.contend(key, mine, meta) {
                Contest::Won => break Ok(Position::new(self.levels[mine.level].first + mine.position)),
                Contest::LostTo(existing) => {
                    self.leave(mine.level);
                    break Err(InsertError::Exists(existing));
                }
                // By one in a lower slot, which is LIVE by now or is found in the contest: this ends.
                Contest::Withdrawn => self.leave(mine.level),
            }
        };
        if result.is_err() {
            self.len.fetch_sub(1, Ordering::Relaxed);
        }
        result
    }

    /// Takes a free slot in the lowest level that has one for the key.
    fn claim(&self, key: &HashedKey, handle: Handle) -> Option<(Place, u64)> {
        self.levels.iter().enumerate().find_map(|(number, level)| {
            level.claim(key, handle).map(|(position, meta)| (Place { level: number, position }, meta))
        })
    }

    /// Looks for other entries with the key after `mine` was published, and makes `mine` LIVE or withdraws it.
    fn contend(&self, key: &HashedKey, mine: Place, meta: u64) -> Contest {
        // Of two who publish and then look, at least one sees the other.
        fence(Ordering::SeqCst);
        for (number, level) in self.levels.iter().enumerate() {
            for position in level.candidates(key) {
                let place = Place { level: number, position };
                if place != mine
                    && let Some(existing) = self.contend_with(key, place, mine, meta)
                {
                    return Contest::LostTo(existing);
                }
            }
        }
        let live = (meta & !STATE_MASK) | LIVE;
        let own = self.levels[mine.level].meta(mine.position);
        match own.compare_exchange(meta, live, Ordering::AcqRel, Ordering::Relaxed) {
            Ok(_) => Contest::Won,
            Err(_) => Contest::Withdrawn,
        }
    }

    /// Contends with whoever is in `place`. When that one wins, `mine` is withdrawn and the winner is returned.
    fn contend_with(&self, key: &HashedKey, place: Place, mine: Place, meta: u64) -> Option<Handle> {
        let level = &self.levels[place.level];
        let is_lower = (place.level, place.position) < (mine.level, mine.position);
        let mut other = level.meta(place.position).load(Ordering::Acquire);
        loop {
            let state = other & STATE_MASK;
            if other & TAG_MASK != key.tag() || (state != LIVE && state != TENTATIVE) {
                return None;
            }
            match level.compare(place.position, other, key) {
                Comparison::Other => return None,
                Comparison::Same(existing) if state == LIVE || is_lower => {
                    self.levels[mine.level].withdraw(mine.position, meta);
                    return Some(existing);
                }
                Comparison::Same(_) if level.withdraw(place.position, other) => return None,
                Comparison::Same(_) | Comparison::Changed => {}
            }
            // It changed meanwhile. If it became LIVE it wins. If it went away and came anew, whoever brought it
            // did so after `mine` was published, will see it, and yields to it.
            let now = level.meta(place.position).load(Ordering::Acquire);
            if now == other || now & !STATE_MASK != other & !STATE_MASK {
                return None;
            }
            other = now;
        }
    }

    /// Changes who owns a flow, or where it lies. The owner only. Readers find the one or the other; what was done before is
    /// seen by whoever finds the new one.
    pub fn reassign(&self, position: Position, handle: Handle) {
        let Place { level, position } = self.place(position);
        self.levels[level].entry(position).handle.store(handle.pack(), Ordering::Release);
    }

    fn place(&self, position: Position) -> Place {
        let level = self.levels.iter().rposition(|level| level.first <= position.index()).unwrap_or(0);
        Place { level, position: position.index() - self.levels[level].first }
    }

    /// Removes an entry; only its owner may, and once.
    pub fn remove(&self, position: Position) {
        let Place { level, position } = self.place(position);
        let slots = &self.levels[level];
        let meta = slots.meta(position).load(Ordering::Relaxed);
        debug_assert_eq!(meta & STATE_MASK, LIVE, "an entry is removed once, by its owner");
        slots.withdraw(position, meta);
        self.leave(level);
        self.len.fetch_sub(1, Ordering::Relaxed);
    }

    /// Counts a slot of a level out. The memory of the lowest level is kept.
    fn leave(&self, number: usize) {
        let level = &self.levels[number];
        if level.leave()
            && number > 0
            && let Some(discard) = self.discard
        {
            level.give_back(discard);
        }
    }
}

enum Comparison {
    /// The slot holds the key.
    Same(Handle),
    /// It holds another one.
    Other,
    /// It was written to meanwhile.
    Changed,
}

enum Contest {
    Won,
    /// Another entry with the key stands.
    LostTo(Handle),
    /// Another one, in a lower slot, has withdrawn this one.
    Withdrawn,
}

#[cfg(test)]
mod support {
    use super::*;
    use crate::flow::key::Protocol;
    use crate::frame::address::{Address, Endpoint};

    pub fn key(n: u32) -> FlowKey {
        let guest = Endpoint::new(Address::v4([192, 168, 65, 3]), n as u16);
        let remote = Endpoint::new(Address::v4(n.to_be_bytes()), 443);
        FlowKey { guest, remote, protocol: Protocol::Tcp }
    }

    pub fn handle(owner: u8, index: u32) -> Handle {
        Handle { owner, slot: Slot { index, generation: 7 } }
    }

    /// What the system does to discarded memory.
    pub fn zero(words: &[std::sync::atomic::AtomicU64]) {
        for word in words {
            word.store(0, std::sync::atomic::Ordering::Relaxed);
        }
    }
}

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    use super::support::{handle, key, zero};
    use super::*;

    #[test]
    fn what_is_inserted_is_found_until_it_is_removed() {
        let table = FlowTable::new(1000, HashSecret([1, 2]));
        let positions: Vec<Position> =
            (0..1000).map(|n| table.insert(&table.hash(&key(n)), handle(3, n)).unwrap()).collect();
        for n in 0..1000 {
            assert_eq!(table.find(&table.hash(&key(n))), Some(handle(3, n)));
        }
        assert_eq!(table.insert(&table.hash(&key(5)), handle(1, 1)), Err(InsertError::Full));
        for position in &positions[500..] {
            table.remove(*position);
        }
        for n in 0..1000 {
            assert_eq!(table.find(&table.hash(&key(n))).is_some(), n < 500);
        }
        assert_eq!(table.insert(&table.hash(&key(5)), handle(1, 1)), Err(InsertError::Exists(handle(3, 5))));
        assert_eq!(table.len(), 500);
    }

    #[test]
    fn a_flow_has_another_owner_from_one_moment_to_the_next() {
        let table = FlowTable::new(100_000, HashSecret([1, 2]));
        // So many that they lie in more than one level.
        let positions: Vec<Position> =
            (0..50_000).map(|n| table.insert(&table.hash(&key(n)), handle(3, n)).unwrap()).collect();
        for position in &positions {
            table.reassign(*position, Handle::on_its_way_to(1));
        }
        assert!((0..50_000).all(|n| table.find(&table.hash(&key(n))) == Some(Handle::on_its_way_to(1))));
        for (n, position) in positions.iter().enumerate() {
            table.reassign(*position, handle(1, n as u32));
        }
        assert!((0..50_000).all(|n| table.find(&table.hash(&key(n))) == Some(handle(1, n))));
        for position in positions {
            table.remove(position);
        }
        assert!(table.is_empty());
    }

    #[test]
    fn a_table_fills_to_its_capacity_whatever_the_keys() {
        for secret in 0..20 {
            let table = FlowTable::new(6144, HashSecret([secret, !secret]));
            for n in 0..6144 {
                table.insert(&table.hash(&key(n)), handle(0, n)).unwrap();
            }
        }
    }

    /// Two levels: 8,192 slots, and four times as many.
    const TWO_LEVELS: u32 = 16_384;

    fn used(table: &FlowTable) -> Vec<u32> {
        table.levels.iter().map(|level| level.used.load(Ordering::Relaxed)).collect()
    }

    #[test]
    fn few_flows_lie_close_together_and_many_spill_into_the_next_level() {
        let table = FlowTable::new(TWO_LEVELS, HashSecret([1, 2]));
        let insert = |n| table.insert(&table.hash(&key(n)), handle(0, n)).unwrap();
        (0..6000).for_each(|n| assert!(insert(n).index() < 8192));
        assert_eq!(used(&table), [6000, 0]);
        (6000..TWO_LEVELS).for_each(|n| _ = insert(n));
        let [low, high] = used(&table)[..] else { panic!("two levels") };
        assert!(low > 8100 && low + high == TWO_LEVELS, "{low} + {high}");
        assert!((0..TWO_LEVELS).all(|n| table.find(&table.hash(&key(n))) == Some(handle(0, n))));
    }

    #[test]
    fn the_memory_of_a_level_that_holds_nothing_goes_back() {
        static DISCARDED: AtomicU32 = AtomicU32::new(0);
        let table = FlowTable::new(TWO_LEVELS, HashSecret([1, 2])).with_discard(|words| {
            DISCARDED.fetch_add(words.len() as u32, Ordering::Relaxed);
            zero(words);
        });
        let mut before = Vec::new();
        for round in 1..=3 {
            let insert = |n| table.insert(&table.hash(&key(n)), handle(0, n)).unwrap();
            let positions: Vec<Position> = (0..12_000).map(insert).collect();
            let metas = |position: &Position| {
                let level = table.levels.iter().rfind(|level| level.first <= position.index()).unwrap();
                level.meta(position.index() - level.first).load(Ordering::Relaxed)
            };
            let now: Vec<u64> = positions.iter().map(metas).collect();
            assert!(
                before.iter().zip(&now).all(|(before, now)| before != now),
                "an entry like that of before"
            );
            before = now;
            for position in positions {
                table.remove(position);
            }
            assert_eq!((used(&table), table.len()), (vec![0, 0], 0));
            assert_eq!(
                DISCARDED.load(Ordering::Relaxed) as usize / table.levels[1].buckets.words.len(),
                round
            );
            assert!((0..12_000).all(|n| table.find(&table.hash(&key(n))).is_none()));
        }
    }

    #[test]
    fn a_handle_survives_packing_at_its_limits() {
        let slot = Slot { index: u32::MAX, generation: GENERATION_MASK };
        let handle = Handle { owner: u8::MAX, slot };
        assert_eq!(Handle::unpack(handle.pack()), handle);
    }

    #[test]
    fn threads_that_insert_the_same_keys_agree_on_one_owner() {
        let table = FlowTable::new(TWO_LEVELS, HashSecret([9, 9]));
        let won: Vec<u32> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4u8)
                .map(|owner| {
                    let table = &table;
                    scope.spawn(move || {
                        (0..12_000)
                            .filter(|n| table.insert(&table.hash(&key(*n)), handle(owner, *n)).is_ok())
                            .count() as u32
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(won.iter().sum::<u32>(), 12_000);
        assert_eq!(table.len(), 12_000);
    }

    #[test]
    fn threads_that_fill_and_empty_a_level_lose_nothing() {
        let table = FlowTable::new(TWO_LEVELS, HashSecret([3, 4])).with_discard(zero);
        // The first level is nearly full, so that most of what comes and goes does so in the second one.
        (0..8000).for_each(|n| _ = table.insert(&table.hash(&key(n)), handle(9, n)).unwrap());
        std::thread::scope(|scope| {
            for owner in 0..4u8 {
                let table = &table;
                scope.spawn(move || {
                    for round in 0..2000 {
                        let first = 20_000 + u32::from(owner) * 10_000 + round;
                        let insert = |n| table.insert(&table.hash(&key(n)), handle(owner, n)).unwrap();
                        let positions: Vec<Position> = (first..first + 4).map(insert).collect();
                        for n in first..first + 4 {
                            assert_eq!(table.find(&table.hash(&key(n))), Some(handle(owner, n)));
                        }
                        for position in positions {
                            table.remove(position);
                        }
                        assert_eq!(table.find(&table.hash(&key(first))), None);
                    }
                });
            }
        });
        assert_eq!((table.len(), used(&table).iter().sum::<u32>()), (8000, 8000));
        assert!((0..8000).all(|n| table.find(&table.hash(&key(n))) == Some(handle(9, n))));
    }
}

#[cfg(all(test, feature = "loom"))]
mod loom_tests {
    use super::support::{handle, key, zero};
    use super::*;
    use loom::sync::Arc;

    #[test]
    fn one_of_two_who_insert_the_same_key_wins() {
        loom::model(|| {
            let table = Arc::new(FlowTable::new(2, HashSecret([1, 2])));
            let other = table.clone();
            let thread = loom::thread::spawn(move || other.insert(&other.hash(&key(1)), handle(1, 1)));
            let here = table.insert(&table.hash(&key(1)), handle(0, 0));
            let there = thread.join().unwrap();
            assert!(here.is_ok() != there.is_ok(), "{here:?} {there:?}");
            let winner = if here.is_ok() { handle(0, 0) } else { handle(1, 1) };
            assert_eq!(table.find(&table.hash(&key(1))), Some(winner));
            assert_eq!(table.len(), 1);
        });
    }

    #[test]
    fn a_reader_sees_a_whole_entry_or_none() {
        loom::model(|| {
            let table = Arc::new(FlowTable::new(1, HashSecret([1, 2])));
            let position = table.insert(&table.hash(&key(1)), handle(0, 1)).unwrap();
            let other = table.clone();
            let thread = loom::thread::spawn(move || {
                other.remove(position);
                // One bucket, so the slot is used again at once.
                other.insert(&other.hash(&key(2)), handle(0, 2)).unwrap();
            });
            let found = table.find(&table.hash(&key(1)));
            assert!(found.is_none() || found == Some(handle(0, 1)), "{found:?}");
            thread.join().unwrap();
            assert_eq!(table.find(&table.hash(&key(1))), None);
            assert_eq!(table.find(&table.hash(&key(2))), Some(handle(0, 2)));
        });
    }

    /// The word that a flow is on its way comes before the mail with the flow, so the new owner has the last one.
    #[test]
    fn the_new_owner_has_the_last_word() {
        loom::model(|| {
            let table = Arc::new(FlowTable::new(1, HashSecret([1, 2])));
            let position = table.insert(&table.hash(&key(1)), handle(0, 1)).unwrap();
            let mail = Arc::new(AtomicU32::new(0));
            let (other, put) = (table.clone(), mail.clone());
            let thread = loom::thread::spawn(move || {
                other.reassign(position, Handle::on_its_way_to(1));
                put.store(1, Ordering::Release);
            });
            let taken = mail.load(Ordering::Acquire) == 1;
            if taken {
                table.reassign(position, handle(1, 7));
            }
            thread.join().unwrap();
            let last = if taken { handle(1, 7) } else { Handle::on_its_way_to(1) };
            assert_eq!(table.find(&table.hash(&key(1))), Some(last));
        });
    }

    /// Every interleaving with two preemptions at the most: there are too many of the others.
    fn few_preemptions(test: impl Fn() + Sync + Send + 'static) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(2);
        model.check(test);
    }

    /// Two levels, the lower one of a single bucket of two slots, which is full.
    fn with_a_full_level() -> (FlowTable, Position) {
        let table = FlowTable::new(12, HashSecret([1, 2])).with_discard(zero);
        assert_eq!(table.levels.iter().map(|level| level.buckets.len()).collect::<Vec<_>>(), [1, 8]);
        let [_, last] = [10, 11].map(|n| table.insert(&table.hash(&key(n)), handle(0, n)).unwrap());
        (table, last)
    }

    #[test]
    fn one_of_two_wins_who_insert_the_same_key_into_different_levels() {
        few_preemptions(|| {
            let (table, last) = with_a_full_level();
            let table = Arc::new(table);
            let other = table.clone();
            let thread = loom::thread::spawn(move || {
                // One slot of the lower level is free from now on.
                other.remove(last);
                other.insert(&other.hash(&key(1)), handle(1, 1))
            });
            let here = table.insert(&table.hash(&key(1)), handle(0, 0));
            let there = thread.join().unwrap();
            assert!(here.is_ok() != there.is_ok(), "{here:?} {there:?}");
            let winner = if here.is_ok() { handle(0, 0) } else { handle(1, 1) };
            assert_eq!(table.find(&table.hash(&key(1))), Some(winner));
            assert_eq!(table.len(), 2);
        });
    }

    #[test]
    fn what_is_inserted_while_a_level_is_emptied_is_found() {
        few_preemptions(|| {
            let (table, _) = with_a_full_level();
            let only = table.insert(&table.hash(&key(1)), handle(0, 1)).unwrap();
            let table = Arc::new(table);
            let other = table.clone();
            let thread = loom::thread::spawn(move || other.remove(only));
            // It may meet a closed level, and there is no other one: then it is refused, as if there were no room.
            let inserted = table.insert(&table.hash(&key(2)), handle(0, 2)).is_ok();
            assert_eq!(table.find(&table.hash(&key(2))), inserted.then_some(handle(0, 2)));
            thread.join().unwrap();
            assert_eq!(table.find(&table.hash(&key(2))), inserted.then_some(handle(0, 2)));
            assert_eq!(table.find(&table.hash(&key(1))), None);
        });
    }
}
