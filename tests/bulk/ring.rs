//! A guest's memory and the driver's side of a split virtqueue (virtio 1.3, 2.7), lean enough to stand in a benchmark:
//! chains are used over and over, and nothing is allocated once it stands.
#![allow(unsafe_code, dead_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use hythe::link::vhost_user::memory::{GuestMemory, Place, Region};
use hythe::link::virtqueue::Parts;
use vm_memory::MmapRegion;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Where the guest's memory begins, for it and for its front-end.
pub const START: u64 = 0x4000_0000;

/// Memory of a guest, in one region.
#[derive(Clone)]
pub struct Memory {
    pub map: Arc<GuestMemory>,
    start: *mut u8,
    len: usize,
}

// SAFETY: what the pointer leads to is shared with the device anyway, and touched by copies and atomics alone.
unsafe impl Send for Memory {}

impl Memory {
    pub fn new(len: usize) -> Self {
        let mapping = MmapRegion::new(len).unwrap();
        let place = Place { guest: START, front_end: START, offset: 0, len: len as u64 };
        let map = Arc::new(GuestMemory::new(vec![Arc::new(Region::new(place, mapping))]).unwrap());
        let start = map.at_guest(START, len).unwrap();
        Self { map, start, len }
    }

    /// Where it lies in this process.
    pub fn range(&self) -> std::ops::Range<usize> {
        self.start as usize..self.start as usize + self.len
    }

    fn at(&self, address: u64, len: usize) -> *mut u8 {
        let offset = (address - START) as usize;
        assert!(offset + len <= self.len);
        self.start.wrapping_add(offset)
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        // SAFETY: `at` has checked that it lies in the mapping, to which nobody has a reference.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(address, bytes.len()), bytes.len()) }
    }

    pub fn read(&self, address: u64, bytes: &mut [u8]) {
        // SAFETY: as in `write`.
        unsafe {
            std::ptr::copy_nonoverlapping(self.at(address, bytes.len()), bytes.as_mut_ptr(), bytes.len());
        }
    }

    fn word(&self, address: u64) -> &AtomicU16 {
        // SAFETY: an aligned word of the mapping, used by both sides as an atomic.
        unsafe { AtomicU16::from_ptr(self.at(address, 2).cast()) }
    }

    pub fn describe(&self, address: u64, buffer: u64, len: u32, flags: u16, next: u16) {
        let word =
            u128::from(buffer) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
        self.write(address, &word.to_le_bytes());
    }
}

/// One queue, whose chain number n always has the head n times as many descriptors as a chain has.
pub struct Ring {
    memory: Memory,
    size: u16,
    base: u64,
    available: u16,
    seen_used: u16,
    told: u16,
}

impl Ring {
    /// How much memory the rings of the longest queue take.
    pub const LEN: u64 = 0x2_0000;

    /// The rings at `base`, empty.
    pub fn new(memory: &Memory, base: u64, size: u16) -> Self {
        let ring = Self { memory: memory.clone(), size, base, available: 0, seen_used: 0, told: 0 };
        for slot in 0..size {
            ring.set_entry(slot, slot);
        }
        ring
    }

    pub fn parts(&self) -> Parts {
        let (descriptors, available, used) = (self.base, self.base + 0x8000, self.base + 0x1_0000);
        Parts {
            size: self.size,
            descriptors,
            available,
            used,
            next: Some(0),
            event_index: true,
            indirect: true,
        }
    }

    /// Which descriptor is at the head of the chain that an entry of the available ring makes available.
    pub fn set_entry(&self, slot: u16, head: u16) {
        self.memory.write(self.parts().available + 4 + 2 * u64::from(slot % self.size), &head.to_le_bytes());
    }

    pub fn describe(&self, index: u16, buffer: u64, len: u32, flags: u16, next: u16) {
        self.memory.describe(self.base + 16 * u64::from(index), buffer, len, flags, next);
    }

    /// How many chains were made available in all, and how many came back.
    pub fn counts(&self) -> (u16, u16) {
        (self.available, self.seen_used)
    }

    /// The next so many entries are available.
    pub fn offer(&mut self, count: u16) {
        self.available = self.available.wrapping_add(count);
        self.memory.word(self.parts().available + 2).store(self.available, Ordering::Release);
    }

    /// Whether the device wants to be told of what became available since this was asked last.
    pub fn wants_kick(&mut self) -> bool {
        // The index is seen before the wish is read (virtio 1.3, 2.7.13.4.1).
        fence(Ordering::SeqCst);
        let event =
            self.memory.word(self.parts().used + 4 + 8 * u64::from(self.size)).load(Ordering::Relaxed);
        let told = std::mem::replace(&mut self.told, self.available);
        self.available.wrapping_sub(event).wrapping_sub(1) < self.available.wrapping_sub(told)
    }

    /// The next chain that came back: its head, and how many bytes were written.
    pub fn take_used(&mut self) -> Option<(u32, u32)> {
        let used = self.parts().used;
        if self.memory.word(used + 2).load(Ordering::Acquire) == self.seen_used {
            return None;
        }
        let mut entry = [0; 8];
        self.memory.read(used + 4 + 8 * u64::from(self.seen_used % self.size), &mut entry);
        self.seen_used = self.seen_used.wrapping_add(1);
        let entry = u64::from_le_bytes(entry);
        Some((entry as u32, (entry >> 32) as u32))
    }

    /// All that was made available came back.
    pub fn skip_used(&mut self) {
        self.seen_used = self.available;
    }

    /// Wants no interrupt, or one once the chain after the next `after` comes back.
    pub fn set_used_event(&self, after: u16) {
        let at = self.parts().available + 4 + 2 * u64::from(self.size);
        self.memory.word(at).store(self.seen_used.wrapping_add(after), Ordering::Relaxed);
    }
}
