//! A worker: one pinned thread that owns one queue pair of the link, and the flows and sockets that belong to it.
//!
//! # The loop
//! ```text
//! collect   what the engine reports, frames from the link, mail, deadlines       (E1: reads and writes of the link)
//! decide    parse, find the flow, ask its relay: pure                            outbound.rs, streams/, datagrams/
//! submit    sends, discards, peeks, receives, as one batch                  (E2)  streams/settle.rs, datagrams/
//! publish   what came back becomes frames, which go out with the next E1         inbound.rs
//! idle      nothing to do: sleep until something happens                         idle.rs
//! ```
//! A pass never waits. Two batches (E1, E2) are entered in each, whatever the number of frames and streams.
//!
//! No lock, no allocation and no log line on the path of a frame. What needs name resolution, files or patience is
//! mailed to the slow path.
//!
//! A worker is generic over its link, its engine and its sockets, so that the simulation runs this very code.

mod datagrams;
pub mod idle;
mod inbound;
mod joins;
pub mod load;
mod outbound;
pub mod ports;
#[cfg(feature = "sim")]
pub mod simulated;
mod streams;

pub use streams::moving::{MOVES, Moves};

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::exchange::mail::{OwnedFrame, Publication, Receipt, ToRecorder, ToSlow, ToWorker};
use crate::exchange::{Mailbox, Waker};
use crate::flow::admit::{Admission, Limits};
use crate::flow::slab::{Slab, Slot};
use crate::flow::table::FlowTable;
use crate::flow::timer::TimerWheel;
use crate::frame::drop_reason::DropReason;
use crate::host::engine::{Engine, Event, Interest, Token};
use crate::host::processors::Pinning;
use crate::host::splice::Conduit;
use crate::host::{HostSocket, Sockets};
use crate::io::{Buffers, Operations};
use crate::link::{Link, READY_FDS, Ready, Space};
use crate::observe::counters::{Counters, Metric};
use crate::observe::latency::Stopwatch;
use crate::policy::addresses::Addresses;
use crate::policy::guest_mac::GuestMac;
use crate::policy::port_set::PortSet;
use crate::policy::publish::PublishedProtocol;
use crate::policy::{Spread, UdpFiltering};
use crate::relay::tcp;
use crate::time::Now;

use ports::Ports;
use streams::{HostSide, Stream};

/// What a descriptor belongs to, in tokens.
mod token_kind {
    pub const LINK: u8 = 1;
    pub const WAKER: u8 = 2;
    pub const STREAM: u8 = 3;
    pub const LISTENER: u8 = 4;
    pub const MAPPING: u8 = 5;
    pub const JOIN_CLIENT: u8 = 6;
    pub const JOIN_GUEST: u8 = 7;
}

/// Spaces that datagrams to the guest may take in a pass in which streams want some too.
const DATAGRAM_SPACES: usize = 16;

/// Things of one kind that a pass has to do, as a rule. There is memory for so many from the start: later ones find it.
const A_PASS: usize = 128;

/// Echo messages of one pass in each direction.
const ECHO_HEADS: usize = 256;

/// What serves a publication.
#[derive(Clone, Copy)]
enum Served {
    /// A listening socket.
    Listener(Slot),
    /// A mapping whose socket was bound for it.
    Datagrams(Slot),
}

