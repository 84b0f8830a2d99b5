//! The model link: frames whose bytes lie scattered in its memory, bounded room, and a careful account of both.
//!
//! Every frame of a batch is released once, before the next batch is received; every space that is reserved is committed
//! or cancelled once, in the pass in which it was reserved. What a worker does otherwise fails the world.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::rc::Rc;

use crate::frame::build::HEAD_MAX;
use crate::frame::offload::{Offload, Segmentation};
use crate::frame::view::{Content, HEAD_LEN, Transport, View};
use crate::host::engine::Token;
use crate::io::{Buffers, Operations, Piece};
use crate::link::{
    Ahead, Capabilities, FRAME_MAX, InboundHead, Link, OutboundFrame, READY_FDS, Ready, Received, Space,
    complete,
};
use crate::random::Random;

use super::kernel::ROOM_FD;
use super::memory::Lent;
use super::plan::LinkPlan;
use super::room::Room;
use super::stage::Stage;

/// A frame outside of the link's memory.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Its bytes, from the Ethernet header on.
    pub bytes: Vec<u8>,
    /// What its virtio-net header says.
    pub offload: Offload,
}

/// The link's far side: what the world puts in and takes out.
#[derive(Default)]
pub struct Port {
    /// Frames from the guest that were not received yet.
    pub inbox: VecDeque<Frame>,
    /// Frames to the guest that were published.
    pub outbox: Vec<Frame>,
    /// The room for more of them.
    pub room: Room,
    /// The guest does not use the queue: the first one stands in for it.
    pub off: bool,
    /// The worker is to be told of frames.
    pub armed: Option<Token>,
    /// The link is gone.
    pub closed: bool,
}

impl Port {
    /// The tokens of reports that are due: frames are there, or room is, and the worker is to be told. They are reported once.
    pub fn ring(&mut self) -> [Option<Token>; READY_FDS] {
        let frames = if self.inbox.is_empty() { None } else { self.armed.take() };
        [frames, self.room.ring()]
    }

    /// Whether a report is due.
    pub fn rings(&self) -> bool {
        !self.inbox.is_empty() && self.armed.is_some() || self.room.rings()
    }
}

/// Bytes of a slot that lie between its pieces.
const GAPS: usize = 512;
/// Complete frames that are put together apart from a ring.
const STAGED: usize = 16;
/// Pieces of a scattered frame at the most.
const PIECES: usize = 12;

/// One frame of the batch.
struct Batched {
    head: Vec<u8>,
    len: usize,
    offload: Offload,
    /// Its pieces in order.
    pieces: Vec<Piece>,
}

enum Slot {
    Free,
    Reserved { capacity: usize, head_len: usize, pieces: Vec<Piece>, has_room: bool },
    Committed,
}

/// The link of one worker.
pub struct ModelLink {
    fd: RawFd,
    stage: Rc<Stage>,
    plan: LinkPlan,
    capabilities: Capabilities,
    port: Rc<RefCell<Port>>,
    random: Random,
    outbound: Buffers,
    batch: Vec<Batched>,
    inbound: Buffers,
    slots: Vec<Slot>,
    committed: Vec<(usize, Frame)>,
    /// Complete frames for which room has yet to be found: on a ring they are put together apart from it.
    staged: VecDeque<(usize, Frame)>,
    /// Frames that were committed while the queue was off.
    detoured: VecDeque<Frame>,
    /// There was not enough room, whatever has been tried since.
    wants_room: bool,
    /// Spaces that nothing came into: their room is the link's until it publishes.
    cancelled: usize,
}

impl ModelLink {
    /// A link with this descriptor, whose far side is `port`.
    pub fn new(
        fd: RawFd,
        stage: Rc<Stage>,
        plan: LinkPlan,
        capabilities: Capabilities,
        port: Rc<RefCell<Port>>,
        random: Random,
    ) -> Self {
        let outbound = Buffers::new(plan.batch, FRAME_MAX + GAPS);
        let places = if plan.room.is_some() { plan.ring + STAGED } else { plan.ring };
        let inbound = Buffers::new(places, FRAME_MAX + GAPS);
        let mut memory = stage.memory.borrow_mut();
        memory.add_arena(&outbound);
        memory.add_arena(&inbound);
        drop(memory);
        let slots = (0..places).map(|_| Slot::Free).collect();
        let (batch, committed, detoured) = (Vec::new(), Vec::new(), VecDeque::new());
        Self {
            fd,
            stage,
            plan,
            capabilities,
            port,
            random,
            outbound,
            batch,
            inbound,
            slots,
            committed,
            staged: VecDeque::new(),
            detoured,
            wants_room: false,
            cancelled: 0,
        }
    }

