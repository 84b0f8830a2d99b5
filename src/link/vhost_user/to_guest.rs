//! Frames into the guest's receive queue.
//!
//! Two kinds of space. *Ahead*: the guest's own buffers, taken from the ring before it is known whether bytes will come;
//! the kernel writes payload into them. *Staged*: memory of ours, for frames that are complete, which are copied into the
//! ring when the pass publishes.
//!
//! The guest's buffers go back in the order in which they were taken. What was taken ahead and stays empty is put back
//! into the ring, and that works for the last ones only. So one consumer at a time reserves ahead, and everything else is
//! staged meanwhile, to be placed behind it. Where the order would break all the same (a space behind an empty one is
//! filled, a head is not as long as it was said to be, a datagram is longer than expected), the frame is copied to a
//! staged one: right in every case, and without a copy in the usual one.
//!
//! While there is no receive queue because the guest does not use it, every frame is staged, complete, and taken from
//! here as bytes.

use std::collections::VecDeque;

use crate::frame::build::HEAD_MAX;
use crate::frame::offload::{HEADER_LEN, Offload};
use crate::io::{Buffers, Piece};
use crate::link::virtqueue::{Chain, Direction, Fault, SplitQueue};
use crate::link::{Ahead, FRAME_MAX, InboundHead, Space, complete};

use super::from_guest::part_of;

/// Staged frames at the most.
const STAGED: usize = 64;
/// Chains of a pass, as a rule: 256 KiB in buffers for an MTU of 1,500 bytes, and complete frames.
const CHAINS: usize = 256;
/// Of the staged frames, kept for frames that are complete.
const STAGED_KEPT: usize = 16;

/// Room before a staged payload: the virtio-net header and the longest head, rounded up to a cache line.
const HEAD_ROOM: usize = (HEADER_LEN + HEAD_MAX).next_multiple_of(64);

/// Spaces with this bit in their index are ahead, the others staged.
const AHEAD: u32 = 1 << 31;

/// Datagrams are expected to be no longer than this until longer ones come.
const DATAGRAM: usize = 1500;

/// A space that was reserved ahead.
struct Reserved {
    first_chain: usize,
    chains: usize,
    first_piece: usize,
    pieces: usize,
    head_len: usize,
    /// Payload bytes that fit into the chains.
    direct: usize,
    /// The staged slot that takes the rest of a long datagram.
    overflow: Option<u32>,
    is_open: bool,
}

/// What the guest takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Takes {
    /// A frame may fill several chains (`VIRTIO_NET_F_MRG_RXBUF`).
    pub merged: bool,
    /// Checksums may be partial (`VIRTIO_NET_F_GUEST_CSUM`).
    pub partial_checksums: bool,
}

/// What is on its way to the guest in this pass.
pub struct ToGuest {
    takes: Takes,
    chains: Vec<Chain>,
    pieces: Vec<Piece>,
    reserved: Vec<Reserved>,
    /// How many of `reserved` are filled, from the first on without a gap: their chains are given back.
    filled: usize,
    /// How many of `chains` are given back.
    given_back: usize,
    /// A space, or a part of one, has stayed empty: what comes behind it is staged.
    gap: bool,
    staging: Buffers,
    free: Vec<u32>,
    /// Complete frames: slot, and where in it the virtio-net header begins and the frame ends.
    staged: VecDeque<(u32, usize, usize)>,
    /// The guest's buffers did not suffice.
    wants_room: bool,
    lost: usize,
    expected: usize,
}

impl ToGuest {
    /// Nothing yet.
    pub fn new() -> Self {
        Self {
            takes: Takes::default(),
            chains: Vec::with_capacity(CHAINS),
            pieces: Vec::with_capacity(CHAINS),
            reserved: Vec::with_capacity(STAGED),
            filled: 0,
            given_back: 0,
            gap: false,
            staging: Buffers::new(STAGED, HEAD_ROOM + FRAME_MAX),
            free: (0..STAGED as u32).rev().collect(),
            staged: VecDeque::with_capacity(STAGED),
            wants_room: false,
            lost: 0,
            expected: DATAGRAM,
        }
    }

    /// Another queue, whose driver takes this.
    pub fn attach(&mut self, takes: Takes) {
        self.takes = takes;
        self.wants_room = false;
    }

