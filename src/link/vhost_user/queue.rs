//! A worker's link to a virtual machine: one pair of virtqueues, attached and detached by the session.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use crate::io::{Buffers, Kind, Operations, Piece};
use crate::link::commands::{self, Commander, Commands, Ended};
use crate::link::virtqueue::{self, Fault, SplitQueue};
use crate::link::{
    Ahead, Capabilities, InboundHead, Link, News, OutboundFrame, READY_FDS, Ready, Received, Space,
    VirtqueueCounts,
};

use super::from_guest::FromGuest;
use super::memory::GuestMemory;
use super::pairs::Pairs;
use super::to_guest::{Takes, ToGuest};

/// Which of the two queues, as they are numbered in descriptors and replies.
const TRANSMIT: usize = 0;
const RECEIVE: usize = 1;

/// One virtqueue, as the front-end described it.
pub struct Ring {
    /// Where it lies.
    pub parts: virtqueue::Parts,
    /// Readable when the driver has made buffers available.
    pub kick: OwnedFd,
    /// Written to when buffers were given back.
    pub call: Option<OwnedFd>,
    /// Written to when the driver broke the rules.
    pub error: Option<OwnedFd>,
}

/// A pair of virtqueues, and what was negotiated.
pub struct Attachment {
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// From the guest: `transmitq`. `None` while it is stopped.
    pub transmit: Option<Ring>,
    /// What comes over it is given back unsent: it is disabled, which the driver may not know (vhost-user, "Ring states").
    pub discards: bool,
    /// To the guest: `receiveq`. `None` while it is stopped, or not used.
    pub receive: Option<Ring>,
    /// What the guest takes.
    pub takes: Takes,
    /// It takes TCP segments larger than its MTU.
    pub tcp_segmentation: bool,
    /// It takes runs of datagrams as one frame.
    pub udp_segmentation: bool,
}

enum Command {
    Attach(Box<Attachment>),
    Detach,
    GuestGone,
}

/// What a worker answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Answer {
    /// A ring does not lie in the guest's memory as virtio wants it.
    refused: bool,
    /// The next entries of the available rings, of the queues that were attached.
    next: [Option<u16>; 2],
}

/// The session's hold on one worker's link.
pub struct Control(Commander<Command, Answer>);

impl Control {
    /// Attaches a pair; whether its rings can be used.
    pub fn attach(&self, attachment: Attachment, wake: impl FnOnce()) -> Result<bool, Ended> {
        Ok(!self.0.ask(Command::Attach(Box::new(attachment)), wake)?.refused)
    }

    /// Detaches the pair: nothing of it is in use any more. The next available indices of the transmit and the receive
    /// queue, where they were attached.
    pub fn detach(&self, wake: impl FnOnce()) -> Result<[Option<u16>; 2], Ended> {
        Ok(self.0.ask(Command::Detach, wake)?.next)
    }

    /// The guest has gone: its connections end.
    pub fn guest_gone(&self, wake: impl FnOnce()) -> Result<(), Ended> {
        self.0.ask(Command::GuestGone, wake).map(|_| ())
    }
}

struct Active {
    queue: SplitQueue,
    kick: OwnedFd,
    call: Option<OwnedFd>,
    error: Option<OwnedFd>,
    /// The driver broke the rules: the queue is not touched any more.
    has_failed: bool,
    /// The driver is to be told of it.
    tell_error: bool,
    /// What another device gave back may not have been told: it may have died in between.
    is_new: bool,
    /// The kick was seen and is to be taken out of its descriptor.
    woken: bool,
}

impl Active {
    fn new(memory: &Arc<GuestMemory>, ring: Ring) -> Option<Self> {
        let queue = SplitQueue::new(memory.clone(), &ring.parts)?;
        queue.refuse_notifications();
        let Ring { kick, call, error, .. } = ring;
        let (has_failed, tell_error, is_new, woken) = (false, false, true, false);
        Some(Self { queue, kick, call, error, has_failed, tell_error, is_new, woken })
    }