    /// Cuts `len` bytes of a slot into pieces with gaps between them, in any order.
    fn scatter(random: &mut Random, plan: LinkPlan, slot: Piece, len: usize) -> Vec<Piece> {
        if !random.chance(plan.scattered) || len < 2 {
            return vec![slot.part(random.below(64) as usize, len)];
        }
        let mut lens = Vec::new();
        let mut rest = len;
        while rest > 0 && lens.len() < PIECES - 1 {
            let most = if random.chance(300_000) { 8 } else { rest as u64 };
            let part = (random.spread(most) as usize).min(rest);
            lens.push(part);
            rest -= part;
        }
        if rest > 0 {
            lens.push(rest);
        }
        // The pieces lie in the slot from its end to its start.
        let mut end = slot.len();
        lens.iter()
            .map(|len| {
                end -= len + random.below(GAPS as u64 / PIECES as u64) as usize;
                slot.part(end, *len)
            })
            .collect()
    }

    fn free(&self) -> usize {
        self.slots.iter().filter(|slot| matches!(slot, Slot::Free)).count()
    }

    /// How many spaces are reserved at this moment.
    pub fn reserved(&self) -> usize {
        self.slots.iter().filter(|slot| matches!(slot, Slot::Reserved { .. })).count()
    }

    /// Whether complete frames wait for room.
    pub fn has_staged(&self) -> bool {
        !self.staged.is_empty()
    }

    /// Takes room in the ring for a frame.
    fn take_room(&mut self) -> bool {
        let room = &mut self.port.borrow_mut().room;
        let took = room.take(&mut self.random);
        self.wants_room = room.ring.is_some() && !took;
        took
    }

    /// Room for a frame with a head of `head_len` bytes at the most.
    fn reserve_for(&mut self, head_len: usize, payload_len: usize, has_room: bool) -> Option<Space> {
        let index = self.slots.iter().position(|slot| matches!(slot, Slot::Free))?;
        if has_room && !self.take_room() {
            return None;
        }
        let capacity = payload_len.min(FRAME_MAX);
        let pieces = Self::scatter(&mut self.random, self.plan, self.inbound.piece(index), capacity);
        let mut memory = self.stage.memory.borrow_mut();
        for piece in &pieces {
            memory.lend(piece, Lent::Space);
        }
        self.slots[index] = Slot::Reserved { capacity, head_len, pieces, has_room };
        Some(Space { index: index as u32, capacity })
    }

    /// Writes a TCP segment to the guest into the books.
    fn note_segment(&self, frame: &Frame) {
        let Ok(View { content: Content::Ip(packet), .. }) = View::parse(&frame.bytes, frame.bytes.len())
        else {
            return;
        };
        if let Transport::Tcp(tcp) = packet.transport {
            let guest = crate::frame::address::Endpoint {
                address: packet.ip.destination,
                port: tcp.destination_port,
            };
            let remote = crate::frame::address::Endpoint { address: packet.ip.source, port: tcp.source_port };
            let payload = &frame.bytes[packet.transport_start + tcp.header_len..];
            let mut books = self.stage.books.borrow_mut();
            let right = books.segment_to_guest((guest, remote), &tcp.segment, payload, &self.stage.pattern);
            drop(books);
            self.stage.expect(right);
        }
    }
}

impl Link for ModelLink {
    fn capabilities(&self) -> Capabilities {
        if self.port.borrow().off {
            return Capabilities { tcp_segmentation: false, udp_segmentation: false, ..self.capabilities };
        }
        self.capabilities
    }

    fn ready_fds(&self) -> [Option<Ready>; READY_FDS] {
        [Some(Ready::readable(self.fd)), self.wants_room.then(|| Ready::readable(self.fd + ROOM_FD))]
    }

