//! One TCP connection of the guest's: its state, and the program on it.
//!
//! An endpoint in its own right, written from the RFCs and not from hythe's relay, so that a mistake in the one does not
//! hide a mistake in the other.

use std::rc::Rc;

use crate::frame::tcp::{Flags, Options, SegmentHead, Seq};
use crate::random::Random;
use crate::time::Now;

use super::super::application::Application;
use super::super::check::{Ending, Name};
use super::super::clock::earliest;
use super::super::plan::{GuestTcp, S};
use super::super::stage::Stage;
use super::receiver::{Arrival, Receiver};
use super::sender::{Burst, Sender};

/// Idle time after which every connection probes for liveness (Linux: `tcp_keepalive_time`).
const KEEP_ALIVE_NS: u64 = 7_200 * S;
const KEEP_ALIVE_INTERVAL_NS: u64 = 75 * S;
const KEEP_ALIVE_PROBES: u32 = 9;
/// Attempts at opening.
const OPENINGS_MAX: u32 = 7;

/// Where a connection stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// SYN was sent.
    Opening,
    /// SYN came, SYN-ACK was sent.
    Answering,
    /// Both sides are synchronized.
    Open,
    /// Both directions are closed; a FIN that comes again is acknowledged.
    Waiting,
    /// Over: the other side is told so when it says anything.
    Closed,
    /// The guest is never heard again.
    Vanished,
}

/// A segment to be sent, and where its payload lies in the guest's stream.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing {
    /// The segment.
    pub segment: SegmentHead,
    /// The offset of its first byte.
    pub offset: u64,
}

/// A connection.
pub struct Connection {
    /// Its endpoints.
    pub name: Name,
    /// Which connection of the plan it is.
    pub number: usize,
    /// Where it stands.
    pub state: State,
    stage: Rc<Stage>,
    tcp: GuestTcp,
    random: Random,
    sender: Sender,
    receiver: Receiver,
    program: Application,
    /// What segments of the guest's may carry.
    mss: u16,
    scale: Option<u8>,
    other_scale: u8,
    timestamps: bool,
    sack: bool,
    recent: u32,
    clock_offset: u32,
    vanishes: Option<u64>,
    syn_due: bool,
    acknowledge: Option<Now>,
    reset_due: bool,
    heard: Now,
    probes: u32,
    /// When the last one went out: Linux counts from there, so that a guest that has slept sends one at a time, too.
    probed: Now,
    openings: u32,
    closed_first: bool,
}

impl Connection {
    /// A connection that the guest opens, or (`state` is [`State::Answering`]) is asked for.
    pub fn new(
        stage: Rc<Stage>,
        (name, number, state): (Name, usize, State),
        tcp: GuestTcp,
        program: Application,
        vanishes: Option<u64>,
        mut random: Random,
    ) -> Self {
        let now = stage.now();
        // RFC 9293, 3.4.1: a clock, so that the next connection of the name has higher numbers.
        let isn = Seq((now.0 / 4_000) as u32);
        // A scale that makes steps of more than an eighth of the buffer would make most of it useless.
        let scale = tcp.scale.map(|scale| (0..=scale).rev().find(|s| tcp.buffer >> s >= 8).unwrap_or(0));
        let clock_offset = random.bits() as u32;
        Self {
            name,
            number,
            state,
            tcp,
            random,
            sender: Sender::new(isn, tcp.congestion_max, tcp.probes_with_byte),
            receiver: Receiver::new(tcp.buffer, scale.unwrap_or(0), tcp.mss),
            program,
            mss: tcp.mss,
            scale,
            other_scale: 0,
            timestamps: tcp.timestamps,
            sack: tcp.sack,
            recent: 0,
            clock_offset,
            vanishes,
            syn_due: true,
            acknowledge: None,
            reset_due: false,
            heard: now,
            probes: 0,
            probed: now,
            openings: 0,
            closed_first: false,
            stage,
        }
    }

    /// Whether nothing is to be expected of it any more.
    pub fn is_over(&self) -> bool {
        matches!(self.state, State::Waiting | State::Closed | State::Vanished)
    }

    /// Whether the other side has certainly taken it for open.
    pub fn is_settled(&self) -> bool {
        self.state == State::Open && (self.sender.una() > 1 || self.receiver.next() > 1)
    }

