//! The records of one worker, by index and generation.
//!
//! Memory grows with use in chunks that never move and are kept for reuse; a handle whose generation is past finds
//! nothing. Not shared: one worker reads and writes it.

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

const CHUNK: usize = 256;

struct Entry<T> {
    generation: u32,
    /// The next free index, when the record is vacant.
    next_free: u32,
    record: Option<T>,
}

/// Records by slot.
pub struct Slab<T> {
    chunks: Vec<Box<[Entry<T>]>>,
    free: u32,
    len: u32,
    capacity: u32,
}

const NONE: u32 = u32::MAX;

impl<T> Slab<T> {
    /// A slab that holds at most `capacity` records. Nothing is allocated yet.
    pub fn new(capacity: u32) -> Self {
        Self { chunks: Vec::new(), free: NONE, len: 0, capacity }
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
        self.chunks.get(index as usize / CHUNK).map(|chunk| &chunk[index as usize % CHUNK])
    }

    fn entry_mut(&mut self, index: u32) -> Option<&mut Entry<T>> {
        self.chunks.get_mut(index as usize / CHUNK).map(|chunk| &mut chunk[index as usize % CHUNK])
    }

    fn grow(&mut self) -> bool {
        let start = (self.chunks.len() * CHUNK) as u32;
        if start >= self.capacity {
            return false;
        }
        let chunk = (0..CHUNK as u32)
            .map(|i| Entry {
                generation: 0,
                next_free: if i + 1 < CHUNK as u32 { start + i + 1 } else { NONE },
                record: None,
            })
            .collect();
        self.chunks.push(chunk);
        self.free = start;
        true
    }

    /// Puts a record in, or gives it back when the slab is full.
    pub fn insert(&mut self, record: T) -> Result<Slot, T> {
        let Some(slot) = self.vacancy() else { return Err(record) };
        match self.entry_mut(slot.index) {
            Some(entry) => {
                let next_free = entry.next_free;
                entry.record = Some(record);
                self.free = next_free;
                self.len += 1;
                Ok(slot)
            }
            None => Err(record),
        }
    }

    /// The slot that the next insertion will use, or `None` when the slab is full.
    pub fn vacancy(&mut self) -> Option<Slot> {
        if self.len >= self.capacity || (self.free == NONE && !self.grow()) {
            return None;
        }
        let index = self.free;
        self.entry(index).map(|entry| Slot { index, generation: entry.generation })
    }

    /// One past the largest index that was ever in use, rounded up.
    pub fn index_bound(&self) -> u32 {
        (self.chunks.len() * CHUNK) as u32
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
        let free = self.free;
        let entry = self.entry_mut(slot.index).filter(|entry| entry.generation == slot.generation)?;
        let record = entry.record.take()?;
        entry.generation = (entry.generation + 1) & GENERATION_MASK;
        entry.next_free = free;
        self.free = slot.index;
        self.len -= 1;
        Some(record)
    }

    /// The slots in use. For shutting down and for reports: never on the path of a frame.
    pub fn slots(&self) -> Vec<Slot> {
        (0..self.index_bound()).filter_map(|index| self.slot_at(index)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let mut slab = Slab::new(300);
        let slots: Vec<Slot> = (0..300).map(|i| slab.insert(i).unwrap()).collect();
        assert_eq!(slab.insert(300), Err(300));
        for slot in &slots {
            slab.remove(*slot).unwrap();
        }
        assert!(slab.is_empty());
        for i in 0..300 {
            slab.insert(i).unwrap();
        }
        assert_eq!(slab.chunks.len(), 2, "no growth beyond what the capacity needs");
        assert_eq!(slab.slots().len(), 300);
    }
}
