//! One connection: its state, and what each input means in it.

use std::time::Duration;

use crate::frame::drop_reason::DropReason;
use crate::frame::tcp::{Flags, SegmentHead, Seq};
use crate::time::{Alarm, Now};

use super::Config;
use super::options::Agreed;
use super::receive::{Payload, Receive};
use super::send::{Acknowledged, Send};

/// Where a connection stands. The closing states of RFC 9293, 3.3.2 other than TIME-WAIT follow from the two halves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// The guest has sent SYN; the host is being connected.
    Connecting,
    /// The host has accepted; SYN goes to the guest (SYN-SENT).
    Offering,
    /// SYN-ACK goes to the guest (SYN-RECEIVED).
    Answering,
    /// Both ends are synchronized (ESTABLISHED to LAST-ACK).
    Open,
    /// Both ends are done; late segments are answered until `until`.
    TimeWait {
        /// When the flow may be forgotten.
        until: Now,
    },
    /// Over: nothing more is done, but for a reset that may still have to go out.
    Closed(Over),
}

/// How a connection ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Over {
    /// Both directions were closed and acknowledged.
    Done,
    /// The guest reset it.
    GuestReset,
    /// The guest refused an inbound connection.
    GuestRefused,
    /// The guest did not answer an inbound SYN.
    GuestSilent,
    /// The guest stopped answering.
    GuestGone,
    /// The host's side refused, failed or was reset.
    HostFailed,
    /// hythe gave it up.
    Abandoned,
}

/// What is to be done about a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Disposition {
    /// Do this with its payload.
    Payload(Payload),
    /// It opens a new connection in place of this one, which is over (RFC 9293, 3.6.1).
    Reopen,
}

/// Bytes to peek: `len` of them from `seq` on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wanted {
    /// The first byte's sequence number.
    pub seq: Seq,
    /// How far behind the start of the socket's receive queue it lies.
    pub offset: u32,
    /// How many bytes at the most.
    pub len: u32,
}

/// The relay of one connection.
#[derive(Clone, Debug)]
pub struct TcpRelay {
    state: State,
    isn: Seq,
    agreed: Agreed,
    receive: Receive,
    send: Send,
    /// A reset that is due to the guest.
    reset: Option<Reset>,
    probe_due: bool,
    /// The guest has been quiet for a while: what it has is to be discarded, however little.
    discard_due: bool,
    /// FIN went to the guest before its own came.
    closed_first: bool,
    /// The silence, in seconds, after which the guest has probed for liveness; 0 while it has not.
    keep_alive_after_s: u16,
    keep_alive_probes: u8,
    /// When the guest was heard last, or the connection began.
    last_heard: Now,
    acknowledge_at: Alarm,
}

/// Whoever does something so much too late was away. A worker that others keep from running is back much sooner.
const ABSENCE: Duration = Duration::from_secs(10);

/// Acknowledged bytes are discarded when there are so many; the few of a question or an answer wait for others, since
/// each discard is a system call. More must not wait: the kernel counts a buffer of 64 KiB as full until its last byte is
/// gone, and closes the peer's window for it.
const DISCARD_BYTES: u32 = 1 << 10;
/// Fewer are discarded once the guest has been quiet for so long, so that an idle connection holds no memory.
const DISCARD_IDLE: Duration = Duration::from_millis(20);

const NOTHING: Disposition = Disposition::Payload(Payload::Nothing);

fn refuse(reason: DropReason) -> Disposition {
    Disposition::Payload(Payload::Refuse(reason))
}

/// A reset: its number, and what it acknowledges if it does.
#[derive(Clone, Copy, Debug)]
struct Reset {
    seq: Seq,
    ack: Option<Seq>,
}

impl Reset {
    /// RFC 9293, 3.10.7.1: the reset for a segment that belongs to no connection, where one may be sent.
    fn answering(segment: &SegmentHead) -> Option<Self> {
        if segment.flags.has(Flags::RST) {
            return None;
        }
        Some(if segment.flags.has(Flags::ACK) {
            Self { seq: segment.ack, ack: None }
        } else {
            Self { seq: Seq(0), ack: Some(segment.seq + segment.sequence_len()) }
        })
    }

