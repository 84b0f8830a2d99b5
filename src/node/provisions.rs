//! What a node takes from the host while it may: sockets of published ports, the control socket, raw sockets, files,
//! descriptors.
//!
//! Rights are given up after this, and nothing here is asked for again.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use caps::{CapSet, Capability};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::config::Config;
use crate::control::place::{Listening, PlaceError};
use crate::fork::Process;
use crate::host::engine::EngineKind;
use crate::host::{datagram, occupant};
use crate::netlink::{Netlink, NetworkWatch};
use crate::pac;
use crate::policy::Spread;
use crate::policy::guest_api::GuestApi;
use crate::port_broker::PortBroker;
use crate::sandbox;
use crate::slow::ports::ephemeral::Ephemeral;
use crate::slow::ports::opening::Delivery;
use crate::slow::ports::publish_at_start;
use crate::slow::ports::table::{PortError, Table};

use super::{NodeError, system};

/// Descriptors that are not flows': rings, mailboxes, the slow path's.
const DESCRIPTORS_KEPT: u64 = 256;
/// Connections of the control socket at a time.
const CONNECTIONS_MAX: u64 = 1024;
/// Streams of the guest's that the slow path leads out at the most.
const PROXY_STREAMS_MAX: u64 = 4096;
/// Connections of the guest to the control API that hold nothing.
const GUEST_ASKS: usize = 16;
/// Raw ICMP sockets a worker gets where ping sockets are not allowed, of each family.
const RAW_SOCKETS: usize = 32;

/// What a node takes from the host while it may.
pub struct Provisions {
    engine: EngineKind,
    /// Published ports, and their sockets.
    pub(super) ports: Table,
    pub(super) deliveries: Vec<Delivery>,
    /// The control socket.
    pub(super) api: Option<Listening>,
    /// What binds privileged ports.
    pub(super) port_broker: Option<Process>,
    /// What starts evaluators of PAC scripts, and its process.
    pub(super) pac: Option<pac::Starter>,
    pub(super) pac_process: Option<Process>,
    guest_connections: usize,
    raw: [Vec<OwnedFd>; 2],
    pub(super) capture: Option<File>,
    descriptors: u64,
    pub(super) network_watch: NetworkWatch,
    /// By which the kernel is asked for routes.
    pub(super) routes: Netlink,
    /// What the user should know.
    pub notes: Vec<String>,
}

impl Provisions {
    /// Opens everything that may take a right, or that may fail.
    pub fn gather(config: &Config) -> Result<Self, NodeError> {
        let mut notes = Vec::new();
        // First: it is to have nothing of the rest.
        let (broker, port_broker) = start_port_broker(config)?.unzip();
        let (pac, pac_process) = start_pac(config)?;
        let engine = config.engine.decide()?;
        let descriptors = raise_descriptor_limit().map_err(system("cannot read the limit of descriptors"))?;
        let for_ports = descriptors.saturating_sub(DESCRIPTORS_KEPT);
        let ports = Table::new(Ephemeral::read(), config.workers, config.mirror_refusal, for_ports);
        let ports = if config.spread == Spread::Auto { ports.with_one_listener() } else { ports };
        let ports = ports.with_guest_bounds(config.guest_bounds.clone());
        let mut ports = match broker {
            Some(broker) => ports.with_broker(broker),
            None => ports,
        };
        let deliveries = publish_at_start(&mut ports, config.publish.clone()).map_err(with_occupant)?;
        let missing = |error: &PlaceError| tracing::info!(%error, "nobody can ask this hythe for anything");
        let api = config.control.claim(missing)?;
        let capture = match &config.capture {
            None => None,
            Some(path) => {
                Some(open_capture(path).map_err(|error| NodeError::Capture { path: path.clone(), error })?)
            }
        };
        let network_watch = NetworkWatch::open().map_err(system("cannot follow the host's network"))?;
        let routes = Netlink::open().map_err(system("cannot ask for the host's routes"))?;
        let raw = [false, true].map(|v4| match config.addresses.family(v4) {
            Some(_) => raw_sockets(v4, config.workers, &mut notes),
            None => Vec::new(),
        });
        let mut provisions = Self {
            engine,
            ports,
            deliveries,
            api,
            port_broker,
            pac: Some(pac),
            pac_process: Some(pac_process),
            guest_connections: guest_connections(config, descriptors),
            raw,
            capture,
            descriptors,
            network_watch,
            routes,
            notes,
        };
        provisions.ports.allow_descriptors(provisions.descriptors_for_ports());
        Ok(provisions)
    }

    /// The engine that will run.
    pub fn engine(&self) -> EngineKind {
        self.engine
    }

    /// Descriptors that the process may have.
    pub fn descriptors(&self) -> u64 {
        self.descriptors
    }

    /// Descriptors that are left when everything that the start needs is there.
    fn descriptors_left(&self) -> u64 {
        let raw = self.raw.iter().map(Vec::len).sum::<usize>() as u64;
        let callers = (self.connections() + self.guest_connections) as u64;
        let led_out = 3 * self.proxy_streams() as u64;
        let taken = DESCRIPTORS_KEPT + raw + self.ports.descriptors() + callers + led_out;
        self.descriptors.saturating_sub(taken)
    }