/// Everything a worker is made from.
pub struct Parts<L, E, S: Sockets> {
    /// Its number, from 0.
    pub id: u8,
    /// Its queue pair.
    pub link: L,
    /// Its engine, made on its own thread.
    pub engine: E,
    /// The host's sockets.
    pub sockets: S,
    /// The flow table, shared by all workers.
    pub flows: Arc<FlowTable>,
    /// Flows this worker may hold.
    pub flows_max: u32,
    /// Budgets.
    pub limits: Limits,
    /// Addresses and rules.
    pub addresses: Arc<Addresses>,
    /// The guest's MAC.
    pub guest_mac: GuestMac,
    /// Whose datagrams reach the guest.
    pub udp_filtering: UdpFiltering,
    /// Its counters.
    pub counters: Arc<Counters>,
    /// What wakes it.
    pub waker: Arc<Waker>,
    /// Its mail.
    pub mail: Mailbox<ToWorker<S::Socket>>,
    /// The other workers' mail, by number; its own stands at its place.
    pub workers: Vec<Mailbox<ToWorker<S::Socket>>>,
    /// Streams on their way to the workers, by number.
    pub moves: Vec<Moves<S::Socket>>,
    /// The slow path's mail.
    pub slow: Mailbox<ToSlow>,
    /// Whether the guest is a namespace of this kernel, so that sockets can be opened in it.
    pub guest_in_kernel: bool,
    /// Ports that flows of the guest must leave alone.
    pub excluded_ports: PortSet,
    /// A secret of this process: initial sequence numbers come from it (RFC 6528).
    pub secret: [u64; 2],
    /// Where copies of all frames go, if anywhere.
    pub recorder: Option<Mailbox<ToRecorder>>,
    /// How long to look for work before sleeping.
    pub spin: Duration,
    /// Where to look from.
    pub seat: idle::Seat,
    /// Which processor its thread runs on.
    pub pinning: Pinning,
    /// How busy the workers are.
    pub loads: load::Loads,
    /// Whether it may rest while the first one suffices.
    pub spread: Spread,
    /// The time.
    pub now: Now,
}

/// A worker.
pub struct Worker<L: Link, E: Engine, S: Sockets> {
    id: u8,
    link: L,
    engine: E,
    sockets: S,
    flows: Arc<FlowTable>,
    addresses: Arc<Addresses>,
    guest_mac: GuestMac,
    udp_filtering: UdpFiltering,
    counters: Arc<Counters>,
    stopwatch: Stopwatch,
    waker: Arc<Waker>,
    mail: Mailbox<ToWorker<S::Socket>>,
    workers: Vec<Mailbox<ToWorker<S::Socket>>>,
    moves: Vec<Moves<S::Socket>>,
    slow: Mailbox<ToSlow>,
    ports: Ports,
    admission: Admission,
    secret: [u64; 2],
    recorder: Option<Mailbox<ToRecorder>>,
    /// By family: IPv6's, IPv4's.
    configs: [tcp::Config; 2],

    streams: Slab<Stream<S::Socket>>,
    stream_timers: TimerWheel,
    listeners: Slab<streams::clients::Listener<S::Socket>>,
    /// Listeners that may have more clients than one pass accepts.
    waiting_listeners: Vec<Slot>,
    /// Listeners for whose clients there is no descriptor, and when to look again.
    paused_listeners: Vec<Slot>,
    listeners_resume: Option<Now>,
    /// What serves each publication, by its number.
    published: HashMap<u32, Served>,
    /// Of publications that have ended: held until the engine has let go of their sockets.
    receipts: Vec<Receipt>,
    unanswerable: streams::unanswerable::Unanswerable,
    buffers: streams::buffer::BufferCount,
    departed: streams::departed::Departed,

    joins: Slab<joins::Join<S::Socket>>,
    ready_joins: Vec<Slot>,
    guest_sockets: joins::GuestSockets<S::Socket>,
    conduits: Vec<Conduit>,

    mappings: Slab<datagrams::Mapping<S::Socket>>,
    datagram_flows: Slab<datagrams::DatagramFlow>,
    datagram_timers: TimerWheel,
    /// Mappings on the guest's own port.
    kept_ports: u32,
    eviction_hand: u32,
    fragment_id: u32,