    fn segment(self) -> SegmentHead {
        let flags = if self.ack.is_some() { Flags::RST | Flags::ACK } else { Flags::RST };
        SegmentHead { seq: self.seq, ack: self.ack.unwrap_or_default(), flags, ..SegmentHead::default() }
    }
}

/// The reset for a segment that belongs to no connection (RFC 9293, 3.10.7.1), or `None` where none may be sent.
pub fn reset_for(segment: &SegmentHead) -> Option<SegmentHead> {
    Reset::answering(segment).map(Reset::segment)
}

impl TcpRelay {
    /// The guest opens: `syn` is its SYN. Nothing is answered before [`Self::connected`].
    pub fn outbound(syn: &SegmentHead, isn: Seq, config: &Config, now: Now) -> Self {
        let mut agreed = Agreed::offering(config);
        agreed.settle(&syn.options);
        let mut relay =
            Self::new(State::Connecting, isn, agreed, syn.seq, u32::from(syn.window), config, now);
        relay.receive.acknowledge_now();
        relay
    }

    /// The host has accepted a client: SYN is due to the guest.
    pub fn inbound(isn: Seq, config: &Config, now: Now) -> Self {
        Self::new(State::Offering, isn, Agreed::offering(config), Seq(0), 0, config, now)
    }

    fn new(state: State, isn: Seq, agreed: Agreed, irs: Seq, window: u32, config: &Config, now: Now) -> Self {
        Self {
            state,
            isn,
            agreed,
            receive: Receive::new(irs, config),
            send: Send::new(isn, window, irs),
            reset: None,
            probe_due: false,
            discard_due: false,
            closed_first: false,
            keep_alive_after_s: 0,
            keep_alive_probes: 0,
            last_heard: now,
            acknowledge_at: Alarm::NONE,
        }
    }

    /// Where the connection stands.
    pub fn state(&self) -> State {
        self.state
    }

    /// How the connection ended, once it has.
    pub fn over(&self) -> Option<Over> {
        match self.state {
            State::Closed(over) => Some(over),
            _ => None,
        }
    }

    /// When the guest was heard last; before that, when the connection began.
    pub fn last_heard(&self) -> Now {
        self.last_heard
    }

    /// Whether the host socket is not needed any more.
    pub fn is_host_done(&self) -> bool {
        matches!(self.state, State::TimeWait { .. } | State::Closed(_))
    }

    /// The receiving half, to look at.
    pub fn receive(&self) -> &Receive {
        &self.receive
    }

    /// The sending half, to look at.
    pub fn send(&self) -> &Send {
        &self.send
    }

    /// Payload bytes of a full segment to the guest.
    pub fn segment_bytes(&self) -> u16 {
        self.agreed.segment_bytes()
    }

    // What comes from the guest.

    /// RFC 9293, 3.10.7: a segment arrives.
    pub fn segment(&mut self, segment: &SegmentHead, config: &Config, now: Now) -> Disposition {
        match self.state {
            State::Closed(_) => refuse(DropReason::NoFlow),
            State::Connecting => self.segment_while_connecting(segment),
            State::Offering => self.segment_while_offering(segment, config, now),
            State::Answering | State::Open | State::TimeWait { .. } => {
                self.segment_while_synchronized(segment, config, now)
            }
        }
    }

    fn segment_while_connecting(&mut self, segment: &SegmentHead) -> Disposition {
        let irs = self.receive.next() - 1;
        if segment.flags.has(Flags::RST) {
            if segment.seq == self.receive.next() || segment.seq == irs {
                self.state = State::Closed(Over::GuestReset);
            }
            return NOTHING;
        }
        if segment.flags.has(Flags::SYN) && segment.seq != irs {
            // The guest has given the old attempt up and uses its port again.
            self.state = State::Closed(Over::Abandoned);
            return Disposition::Reopen;
        }
        NOTHING
    }

