//! The guest's memory, as the front-end shares it.
//!
//! A map never changes: when the front-end changes its memory, the queues get another one, and this one is unmapped with
//! its last user.
#![allow(unsafe_code)]

use std::sync::Arc;

use vm_memory::MmapRegion;

use crate::io::Piece;

/// Where a region lies, for the guest, for the front-end, and in its file; in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// The guest's physical address.
    pub guest: u64,
    /// The front-end's own address, in which it speaks about rings.
    pub front_end: u64,
    /// Where it begins in its file.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
}

/// One region, mapped.
pub struct Region {
    place: Place,
    mapping: MmapRegion,
}

/// Two regions lie in the same place.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("two regions of the guest's memory overlap")]
pub struct Overlap;

impl Region {
    /// A region, mapped.
    pub fn new(place: Place, mapping: MmapRegion) -> Self {
        Self { place, mapping }
    }

    /// Where it lies.
    pub fn place(&self) -> Place {
        self.place
    }
}

/// What the queues look at of a region, side by side and the largest first: a look for an address is made for each buffer.
#[derive(Clone, Copy)]
struct Span {
    guest: u64,
    len: u64,
    start: *mut u8,
}

// SAFETY: an address and a length; it belongs to regions that are kept mapped, wherever the value goes.
unsafe impl Send for Span {}
// SAFETY: a span never changes.
unsafe impl Sync for Span {}

/// All regions, ordered by the guest's addresses.
#[derive(Default)]
pub struct GuestMemory {
    regions: Vec<Arc<Region>>,
    spans: Vec<Span>,
}

impl GuestMemory {
    /// The map of some regions, which must not overlap.
    pub fn new(mut regions: Vec<Arc<Region>>) -> Result<Self, Overlap> {
        regions.sort_by_key(|region| region.place.guest);
        let overlap = |a: u64, b: u64, len: u64| a.checked_add(len).is_none_or(|end| end > b);
        if regions.windows(2).any(|two| overlap(two[0].place.guest, two[1].place.guest, two[0].place.len)) {
            return Err(Overlap);
        }
        let span = |region: &Arc<Region>| {
            let len = region.place.len.min(region.mapping.size() as u64);
            Span { guest: region.place.guest, len, start: region.mapping.as_ptr() }
        };
        let mut spans: Vec<Span> = regions.iter().map(span).collect();
        spans.sort_by_key(|span| std::cmp::Reverse(span.len));
        Ok(Self { regions, spans })
    }

    /// Its regions.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// The memory from a guest's address on, to the end of its region.
    #[inline]
    fn behind(&self, address: u64) -> Option<(*mut u8, u64)> {
        self.spans.iter().find_map(|span| {
            let offset = address.wrapping_sub(span.guest);
            (offset < span.len).then(|| (span.start.wrapping_add(offset as usize), span.len - offset))
        })
    }

    /// Appends the memory at `len` bytes from a guest's address on, in as many pieces as regions. Returns whether all of
    /// it is the guest's.
    #[inline]
    pub fn pieces(&self, address: u64, len: usize, pieces: &mut Vec<Piece>) -> bool {
        #[cfg(test)]
        crate::link::virtqueue::steps::count();
        match self.behind(address) {
            Some((start, left)) if len as u64 <= left => {
                // SAFETY: these bytes are of a mapping that stays until its region is dropped, which the map's users keep;
                // it is only touched through raw pointers.
                pieces.push(unsafe { Piece::new(start, len) });
                true
            }
            None => false,
            Some(_) => self.pieces_of_regions(address, len, pieces),
        }
    }

    /// The same for memory that more than one region has.
    #[cold]
    fn pieces_of_regions(&self, mut address: u64, mut len: usize, pieces: &mut Vec<Piece>) -> bool {
        while len > 0 {
            #[cfg(test)]
            crate::link::virtqueue::steps::count();
            let Some((start, left)) = self.behind(address) else { return false };
            let here = len.min(left as usize);
            // SAFETY: as in `pieces`.
            pieces.push(unsafe { Piece::new(start, here) });
            len -= here;
            address = address.wrapping_add(here as u64);
        }
        true
    }

    /// `len` bytes at a guest's address, where they lie in one region.
    #[inline]
    pub fn at_guest(&self, address: u64, len: usize) -> Option<*mut u8> {
        let (start, left) = self.behind(address)?;
        (len as u64 <= left).then_some(start)
    }

    /// `len` bytes at an address of the front-end's, where they lie in one region.
    pub fn at_front_end(&self, address: u64, len: usize) -> Option<*mut u8> {
        self.regions.iter().find_map(|region| {
            let offset = address.wrapping_sub(region.place.front_end);
            let guest = (offset < region.place.len).then(|| region.place.guest.wrapping_add(offset))?;
            self.at_guest(guest, len)
        })
    }
}