    /// The queue has failed: what is complete is lost. What was reserved ahead stays until the pass is over, and so does the
    /// memory: an operation that was given a space has to find it, or it would move no byte, as at the end of a stream.
    pub fn fail(&mut self) {
        self.lost += self.staged.len();
        while let Some((slot, ..)) = self.staged.pop_front() {
            self.free.push(slot);
        }
        self.wants_room = false;
    }

    /// Forgets what was reserved ahead in a queue that has failed, once nobody holds any of it.
    pub fn forget_failed(&mut self) {
        if !self.has_open() {
            self.forget_ahead();
        }
    }

    /// The queue has gone: what was on its way is lost.
    pub fn detach(&mut self) {
        self.fail();
        for space in std::mem::take(&mut self.reserved) {
            self.free.extend(space.overflow);
        }
        self.forget_ahead();
        self.takes = Takes::default();
    }

    /// Whether the guest is to say when it offers more buffers: nothing that was tried since has found any.
    pub fn wants_room(&self) -> bool {
        self.wants_room
    }

    /// Whether a frame waits for the next publishing.
    pub fn has_staged(&self) -> bool {
        !self.staged.is_empty()
    }

    /// Whether chains of the ring are taken, or were given back, in this pass.
    pub fn has_ahead(&self) -> bool {
        !self.reserved.is_empty()
    }

    /// Frames lost since this was asked last.
    pub fn take_lost(&mut self) -> usize {
        std::mem::take(&mut self.lost)
    }

    /// Room for a complete frame.
    pub fn reserve(&mut self, payload_len: usize) -> Option<Space> {
        let capacity = payload_len.min(FRAME_MAX);
        self.free.pop().map(|index| Space { index, capacity })
    }

    /// Whether another consumer may reserve ahead in this pass.
    pub fn may_reserve_ahead(&self) -> bool {
        self.reserved.is_empty() && self.free.len() > STAGED_KEPT
    }

    /// Room for a frame whose payload has yet to come.
    pub fn reserve_ahead(
        &mut self,
        queue: &mut SplitQueue,
        head_len: usize,
        payload: Ahead,
    ) -> Result<Option<Space>, Fault> {
        if self.free.len() <= STAGED_KEPT {
            return Ok(None);
        }
        let front = HEADER_LEN + head_len;
        let wanted = match payload {
            Ahead::Bytes(len) => len,
            Ahead::Datagram(len) => len.min(self.expected),
        };
        let (first_chain, first_piece) = (self.chains.len(), self.pieces.len());
        let bytes = self.take_chains(queue, front + wanted)?;
        if bytes <= front {
            self.put_back_from(queue, first_chain, first_piece);
            self.wants_room = true;
            return Ok(None);
        }
        self.wants_room = false;
        let direct = wanted.min(bytes - front);
        let (capacity, overflow) = match payload {
            Ahead::Bytes(_) => (direct, None),
            Ahead::Datagram(len) => (len, (direct < len).then(|| self.free.pop()).flatten()),
        };
        self.reserved.push(Reserved {
            first_chain,
            chains: self.chains.len() - first_chain,
            first_piece,
            pieces: self.pieces.len() - first_piece,
            head_len,
            direct,
            overflow,
            is_open: true,
        });
        Ok(Some(Space { index: AHEAD | (self.reserved.len() as u32 - 1), capacity }))
    }

    /// Room for a frame whose payload has yet to come, where there is no queue.
    pub fn reserve_apart(&mut self, payload: Ahead) -> Option<Space> {
        if self.may_reserve_ahead() { self.reserve(payload.bytes_max()) } else { None }
    }

    /// The frame in `space`, which was reserved where there is no queue, is complete.
    pub fn commit_apart(&mut self, space: Space, head: &InboundHead<'_>, payload_len: usize) {
        self.stage(space.index, head, payload_len);
    }

    /// Takes a staged frame away, without its virtio-net header.
    pub fn take_staged(&mut self) -> Option<Vec<u8>> {
        let (slot, start, end) = self.staged.pop_front()?;
        let mut frame = Vec::with_capacity(end - start);
        self.staging
            .piece(slot as usize)
            .part(start + HEADER_LEN, end - start - HEADER_LEN)
            .copy_to(&mut frame);
        self.free.push(slot);
        Some(frame)
    }

