//! Deadlines in a hierarchical timer wheel (Varghese and Lauck, scheme 6).
//!
//! One deadline a slot: a flow that waits for several things asks for the earliest and is asked again when it comes.
//! Arming, moving and cancelling are O(1); the passing of time costs the deadlines that fire and a few words per
//! level, never the number of flows. A deadline fires at the first tick at or after it, never before: resolution one
//! tick (1 ms). Deadlines beyond the span of the wheel (4.6 hours) are kept at its far end and come back to be placed again.

use crate::time::Now;

const TICK_NS: u64 = 1_000_000;
const LEVEL_BITS: u32 = 6;
const SLOTS: usize = 1 << LEVEL_BITS;
const LEVELS: usize = 4;
const SPAN: u64 = 1 << (LEVEL_BITS * LEVELS as u32);
const NONE: u32 = u32::MAX;

/// Nodes for which memory is kept.
const KEPT: usize = 1024;

#[derive(Clone, Copy)]
struct Node {
    next: u32,
    /// The previous node, or `NONE` at the head of a bucket.
    previous: u32,
    /// The deadline in ticks, and the bucket in the lowest bits: `BUCKETS` when it is not armed.
    deadline_and_bucket: u64,
}

const BUCKETS: usize = SLOTS * LEVELS;
const BUCKET_BITS: u32 = BUCKETS.ilog2() + 1;

impl Node {
    const VACANT: Self = Self { next: NONE, previous: NONE, deadline_and_bucket: BUCKETS as u64 };

    fn deadline_tick(self) -> u64 {
        self.deadline_and_bucket >> BUCKET_BITS
    }

    /// The bucket in which it is armed.
    fn bucket(self) -> Option<usize> {
        let bucket = self.deadline_and_bucket as usize & ((1 << BUCKET_BITS) - 1);
        (bucket < BUCKETS).then_some(bucket)
    }

    fn put(&mut self, deadline_tick: u64, bucket: usize) {
        self.deadline_and_bucket = deadline_tick << BUCKET_BITS | bucket as u64;
    }
}

/// Deadlines by index.
pub struct TimerWheel {
    nodes: Vec<Node>,
    heads: [u32; BUCKETS],
    /// One bit a bucket that is not empty, by level.
    occupied: [u64; LEVELS],
    tick: u64,
    armed: u32,
}

impl TimerWheel {
    /// An empty wheel whose time starts at `now`.
    pub fn new(now: Now) -> Self {
        Self {
            nodes: Vec::new(),
            heads: [NONE; BUCKETS],
            occupied: [0; LEVELS],
            tick: now.0 / TICK_NS,
            armed: 0,
        }
    }

    /// How many deadlines are armed.
    pub fn armed(&self) -> u32 {
        self.armed
    }

    /// The deadline of an index, rounded up to the tick, when it is armed.
    pub fn deadline(&self, index: u32) -> Option<Now> {
        let node = self.nodes.get(index as usize)?;
        node.bucket().map(|_| Now(node.deadline_tick() * TICK_NS))
    }

    /// Arms, or moves, the deadline of `index`.
    pub fn arm(&mut self, index: u32, deadline: Now) {
        if index as usize >= self.nodes.len() {
            self.nodes.resize(index as usize + 1, Node::VACANT);
        }
        self.cancel(index);
        let deadline_tick = deadline.0.div_ceil(TICK_NS).max(self.tick + 1);
        self.place(index, deadline_tick);
        self.armed += 1;
    }

    /// Arms `index` unless an earlier or equal deadline is armed already.
    pub fn arm_earlier(&mut self, index: u32, deadline: Now) {
        if self.deadline(index).is_none_or(|armed| deadline < armed) {
            self.arm(index, deadline);
        }
    }

