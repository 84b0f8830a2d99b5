//! A stream goes to the worker on whose queue the guest sends.
//!
//! A guest's kernel may change the queue of a conversation, because the program has gone to another processor. Its frames
//! are handed over to the stream's worker then, a copy each, and what the stream brings the guest comes on the old queue:
//! interrupts on the wrong processor. So when a run of segments has come by way of one other worker, the stream moves there,
//! and every move makes the run longer that the next one takes: a guest that changes queues all the time has its frames
//! handed over. A worker with too much to do moves streams to others, too ([`crate::worker::load`]): the guest follows.
//!
//! # How a move is made
//! 1. The old worker takes the stream out of its slab, its timers and its engine. Between passes nothing is under way for
//!    it; one whose bytes wait in a buffer stays, until they are gone.
//! 2. It writes into the flow table that the new worker has the stream, *on its way* ([`Handle::on_its_way_to`]). Frames
//!    find the new owner from then on, those that were handed over to the old worker before, too.
//! 3. Then it mails the stream. So the next word in the table is the new worker's, who writes where the stream lies when it
//!    takes it out of its mail. A frame that is there first waits for the stream in the worker's mail.
//!
//! A worker that has no room sends the stream back, once. When there is none any more either, it ends with a reset. A
//! stream that is in the mail when hythe ends, or the guest goes, is closed and not reset.

use crate::exchange::Mailbox;
use crate::flow::key::FlowKey;
use crate::flow::slab::Slot;
use crate::flow::table::{Handle, Position};
use crate::frame::drop_reason::DropReason;
use crate::host::engine::{Engine, Interest, Token};
use crate::host::{HostSocket, Sockets};
use crate::link::Link;
use crate::observe::counters::Metric;
use crate::relay::tcp::{State, TcpRelay};
use crate::time::Now;

use super::super::outbound::FrameRef;
#[cfg(feature = "sim")]
use super::super::simulated::{Omission, omits};
use super::super::{Worker, token_kind};
use super::{HostKind, HostSide, Origin, Stream};

/// Streams on their way to a worker.
pub type Moves<S> = Mailbox<Box<Moved<S>>>;

/// Moves that a worker may be sent before it takes them in; with more the streams stay where they are.
pub const MOVES: usize = 256;

/// A stream on its way: what of it is not of one worker alone.
pub struct Moved<S> {
    key: FlowKey,
    position: Position,
    relay: TcpRelay,
    host: HostSide<S>,
    origin: Origin,
    strays: Strays,
    /// Who has sent it, and takes it back; nobody when it comes back.
    from: Option<u8>,
}

/// What says where a stream belongs: its segments that came by way of another worker, and the deals.
#[derive(Clone, Copy, Default, Debug)]
pub struct Strays {
    /// The worker.
    by: u8,
    /// The length of the run.
    count: u8,
    moves: u8,
    /// The worker's last deal that it was in, or that was over when it began ([`crate::worker::load`]).
    dealt: u8,
    /// The guest sends in full segments, and has not stopped to listen: there may be more on their way.
    bulk: bool,
}

/// A run that makes a stream move for the first time; each move doubles it, up to 16 times.
const RUN: u8 = 8;
const MOVES_COUNTED: u8 = 4;
/// A segment of so many bytes is full.
const FULL: u32 = 1024;

impl Strays {
    /// Of a stream that begins, after so many deals.
    pub fn since(dealt: u8) -> Self {
        Self { dealt, ..Self::default() }
    }

    /// Takes in that worker `own` had a segment by way of `by`. Returns whether a run is complete: the stream belongs there.
    fn saw(&mut self, own: u8, by: u8) -> bool {
        if by != self.by || by == own {
            (self.by, self.count) = (by, 0);
        }
        if by == own {
            return false;
        }
        self.count += 1;
        if self.count < RUN << self.moves.min(MOVES_COUNTED) {
            return false;
        }
        self.count = 0;
        true
    }

    /// Takes in a segment's length.
    fn carries(&mut self, len: u32) {
        if len >= FULL {
            self.bulk = true;
        } else if len == 0 {
            self.bulk = false;
        }
    }

    /// The stream has moved.
    fn moved(&mut self, to: u8) {
        // Where it was dealt elsewhere, what the guest has sent already comes on the old queue: a run of that must not bring the
        // stream back.
        let moves = if to == self.by { self.moves } else { self.moves.max(MOVES_COUNTED - 1) };
        *self = Self { moves: moves.saturating_add(1), bulk: self.bulk, ..Self::since(self.dealt) };
    }
}

impl<L: Link, E: Engine, S: Sockets> Worker<L, E, S> {
    /// A segment of the stream with so many bytes of payload came in this frame: on whose queue is remembered.
    pub(super) fn note_queue(&mut self, slot: Slot, frame: FrameRef, len: u32) {
        let Some(by) = self.queue_of(frame) else { return };
        let Some(stream) = self.streams.get_mut(slot) else { return };
        stream.strays.carries(len);
        let run = stream.strays.saw(self.id, by).then_some(by);
        // What the guest sends by the new queue overtakes what still lies in the old one.
        let dealt =
            if stream.strays.bulk { None } else { self.load.deals(self.id, &mut stream.strays.dealt) };
        self.strayed.extend(dealt.or(run).map(|to| (slot, to)));
    }

    /// Sends away the streams that belong elsewhere. Between passes.
    pub(in crate::worker) fn move_strayed(&mut self, now: Now) {
        let mut strayed = std::mem::take(&mut self.strayed);
        strayed.retain(|(slot, to)| self.is_movable(*slot, *to));
        if !strayed.is_empty() {
            // What the streams have said so far comes before what they say elsewhere.
            self.publish_now();
        }
        for (slot, to) in strayed.drain(..) {
            if !self.link.has_unpublished() && !self.link.has_news() {
                self.send_away(slot, to, now);
            }
        }
        self.strayed = strayed;
    }