    /// RFC 9293, 3.10.7.3: SYN-SENT.
    fn segment_while_offering(&mut self, segment: &SegmentHead, config: &Config, now: Now) -> Disposition {
        let acknowledged = segment.flags.has(Flags::ACK);
        if acknowledged && segment.ack != self.isn + 1 {
            self.reset = Reset::answering(segment);
            return refuse(DropReason::OutOfWindow);
        }
        if segment.flags.has(Flags::RST) {
            if acknowledged {
                self.state = State::Closed(Over::GuestRefused);
            }
            return NOTHING;
        }
        if !segment.flags.has(Flags::SYN) {
            return refuse(DropReason::OutOfWindow);
        }
        self.last_heard = now;
        self.agreed.settle(&segment.options);
        self.receive = Receive::new(segment.seq, config);
        if acknowledged {
            self.send.synchronize(segment, now);
            self.state = State::Open;
            self.receive.acknowledge_now();
        } else {
            // Both sides opened at once: the SYN goes out again, with an acknowledgement.
            self.send = Send::new(self.isn, u32::from(segment.window), segment.seq);
            self.state = State::Answering;
        }
        NOTHING
    }

    /// RFC 9293, 3.10.7.4, with RFC 5961 for resets and SYNs.
    fn segment_while_synchronized(
        &mut self,
        segment: &SegmentHead,
        config: &Config,
        now: Now,
    ) -> Disposition {
        let reset = segment.flags.has(Flags::RST);
        let time_wait = matches!(self.state, State::TimeWait { .. });
        if time_wait && segment.flags.has(Flags::SYN) && !reset && self.receive.next().before(segment.seq) {
            // RFC 9293, 3.6.1: a new incarnation, by its higher sequence number.
            self.state = State::Closed(Over::Done);
            return Disposition::Reopen;
        }
        // RFC 7323, 5.5: a timestamp says nothing after 24 days of silence.
        let known = now.since(self.last_heard) < 24 * 86_400 * 1_000_000_000;
        if known && !reset && self.agreed.is_old(&segment.options) {
            self.receive.acknowledge_now();
            return refuse(DropReason::OutOfWindow);
        }
        if !self.receive.is_acceptable(segment) {
            return self.unacceptable(segment, config, now);
        }
        if reset {
            // RFC 5961, 3.2: exactly at RCV.NXT it is a reset, elsewhere in the window a question.
            if self.receive.finished() && self.send.fin_acknowledged() {
                // The guest has closed and forgotten the connection (LAST-ACK to CLOSED): what it sent before, and was
                // told is kept, may still be on its way into the socket.
                return NOTHING;
            }
            if segment.seq == self.receive.next() {
                self.state = State::Closed(Over::GuestReset);
            } else {
                self.receive.acknowledge_now();
            }
            return NOTHING;
        }
        if segment.flags.has(Flags::SYN) {
            // RFC 5961, 4.2.
            self.receive.acknowledge_now();
            return refuse(DropReason::OutOfWindow);
        }
        if !segment.flags.has(Flags::ACK) {
            return refuse(DropReason::Malformed);
        }
        self.heard(now);
        self.agreed.remember(&segment.options, segment.seq, self.receive.acknowledged());
        if self.state == State::Answering {
            if !self.send.una().before(segment.ack) || self.send.max().before(segment.ack) {
                self.reset = Reset::answering(segment);
                return refuse(DropReason::OutOfWindow);
            }
            self.state = State::Open;
        }
        let bare = segment.sequence_len() == 0;
        let scale = self.agreed.guest_scale;
        if self.send.acknowledge(segment, scale, bare, self.agreed.mss, now) == Acknowledged::TooFar {
            self.receive.acknowledge_now();
            return refuse(DropReason::OutOfWindow);
        }
        let finished_before = self.receive.finished();
        let payload = self.receive.accept(segment, self.agreed.mss, config);
        if self.receive.finished() && !finished_before {
            self.closed_first = self.send.fin_sent();
        }
        if self.receive.may_acknowledge() && self.acknowledge_at == Alarm::NONE {
            self.acknowledge_at = (now + config.acknowledgement_delay).into();
        }
        self.send.watch_window(now);
        self.settle_end(config, now);
        Disposition::Payload(payload)
    }