    fn end(&mut self, state: State, ending: Ending) {
        self.state = state;
        let mut books = self.stage.books.borrow_mut();
        let progress = &mut books.progress[self.number];
        progress.guest_over.get_or_insert(ending);
        progress.disturbed |= ending != Ending::Closed && ending != Ending::Reset;
        drop(books);
        let number = self.number;
        self.stage.trace(20, || format!("guest   {number:>3} is over: {ending:?}"));
    }

    /// An ICMP error came about its SYN, or about a segment.
    pub fn unreachable(&mut self) {
        if self.state == State::Opening {
            self.end(State::Closed, Ending::Unreachable);
        }
    }

    /// A segment comes. Returns the reset that answers it, if one does.
    pub fn segment(&mut self, segment: &SegmentHead) -> Option<SegmentHead> {
        match self.state {
            State::Vanished => None,
            State::Closed => reset_for(segment),
            State::Opening => self.answer(segment),
            State::Answering | State::Open | State::Waiting => self.synchronized(segment),
        }
    }

    /// RFC 9293, 3.10.7.3.
    fn answer(&mut self, segment: &SegmentHead) -> Option<SegmentHead> {
        let acknowledges = segment.flags.has(Flags::ACK);
        if acknowledges && segment.ack != self.sender.seq(1) {
            return reset_for(segment);
        }
        if segment.flags.has(Flags::RST) {
            if acknowledges {
                self.end(State::Closed, Ending::Reset);
            }
            return None;
        }
        if segment.flags.has(Flags::SYN) && acknowledges {
            self.take_options(segment);
            self.receiver.synchronize(segment.seq, self.syn_window());
            self.sender.open_window(segment);
            self.sender.acknowledge(segment, 0, self.stage.now());
            self.open();
            self.acknowledge_at(self.stage.now());
        }
        None
    }

    /// The SYN of a connection that the guest is asked for.
    pub fn asked(&mut self, syn: &SegmentHead) {
        self.take_options(syn);
        self.receiver.synchronize(syn.seq, self.syn_window());
        self.sender.open_window(syn);
    }

    fn syn_window(&self) -> u64 {
        self.tcp.buffer.min(0xffff)
    }

    fn take_options(&mut self, syn: &SegmentHead) {
        let options = &syn.options;
        self.timestamps &= options.timestamps.is_some();
        self.sack &= options.sack_permitted;
        match options.window_scale {
            Some(scale) if self.scale.is_some() => self.other_scale = scale.min(14),
            _ => {
                self.scale = None;
                self.receiver.set_scale(0);
            }
        }
        self.recent = options.timestamps.map_or(0, |(value, _)| value);
        let room = options.mss.unwrap_or(536).min(self.tcp.mss);
        self.mss = room - if self.timestamps { 12 } else { 0 };
    }

    fn open(&mut self) {
        self.state = State::Open;
        self.syn_due = false;
        self.heard = self.stage.now();
        let number = self.number;
        self.stage.trace(21, || format!("guest   {number:>3} is open"));
    }

    /// RFC 9293, 3.10.7.4.
    fn synchronized(&mut self, segment: &SegmentHead) -> Option<SegmentHead> {
        let now = self.stage.now();
        let (reset, syn) = (segment.flags.has(Flags::RST), segment.flags.has(Flags::SYN));
        if !reset && self.timestamps && self.is_old(segment) {
            self.acknowledge_at(now);
            return None;
        }
        if !self.receiver.is_acceptable(segment) {
            if syn && self.state == State::Answering {
                self.syn_due = true;
            } else if !reset {
                self.acknowledge_at(now);
            }
            return None;
        }
        if reset {
            if self.receiver.is_next(segment.seq) {
                self.die_of_reset();
            } else {
                self.acknowledge_at(now);
            }
            return None;
        }
        if syn || !segment.flags.has(Flags::ACK) {
            self.acknowledge_at(now);
            return None;
        }
        if self.state == State::Answering {
            if segment.ack != self.sender.seq(1) {
                return reset_for(segment);
            }
            self.open();
        }
        (self.heard, self.probes) = (now, 0);
        if let Some((value, _)) = segment.options.timestamps
            && !self.receiver.seq(self.receiver.next()).before(segment.seq)
        {
            self.recent = value;
        }
        if !self.sender.acknowledge(segment, self.other_scale, now) {
            self.acknowledge_at(now);
            return None;
        }
        let before = self.receiver.has_ended();
        match self.receiver.accept(segment, self.tcp.reneges, &mut self.random) {
            Arrival::Nothing => {}
            Arrival::Soon => {
                self.acknowledge_at(Now(now.0 + self.tcp.ack_delay_ns));
            }
            Arrival::Now => self.acknowledge_at(now),
        }
        if self.receiver.has_ended() && !before {
            self.closed_first = self.program.has_closed();
        }
        self.stage.books.borrow_mut().progress[self.number].guest_got = self.receiver.bytes();
        if self.vanishes.is_some_and(|bytes| self.receiver.bytes() >= bytes) {
            self.end(State::Vanished, Ending::Silence);
        }
        None
    }

