//! Processes that are forked at the start, before any thread exists.
//!
//! A child has copies of all that the parent has. It begins by closing what is not its own, and ends without running the
//! parent's destructors.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, getppid};

/// A child that has nothing to finish, and ends with this.
pub struct Process(Pid);

impl Process {
    /// A child of this process.
    pub fn new(child: Pid) -> Self {
        Self(child)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may wait for a word that nobody can say any more. These fail only where there is no such child, which is as good.
        let _ = kill(self.0, Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}

/// In a child: what closes the parent's descriptors.
pub struct Child(());

/// Forks; the child runs `live` and ends with the status that it returns. There must be no other thread yet: what one holds
/// would be held in the child for ever.
pub fn fork_child(live: impl FnOnce(&Child) -> u8) -> io::Result<Pid> {
    // SAFETY: no other thread exists (the node starts its threads later), so the child may do as it likes.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let status = live(&Child(()));
            // No destructors of the parent's things, no flushing of its buffers.
            // SAFETY: ends the process.
            unsafe { libc::_exit(i32::from(status)) }
        }
    }
}

impl Child {
    /// Has the child live as long as its parent, under a name of its own.
    pub fn live_as_long_as(&self, parent: Pid, name: &CStr) -> io::Result<()> {
        // Signals of the terminal reach the whole process group; this ends when its parent does, and not before.
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)?;
        nix::sys::prctl::set_name(name)?;
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
        if getppid() == parent { Ok(()) } else { Err(Errno::ESRCH.into()) }
    }

    /// Closes copies of descriptors that are the parent's alone.
    pub fn close(&self, parents: &[BorrowedFd<'_>]) {
        for end in parents {
            // SAFETY: the number is the parent's; its owner is never dropped here, since the child ends without destructors.
            unsafe { libc::close(end.as_raw_fd()) };
        }
    }

    /// Closes everything but one descriptor.
    pub fn close_all_but(&self, kept: BorrowedFd<'_>) -> io::Result<()> {
        let kept = kept.as_raw_fd() as u32;
        for (first, last) in [(0, kept.checked_sub(1)), (kept + 1, Some(u32::MAX))] {
            let Some(last) = last else { continue };
            // SAFETY: as above; whoever calls this uses no other descriptor afterwards.
            if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }
}