    fn fail(&mut self) {
        self.has_failed = true;
        self.tell_error = true;
    }

    /// Whether the driver may have to be told something.
    fn is_unsettled(&self) -> bool {
        self.tell_error || (!self.has_failed && (self.is_new || self.queue.is_unsettled()))
    }
}

/// One pair of virtqueues: a worker's link.
pub struct Queue {
    /// The pair's number.
    number: u16,
    pairs: Pairs,
    mtu: u16,
    tcp_segmentation: bool,
    udp_segmentation: bool,
    commands: Commands<Command, Answer>,
    /// Faults that were not told yet.
    faults: Vec<(usize, Fault)>,
    rings: [Option<Active>; 2],
    from_guest: FromGuest,
    /// See [`Attachment::discards`].
    discards: bool,
    to_guest: ToGuest,
    counts: VirtqueueCounts,
    /// What is written to an eventfd (a one), and what is read from one.
    words: Buffers,
}

const ONE: usize = 0;
const SCRATCH: usize = 1;

impl Queue {
    /// The link of a pair with nothing attached, and the session's hold on it.
    pub fn new(mtu: u16, number: u16, pairs: Pairs) -> (Self, Control) {
        let (commander, commands) = commands::channel();
        let mut words = Buffers::new(2, 8);
        words.bytes_mut(ONE, 8).copy_from_slice(&1u64.to_ne_bytes());
        let queue = Self {
            number,
            pairs,
            mtu,
            tcp_segmentation: false,
            udp_segmentation: false,
            commands,
            faults: Vec::new(),
            rings: [None, None],
            from_guest: FromGuest::new(),
            discards: false,
            to_guest: ToGuest::new(),
            counts: VirtqueueCounts::default(),
            words,
        };
        (queue, Control(commander))
    }

    /// A ring that works.
    fn ring(&self, which: usize) -> Option<&Active> {
        self.rings[which].as_ref().filter(|ring| !ring.has_failed)
    }

    /// The pair that the guest uses instead of this one.
    fn detour(&self) -> Option<u16> {
        if self.rings[RECEIVE].is_some() { None } else { self.pairs.stand_in(self.number) }
    }

    /// Whether there is a way to the guest.
    fn has_way(&self) -> bool {
        self.ring(RECEIVE).is_some() || self.detour().is_some()
    }

    fn fail(&mut self, which: usize, fault: Fault) {
        if let Some(ring) = &mut self.rings[which] {
            ring.fail();
        }
        match which {
            TRANSMIT => self.from_guest.forget(),
            _ => self.to_guest.fail(),
        }
        self.faults.push((which, fault));
    }

    fn attach(&mut self, attachment: Attachment) -> Answer {
        let Attachment { memory, transmit, discards, receive, takes, tcp_segmentation, udp_segmentation } =
            attachment;
        self.discards = discards;
        let mut refused = false;
        for (which, ring) in [(TRANSMIT, transmit), (RECEIVE, receive)] {
            let active = ring.map(|ring| Active::new(&memory, ring));
            refused |= matches!(active, Some(None));
            self.rings[which] = active.flatten();
        }
        // Where there is no queue, what is staged goes by way of another worker, complete.
        self.to_guest.attach(if self.rings[RECEIVE].is_some() { takes } else { Takes::default() });
        self.tcp_segmentation = tcp_segmentation;
        self.udp_segmentation = udp_segmentation;
        Answer { refused, ..Answer::default() }
    }

    fn detach(&mut self) -> Answer {
        self.from_guest.forget();
        if let Some(ring) = self.rings[RECEIVE].as_mut().filter(|ring| !ring.has_failed) {
            // What is complete is the guest's; a fault now is nobody's concern any more.
            let _ = self.to_guest.place(&mut ring.queue);
            ring.queue.publish();
        }
        self.to_guest.detach();
        let next = self.rings.each_mut().map(|ring| ring.take().map(|ring| ring.queue.next_available()));
        Answer { refused: false, next }
    }