    fn die_of_reset(&mut self) {
        match self.state {
            // A question whether somebody listens, or an opening that was given up: nobody's program knows of it.
            State::Answering => self.state = State::Closed,
            State::Waiting => {}
            // RFC 9293, 3.10.7.4: in CLOSING, LAST-ACK and TIME-WAIT a reset is as good an end as an acknowledgement.
            _ if self.receiver.has_ended() && self.program.has_closed() && self.sender.outstanding() == 0 => {
                self.sender.finish();
            }
            _ => self.end(State::Closed, Ending::Reset),
        }
    }

    /// RFC 7323, 5.3.
    fn is_old(&self, segment: &SegmentHead) -> bool {
        segment.options.timestamps.is_some_and(|(value, _)| (value.wrapping_sub(self.recent) as i32) < 0)
    }

    fn acknowledge_at(&mut self, at: Now) {
        self.acknowledge = Some(self.acknowledge.map_or(at, |known| known.min(at)));
    }

    /// When there is something to do next.
    pub fn next(&self) -> Option<Now> {
        match self.state {
            State::Closed | State::Vanished => None,
            State::Waiting => self.acknowledge,
            _ if self.syn_due || self.reset_due => Some(self.stage.now()),
            _ => {
                let open = self.state == State::Open;
                let program =
                    if open { self.program.next(self.room(), self.receiver.available()) } else { None };
                let alive = open.then(|| self.keep_alive_at());
                earliest([program, self.acknowledge, self.sender.deadline(), alive])
            }
        }
    }

    fn keep_alive_at(&self) -> Now {
        let idle = self.tcp.keep_alive_ns.unwrap_or(KEEP_ALIVE_NS);
        let interval =
            self.tcp.keep_alive_ns.map_or(KEEP_ALIVE_INTERVAL_NS, |idle| idle.min(KEEP_ALIVE_INTERVAL_NS));
        match self.probes {
            0 => Now(self.heard.0 + idle),
            _ => Now(self.probed.0 + interval),
        }
    }

    fn room(&self) -> u64 {
        self.tcp.send_buffer.saturating_sub(self.sender.outstanding())
    }

    /// Does what is due: time-outs, the program, segments.
    pub fn act(&mut self, emit: &mut dyn FnMut(Outgoing)) {
        let now = self.stage.now();
        if self.is_over() && self.state != State::Waiting {
            return;
        }
        if self.sender.expire(u64::from(self.mss), now) {
            self.syn_due = true;
        }
        if self.sender.is_given_up() || self.openings > OPENINGS_MAX {
            self.give_up();
            return;
        }
        if self.state == State::Open {
            self.run_program();
        }
        if self.reset_due {
            self.reset_due = false;
            let segment = self.head(self.sender.max(), Flags::RST | Flags::ACK, 0);
            emit(Outgoing { segment, offset: 0 });
            self.end(State::Closed, Ending::GaveReset);
            return;
        }
        self.send(now, emit);
        if self.state == State::Open {
            self.sender.watch(now);
            self.settle_end();
        }
    }

    fn give_up(&mut self) {
        if self.state == State::Answering {
            self.state = State::Closed;
        } else {
            self.end(State::Closed, Ending::Silence);
        }
    }

    fn run_program(&mut self) {
        let now = self.stage.now();
        loop {
            let wrote = self.program.write(now, self.room());
            self.sender.write(wrote);
            let read = self.program.read_some(now, self.receiver.available());
            if read > 0 && self.receiver.read(read) {
                self.acknowledge_at(now);
            }
            if wrote == 0 && read == 0 {
                break;
            }
        }
        if self.receiver.has_ended() && self.receiver.available() == 0 {
            self.program.end();
        }
        let mut books = self.stage.books.borrow_mut();
        let progress = &mut books.progress[self.number];
        progress.guest_wrote = self.program.written();
        progress.guest_read = self.program.read();
        if self.program.resets() {
            progress.disturbed = true;
            self.reset_due = true;
        } else if self.program.closes() {
            progress.guest_end = Some(self.program.written());
            self.sender.close();
        }
    }

