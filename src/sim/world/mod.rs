//! The world of one seed: all models and workers, joined, in virtual time.
//!
//! Whatever happens stands in an agenda. A worker's pass takes no time itself but has the next one a while later; what a
//! pass did comes to others after it. A worker that would sleep runs again when its engine has something to report, when
//! its mailbox wakes it, or at its next deadline: a wake-up that is lost is seen as work that nobody does. When it is over,
//! and whether it ended well, is told by [`verdict`].

mod verdict;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use crate::exchange::mail::{Publication, ToSlow, ToWorker};
use crate::policy::publish::PublishedProtocol;
use crate::random::Random;
use crate::time::Now;

use super::check::{Books, Ending, Name};
use super::clock::Agenda;
use super::datagram_socket::Datagram;
use super::faults::{Fault, Planting};
use super::guest::Guest;
use super::kernel::Kernel;
use super::link::Frame;
use super::pattern::Pattern;
use super::peers::Peers;
use super::plan::{Answer, MS, Opening, Plan, S};
use super::servers::{Return, Servers};
use super::sockets::{Connections, ModelSocket};
use super::stage::{Stage, Tracing};
use super::station::{Office, Station};
use super::stream_socket::{Standing, StreamSocket};
use super::wire::{self, Wire};

pub use verdict::Outcome;

/// Time on the way between the host and its peers, in nanoseconds.
const PEER_LATENCY_NS: (u64, u64) = (5_000, 200_000);
/// Time that a sleeping worker takes to wake, in nanoseconds.
const WAKE_NS: (u64, u64) = (1_000, 50_000);
/// When the clock of a world starts: not at zero, so that nothing takes a zero for a time.
const START: Now = Now(1_000 * S);

/// How often, in a million, a conversation stays on a queue that it has come to by mistake.
const FOR_GOOD: u64 = 200_000;

/// Things that happen at one moment at the most.
const CROWD_MAX: u32 = 100_000;

/// What is to happen.
enum Happening {
    /// A worker's next pass.
    Pass(usize),
    /// A frame comes to a queue of the link.
    ToLink(usize, Frame),
    /// A frame comes to the guest.
    ToGuest(Frame),
    /// The guest has something to do.
    Guest,
    /// A peer looks at its socket.
    Look(usize),
    /// A peer has something to do.
    Peer(usize),
    /// A connection of the plan begins.
    Start(usize),
    /// Connects have their outcome.
    Outcomes,
    /// A queue offers no room to hythe from now on, or does again.
    Stall(usize, bool),
    /// The guest looks after a queue's buffers.
    Refill(usize),
    /// The guest does not use a queue from now on, or does again.
    Switch(usize, bool),
    /// A worker deals its streams.
    Deal,
    /// Something comes back for a datagram.
    Back(Return),
    /// The slow path asks whether the guest listens for a connection.
    Probe(usize),
    /// The clock jumps.
    Jump(u64),
}

/// Runs a plan, with a planted bug or without.
pub fn run(plan: &Plan, fault: Option<Fault>, tracing: Tracing) -> Outcome {
    let _planted = Planting::of(fault);
    let mut random = Random::new(plan.seed ^ 0x0077_6f72_6c64);
    let pattern = Pattern::new(&mut random);
    let books = Books::new(plan.connections.len(), plan.mtu);
    let stage = Rc::new(Stage::new(START, tracing, pattern, books));
    let ran = catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(plan.clone(), stage.clone(), random);
        world.run();
        world.outcome()
    }));
    ran.unwrap_or_else(|panic| {
        let what = panic.downcast_ref::<String>().cloned();
        let what = what.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
        Outcome::of_panic(plan.seed, &what.unwrap_or_default(), &stage)
    })
}

struct World {
    plan: Plan,
    stage: Rc<Stage>,
    random: Random,
    kernel: Rc<RefCell<Kernel>>,
    connections: Rc<RefCell<Connections>>,
    office: Office,
    stations: Vec<Station>,
    guest: Guest,
    peers: Peers,
    servers: Servers,
    agenda: Agenda<Happening>,
    to_link: Wire,
    to_guest: Wire,
    /// The queue of each conversation of the guest's.
    queues: BTreeMap<Name, usize>,
    /// The listeners of connections to the guest.
    listeners: BTreeMap<usize, Vec<usize>>,
    guest_due: Option<Now>,
    outcome_due: Option<Now>,
    peers_due: Vec<Option<Now>>,
    /// Connections that wait for the end of another one.
    waiting: Vec<usize>,
    started: Vec<bool>,
    overflowed: u64,
    frames_to_guest: u64,
    probes: Vec<u32>,
}

