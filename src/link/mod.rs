//! Links: how frames come from and go to a guest.
//!
//! Every link offers the same two things. *Outbound*, a batch of frames: the head of each is a private copy, the
//! payload stays where the link has it and is handed out as pieces, valid until the batch is released. *Inbound*,
//! space: room for one frame, into whose pieces the kernel writes payload directly; it is committed with a head in
//! front, or cancelled. A link fills batches of operations but runs none; the worker does.
//!
//! Space is reserved *ahead*, for bytes that may come or not, or for a frame that is complete. In a virtio ring the
//! guest's buffers go back in the order in which they came, so a space ahead that stays empty is in the way of all
//! behind it: a link may let one consumer at a time reserve ahead, and the others wait for the next pass.

pub mod commands;
pub mod complete;
pub mod socket;
pub mod tap;
pub mod vhost_user;
pub mod virtqueue;

use std::io;
use std::os::fd::RawFd;

use crate::frame::build::Head;
use crate::frame::drop_reason::DropReason;
use crate::frame::offload::Offload;
use crate::frame::view::ETHERNET_LEN;
use crate::io::{Operations, Piece};

/// The longest frame: an IP packet of 64 KiB in Ethernet.
pub const FRAME_MAX: usize = ETHERNET_LEN + 65_535;

/// A frame from the guest.
#[derive(Clone, Copy, Debug)]
pub struct OutboundFrame<'l> {
    /// The first bytes, from the Ethernet header on: all, or at least [`crate::frame::view::HEAD_LEN`].
    pub head: &'l [u8],
    /// The whole frame's length, without the virtio-net header.
    pub len: usize,
    /// What the virtio-net header says, or why the frame cannot be believed.
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

/// Payload that may come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ahead {
    /// Bytes of a stream, up to so many. A space may be smaller.
    Bytes(usize),
    /// A datagram, or a run of them, of up to so many bytes. It must fit whole.
    Datagram(usize),
}

impl Ahead {
    /// Bytes at the most.
    pub fn bytes_max(self) -> usize {
        let (Self::Bytes(len) | Self::Datagram(len)) = self;
        len
    }
}

/// What has changed about a link.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct News {
    /// The guest has gone, and with it its side of every flow.
    pub guest_gone: bool,
}

/// Descriptors of one link that are watched.
pub const READY_FDS: usize = 2;

/// A descriptor that is watched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ready {
    /// Something to read wakes the worker.
    pub fd: RawFd,
    /// So does room to write.
    pub or_writable: bool,
}

impl Ready {
    /// Something to read wakes the worker, and nothing else.
    pub fn readable(fd: RawFd) -> Self {
        Self { fd, or_writable: false }
    }
}

/// What has passed over virtqueues, as far as a link has any.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VirtqueueCounts {
    /// Chains of buffers given back to the driver.
    pub chains: u64,
    /// Wake-ups by the driver's kicks.
    pub kicks: u64,
    /// Interrupts of the driver.
    pub interrupts: u64,
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

    /// The descriptors that become ready when frames come, or room for frames to the guest.
    fn ready_fds(&self) -> [Option<Ready>; READY_FDS];

    /// One of them became ready.
    fn woken(&mut self, _which: usize) {}

    /// Whether frames, or room that was waited for, are there already: a look at memory, no system call.
    fn has_work(&self) -> bool {
        false
    }

    /// Whether the guest's buffers did not suffice, or nothing is attached: there is nothing to be sent before there is
    /// room.
    fn wants_room(&self) -> bool {
        false
    }

    /// The worker is about to sleep until one of the descriptors is ready: whoever makes them so is asked to. Returns
    /// whether there is nothing yet.
    fn prepare_sleep(&mut self) -> bool {
        true
    }

    /// Whether something about the link itself is to change, by [`Self::take_news`].
    fn has_news(&self) -> bool {
        false
    }

    /// Changes what is to change. No operation is in flight, and no descriptor of the link is watched.
    fn take_news(&mut self) -> News {
        News::default()
    }

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

    /// Whether there is something to publish.
    fn has_unpublished(&self) -> bool;

    /// Room for a frame that is complete, with up to `payload_len` bytes of payload; `None` when the guest, or the batch,
    /// has no room.
    fn reserve(&mut self, payload_len: usize) -> Option<Space>;

    /// Whether another consumer, a socket, may reserve spaces ahead in this pass.
    fn may_reserve_ahead(&self) -> bool;

    /// Room for a frame with a head of `head_len` bytes, whose payload has yet to come. Some room is kept for frames that
    /// are complete: an acknowledgement must never fail because every space waits for bytes.
    fn reserve_ahead(&mut self, head_len: usize, payload: Ahead) -> Option<Space>;

    /// Hands the pieces for the payload to `take`.
    fn space(&self, space: Space, take: &mut dyn FnMut(Piece));

    /// The frame in `space` is complete: its head, and `payload_len` bytes that lie in the pieces already.
    fn commit(&mut self, space: Space, head: &InboundHead<'_>, payload_len: usize);

    /// Nothing came into `space`.
    fn cancel(&mut self, space: Space);

    /// Adds the operations that pass committed frames on, and tell the guest of them.
    fn begin_publish(&mut self, operations: &mut Operations);

    /// Takes in what those operations gave; returns how many frames the guest did not take.
    fn end_publish(&mut self, operations: &Operations) -> usize;

    /// What has passed so far.
    fn counts(&self) -> VirtqueueCounts {
        VirtqueueCounts::default()
    }

    /// A queue that has failed, because its driver broke the rules, and was not told yet: what to tell the user.
    fn take_fault(&mut self) -> Option<String> {
        None
    }

    /// Whether the guest sends a flow's frames over the link by which the flow's last frame came to it: who sends to it decides.
    fn steers(&self) -> bool {
        false
    }

    /// What the guest sends over this link the first one's worker receives from now on, or this one's again. What is for the guest
    /// passes in either case. Only where the link [steers](Self::steers), and not the first one.
    fn rest(&mut self, _rests: bool) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// The number of the link that carries what is for the guest, while the guest uses others than this one.
    fn stand_in(&self) -> Option<u8> {
        None
    }

    /// A frame for the guest, complete, that the stand-in is to carry.
    fn take_detoured(&mut self) -> Option<Vec<u8>> {
        None
    }

    /// Whether the link is gone for good.
    fn is_closed(&self) -> bool;
}
