//! The flow table: from a key to who owns the flow, found by any thread without waiting.
//!
//! # How it works
//! A set-associative hash table of fixed size. A key belongs to two buckets of eight slots each, chosen by two halves
//! of a keyed hash; it lies in one of these sixteen slots or it is not there. So there are no chains to follow and no
//! tombstones, a removed slot is free at once, and with two choices the table fills to well over nine tenths before
//! an insertion finds no room (it then fails, which is a counted refusal).
//!
//! ```text
//! bucket  = [ meta × 8 | (key, handle) × 8 ]            one cache line of metas, then the entries
//! meta    = version:32 | tag:24 | state:8               EMPTY → CLAIMED → TENTATIVE → LIVE → EMPTY
//! handle  = owner:8 | generation:24 | index:32          the worker, and the slot in its slab
//! ```
//!
//! *Readers* take a meta that is LIVE and has the key's tag, read the key, and read the meta again: unchanged means
//! that the key was whole (a sequence lock, made of atomics, so that there is no data race to argue away). A changed
//! meta means that the entry went away meanwhile, which is as good as not there. No reader ever waits or writes.
//!
//! *Writers*: the worker that accepts a flow inserts it. Its owner, which may give it to another worker by a store to the handle
//! alone, is the only one to remove it. Two workers may insert the
//! same key at the same moment (two copies of a SYN on two queues). Each publishes its entry as TENTATIVE and then
//! looks for others. Of two that see each other the one in the lower slot wins: it withdraws the other by
//! compare-and-swap, the other withdraws itself and reports the winner. Nobody waits for anybody. An entry becomes LIVE by compare-and-swap too, so one of "promoted"
//! and "withdrawn" happens, not both. The publication and the look are separated by sequentially consistent fences,
//! so at least one of two sees the other. `loom` checks this (tests below).
#![allow(unsafe_code)]

#[cfg(feature = "loom")]
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
#[cfg(not(feature = "loom"))]
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use std::num::NonZeroU32;

use super::key::{FlowKey, HashSecret, KeyWords};
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
    key: [AtomicU64; 5],
    handle: AtomicU64,
}

#[repr(align(64))]
struct Bucket {
    metas: [AtomicU64; WAYS],
    entries: [Entry; WAYS],
}

/// The table.
pub struct FlowTable {
    buckets: Buckets,
    secret: HashSecret,
    len: AtomicU32,
    capacity: u32,
}

/// A key with its hash: hashing happens once a frame.
#[derive(Clone, Copy)]
pub struct HashedKey {
    words: KeyWords,
    hash: u64,
}

impl HashedKey {
    fn tag(&self) -> u64 {
        (self.hash >> 8) & TAG_MASK
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
        let entry = || Entry { key: std::array::from_fn(|_| word()), handle: word() };
        let bucket =
            |_| Bucket { metas: std::array::from_fn(|_| word()), entries: std::array::from_fn(|_| entry()) };
        Self((0..count).map(bucket).collect())
    }
}

#[cfg(feature = "loom")]
impl std::ops::Deref for Buckets {
    type Target = [Bucket];

    fn deref(&self) -> &[Bucket] {
        &self.0
    }
}

/// Memory that a flow takes in a table filled to its capacity, in bytes, when the capacity is a power of two.
pub const BYTES_PER_FLOW: usize = size_of::<Bucket>() / WAYS * 2;

impl FlowTable {
    /// A table for `capacity` flows, with a third more slots than that at the least.
    pub fn new(capacity: u32, secret: HashSecret) -> Self {
        let buckets = (capacity as usize * 4 / 3).div_ceil(WAYS).next_power_of_two();
        Self { buckets: Buckets::new(buckets), secret, len: AtomicU32::new(0), capacity }
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
        let words = key.words();
        HashedKey { words, hash: self.secret.hash(&words) }
    }