    /// Takes chains until they have `len` bytes, or there are no more; returns their bytes.
    fn take_chains(&mut self, queue: &mut SplitQueue, len: usize) -> Result<usize, Fault> {
        let mut bytes = 0;
        while bytes < len {
            let Some(chain) = queue.take(Direction::ToDriver, &mut self.pieces)? else { break };
            bytes += chain.bytes as usize;
            self.chains.push(chain);
            if !self.takes.merged {
                break;
            }
        }
        Ok(bytes)
    }

    fn put_back_from(&mut self, queue: &mut SplitQueue, first_chain: usize, first_piece: usize) {
        for chain in self.chains.drain(first_chain..).rev() {
            queue.put_back(chain);
        }
        self.pieces.truncate(first_piece);
    }

    /// Hands the pieces for the payload to `take`.
    pub fn space(&self, space: Space, take: &mut dyn FnMut(Piece)) {
        if space.index & AHEAD == 0 {
            return take(self.staging.piece(space.index as usize).part(HEAD_ROOM, space.capacity));
        }
        let Some(reserved) = self.reserved.get((space.index & !AHEAD) as usize) else { return };
        part_of(self.pieces_of(reserved), HEADER_LEN + reserved.head_len, reserved.direct, take);
        if let Some(slot) = reserved.overflow {
            // Where it belongs in the staged frame that the whole becomes.
            let rest = space.capacity - reserved.direct;
            take(self.staging.piece(slot as usize).part(HEAD_ROOM + reserved.direct, rest));
        }
    }

    fn pieces_of(&self, reserved: &Reserved) -> &[Piece] {
        &self.pieces[reserved.first_piece..reserved.first_piece + reserved.pieces]
    }

    /// The frame in `space` is complete.
    pub fn commit(
        &mut self,
        queue: &mut SplitQueue,
        space: Space,
        head: &InboundHead<'_>,
        payload_len: usize,
    ) {
        if space.index & AHEAD == 0 {
            return self.stage(space.index, head, payload_len);
        }
        let index = (space.index & !AHEAD) as usize;
        let Some(reserved) = self.reserved.get_mut(index) else { return };
        reserved.is_open = false;
        let overflow = reserved.overflow.take();
        let in_place = !self.gap
            && index == self.filled
            && head.bytes.len() == reserved.head_len
            && payload_len <= reserved.direct
            && (self.takes.partial_checksums || !head.offload.checksum_partial);
        if overflow.is_some() {
            self.expect(payload_len);
        }
        if in_place {
            self.free.extend(overflow);
            return self.fill(queue, index, head, payload_len);
        }
        self.gap = true;
        let Some(slot) = overflow.or_else(|| self.free.pop()) else {
            self.lost += 1;
            return;
        };
        let reserved = &self.reserved[index];
        let mut at = HEAD_ROOM;
        let direct = payload_len.min(reserved.direct);
        part_of(self.pieces_of(reserved), HEADER_LEN + reserved.head_len, direct, &mut |piece| {
            at += self.staging.piece(slot as usize).part(at, piece.len()).copy_piece(&piece);
        });
        self.stage(slot, head, payload_len);
    }

    /// The next datagrams will be about as long: a longer one is expected at once, shorter ones by and by.
    fn expect(&mut self, len: usize) {
        self.expected = if len > self.expected {
            len.next_power_of_two().min(FRAME_MAX)
        } else {
            (self.expected - self.expected / 16).max(DATAGRAM).max(len)
        };
    }

    /// Writes the head in front of a payload that lies in the guest's buffers, and gives those back.
    fn fill(&mut self, queue: &mut SplitQueue, index: usize, head: &InboundHead<'_>, payload_len: usize) {
        let reserved = &self.reserved[index];
        let len = HEADER_LEN + head.bytes.len() + payload_len;
        let chains = &self.chains[reserved.first_chain..reserved.first_chain + reserved.chains];
        let mut used = 0;
        let mut rest = len;
        while rest > 0 && used < chains.len() {
            rest -= rest.min(chains[used].bytes as usize);
            used += 1;
        }
        let mut front = [0; HEADER_LEN + HEAD_MAX];
        write_header(&mut front[..HEADER_LEN], head, used);
        front[HEADER_LEN..HEADER_LEN + head.bytes.len()].copy_from_slice(head.bytes);
        let front = &front[..HEADER_LEN + head.bytes.len()];
        let mut at = 0;
        part_of(self.pieces_of(reserved), 0, front.len(), &mut |piece| at += piece.copy_from(&front[at..]));
        give_back(queue, &chains[..used], len);
        self.given_back += used;
        self.filled += 1;
        self.gap |= used < chains.len();
    }