    /// RFC 9293, 3.10.7.4, first step: answered with an acknowledgement, but for a reset.
    fn unacceptable(&mut self, segment: &SegmentHead, config: &Config, now: Now) -> Disposition {
        if segment.flags.has(Flags::RST) {
            return refuse(DropReason::OutOfWindow);
        }
        let before_window = segment.seq + 1 == self.receive.next();
        if self.state == State::Answering && segment.flags.has(Flags::SYN) && before_window {
            // The SYN-ACK was lost.
            self.send.rewind();
            return NOTHING;
        }
        let silent_ns = now.since(self.last_heard);
        self.heard(now);
        self.receive.acknowledge_now();
        if matches!(self.state, State::TimeWait { .. }) && segment.flags.has(Flags::FIN) {
            // RFC 9293, 3.10.7.4, eighth step: the acknowledgement of FIN was lost; TIME-WAIT starts anew.
            self.state = State::TimeWait { until: now + config.time_wait };
        }
        if before_window && segment.len == 0 && self.state == State::Open {
            // RFC 9293, 3.8.4: a keep-alive probe lies just before the window; so does a probe of a closed one.
            if self.receive.next().before(self.receive.edge()) {
                self.keep_alive_after_s = (silent_ns / 1_000_000_000).clamp(1, u64::from(u16::MAX)) as u16;
            }
            return NOTHING;
        }
        refuse(DropReason::OutOfWindow)
    }

    fn heard(&mut self, now: Now) {
        self.last_heard = now;
        self.keep_alive_probes = 0;
    }

    /// Both directions closed: TIME-WAIT for whoever closed first (RFC 9293, 3.3.2), else over.
    fn settle_end(&mut self, config: &Config, now: Now) {
        if self.state == State::Open && self.receive.is_shut_down() && self.send.fin_acknowledged() {
            self.state = if self.closed_first {
                State::TimeWait { until: now + config.time_wait }
            } else {
                State::Closed(Over::Done)
            };
        }
    }

    // What comes from the host.

    /// The host is connected: SYN-ACK is due.
    pub fn connected(&mut self, now: Now) {
        if self.state == State::Connecting {
            self.state = State::Answering;
            self.last_heard = now;
        }
    }

    /// The host's side refused, failed or was reset: the guest is told by a reset.
    pub fn host_failed(&mut self) {
        self.give_up(Over::HostFailed);
    }

    /// hythe ends the connection: a reset on both sides.
    pub fn abandon(&mut self) {
        self.give_up(Over::Abandoned);
    }

    fn give_up(&mut self, over: Over) {
        if self.is_host_done() {
            // In TIME-WAIT both sides have all they wanted.
            return;
        }
        self.reset = Some(match self.state {
            State::Connecting => Reset { seq: Seq(0), ack: Some(self.receive.next()) },
            State::Offering => Reset { seq: self.isn + 1, ack: None },
            _ => Reset { seq: self.send.max(), ack: Some(self.receive.next()) },
        });
        self.state = State::Closed(over);
    }

    /// The connection ends without a word to the guest: an ICMP error has told it.
    pub fn forget(&mut self) {
        self.state = State::Closed(Over::HostFailed);
    }

    /// The socket has, or may have, bytes to read or the end of the stream: a closed window is probed for their sake.
    pub fn readable(&mut self, now: Now) {
        self.send.readable();
        self.send.watch_window(now);
    }

    /// A peek found fewer bytes than it asked for, and no end of stream.
    pub fn drained(&mut self) {
        self.send.drained();
    }

    /// The peek behind everything sent found the end of the stream.
    pub fn end_of_stream(&mut self) {
        self.send.end_of_stream();
    }

    /// The socket took `len` of the bytes that were accepted.
    pub fn taken(&mut self, len: u32) {
        self.receive.taken(len);
    }

    /// Whether the room in the socket should be sampled and given to [`Self::offer`].
    pub fn wants_room(&self) -> bool {
        matches!(self.state, State::Answering | State::Open) && self.receive.wants_room()
    }

    /// Offers the guest a window for `socket_room` bytes and what is free of the buffer.
    pub fn offer(&mut self, socket_room: u32, config: &Config) {
        self.receive.offer(socket_room, self.agreed.mss, self.agreed.own_scale, config);
    }

