//! What the streams of this pass want, done in one batch.
//!
//! For each stream that was touched: its payload goes out in one send (or, behind bytes that wait already, those do),
//! acknowledged bytes are discarded from its receive queue, and new ones are peeked straight into space of the link. After
//! the batch the relay hears what came of it, and what it has to say goes to the guest.

use crate::exchange::mail::ToSlow;
use crate::flow::slab::Slot;
use crate::frame::build;
use crate::frame::drop_reason::DropReason;
use crate::frame::tcp;
use crate::host::engine::Engine;
use crate::host::{HostSocket, Sockets};
use crate::io::{Kind, OperationId};
use crate::link::{Ahead, Link};
use crate::observe::counters::Metric;
use crate::relay::tcp::{Over, State, Wanted};
use crate::time::Now;

use super::super::Worker;
use super::super::outbound::Part;
#[cfg(feature = "sim")]
use super::super::simulated::{Omission, omits};
use super::open::proof_due;
use super::{HostKind, Origin, Stream};

/// Most spaces that one peek fills: 256 KiB.
const BURST_MAX: u8 = 4;

/// A peek walks over what is not discarded: by so many bytes, or after so many peeks (each may have left a buffer
/// behind), discarding is cheaper.
const WALK_BYTES: u32 = 4096;
const PEEKS_MAX: u8 = 16;

/// A stream that something happened to in this pass.
pub(in crate::worker) struct Touched {
    slot: Slot,
    /// The first and last part of its payload, and their bytes.
    parts: Option<(u32, u32)>,
    bytes: u32,
    send: Option<OperationId>,
    discard: Option<(OperationId, u32)>,
    peek: Option<Peek>,
    /// There was no space for a peek.
    starved: bool,
}

impl Touched {
    fn nothing(slot: Slot) -> Self {
        Self { slot, parts: None, bytes: 0, send: None, discard: None, peek: None, starved: false }
    }
}

/// A peek of this pass.
#[derive(Clone, Copy)]
pub(super) struct Peek {
    pub operation: OperationId,
    pub wanted: Wanted,
    /// Bytes that there is room for.
    asked: u32,
    /// Bytes in front of them that were peeked before.
    skipped: u32,
    /// Where its spaces start in the list of this pass.
    pub first_space: usize,
    /// How many they are.
    pub spaces: usize,
}

impl<L: Link, E: Engine, S: Sockets> Worker<L, E, S> {
    /// Has the stream settled at the end of this pass.
    pub(in crate::worker) fn touch(&mut self, slot: Slot) {
        let Some(stream) = self.streams.get_mut(slot) else { return };
        if stream.touched.is_none() {
            stream.touched = Some(self.touched.len() as u32);
            self.touched.push(Touched::nothing(slot));
        }
    }

    fn touched_mut(&mut self, slot: Slot) -> Option<&mut Touched> {
        let index = self.streams.get(slot)?.touched?;
        self.touched.get_mut(index as usize)
    }

    /// Adds payload to what the stream sends in this pass.
    pub(super) fn note_part(&mut self, slot: Slot, part: Part) {
        self.touch(slot);
        let index = self.parts.len() as u32;
        let len = part.len;
        self.parts.push(part);
        let Some(touched) = self.touched_mut(slot) else { return };
        touched.bytes += len;
        let previous = touched.parts;
        touched.parts = Some((previous.map_or(index, |(first, _)| first), index));
        if let Some((_, last)) = previous {
            self.parts[last as usize].next = Some(index);
        }
    }

    /// Moves the payload noted so far behind the stream's waiting bytes.
    pub(super) fn buffer_parts(&mut self, slot: Slot) {
        let Some(touched) = self.touched_mut(slot) else { return };
        let noted = std::mem::replace(touched, Touched::nothing(slot));
        if noted.parts.is_some() {
            self.buffer_rest(&noted, 0);
        }
    }

    /// Adds to the batch what the touched streams want.
    pub(in crate::worker) fn submit_streams(&mut self, now: Now) {
        for index in 0..self.again.len() {
            self.touch(self.again[index]);
        }
        self.again.clear();
        for index in 0..self.touched.len() {
            self.submit_stream(index, now);
        }
    }

