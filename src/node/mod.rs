//! One running hythe: the workers, the slow path, and what they share.

mod provisions;

pub use provisions::Provisions;

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel;
use nix::unistd::geteuid;

use crate::channel::Channel;
use crate::config::Config;
use crate::control::place::{Listening, Plate};
use crate::exchange::mail::{Publication, ToRecorder, ToSlow, ToWorker};
use crate::exchange::{Mailbox, Waker};
use crate::flow::admit::{Descriptors, Limits};
use crate::flow::key::HashSecret;
use crate::flow::table::FlowTable;
use crate::fork::Process;
use crate::host::engine::{Engine, EngineError, EngineKind, epoll::Epoll, uring::Uring};
use crate::host::kernel::KernelSockets;
use crate::host::processors::{Pinning, Processors};
use crate::host::{HOSTS, RESOLV_CONF};
use crate::io::{discard, return_what_is_freed};
use crate::link::Link;
use crate::monitor::Wake;
use crate::netlink::NetworkWatch;
use crate::observe::counters::{self, Counters};
use crate::observe::latency::Latencies;
use crate::observe::recorder::Recorder;
use crate::policy::guest_mac::GuestMac;
use crate::policy::port_set::PortSet;
use crate::sandbox::{self, SandboxError};
use crate::slow;
use crate::slow::dns::readable_directories;
use crate::slow::ports::opening::Delivery;
use crate::slow::ports::table::PortError;
use crate::slow::proxy::certificate_directories;
use crate::time::Now;
use crate::worker::idle::Seat;
use crate::worker::load::Loads;
use crate::worker::{MOVES, Moves, Parts, Worker};

/// Things that wait for a worker, or for the slow path.
const MAILBOX: usize = 1024;
/// How long a worker may take to answer.
const ANSWER: Duration = Duration::from_millis(500);
/// Connects under way to one destination, and in all, of one worker.
const CONNECTS_PER_DESTINATION: u32 = 512;
const CONNECTS: u32 = 8192;

/// Where the host's resolv.conf may lead, by who manages it.
const RESOLVER_DIRECTORIES: [&str; 3] = ["/run/systemd/resolve", "/run/NetworkManager", "/run/resolvconf"];

