//! `hythe-docker-proxy`: publishes the ports of containers on the host, where dockerd runs in a guest of hythe.
//!
//! ```text
//!  host          guest
//! ┌───────┐     ┌──────────────────────────────────────────────────────┐
//! │ hythe │◀────┤ hythe-docker-proxy ◀── dockerd: one for each binding │
//! └───────┘     │   └─ docker-proxy                                    │
//!               └──────────────────────────────────────────────────────┘
//! ```
//! dockerd starts it in docker-proxy's place (`--userland-proxy-path`), once for each port and address family. It
//!
//! 1. understands what is wanted ([`arguments`]),
//! 2. asks hythe for the port of the host ([`gateway`]): what hythe refuses, `docker run` refuses with the same words ([`parent`]),
//! 3. starts the real docker-proxy ([`proxy`]), which serves the guest itself and answers dockerd,
//! 4. keeps the port as long as that one runs, and asks again when hythe was started anew ([`published`]).
//!
//! A port of one address of the host is led to the container by a relay ([`relay`]), which listens on the guest's [`link`].
//!
//! The port goes with the connection to hythe, and so with this process, whichever way it ends. Thousands may run in a guest:
//! one thread each, and nothing that wakes it up while nothing happens, but the kernel's probes of the connection.

mod arguments;
mod gateway;
mod link;
mod parent;
mod proxy;
mod published;
mod relay;

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::signal::unix::{self, SignalKind};
use tokio::time::timeout;

use arguments::{ArgumentError, Wanted};
use parent::Parent;
use proxy::{Proxy, ProxyError};
use published::{Published, RefusedError};

/// How long a port may take to be granted. dockerd waits 16 seconds for all, the real docker-proxy's start too.
const PATIENCE: Duration = Duration::from_secs(11);

/// Why the port is not served.
#[derive(Debug, thiserror::Error)]
enum ShimError {
    #[error(transparent)]
    Argument(#[from] ArgumentError),
    #[error(transparent)]
    Proxy(#[from] ProxyError),
    #[error(transparent)]
    Refused(#[from] RefusedError),
    #[error("hythe's answer takes more than {} seconds", PATIENCE.as_secs())]
    Late,
    #[error("cannot start: {0}")]
    Start(#[from] std::io::Error),
}

/// Does what dockerd wants, until it is told to end.
pub fn run() -> ExitCode {
    let mut parent = Parent::inherited();
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let served = runtime.map_err(ShimError::from).and_then(|runtime| {
        let served = runtime.block_on(serve(&mut parent, &words));
        // A name that is still looked for is not waited for.
        runtime.shutdown_background();
        served
    });
    match served {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            parent.refuse(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

async fn serve(parent: &mut Parent, words: &[OsString]) -> Result<u8, ShimError> {
    let mut stop = Stop::listen()?;
    let wanted = Wanted::parse(words.iter().map(|word| word.to_string_lossy().into_owned()))?;
    let docker_proxy = proxy::find()?;
    let mut published = tokio::select! {
        published = timeout(PATIENCE, Published::new(wanted)) => published.map_err(|_| ShimError::Late)??,
        // Nothing is published, or what is goes with the connection.
        signal = stop.signal() => return Ok(128 + signal as u8),
    };
    if parent.has_gone() {
        // dockerd has given up, and will not end what it does not know of.
        published.give_back().await;
        return Err(ShimError::Late);
    }
    let mut docker_proxy = match Proxy::start(&docker_proxy, words) {
        Ok(started) => started,
        Err(error) => {
            published.give_back().await;
            return Err(error.into());
        }
    };
    parent.let_go();
    let signal = tokio::select! {
        status = docker_proxy.ended() => {
            published.give_back().await;
            return Ok(status);
        }
        signal = stop.signal() => signal,
        never = published.keep() => match never {},
    };
    let ((), status) = tokio::join!(published.give_back(), docker_proxy.stop(signal));
    Ok(status)
}

/// The signals by which dockerd, and the kernel when dockerd is gone, ends this process.
struct Stop {
    interrupt: unix::Signal,
    terminate: unix::Signal,
}

impl Stop {
    fn listen() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: unix::signal(SignalKind::interrupt())?,
            terminate: unix::signal(SignalKind::terminate())?,
        })
    }

    async fn signal(&mut self) -> Signal {
        tokio::select! {
            _ = self.interrupt.recv() => Signal::SIGINT,
            _ = self.terminate.recv() => Signal::SIGTERM,
        }
    }
}