    fn submit_stream(&mut self, index: usize, now: Now) {
        let Self {
            link,
            adopted,
            parts,
            operations,
            streams,
            spaces,
            scratch,
            configs,
            sockets,
            touched,
            ..
        } = self;
        let touched = &mut touched[index];
        let Some(stream) = streams.get_mut(touched.slot) else { return };
        let v4 = stream.key.guest.address.is_v4();
        let Stream { relay, host: Some(host), next_host, buffer, burst, .. } = stream else { return };
        if relay.state() == State::Connecting {
            return;
        }
        let fd = host.socket.fd();

        let waiting = buffer.as_deref().map(|buffer| &buffer.waiting).filter(|waiting| !waiting.is_empty());
        if next_host.is_some() {
            // What the guest sends now is for the next host side.
        } else if let Some(waiting) = waiting {
            touched.send = Some(operations.push(fd, Kind::Send, waiting.pieces()));
        } else if let Some((first, _)) = touched.parts {
            let mut send = operations.begin(fd, Kind::Send);
            let mut next = Some(first);
            while let Some(index) = next {
                let part = &parts[index as usize];
                next = part.next;
                Self::pieces_of(link, adopted, part, &mut |piece| send.piece(piece));
            }
            touched.send = Some(send.finish());
        }

        // Without a peek offset the end of the stream shows only when nothing lies in front of it any more.
        let hides_end = host.closed && !host.keeps_offset && !relay.send().ended();
        if hides_end && relay.send().is_quiet() {
            relay.readable(now);
        }
        let walks = relay.discardable() > 0
            && (hides_end || host.peeks >= PEEKS_MAX || relay.discardable() >= WALK_BYTES);
        if relay.wants_discard() || (walks && relay.wanted(&configs[usize::from(v4)]).is_some()) {
            host.peeks = 0;
            let len = relay.take_discard();
            let operation = match host.kind {
                HostKind::Tcp => operations.push_discard(fd, len),
                HostKind::Pair => {
                    operations.push(fd, Kind::Receive, [scratch.piece(0).part(0, len as usize)])
                }
            };
            host.position = host.position.saturating_sub(len);
            touched.discard = Some((operation, len));
        }

        if host.urgent && touched.discard.is_some() {
            // How far a discard goes is known only behind it: the peek comes with the next pass.
            return;
        }
        let Some(wanted) = relay.wanted(&configs[usize::from(v4)]) else { return };
        let capacity = payload_capacity(link, relay.segment_bytes(), v4);
        let head_len = build::tcp_head_len(v4, relay.data_header_len());
        let first_space = spaces.len();
        let mut room = 0;
        let most = if link.may_reserve_ahead() { *burst as usize } else { 0 };
        while room < wanted.len as usize && spaces.len() - first_space < most {
            let payload = Ahead::Bytes(capacity.min(wanted.len as usize - room));
            let Some(space) = link.reserve_ahead(head_len, payload) else { break };
            room += space.capacity;
            spaces.push(space);
        }
        touched.starved = room == 0;
        if room == 0 {
            return;
        }
        if host.keeps_offset && host.position != wanted.offset {
            // A discard of this batch comes before the peek, and moves the kernel's offset back by its bytes.
            let discarded = touched.discard.map_or(0, |(_, len)| len);
            sockets.seek(&host.socket, wanted.offset + discarded);
            host.position = wanted.offset;
        }
        // A kernel without a peek offset gives what was peeked before once more: into memory that nobody reads.
        let skipped = if host.keeps_offset { 0 } else { wanted.offset };
        let mut peek = operations.begin(fd, Kind::Peek);
        peek.piece(scratch.piece(0).part(0, skipped as usize));
        for space in &spaces[first_space..] {
            link.space(*space, &mut |piece| peek.piece(piece));
        }
        let operation = peek.finish();
        host.peeks = host.peeks.saturating_add(1);
        let asked = wanted.len.min(room as u32);
        touched.peek =
            Some(Peek { operation, wanted, asked, skipped, first_space, spaces: spaces.len() - first_space });
    }

    /// Tells the relays what came of the batch, and the guest what the relays have to say.
    pub(in crate::worker) fn conclude_streams(&mut self, now: Now) {
        let touched = std::mem::take(&mut self.touched);
        for touched in &touched {
            if let Some(stream) = self.streams.get_mut(touched.slot) {
                stream.touched = None;
            }
        }
        for touched in &touched {
            self.conclude_send(touched, now);
            self.conclude_discard(touched);
            self.conclude_peek(touched, now);
            self.finish_settling(touched.slot, touched.starved, now);
        }
        if self.touched.is_empty() {
            self.touched = touched;
            self.touched.clear();
        }
    }