/// Why hythe cannot run.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A port cannot be published.
    #[error("cannot publish: {0}")]
    Publish(#[from] PortError),
    /// The control socket cannot be made.
    #[error(transparent)]
    Control(#[from] crate::control::place::PlaceError),
    /// The engine that was asked for cannot be had.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The capture file cannot be written.
    #[error("--capture {path}: cannot be written ({error})", path = .path.display())]
    Capture {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Rights could not be given up.
    #[error(transparent)]
    Sandbox(SandboxError),
    /// Something that should always work did not.
    #[error("{what} ({error})")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        error: io::Error,
    },
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> NodeError {
    move |error| NodeError::System { what, error }
}

type WorkerMail = Mailbox<ToWorker<OwnedFd>>;

/// What a link has to do beside its frames, on a thread of its own: it gets what wakes each worker.
pub type Service = Box<dyn FnOnce(Vec<Wake>) + Send>;

/// What a node serves.
pub struct Guest<L> {
    /// The links, one a worker.
    pub links: Vec<L>,
    /// The guest's MAC.
    pub mac: GuestMac,
    /// The host's search domains.
    pub search: Vec<String>,
    /// The way to sockets of the guest's namespace, where it is one of this kernel.
    pub broker: Option<Channel>,
    /// What the link does on a thread of its own, if anything.
    pub service: Option<Service>,
    /// The directory in which something is to be removed at the end.
    pub tidied: Option<PathBuf>,
}

/// A running node.
pub struct Node {
    workers: Vec<JoinHandle<()>>,
    worker_mail: Vec<WorkerMail>,
    slow: Option<JoinHandle<()>>,
    recorder: Option<Recorder>,
    slow_stop: Arc<Waker>,
    counters: Vec<Arc<Counters>>,
    ended: Arc<Waker>,
    /// The name of the control socket goes with this.
    plate: Option<Plate>,
    /// What binds privileged ports, waited for at the end.
    port_broker: Option<Process>,
    /// What starts evaluators of PAC scripts, likewise.
    pac_process: Option<Process>,
}

/// A secret for hashing and for sequence numbers.
fn secret() -> [u64; 2] {
    use rand::Rng;
    let mut random = rand::rng();
    [random.next_u64(), random.next_u64()]
}

impl Node {
    /// Starts the threads, one worker a link.
    pub fn start<L: Link + Send + 'static>(
        config: &Config,
        mut provisions: Provisions,
        guest: Guest<L>,
    ) -> Result<Self, NodeError> {
        let Guest { links, mac: guest_mac, search, broker, service, tidied } = guest;
        let count = links.len();
        let eventfd = || Waker::new().map(Arc::new).map_err(system("cannot make an eventfd"));
        let wakers: Vec<Arc<Waker>> = (0..count).map(|_| eventfd()).collect::<Result<_, _>>()?;
        let worker_mail: Vec<WorkerMail> =
            wakers.iter().map(|waker| Mailbox::new(MAILBOX, waker.clone())).collect();
        let moves: Vec<Moves<OwnedFd>> =
            wakers.iter().map(|waker| Mailbox::new(MOVES, waker.clone())).collect();
        let slow_waker = eventfd()?;
        let slow_mail: Mailbox<ToSlow> = Mailbox::new(MAILBOX, slow_waker.clone());
        let (slow_stop, ended) = (eventfd()?, eventfd()?);
        return_what_is_freed();
        let flows = FlowTable::new(config.max_flows, HashSecret(secret())).with_discard(discard);
        let flows = Arc::new(flows);
        let counters: Vec<Arc<Counters>> = (0..=count).map(|_| Arc::new(Counters::default())).collect();
        let addresses = Arc::new(config.addresses.clone());
        let excluded = provisions.ports.excluded();
        let limits = limits(&provisions);
        let processors = Processors::allowed();
        let (seats, loads) = (Seat::for_processors(processors.count()), Loads::new(count));
        let sandboxed = config.sandbox;
        if sandboxed {
            let api = provisions.api.as_ref().map(Listening::directory);
            close_sandbox(tidied.as_deref().into_iter().chain(api)).map_err(NodeError::Sandbox)?;
        }
        let recorder = start_recorder(provisions.capture.take(), sandboxed)?;
        let mut inherited = deal(std::mem::take(&mut provisions.deliveries), count);
        let mut workers = Vec::new();
        for (id, link) in links.into_iter().enumerate() {
            let raw = provisions.take_raw();
            let seed = WorkerSeed {
                id: id as u8,
                link,
                engine: provisions.engine(),
                processors: processors.clone(),
                seat: seats[id % seats.len()].clone(),
                loads: loads.clone(),
                raw,
                published: std::mem::take(&mut inherited[id]),
                flows: flows.clone(),
                limits: limits.clone(),
                config: config.clone(),
                guest_mac: guest_mac.clone(),
                addresses: addresses.clone(),
                counters: counters[id].clone(),
                waker: wakers[id].clone(),
                mail: worker_mail[id].clone(),
                workers: worker_mail.clone(),
                moves: moves.clone(),
                slow: slow_mail.clone(),
                excluded: excluded.clone(),
                secret: secret(),
                recorder: recorder.as_ref().map(Recorder::mail),
                guest_in_kernel: broker.is_some(),
                ended: ended.clone(),
            };
            let thread = std::thread::Builder::new().name(format!("worker-{id}"));
            workers.push(thread.spawn(move || seed.grow()).map_err(system("cannot start a thread"))?);
        }
        let proxy = proxy_start(&mut provisions, config);
        let api = api_settings(&provisions, config, count);
        let (door, plate) = open_door(&mut provisions);
        let slow_parts = slow::Parts {
            mail: slow_mail,
            waker: slow_waker,
            stop: slow_stop.clone(),
            workers: worker_mail.clone(),
            addresses,
            guest_mac,
            mtu: config.mtu,
            hostname: config.hostname.clone(),
            dns: config.dns.clone(),
            names: config.names.clone(),
            search,
            host_has_default: config.host_has_default,
            ports: provisions.ports,
            proxy,
            routes: provisions.routes,
            api,
            door,
            broker,
            counters: counters[count].clone(),
        };
        let slow = start_slow(slow_parts, provisions.network_watch, ended.clone(), sandboxed)?;
        if let Some(service) = service {
            start_service(service, wakers, ended.clone(), sandboxed)?;
        }
        // This thread has nothing to start any more.
        limit(config.sandbox, sandbox::Thread::Main).map_err(system("cannot limit the first thread"))?;
        Ok(Self {
            workers,
            worker_mail,
            slow: Some(slow),
            recorder,
            slow_stop,
            counters,
            ended,
            plate,
            port_broker: provisions.port_broker,
            pac_process: provisions.pac_process,
        })
    }

    /// The descriptor that becomes readable when a thread has ended.
    pub fn ended_fd(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }

    /// Counters of all threads and latencies of all workers, as lines of text.
    pub fn report(&self) -> String {
        self.text(&self.latencies())
    }

    fn text(&self, latencies: &Latencies) -> String {
        counters::report(&self.counters.iter().map(AsRef::as_ref)) + &latencies.report()
    }

    /// What the workers have recorded, those that have ended or do not answer left out.
    fn latencies(&self) -> Latencies {
        let (asker, answers) = channel::bounded(self.worker_mail.len());
        let living = self.worker_mail.iter().zip(&self.workers).filter(|(_, worker)| !worker.is_finished());
        let asked =
            living.filter(|(mail, _)| mail.put(ToWorker::TellLatencies(asker.clone())).is_ok()).count();
        drop(asker);
        let deadline = Instant::now() + ANSWER;
        let mut all = Latencies::default();
        let told = (0..asked).flat_map(|_| answers.recv_deadline(deadline));
        told.for_each(|latencies| all.add(&Latencies(latencies)));
        all
    }

    /// Resets every connection and ends the threads.
    pub fn stop(mut self) -> String {
        // Nobody is to find a socket that nobody serves.
        drop(self.plate.take());
        let latencies = self.latencies();
        for mail in &self.worker_mail {
            // A worker that is gone, or whose mailbox is full for ever, is not waited for below either.
            while !self.workers.iter().all(JoinHandle::is_finished) && mail.put(ToWorker::Stop).is_err() {
                std::thread::yield_now();
            }
        }
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
        self.slow_stop.signal();
        if let Some(slow) = self.slow.take() {
            let _ = slow.join();
        }
        // The slow path has ended, so these end, too.
        drop((self.port_broker.take(), self.pac_process.take()));
        if let Some(recorder) = self.recorder.take() {
            recorder.finish();
        }
        self.text(&latencies)
    }
}

/// How the guest's streams are led out by name.
fn proxy_start(provisions: &mut Provisions, config: &Config) -> slow::proxy::Start {
    slow::proxy::Start {
        streams: provisions.proxy_streams(),
        mode: config.proxy.mode,
        pac: provisions.pac.take(),
        script: config.proxy.script.clone(),
        log_refusals: config.egress_log,
    }
}

/// How callers are answered.
fn api_settings(provisions: &Provisions, config: &Config, workers: usize) -> slow::api::Settings {
    let addresses = &config.addresses;
    let name = provisions.api.as_ref().map(|listening| listening.name().to_string());
    let about = slow::api::About {
        name: name.or_else(|| config.control.name.clone()).unwrap_or_default(),
        engine: provisions.engine(),
        workers,
        guest: addresses.families().map(|family| family.guest.ip()).collect(),
        gateway: addresses.families().map(|family| family.gateway.ip()).collect(),
    };
    slow::api::Settings {
        about,
        guest: config.guest_api,
        connections: provisions.connections(),
        guest_connections: provisions.guest_connections(),
    }
}

/// The control socket for the slow path, and its name for this thread.
fn open_door(provisions: &mut Provisions) -> (Option<slow::api::Door>, Option<Plate>) {
    let Some(listening) = provisions.api.take() else { return (None, None) };
    let (listener, plate) = listening.apart();
    (Some(slow::api::Door { listener, user: geteuid().as_raw() }), Some(plate))
}

/// Deals the sockets of published ports to the workers.
fn deal(deliveries: Vec<Delivery>, workers: usize) -> Vec<Vec<(Publication, OwnedFd)>> {
    let mut dealt: Vec<Vec<_>> = (0..workers).map(|_| Vec::new()).collect();
    for Delivery { publication, sockets, .. } in deliveries {
        for (worker, socket) in sockets {
            dealt[worker].push((publication, socket));
        }
    }
    dealt
}

/// Starts the thread that writes frames to a file, if there is one.
fn start_recorder(file: Option<File>, sandboxed: bool) -> Result<Option<Recorder>, NodeError> {
    let start = |file| Recorder::start(file, move || limit(sandboxed, sandbox::Thread::Recorder));
    file.map(start).transpose().map_err(system("cannot start a thread"))
}

/// Starts the slow path's thread.
fn start_slow(
    parts: slow::Parts,
    network_watch: NetworkWatch,
    ended: Arc<Waker>,
    sandboxed: bool,
) -> Result<JoinHandle<()>, NodeError> {
    let run = move || {
        slow::run(parts, network_watch, || limit(sandboxed, sandbox::Thread::Slow));
        ended.signal();
    };
    std::thread::Builder::new().name("slow".into()).spawn(run).map_err(system("cannot start a thread"))
}

/// Starts the thread of a link's own. Nobody waits for its end: it waits for front-ends, which may never come.
fn start_service(
    service: Service,
    wakers: Vec<Arc<Waker>>,
    ended: Arc<Waker>,
    sandboxed: bool,
) -> Result<(), NodeError> {
    let wake = |waker: Arc<Waker>| -> Wake { Arc::new(move || waker.signal()) };
    let wakes = wakers.into_iter().map(wake).collect();
    let serve = move || {
        match limit(sandboxed, sandbox::Thread::Link) {
            Ok(()) => service(wakes),
            Err(error) => tracing::error!(%error, "the link's thread could not start"),
        }
        ended.signal();
    };
    let thread = std::thread::Builder::new().name("link".into());
    thread.spawn(serve).map(drop).map_err(system("cannot start a thread"))
}

/// Gives up what the threads to come do not need.
fn close_sandbox<'p>(tidied: impl Iterator<Item = &'p Path>) -> Result<(), SandboxError> {
    sandbox::drop_capabilities(&[])?;
    let mut readable = readable_directories(&[RESOLV_CONF, HOSTS].map(PathBuf::from));
    readable.extend(certificate_directories());
    // Where a link may be switched to when the host's network changes.
    readable.extend(RESOLVER_DIRECTORIES.iter().map(PathBuf::from));
    let shut = sandbox::shut_files(&readable, &tidied.collect::<Vec<_>>())?;
    tracing::info!(files_shut = shut, "rights are given up");
    Ok(())
}