    /// Whether the stream may go to that worker.
    fn is_movable(&self, slot: Slot, to: u8) -> bool {
        let Some(stream) = self.streams.get(slot) else { return false };
        let host = stream.host.as_ref();
        // What a queue that is off has said goes by way of its stand-in, where nothing may overtake it.
        let in_order = self.link.stand_in().is_none_or(|stand_in| stand_in == to);
        in_order
            && to != self.id
            && host.is_some_and(|host| host.kind == HostKind::Tcp && !host.failed)
            && !matches!(stream.origin, Origin::Outbound { connecting: true, .. })
            && stream.relay.state() == State::Open
            && stream.position.is_some()
            && stream.next_host.is_none()
            && stream.buffer.is_none()
            && stream.touched.is_none()
    }

    fn send_away(&mut self, slot: Slot, to: u8, now: Now) {
        let Some(moves) = self.moves.get(to as usize).cloned() else { return };
        let Some(Stream {
            key, position: Some(position), relay, host: Some(host), origin, mut strays, ..
        }) = self.streams.remove(slot)
        else {
            return;
        };
        self.stream_timers.cancel(slot.index);
        self.engine.unwatch(host.socket.fd(), Token { kind: token_kind::STREAM, slot });
        self.admission.hand_over_stream();
        strays.moved(to);
        let moved = Moved { key, position, relay, host, origin, strays, from: Some(self.id) };
        self.flows.reassign(position, Handle::on_its_way_to(to));
        match moves.put(Box::new(moved)) {
            Ok(()) => self.counters.add(Metric::StreamsMoved, 1),
            Err(moved) => self.take_in(*moved, now),
        }
    }

    /// Takes in the streams that others have sent.
    pub(in crate::worker) fn take_moved(&mut self, now: Now) {
        while let Some(moved) = self.moves.get(self.id as usize).and_then(Mailbox::take) {
            self.take_in(*moved, now);
        }
    }

    fn take_in(&mut self, moved: Moved<S::Socket>, now: Now) {
        self.admission.adopt_stream();
        let Moved { key, position, mut relay, host, origin, strays, from } = moved;
        // What came to the socket meanwhile nobody has reported.
        relay.readable(now);
        let stream = Stream { position: Some(position), strays, ..Stream::new(key, relay, origin) };
        match self.streams.insert(stream) {
            Ok(slot) => {
                let token = Token { kind: token_kind::STREAM, slot };
                let watched = self.engine.watch(host.socket.fd(), token, Interest::Both);
                if let Some(stream) = self.streams.get_mut(slot) {
                    stream.host = Some(host);
                    if watched.is_err() {
                        stream.relay.host_failed();
                    }
                }
                self.again.push(slot);
                #[cfg(feature = "sim")]
                if omits(Omission::TellMove) {
                    return;
                }
                self.flows.reassign(position, Handle { owner: self.id, slot });
            }
            Err(Stream { relay, .. }) => {
                self.admission.hand_over_stream();
                self.send_back(Moved { key, position, relay, host, origin, strays, from }, now);
            }
        }
    }

    /// There is no room here for a stream.
    fn send_back(&mut self, mut moved: Moved<S::Socket>, now: Now) {
        let position = moved.position;
        let home = moved.from.take().and_then(|from| Some((from, self.moves.get(from as usize)?)));
        let mut refused = match home {
            Some((from, moves)) => {
                self.flows.reassign(position, Handle::on_its_way_to(from));
                match moves.put(Box::new(moved)) {
                    Ok(()) => return,
                    Err(moved) => *moved,
                }
            }
            None => moved,
        };
        self.flows.remove(position);
        self.admission.adopt_stream();
        self.admission.close_stream();
        self.sockets.reset(refused.host.socket);
        refused.relay.abandon();
        let config = *self.config(refused.key.guest.address.is_v4());
        if let Some(reset) = refused.relay.poll_segment(&config, now) {
            self.send_segment(&refused.key, &reset);
        }
        self.counters.add(Metric::StreamsOver, 1);
        self.drop_frame(DropReason::FlowBudget);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Segments of a run by way of worker 1 that it takes until the stream belongs there.
    fn run(strays: &mut Strays) -> usize {
        (1..=usize::from(u8::MAX)).find(|_| strays.saw(0, 1)).unwrap()
    }

    #[test]
    fn a_run_makes_a_stream_move_and_a_mixture_does_not() {
        let [mut strays, mut others] = [Strays::default(); 2];
        assert!((0..1_000).all(|turn| !strays.saw(0, u8::from(turn % 8 != 0))));
        assert!((0..200).all(|turn| !others.saw(0, 1 + turn % 2)));
        assert_eq!(run(&mut Strays::default()), usize::from(RUN));
    }

    #[test]
    fn each_move_makes_the_next_one_harder() {
        let mut strays = Strays::default();
        let runs: Vec<_> = std::iter::repeat_with(|| {
            let took = run(&mut strays);
            strays.moved(1);
            took
        })
        .take(7)
        .collect();
        assert_eq!(runs, [8, 16, 32, 64, 128, 128, 128]);
    }

    #[test]
    fn what_comes_late_does_not_bring_a_dealt_stream_back() {
        let mut strays = Strays::default();
        assert!(!strays.saw(1, 1));
        strays.moved(0);
        assert_eq!(run(&mut strays), 128);
    }
}
