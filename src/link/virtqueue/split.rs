//! The split ring itself: descriptor table, available ring, used ring.
#![allow(unsafe_code)]
// Pointers into the guest's memory are bytes first; `new` checks that each is aligned for what it leads to.
#![allow(clippy::cast_ptr_alignment)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use crate::io::Piece;
use crate::link::vhost_user::memory::GuestMemory;

use super::Fault;
use super::notify::passes;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Available ring: the driver wants no interrupt. Used ring: the device wants no notification.
const SUPPRESSED: u16 = 1;

const DESCRIPTOR_LEN: usize = 16;

/// Who writes into a chain's buffers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// The driver has: they are read.
    FromDriver,
    /// The device will.
    ToDriver,
}

/// One descriptor, copied out of the guest's memory.
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    /// From its two words, each of which is read once.
    #[inline]
    fn of([address, rest]: [u64; 2]) -> Self {
        let (address, rest) = (u64::from_le(address), u64::from_le(rest));
        Self { address, len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }
}

/// A chain that was taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Chain {
    /// Its first descriptor, by which it is given back.
    pub head: u16,
    /// Bytes of its buffers.
    pub bytes: u32,
    /// How many pieces they are.
    pub pieces: u32,
}

/// What a queue is made from, as the front-end said it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Parts {
    /// Descriptors of the queue: a power of two up to 32,768.
    pub size: u16,
    /// The front-end's addresses of the descriptor table, the available ring and the used ring.
    pub descriptors: u64,
    /// See above.
    pub available: u64,
    /// See above.
    pub used: u64,
    /// The next entry of the available ring to take; `None` to go on behind what was given back last.
    pub next: Option<u16>,
    /// `VIRTIO_F_EVENT_IDX`: each side says at which index it wants to be told.
    pub event_index: bool,
    /// `VIRTIO_F_INDIRECT_DESC`: a descriptor may be a table of them.
    pub indirect: bool,
}

/// A split virtqueue, seen from the device.
pub struct SplitQueue {
    memory: Arc<GuestMemory>,
    size: u16,
    descriptors: *const [u64; 2],
    available: *mut u16,
    used: *mut u16,
    event_index: bool,
    indirect: bool,
    /// The next entry of the available ring to take.
    next_available: u16,
    /// As the driver's index was when it was looked at last.
    seen_available: u16,
    /// The next entry of the used ring to fill.
    next_used: u16,
    /// The used index that the driver sees.
    published: u16,
    /// The used index when the driver was last considered for an interrupt.
    considered: u16,
    /// Of each descriptor, whether it heads a chain in our hands. A byte each: bits would have chains wait for each other.
    taken: Vec<bool>,
}

// SAFETY: the pointers lead into the mapped memory, which `memory` keeps mapped, wherever the value goes.
unsafe impl Send for SplitQueue {}

impl SplitQueue {
    /// The queue, or `None` when its parts do not lie in the guest's memory as virtio wants them to.
    pub fn new(memory: Arc<GuestMemory>, parts: &Parts) -> Option<Self> {
        let size = usize::from(parts.size);
        if !parts.size.is_power_of_two() {
            return None;
        }
        // virtio 1.3, 2.7: alignment and sizes; two bytes more for the event index.
        let place = |address: u64, alignment: u64, len: usize| {
            address.is_multiple_of(alignment).then(|| memory.at_front_end(address, len)).flatten()
        };
        let descriptors = place(parts.descriptors, 16, size * DESCRIPTOR_LEN)?;
        let available = place(parts.available, 2, 6 + 2 * size)?;
        let used = place(parts.used, 4, 6 + 8 * size)?;
        // The mapping may begin elsewhere than the front-end's.
        let aligned = descriptors.cast::<[u64; 2]>().is_aligned()
            && available.cast::<u16>().is_aligned()
            && used.cast::<u32>().is_aligned();
        if !aligned {
            return None;
        }
        let mut queue = Self {
            memory,
            size: parts.size,
            descriptors: descriptors.cast::<[u64; 2]>().cast_const(),
            available: available.cast(),
            used: used.cast(),
            event_index: parts.event_index,
            indirect: parts.indirect,
            next_available: 0,
            seen_available: 0,
            next_used: 0,
            published: 0,
            considered: 0,
            taken: vec![false; size],
        };
        // Chains go back in order, so the device before this one had given back so many.
        let index = queue.used_index().load(Ordering::Relaxed);
        (queue.next_used, queue.published, queue.considered) = (index, index, index);
        let next = parts.next.unwrap_or(index);
        (queue.next_available, queue.seen_available) = (next, next);
        Some(queue)
    }

