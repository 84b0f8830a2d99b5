//! `hythe run` and `hythe attach`: a guest in a network namespace.

use std::ops::ControlFlow;
use std::os::fd::BorrowedFd;
use std::path::Path;

use anyhow::Context;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use super::say;
use super::signals::{Received, Signals};
use crate::config::{Config, Options};
use crate::host::RESOLV_CONF;
use crate::link::tap::{Created, Tap};
use crate::namespace::words::FromHelper;
use crate::namespace::{Departure, Namespace, Plan, Target};
use crate::netlink::HostNetwork;
use crate::node::{Guest as GuestParts, Node, Provisions};
use crate::policy::guest_mac::GuestMac;
use crate::slow::dns::ResolvConf;

/// Serves a guest until it ends; returns the exit status.
pub fn serve(options: Options, target: Target) -> anyhow::Result<u8> {
    let host = HostNetwork::read().map_err(crate::config::ConfigError::Routes)?;
    let config = Config::new(options, &host)?;
    let search = ResolvConf::read(Path::new(RESOLV_CONF)).search;
    let runs_command = matches!(target, Target::Run { .. });
    // Blocked before the helper is forked, so that none is lost; the command gets the mask of before.
    let signals = Signals::take().context("cannot take signals")?;
    let departure = Departure::watch(&target)?;
    // The helper is forked before the sockets and files that the guest is not to hold, and sets the guest's namespace
    // up after everything else that may fail.
    let plan = Plan::new(&config, target, &search, signals.mask_before());
    let mut namespace = Namespace::start(&plan)?;
    let provisions = Provisions::gather(&config)?;
    let tap = match set_up(&mut namespace, &signals)? {
        ControlFlow::Continue(tap) => tap,
        ControlFlow::Break(signal) => return Ok(128 + signal as u8),
    };
    // Not before everything stands: what fails is told in one line.
    let notes = config.notes.iter().chain(&provisions.notes).chain(&namespace.notes);
    notes.for_each(|note| tracing::warn!("{note}"));
    tracing::info!(
        engine = ?provisions.engine(),
        workers = config.workers,
        descriptors = provisions.descriptors(),
        flows = config.max_flows,
        "starting"
    );
    let links = Tap::all(tap, config.mtu).context("cannot share the tap's queues")?;
    let mac = GuestMac::given(config.guest_mac);
    let parts =
        GuestParts { links, mac, search, broker: namespace.broker.take(), service: None, tidied: None };
    let node = Node::start(&config, provisions, parts)?;
    namespace.go().context("the helper process is gone")?;
    let mut guest = Guest { namespace, node, signals, departure, runs_command };
    let status = guest.wait();
    let Guest { namespace, node, .. } = guest;
    let report = node.stop();
    drop(namespace);
    if config.verbose > 0 {
        say(&report);
    }
    status
}

/// Waits until the guest's interface stands, or until a signal tells to end.
fn set_up(namespace: &mut Namespace, signals: &Signals) -> anyhow::Result<ControlFlow<Signal, Created>> {
    namespace.set_up()?;
    loop {
        let [signal, helper, ..] = readable([signals.fd(), namespace.fd()])?;
        while signal && let Some(received) = signals.next() {
            if received.ends() {
                return Ok(ControlFlow::Break(received.signal));
            }
        }
        if helper && let Some(tap) = namespace.hear_set_up()? {
            return Ok(ControlFlow::Continue(tap));
        }
    }
}

/// Waits until one of some descriptors can be read; says which.
pub fn readable<'f>(fds: impl IntoIterator<Item = BorrowedFd<'f>>) -> anyhow::Result<[bool; 4]> {
    let mut fds: Vec<PollFd<'_>> = fds.into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    match poll(&mut fds, PollTimeout::NONE) {
        Err(nix::errno::Errno::EINTR) => return Ok([false; 4]),
        other => other.context("poll")?,
    };
    Ok([0, 1, 2, 3].map(|index| fds.get(index).is_some_and(|fd| fd.any().unwrap_or(false))))
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
        readable(own.into_iter().chain(self.departure.fd()))
    }

    fn hear_helper(&mut self) -> anyhow::Result<Option<u8>> {
        match self.namespace.receive()? {
            Some((FromHelper::Exited(status), _)) => Ok(Some(status)),
            Some((FromHelper::Note(note), _)) => {
                say(&format!("hythe: {note}\n"));
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
            say(&self.node.report());
            return None;
        }
        if self.runs_command {
            // It fails only where the helper has gone, perhaps because the command has: what it said last is read next.
            let _ = self.namespace.signal(signal, from_terminal);
            return None;
        }
        received.ends().then_some(0)
    }
}