    /// Forgets the deadline of `index`.
    pub fn cancel(&mut self, index: u32) {
        let Some(&node) = self.nodes.get(index as usize) else { return };
        let Some(bucket) = node.bucket() else { return };
        let Node { next, previous, .. } = node;
        if next != NONE {
            self.nodes[next as usize].previous = previous;
        }
        if previous == NONE {
            self.heads[bucket] = next;
            if next == NONE {
                self.occupied[bucket / SLOTS] &= !(1 << (bucket % SLOTS));
            }
        } else {
            self.nodes[previous as usize].next = next;
        }
        self.nodes[index as usize] = Node::VACANT;
        self.armed -= 1;
    }

    /// No index from `bound` on is in use: gives memory back once less than half of it is needed.
    pub fn shrink(&mut self, bound: u32) {
        let bound = (bound as usize).max(KEPT);
        if self.nodes.len() / 2 < bound {
            return;
        }
        // One that is armed all the same stays, and ends the search.
        let last = self.nodes.iter().rposition(|node| node.bucket().is_some());
        self.nodes.truncate(last.map_or(bound, |last| bound.max(last + 1)));
        self.nodes.shrink_to_fit();
    }

    fn place(&mut self, index: u32, deadline_tick: u64) {
        let ahead = deadline_tick - self.tick;
        let placed = deadline_tick.min(self.tick + SPAN - 1);
        let level = (0..LEVELS - 1)
            .find(|level| ahead < 1 << (LEVEL_BITS * (*level as u32 + 1)))
            .unwrap_or(LEVELS - 1);
        let slot = (placed >> (LEVEL_BITS * level as u32)) as usize % SLOTS;
        let bucket = level * SLOTS + slot;
        let head = self.heads[bucket];
        if head != NONE {
            self.nodes[head as usize].previous = index;
        }
        let node = &mut self.nodes[index as usize];
        (node.next, node.previous) = (head, NONE);
        node.put(deadline_tick, bucket);
        self.heads[bucket] = index;
        self.occupied[level] |= 1 << slot;
    }

    /// A time before which nothing fires, or `None` when nothing is armed. Never later than the earliest deadline.
    pub fn next(&self) -> Option<Now> {
        let mut earliest: Option<u64> = None;
        for level in 0..LEVELS {
            let shift = LEVEL_BITS * level as u32;
            let now_slot = self.tick >> shift;
            // Bits in the order in which their turns come, the current slot last: it was emptied on arrival.
            let start = (now_slot + 1) as u32 % SLOTS as u32;
            let turned = self.occupied[level].rotate_right(start);
            if turned != 0 {
                let turn = (now_slot + 1 + u64::from(turned.trailing_zeros())) << shift;
                earliest = Some(earliest.map_or(turn, |e| e.min(turn)));
            }
        }
        earliest.map(|tick| Now(tick * TICK_NS))
    }

    /// Moves time to `now` and hands every index whose deadline has come to `fire`, disarmed. Work is bounded by the
    /// deadlines that fire or move down a level; stretches without any are skipped.
    pub fn advance(&mut self, now: Now, mut fire: impl FnMut(u32)) {
        let target = now.0 / TICK_NS;
        while self.tick < target {
            let Some(next) = self.next() else {
                self.tick = target;
                return;
            };
            let step = next.0 / TICK_NS;
            if step > target {
                self.tick = target;
                return;
            }
            self.tick = step;
            for level in (0..LEVELS).rev() {
                let shift = LEVEL_BITS * level as u32;
                if self.tick & ((1 << shift) - 1) == 0 {
                    self.turn(level, (self.tick >> shift) as usize % SLOTS, &mut fire);
                }
            }
        }
    }