    // The work of one pass.
    operations: Operations,
    publishing: Operations,
    events: Vec<Event>,
    adopted: Vec<OwnedFrame>,
    parts: Vec<outbound::Part>,
    touched: Vec<streams::settle::Touched>,
    /// Streams that have more to do than one pass allows.
    again: Vec<Slot>,
    /// Streams for which no space was left: the first ones of the next pass.
    starved: Vec<Slot>,
    /// Streams that belong to another worker from now on, and to whom.
    strayed: Vec<(Slot, u8)>,
    spaces: Vec<Space>,
    outgoing: Vec<datagrams::outbound::Outgoing>,
    readable_mappings: Vec<Slot>,
    incoming: Vec<datagrams::inbound::Incoming>,
    /// Echo headers of this pass, which stand apart from the payload in the link's memory: to the host, to the guest.
    echo_requests: Buffers,
    echo_replies: Buffers,
    fired: Vec<u32>,
    scratch: Buffers,
    link_ready: bool,
    /// The link's descriptors that are watched.
    armed: [Option<Ready>; READY_FDS],
    /// Streams came before datagrams in this pass.
    streams_first: bool,
    spinner: idle::Spinner,
    pinning: Pinning,
    load: load::Load,
    stopped: bool,
}

impl<L: Link, E: Engine, S: Sockets> Worker<L, E, S> {
    /// A worker that watches its link and its mail.
    pub fn new(parts: Parts<L, E, S>) -> std::io::Result<Self> {
        let mtu = parts.link.capabilities().mtu;
        let mut engine = parts.engine;
        engine.watch(parts.waker.fd(), Self::token(token_kind::WAKER), Interest::Readable)?;
        let shares = parts.link.steers() && parts.spread == Spread::Auto;
        let configs = [tcp::Config::for_mtu(mtu, false), tcp::Config::for_mtu(mtu, true)];
        Ok(Self {
            id: parts.id,
            link: parts.link,
            engine,
            sockets: parts.sockets,
            flows: parts.flows,
            addresses: parts.addresses,
            guest_mac: parts.guest_mac,
            udp_filtering: parts.udp_filtering,
            counters: parts.counters,
            stopwatch: Stopwatch::default(),
            waker: parts.waker,
            mail: parts.mail,
            workers: parts.workers,
            moves: parts.moves,
            slow: parts.slow,
            ports: Ports::new(parts.excluded_ports),
            admission: Admission::new(parts.limits),
            secret: parts.secret,
            recorder: parts.recorder,
            configs,
            streams: Slab::new(parts.flows_max),
            stream_timers: TimerWheel::new(parts.now),
            listeners: Slab::new(streams::clients::LISTENERS_MAX),
            waiting_listeners: Vec::new(),
            paused_listeners: Vec::new(),
            listeners_resume: None,
            published: HashMap::new(),
            receipts: Vec::new(),
            unanswerable: streams::unanswerable::Unanswerable::default(),
            buffers: streams::buffer::BufferCount::default(),
            departed: streams::departed::Departed::default(),
            joins: Slab::new(parts.flows_max),
            ready_joins: Vec::new(),
            guest_sockets: joins::GuestSockets::new(parts.guest_in_kernel),
            conduits: Vec::new(),
            mappings: Slab::new(parts.flows_max),
            datagram_flows: Slab::new(parts.flows_max),
            datagram_timers: TimerWheel::new(parts.now),
            kept_ports: 0,
            eviction_hand: 0,
            fragment_id: parts.secret[0] as u32,
            operations: Operations::default(),
            publishing: Operations::default(),
            events: Vec::with_capacity(A_PASS),
            adopted: Vec::new(),
            parts: Vec::with_capacity(A_PASS),
            touched: Vec::with_capacity(A_PASS),
            again: Vec::with_capacity(A_PASS),
            starved: Vec::with_capacity(A_PASS),
            strayed: Vec::new(),
            spaces: Vec::with_capacity(A_PASS),
            outgoing: Vec::new(),
            readable_mappings: Vec::new(),
            incoming: Vec::new(),
            echo_requests: Buffers::new(ECHO_HEADS, 64),
            echo_replies: Buffers::new(ECHO_HEADS, 64),
            fired: Vec::with_capacity(A_PASS),
            // What lies in front of a peek: unacknowledged bytes, and acknowledged ones that are not discarded yet.
            scratch: Buffers::new(1, configs[0].unacknowledged_max as usize + (64 << 10)),
            link_ready: true,
            armed: [None; READY_FDS],
            streams_first: false,
            spinner: idle::Spinner::new(parts.spin, parts.seat),
            pinning: parts.pinning,
            load: load::Load::new(parts.loads, shares, parts.id, parts.now),
            stopped: false,
        })
    }