/// Limits the calling thread to the system calls of its kind, where that is wanted.
fn limit(sandboxed: bool, kind: sandbox::Thread) -> io::Result<()> {
    if sandboxed { sandbox::limit_system_calls(kind).map_err(io::Error::other) } else { Ok(()) }
}

/// What workers may have.
fn limits(provisions: &Provisions) -> Limits {
    let descriptors = u32::try_from(provisions.descriptors_for_flows()).unwrap_or(u32::MAX);
    Limits {
        descriptors: Descriptors::new(descriptors),
        connects_per_destination: CONNECTS_PER_DESTINATION,
        connects: CONNECTS,
    }
}

/// What a worker's thread starts from.
struct WorkerSeed<L> {
    id: u8,
    link: L,
    engine: EngineKind,
    processors: Processors,
    seat: Seat,
    loads: Loads,
    raw: [Vec<OwnedFd>; 2],
    published: Vec<(Publication, OwnedFd)>,
    flows: Arc<FlowTable>,
    limits: Limits,
    config: Config,
    guest_mac: GuestMac,
    addresses: Arc<crate::policy::addresses::Addresses>,
    counters: Arc<Counters>,
    waker: Arc<Waker>,
    mail: WorkerMail,
    workers: Vec<WorkerMail>,
    moves: Vec<Moves<OwnedFd>>,
    slow: Mailbox<ToSlow>,
    excluded: PortSet,
    secret: [u64; 2],
    recorder: Option<Mailbox<ToRecorder>>,
    guest_in_kernel: bool,
    ended: Arc<Waker>,
}

