//! Signals as events.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Signals that mean something to hythe, or to the command behind it.
const TAKEN: [Signal; 9] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGALRM,
    Signal::SIGCONT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
];

/// The signals of this process, read instead of handled.
pub struct Signals {
    events: SignalFd,
    mask_before: SigSet,
}

/// A signal that came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Received {
    /// Which.
    pub signal: Signal,
    /// It came from the terminal, which has sent it to the whole process group.
    pub from_terminal: bool,
}

impl Received {
    /// Whether it tells to end.
    pub fn ends(self) -> bool {
        matches!(
            self.signal,
            Signal::SIGINT | Signal::SIGTERM | Signal::SIGHUP | Signal::SIGQUIT | Signal::SIGALRM
        )
    }
}

impl Signals {
    /// Blocks the signals for this thread and all that it starts. Those that are ignored at the start stay so, as
    /// nohup(1) and shells want it.
    pub fn take() -> io::Result<Self> {
        let mask: SigSet = TAKEN.into_iter().filter(|signal| !is_ignored(*signal)).collect();
        let mask_before = mask.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
        let events = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        Ok(Self { events, mask_before })
    }

    /// The signals that were blocked before.
    pub fn mask_before(&self) -> SigSet {
        self.mask_before
    }

    /// The descriptor that becomes readable with a signal.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// The next signal that came.
    pub fn next(&self) -> Option<Received> {
        let info = self.events.read_signal().ok()??;
        let signal = Signal::try_from(info.ssi_signo as i32).ok()?;
        // Others that the kernel sends are for one process: SIGALRM, and SIGHUP for the leader of a session.
        let of_group = matches!(signal, Signal::SIGINT | Signal::SIGQUIT | Signal::SIGWINCH);
        Some(Received { signal, from_terminal: of_group && info.ssi_code == libc::SI_KERNEL })
    }
}

fn is_ignored(signal: Signal) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: nothing is set; the kernel fills in what there is, and zeroes are a valid action if it does not.
    let action = unsafe {
        libc::sigaction(signal as i32, std::ptr::null(), action.as_mut_ptr());
        action.assume_init()
    };
    action.sa_sigaction == libc::SIG_IGN
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ignored_is_known() {
        // Rust's runtime ignores this one.
        assert!(is_ignored(Signal::SIGPIPE));
        assert!(!is_ignored(Signal::SIGUSR2));
    }
}