    /// Runs `task` on a ring that works; a fault fails it.
    fn with<T>(
        &mut self,
        which: usize,
        task: impl FnOnce(&mut FromGuest, &mut ToGuest, &mut SplitQueue) -> Result<T, Fault>,
    ) -> Option<T> {
        let Self { rings, from_guest, to_guest, .. } = self;
        let ring = rings[which].as_mut().filter(|ring| !ring.has_failed)?;
        match task(from_guest, to_guest, &mut ring.queue) {
            Ok(done) => Some(done),
            Err(fault) => {
                self.fail(which, fault);
                None
            }
        }
    }
}

impl Link for Queue {
    fn capabilities(&self) -> Capabilities {
        // What makes a detour is complete: it travels as bytes alone.
        let direct = self.rings[RECEIVE].is_some();
        Capabilities {
            mtu: self.mtu,
            tcp_segmentation: self.tcp_segmentation && direct,
            udp_segmentation: self.udp_segmentation && direct,
        }
    }

    fn ready_fds(&self) -> [Option<Ready>; READY_FDS] {
        let kick = |which| self.ring(which).map(|ring| Ready::readable(ring.kick.as_raw_fd()));
        [kick(TRANSMIT), kick(RECEIVE).filter(|_| self.to_guest.wants_room())]
    }

    fn woken(&mut self, which: usize) {
        if let Some(ring) = &mut self.rings[which] {
            ring.woken = true;
            self.counts.kicks += 1;
            if !ring.has_failed {
                ring.queue.refuse_notifications();
            }
        }
    }

    fn has_work(&self) -> bool {
        self.ring(TRANSMIT).is_some_and(|ring| ring.queue.has_available())
            || (self.to_guest.wants_room() && self.ring(RECEIVE).is_some_and(|ring| ring.queue.has_more()))
    }

    fn wants_room(&self) -> bool {
        self.to_guest.wants_room() || !self.has_way()
    }

    fn prepare_sleep(&mut self) -> bool {
        let idle = self.ring(TRANSMIT).is_none_or(|ring| ring.queue.ask_for_notification());
        let full = !self.to_guest.wants_room()
            || self.ring(RECEIVE).is_none_or(|ring| ring.queue.ask_for_notification());
        if !full {
            self.to_guest.look_again();
        }
        idle && full
    }

    fn has_news(&self) -> bool {
        !self.commands.is_empty()
    }

    fn take_news(&mut self) -> News {
        let mut news = News::default();
        let Some((command, answer)) = self.commands.take() else { return news };
        let said = match command {
            Command::Attach(attachment) => self.attach(*attachment),
            Command::Detach => self.detach(),
            Command::GuestGone => {
                // Nor is what was to make a detour for the next guest.
                self.to_guest.detach();
                news.guest_gone = true;
                Answer::default()
            }
        };
        // A session that is gone does not wait for it.
        let _ = answer.send(said);
        news
    }

    fn begin_receive(&mut self, operations: &mut Operations) {
        for ring in self.rings.iter_mut().flatten() {
            if std::mem::take(&mut ring.woken) {
                operations.push(ring.kick.as_raw_fd(), Kind::Read, [self.words.piece(SCRATCH)]);
            }
        }
    }

    fn end_receive(&mut self, _operations: &Operations) -> Received {
        let received = self.with(TRANSMIT, |from_guest, _, queue| from_guest.receive(queue));
        let received = received.unwrap_or(Received { frames: 0, empty: true });
        if self.discards {
            self.release();
            return Received { frames: 0, ..received };
        }
        received
    }