    /// Empties one bucket: what is due fires, the rest moves down.
    fn turn(&mut self, level: usize, slot: usize, fire: &mut impl FnMut(u32)) {
        let bucket = level * SLOTS + slot;
        let mut index = std::mem::replace(&mut self.heads[bucket], NONE);
        self.occupied[level] &= !(1 << slot);
        while index != NONE {
            let node = std::mem::replace(&mut self.nodes[index as usize], Node::VACANT);
            if node.deadline_tick() <= self.tick {
                self.armed -= 1;
                fire(index);
            } else {
                self.place(index, node.deadline_tick());
            }
            index = node.next;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn at_ms(ms: u64) -> Now {
        Now(ms * TICK_NS)
    }

    #[test]
    fn nothing_fires_early_and_everything_fires_once() {
        let mut wheel = TimerWheel::new(at_ms(5));
        for (index, ms) in [6, 68, 69, 70, 4_500, 300_000, 20_000_000].into_iter().enumerate() {
            wheel.arm(index as u32, at_ms(ms));
        }
        let mut fired = Vec::new();
        for ms in [5, 6, 67, 70, 4_499, 4_500, 299_999, 300_000, 19_999_999, 20_000_000] {
            wheel.advance(at_ms(ms), |index| fired.push((index, ms)));
        }
        assert_eq!(fired, [(0, 6), (1, 70), (2, 70), (3, 70), (4, 4_500), (5, 300_000), (6, 20_000_000)]);
        assert_eq!(wheel.armed(), 0);
        assert_eq!(wheel.next(), None);
    }

    #[test]
    fn a_jump_of_the_clock_by_hours_costs_only_what_fires() {
        let mut wheel = TimerWheel::new(at_ms(0));
        wheel.arm(0, at_ms(100));
        let mut fired = 0;
        wheel.advance(at_ms(1_000_000_000), |_| fired += 1);
        assert_eq!(fired, 1);
        wheel.arm(0, at_ms(1_000_000_001));
        assert_eq!(wheel.next(), Some(at_ms(1_000_000_001)));
    }

    #[test]
    fn memory_goes_back_when_the_indices_in_use_are_few_and_low() {
        let mut wheel = TimerWheel::new(at_ms(0));
        (0..10_000).for_each(|index| wheel.arm(index, at_ms(50)));
        wheel.shrink(9_000);
        assert!(wheel.nodes.len() >= 10_000, "half of it and more is in use");
        (1..9_000).for_each(|index| wheel.cancel(index));
        wheel.shrink(1);
        assert!(wheel.nodes.len() >= 10_000, "armed deadlines are kept");
        (9_000..10_000).for_each(|index| wheel.cancel(index));
        wheel.shrink(1);
        assert_eq!(wheel.nodes.capacity(), KEPT);
        let mut fired = Vec::new();
        wheel.advance(at_ms(100), |index| fired.push(index));
        assert_eq!(fired, [0]);
    }

    proptest! {
        #[test]
        fn the_wheel_agrees_with_a_sorted_map(
            operations in proptest::collection::vec((0u32..20, 0u64..40_000_000, 0u8..4), 1..200)
        ) {
            let mut wheel = TimerWheel::new(at_ms(0));
            let mut model: BTreeMap<u32, u64> = BTreeMap::new();
            let mut now = 0;
            for (index, ms, kind) in operations {
                match kind {
                    0 => { wheel.cancel(index); model.remove(&index); }
                    1 | 2 => { wheel.arm(index, at_ms(now + ms)); model.insert(index, (now + ms).max(now + 1)); }
                    _ => {
                        now += ms / 100;
                        let mut fired = Vec::new();
                        wheel.advance(at_ms(now), |index| fired.push(index));
                        let mut expected: Vec<u32> = model.iter().filter(|(_, d)| **d <= now).map(|(i, _)| *i).collect();
                        model.retain(|_, d| *d > now);
                        fired.sort_unstable();
                        expected.sort_unstable();
                        prop_assert_eq!(fired, expected);
                    }
                }
                prop_assert_eq!(wheel.armed() as usize, model.len());
                let next = wheel.next().map(|n| n.0 / TICK_NS);
                prop_assert_eq!(next.is_some(), !model.is_empty());
                if let (Some(next), Some(earliest)) = (next, model.values().min()) {
                    prop_assert!(next <= *earliest && next > now);
                }
            }
        }
    }
}
