//! A guest's memory and the driver's side of a split virtqueue (virtio 1.3, 2.7), lean enough to stand in a benchmark:
//! chains are used over and over, and nothing is allocated once it stands.
//!
//! The memory is a memfd, so that a device in another process can have it (vhost-user). Where the driver is in the same
//! process as the device, `map` is that memory as the device sees it. What a queue's chains are and which of them is
//! offered when is up to who uses it; with [`Ring::new`] entry number n names descriptor number n.
#![allow(unsafe_code, dead_code, clippy::unwrap_used)]

use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use hythe::io::Piece;
use hythe::link::vhost_user::memory::{GuestMemory, Place, Region};
use hythe::link::virtqueue::Parts;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::{VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{FileOffset, MmapRegion};

/// Flags of a descriptor (2.7.5).
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// The flag of either side that wants no notification, where there are no event indices (2.7.6 and 2.7.8).
const NOT_NOTIFIED: u16 = 1;

/// Where the guest's memory begins, for it and for its front-end.
pub const START: u64 = 0x4000_0000;

/// Memory of a guest, in one region.
#[derive(Clone)]
pub struct Memory {
    pub map: Arc<GuestMemory>,
    file: Arc<OwnedFd>,
    start: u64,
    whole: Piece,
}

impl Memory {
    pub fn new(len: usize) -> Self {
        Self::at(START, len)
    }

    /// One that begins elsewhere.
    pub fn at(start: u64, len: usize) -> Self {
        let file = memfd_create("guest", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&file, len as i64).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap().into(), 0);
        let mapping = MmapRegion::from_file(offset, len).unwrap();
        let place = Place { guest: start, front_end: start, offset: 0, len: len as u64 };
        let map = Arc::new(GuestMemory::new(vec![Arc::new(Region::new(place, mapping))]).unwrap());
        let mut pieces = Vec::new();
        assert!(map.pieces(start, len, &mut pieces));
        Self { map, file: Arc::new(file), start, whole: pieces[0] }
    }

    /// As a front-end shares it.
    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: self.start,
            memory_size: self.whole.len() as u64,
            userspace_addr: self.start,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// Where it lies in this process.
    pub fn range(&self) -> Range<usize> {
        let start = self.whole.start() as usize;
        start..start + self.whole.len()
    }

    /// A part of it, which is mapped for as long as any clone of the memory is there.
    pub fn piece(&self, address: u64, len: usize) -> Piece {
        let piece = self.whole.part((address - self.start) as usize, len);
        assert_eq!(piece.len(), len, "outside of the memory");
        piece
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.piece(address, bytes.len()).copy_from(bytes);
    }

    pub fn read(&self, address: u64, bytes: &mut [u8]) {
        self.piece(address, bytes.len()).copy_out(bytes);
    }

    pub fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(address, &mut bytes);
        bytes
    }

    fn word(&self, address: u64) -> &AtomicU16 {
        let word: *mut u16 = self.piece(address, 2).start().cast();
        assert!(word.is_aligned());
        // SAFETY: the word is aligned and in the mapping, which stays for as long as `self`; both sides use it as an atomic.
        unsafe { AtomicU16::from_ptr(word) }
    }

    /// Writes a descriptor down, in the queue's table or an indirect one.
    pub fn describe(&self, address: u64, buffer: u64, len: u32, flags: u16, next: u16) {
        let word =
            u128::from(buffer) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
        self.write(address, &word.to_le_bytes());
    }
}

/// One queue.
pub struct Ring {
    memory: Memory,
    size: u16,
    base: u64,
    event_index: bool,
    available: u16,
    seen_used: u16,
    told: u16,
}

impl Ring {
    /// How much memory the rings of a queue take, up to 2,048 entries.
    pub const LEN: u64 = 0x2_0000;