impl World {
    fn new(plan: Plan, stage: Rc<Stage>, mut random: Random) -> Self {
        let kernel = Kernel::new(stage.clone(), plan.host, random.fork(), plan.workers);
        let kernel = Rc::new(RefCell::new(kernel));
        let connections = Rc::new(RefCell::new(Connections::new(&plan.connections)));
        let mut office = Office::new(&plan, &mut random);
        let stations: Vec<Station> = (0..plan.workers)
            .map(|id| office.open_station(id, &plan, &stage, &kernel, &connections, &mut random))
            .collect();
        let count = plan.connections.len();
        let follows = |number: &usize| plan.connections[*number].follows.is_some();
        let waiting = (0..count).filter(follows).collect();
        Self {
            guest: Guest::new(stage.clone(), &plan, random.fork()),
            peers: Peers::new(stage.clone(), kernel.clone(), &plan.connections, random.fork()),
            servers: Servers::new(stage.clone(), &plan.datagrams),
            to_link: Wire::new(plan.wire, random.fork()),
            to_guest: Wire::new(plan.wire, random.fork()),
            random,
            kernel,
            connections,
            office,
            stations,
            agenda: Agenda::default(),
            queues: BTreeMap::new(),
            listeners: BTreeMap::new(),
            guest_due: None,
            outcome_due: None,
            peers_due: vec![None; count],
            waiting,
            started: vec![false; count],
            overflowed: 0,
            frames_to_guest: 0,
            probes: vec![0; count],
            plan,
            stage,
        }
    }

    fn after(&mut self, range_ns: (u64, u64)) -> Now {
        Now(self.stage.now().0 + self.random.within(range_ns))
    }

    fn run(&mut self) {
        self.prepare();
        let mut crowd = 0;
        let horizon = START.0 + self.plan.horizon_ns;
        while !self.stage.has_failed() {
            let Some(at) = self.agenda.next() else { break };
            if at.0 > horizon {
                break;
            }
            let at = at.max(self.stage.now());
            crowd = if at == self.stage.now() { crowd + 1 } else { 0 };
            self.stage
                .check(crowd < CROWD_MAX, || "time stands still: somebody always has something to do".into());
            self.stage.set_now(at);
            let Some(happening) = self.agenda.take(at) else { break };
            self.happen(happening, at);
            self.attend();
            if self.is_over() && self.is_at_rest() {
                break;
            }
        }
        self.conclude();
    }

    /// What stands in the agenda at the start.
    fn prepare(&mut self) {
        for number in 0..self.plan.connections.len() {
            let connection = &self.plan.connections[number];
            let (start_ns, follows, opening) = (connection.start_ns, connection.follows, connection.opening);
            let outcome = connection.outcome();
            let mut books = self.stage.books.borrow_mut();
            let progress = &mut books.progress[number];
            progress.disturbed = outcome != Ending::Closed;
            progress.host_connected = matches!(opening, Opening::Service { .. });
            drop(books);
            if let Opening::Inbound { guest, .. } = opening {
                self.publish(number, guest.port);
            }
            if follows.is_none() {
                self.agenda.add(Now(START.0 + start_ns), Happening::Start(number));
            }
        }
        for index in 0..self.stations.len() {
            self.schedule_pass(index, START);
            if let Some((every_ns, _)) = self.plan.link.stalls {
                let at = self.after((0, every_ns));
                self.agenda.add(at, Happening::Stall(index, true));
            }
            if let Some(every_ns) = self.plan.link.switches.filter(|_| index > 0) {
                let at = self.after((0, every_ns));
                self.agenda.add(at, Happening::Switch(index, true));
            }
        }
        if let Some(every_ns) = self.plan.deals.filter(|_| self.stations.len() > 1) {
            let at = self.after((0, every_ns));
            self.agenda.add(at, Happening::Deal);
        }
        if let Some((at_ns, by_ns)) = self.plan.jump {
            self.agenda.add(Now(START.0 + at_ns), Happening::Jump(by_ns));
        }
        self.attend();
    }

    fn publish(&mut self, number: usize, guest_port: u16) {
        let protocol = PublishedProtocol::Tcp;
        let publication = Publication { id: number as u32, guest_port, protocol };
        for index in 0..self.stations.len() {
            let (listener, fd) = self.kernel.borrow_mut().add_listener();
            self.listeners.entry(number).or_default().push(listener);
            let socket = ModelSocket::new(fd, &self.kernel);
            self.mail(index, ToWorker::Publish(publication, socket));
        }
    }

