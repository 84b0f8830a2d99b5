//! Frames from the tap to the device.
//!
//! Each chain has a buffer for the longest frame, into which the tap writes. The one that came back last, whose bytes are
//! in the cache, is used first. A segment for the device to cut is described as Linux has it: the linear part, which is its
//! headers, and behind it payload in pieces of 32 KiB, all in an indirect table. Every other frame, and all of them where
//! there are no indirect descriptors, are one piece.

use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, ensure};
use hythe::frame::offload::HEADER_LEN;
use hythe::io::{Kind, OperationId, Operations, Piece};

use crate::driver_ring::{INDIRECT, Memory, NEXT, Ring};
use crate::queue::Queue;

/// Frames of a batch at the most.
const BATCH: usize = 16;

/// The virtio-net header, Ethernet with a VLAN tag, and an IP packet of 64 KiB, in whole pages.
const BUFFER: u64 = (12 + 18 + 65_535_u64).next_multiple_of(4096);

/// A table of four descriptors: headers, and no more than three pieces of payload.
const TABLE: u64 = 64;

/// Memory that a socket's payload lies in, in one piece (`SKB_FRAG_PAGE_ORDER`).
const PIECE: usize = 32 << 10;

/// Frames on their way to the device.
pub struct Transmit {
    /// Their queue.
    pub queue: Queue,
    memory: Memory,
    indirect: bool,
    /// Where the tables begin, and the buffers.
    tables: u64,
    buffers: u64,
    /// The buffers, by chain.
    pieces: Vec<Piece>,
    /// Chains that the device does not have.
    free: Vec<u16>,
    reads: Vec<(u16, OperationId)>,
    /// How many frames to ask for: one more than came last.
    ask: usize,
}

impl Transmit {
    /// How much memory so many chains take.
    pub fn room(size: u16) -> u64 {
        u64::from(size) * (BUFFER + TABLE)
    }

    /// So many chains, in the memory at `at`.
    pub fn new(ring: Ring, memory: &Memory, at: u64, size: u16, indirect: bool) -> anyhow::Result<Self> {
        let tables = at + u64::from(size) * BUFFER;
        let piece = |chain| memory.piece(at + u64::from(chain) * BUFFER, BUFFER as usize);
        Ok(Self {
            queue: Queue::new(ring)?,
            memory: memory.clone(),
            indirect,
            tables,
            buffers: at,
            pieces: (0..size).map(piece).collect(),
            free: (0..size).rev().collect(),
            reads: Vec::with_capacity(BATCH),
            ask: 2,
        })
    }

    /// Begins to read frames into chains that are free.
    pub fn begin(&mut self, operations: &mut Operations, tap: &OwnedFd) {
        while let Some((head, _)) = self.queue.ring.take_used() {
            self.free.push(head as u16);
        }
        self.reads.clear();
        for _ in 0..self.ask {
            let Some(chain) = self.free.pop() else { break };
            let buffer = self.pieces[usize::from(chain)];
            self.reads.push((chain, operations.push(tap.as_raw_fd(), Kind::Read, [buffer])));
        }
    }

    /// Offers the frames that came. Whether there may be more.
    pub fn end(&mut self, operations: &Operations) -> anyhow::Result<bool> {
        let (mut next, mut frames) = (self.queue.ring.counts().0, 0);
        // A frame may come between two reads of a batch: behind one that found nothing there can be one that did.
        for (chain, id) in &self.reads {
            match operations.result(*id) {
                Ok(len) => {
                    self.describe(*chain, len);
                    self.queue.ring.set_entry(next, *chain);
                    next = next.wrapping_add(1);
                    frames += 1;
                }
                Err(error) => {
                    let is_gone =
                        matches!(error.raw_os_error(), Some(libc::EBADFD | libc::ENODEV | libc::ENXIO));
                    ensure!(!is_gone, "the tap is gone: {error}");
                }
            }
        }
        let unused = self.reads.iter().rev().filter(|(_, id)| operations.result(*id).is_err());
        self.free.extend(unused.map(|(chain, _)| chain));
        self.queue.frames += u64::from(frames);
        self.queue.offer(frames).context("a kick")?;
        let asked = self.reads.len();
        self.ask = (usize::from(frames) + 1).clamp(2, BATCH);
        Ok(asked > 0 && usize::from(frames) == asked)
    }

    /// Writes down where a frame lies.
    fn describe(&self, chain: u16, len: usize) {
        let (at, linear) = (self.buffers + u64::from(chain) * BUFFER, self.linear_len(chain, len));
        if linear == len {
            return self.queue.ring.describe(chain, at, len as u32, 0, 0);
        }
        let table = self.tables + u64::from(chain) * TABLE;
        let (mut from, mut end, mut count) = (0, linear, 0);
        while from < len {
            let flags = if end < len { NEXT } else { 0 };
            let entry = table + 16 * u64::from(count);
            self.memory.describe(entry, at + from as u64, (end - from) as u32, flags, count + 1);
            (from, end, count) = (end, (end + PIECE).min(len), count + 1);
        }
        self.queue.ring.describe(chain, table, 16 * u32::from(count), INDIRECT, 0);
    }

    /// How many bytes of a frame are in its first piece: of one to be cut, its headers, whose length the kernel tells.
    fn linear_len(&self, chain: u16, len: usize) -> usize {
        let mut header = [0; HEADER_LEN];
        self.pieces[usize::from(chain)].copy_out(&mut header);
        let [_, segmentation, low, high, ..] = header;
        let headers = usize::from(u16::from_le_bytes([low, high]));
        if !self.indirect || segmentation == 0 || headers == 0 { len } else { len.min(HEADER_LEN + headers) }
    }

    /// Whether a frame could be read.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Where the device has every chain, wants an interrupt once three quarters have come back, as Linux does. Whether the
    /// driver may sleep.
    pub fn awaits_room(&self) -> bool {
        self.has_room() || self.queue.ring.awaits_used((self.pieces.len() * 3 / 4 - 1) as u16)
    }
}
