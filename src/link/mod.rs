//! Links: how frames come from and go to a guest.
//!
//! Every link offers the same two things. *Outbound*, a batch of frames: the head of each is a private copy, the
//! payload stays where the link has it and is handed out as pieces, valid until the batch is released. *Inbound*,
//! space: room for one frame, into whose pieces the kernel writes payload directly; it is committed with a head in
//! front, or cancelled. A link fills batches of operations but runs none; the worker does.

pub mod tap;

use std::os::fd::RawFd;

use crate::frame::build::Head;
use crate::frame::drop_reason::DropReason;
use crate::frame::offload::Offload;
use crate::io::{Operations, Piece};

/// A frame from the guest.
#[derive(Clone, Copy, Debug)]
pub struct OutboundFrame<'l> {
    /// The first bytes, from the Ethernet header on: all, or at least [`crate::frame::view::HEAD_LEN`].
    pub head: &'l [u8],
    /// The whole frame's length, without the virtio-net header.
    pub len: usize,
    /// What the virtio-net header says, or why it cannot be believed.
    pub offload: Result<Offload, DropReason>,
}

/// What came of receiving a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Received {
    /// How many frames there are.
    pub frames: usize,
    /// Whether the link is empty now.
    pub empty: bool,
}

/// Room for one frame to the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Space {
    /// The link's own name for it.
    pub(crate) index: u32,
    /// Payload bytes that fit.
    pub capacity: usize,
}

/// The head of a frame to the guest, and what is said about the frame.
#[derive(Clone, Copy, Debug)]
pub struct InboundHead<'h> {
    /// Ethernet, IP and transport headers.
    pub bytes: &'h [u8],
    /// Where the transport header and its checksum lie.
    pub head: Head,
    /// IPv4 or IPv6.
    pub v4: bool,
    /// What is left to the guest.
    pub offload: Offload,
}

/// What a link can do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capabilities {
    /// The guest's MTU.
    pub mtu: u16,
    /// The guest takes TCP segments larger than its MTU, with a partial checksum.
    pub tcp_segmentation: bool,
    /// The guest takes runs of UDP datagrams as one frame.
    pub udp_segmentation: bool,
}

/// A link of one worker.
pub trait Link {
    /// What it can do.
    fn capabilities(&self) -> Capabilities;

    /// The descriptor that becomes readable when frames come.
    fn ready_fd(&self) -> RawFd;

    /// Adds the operations that receive the next batch. The last batch must have been released.
    fn begin_receive(&mut self, operations: &mut Operations);

    /// Takes in what those operations gave.
    fn end_receive(&mut self, operations: &Operations) -> Received;

    /// A frame of the batch, `None` behind the last one.
    fn frame(&self, index: usize) -> Option<OutboundFrame<'_>>;

    /// Hands the pieces of a frame's bytes `from..from + len` to `take`, counted from the Ethernet header.
    fn payload(&self, index: usize, from: usize, len: usize, take: &mut dyn FnMut(Piece));

    /// The batch's frames and pieces are not used any more.
    fn release(&mut self);

    /// Room for a frame with a head of `head_len` bytes and up to `payload_len` bytes of payload; `None` when the
    /// guest, or the batch, has no room.
    fn reserve(&mut self, head_len: usize, payload_len: usize) -> Option<Space>;

    /// Whether a space may be reserved for bytes that have yet to come. The last ones are kept for frames that are
    /// complete: an acknowledgement must never fail because every space waits for bytes.
    fn may_reserve_ahead(&self) -> bool {
        true
    }

    /// Hands the pieces for the payload to `take`.
    fn space(&self, space: Space, take: &mut dyn FnMut(Piece));

    /// The frame in `space` is complete: its head, and `payload_len` bytes that lie in the pieces already.
    fn commit(&mut self, space: Space, head: &InboundHead<'_>, payload_len: usize);

    /// Nothing came into `space`.
    fn cancel(&mut self, space: Space);

    /// Adds the operations that pass committed frames on.
    fn begin_publish(&mut self, operations: &mut Operations);

    /// Takes in what those operations gave; returns how many frames the guest did not take.
    fn end_publish(&mut self, operations: &Operations) -> usize;

    /// Whether the link is gone for good.
    fn is_closed(&self) -> bool;
}