    fn mail(&mut self, index: usize, mail: ToWorker<ModelSocket>) {
        let put = self.office.workers[index].put(mail).is_ok();
        self.stage.check(put, || format!("the mailbox of worker {index} is full"));
        self.stations[index].alarm.suspected.set(true);
    }

    fn happen(&mut self, happening: Happening, at: Now) {
        match happening {
            Happening::Pass(index) if self.stations[index].due.is_some_and(|due| due <= at) => {
                self.pass(index);
            }
            Happening::Pass(_) => {}
            Happening::ToLink(queue, frame) => {
                let mut port = self.stations[queue].port.borrow_mut();
                if port.inbox.len() < self.plan.link.queue {
                    port.inbox.push_back(frame);
                } else {
                    self.overflowed += 1;
                }
            }
            Happening::ToGuest(frame) => self.guest.receive(&frame),
            Happening::Guest => {
                self.guest_due = None;
                self.guest.run();
            }
            Happening::Look(id) => {
                if let Some(connection) = self.peers.look(id) {
                    self.run_peer(connection);
                }
            }
            Happening::Peer(connection) => {
                self.peers_due[connection] = None;
                self.run_peer(connection);
            }
            Happening::Start(number) => self.start(number),
            Happening::Outcomes => {
                self.outcome_due = None;
                self.kernel.borrow_mut().settle_connects(at);
            }
            Happening::Stall(queue, on) => self.stall(queue, on),
            Happening::Refill(queue) => self.stations[queue].port.borrow_mut().room.add(),
            Happening::Switch(queue, off) => self.switch(queue, off),
            Happening::Deal => self.deal(),
            Happening::Back(Return::Datagram(datagram)) => {
                self.kernel.borrow_mut().datagram_arrives(datagram);
            }
            Happening::Back(Return::Error(datagram, number, queued)) => {
                self.kernel.borrow_mut().datagram_fails(&datagram, number, queued);
            }
            Happening::Probe(number) => self.probe(number),
            Happening::Jump(by_ns) => self.jump(by_ns),
        }
    }

    fn start(&mut self, number: usize) {
        self.started[number] = true;
        match self.plan.connections[number].opening {
            Opening::Inbound { client, guest, .. } => {
                let plan = &self.plan.connections[number];
                let local = crate::frame::address::Endpoint { address: client.address, port: guest.port };
                let buffers = (plan.send_buffer, plan.receive_buffer);
                let socket = StreamSocket::new(number, local, client, Standing::Open, buffers);
                let listener = self.random.pick(&self.listeners[&number]);
                let called = self.kernel.borrow_mut().client_calls(listener, socket);
                self.stage.books.borrow_mut().progress[number].host_connected = true;
                if let Some(id) = called {
                    self.agenda.add(self.stage.now(), Happening::Look(id));
                }
            }
            Opening::Outbound { host, .. } => {
                self.connections.borrow_mut().by_destination.insert(host, number);
                self.guest.open(number);
            }
            Opening::Service { .. } => self.guest.open(number),
        }
        self.stage.trace(60, || format!("world   {number:>3} begins"));
    }

    fn run_peer(&mut self, connection: usize) {
        if let Some((worker, mail)) = self.peers.act(connection) {
            self.mail(usize::from(worker), mail);
        }
    }

    fn stall(&mut self, queue: usize, on: bool) {
        let Some((every_ns, for_ns)) = self.plan.link.stalls else { return };
        self.stations[queue].port.borrow_mut().room.stall(on);
        let range = if on { (1, for_ns) } else { (every_ns / 2, every_ns * 3 / 2) };
        if on || !self.is_over() {
            let at = self.after(range);
            self.agenda.add(at, Happening::Stall(queue, !on));
        }
    }

    fn switch(&mut self, queue: usize, off: bool) {
        let Some(every_ns) = self.plan.link.switches else { return };
        self.stations[queue].port.borrow_mut().off = off;
        // Some are never used again.
        let again = if off { self.random.chance(700_000) } else { !self.is_over() };
        if again {
            let at = self.after((every_ns / 2, every_ns * 3 / 2));
            self.agenda.add(at, Happening::Switch(queue, !off));
        }
    }

    fn deal(&mut self) {
        let Some(every_ns) = self.plan.deals else { return };
        let count = self.stations.len() as u64;
        let (dealer, step) = (self.random.below(count), 1 + self.random.below(count - 1));
        self.stations[dealer as usize].worker.deal_to(((dealer + step) % count) as u8, self.stage.now());
        if !self.is_over() {
            let at = self.after((every_ns / 2, every_ns * 3 / 2));
            self.agenda.add(at, Happening::Deal);
        }
    }