    /// A frame whose payload lies in a staged slot is complete.
    fn stage(&mut self, slot: u32, head: &InboundHead<'_>, payload_len: usize) {
        let index = slot as usize;
        let front = HEADER_LEN + head.bytes.len();
        let start = HEAD_ROOM - front;
        let room = &mut self.staging.bytes_mut(index, HEAD_ROOM)[start..];
        write_header(&mut room[..HEADER_LEN], head, 1);
        room[HEADER_LEN..].copy_from_slice(head.bytes);
        if head.offload.checksum_partial && !self.takes.partial_checksums {
            let whole = self.staging.bytes_mut(index, HEAD_ROOM + payload_len);
            complete::checksum(&mut whole[start + HEADER_LEN..], head);
            let complete = Offload { checksum_partial: false, ..head.offload };
            let head = InboundHead { offload: complete, ..*head };
            write_header(&mut whole[start..start + HEADER_LEN], &head, 1);
        }
        self.staged.push_back((slot, start, HEAD_ROOM + payload_len));
    }

    /// Nothing came into `space`.
    pub fn cancel(&mut self, space: Space) {
        if space.index & AHEAD == 0 {
            return self.free.push(space.index);
        }
        let Some(reserved) = self.reserved.get_mut((space.index & !AHEAD) as usize) else { return };
        reserved.is_open = false;
        self.gap = true;
        self.free.extend(reserved.overflow.take());
    }

    /// Whether the payload of a space is yet to come.
    fn has_open(&self) -> bool {
        self.reserved.iter().any(|reserved| reserved.is_open)
    }

    /// Puts into the ring what is complete, and back what stayed empty.
    pub fn place(&mut self, queue: &mut SplitQueue) -> Result<(), Fault> {
        if self.has_open() {
            // In the middle of a pass: what was taken ahead is in the way.
            return Ok(());
        }
        let first = self.given_back;
        if first < self.chains.len() {
            // Room that came back. A driver adds none while so much is there: Linux waits until it has got a good part of it.
            self.wants_room = false;
        }
        for chain in self.chains.drain(first..).rev() {
            queue.put_back(chain);
        }
        self.forget_ahead();
        while let Some((slot, start, end)) = self.staged.front().copied() {
            let bytes = self.take_chains(queue, end - start)?;
            if bytes < end - start {
                // More than the guest ever offers at once is never taken.
                let never = !self.takes.merged && !self.chains.is_empty()
                    || self.chains.len() == usize::from(queue.size());
                self.put_back_from(queue, 0, 0);
                self.wants_room = !never;
                if !never {
                    return Ok(());
                }
                self.lost += 1;
            } else {
                let count = (self.chains.len() as u16).to_le_bytes();
                self.staging.bytes_mut(slot as usize, end)[start + 10..start + 12].copy_from_slice(&count);
                let mut at = start;
                for piece in &self.pieces {
                    at += piece.copy_piece(&self.staging.piece(slot as usize).part(at, end - at));
                }
                give_back(queue, &self.chains, end - start);
                self.forget_ahead();
                self.wants_room = false;
            }
            self.staged.pop_front();
            self.free.push(slot);
        }
        Ok(())
    }

    fn forget_ahead(&mut self) {
        self.reserved.clear();
        self.chains.clear();
        self.pieces.clear();
        (self.filled, self.given_back, self.gap) = (0, 0, false);
    }

    /// There may be room that was waited for.
    pub fn look_again(&mut self) {
        self.wants_room = false;
    }
}

/// Gives chains back that a frame of `len` bytes fills.
fn give_back(queue: &mut SplitQueue, chains: &[Chain], len: usize) {
    let mut rest = len as u32;
    for chain in chains {
        let written = chain.bytes.min(rest);
        rest -= written;
        queue.give_back(*chain, written);
    }
}

fn write_header(header: &mut [u8], head: &InboundHead<'_>, buffers: usize) {
    let checksum = (head.head.transport_start as u16, head.head.checksum_offset as u16);
    head.offload.write(header, head.v4, head.head.len as u16, checksum, buffers as u16);
}