    fn send(&mut self, now: Now, emit: &mut dyn FnMut(Outgoing)) {
        if std::mem::take(&mut self.syn_due) && matches!(self.state, State::Opening | State::Answering) {
            let segment = self.syn();
            emit(Outgoing { segment, offset: 0 });
            self.sender.syn_sent(now);
            self.openings += 1;
        }
        if self.state == State::Open {
            let (mss, large) = (u64::from(self.mss), self.large_segment());
            while let Some(burst) = self.sender.next_burst(mss, large, now) {
                emit(self.outgoing(burst));
            }
            if let Some(probe) = self.sender.take_probe() {
                emit(self.outgoing(probe));
            }
            if self.keep_alive_at() <= now {
                self.probes += 1;
                self.probed = now;
                if self.probes > KEEP_ALIVE_PROBES {
                    self.end(State::Closed, Ending::Silence);
                    return;
                }
                let segment = self.head(self.sender.max() - 1, Flags::ACK, 0);
                emit(Outgoing { segment, offset: 0 });
            }
        }
        if self.acknowledge.is_some_and(|at| at <= now) {
            let segment = self.head(self.sender.max(), Flags::ACK, 0);
            emit(Outgoing { segment, offset: 0 });
        }
    }

    /// Payload bytes of one frame at the most: whole segments.
    fn large_segment(&self) -> u64 {
        let mss = u64::from(self.mss);
        let room = self.tcp.large_segment.min(65_535 - 120);
        (room / mss).max(1) * mss
    }

    fn outgoing(&mut self, burst: Burst) -> Outgoing {
        let mut flags = Flags::ACK;
        if burst.fin {
            flags = flags | Flags::FIN;
        }
        let segment = self.head(burst.start, flags, burst.len as u32);
        Outgoing { segment, offset: burst.start.saturating_sub(1) }
    }

    fn timestamp(&self) -> u32 {
        self.stage.now().millis32().wrapping_add(self.clock_offset)
    }

    fn syn(&mut self) -> SegmentHead {
        let answers = self.state == State::Answering;
        let options = Options {
            mss: Some(self.tcp.mss),
            window_scale: self.scale,
            sack_permitted: self.sack,
            timestamps: self.timestamps.then(|| (self.timestamp(), self.recent)),
            ..Options::default()
        };
        let window = self.syn_window();
        self.stage.books.borrow_mut().guest_synchronizes(
            self.name,
            self.number,
            self.sender.seq(0).0,
            self.scale,
            window,
        );
        SegmentHead {
            seq: self.sender.seq(0),
            ack: if answers { self.receiver.seq(self.receiver.next()) } else { Seq(0) },
            flags: if answers { Flags::SYN | Flags::ACK } else { Flags::SYN },
            window: window as u16,
            options,
            len: 0,
        }
    }

    /// The head of a segment; it carries the acknowledgement.
    fn head(&mut self, position: u64, flags: Flags, len: u32) -> SegmentHead {
        let mut options = Options {
            timestamps: self.timestamps.then(|| (self.timestamp(), self.recent)),
            ..Options::default()
        };
        if self.sack && len == 0 {
            options.sack = self.receiver.blocks();
        }
        let (window, edge) = self.receiver.offer();
        self.stage.books.borrow_mut().guest_offers(self.name, edge);
        self.acknowledge = None;
        let ack = self.receiver.seq(self.receiver.next());
        SegmentHead { seq: self.sender.seq(position), ack, flags, window, options, len }
    }

    fn settle_end(&mut self) {
        if self.program.has_seen_end() && self.sender.is_finished() {
            let state = if self.closed_first { State::Waiting } else { State::Closed };
            self.end(state, Ending::Closed);
        }
    }
}

/// RFC 9293, 3.10.7.1: the reset for a segment that belongs to no connection.
pub fn reset_for(segment: &SegmentHead) -> Option<SegmentHead> {
    if segment.flags.has(Flags::RST) {
        return None;
    }
    let acknowledges = segment.flags.has(Flags::ACK);
    Some(SegmentHead {
        seq: if acknowledges { segment.ack } else { Seq(0) },
        ack: if acknowledges { Seq(0) } else { segment.seq + segment.sequence_len() },
        flags: if acknowledges { Flags::RST } else { Flags::RST | Flags::ACK },
        ..SegmentHead::default()
    })
}