    fn conclude_send(&mut self, touched: &Touched, now: Now) {
        let Some(send) = touched.send else {
            if touched.parts.is_some() {
                self.buffer_rest(touched, 0);
            }
            return;
        };
        let result = self.operations.result(send);
        let slot = touched.slot;
        let Some(stream) = self.streams.get_mut(slot) else { return };
        let sent = match result {
            Ok(sent) => sent as u32,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => 0,
            Err(_) => {
                // The peer has reset the connection or is gone: nothing that was taken can be delivered. What it said
                // before can.
                stream.relay.taken(stream.relay.receive().buffered());
                if let Some(buffer) = &mut stream.buffer {
                    buffer.waiting.consume(usize::MAX);
                }
                if let Some(host) = &mut stream.host {
                    host.failed = true;
                }
                stream.relay.readable(now);
                return;
            }
        };
        stream.relay.taken(sent);
        if touched.parts.is_none() {
            if let Some(buffer) = &mut stream.buffer {
                buffer.waiting.consume(sent as usize);
                if buffer.is_empty() {
                    stream.buffer = None;
                }
            }
        } else if sent < touched.bytes {
            self.buffer_rest(touched, sent);
        }
    }

    /// The socket took `sent` bytes of the noted payload: the rest waits.
    fn buffer_rest(&mut self, touched: &Touched, sent: u32) {
        let Some(stream) = self.streams.get_mut(touched.slot) else { return };
        if stream.buffer.is_none() && !self.buffers.has_room() {
            stream.relay.abandon();
            self.counters.count_drop(DropReason::BufferBudget);
            return;
        }
        let buffer = stream.buffer.get_or_insert_with(|| Box::new(self.buffers.open()));
        let mut skip = sent;
        let mut next = touched.parts.map(|(first, _)| first);
        while let Some(index) = next {
            let part = self.parts[index as usize];
            next = part.next;
            let skipped = skip.min(part.len);
            skip -= skipped;
            let rest = Part { from: part.from + skipped, len: part.len - skipped, ..part };
            Self::pieces_of(&self.link, &self.adopted, &rest, &mut |piece| {
                buffer.waiting.append_piece(&piece);
            });
        }
        self.counters.add(Metric::BytesBuffered, u64::from(touched.bytes - sent));
    }

    fn conclude_discard(&mut self, touched: &Touched) {
        let Some((operation, len)) = touched.discard else { return };
        let discarded = self.operations.result(operation).unwrap_or(0) as u32;
        if discarded == len {
            return;
        }
        let Some(Stream { relay, host: Some(host), .. }) = self.streams.get_mut(touched.slot) else { return };
        if host.urgent && discarded > 0 {
            // It ended at the mark; the rest follows.
            relay.return_discard(len - discarded);
            host.position += len - discarded;
        } else {
            // What was peeked is there until it is discarded, unless the connection was reset meanwhile.
            relay.host_failed();
        }
    }