    fn token(kind: u8) -> Token {
        Token { kind, slot: Slot { index: 0, generation: 0 } }
    }

    /// The token of one of the link's descriptors.
    fn link_token(which: usize) -> Token {
        Token { kind: token_kind::LINK, slot: Slot { index: which as u32, generation: 0 } }
    }

    fn config(&self, v4: bool) -> &tcp::Config {
        &self.configs[usize::from(v4)]
    }

    fn drop_frame(&self, reason: DropReason) {
        self.counters.count_drop(reason);
    }

    /// Whether the worker has ended: it was told to, or its link is gone.
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// One pass of the loop. Returns whether there may be more to do at once.
    pub fn pass(&mut self, now: Now) -> bool {
        self.counters.add(Metric::Passes, 1);
        self.weigh(now);
        // What the pass before took from the engine was submitted after it.
        self.receipts.clear();
        if self.link.has_news() {
            self.take_link_news(now);
        }
        // Where one consumer at a time has the link's space, streams and datagrams take turns.
        self.streams_first = !self.streams_first && !self.starved.is_empty();
        for index in 0..self.starved.len() {
            self.touch(self.starved[index]);
        }
        self.starved.clear();
        self.take_events(now);
        self.exchange_with_link(now);
        self.decide_outbound(now);
        self.take_moved(now);
        let more_mail = self.take_mail(now);
        self.take_deadlines(now);
        self.reset_departed();
        self.settle(now);
        self.release_frames();
        self.move_strayed(now);
        if self.link.is_closed() {
            self.stop(now);
        }
        let more = more_mail
            || self.link_ready
            || !self.again.is_empty()
            || self.has_use_for_room()
            || !self.touched.is_empty()
            || !self.departed.is_over()
            || !self.waiting_listeners.is_empty()
            || !self.receipts.is_empty()
            || !self.ready_joins.is_empty();
        // With the next pass's E1 if there is one at once, else now.
        if self.link.has_unpublished() && !more {
            self.publish_now();
            #[cfg(feature = "sim")]
            if simulated::omits(simulated::Omission::UseFoundRoom) {
                return false;
            }
            // That may have found room, of which the guest will not tell again.
            return self.has_use_for_room();
        }
        more
    }

    /// Whether the link has room, and there is something to put into it.
    fn has_use_for_room(&self) -> bool {
        let is_wanted = !self.starved.is_empty() || !self.readable_mappings.is_empty();
        is_wanted && !self.link.wants_room()
    }

    /// E2: submits what this pass has decided as one batch, and concludes it.
    fn settle(&mut self, now: Now) {
        self.operations.clear();
        self.spaces.clear();
        // Datagrams have a share of the link's space that streams cannot take.
        let share = if self.touched.is_empty() { usize::MAX } else { DATAGRAM_SPACES };
        if self.streams_first {
            self.submit_streams(now);
            self.submit_receives(share);
        } else {
            self.submit_receives(share);
            self.submit_streams(now);
        }
        self.submit_datagrams();
        self.engine.run(&mut self.operations);
        if !self.operations.is_empty() {
            self.stopwatch.exchanged(self.parts.len() as u64, Now::read);
        }
        self.conclude_streams(now);
        self.conclude_datagrams();
        self.conclude_receives(now);
        self.pump_joins();
    }

