//! The driver's side of a split virtqueue (virtio 1.3, 2.7), in memory that is shared.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU16, Ordering};

use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{FileOffset, MmapRegion};

/// Flags of a descriptor (2.7.5).
const GOES_ON: u16 = 1;
const IS_WRITTEN: u16 = 2;

/// Where the guest's memory begins for the guest; the front-end's addresses are the same.
const START: u64 = 0x4000_0000;
const LEN: usize = 2 << 20;
/// Where one ring begins behind the other.
const APART: u64 = 0x1_0000;
/// The used ring is the last part of it.
const USED_LEN: usize = 0x8000;
/// Behind the rings there is room for buffers.
pub const BUFFERS: u64 = START + 0x10_0000;

/// Memory of a guest, in a memfd.
pub struct Memory {
    start: u64,
    fd: OwnedFd,
    mapping: MmapRegion,
}

impl Memory {
    pub fn new() -> Self {
        Self::at(START)
    }

    pub fn at(start: u64) -> Self {
        let fd = memfd_create("guest", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&fd, LEN as i64).unwrap();
        let file = std::fs::File::from(fd.try_clone().unwrap());
        let mapping = MmapRegion::from_file(FileOffset::new(file, 0), LEN).unwrap();
        Self { start, fd, mapping }
    }

    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: self.start,
            memory_size: LEN as u64,
            userspace_addr: self.start,
            mmap_offset: 0,
            mmap_handle: self.fd.as_raw_fd(),
        }
    }

    fn place(&self, address: u64, len: usize) -> *mut u8 {
        let offset = (address - self.start) as usize;
        assert!(offset + len <= LEN);
        // SAFETY: inside of the mapping.
        unsafe { self.mapping.as_ptr().add(offset) }
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        // SAFETY: `place` has checked that the bytes lie in the mapping, which nobody has a reference to.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.place(address, bytes.len()), bytes.len());
        }
    }

    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        // SAFETY: as in `write`.
        unsafe { std::ptr::copy_nonoverlapping(self.place(address, len), bytes.as_mut_ptr(), len) }
        bytes
    }

    fn index(&self, address: u64) -> &AtomicU16 {
        // SAFETY: an aligned word of the mapping that is only used as an atomic.
        unsafe { AtomicU16::from_ptr(self.place(address, 2).cast()) }
    }
}

/// One queue's rings.
pub struct Ring {
    base: u64,
    size: u16,
    /// Heads in the order in which they were offered.
    pub offered: Vec<u16>,
    /// Heads and lengths in the order in which they came back.
    pub back: Vec<(u32, u32)>,
}

impl Ring {
    /// A queue with nothing in it; rings that lay there before are cleared.
    pub fn new(memory: &Memory, number: u64, size: u16) -> Self {
        let ring = Self { base: START + number * APART, size, offered: Vec::new(), back: Vec::new() };
        memory.write(ring.base, &vec![0; APART as usize]);
        ring
    }

    /// The memory of the used ring is used for something else.
    pub fn overwrite_used(&self, memory: &Memory, byte: u8) {
        memory.write(self.addresses()[2], &vec![byte; USED_LEN]);
    }

    /// Nobody has written there since.
    pub fn assert_used_is(&self, memory: &Memory, byte: u8) {
        let changed = memory.read(self.addresses()[2], USED_LEN).iter().position(|now| *now != byte);
        assert_eq!(changed, None, "offset in the used ring");
    }

    /// Descriptor table, available ring, used ring.
    pub fn addresses(&self) -> [u64; 3] {
        [self.base, self.base + 0x4000, self.base + 0x8000]
    }

    fn describe(&self, memory: &Memory, index: u16, (address, len): (u64, u32), flags: u16, next: u16) {
        let [descriptors, ..] = self.addresses();
        let words =
            [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
        memory.write(descriptors + 16 * u64::from(index), &words.concat());
    }

    /// Offers one buffer.
    pub fn offer(&mut self, memory: &Memory, address: u64, len: u32, writable: bool) {
        let head = self.offered.len() as u16 % self.size;
        self.describe(memory, head, (address, len), if writable { IS_WRITTEN } else { 0 }, 0);
        self.make_available(memory, head);
    }

    /// Offers a buffer to be read and one for the answer, as one chain: once what was offered before has come back.
    pub fn offer_request(&mut self, memory: &Memory, request: (u64, u32), answer: (u64, u32)) {
        assert_eq!(self.back.len(), self.offered.len());
        self.describe(memory, 0, request, GOES_ON, 1);
        self.describe(memory, 1, answer, IS_WRITTEN, 0);
        self.make_available(memory, 0);
    }

    fn make_available(&mut self, memory: &Memory, head: u16) {
        let [_, available, _] = self.addresses();
        let slot = self.offered.len() as u64 % u64::from(self.size);
        memory.write(available + 4 + 2 * slot, &head.to_le_bytes());
        self.offered.push(head);
        memory.index(available + 2).store(self.offered.len() as u16, Ordering::Release);
        // Wants to be told of the next one that comes back.
        memory.write(available + 4 + 2 * u64::from(self.size), &(self.back.len() as u16).to_le_bytes());
    }

    /// Looks what came back.
    pub fn look(&mut self, memory: &Memory) {
        let used = self.addresses()[2];
        let index = memory.index(used + 2).load(Ordering::Acquire);
        while self.back.len() as u16 != index {
            assert!(self.back.len() < self.offered.len(), "more came back than was offered");
            let slot = self.back.len() as u64 % u64::from(self.size);
            let entry = memory.read(used + 4 + 8 * slot, 8);
            let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
            self.back.push((number(&entry[..4]), number(&entry[4..])));
        }
    }

    /// Every chain that came back did so once, in its turn.
    pub fn assert_in_order(&self) {
        let heads: Vec<u16> = self.back.iter().map(|(head, _)| *head as u16).collect();
        assert_eq!(heads, self.offered[..heads.len()]);
    }
}
