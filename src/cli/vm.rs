//! `hythe vm`: a guest in a virtual machine.

use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use clap::Args;

use super::guest::readable;
use super::say;
use super::signals::Signals;
use crate::config::{Config, MAX_WORKERS, Options};
use crate::host::RESOLV_CONF;
use crate::link::Link;
use crate::link::socket::Socket;
use crate::link::vhost_user::Queue;
use crate::link::vhost_user::pairs::Pairs;
use crate::monitor::device::{self, Identity};
use crate::monitor::place::{Doorplate, claim};
use crate::monitor::{Wake, Worker, door, sockets};
use crate::netlink::HostNetwork;
use crate::node::{Guest, Node, Provisions, Service};
use crate::policy::Spread;
use crate::policy::guest_mac::GuestMac;
use crate::slow::dns::ResolvConf;

/// How the virtual machine's monitor is reached.
#[derive(Args, Debug)]
pub struct Monitor {
    #[command(flatten)]
    at: At,
    /// The monitor listens at the vhost-user socket: call it, and again whenever it has gone
    #[arg(long, conflicts_with_all = ["stream", "dgram", "fd"])]
    client: bool,
    /// Pairs of queues that the virtual machine may use, over vhost-user; each is served by a worker of its own
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with_all = ["stream", "dgram", "fd"])]
    queues: u16,
}

/// Where it is reached: one of these.
#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
struct At {
    /// The vhost-user socket at which the virtual machine's monitor calls
    #[arg(long, value_name = "SOCK")]
    vhost_user: Option<PathBuf>,
    /// The stream socket to which the monitor connects; each frame comes behind its length, four bytes, big-endian
    #[arg(long, value_name = "SOCK")]
    stream: Option<PathBuf>,
    /// The datagram socket to which the monitor sends frames, one each, from a socket with a name
    #[arg(long, value_name = "SOCK")]
    dgram: Option<PathBuf>,
    /// A connection with the monitor that hythe was started with, by its descriptor; hythe ends with it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(RawFd).range(0..))]
    fd: Option<RawFd>,
}

/// Where the monitor comes from.
enum Door {
    VhostUser(door::Door),
    Sockets(sockets::Door),
}

impl Monitor {
    /// Opens the door; where that makes a socket, its name goes with the plate.
    fn open(&self, inherited: Option<sockets::Door>) -> anyhow::Result<(Door, Option<Doorplate>)> {
        let At { vhost_user, stream, dgram, .. } = &self.at;
        Ok(match (vhost_user, stream, dgram) {
            (Some(path), ..) if self.client => (Door::VhostUser(door::Door::Call(path.clone())), None),
            (Some(path), ..) => {
                let (listener, plate) = claim(path, UnixListener::bind).context("--vhost-user")?;
                (Door::VhostUser(door::Door::Listen(listener)), Some(plate))
            }
            (_, Some(path), _) => {
                let (listener, plate) = claim(path, UnixListener::bind).context("--stream")?;
                (Door::Sockets(sockets::Door::Listen(listener)), Some(plate))
            }
            (.., Some(path)) => {
                let (socket, plate) = claim(path, UnixDatagram::bind).context("--dgram")?;
                (Door::Sockets(sockets::Door::Datagrams(socket)), Some(plate))
            }
            (None, None, None) => {
                let door = inherited.context("clap has seen to it that there is one of these")?;
                (Door::Sockets(door), None)
            }
        })
    }
}

/// Serves virtual machines until it is told to end; returns the exit status.
pub fn serve(mut options: Options, monitor: &Monitor) -> anyhow::Result<u8> {
    options.workers = Some(workers(&options, monitor)?);
    if let Some(name) = &options.interface {
        anyhow::bail!(
            "--interface {name}: a virtual machine names its interfaces itself; it is for hythe run and attach"
        );
    }
    if options.spread.is_some() {
        anyhow::bail!(
            "--spread: a virtual machine spreads what it sends itself; it is for hythe run and attach"
        );
    }
    // First: what hythe opens itself would be taken for a descriptor that it was started with.
    let inherited = monitor.at.fd.map(sockets::inherit).transpose()?;
    let mac_is_given = options.mac.is_some();
    let host = HostNetwork::read().map_err(crate::config::ConfigError::Routes)?;
    // The guest itself spreads what it sends over its queues.
    let config = Config { spread: Spread::Always, ..Config::new(options, &host)? };
    let signals = Signals::take().context("cannot take signals")?;
    let provisions = Provisions::gather(&config)?;
    let (door, plate) = monitor.open(inherited)?;
    for note in config.notes.iter().chain(&provisions.notes) {
        tracing::warn!("{note}");
    }
    tracing::info!(
        engine = ?provisions.engine(),
        queues = monitor.queues,
        descriptors = provisions.descriptors(),
        flows = config.max_flows,
        "starting"
    );
    let mac =
        if mac_is_given { GuestMac::given(config.guest_mac) } else { GuestMac::learned(config.guest_mac) };
    let machine = Machine { config, provisions, mac, signals, plate };
    match door {
        Door::VhostUser(door) => machine.serve_over_queues(door, monitor.queues),
        Door::Sockets(door) => machine.serve_over_socket(door),
    }
}