    /// The word `at` words into a ring.
    fn word(&self, ring: *mut u16, at: usize) -> &AtomicU16 {
        debug_assert!(at < 3 + 4 * usize::from(self.size));
        // SAFETY: the ring lies in the mapped memory, with the words before and behind it (checked by `new`), and is
        // aligned; the other side may change it at any time, so it is only ever used as an atomic. It stays mapped as
        // long as `self.memory`.
        unsafe { AtomicU16::from_ptr(ring.add(at)) }
    }

    fn available_index(&self) -> &AtomicU16 {
        self.word(self.available, 1)
    }

    fn used_index(&self) -> &AtomicU16 {
        self.word(self.used, 1)
    }

    /// What the driver writes behind the available ring: the used index at which it wants an interrupt.
    fn used_event(&self) -> &AtomicU16 {
        self.word(self.available, 2 + usize::from(self.size))
    }

    /// What the device writes behind the used ring: the available index at which it wants a notification.
    fn available_event(&self) -> &AtomicU16 {
        self.word(self.used, 2 + 4 * usize::from(self.size))
    }

    /// How many descriptors it has.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The next entry of the available ring that would be taken: where another device goes on.
    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    /// Whether there is a chain to take. Only a look at memory.
    pub fn has_available(&self) -> bool {
        self.available_index().load(Ordering::Relaxed) != self.next_available
    }

    /// Whether chains came since the driver's index was looked at last.
    pub fn has_more(&self) -> bool {
        self.available_index().load(Ordering::Relaxed) != self.seen_available
    }

    /// Whether something was given back of which the driver has not been told, or not been considered to be.
    pub fn is_unsettled(&self) -> bool {
        self.considered != self.next_used
    }