    fn conclude_peek(&mut self, touched: &Touched, now: Now) {
        let Some(peek) = touched.peek else {
            if touched.starved {
                self.starved.push(touched.slot);
            }
            return;
        };
        let result = self.operations.result(peek.operation);
        let Some(Stream { relay, host: Some(host), next_host, burst, .. }) =
            self.streams.get_mut(touched.slot)
        else {
            self.cancel_spaces(&peek);
            return;
        };
        let got = match result {
            Ok(0) if host.failed => {
                relay.drained();
                0
            }
            Ok(0) => {
                // A peek behind bytes that are known to be there finds them, so this is the end of the stream.
                match next_host {
                    None => relay.end_of_stream(),
                    Some(next) => {
                        next.old_ended = true;
                        relay.drained();
                    }
                }
                0
            }
            Ok(len) => (len as u32).saturating_sub(peek.skipped),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                relay.drained();
                0
            }
            Err(_) => {
                relay.host_failed();
                0
            }
        };
        if host.keeps_offset {
            host.position += got;
        }
        let full = got == peek.asked;
        // One that gave nothing but what was peeked before (without a peek offset) found nothing new.
        let again = got == 0 && peek.skipped > 0;
        if again || (got > 0 && !full && !host.closed && !host.urgent) {
            relay.drained();
        }
        *burst = if full { (*burst * 2).min(BURST_MAX) } else { 1 };
        self.send_peeked(touched.slot, &peek, got, !full, now);
    }

    /// After a stream's operations: room for the guest's window, the end of its direction, segments that are due,
    /// deadlines, and the stream's own end.
    fn finish_settling(&mut self, slot: Slot, starved: bool, now: Now) {
        let Self { streams, configs, sockets, .. } = self;
        let Some(stream) = streams.get_mut(slot) else { return };
        let config = configs[usize::from(stream.key.guest.address.is_v4())];
        if let Some(host) = &stream.host
            && host.failed
            && stream.relay.wanted(&config).is_none()
        {
            // What came before the failure is with the guest, as far as it takes it.
            stream.relay.host_failed();
        }
        if stream.next_host.is_some() {
            stream.relay.offer(0, &config);
        } else if let Some(host) = &stream.host {
            if stream.relay.wants_room() {
                let room = sockets.room(&host.socket);
                stream.relay.offer(room, &config);
            }
            if stream.relay.wants_shutdown(&config, now) {
                sockets.shut_down(&host.socket);
            }
            if let Some(after) = stream.relay.take_keep_alive() {
                sockets.keep_alive(&host.socket, after);
            }
        }
        self.send_due_segments(slot, now);
        if self.ask_other_family(slot, now) {
            return;
        }
        self.try_rehome(slot, now);
        let Some(stream) = self.streams.get_mut(slot) else { return };
        let reads = stream.host.is_some();
        // One that found no space does not ask for the next pass: it comes again when there is some.
        let wants_bytes = !starved && stream.relay.wanted(&config).is_some();
        if reads && (stream.relay.wants_discard() || wants_bytes) {
            self.again.push(slot);
        } else if stream.relay.is_host_done() {
            self.close_stream_host(slot);
        }
        let Some(stream) = self.streams.get(slot) else { return };
        if let Some(over) = stream.relay.over() {
            if stream.host.is_none() {
                self.stream_is_over(slot, over);
            }
        } else if let Some(deadline) =
            [stream.relay.next_deadline(&config), proof_due(stream)].into_iter().flatten().min()
        {
            #[cfg(feature = "sim")]
            if omits(Omission::RearmTimeout) && stream.relay.send().backoffs() > 0 {
                return;
            }
            self.stream_timers.arm_earlier(slot.index, deadline);
        }
    }

    /// The relay is done with the host socket.
    fn close_stream_host(&mut self, slot: Slot) {
        self.end_connect(slot);
        let Some(stream) = self.streams.get_mut(slot) else { return };
        let reset = stream.relay.over().is_some_and(|over| over != Over::Done);
        if let Some(next) = stream.next_host.take() {
            self.sockets.reset(next.host.socket);
            self.admission.close_stream();
        }
        if std::mem::take(&mut stream.counted) {
            self.admission.close_stream();
        }
        if let Some(host) = stream.host.take() {
            Self::close_host(&mut self.engine, &mut self.sockets, host, slot, reset);
        }
    }

    /// Takes a stream out of slab and table.
    pub(super) fn remove_stream(&mut self, slot: Slot) -> Option<Stream<S::Socket>> {
        let stream = self.streams.remove(slot)?;
        if let Some(position) = stream.position {
            self.flows.remove(position);
        }
        self.stream_timers.cancel(slot.index);
        self.stream_timers.shrink(self.streams.index_bound());
        Some(stream)
    }

    fn stream_is_over(&mut self, slot: Slot, over: Over) {
        let Some(stream) = self.remove_stream(slot) else { return };
        self.counters.add(Metric::StreamsOver, 1);
        if let Origin::Inbound { publication, .. } | Origin::Probe { publication, .. } = stream.origin
            && over == Over::GuestRefused
        {
            self.tell_listens(publication, false);
        }
        if matches!(stream.origin, Origin::Probe { .. }) {
            return;
        }
        let reason = match over {
            Over::Done | Over::Abandoned | Over::HostFailed => return,
            Over::GuestReset => DropReason::Reset,
            Over::GuestRefused => DropReason::GuestRefused,
            Over::GuestSilent => DropReason::GuestSilent,
            Over::GuestGone => DropReason::GuestTimeout,
        };
        self.drop_frame(reason);
    }

    /// Tells the slow path what the guest answers at a published port.
    pub(in crate::worker) fn tell_listens(&mut self, publication: u32, listens: bool) {
        // Should the mailbox be full, the next client or the next probe tells it again.
        let _ = self.slow.put(ToSlow::Listens { publication, listens });
    }

    /// Settles one stream at once, outside the batch: its name is needed for a new one.
    pub(super) fn settle_one_now(&mut self, slot: Slot, now: Now) {
        self.send_due_segments(slot, now);
        self.close_stream_host(slot);
        let touched = self.streams.get(slot).and_then(|stream| stream.touched);
        if let Some(touched) = touched.and_then(|index| self.touched.get_mut(index as usize)) {
            *touched = Touched::nothing(slot);
        }
        if let Some(over) = self.streams.get(slot).and_then(|stream| stream.relay.over()) {
            self.stream_is_over(slot, over);
        }
    }
}

/// Payload bytes of one frame: as many whole segments as an IP packet holds, or one where the link cuts nothing.
fn payload_capacity<L: Link>(link: &L, segment_bytes: u16, v4: bool) -> usize {
    let segment = segment_bytes as usize;
    if !link.capabilities().tcp_segmentation {
        return segment;
    }
    let room = 65_535 - if v4 { 20 } else { 0 } - tcp::HEADER_MAX;
    (room / segment).max(1) * segment
}