    fn woken(&mut self, which: usize) {
        if which == 1 {
            self.port.borrow_mut().room.ask(false);
        }
    }

    fn wants_room(&self) -> bool {
        self.wants_room
    }

    fn prepare_sleep(&mut self) -> bool {
        if self.wants_room {
            let room = &mut self.port.borrow_mut().room;
            self.wants_room = !room.has_unseen(&mut self.random);
            room.ask(self.wants_room);
            return self.wants_room;
        }
        true
    }

    fn begin_receive(&mut self, _operations: &mut Operations) {
        self.stage
            .check(self.batch.is_empty(), || "a batch is received before the last one was released".into());
    }

    fn end_receive(&mut self, _operations: &Operations) -> Received {
        let mut port = self.port.borrow_mut();
        let ask = self.random.within((1, self.plan.batch as u64)) as usize;
        while self.batch.len() < ask {
            let Some(frame) = port.inbox.pop_front() else { break };
            let slot = self.outbound.piece(self.batch.len());
            let pieces = Self::scatter(&mut self.random, self.plan, slot, frame.bytes.len());
            let mut memory = self.stage.memory.borrow_mut();
            let mut at = 0;
            for piece in &pieces {
                at += piece.copy_from(&frame.bytes[at..]);
                memory.lend(piece, Lent::Payload);
            }
            let head_len = (HEAD_LEN + self.random.below(64) as usize).min(frame.bytes.len());
            let head = frame.bytes[..head_len].to_vec();
            self.batch.push(Batched { head, len: frame.bytes.len(), offload: frame.offload, pieces });
        }
        if !self.batch.is_empty() {
            self.stage.note_activity();
        }
        Received { frames: self.batch.len(), empty: self.batch.len() < ask }
    }

