//! The memory of a hostile guest: regions with guards around them, and the books about who may write what.
//!
//! The arena is one mapping, of which the regions are parts: whatever is written beside a region lands in a guard. The
//! *shadow* holds what each byte must be, *given* which bytes the device may change, for which of the two queues.
#![allow(unsafe_code)]

use std::sync::Arc;

use vm_memory::MmapRegion;

use crate::io::Piece;
use crate::link::vhost_user::memory::{GuestMemory, Place, Region};

const GUARD: usize = 0x1000;
const FILL: u8 = 0xa5;

/// Control structures; two regions right behind it, which are one to the guest; one far away.
pub const CONTROL: u64 = 0x4000_0000;
pub const CONTROL_LEN: u64 = 0x9000;
pub const NEAR: u64 = CONTROL + CONTROL_LEN;
pub const NEAR_LEN: u64 = 0x4000;
pub const NEXT_LEN: u64 = 0x4000;
pub const FAR: u64 = 0x8000_0000;
pub const FAR_LEN: u64 = 0x4000;
pub const PLACES: [(u64, u64); 4] =
    [(CONTROL, CONTROL_LEN), (NEAR, NEAR_LEN), (NEAR + NEAR_LEN, NEXT_LEN), (FAR, FAR_LEN)];

/// What is added to a guest's address for the front-end's.
pub const FRONT_END: u64 = 0x7f00_0000_0000;

/// A guest's memory.
pub struct Guest {
    arena: Piece,
    shadow: Vec<u8>,
    given: Vec<u8>,
    /// Where each region begins in the arena.
    starts: [usize; 4],
    regions: [Arc<Region>; 4],
    /// Which of them the device has.
    present: [bool; 4],
    /// What the regions are parts of.
    _mapping: MmapRegion,
}

impl Guest {
    pub fn new() -> Self {
        let len = PLACES.iter().map(|(_, len)| *len as usize + GUARD).sum::<usize>() + GUARD;
        let mapping = MmapRegion::new(len).unwrap();
        // SAFETY: the mapping lives as long as the guest, and is touched through pieces alone.
        let arena = unsafe { Piece::new(mapping.as_ptr(), len) };
        let mut start = GUARD;
        let starts = PLACES.map(|(_, len)| {
            let this = start;
            start += len as usize + GUARD;
            this
        });
        let regions = std::array::from_fn(|index| {
            let (guest, len) = PLACES[index];
            let at = arena.part(starts[index], len as usize).start();
            let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
            // SAFETY: a part of the mapping, which outlives the queues: their links are dropped, or detached, first.
            let part = unsafe { MmapRegion::build_raw(at, len as usize, protection, flags) }.unwrap();
            Arc::new(Region::new(Place { guest, front_end: guest + FRONT_END, offset: 0, len }, part))
        });
        arena.copy_from(&vec![FILL; len]);
        let (shadow, given) = (vec![FILL; len], vec![0; len]);
        Self { arena, shadow, given, starts, regions, present: [true; 4], _mapping: mapping }
    }

    /// The device gets some of the regions, and nothing is given to it yet.
    pub fn share(&mut self, present: [bool; 4]) -> Arc<GuestMemory> {
        self.present = present;
        self.given.fill(0);
        let shared = self.regions.iter().zip(present).filter(|(_, present)| *present);
        Arc::new(GuestMemory::new(shared.map(|(region, _)| region.clone()).collect()).unwrap())
    }

    /// Where in the arena a guest's address lies, and how much of its region is behind it.
    fn find(&self, address: u64) -> Option<(usize, usize, usize)> {
        PLACES.iter().enumerate().find_map(|(index, (start, len))| {
            let offset = address.wrapping_sub(*start);
            (offset < *len).then(|| (index, self.starts[index] + offset as usize, (len - offset) as usize))
        })
    }

    /// What the driver writes, as far as it is memory at all.
    pub fn poke(&mut self, address: u64, bytes: &[u8]) {
        let Some((_, at, left)) = self.find(address) else { return };
        let len = bytes.len().min(left);
        self.arena.part(at, len).copy_from(bytes);
        self.shadow[at..at + len].copy_from_slice(&bytes[..len]);
    }

    /// What lies in memory that the device has.
    pub fn peek<const N: usize>(&self, address: u64) -> Option<[u8; N]> {
        let (index, at, left) = self.find(address)?;
        let mut bytes = [0; N];
        (self.present[index] && left >= N).then(|| self.arena.part(at, N).copy_out(&mut bytes))?;
        Some(bytes)
    }

    pub fn word(&self, address: u64) -> u16 {
        self.peek(address).map_or(0, u16::from_le_bytes)
    }

    /// Memory to read and write without books, for another thread.
    pub fn piece(&self, address: u64, len: usize) -> Piece {
        let (_, at, _) = self.find(address).unwrap();
        self.arena.part(at, len)
    }

    /// The device may change these bytes for a queue.
    pub fn give(&mut self, queue: usize, mut address: u64, mut len: u64) {
        while len > 0 {
            let Some((index, at, left)) = self.find(address) else { return };
            if !self.present[index] {
                return;
            }
            let part = len.min(left as u64);
            self.given[at..at + part as usize].iter_mut().for_each(|given| *given |= 1 << queue);
            address += part;
            len -= part;
        }
    }

    /// The device may change nothing more for a queue.
    pub fn take_away(&mut self, queue: usize) {
        self.given.iter_mut().for_each(|given| *given &= !(1 << queue));
    }

    /// Whatever has changed was the driver's doing, or given to the device.
    pub fn check(&mut self) {
        self.check_where(|_| true);
    }

    /// The guards are whole, and so is the region far away: for guests whose memory changes beside the books.
    pub fn check_guards(&mut self) {
        let starts = self.starts;
        let in_use = |at: usize| {
            (0..3).any(|index| (starts[index]..starts[index] + PLACES[index].1 as usize).contains(&at))
        };
        self.check_where(|at| !in_use(at));
    }

    fn check_where(&mut self, is_checked: impl Fn(usize) -> bool) {
        const BLOCK: usize = 0x400;
        let mut bytes = [0; BLOCK];
        for start in (0..self.shadow.len()).step_by(BLOCK) {
            let len = self.arena.part(start, BLOCK).copy_out(&mut bytes);
            let shadow = &mut self.shadow[start..start + len];
            if *shadow == bytes[..len] || !is_checked(start) {
                continue;
            }
            for (offset, (is, was)) in bytes[..len].iter().zip(shadow.iter()).enumerate() {
                let at = start + offset;
                assert!(is == was || self.given[at] != 0, "byte {at:#x} of {:#x?} was written", self.starts);
            }
            shadow.copy_from_slice(&bytes[..len]);
        }
    }
}