    fn frame(&self, index: usize) -> Option<OutboundFrame<'_>> {
        self.from_guest.frame(index)
    }

    fn payload(&self, index: usize, from: usize, len: usize, take: &mut dyn FnMut(Piece)) {
        self.from_guest.payload(index, from, len, take);
    }

    fn release(&mut self) {
        let back = self.with(TRANSMIT, |from_guest, _, queue| Ok(from_guest.release(queue)));
        self.counts.chains += u64::from(back.unwrap_or(0));
    }

    fn has_unpublished(&self) -> bool {
        // Whoever is owed an interrupt is served with what there is to publish.
        self.to_guest.has_staged() && !self.to_guest.wants_room()
            || self.to_guest.has_ahead()
            || self.rings.iter().flatten().any(Active::is_unsettled)
    }

    fn reserve(&mut self, payload_len: usize) -> Option<Space> {
        if self.has_way() { self.to_guest.reserve(payload_len) } else { None }
    }

    fn may_reserve_ahead(&self) -> bool {
        self.has_way() && self.to_guest.may_reserve_ahead()
    }

    fn reserve_ahead(&mut self, head_len: usize, payload: Ahead) -> Option<Space> {
        if self.detour().is_some() {
            return self.to_guest.reserve_apart(payload);
        }
        self.with(RECEIVE, |_, to_guest, queue| to_guest.reserve_ahead(queue, head_len, payload)).flatten()
    }

    fn space(&self, space: Space, take: &mut dyn FnMut(Piece)) {
        self.to_guest.space(space, take);
    }

    fn commit(&mut self, space: Space, head: &InboundHead<'_>, payload_len: usize) {
        if self.rings[RECEIVE].is_none() {
            return self.to_guest.commit_apart(space, head, payload_len);
        }
        let committed = self.with(RECEIVE, |_, to_guest, queue| {
            to_guest.commit(queue, space, head, payload_len);
            Ok(())
        });
        if committed.is_none() {
            self.to_guest.cancel(space);
        }
    }

    fn cancel(&mut self, space: Space) {
        self.to_guest.cancel(space);
    }

    fn begin_publish(&mut self, operations: &mut Operations) {
        if self.to_guest.wants_room() && self.ring(RECEIVE).is_some_and(|ring| ring.queue.has_more()) {
            self.to_guest.look_again();
        }
        let back = self.with(RECEIVE, |_, to_guest, queue| {
            to_guest.place(queue)?;
            Ok(queue.publish())
        });
        self.counts.chains += u64::from(back.unwrap_or(0));
        if self.rings[RECEIVE].as_ref().is_some_and(|ring| ring.has_failed) {
            self.to_guest.forget_failed();
        }
        for ring in self.rings.iter_mut().flatten() {
            let is_new = std::mem::take(&mut ring.is_new);
            let interrupts = !ring.has_failed && (ring.queue.wants_interrupt() || is_new);
            if let Some(call) = ring.call.as_ref().filter(|_| interrupts) {
                operations.push(call.as_raw_fd(), Kind::Write, [self.words.piece(ONE)]);
                self.counts.interrupts += 1;
            }
            let fails = std::mem::take(&mut ring.tell_error);
            if let Some(error) = ring.error.as_ref().filter(|_| fails) {
                operations.push(error.as_raw_fd(), Kind::Write, [self.words.piece(ONE)]);
            }
        }
    }

    fn end_publish(&mut self, _operations: &Operations) -> usize {
        self.to_guest.take_lost()
    }

    fn counts(&self) -> VirtqueueCounts {
        self.counts
    }

    fn take_fault(&mut self) -> Option<String> {
        let (which, fault) = self.faults.pop()?;
        let name = if which == TRANSMIT { "transmit" } else { "receive" };
        Some(format!("the driver of the guest's {name} queue is wrong, {fault}: the queue has stopped"))
    }

    fn stand_in(&self) -> Option<u8> {
        self.detour().and_then(|pair| u8::try_from(pair).ok())
    }

    fn take_detoured(&mut self) -> Option<Vec<u8>> {
        self.detour().and_then(|_| self.to_guest.take_staged())
    }

    fn is_closed(&self) -> bool {
        false
    }
}
