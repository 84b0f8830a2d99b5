//! A driver for tests: what the other side of a queue does, rightly or wrongly.
#![allow(missing_docs, clippy::missing_panics_doc)]

use std::sync::Arc;

use vm_memory::MmapRegion;

use crate::link::vhost_user::memory::{GuestMemory, Place, Region};

use super::{Parts, SplitQueue};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// The guest's memory begins here for the guest, and elsewhere for its front-end.
pub const GUEST: u64 = 0x4000_0000;
const FRONT_END: u64 = 0x7f00_0000_0000;
/// How much there is of it, in two regions that lie next to each other.
pub const MEMORY: usize = 2 << 20;

const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x8000;
const USED: u64 = 0x1_0000;
/// Where the rings of another queue begin.
const SECOND: u64 = 0x2_0000;
/// Behind the rings there is room for buffers.
pub const BUFFERS: u64 = GUEST + 0x4_0000;

/// A driver, and the memory that it shares.
pub struct Driver {
    pub memory: Arc<GuestMemory>,
    pub size: u16,
    /// Where the rings begin in the memory.
    base: u64,
    available: u16,
    seen_used: u16,
    next_descriptor: u16,
}

impl Driver {
    pub fn new(size: u16) -> Self {
        let half = MEMORY / 2;
        let region = |index: usize| {
            let at = (index * half) as u64;
            let place = Place { guest: GUEST + at, front_end: FRONT_END + at, offset: 0, len: half as u64 };
            Arc::new(Region::new(place, MmapRegion::new(half).unwrap()))
        };
        let memory = Arc::new(GuestMemory::new(vec![region(1), region(0)]).unwrap());
        Self { memory, size, base: 0, available: 0, seen_used: 0, next_descriptor: 0 }
    }

    /// The driver of another queue in the same memory.
    #[must_use]
    pub fn beside(&self) -> Self {
        let memory = self.memory.clone();
        Self { memory, size: self.size, base: SECOND, available: 0, seen_used: 0, next_descriptor: 0 }
    }

    pub fn parts(&self) -> Parts {
        Parts {
            size: self.size,
            descriptors: FRONT_END + self.base + DESCRIPTORS,
            available: FRONT_END + self.base + AVAILABLE,
            used: FRONT_END + self.base + USED,
            next: Some(0),
            event_index: true,
            indirect: true,
        }
    }

    /// The device's queue.
    pub fn queue(&self) -> SplitQueue {
        SplitQueue::new(self.memory.clone(), &self.parts()).unwrap()
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        let mut pieces = Vec::new();
        assert!(self.memory.pieces(address, bytes.len(), &mut pieces));
        let mut at = 0;
        for piece in &pieces {
            at += piece.copy_from(&bytes[at..]);
        }
    }

    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let (mut pieces, mut bytes) = (Vec::new(), Vec::new());
        assert!(self.memory.pieces(address, len, &mut pieces));
        for piece in &pieces {
            piece.copy_to(&mut bytes);
        }
        bytes
    }

    fn word(&self, address: u64) -> u16 {
        u16::from_le_bytes(self.read(address, 2).try_into().unwrap())
    }

    fn set_word(&self, address: u64, word: u16) {
        self.write(address, &word.to_le_bytes());
    }

    fn encoded(address: u64, len: u32, flags: u16, next: u16) -> Vec<u8> {
        [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
    }

    /// Writes a descriptor of the table.
    pub fn describe(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = GUEST + self.base + DESCRIPTORS + 16 * u64::from(index);
        self.write(at, &Self::encoded(address, len, flags, next));
    }

    /// Writes an indirect table whose descriptors follow each other.
    pub fn describe_table(&self, at: u64, buffers: &[(u64, u32)], flags: u16) {
        for (index, (address, len)) in buffers.iter().enumerate() {
            let last = index + 1 == buffers.len();
            let flags = if last { flags } else { flags | NEXT };
            self.write(at + 16 * index as u64, &Self::encoded(*address, *len, flags, index as u16 + 1));
        }
    }

    /// Makes a chain of descriptors and makes it available; returns its head.
    pub fn offer(&mut self, buffers: &[(u64, u32)], flags: u16) -> u16 {
        let head = self.next_descriptor;
        for (index, (address, len)) in buffers.iter().enumerate() {
            let at = self.next_descriptor;
            self.next_descriptor = (at + 1) % self.size;
            let last = index + 1 == buffers.len();
            self.describe(at, *address, *len, if last { flags } else { flags | NEXT }, self.next_descriptor);
        }
        self.make_available(head);
        head
    }

    pub fn make_available(&mut self, head: u16) {
        let slot = u64::from(self.available % self.size);
        self.set_word(GUEST + self.base + AVAILABLE + 4 + 2 * slot, head);
        self.set_available_index(self.available.wrapping_add(1));
    }

    pub fn set_available_index(&mut self, index: u16) {
        self.available = index;
        self.set_word(GUEST + self.base + AVAILABLE + 2, index);
    }

    /// Wants no interrupt before so many chains came back in all (event indices).
    pub fn set_used_event(&self, index: u16) {
        self.set_word(GUEST + self.base + AVAILABLE + 4 + 2 * u64::from(self.size), index);
    }

    /// The available index at which the device wants to be told.
    pub fn available_event(&self) -> u16 {
        self.word(GUEST + self.base + USED + 4 + 8 * u64::from(self.size))
    }

    /// What came back: heads and written lengths.
    pub fn take_used(&mut self) -> Vec<(u32, u32)> {
        let index = self.word(GUEST + self.base + USED + 2);
        let mut used = Vec::new();
        while self.seen_used != index {
            let slot = u64::from(self.seen_used % self.size);
            let entry = self.read(GUEST + self.base + USED + 4 + 8 * slot, 8);
            let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
            used.push((number(&entry[..4]), number(&entry[4..])));
            self.seen_used = self.seen_used.wrapping_add(1);
        }
        used
    }

    /// Where the rings lie, for one who scribbles over them.
    pub fn rings() -> std::ops::Range<u64> {
        GUEST..BUFFERS
    }
}