    /// E1: publishes the frames of the last pass and receives the next batch.
    fn exchange_with_link(&mut self, now: Now) {
        self.operations.clear();
        self.link.begin_publish(&mut self.operations);
        let receive = self.link_ready;
        if receive {
            self.link.begin_receive(&mut self.operations);
        }
        self.engine.run(&mut self.operations);
        let lost = self.link.end_publish(&self.operations);
        self.conclude_publish(lost);
        let mut frames = 0;
        if receive {
            let received = self.link.end_receive(&self.operations);
            self.link_ready = !received.empty;
            frames = received.frames;
            if frames > 0 {
                self.load.hears(now);
            }
        }
        self.stopwatch.taken(frames, Now::read);
        self.tell_faults();
    }

    fn conclude_publish(&mut self, lost: usize) {
        self.stopwatch.published(Now::read);
        (0..lost).for_each(|_| self.drop_frame(DropReason::LinkFull));
        while let Some(number) = self.link.stand_in()
            && let Some(frame) = self.link.take_detoured()
        {
            let mail = ToWorker::FrameToGuest(frame);
            if self.workers.get(number as usize).is_none_or(|mailbox| mailbox.put(mail).is_err()) {
                self.drop_frame(DropReason::WorkerFull);
            }
        }
    }

    fn tell_faults(&mut self) {
        while let Some(words) = self.link.take_fault() {
            self.drop_frame(DropReason::QueueFault);
            // Should the mailbox be full, the counter tells it.
            let _ = self.slow.put(ToSlow::QueueFailed(words));
        }
    }

    /// Publishes committed frames at once, to make room for more.
    fn publish_now(&mut self) {
        self.publishing.clear();
        self.link.begin_publish(&mut self.publishing);
        self.engine.run(&mut self.publishing);
        let lost = self.link.end_publish(&self.publishing);
        self.conclude_publish(lost);
        self.tell_faults();
    }

    fn take_events(&mut self, now: Now) {
        let mut events = std::mem::take(&mut self.events);
        for event in events.drain(..) {
            match event.token.kind {
                token_kind::LINK => {
                    self.link_ready = true;
                    self.link.woken(event.token.slot.index as usize);
                }
                token_kind::WAKER => self.waker.clear(),
                token_kind::STREAM => self.stream_event(event, now),
                token_kind::LISTENER => self.accept_clients(event.token.slot, now),
                token_kind::MAPPING => self.mapping_event(event),
                token_kind::JOIN_CLIENT => self.join_event(event, false, now),
                token_kind::JOIN_GUEST => self.join_event(event, true, now),
                _ => {}
            }
        }
        self.events = events;
        for listener in std::mem::take(&mut self.waiting_listeners) {
            self.accept_clients(listener, now);
        }
    }

    fn take_mail(&mut self, now: Now) -> bool {
        // A bounded share of each pass: mail may come faster than it is read.
        const AT_ONCE: usize = 64;
        // What is put back while it is read comes with the next pass.
        for _ in 0..self.mail.len().min(AT_ONCE) {
            let Some(mail) = self.mail.take() else { return false };
            match mail {
                ToWorker::FrameToGuest(frame) => self.frame_to_guest(&frame),
                ToWorker::FrameFromGuest(frame) => {
                    self.was_handed_a_frame(now);
                    self.adopt_frame(frame, now);
                }
                ToWorker::Client { publication, socket, peer, guest_socket } => {
                    if let Some(socket) = guest_socket {
                        self.keep_guest_socket(socket);
                    }
                    self.admit_client(publication, socket, peer, now);
                }
                ToWorker::Publish(publication, socket) => self.publish(publication, socket, now),
                ToWorker::Unpublish { id, receipt } => {
                    self.unpublish(id);
                    self.receipts.push(receipt);
                }
                ToWorker::Exclude { port, excluded: true } => self.ports.excluded.insert(port),
                ToWorker::Exclude { port, excluded: false } => self.ports.excluded.remove(port),
                ToWorker::Probe(publication) => self.probe(publication, now),
                ToWorker::GuestSockets { v4, sockets } => self.add_guest_sockets(v4, sockets),
                ToWorker::Rehome { stream, socket, peer } => self.rehome(stream, socket, peer),
                ToWorker::Break { stream } => self.break_stream(stream),
                ToWorker::Unanswerable(client) => self.unanswerable.note(client, now),
                ToWorker::Addresses(addresses, _receipt) => {
                    self.addresses = addresses;
                    self.readdress_published_datagrams();
                }
                ToWorker::AddressesGone(gone) => self.addresses_gone(&gone),
                ToWorker::TellLatencies(asker) => {
                    // Who has asked may have stopped waiting.
                    let _ = asker.send(self.stopwatch.latencies().0.clone());
                }
                ToWorker::TakePart => self.take_part(now),
                ToWorker::Stop => self.stop(now),
            }
        }
        !self.mail.is_empty()
    }