    fn frame(&self, index: usize) -> Option<OutboundFrame<'_>> {
        let Batched { head, len, offload, .. } = self.batch.get(index)?;
        Some(OutboundFrame { head, len: *len, offload: Ok(*offload) })
    }

    fn payload(&self, index: usize, from: usize, len: usize, take: &mut dyn FnMut(Piece)) {
        let Some(frame) = self.batch.get(index) else {
            self.stage.fail(format!("frame {index} of a batch of {} is asked for", self.batch.len()));
            return;
        };
        self.stage
            .check(from + len <= frame.len, || format!("bytes {from}+{len} of a frame of {}", frame.len));
        let (mut skip, mut rest) = (from, len);
        for piece in &frame.pieces {
            let skipped = skip.min(piece.len());
            skip -= skipped;
            let part = piece.part(skipped, rest);
            rest -= part.len();
            if !part.is_empty() {
                take(part);
            }
        }
    }

    fn release(&mut self) {
        let mut memory = self.stage.memory.borrow_mut();
        for frame in self.batch.drain(..) {
            frame.pieces.iter().for_each(|piece| memory.take_back(piece));
        }
    }

    fn has_unpublished(&self) -> bool {
        let may_go = !self.wants_room || self.port.borrow().off;
        self.has_staged() && may_go
            || !self.committed.is_empty()
            || !self.detoured.is_empty()
            || self.cancelled > 0
    }

    fn reserve(&mut self, payload_len: usize) -> Option<Space> {
        self.reserve_for(HEAD_MAX, payload_len, self.plan.room.is_none())
    }

    fn may_reserve_ahead(&self) -> bool {
        let some_are_kept = self.plan.room.is_none() || self.free() > STAGED / 2;
        some_are_kept && (!self.plan.one_ahead || self.reserved() == 0)
    }

    fn reserve_ahead(&mut self, head_len: usize, payload: Ahead) -> Option<Space> {
        if self.plan.room.is_some() && self.free() <= STAGED / 2 {
            return None;
        }
        self.reserve_for(head_len, payload.bytes_max(), true)
    }

    fn space(&self, space: Space, take: &mut dyn FnMut(Piece)) {
        match self.slots.get(space.index as usize) {
            Some(Slot::Reserved { pieces, .. }) => pieces.iter().for_each(|piece| take(*piece)),
            _ => self.stage.fail("a space is written to that is not reserved"),
        }
    }

    fn commit(&mut self, space: Space, head: &InboundHead<'_>, payload_len: usize) {
        let index = space.index as usize;
        let slot = std::mem::replace(&mut self.slots[index], Slot::Committed);
        let Slot::Reserved { capacity, head_len, pieces, has_room } = slot else {
            self.stage.fail("a space is committed that is not reserved");
            return;
        };
        let fits = payload_len <= capacity && head.bytes.len() <= head_len;
        self.stage.check(fits, || format!("{payload_len} bytes are committed in a space of {capacity}"));
        let mut frame = Frame { bytes: head.bytes.to_vec(), offload: head.offload };
        let mut rest = payload_len;
        let mut memory = self.stage.memory.borrow_mut();
        for piece in &pieces {
            memory.take_back(piece);
            let part = piece.part(0, rest);
            rest -= part.len();
            part.copy_to(&mut frame.bytes);
        }
        drop(memory);
        let capabilities = self.capabilities();
        let allowed = match frame.offload.segmentation {
            Segmentation::None => true,
            Segmentation::Tcp { .. } => capabilities.tcp_segmentation,
            Segmentation::Udp { .. } => capabilities.udp_segmentation,
        };
        self.stage
            .check(allowed, || format!("{:?} on a link that does not take it", frame.offload.segmentation));
        if frame.offload.checksum_partial && !capabilities.tcp_segmentation {
            complete::checksum(&mut frame.bytes, head);
            frame.offload.checksum_partial = false;
        }
        self.stage.note_activity();
        if self.port.borrow().off {
            self.slots[index] = Slot::Free;
            self.cancelled += usize::from(has_room);
            self.detoured.push_back(frame);
            return;
        }
        self.note_segment(&frame);
        if has_room {
            self.committed.push((index, frame));
        } else {
            self.staged.push_back((index, frame));
        }
    }

    fn cancel(&mut self, space: Space) {
        let slot = std::mem::replace(&mut self.slots[space.index as usize], Slot::Free);
        let Slot::Reserved { pieces, has_room, .. } = slot else {
            self.stage.fail("a space is cancelled that is not reserved");
            return;
        };
        let mut memory = self.stage.memory.borrow_mut();
        for piece in &pieces {
            memory.take_back(piece);
        }
        self.cancelled += usize::from(has_room);
    }

    fn begin_publish(&mut self, _operations: &mut Operations) {
        let room = &mut self.port.borrow_mut().room;
        self.wants_room &= self.cancelled == 0;
        room.put_back(std::mem::take(&mut self.cancelled));
        self.wants_room = self.wants_room && !room.has_unseen(&mut self.random);
    }

    fn end_publish(&mut self, _operations: &Operations) -> usize {
        let mut lost = 0;
        if !self.port.borrow().off {
            // It was switched on before they had gone.
            for frame in std::mem::take(&mut self.detoured) {
                self.note_segment(&frame);
                if self.take_room() {
                    self.port.borrow_mut().outbox.push(frame);
                } else {
                    lost += 1;
                }
            }
        }
        let mut port = self.port.borrow_mut();
        for (index, frame) in self.committed.drain(..) {
            self.slots[index] = Slot::Free;
            if self.random.chance(self.plan.refused) {
                lost += 1;
                port.room.put_back(1);
                self.wants_room = false;
            } else {
                port.outbox.push(frame);
            }
        }
        let is_off = port.off;
        drop(port);
        while let Some((index, frame)) = self.staged.pop_front() {
            if is_off {
                // They were made for a queue that has gone.
                lost += 1;
            } else if self.take_room() {
                self.port.borrow_mut().outbox.push(frame);
            } else {
                self.staged.push_front((index, frame));
                break;
            }
            self.slots[index] = Slot::Free;
        }
        lost
    }

    fn stand_in(&self) -> Option<u8> {
        self.port.borrow().off.then_some(0)
    }

    fn take_detoured(&mut self) -> Option<Vec<u8>> {
        if self.port.borrow().off { self.detoured.pop_front().map(|frame| frame.bytes) } else { None }
    }

    fn is_closed(&self) -> bool {
        self.port.borrow().closed
    }
}
