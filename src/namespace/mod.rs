//! The guest's network namespace, and the process that lives in it.
//!
//! hythe itself stays in the host's namespace. A helper, forked before any thread exists, makes or enters the guest's:
//! it creates the tap device and hands its queues over, configures the interface, runs the command (`hythe run`), and
//! stays as the broker of what can only be had inside: sockets of that namespace.
//!
//! ```text
//! hythe (host namespace) ◀── SOCK_SEQPACKET, descriptors ──▶ helper (guest namespace) ──▶ COMMAND
//! ```
//! The helper dies with hythe: it sees the end of the channel, ends the command and everything that came of it, and
//! exits. hythe sees the end of the helper the same way.

mod command;
mod configure;
mod enter;
mod helper;
mod resolver;
mod trial;
mod watch;
pub mod words;

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use ipnet::IpNet;
use nix::sys::signal::{SigSet, Signal, kill};

use crate::channel::Channel;
use crate::config::Config;
use crate::frame::address::Mac;
use crate::link::tap::Created;
pub use trial::{Trial, try_namespace};
pub use watch::Departure;
use words::{FromHelper, ToHelper};

/// Which namespace the guest lives in.
#[derive(Clone, Debug)]
pub enum Target {
    /// A new one, in which a command runs.
    Run {
        /// The command and its arguments.
        command: Vec<OsString>,
    },
    /// One that a file names, like /run/netns/NAME.
    Path(PathBuf),
    /// A process's.
    Process(i32),
}

/// What the helper is to set up.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The namespace.
    pub target: Target,
    /// The interface's name.
    pub interface: String,
    /// Queues of the tap device.
    pub queues: usize,
    /// The guest's MAC.
    pub mac: Mac,
    /// The link's MTU.
    pub mtu: u16,
    /// The guest's addresses, with prefixes.
    pub addresses: Vec<IpNet>,
    /// Default gateways; of IPv6 only where the host has a way out itself, as the router advertisements say.
    pub gateways: Vec<std::net::IpAddr>,
    /// The guest's host name.
    pub hostname: Option<String>,
    /// The content of the guest's resolv.conf.
    pub resolv_conf: String,
    /// The signals that the command is to block: those that hythe was started with.
    pub signal_mask: SigSet,
}

impl Plan {
    /// The plan for a configuration; `search` are the host's search domains, `signal_mask` is for the command.
    pub fn new(config: &Config, target: Target, search: &[String], signal_mask: SigSet) -> Self {
        use std::fmt::Write;
        let mut resolv_conf = String::from("# made by hythe\n");
        let mut gateways: Vec<_> = config.addresses.families().map(|family| family.gateway.ip()).collect();
        for resolver in &gateways {
            let _ = writeln!(resolv_conf, "nameserver {resolver}");
        }
        gateways.retain(|gateway| gateway.is_ipv4() || config.host_has_default[1]);
        if !search.is_empty() {
            let _ = writeln!(resolv_conf, "search {}", search.join(" "));
        }
        Self {
            target,
            interface: config.interface.clone(),
            queues: config.workers,
            mac: config.guest_mac,
            mtu: config.mtu,
            addresses: config.guest_addresses(),
            gateways,
            hostname: config.hostname.clone(),
            resolv_conf,
            signal_mask,
        }
    }
}

/// Why the guest's namespace could not be had.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// The helper could not be started.
    #[error("the helper process cannot be started ({0})")]
    Fork(io::Error),
    /// The helper says what failed.
    #[error("{0}")]
    Helper(String),
    /// The helper ended without a word.
    #[error("the helper process in the guest's namespace ended unexpectedly")]
    Gone,
    /// There is no such namespace.
    #[error("cannot attach to {target}: it does not exist ({error})")]
    Missing {
        /// Which namespace.
        target: String,
        /// As the kernel says it.
        error: io::Error,
    },
    /// The namespace cannot be watched.
    #[error("cannot watch for the end of {target} ({error})")]
    Watch {
        /// Which namespace.
        target: String,
        /// Why.
        error: io::Error,
    },
}

/// The guest's namespace. Dropped, it ends the helper, and with it the command and everything that came of it.
pub struct Namespace {
    channel: Channel,
    /// A channel of its own for opening sockets in the namespace; the slow path's.
    pub broker: Option<Channel>,
    helper: nix::unistd::Pid,
    tap: Option<Created>,
    stands: bool,
    /// What to know besides.
    pub notes: Vec<String>,
}

impl Namespace {
    /// Starts the helper, which changes nothing before [`Self::set_up`]. No thread may exist yet.
    pub fn start(plan: &Plan) -> Result<Self, NamespaceError> {
        let (channel, theirs) = Channel::pair().map_err(NamespaceError::Fork)?;
        let (broker, their_broker) = Channel::pair().map_err(NamespaceError::Fork)?;
        let helper = helper::start(plan, [theirs, their_broker], [channel.as_fd(), broker.as_fd()])
            .map_err(NamespaceError::Fork)?;
        Ok(Self { channel, broker: Some(broker), helper, tap: None, stands: false, notes: Vec::new() })
    }

    /// Has the helper make or enter the namespace and set it up; [`Self::hear_set_up`] tells when it is done.
    pub fn set_up(&self) -> Result<(), NamespaceError> {
        self.channel.send(&ToHelper::SetUp, &[]).map_err(|_| NamespaceError::Gone)
    }

    /// Takes the next word about the set-up, for which [`Self::fd`] becomes readable. The tap device, once everything
    /// stands.
    pub fn hear_set_up(&mut self) -> Result<Option<Created>, NamespaceError> {
        match self.channel.receive() {
            Ok(Some((FromHelper::Tap { udp_segmentation }, queues))) => {
                self.tap = Some(Created { queues, udp_segmentation });
            }
            Ok(Some((FromHelper::Note(note), _))) => self.notes.push(note),
            Ok(Some((FromHelper::Ready, _))) => {
                self.stands = true;
                return self.tap.take().map(Some).ok_or(NamespaceError::Gone);
            }
            Ok(Some((FromHelper::Failed(message), _))) => return Err(NamespaceError::Helper(message)),
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => return Err(NamespaceError::Gone),
        }
        Ok(None)
    }

    /// Everything stands: the command may start.
    pub fn go(&self) -> io::Result<()> {
        self.channel.send(&ToHelper::Go, &[])
    }

    /// Passes a signal on to the command, unless it came `from_terminal` and the command has it from there.
    pub fn signal(&self, signal: Signal, from_terminal: bool) -> io::Result<()> {
        self.channel.send(&ToHelper::Signal { number: signal as i32, from_terminal }, &[])
    }

    /// The descriptor on which the helper speaks.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    /// The next word of the helper; `None` when it is gone.
    pub fn receive(&self) -> io::Result<Option<(FromHelper, Vec<OwnedFd>)>> {
        self.channel.receive()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if !self.stands {
            // No command runs yet, and whatever it waits for in the namespace is not worth waiting for.
            let _ = kill(self.helper, Signal::SIGKILL);
        }
        self.channel.close();
        // It fails only when there is no such child, which is as good.
        let _ = nix::sys::wait::waitpid(self.helper, None);
    }
}