    /// The rings at `base`, empty, whatever was there.
    pub fn new(memory: &Memory, base: u64, size: u16) -> Self {
        memory.write(base, &vec![0; Self::LEN as usize]);
        let memory = memory.clone();
        let ring = Self { memory, size, base, event_index: true, available: 0, seen_used: 0, told: 0 };
        for slot in 0..size {
            ring.set_entry(slot, slot);
        }
        ring
    }

    /// One for a device without event indices (`VIRTIO_F_EVENT_IDX`).
    #[must_use]
    pub fn without_event_index(mut self) -> Self {
        self.event_index = false;
        self
    }

    /// Begins anew, with nothing in it.
    pub fn clear(&mut self) {
        let event_index = self.event_index;
        *self = Self { event_index, ..Self::new(&self.memory, self.base, self.size) };
    }

    /// As a device takes it over.
    pub fn parts(&self) -> Parts {
        let (descriptors, available, used) = (self.base, self.base + 0x8000, self.base + 0x1_0000);
        let event_index = self.event_index;
        Parts { size: self.size, descriptors, available, used, next: Some(0), event_index, indirect: true }
    }

    /// As a front-end tells of it.
    pub fn addresses(&self) -> VringConfigData {
        let Parts { size, descriptors, available, used, .. } = self.parts();
        VringConfigData {
            queue_max_size: size,
            queue_size: size,
            flags: 0,
            desc_table_addr: descriptors,
            used_ring_addr: used,
            avail_ring_addr: available,
            log_addr: None,
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
        // The index is seen before the wish is read (2.7.13.4.1).
        fence(Ordering::SeqCst);
        let used = self.parts().used;
        let told = std::mem::replace(&mut self.told, self.available);
        let new = self.available.wrapping_sub(told);
        if !self.event_index {
            return new > 0 && self.memory.word(used).load(Ordering::Relaxed) & NOT_NOTIFIED == 0;
        }
        let event = self.memory.word(used + 4 + 8 * u64::from(self.size)).load(Ordering::Relaxed);
        self.available.wrapping_sub(event).wrapping_sub(1) < new
    }

    /// How many chains have come back that nobody has taken yet.
    fn waiting(&self) -> u16 {
        let used = self.memory.word(self.parts().used + 2).load(Ordering::Acquire);
        let waiting = used.wrapping_sub(self.seen_used);
        assert!(waiting <= self.available.wrapping_sub(self.seen_used), "more came back than was offered");
        waiting
    }

    /// The next chain that came back: its head, and how many bytes were written.
    pub fn take_used(&mut self) -> Option<(u32, u32)> {
        if self.waiting() == 0 {
            return None;
        }
        let mut entry = [0; 8];
        self.memory.read(self.parts().used + 4 + 8 * u64::from(self.seen_used % self.size), &mut entry);
        self.seen_used = self.seen_used.wrapping_add(1);
        let entry = u64::from_le_bytes(entry);
        Some((entry as u32, (entry >> 32) as u32))
    }

    /// All that was made available came back.
    pub fn skip_used(&mut self) {
        self.seen_used = self.available;
    }

    /// Wants no interrupt (`u16::MAX`), or one once the chain after the next `after` comes back. Without event indices there
    /// is nothing between none and one for each.
    pub fn set_used_event(&self, after: u16) {
        let available = self.parts().available;
        let (at, value) = if self.event_index {
            (available + 4 + 2 * u64::from(self.size), self.seen_used.wrapping_add(after))
        } else {
            (available, if after == u16::MAX { NOT_NOTIFIED } else { 0 })
        };
        self.memory.word(at).store(value, Ordering::Relaxed);
    }

    /// Wants an interrupt like that. Whether it will come: where the chain is back already, perhaps it does not.
    pub fn awaits_used(&self, after: u16) -> bool {
        if self.waiting() > after {
            return false;
        }
        self.set_used_event(after);
        // The wish is seen before the index is read (2.7.14).
        fence(Ordering::SeqCst);
        self.waiting() <= after
    }
}
