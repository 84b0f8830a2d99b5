//! A worker in its surroundings: link, engine, sockets, mailbox, and an eye on how it spends its passes.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use crate::exchange::mail::{ToSlow, ToWorker};
use crate::exchange::{Mailbox, Waker};
use crate::flow::admit::{Descriptors, Limits};
use crate::flow::key::HashSecret;
use crate::flow::table::FlowTable;
use crate::frame::drop_reason::DropReason;
use crate::host::processors::Pinning;
use crate::link::Capabilities;
use crate::observe::counters::{Counters, Metric};
use crate::policy::addresses::{Addresses, Family, SUBNET, SUBNET6};
use crate::policy::guest_mac::GuestMac;
use crate::policy::port_set::PortSet;
use crate::policy::{Spread, UdpFiltering};
use crate::random::Random;
use crate::time::Now;
use crate::worker::idle::Seat;
use crate::worker::load::Loads;
use crate::worker::{Moves, Parts, Worker};

use super::engine::{Alarm, ModelEngine};
use super::faults::{FaultyEngine, FaultyLink, FaultySockets};
use super::guest::{GATEWAY_MAC, MAC};
use super::kernel::{FIRST_LINK_FD, Kernel};
use super::link::{ModelLink, Port};
use super::plan::{Plan, gateway_address, guest_address, host_address};
use super::room::Room;
use super::sockets::{Connections, ModelSocket, ModelSockets};
use super::stage::Stage;

type SimulatedWorker = Worker<FaultyLink<ModelLink>, FaultyEngine<ModelEngine>, FaultySockets<ModelSockets>>;

/// Passes in a row that may come to nothing without a sleep.
const IDLE_PASSES_MAX: u32 = 8;
/// Bytes that a flow may hold: what waits for the socket, and what is held out of order.
const BUFFERED_MAX: usize = (64 + 256 + 64) << 10;
/// Things that wait for a worker, or for the slow path.
const MAILBOX: usize = 1024;
/// Streams that wait for a worker: so few that there is not always room.
const MOVES_HERE: usize = 2;
const FLOWS: u32 = 512;

/// What all workers share.
pub struct Office {
    /// The workers' mailboxes.
    pub workers: Vec<Mailbox<ToWorker<ModelSocket>>>,
    /// Streams on their way to the workers.
    moves: Vec<Moves<ModelSocket>>,
    /// The slow path's.
    pub slow: Mailbox<ToSlow>,
    /// The flow table.
    pub flows: Arc<FlowTable>,
    /// What flows may hold.
    pub limits: Limits,
    wakers: Vec<Arc<Waker>>,
    secret: [u64; 2],
    addresses: Arc<Addresses>,
}

fn waker() -> Arc<Waker> {
    match Waker::new() {
        Ok(waker) => Arc::new(waker),
        Err(error) => panic!("no eventfd for a simulated worker: {error}"),
    }
}

fn addresses() -> Addresses {
    let family = |v4: bool, subnet: IpNet| Family {
        subnet,
        gateway: gateway_address(v4),
        host: host_address(v4),
        guest: guest_address(v4),
    };
    Addresses {
        gateway_mac: GATEWAY_MAC,
        v4: Some(family(true, SUBNET.into())),
        v6: Some(family(false, SUBNET6.into())),
        global_prefix: None,
        host_loopback: true,
        host_addresses: true,
        metadata: false,
        guest_api: false,
        egress: std::sync::Arc::default(),
        proxy: None,
        transparent: crate::policy::proxy::TransparentPorts::default(),
        snat_from: Vec::new(),
        own: Vec::new(),
        outbound: crate::policy::outbound::Outbound::default(),
    }
}

impl Office {
    /// Mailboxes and table for the workers of a plan.
    ///
    /// # Panics
    /// When there is no descriptor left for an eventfd.
    pub fn new(plan: &Plan, random: &mut Random) -> Self {
        let secret = [random.bits(), random.bits()];
        let wakers: Vec<_> = (0..plan.workers).map(|_| waker()).collect();
        Self {
            workers: wakers.iter().map(|waker| Mailbox::new(MAILBOX, waker.clone())).collect(),
            moves: wakers.iter().map(|waker| Mailbox::new(MOVES_HERE, waker.clone())).collect(),
            slow: Mailbox::new(MAILBOX, waker()),
            flows: Arc::new(FlowTable::new(FLOWS, HashSecret(secret))),
            limits: Limits {
                descriptors: Descriptors::new(1_000),
                connects_per_destination: 8,
                connects: 64,
            },
            wakers,
            secret,
            addresses: Arc::new(addresses()),
        }
    }

