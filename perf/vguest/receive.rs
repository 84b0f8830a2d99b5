//! Frames from the device to the tap.
//!
//! The device has every buffer but those that are being written to the tap; a frame fills as many as it needs
//! (`VIRTIO_NET_F_MRG_RXBUF`). Then it gets the same ones again.

use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, ensure};
use hythe::frame::offload::HEADER_LEN;
use hythe::io::{Kind, OperationId, Operations, Piece};
use virtio_bindings::virtio_net::{VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM};

use crate::driver_ring::{Memory, Ring, WRITE};
use crate::queue::Queue;

/// Frames of a batch at the most.
const BATCH: usize = 16;

/// The virtio-net header, Ethernet, and an IPv6 header.
const FRONT: usize = HEADER_LEN + ETHERNET + 40;
const ETHERNET: usize = 14;

/// Frames on their way to the tap.
pub struct Receive {
    /// Their queue.
    pub queue: Queue,
    /// The buffers, by descriptor.
    pieces: Vec<Piece>,
    /// Those that came back in this pass.
    heads: Vec<u16>,
    writes: Vec<OperationId>,
}

impl Receive {
    /// How much memory so many buffers take.
    pub fn room(size: u16, buffer: u32) -> u64 {
        u64::from(size) * u64::from(buffer)
    }

    /// So many buffers, in the memory at `at`; all of them are offered.
    pub fn new(ring: Ring, memory: &Memory, at: u64, size: u16, buffer: u32) -> anyhow::Result<Self> {
        let address = |index| at + u64::from(index) * u64::from(buffer);
        for index in 0..size {
            ring.describe(index, address(index), buffer, WRITE, 0);
        }
        let pieces = (0..size).map(|index| memory.piece(address(index), buffer as usize)).collect();
        let mut queue = Queue::new(ring)?;
        queue.offer(size)?;
        let heads = Vec::with_capacity(usize::from(size));
        Ok(Self { queue, pieces, heads, writes: Vec::with_capacity(BATCH) })
    }

    /// Begins to write what came to the tap.
    pub fn begin(&mut self, operations: &mut Operations, tap: &OwnedFd) -> anyhow::Result<()> {
        self.heads.clear();
        self.writes.clear();
        while self.writes.len() < BATCH {
            let Some(first) = self.take() else { break };
            let mut front = [0; FRONT];
            let len = first.copy_out(&mut front);
            let front = &mut front[..len];
            ensure!(front.len() > HEADER_LEN + ETHERNET, "a frame of {} bytes", front.len());
            if trust_checksum(front) {
                first.copy_from(&front[..HEADER_LEN]);
            }
            let mut frame = operations.begin(tap.as_raw_fd(), Kind::Write);
            frame.piece(first);
            for _ in 1..u16::from_le_bytes([front[10], front[11]]) {
                frame.piece(self.take().context("the device has published a part of a frame")?);
            }
            self.writes.push(frame.finish());
        }
        Ok(())
    }

    /// The next buffer that came back: what was written of it.
    fn take(&mut self) -> Option<Piece> {
        let (head, len) = self.queue.ring.take_used()?;
        self.heads.push(head as u16);
        Some(self.pieces[head as usize].part(0, len as usize))
    }

    /// Offers the buffers anew.
    pub fn end(&mut self, operations: &Operations) -> anyhow::Result<()> {
        let taken = self.writes.iter().filter(|id| operations.result(**id).is_ok()).count();
        self.queue.frames += taken as u64;
        self.queue.lost += (self.writes.len() - taken) as u64;
        let mut next = self.queue.ring.counts().0;
        for head in &self.heads {
            self.queue.ring.set_entry(next, *head);
            next = next.wrapping_add(1);
        }
        self.queue.offer(self.heads.len() as u16).context("a kick")
    }

    /// Wants an interrupt with the next frame. Whether the driver may sleep.
    pub fn awaits_frames(&self) -> bool {
        self.queue.ring.awaits_used(0)
    }
}

/// A device may say that a checksum needs no check, and leave it out (`VIRTIO_NET_HDR_F_DATA_VALID`; passt does). A tap does
/// not know of that, but takes on trust as well what has only to be completed when it leaves the machine: so does its header
/// say instead. Whether it was changed.
fn trust_checksum(front: &mut [u8]) -> bool {
    let flags = u32::from(front[0]);
    if flags & VIRTIO_NET_HDR_F_DATA_VALID == 0 || flags & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0 {
        return false;
    }
    let packet = &front[HEADER_LEN + ETHERNET..];
    let (protocol, len) = match packet.first().map(|first| (first >> 4, first & 15)) {
        Some((4, words)) if packet.len() >= 20 => (packet[9], usize::from(words) * 4),
        Some((6, _)) if packet.len() >= 40 => (packet[6], 40),
        _ => return false,
    };
    let offset: u16 = match i32::from(protocol) {
        libc::IPPROTO_TCP => 16,
        libc::IPPROTO_UDP => 6,
        _ => return false,
    };
    front[0] = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
    front[6..8].copy_from_slice(&((ETHERNET + len) as u16).to_le_bytes());
    front[8..10].copy_from_slice(&offset.to_le_bytes());
    true
}