    fn take_deadlines(&mut self, now: Now) {
        if self.listeners_resume.is_some_and(|at| at <= now) {
            self.listeners_resume = None;
            self.waiting_listeners.append(&mut self.paused_listeners);
        }
        let mut fired = std::mem::take(&mut self.fired);
        self.stream_timers.advance(now, |index| fired.push(index));
        for index in fired.drain(..) {
            if let Some(slot) = self.streams.slot_at(index) {
                self.stream_deadline(slot, now);
            }
        }
        self.datagram_timers.advance(now, |index| fired.push(index));
        for index in fired.drain(..) {
            self.datagram_deadline(index, now);
        }
        self.fired = fired;
    }

    /// Clients of a published port come to `socket` from now on.
    pub fn publish(&mut self, publication: Publication, socket: S::Socket, now: Now) {
        match publication.protocol {
            PublishedProtocol::Tcp => {
                self.add_listener(publication, socket);
                for v4 in [true, false] {
                    self.ask_for_guest_sockets(v4);
                }
            }
            PublishedProtocol::Udp => self.add_published_datagrams(publication, socket, now),
        }
    }

    /// A port that is published in name only is to be published no more.
    fn tell_unserved(&self, publication: Publication) {
        self.drop_frame(DropReason::FlowBudget);
        // Should the mailbox be full, the counter tells it.
        let _ = self.slow.put(ToSlow::Unserved { publication: publication.id });
    }

    fn unpublish(&mut self, id: u32) {
        match self.published.remove(&id) {
            Some(Served::Listener(slot)) => self.remove_listener(slot),
            Some(Served::Datagrams(slot)) => self.close_mapping_and_flows(slot),
            None => {}
        }
    }

    /// Resets every connection on both sides.
    fn reset_flows(&mut self, now: Now) {
        self.take_moved(now);
        for slot in self.streams.slots() {
            if let Some(stream) = self.streams.get_mut(slot) {
                stream.relay.abandon();
            }
            self.touch(slot);
        }
        self.settle(now);
        self.end_all_joins();
    }

    /// Resets every connection on both sides and ends the worker.
    fn stop(&mut self, now: Now) {
        if self.stopped {
            return;
        }
        self.reset_flows(now);
        self.publish_now();
        for slot in self.listeners.slots() {
            self.remove_listener(slot);
        }
        self.close_all_mappings();
        // Submits what `unwatch` has queued, so that closing a socket closes it.
        self.engine.wait(Some(Duration::ZERO), &mut self.events);
        self.stopped = true;
    }

    /// The link changes: none of its descriptors is watched meanwhile.
    fn take_link_news(&mut self, now: Now) {
        self.disarm_link();
        self.link_ready = true;
        if self.link.take_news().guest_gone {
            self.reset_flows(now);
        }
    }

    fn disarm_link(&mut self) {
        for (which, armed) in self.armed.iter_mut().enumerate() {
            if let Some(armed) = armed.take() {
                self.engine.unwatch(armed.fd, Self::link_token(which));
            }
        }
    }

    /// Ends a host socket: with a reset, or as the peer expects it when both directions were closed.
    fn close_host(engine: &mut E, sockets: &mut S, host: HostSide<S::Socket>, slot: Slot, reset: bool) {
        engine.unwatch(host.socket.fd(), Token { kind: token_kind::STREAM, slot });
        if reset {
            sockets.reset(host.socket);
        }
    }
}