    /// A worker.
    ///
    /// # Panics
    /// When the worker cannot be made, for want of memory or of a descriptor.
    pub fn open_station(
        &mut self,
        id: usize,
        plan: &Plan,
        stage: &Rc<Stage>,
        kernel: &Rc<RefCell<Kernel>>,
        connections: &Rc<RefCell<Connections>>,
        random: &mut Random,
    ) -> Station {
        let room = Room::new(plan.link.ring, plan.link.room);
        let port = Rc::new(RefCell::new(Port { room, ..Port::default() }));
        let capabilities = Capabilities {
            mtu: plan.mtu,
            tcp_segmentation: plan.tcp_segmentation,
            udp_segmentation: plan.udp_segmentation,
        };
        let fd = FIRST_LINK_FD + id as i32;
        let link = ModelLink::new(fd, stage.clone(), plan.link, capabilities, port.clone(), random.fork());
        let alarm = Rc::new(Alarm::new(self.wakers[id].clone()));
        let engine = ModelEngine::new(id, stage.clone(), kernel.clone(), port.clone(), alarm.clone());
        let sockets =
            ModelSockets::new(stage.clone(), plan.host, kernel.clone(), connections.clone(), random.fork());
        let counters = Arc::new(Counters::default());
        let parts = Parts {
            id: id as u8,
            link: FaultyLink::new(link, random.fork()),
            engine: FaultyEngine::new(engine, random.fork()),
            sockets: FaultySockets(sockets),
            flows: self.flows.clone(),
            flows_max: FLOWS,
            limits: self.limits.clone(),
            addresses: self.addresses.clone(),
            guest_mac: GuestMac::given(MAC),
            udp_filtering: UdpFiltering::AddressDependent,
            counters: counters.clone(),
            waker: self.wakers[id].clone(),
            mail: self.workers[id].clone(),
            workers: self.workers.clone(),
            moves: self.moves.clone(),
            slow: self.slow.clone(),
            guest_in_kernel: false,
            excluded_ports: PortSet::default(),
            secret: self.secret,
            recorder: None,
            spin: Duration::ZERO,
            loads: Loads::new(1),
            spread: Spread::Always,
            seat: Seat::default(),
            pinning: Pinning::default(),
            now: stage.now(),
        };
        let worker = match Worker::new(parts) {
            Ok(worker) => worker,
            Err(error) => panic!("a simulated worker cannot be made: {error}"),
        };
        Station {
            worker,
            port,
            alarm,
            counters,
            due: None,
            asleep: false,
            waking: false,
            passes: 0,
            wakes: 0,
            idle: 0,
        }
    }
}

/// A worker with what the world sees of it.
pub struct Station {
    /// The worker.
    pub worker: SimulatedWorker,
    /// The far side of its link.
    pub port: Rc<RefCell<Port>>,
    /// What wakes it.
    pub alarm: Rc<Alarm>,
    counters: Arc<Counters>,
    /// When its next pass is.
    pub due: Option<Now>,
    /// It sleeps.
    pub asleep: bool,
    /// It sleeps, but something has woken it.
    pub waking: bool,
    /// Passes so far.
    pub passes: u64,
    /// Sleeps that ended.
    pub wakes: u64,
    idle: u32,
}

impl Station {
    /// One pass, and the sleep behind it if there is nothing to do. Returns whether all that it can do is to wait for
    /// the guest to offer room.
    pub fn pass(&mut self, stage: &Stage) -> bool {
        if std::mem::take(&mut self.asleep) {
            self.waking = false;
            self.wakes += 1;
            self.worker.wake_up();
        }
        let before = stage.activity.get();
        let busy = self.worker.pass(stage.now());
        self.passes += 1;
        if self.worker.is_stopped() {
            return false;
        }
        let reserved = self.worker.link().inner().reserved();
        stage.check(reserved == 0, || format!("{reserved} spaces are neither committed nor cancelled"));
        self.asleep = self.worker.fall_asleep(busy);
        let waits = self.worker.waits_for_room() || self.worker.link().inner().has_staged();
        stage.check(!self.asleep || !waits || self.port.borrow().room.is_waited_for(), || {
            "a worker sleeps that waits for room, and will not be told of it".into()
        });
        let idle = stage.activity.get() == before && !self.asleep;
        let starved = self.port.borrow().room.is_looked_for();
        self.idle = if idle && !starved { self.idle + 1 } else { 0 };
        stage.check(self.idle <= IDLE_PASSES_MAX, || {
            "a worker spins: passes that come to nothing, and no sleep".into()
        });
        if self.passes.is_multiple_of(32) || self.asleep {
            let held = self.worker.holdings().buffered_bytes_max;
            stage.check(held <= BUFFERED_MAX, || format!("a flow holds {held} bytes"));
        }
        idle && starved
    }

    /// Connections that it has sent to other workers.
    pub fn moves(&self) -> u64 {
        self.counters.metric(Metric::StreamsMoved)
    }

    /// Mappings that its worker has opened.
    pub fn mappings_opened(&self) -> u64 {
        self.counters.metric(Metric::MappingsOpened)
    }

    /// Whether it sleeps and holds on to nothing.
    pub fn is_at_rest(&self) -> bool {
        let holdings = self.worker.holdings();
        self.asleep && !self.waking && holdings == crate::worker::simulated::Holdings::default()
    }

    /// Whether it dropped something for which there was no room.
    pub fn has_dropped_for_want(&self) -> bool {
        let wants = [
            DropReason::LinkFull,
            DropReason::WorkerFull,
            DropReason::SocketFull,
            DropReason::FlowBudget,
            DropReason::DescriptorBudget,
            DropReason::EchoUnavailable,
        ];
        wants.iter().any(|reason| self.counters.dropped(*reason) > 0)
    }
}
