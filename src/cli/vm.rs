//! `hythe vm`: a guest in a virtual machine.

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;

use super::guest::readable;
use super::say;
use super::signals::Signals;
use crate::config::{Config, Options};
use crate::host::RESOLV_CONF;
use crate::link::vhost_user::Queue;
use crate::monitor::door::{self, Door};
use crate::monitor::session::{Identity, Worker};
use crate::netlink::HostNetwork;
use crate::node::{Guest, Node, Provisions, Service};
use crate::policy::guest_mac::GuestMac;
use crate::slow::dns::ResolvConf;

/// How the virtual machine's monitor is reached.
#[derive(Args, Debug)]
pub struct Monitor {
    /// The vhost-user socket at which the virtual machine's monitor calls
    #[arg(long, value_name = "SOCK")]
    vhost_user: PathBuf,
    /// The monitor listens at the socket: call it, and again whenever it has gone
    #[arg(long)]
    client: bool,
}

/// Serves virtual machines until it is told to end; returns the exit status.
pub fn serve(mut options: Options, monitor: &Monitor) -> anyhow::Result<u8> {
    if let Some(workers) = options.workers.filter(|workers| *workers != 1) {
        anyhow::bail!(
            "--workers {workers}: a virtual machine has one pair of queues, and each worker serves one: leave it out"
        );
    }
    if let Some(name) = &options.interface {
        anyhow::bail!(
            "--interface {name}: a virtual machine names its interfaces itself; it is for hythe run and attach"
        );
    }
    options.workers = Some(1);
    let mac_is_given = options.mac.is_some();
    let host = HostNetwork::read().map_err(crate::config::ConfigError::Routes)?;
    let config = Config::new(options, &host)?;
    let search = ResolvConf::read(Path::new(RESOLV_CONF)).search;
    let signals = Signals::take().context("cannot take signals")?;
    let provisions = Provisions::gather(&config)?;
    let (door, plate) = if monitor.client {
        (Door::Call(monitor.vhost_user.clone()), None)
    } else {
        let (door, plate) = door::listen(&monitor.vhost_user).context("--vhost-user")?;
        (door, Some(plate))
    };
    for note in config.notes.iter().chain(&provisions.notes) {
        tracing::warn!("{note}");
    }
    tracing::info!(
        engine = ?provisions.engine(),
        descriptors = provisions.descriptors(),
        flows = config.max_flows,
        "starting"
    );
    let mac =
        if mac_is_given { GuestMac::given(config.guest_mac) } else { GuestMac::learned(config.guest_mac) };
    let (link, control) = Queue::new(config.mtu);
    let identity = Identity { mac: config.guest_mac, mtu: config.mtu };
    let learned = mac.clone();
    let service: Service = Box::new(move |wakes| {
        let workers = [control].into_iter().zip(wakes).map(|(control, wake)| Worker { control, wake });
        door.serve(workers.collect(), identity, || learned.forget());
    });
    let tidied = plate.as_ref().map(|plate| plate.directory().to_path_buf());
    let guest = Guest { links: vec![link], mac, search, broker: None, service: Some(service), tidied };
    let node = Node::start(&config, provisions, guest)?;
    let status = wait(&node, &signals);
    let report = node.stop();
    drop(plate);
    if config.verbose > 0 {
        say(&report);
    }
    status
}

/// Waits until hythe is told to end; returns the exit status.
fn wait(node: &Node, signals: &Signals) -> anyhow::Result<u8> {
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
        if ended {
            anyhow::bail!("a thread of the data plane has ended; the guest has no network any more");
        }
    }
}