    fn homes(&self, key: &HashedKey) -> [usize; 2] {
        let mask = self.buckets.len() - 1;
        let first = key.hash as usize & mask;
        let second = (key.hash >> 32) as usize & mask;
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

    /// Compares the key in a slot whose meta was read as `meta`.
    fn compare(&self, position: usize, meta: u64, key: &HashedKey) -> Comparison {
        let entry = self.entry(position);
        let same = entry.key.iter().zip(&key.words).all(|(a, b)| a.load(Ordering::Relaxed) == *b);
        let handle = entry.handle.load(Ordering::Relaxed);
        // Pairs with the release fence in `claim`: whoever read a word of a newer key sees a newer meta here.
        fence(Ordering::Acquire);
        if self.meta(position).load(Ordering::Relaxed) != meta {
            Comparison::Changed
        } else if same {
            Comparison::Same(Handle::unpack(handle))
        } else {
            Comparison::Other
        }
    }

    /// Finds a flow. Wait-free; any thread.
    pub fn find(&self, key: &HashedKey) -> Option<Handle> {
        let wanted = key.tag() | LIVE;
        for position in self.candidates(key) {
            let meta = self.meta(position).load(Ordering::Acquire);
            if meta & (TAG_MASK | STATE_MASK) == wanted
                && let Comparison::Same(handle) = self.compare(position, meta, key)
            {
                return Some(handle);
            }
        }
        None
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
                Contest::Won => break Ok(Position::new(mine)),
                Contest::LostTo(existing) => break Err(InsertError::Exists(existing)),
                // By one in a lower slot, which is LIVE by now or is found in the contest: this ends.
                Contest::Withdrawn => {}
            }
        };
        if result.is_err() {
            self.len.fetch_sub(1, Ordering::Relaxed);
        }
        result
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
        let order = if used[1] < used[0] { [homes[1], homes[0]] } else { homes };
        for position in order.into_iter().flat_map(|bucket| bucket * WAYS..(bucket + 1) * WAYS) {
            let meta = self.meta(position).load(Ordering::Relaxed);
            if meta & STATE_MASK != EMPTY {
                continue;
            }
            let version = (meta & !(TAG_MASK | STATE_MASK)).wrapping_add(VERSION_ONE);
            let claimed = version | key.tag() | CLAIMED;
            let taken =
                self.meta(position).compare_exchange(meta, claimed, Ordering::AcqRel, Ordering::Relaxed);
            if taken.is_err() {
                continue;
            }
            // A reader that sees a word written below must see the claim too (see `compare`).
            fence(Ordering::Release);
            let entry = self.entry(position);
            for (word, value) in entry.key.iter().zip(key.words) {
                word.store(value, Ordering::Relaxed);
            }
            entry.handle.store(handle.pack(), Ordering::Relaxed);
            let tentative = version | key.tag() | TENTATIVE;
            self.meta(position).store(tentative, Ordering::Release);
            return Some((position, tentative));
        }
        None
    }

    /// Looks for other entries with the key after `mine` was published, and makes `mine` LIVE or withdraws it.
    fn contend(&self, key: &HashedKey, mine: usize, meta: u64) -> Contest {
        // Of two who publish and then look, at least one sees the other.
        fence(Ordering::SeqCst);
        for position in self.candidates(key).filter(|position| *position != mine) {
            let mut other = self.meta(position).load(Ordering::Acquire);
            loop {
                let state = other & STATE_MASK;
                if other & TAG_MASK != key.tag() || (state != LIVE && state != TENTATIVE) {
                    break;
                }
                match self.compare(position, other, key) {
                    Comparison::Other => break,
                    Comparison::Same(existing) if state == LIVE || position < mine => {
                        self.withdraw(mine, meta);
                        return Contest::LostTo(existing);
                    }
                    Comparison::Same(_) if self.withdraw(position, other) => break,
                    Comparison::Same(_) | Comparison::Changed => {}
                }
                // It changed meanwhile. If it became LIVE it wins. If it went away and came anew, whoever brought it
                // did so after `mine` was published, will see it, and yields to it.
                let now = self.meta(position).load(Ordering::Acquire);
                if now == other || now & !STATE_MASK != other & !STATE_MASK {
                    break;
                }
                other = now;
            }
        }
        let live = (meta & !STATE_MASK) | LIVE;
        match self.meta(mine).compare_exchange(meta, live, Ordering::AcqRel, Ordering::Relaxed) {
            Ok(_) => Contest::Won,
            Err(_) => Contest::Withdrawn,
        }
    }

    /// Empties a slot if it is still as it was read.
    fn withdraw(&self, position: usize, meta: u64) -> bool {
        let empty = meta & !(TAG_MASK | STATE_MASK);
        self.meta(position).compare_exchange(meta, empty, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Changes who owns a flow, or where it lies. The owner only. Readers find the one or the other; what was done before is
    /// seen by whoever finds the new one.
    pub fn reassign(&self, position: Position, handle: Handle) {
        self.entry(position.index()).handle.store(handle.pack(), Ordering::Release);
    }

    /// Removes an entry; only its owner may, and once.
    pub fn remove(&self, position: Position) {
        let meta = self.meta(position.index()).load(Ordering::Relaxed);
        debug_assert_eq!(meta & STATE_MASK, LIVE, "an entry is removed once, by its owner");
        self.withdraw(position.index(), meta);
        self.len.fetch_sub(1, Ordering::Relaxed);
    }
}

enum Comparison {
    /// The slot holds the key.
    Same(Handle),
    /// It holds another key.
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
}

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    use super::support::{handle, key};
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
    fn a_table_fills_to_its_capacity_whatever_the_keys() {
        for secret in 0..20 {
            let table = FlowTable::new(6144, HashSecret([secret, !secret]));
            for n in 0..6144 {
                table.insert(&table.hash(&key(n)), handle(0, n)).unwrap();
            }
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
        let table = FlowTable::new(4096, HashSecret([9, 9]));
        let won: Vec<u32> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4u8)
                .map(|owner| {
                    let table = &table;
                    scope.spawn(move || {
                        (0..2000)
                            .filter(|n| table.insert(&table.hash(&key(*n)), handle(owner, *n)).is_ok())
                            .count() as u32
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(won.iter().sum::<u32>(), 2000);
        assert_eq!(table.len(), 2000);
    }
}

#[cfg(all(test, feature = "loom"))]
mod loom_tests {
    use super::support::{handle, key};
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
}
