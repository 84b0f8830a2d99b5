//! The records of one worker, by index and generation.
//!
//! Memory comes and goes with use, in chunks that never move while they hold a record. A new record lies in the first chunk
//! that has room, so that after a flood of flows the last chunks empty. An empty one is given back at once when an eighth of
//! it was used, since so many insertions have paid for that; one of which less was used is kept until there is another, so
//! that flows that come and go at the edge of a chunk cost no allocations. A handle whose generation is past
//! finds nothing, whatever became of its chunk meanwhile: a chunk that is made anew goes on where its generations were.
//! Not shared: one worker reads and writes it.

/// Where a record lies, and which one of those that have lain there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Slot {
    /// The index.
    pub index: u32,
    /// The generation, counted modulo 2^24.
    pub generation: u32,
}

/// Generations are kept in 24 bits, so that a slot fits into a table handle.
pub const GENERATION_MASK: u32 = 0x00ff_ffff;

/// Bytes of a chunk at the least: so many are memory of their own, which goes back to the system when it is freed.
const CHUNK_BYTES: usize = 72 << 10;

struct Entry<T> {
    generation: u32,
    /// The next free place of the chunk, when the record is vacant.
    next_free: u32,
    record: Option<T>,
}

struct Chunk<T> {
    /// Those that were ever used, in memory for all of them, or for none.
    entries: Vec<Entry<T>>,
    /// Its first place that was used and is free.
    free: u32,
    len: u32,
    /// The generation in which its records begin.
    generation: u32,
}

impl<T> Chunk<T> {
    fn absent() -> Self {
        Self { entries: Vec::new(), free: NONE, len: 0, generation: 0 }
    }

    fn is_absent(&self) -> bool {
        self.entries.capacity() == 0
    }

    /// The place and the generation of the next record; there is room for it.
    fn vacancy(&self) -> (usize, u32) {
        match self.entries.get(self.free as usize) {
            Some(entry) => (self.free as usize, entry.generation),
            None => (self.entries.len(), self.generation),
        }
    }

    fn insert(&mut self, record: T) {
        self.len += 1;
        match self.entries.get_mut(self.free as usize) {
            Some(entry) => {
                self.free = entry.next_free;
                entry.record = Some(record);
            }
            None => {
                let generation = self.generation;
                self.entries.push(Entry { generation, next_free: NONE, record: Some(record) });
            }
        }
    }

    /// Gives its memory back; only the newest of its generations is kept.
    fn clear(&mut self) {
        let ahead = |entry: &Entry<T>| entry.generation.wrapping_sub(self.generation) & GENERATION_MASK;
        let newest = self.entries.iter().map(ahead).max().unwrap_or(0);
        self.generation = (self.generation + newest) & GENERATION_MASK;
        self.entries = Vec::new();
        self.free = NONE;
    }
}

/// Records by slot.
pub struct Slab<T> {
    chunks: Vec<Chunk<T>>,
    /// One bit for each chunk that has room.
    room: Vec<u64>,
    /// One past the last chunk that is there.
    bound: usize,
    /// A chunk that is empty, and kept.
    spare: Option<usize>,
    len: u32,
    capacity: u32,
}

const NONE: u32 = u32::MAX;
const BITS: usize = u64::BITS as usize;

impl<T> Slab<T> {
    const CHUNK: usize = (CHUNK_BYTES / size_of::<Entry<T>>()).next_power_of_two();

    /// A slab that holds at most `capacity` records. Nothing is allocated yet.
    pub fn new(capacity: u32) -> Self {
        Self { chunks: Vec::new(), room: Vec::new(), bound: 0, spare: None, len: 0, capacity }
    }