    /// Descriptors that ports may take which are published while hythe runs.
    fn descriptors_for_ports(&self) -> u64 {
        self.descriptors_left().min(self.descriptors / 4)
    }

    /// Descriptors that are left for flows.
    pub(super) fn descriptors_for_flows(&self) -> u64 {
        (self.descriptors_left() - self.descriptors_for_ports()).max(64)
    }

    /// Connections that the control socket may have.
    pub(super) fn connections(&self) -> usize {
        (self.descriptors / 16).clamp(16, CONNECTIONS_MAX) as usize
    }

    /// Streams of the guest's that the slow path may lead out at a time. Each has two descriptors, and one for where it leads.
    pub(super) fn proxy_streams(&self) -> usize {
        (self.descriptors / 24).clamp(16, PROXY_STREAMS_MAX) as usize
    }

    /// Connections that the guest may have to the API.
    pub(super) fn guest_connections(&self) -> usize {
        self.guest_connections
    }

    /// One worker's share of the raw sockets, by family.
    pub(super) fn take_raw(&mut self) -> [Vec<OwnedFd>; 2] {
        self.raw.each_mut().map(|sockets| sockets.split_off(sockets.len().saturating_sub(RAW_SOCKETS)))
    }
}

/// Connections of the guest to the API: one for each port that it may hold, and some to ask.
fn guest_connections(config: &Config, descriptors: u64) -> usize {
    match config.guest_api {
        GuestApi::Off => 0,
        GuestApi::Status => GUEST_ASKS,
        GuestApi::Publish => {
            config.guest_bounds.most.saturating_add(GUEST_ASKS).min(descriptors as usize / 8).max(GUEST_ASKS)
        }
    }
}

/// The broker of privileged ports, where hythe has their right now and is to give it up.
fn start_port_broker(config: &Config) -> Result<Option<(PortBroker, Process)>, NodeError> {
    let may_bind = caps::has_cap(None, CapSet::Effective, Capability::CAP_NET_BIND_SERVICE).unwrap_or(false);
    if !config.sandbox || !may_bind {
        return Ok(None);
    }
    let limit = || {
        sandbox::drop_capabilities(&[Capability::CAP_NET_BIND_SERVICE])
            .and_then(|()| sandbox::shut_files(&[], &[]))
            .and_then(|_| sandbox::limit_system_calls(sandbox::Thread::PortBroker))
            .map_err(io::Error::other)
    };
    PortBroker::start(limit).map(Some).map_err(system("cannot start the broker of ports below 1024"))
}

/// What starts evaluators of PAC scripts. It is there in any case: a script may be given while hythe runs.
fn start_pac(config: &Config) -> Result<(pac::Starter, Process), NodeError> {
    let sandboxed = config.sandbox;
    let limit = |what| {
        let limited = match what {
            _ if !sandboxed => Ok(()),
            pac::Limit::Starter => sandbox::drop_capabilities(&[])
                .and_then(|()| sandbox::shut_files(&[], &[]))
                .and_then(|_| sandbox::limit_system_calls(sandbox::Thread::PacStarter)),
            pac::Limit::Evaluator => sandbox::limit_system_calls(sandbox::Thread::PacEvaluator),
        };
        limited.map_err(io::Error::other)
    };
    pac::start(limit).map_err(system("cannot start what evaluates PAC scripts"))
}

/// Opens a file to write; a FIFO without waiting for who reads it.
fn open_capture(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::ENXIO) => {
                io::Error::new(error.kind(), "a FIFO that nobody reads: start its reader first")
            }
            _ => error,
        })?;
    // Its writer may wait for it.
    fcntl(&file, FcntlArg::F_SETFL(OFlag::empty()))?;
    Ok(file)
}

/// Raw sockets for echo, where ping sockets are not allowed and raw ones are.
fn raw_sockets(v4: bool, workers: usize, notes: &mut Vec<String>) -> Vec<OwnedFd> {
    let Err(refused) = datagram::open_ping(v4, None) else { return Vec::new() };
    let raw: Vec<OwnedFd> = (0..workers * RAW_SOCKETS).map_while(|_| datagram::open_raw(v4).ok()).collect();
    if raw.is_empty() {
        notes.push(format!(
            "the guest's {} is not answered from outside: ping sockets are not allowed here ({refused}; sysctl \
             net.ipv4.ping_group_range), and raw sockets take CAP_NET_RAW",
            if v4 { "ping" } else { "ping over IPv6" }
        ));
    }
    raw
}

/// Raises the soft limit of descriptors to the hard one; returns it.
fn raise_descriptor_limit() -> io::Result<u64> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(if setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() { hard } else { soft })
}

/// Names the program that has a port, as long as that can be seen.
fn with_occupant(error: PortError) -> PortError {
    match error {
        PortError::InUse { binding, occupant: None } => {
            PortError::InUse { binding, occupant: occupant::of(&binding) }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capture_into_a_fifo_does_not_wait_for_its_reader() {
        let path = std::env::temp_dir().join(format!("hythe-capture-{}", std::process::id()));
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let error = open_capture(&path).unwrap_err();
        assert!(error.to_string().contains("nobody reads"), "{error}");
        let reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        let file = open_capture(&path).unwrap();
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL).unwrap());
        assert!(!flags.contains(OFlag::O_NONBLOCK));
        drop(reader);
        std::fs::remove_file(&path).unwrap();
    }
}