    /// Whether the host's direction is to be shut down for writing now. True once.
    pub fn wants_shutdown(&mut self, config: &Config, now: Now) -> bool {
        let due = self.state == State::Open && self.receive.wants_shutdown();
        if due {
            self.settle_end(config, now);
        }
        due
    }

    /// Whether the guest has probed for liveness since the last call, and after which silence: the host's socket should
    /// do so too.
    pub fn take_keep_alive(&mut self) -> Option<Duration> {
        let after_s = std::mem::take(&mut self.keep_alive_after_s);
        (after_s > 0).then(|| Duration::from_secs(u64::from(after_s)))
    }

    // What is due.

    /// The next segment without payload that is due to the guest, if any.
    pub fn poll_segment(&mut self, config: &Config, now: Now) -> Option<SegmentHead> {
        if let Some(reset) = self.reset.take() {
            return Some(reset.segment());
        }
        match self.state {
            State::Connecting | State::Closed(_) => None,
            State::Offering => self.poll_syn(Flags::SYN, config, now),
            State::Answering => self.poll_syn(Flags::SYN | Flags::ACK, config, now),
            State::Open => {
                if self.send.wants_fin() {
                    let seq = self.send.next();
                    let head = self.head(seq, Flags::FIN | Flags::ACK, 0, now);
                    self.send.sent(seq, 1, now);
                    return Some(head);
                }
                if std::mem::take(&mut self.probe_due) {
                    // A byte that the guest has: it can only answer (RFC 9293, 3.8.4 and 3.8.6.1).
                    return Some(self.head(self.send.una() - 1, Flags::ACK, 0, now));
                }
                self.poll_acknowledgement(now)
            }
            State::TimeWait { .. } => self.poll_acknowledgement(now),
        }
    }

    fn poll_syn(&mut self, flags: Flags, config: &Config, now: Now) -> Option<SegmentHead> {
        if self.send.next() != self.isn {
            return None;
        }
        self.send.sent(self.isn, 1, now);
        self.receive.acknowledgement_sent(false);
        let options = self.agreed.of_syn(config, now);
        let ack = if flags.has(Flags::ACK) { self.receive.next() } else { Seq(0) };
        Some(SegmentHead { seq: self.isn, ack, flags, window: self.receive.window_field(0), options, len: 0 })
    }

    fn poll_acknowledgement(&mut self, now: Now) -> Option<SegmentHead> {
        self.receive.must_acknowledge().then(|| self.head(self.send.max(), Flags::ACK, 0, now))
    }

    /// The head of a segment that goes out now; it carries the acknowledgement.
    fn head(&mut self, seq: Seq, flags: Flags, len: u32, now: Now) -> SegmentHead {
        let mut options = self.agreed.of_segment(now);
        // Data segments are as long as the MTU allows, so blocks ride on bare acknowledgements only.
        if self.agreed.sack && len == 0 {
            self.receive.sack_blocks().iter().for_each(|block| {
                options.sack.push(*block);
            });
        }
        let window = self.receive.window_field(self.agreed.own_scale);
        self.receive.acknowledgement_sent(len > 0);
        self.acknowledge_at = Alarm::NONE;
        SegmentHead { seq, ack: self.receive.next(), flags, window, options, len }
    }

    /// Bytes that should be peeked and sent now.
    pub fn wanted(&self, config: &Config) -> Option<Wanted> {
        if self.state != State::Open {
            return None;
        }
        let range = self.send.wanted(self.segment_bytes(), config.unacknowledged_max)?;
        let offset = range.start.since(self.send.discarded());
        Some(Wanted { seq: range.start, offset, len: range.end.since(range.start) })
    }

    /// The length of the TCP header of a segment with data, in bytes: options of fixed length only.
    pub fn data_header_len(&self) -> usize {
        20 + if self.agreed.timestamps { 12 } else { 0 }
    }

    /// `len` peeked bytes go out from `seq`: the head of their segment (which may be a large one that the link cuts).
    /// `push` marks the last bytes that there are for now.
    pub fn data_segment(&mut self, seq: Seq, len: u32, push: bool, now: Now) -> SegmentHead {
        let flags = if push { Flags::ACK | Flags::PSH } else { Flags::ACK };
        let head = self.head(seq, flags, len, now);
        self.send.sent(seq, len, now);
        head
    }