    /// How many records there may be.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// How many records there are.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn entry(&self, index: u32) -> Option<&Entry<T>> {
        self.chunks.get(index as usize / Self::CHUNK)?.entries.get(index as usize % Self::CHUNK)
    }

    fn entry_mut(&mut self, index: u32) -> Option<&mut Entry<T>> {
        self.chunks.get_mut(index as usize / Self::CHUNK)?.entries.get_mut(index as usize % Self::CHUNK)
    }

    /// Puts a record in, or gives it back when the slab is full.
    pub fn insert(&mut self, record: T) -> Result<Slot, T> {
        let Some(slot) = self.vacancy() else { return Err(record) };
        let number = slot.index as usize / Self::CHUNK;
        let chunk = &mut self.chunks[number];
        chunk.insert(record);
        self.len += 1;
        if chunk.len as usize == Self::CHUNK {
            self.room[number / BITS] &= !(1 << (number % BITS));
        }
        self.spare = self.spare.filter(|spare| *spare != number);
        Ok(slot)
    }

    /// The slot that the next insertion will use, or `None` when the slab is full.
    pub fn vacancy(&mut self) -> Option<Slot> {
        if self.len >= self.capacity {
            return None;
        }
        let number = self.first_with_room();
        let chunk = &mut self.chunks[number];
        if chunk.is_absent() {
            chunk.entries.reserve_exact(Self::CHUNK);
            self.bound = self.bound.max(number + 1);
        }
        let (place, generation) = chunk.vacancy();
        Some(Slot { index: (number * Self::CHUNK + place) as u32, generation })
    }

    /// The first chunk that has room, if need be a new one.
    fn first_with_room(&mut self) -> usize {
        if let Some(word) = self.room.iter().position(|word| *word != 0) {
            return word * BITS + self.room[word].trailing_zeros() as usize;
        }
        let number = self.chunks.len();
        self.chunks.push(Chunk::absent());
        self.room.resize(number / BITS + 1, 0);
        self.room[number / BITS] |= 1 << (number % BITS);
        number
    }

    /// One past the largest index in use, rounded up.
    pub fn index_bound(&self) -> u32 {
        (self.bound * Self::CHUNK) as u32
    }

    /// The record of a slot, or `None` when it is gone.
    pub fn get(&self, slot: Slot) -> Option<&T> {
        self.entry(slot.index).filter(|entry| entry.generation == slot.generation)?.record.as_ref()
    }

    /// The record of a slot, or `None` when it is gone.
    pub fn get_mut(&mut self, slot: Slot) -> Option<&mut T> {
        self.entry_mut(slot.index).filter(|entry| entry.generation == slot.generation)?.record.as_mut()
    }

    /// The slot that is in use at an index.
    pub fn slot_at(&self, index: u32) -> Option<Slot> {
        let entry = self.entry(index)?;
        entry.record.as_ref().map(|_| Slot { index, generation: entry.generation })
    }

    /// Takes a record out; its slot is stale from now on.
    pub fn remove(&mut self, slot: Slot) -> Option<T> {
        let (number, place) = (slot.index as usize / Self::CHUNK, slot.index as usize % Self::CHUNK);
        let chunk = self.chunks.get_mut(number)?;
        let entry = chunk.entries.get_mut(place).filter(|entry| entry.generation == slot.generation)?;
        let record = entry.record.take()?;
        entry.generation = (entry.generation + 1) & GENERATION_MASK;
        entry.next_free = chunk.free;
        chunk.free = place as u32;
        chunk.len -= 1;
        self.len -= 1;
        self.room[number / BITS] |= 1 << (number % BITS);
        if chunk.len == 0 {
            self.emptied(number);
        }
        Some(record)
    }

    /// A chunk holds nothing any more. Of two that are kept the later one goes.
    fn emptied(&mut self, number: usize) {
        let gone = if self.chunks[number].entries.len() > Self::CHUNK / 8 {
            Some(number)
        } else {
            let spare = self.spare.replace(number);
            self.spare = Some(spare.map_or(number, |spare| spare.min(number)));
            spare.map(|spare| spare.max(number))
        };
        let Some(gone) = gone else { return };
        self.chunks[gone].clear();
        while self.bound > 0 && self.chunks[self.bound - 1].is_absent() {
            self.bound -= 1;
        }
    }

    /// The slots in use. For shutting down and for reports: never on the path of a frame.
    pub fn slots(&self) -> Vec<Slot> {
        (0..self.index_bound()).filter_map(|index| self.slot_at(index)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: usize = Slab::<usize>::CHUNK;

    #[test]
    fn a_stale_slot_finds_nothing() {
        let mut slab = Slab::new(10);
        let vacancy = slab.vacancy();
        let first = slab.insert("first").unwrap();
        assert_eq!(vacancy, Some(first));
        assert_eq!(slab.remove(first), Some("first"));
        let second = slab.insert("second").unwrap();
        assert_eq!(second.index, first.index);
        assert_eq!(slab.get(first), None);
        assert_eq!(slab.remove(first), None);
        assert_eq!(slab.get(second), Some(&"second"));
    }

    #[test]
    fn the_capacity_holds_and_room_is_used_again() {
        const FEW: usize = CHUNK + 44;
        let mut slab = Slab::new(FEW as u32);
        let slots: Vec<Slot> = (0..FEW).map(|i| slab.insert(i).unwrap()).collect();
        assert_eq!(slab.insert(FEW), Err(FEW));
        for slot in &slots {
            slab.remove(*slot).unwrap();
        }
        assert!(slab.is_empty());
        for i in 0..FEW {
            slab.insert(i).unwrap();
        }
        assert_eq!(slab.chunks.len(), 2, "no growth beyond what the capacity needs");
        assert_eq!(slab.slots().len(), FEW);
    }

    fn chunks_in_memory<T>(slab: &Slab<T>) -> usize {
        slab.chunks.iter().filter(|chunk| !chunk.is_absent()).count()
    }

    #[test]
    fn memory_goes_back_when_records_do_and_stale_slots_stay_stale() {
        let mut slab = Slab::new(20 * CHUNK as u32);
        let fill = |slab: &mut Slab<usize>| -> Vec<Slot> {
            (0..20 * CHUNK).map(|i| slab.insert(i).unwrap()).collect()
        };
        let mut stale = Vec::new();
        for _ in 0..3 {
            let slots = fill(&mut slab);
            assert_eq!(chunks_in_memory(&slab), 20);
            assert!(
                stale.iter().all(|slot| slab.get(*slot).is_none()),
                "a slot of before finds a record of now"
            );
            assert!(slots.iter().all(|slot| slab.remove(*slot).is_some()));
            assert_eq!((chunks_in_memory(&slab), slab.index_bound()), (0, 0));
            stale.extend(slots);
        }
    }

    #[test]
    fn records_that_come_and_go_at_the_edge_of_a_chunk_cost_no_memory_each_time() {
        let mut slab = Slab::new(10 * CHUNK as u32);
        let slots: Vec<Slot> = (0..CHUNK).map(|i| slab.insert(i).unwrap()).collect();
        let over = slab.insert(0usize).unwrap();
        slab.remove(over).unwrap();
        assert_eq!(chunks_in_memory(&slab), 2, "the second one is kept for the next");
        for slot in slots {
            slab.remove(slot).unwrap();
        }
        assert_eq!(chunks_in_memory(&slab), 1, "what was full is not");
    }

    #[test]
    fn a_new_record_lies_in_the_first_chunk_that_has_room() {
        let mut slab = Slab::new(10 * CHUNK as u32);
        let slots: Vec<Slot> = (0..4 * CHUNK).map(|i| slab.insert(i).unwrap()).collect();
        for gone in [3 * CHUNK + 1, CHUNK + 7, 2 * CHUNK] {
            slab.remove(slots[gone]).unwrap();
        }
        let places: Vec<u32> = (0..4).map(|i| slab.insert(i).unwrap().index).collect();
        let expected = [CHUNK + 7, 2 * CHUNK, 3 * CHUNK + 1, 4 * CHUNK].map(|index| index as u32);
        assert_eq!(places, expected);
    }
}
