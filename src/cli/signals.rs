//! Signals as events.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Signals that mean something to hythe, or to the command behind it.
const TAKEN: [Signal; 7] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
];

/// The signals of this process, read instead of handled.
pub struct Signals(SignalFd);

/// A signal that came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Received {
    /// Which.
    pub signal: Signal,
    /// It came from the terminal, which has sent it to the command too.
    pub from_terminal: bool,
}

impl Signals {
    /// Blocks the signals for this thread and all that it starts.
    pub fn take() -> io::Result<Self> {
        let mut mask = SigSet::empty();
        for signal in TAKEN {
            mask.add(signal);
        }
        mask.thread_block()?;
        Ok(Self(SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?))
    }

    /// The descriptor that becomes readable with a signal.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// The next signal that came.
    pub fn next(&self) -> Option<Received> {
        let info = self.0.read_signal().ok()??;
        let signal = Signal::try_from(info.ssi_signo as i32).ok()?;
        Some(Received { signal, from_terminal: info.ssi_code == libc::SI_KERNEL })
    }
}