    /// Whether acknowledged bytes at the start of the socket's receive queue should be discarded now rather than
    /// with the next peek: there are many, or there will be no next peek.
    pub fn wants_discard(&self) -> bool {
        let bytes = self.send.discardable();
        let last = self.send.fin_acknowledged();
        match self.state {
            // A socket that is reset takes its queue along; one that is closed must have an empty one (RFC 2525, 2.17).
            State::Closed(over) => bytes > 0 && over == Over::Done,
            _ => bytes >= DISCARD_BYTES || (bytes > 0 && (last || self.discard_due)),
        }
    }

    /// Acknowledged bytes at the start of the socket's receive queue: a peek walks over them.
    pub fn discardable(&self) -> u32 {
        self.send.discardable()
    }

    /// Bytes at the start of the socket's receive queue that are acknowledged and to be discarded; counted as gone.
    pub fn take_discard(&mut self) -> u32 {
        self.discard_due = false;
        self.send.take_discard()
    }

    /// `bytes` of those that [`Self::take_discard`] gave are there still, and are to be discarded soon.
    pub fn return_discard(&mut self, bytes: u32) {
        self.discard_due = true;
        self.send.return_discard(bytes);
    }

    /// The next time at which [`Self::expired`] has something to do.
    pub fn next_deadline(&self, config: &Config) -> Option<Now> {
        let own = match self.state {
            State::Connecting | State::Closed(_) => None,
            State::TimeWait { until } => Some(until),
            State::Offering => Some(self.last_heard + config.open_timeout),
            State::Answering => Some(self.last_heard + config.retransmit_timeout),
            State::Open => Some(self.keep_alive_at(config)),
        };
        [own, self.acknowledge_at.get(), self.send.deadline(), self.discard_at()].into_iter().flatten().min()
    }

    fn discard_at(&self) -> Option<Now> {
        let waits = self.state == State::Open && !self.discard_due && self.send.discardable() > 0;
        waits.then(|| self.last_heard + DISCARD_IDLE)
    }

    fn keep_alive_at(&self, config: &Config) -> Now {
        self.last_heard
            + config.keep_alive_idle
            + config.keep_alive_interval * u32::from(self.keep_alive_probes)
    }

    /// Nobody was here when something was due: the machine slept, or was stopped. The guest's silence since then says nothing,
    /// so it counts as silent as it was then; what is due now is done once, and waited for anew.
    fn discount_absence(&mut self, config: &Config, now: Now) {
        let Some(due) = self.next_deadline(config) else { return };
        let absence = now - due;
        if absence >= ABSENCE {
            self.last_heard = self.last_heard + absence;
        }
    }

    /// Time has passed: does what is due by now.
    pub fn expired(&mut self, config: &Config, now: Now) {
        self.discount_absence(config, now);
        if self.acknowledge_at.get().is_some_and(|at| at <= now) {
            self.acknowledge_at = Alarm::NONE;
            self.receive.delay_over();
        }
        if matches!(self.state, State::Offering | State::Answering | State::Open) && self.send.expired(now) {
            // A window of zero is a closed one only once the guest has offered one.
            self.probe_due = self.state == State::Open;
        }
        self.discard_due |= self.discard_at().is_some_and(|at| at <= now);
        match self.state {
            State::TimeWait { until } if until <= now => self.state = State::Closed(Over::Done),
            State::Offering if self.last_heard + config.open_timeout <= now => {
                self.give_up(Over::GuestSilent);
            }
            State::Answering if self.last_heard + config.retransmit_timeout <= now => {
                self.give_up(Over::GuestGone);
            }
            State::Open => {
                let silent = self.last_heard + config.retransmit_timeout <= now;
                if silent && self.send.timer.backoffs() >= 3 {
                    self.give_up(Over::GuestGone);
                } else if self.keep_alive_at(config) <= now {
                    if self.keep_alive_probes >= config.keep_alive_probes {
                        self.give_up(Over::GuestGone);
                    } else {
                        self.keep_alive_probes += 1;
                        self.probe_due = true;
                    }
                }
            }
            _ => {}
        }
    }
}