impl<L: Link> WorkerSeed<L> {
    fn grow(self) {
        let ended = self.ended.clone();
        // Before anything else, so that its memory is near.
        let pinning = Pinning::new(self.processors.clone(), self.id.into(), self.guest_in_kernel);
        let result = match self.engine {
            EngineKind::IoUring => Uring::new().and_then(|engine| self.live(engine, pinning)),
            EngineKind::Epoll => Epoll::new().and_then(|engine| self.live(engine, pinning)),
        };
        if let Err(error) = result {
            tracing::error!(%error, "a worker could not start");
        }
        ended.signal();
    }

    fn live<E: Engine>(self, engine: E, pinning: Pinning) -> io::Result<()> {
        limit(self.config.sandbox, sandbox::Thread::Worker(self.engine))?;
        let now = Now::read();
        // Identifiers of raw echo sockets: a range of each worker's own.
        let sockets = KernelSockets::new(self.raw, u16::from(self.id) << 10);
        let mut worker = Worker::new(Parts {
            id: self.id,
            link: self.link,
            engine,
            sockets,
            flows: self.flows,
            flows_max: self.config.max_flows,
            limits: self.limits,
            addresses: self.addresses,
            guest_mac: self.guest_mac,
            udp_filtering: self.config.udp_filtering,
            counters: self.counters,
            waker: self.waker,
            mail: self.mail,
            workers: self.workers,
            moves: self.moves,
            slow: self.slow,
            guest_in_kernel: self.guest_in_kernel,
            excluded_ports: self.excluded,
            secret: self.secret,
            recorder: self.recorder,
            spin: self.config.spin,
            seat: self.seat,
            pinning,
            loads: self.loads,
            spread: self.config.spread,
            now,
        })?;
        for (publication, socket) in self.published {
            worker.publish(publication, socket, now);
        }
        worker.run();
        Ok(())
    }
}