    /// The clock jumps: connections that are being opened may be given up for it.
    fn jump(&mut self, by_ns: u64) {
        for number in 0..self.started.len() {
            if self.started[number] && !self.guest.is_settled(number) {
                let mut books = self.stage.books.borrow_mut();
                let progress = &mut books.progress[number];
                progress.disturbed |= progress.guest_over.is_none();
            }
        }
        self.stage.trace(61, || format!("world       the clock jumps by {} s", by_ns / S));
        self.stage.set_now(Now(self.stage.now().0 + by_ns));
    }

    fn probe(&mut self, number: usize) {
        if let Opening::Inbound { guest, .. } = self.plan.connections[number].opening {
            let protocol = PublishedProtocol::Tcp;
            let publication = Publication { id: number as u32, guest_port: guest.port, protocol };
            let index = self.random.below(self.stations.len() as u64) as usize;
            self.mail(index, ToWorker::Probe(publication));
        }
    }

    // Workers.

    fn schedule_pass(&mut self, index: usize, at: Now) {
        self.stations[index].due = Some(at);
        self.agenda.add(at, Happening::Pass(index));
    }

    fn pass(&mut self, index: usize) {
        let starved = self.stations[index].pass(&self.stage);
        let station = &self.stations[index];
        let next = if station.asleep {
            station.worker.wakes_at().map(|at| at.max(Now(self.stage.now().0 + 1)))
        } else if starved {
            // Nothing can come of a pass before the guest offers room.
            Some(self.after((100_000, 500_000)))
        } else if self.random.chance(self.plan.preempted) {
            Some(self.after((MS, 20 * MS)))
        } else {
            Some(self.after(self.plan.pass_ns))
        };
        self.stations[index].due = None;
        if let Some(at) = next {
            self.schedule_pass(index, at);
        }
        for (other, station) in self.stations.iter().enumerate() {
            if other != index {
                station.alarm.suspected.set(true);
            }
        }
        self.settle_acknowledgements();
        let frames = std::mem::take(&mut self.stations[index].port.borrow_mut().outbox);
        self.refill(index, frames.len());
        for frame in frames {
            self.frame_to_guest(index, frame);
        }
        self.take_slow_mail();
    }

    /// The guest has taken frames out of a queue's buffers, and will look after these.
    fn refill(&mut self, index: usize, frames: usize) {
        self.stations[index].port.borrow_mut().room.comes_back(frames);
        if let Some(ring) = self.plan.link.room.filter(|_| frames > 0) {
            let at = self.after(ring.after_ns);
            self.agenda.add(at, Happening::Refill(index));
        }
    }

    fn settle_acknowledgements(&self) {
        let mut books = self.stage.books.borrow_mut();
        let waiting =
            |key: &_| self.stations.iter().map(|station| station.worker.waiting_bytes(key)).sum::<usize>();
        let right = books.settle_acknowledgements(waiting);
        drop(books);
        self.stage.expect(right);
    }

    fn frame_to_guest(&mut self, queue: usize, frame: Frame) {
        self.frames_to_guest += 1;
        if let Some((remote, guest)) = wire::ends(&frame) {
            self.queues.entry((guest, remote)).or_insert(queue);
        }
        let now = self.stage.now();
        let frames = if self.to_guest.cuts() { wire::cut(frame) } else { vec![frame] };
        let Self { to_guest, agenda, .. } = self;
        for frame in frames {
            to_guest.carry(now, frame, &mut |at, frame| agenda.add(at, Happening::ToGuest(frame)));
        }
    }

    /// The queue on which a frame of the guest's comes.
    fn queue_of(&mut self, frame: &Frame) -> usize {
        let count = self.stations.len() as u64;
        let any = self.random.below(count) as usize;
        let wanted = if self.random.chance(self.plan.wrong_queue) {
            if let Some(ends) = wire::ends(frame).filter(|_| self.random.chance(FOR_GOOD)) {
                self.queues.insert(ends, any);
            }
            any
        } else {
            wire::ends(frame).map_or(0, |ends| *self.queues.entry(ends).or_insert(any))
        };
        if self.stations[wanted].port.borrow().off { 0 } else { wanted }
    }

