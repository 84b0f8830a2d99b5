//! `hythe run` and `hythe attach`: a guest in a network namespace.

use std::path::Path;

use anyhow::Context;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use super::FAILED;
use super::signals::{Received, Signals};
use crate::config::{Config, Options};
use crate::link::tap::Tap;
use crate::namespace::channel::FromHelper;
use crate::namespace::{Departure, Namespace, Plan, Target};
use crate::netlink::HostNetwork;
use crate::node::{Node, Provisions, RESOLV_CONF};
use crate::slow::dns::ResolvConf;

/// Serves a guest until it ends; returns the exit status.
pub fn serve(options: Options, target: Target) -> anyhow::Result<u8> {
    let host = HostNetwork::read().map_err(crate::config::ConfigError::Routes)?;
    let config = Config::new(options, &host)?;
    config.notes.iter().for_each(|note| tracing::warn!("{note}"));
    let search = ResolvConf::read(Path::new(RESOLV_CONF)).search;
    let runs_command = matches!(target, Target::Run { .. });
    // Blocked before the helper is forked, so that none is lost; the helper unblocks what its command needs.
    let signals = Signals::take().context("cannot take signals")?;
    let departure = Departure::watch(&target)?;
    // The helper comes before everything that is opened here, so that it inherits none of it.
    let mut namespace = Namespace::set_up(&Plan::new(&config, target, &search))?;
    namespace.notes.drain(..).for_each(|note| tracing::warn!("{note}"));
    let mut provisions = Provisions::gather(&config)?;
    provisions.notes.drain(..).for_each(|note| tracing::warn!("{note}"));
    tracing::info!(
        engine = ?provisions.engine(),
        workers = config.workers,
        descriptors = provisions.descriptors(),
        flows = config.max_flows,
        "starting"
    );
    let udp_segmentation = namespace.tap.udp_segmentation;
    let queues = std::mem::take(&mut namespace.tap.queues);
    let links: Vec<Tap> =
        queues.into_iter().map(|queue| Tap::new(queue, config.mtu, udp_segmentation)).collect();
    let node = Node::start(&config, provisions, links, search, namespace.broker.take())?;
    namespace.go().context("the helper process is gone")?;
    let mut guest = Guest { namespace, node, signals, departure, runs_command };
    let status = guest.wait();
    let Guest { namespace, node, .. } = guest;
    let report = node.stop();
    namespace.finish();
    if config.verbose > 0 {
        eprint!("{report}");
    }
    status
}

struct Guest {
    namespace: Namespace,
    node: Node,
    signals: Signals,
    departure: Departure,
    runs_command: bool,
}

impl Guest {
    /// Waits until the guest has ended, or hythe is told to; returns the exit status.
    fn wait(&mut self) -> anyhow::Result<u8> {
        loop {
            let [signal, helper, ended, departed] = self.ready()?;
            if helper && let Some(status) = self.hear_helper()? {
                return Ok(status);
            }
            if signal {
                while let Some(received) = self.signals.next() {
                    if let Some(status) = self.take_signal(received) {
                        return Ok(status);
                    }
                }
            }
            if departed && self.departure.has_gone() {
                tracing::info!("the namespace is gone");
                return Ok(0);
            }
            if ended {
                anyhow::bail!("a thread of the data plane has ended; the guest has no network any more");
            }
        }
    }

    fn ready(&self) -> anyhow::Result<[bool; 4]> {
        let own = [self.signals.fd(), self.namespace.fd(), self.node.ended_fd()];
        let watched = own.into_iter().chain(self.departure.fd());
        let mut fds: Vec<PollFd<'_>> = watched.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => return Ok([false; 4]),
            other => other.context("poll")?,
        };
        let is = |index: usize| fds.get(index).is_some_and(|fd| fd.any().unwrap_or(false));
        Ok([is(0), is(1), is(2), is(3)])
    }

    fn hear_helper(&mut self) -> anyhow::Result<Option<u8>> {
        match self.namespace.receive()? {
            Some((FromHelper::Exited(status), _)) => Ok(Some(status)),
            Some((FromHelper::Note(note), _)) => {
                eprintln!("hythe: {note}");
                Ok(None)
            }
            Some((FromHelper::Failed(message), _)) => anyhow::bail!(message),
            Some(_) => Ok(None),
            None => anyhow::bail!("the helper process in the guest's namespace ended unexpectedly"),
        }
    }

    /// Takes a signal: SIGUSR1 is hythe's; the others go to the command, or end what has none.
    fn take_signal(&self, received: Received) -> Option<u8> {
        let Received { signal, from_terminal } = received;
        if signal == Signal::SIGUSR1 {
            eprint!("{}", self.node.report());
            return None;
        }
        if self.runs_command {
            if !from_terminal && self.namespace.signal(signal as i32).is_err() {
                return Some(FAILED);
            }
            return None;
        }
        match signal {
            Signal::SIGINT | Signal::SIGTERM | Signal::SIGHUP | Signal::SIGQUIT => Some(0),
            _ => None,
        }
    }
}