/// How many workers there are: one a pair of queues, whatever else was asked for.
fn workers(options: &Options, monitor: &Monitor) -> anyhow::Result<usize> {
    let queues = usize::from(monitor.queues);
    if !(1..=MAX_WORKERS).contains(&queues) {
        anyhow::bail!("--queues {queues}: must be from 1 to {MAX_WORKERS}, as many workers as there may be");
    }
    if let Some(workers) = options.workers.filter(|workers| *workers != queues) {
        anyhow::bail!(
            "--workers {workers}: each worker serves one pair of the virtual machine's queues, of which there are \
             {queues} (--queues): leave it out"
        );
    }
    Ok(queues)
}

/// What it takes to serve, whatever the link.
struct Machine {
    config: Config,
    provisions: Provisions,
    mac: GuestMac,
    signals: Signals,
    plate: Option<Doorplate>,
}

impl Machine {
    /// Serves over pairs of virtqueues that front-ends of vhost-user attach.
    fn serve_over_queues(self, door: door::Door, queues: u16) -> anyhow::Result<u8> {
        let (pairs, mac) = (Pairs::default(), self.mac.clone());
        let identity = Identity { mac: self.config.guest_mac, mtu: self.config.mtu };
        let pair = |number| Queue::new(identity.mtu, number, pairs.clone());
        let (links, controls): (Vec<_>, Vec<_>) = (0..queues).map(pair).unzip();
        self.serve(links, move |wakes| {
            let workers = controls.into_iter().zip(wakes).map(|(control, wake)| Worker { control, wake });
            let served = device::Machine { workers: workers.collect(), pairs, identity };
            door.serve(served, || mac.forget());
            false
        })
    }

    /// Serves over a socket that carries frames.
    fn serve_over_socket(self, door: sockets::Door) -> anyhow::Result<u8> {
        let mac = self.mac.clone();
        let (link, control) =
            Socket::new(self.config.mtu, door.socket_type()).context("cannot make an eventfd")?;
        self.serve(vec![link], move |wakes| {
            let worker = wakes.into_iter().next().map(|wake| Worker { control, wake });
            worker.is_some_and(|worker| door.serve(&worker, || mac.forget()).is_ok())
        })
    }

    /// Serves over links, one a worker, beside which `attend` deals with the monitor; that ends well when no machine can
    /// come any more.
    fn serve<L: Link + Send + 'static>(
        self,
        links: Vec<L>,
        attend: impl FnOnce(Vec<Wake>) -> bool + Send + 'static,
    ) -> anyhow::Result<u8> {
        let Self { config, provisions, mac, signals, plate } = self;
        let search = ResolvConf::read(Path::new(RESOLV_CONF)).search;
        let is_over = Arc::new(AtomicBool::new(false));
        let ended = is_over.clone();
        let service: Service = Box::new(move |wakes| ended.store(attend(wakes), Ordering::Release));
        let tidied = plate.as_ref().map(|plate| plate.directory().to_path_buf());
        let guest = Guest { links, mac, search, broker: None, service: Some(service), tidied };
        let node = Node::start(&config, provisions, guest)?;
        let status = wait(&node, &signals, &is_over);
        let report = node.stop();
        drop(plate);
        if config.verbose > 0 {
            say(&report);
        }
        status
    }
}

/// Waits until hythe is told to end, or nothing is left to be served; returns the exit status.
fn wait(node: &Node, signals: &Signals, is_over: &AtomicBool) -> anyhow::Result<u8> {
    loop {
        let watched: [BorrowedFd<'_>; 2] = [signals.fd(), node.ended_fd()];
        let [signal, ended, ..] = readable(watched)?;
        while signal && let Some(received) = signals.next() {
            if received.signal == nix::sys::signal::Signal::SIGUSR1 {
                say(&node.report());
            } else if received.ends() {
                return Ok(0);
            }
        }
        if ended && is_over.load(Ordering::Acquire) {
            return Ok(0);
        }
        if ended {
            anyhow::bail!("a thread of the data plane has ended; the guest has no network any more");
        }
    }
}