    /// Takes the next chain and appends its buffers to `pieces`, an entry more for each region that a buffer spans.
    /// After a fault the queue must not be used any more; what was appended is void.
    #[inline]
    pub fn take(&mut self, direction: Direction, pieces: &mut Vec<Piece>) -> Result<Option<Chain>, Fault> {
        let Some(head) = self.take_head()? else { return Ok(None) };
        let first = pieces.len();
        let bytes = self.gather(head, &mut |written, address, len| {
            if written != direction {
                return Err(Fault::Direction);
            }
            self.memory.pieces(address, len, pieces).then_some(()).ok_or(Fault::Address)
        })?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(Chain { head, bytes, pieces: (pieces.len() - first) as u32 }))
    }

    /// Takes the next chain, a request of the driver's with room for the answer behind it (2.7.4.2: what is to be read
    /// comes first). The buffers of each are appended; a fault is as in [`Self::take`].
    pub fn take_request(
        &mut self,
        request: &mut Vec<Piece>,
        answer: &mut Vec<Piece>,
    ) -> Result<Option<Chain>, Fault> {
        let Some(head) = self.take_head()? else { return Ok(None) };
        let first = request.len() + answer.len();
        let bytes = self.gather(head, &mut |written, address, len| {
            let pieces = match written {
                Direction::FromDriver if answer.is_empty() => &mut *request,
                Direction::FromDriver => return Err(Fault::Direction),
                Direction::ToDriver => &mut *answer,
            };
            self.memory.pieces(address, len, pieces).then_some(()).ok_or(Fault::Address)
        })?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(Chain { head, bytes, pieces: (request.len() + answer.len() - first) as u32 }))
    }

    /// The next entry of the available ring: the first descriptor of a chain, which is taken from now on.
    #[inline]
    fn take_head(&mut self) -> Result<Option<u16>, Fault> {
        #[cfg(test)]
        super::steps::count();
        if self.next_available == self.seen_available {
            // Acquire: the entries up to the index were written before it.
            self.seen_available = self.available_index().load(Ordering::Acquire);
            let ahead = self.seen_available.wrapping_sub(self.next_available);
            if ahead == 0 {
                return Ok(None);
            }
            if ahead > self.size {
                return Err(Fault::AvailableIndex);
            }
        }
        let slot = usize::from(self.next_available & (self.size - 1));
        let head = self.word(self.available, 2 + slot).load(Ordering::Relaxed);
        if head >= self.size {
            return Err(Fault::Head);
        }
        if std::mem::replace(&mut self.taken[usize::from(head)], true) {
            return Err(Fault::HeadTwice);
        }
        Ok(Some(head))
    }

    /// Hands the buffers of the chain that starts at `head` to `buffer`: who writes, address, length. Returns their bytes.
    #[inline]
    fn gather(
        &self,
        head: u16,
        buffer: &mut impl FnMut(Direction, u64, usize) -> Result<(), Fault>,
    ) -> Result<u32, Fault> {
        // SAFETY: `head` is below the size, and each later index is checked; the table lies in the mapped memory.
        let read = |index: u16| Descriptor::of(unsafe { words(self.descriptors.add(usize::from(index))) });
        let mut descriptor = read(head);
        // A chain may not have more descriptors than the queue, tables included (2.7.5.3.1): so it ends.
        let mut left = self.size;
        let mut bytes = 0;
        loop {
            left = left.checked_sub(1).ok_or(Fault::ChainLength)?;
            if descriptor.flags & INDIRECT != 0 {
                if !self.indirect || descriptor.flags & NEXT != 0 {
                    return Err(Fault::Indirect);
                }
                return self.gather_table(descriptor, left, bytes, buffer);
            }
            bytes = add(descriptor, bytes, buffer)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(bytes);
            }
            if descriptor.next >= self.size {
                return Err(Fault::Next);
            }
            descriptor = read(descriptor.next);
        }
    }

    /// The same for the descriptors of an indirect table.
    #[inline]
    fn gather_table(
        &self,
        table: Descriptor,
        mut left: u16,
        mut bytes: u32,
        buffer: &mut impl FnMut(Direction, u64, usize) -> Result<(), Fault>,
    ) -> Result<u32, Fault> {
        let len = table.len as usize;
        let entries = len / DESCRIPTOR_LEN;
        if entries == 0 || !len.is_multiple_of(DESCRIPTOR_LEN) || entries > 1 << 16 {
            return Err(Fault::Indirect);
        }
        // Where all of it lies in one region there is one look for it. The rest of it need not be memory at all.
        let whole = self.memory.at_guest(table.address, len);
        let mut index = 0;
        loop {
            left = left.checked_sub(1).ok_or(Fault::ChainLength)?;
            let place = match whole {
                Some(start) => start.wrapping_add(index * DESCRIPTOR_LEN),
                None => self.entry(table.address, index)?,
            };
            // SAFETY: sixteen mapped bytes: `index` is below `entries`, or `entry` has found them.
            let descriptor = Descriptor::of(unsafe { words(place.cast()) });
            if descriptor.flags & INDIRECT != 0 {
                return Err(Fault::Indirect);
            }
            bytes = add(descriptor, bytes, buffer)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(bytes);
            }
            index = usize::from(descriptor.next);
            if index >= entries {
                return Err(Fault::Next);
            }
        }
    }

    /// An entry of a table that does not lie in one region as a whole.
    #[cold]
    fn entry(&self, table: u64, index: usize) -> Result<*mut u8, Fault> {
        let address = table.checked_add((index * DESCRIPTOR_LEN) as u64).ok_or(Fault::Address)?;
        self.memory.at_guest(address, DESCRIPTOR_LEN).ok_or(Fault::Address)
    }

    /// Puts the chain that was taken last back to where it was taken from.
    pub fn put_back(&mut self, chain: Chain) {
        self.next_available = self.next_available.wrapping_sub(1);
        self.taken[usize::from(chain.head)] = false;
    }

    /// Gives a chain back, into which `written` bytes were written. Chains go back in the order in which they came.
    pub fn give_back(&mut self, chain: Chain, written: u32) {
        let slot = usize::from(self.next_used & (self.size - 1));
        // SAFETY: the entry lies in the mapped used ring, aligned to four; the driver does not look at it before the
        // index says so.
        unsafe {
            let entry = self.used.add(2 + 4 * slot).cast::<[u32; 2]>();
            entry.write_volatile([u32::from(chain.head), written]);
        }
        self.next_used = self.next_used.wrapping_add(1);
        self.taken[usize::from(chain.head)] = false;
    }

    /// Shows the driver what was given back. How many chains that were.
    pub fn publish(&mut self) -> u16 {
        let count = self.next_used.wrapping_sub(self.published);
        if count != 0 {
            self.published = self.next_used;
            // Release: the entries are seen before the index.
            self.used_index().store(self.published, Ordering::Release);
        }
        count
    }

    /// Whether what was published since the last time is to be told by an interrupt.
    pub fn wants_interrupt(&mut self) -> bool {
        if self.considered == self.published {
            return false;
        }
        // The index is seen before the driver's wish is read, or both sides could wait (2.7.7.2).
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.considered, self.published);
        if self.event_index {
            passes(self.used_event().load(Ordering::Relaxed), self.published, old)
        } else {
            self.word(self.available, 0).load(Ordering::Relaxed) & SUPPRESSED == 0
        }
    }

    /// Asks for a notification about the next chain after those that were seen; returns whether there is none yet.
    pub fn ask_for_notification(&self) -> bool {
        if self.event_index {
            self.available_event().store(self.seen_available, Ordering::Relaxed);
        } else {
            self.word(self.used, 0).store(0, Ordering::Relaxed);
        }
        // The wish is seen before the index is read, or both sides could wait (2.7.10).
        fence(Ordering::SeqCst);
        !self.has_more()
    }

    /// Asks for none. With event indices the wish is over by itself once it was fulfilled.
    pub fn refuse_notifications(&self) {
        if !self.event_index {
            self.word(self.used, 0).store(SUPPRESSED, Ordering::Relaxed);
        }
    }
}