    /// The slow path's mail.
    fn take_slow_mail(&mut self) {
        while let Some(mail) = self.office.slow.take() {
            match mail {
                ToSlow::Stream { worker, stream, socket, guest, .. } => {
                    let fd = std::os::fd::AsRawFd::as_raw_fd(&socket);
                    let mut connections = self.connections.borrow_mut();
                    let place = connections.pairs.iter().position(|(known, _)| *known == fd);
                    let id = place.map(|at| connections.pairs.swap_remove(at).1);
                    let number = connections.plans.iter().position(
                        |plan| matches!(plan.opening, Opening::Service { guest: who, .. } if who == guest),
                    );
                    drop(connections);
                    if let (Some(id), Some(number)) = (id, number) {
                        self.peers.serve(number, id, worker, stream);
                        self.agenda.add(self.stage.now(), Happening::Look(id));
                    }
                }
                ToSlow::Listens { publication, listens } => self.hear_listens(publication as usize, listens),
                ToSlow::Unserved { publication } => {
                    self.stage.check(false, || format!("publication {publication} is not served"));
                }
                ToSlow::Frame { .. } | ToSlow::WantSockets { .. } | ToSlow::QueueFailed(_) => {}
            }
        }
    }

    fn hear_listens(&mut self, number: usize, listens: bool) {
        let Opening::Inbound { answer, .. } = self.plan.connections[number].opening else { return };
        let accepts = matches!(answer, Answer::Accepts | Answer::GatewayOnly);
        self.stage
            .check(listens == accepts, || format!("publication {number}: listens is told as {listens}"));
        self.stage.trace(62, || format!("slow    {number:>3} listens: {listens}"));
        self.probes[number] += 1;
        if self.probes[number] < 3 {
            let at = self.after((S, 3 * S));
            self.agenda.add(at, Happening::Probe(number));
        }
    }

    /// After anything has happened: passes on what came of it.
    fn attend(&mut self) {
        let now = self.stage.now();
        for frame in std::mem::take(&mut self.guest.sent) {
            let queue = self.queue_of(&frame);
            let Self { to_link, agenda, .. } = self;
            to_link.carry(now, frame, &mut |at, frame| agenda.add(at, Happening::ToLink(queue, frame)));
        }
        let (looks, datagrams, outcome) = {
            let mut kernel = self.kernel.borrow_mut();
            let looks = std::mem::take(&mut kernel.for_peers);
            (looks, std::mem::take(&mut kernel.sent), kernel.next_outcome())
        };
        let mut last = None;
        for id in looks {
            if last.replace(id) != Some(id) {
                let at = self.after(PEER_LATENCY_NS);
                self.agenda.add(at, Happening::Look(id));
            }
        }
        for datagram in datagrams {
            self.serve(&datagram);
        }
        if let Some(at) = outcome
            && self.outcome_due.is_none_or(|due| at < due)
        {
            self.outcome_due = Some(at);
            self.agenda.add(at, Happening::Outcomes);
        }
        if let Some(at) = self.guest.next()
            && self.guest_due.is_none_or(|due| at < due)
        {
            self.guest_due = Some(at);
            self.agenda.add(at.max(now), Happening::Guest);
        }
        for connection in 0..self.peers_due.len() {
            if let Some(at) = self.peers.next(connection)
                && self.peers_due[connection].is_none_or(|due| at < due)
            {
                self.peers_due[connection] = Some(at);
                self.agenda.add(at.max(now), Happening::Peer(connection));
            }
        }
        self.wake_sleepers();
        self.begin_followers();
    }

    fn serve(&mut self, datagram: &Datagram) {
        if let Some(back) = self.servers.receive(datagram) {
            let at = self.after(PEER_LATENCY_NS);
            self.agenda.add(at, Happening::Back(back));
        }
    }

    fn wake_sleepers(&mut self) {
        for index in 0..self.stations.len() {
            let station = &self.stations[index];
            if !station.asleep || station.waking {
                continue;
            }
            let reports = self.kernel.borrow().has_reports(index);
            if reports || station.port.borrow().rings() || station.alarm.rings() {
                self.stations[index].waking = true;
                let at = self.after(WAKE_NS);
                self.schedule_pass(index, at);
            }
        }
    }

    /// Connections begin whose predecessors are over.
    fn begin_followers(&mut self) {
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.retain(|number| {
            let plan = &self.plan.connections[*number];
            let over = plan.follows.is_none_or(|first| self.connection_is_over(first));
            if over {
                let at = Now(self.stage.now().0 + plan.start_ns);
                self.agenda.add(at, Happening::Start(*number));
            }
            !over
        });
        self.waiting = waiting;
    }
}