/// The words of a descriptor, each read once: as they were then, whatever becomes of them.
///
/// # Safety
/// `place` leads to sixteen mapped bytes, at any address.
#[inline]
unsafe fn words(place: *const [u64; 2]) -> [u64; 2] {
    if place.is_aligned() {
        // SAFETY: the caller's promise.
        unsafe { place.read_volatile() }
    } else {
        // SAFETY: the caller's promise.
        unsafe { unaligned_words(place.cast()) }
    }
}

/// The same for tables that no driver makes, and that none is forbidden to make.
///
/// # Safety
/// See above.
#[cold]
unsafe fn unaligned_words(place: *const u8) -> [u64; 2] {
    // SAFETY: the caller's promise.
    let byte = |at: usize| unsafe { place.add(at).read_volatile() };
    [0, 8].map(|word| u64::from_ne_bytes(std::array::from_fn(|at| byte(word + at))))
}

/// Hands one buffer on; returns the chain's bytes with its own.
#[inline]
fn add(
    descriptor: Descriptor,
    bytes: u32,
    buffer: &mut impl FnMut(Direction, u64, usize) -> Result<(), Fault>,
) -> Result<u32, Fault> {
    #[cfg(test)]
    super::steps::count();
    if descriptor.len == 0 {
        return Err(Fault::Empty);
    }
    let written = if descriptor.flags & WRITE == 0 { Direction::FromDriver } else { Direction::ToDriver };
    let bytes = bytes.checked_add(descriptor.len).ok_or(Fault::Bytes)?;
    buffer(written, descriptor.address, descriptor.len as usize)?;
    Ok(bytes)
}
