//! The process inside the guest's namespace.
//!
//! One thread, no data plane. It makes or enters the namespace, sets it up, runs the command and hands out sockets.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getpgid, getpgrp};

use super::resolver::Cover;
use super::words::{FromHelper, ToHelper};
use super::{Plan, Target, command, configure, enter};
use crate::channel::Channel;
use crate::host::tcp;
use crate::link::tap;

/// Forks the helper with its ends of the channel and of the broker's channel; `ours` are hythe's ends, which the
/// helper closes.
pub fn start(plan: &Plan, theirs: [Channel; 2], ours: [BorrowedFd<'_>; 2]) -> io::Result<Pid> {
    // SAFETY: no other thread exists yet (the node starts its threads later), so the child may do as it likes.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            // SAFETY: the parent's ends belong to the parent; these copies would keep the channels open for ever.
            for end in ours {
                unsafe { libc::close(end.as_raw_fd()) };
            }
            let [channel, broker] = theirs;
            let status = Helper { channel, broker, plan, command: None, resolver: None }.live();
            // No destructors of the parent's things, no flushing of its buffers.
            // SAFETY: ends the process.
            unsafe { libc::_exit(i32::from(status)) }
        }
    }
}

struct Helper<'p> {
    channel: Channel,
    broker: Channel,
    plan: &'p Plan,
    command: Option<Pid>,
    /// The command's resolv.conf.
    resolver: Option<Cover>,
}

impl Helper<'_> {
    fn live(&mut self) -> u8 {
        match self.set_up() {
            Ok(()) => {
                let served = self.serve();
                // However it ended: nothing is to be left.
                Self::end_descendants();
                match served {
                    Ok(Some(status)) => {
                        let _ = self.channel.send(&FromHelper::Exited(status), &[]);
                        0
                    }
                    Ok(None) => 0,
                    Err(_) => 125,
                }
            }
            Err(message) => {
                // hythe says it; if hythe is gone there is nobody to tell.
                let _ = self.channel.send(&FromHelper::Failed(message), &[]);
                125
            }
        }
    }

    fn set_up(&mut self) -> Result<(), String> {
        // Signals of the terminal are the command's; those for hythe are passed on by hythe.
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)
            .map_err(|e| format!("signal mask: {e}"))?;
        // What the command leaves behind becomes a child of this process, so that it can be found.
        // SAFETY: no memory is passed.
        unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
        // Nothing is changed before hythe has everything else.
        if !matches!(self.channel.receive(), Ok(Some((ToHelper::SetUp, _)))) {
            return Err("hythe has given up".into());
        }
        let plan = self.plan;
        enter::enter(plan)?;
        let created = tap::create(&plan.interface, plan.queues).map_err(|error| error.to_string())?;
        let queues: Vec<RawFd> = created.queues.iter().map(AsRawFd::as_raw_fd).collect();
        let notes = configure::interface(plan).map_err(|error| {
            format!("the guest's interface {} cannot be set up ({error})", plan.interface)
        })?;
        for note in notes {
            self.report(&FromHelper::Note(note), &[])?;
        }
        match plan.target {
            Target::Run { .. } => self.dress(),
            Target::Path(_) | Target::Process(_) => give_up_rights()?,
        }
        self.report(&FromHelper::Tap { udp_segmentation: created.udp_segmentation }, &queues)?;
        self.report(&FromHelper::Ready, &[])
    }

    fn report(&self, message: &FromHelper, descriptors: &[RawFd]) -> Result<(), String> {
        self.channel.send(message, descriptors).map_err(|error| format!("hythe is gone ({error})"))
    }

    /// Tells the user something. If hythe is gone there is nobody to tell.
    fn note(&self, note: String) {
        let _ = self.channel.send(&FromHelper::Note(note), &[]);
    }

    /// What a command expects besides the interface. None of it is worth failing for.
    fn dress(&mut self) {
        if let Some(name) = &self.plan.hostname
            && let Err(error) = nix::unistd::sethostname(name)
        {
            self.note(format!("the host name cannot be set ({error})"));
        }
        let mut resolver = Cover::new(&self.plan.resolv_conf);
        self.judge_resolver(resolver.lay());
        if resolver.fd().is_none() {
            let note = "/etc cannot be watched (sysctl fs.inotify.max_user_instances): when the host's resolv.conf is \
                        replaced, the command will see that one";
            self.note(note.into());
        }
        self.resolver = Some(resolver);
    }

    fn judge_resolver(&self, covered: io::Result<()>) {
        match covered {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.note(
                "the host has no /etc/resolv.conf that the command's could cover: it has none until there is one, and \
                 names may not resolve"
                    .into(),
            ),
            Err(error) => self.note(format!(
                "the command sees the host's /etc/resolv.conf ({error}): names may not resolve"
            )),
        }
    }

    /// Serves until hythe or the command ends; returns the command's exit status if it was the command.
    fn serve(&mut self) -> io::Result<Option<u8>> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        let children = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        loop {
            let [from_hythe, from_customers, from_children, resolver_changed] = self.ready(&children)?;
            if resolver_changed && let Some(resolver) = &mut self.resolver {
                let covered = resolver.follow();
                self.judge_resolver(covered);
            }
            if from_children {
                while children.read_signal()?.is_some() {}
                if let Some(status) = self.reap() {
                    return Ok(Some(status));
                }
            }
            // The end of the broker's channel comes with that of the other one.
            if from_customers && let Some((ToHelper::Sockets { count, v4 }, _)) = self.broker.receive()? {
                self.open_sockets(count, v4)?;
            }
            if from_hythe {
                let Some((message, _)) = self.channel.receive()? else { return Ok(None) };
                self.obey(&message)?;
            }
        }
    }

    fn ready(&self, children: &SignalFd) -> io::Result<[bool; 4]> {
        let own = [self.channel.as_fd(), self.broker.as_fd(), children.as_fd()];
        let watched = own.into_iter().chain(self.resolver.as_ref().and_then(Cover::fd));
        let mut fds: Vec<PollFd<'_>> = watched.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => return Ok([false; 4]),
            other => other?,
        };
        Ok([0, 1, 2, 3].map(|index| fds.get(index).is_some_and(|fd| fd.any().unwrap_or(false))))
    }

    fn obey(&mut self, message: &ToHelper) -> io::Result<()> {
        match (message, &self.plan.target) {
            (ToHelper::Go, Target::Run { command }) => {
                match command::spawn(command, &self.plan.signal_mask) {
                    Ok(child) => {
                        self.command = Some(child);
                        Ok(())
                    }
                    Err((status, message)) => {
                        self.channel.send(&FromHelper::Note(message), &[])?;
                        self.channel.send(&FromHelper::Exited(status), &[])
                    }
                }
            }
            (ToHelper::Go, _) => Ok(()),
            (ToHelper::Signal { number, from_terminal }, _) => {
                if let (Some(command), Ok(signal)) = (self.command, Signal::try_from(*number)) {
                    // The terminal has sent it to all of hythe's process group: to the command too, if it is still there.
                    let has_it = *from_terminal && getpgid(Some(command)) == Ok(getpgrp());
                    if !has_it {
                        // It may have ended just now.
                        let _ = kill(command, signal);
                    }
                }
                Ok(())
            }
            (ToHelper::SetUp | ToHelper::Sockets { .. }, _) => Ok(()),
        }
    }

    /// Opens sockets of the namespace for the broker's customer.
    fn open_sockets(&self, count: u8, v4: bool) -> io::Result<()> {
        let sockets: Vec<OwnedFd> = (0..count).filter_map(|_| tcp::new_stream(v4).ok()).collect();
        let descriptors: Vec<RawFd> = sockets.iter().map(AsRawFd::as_raw_fd).collect();
        self.broker.send(&FromHelper::Sockets { v4 }, &descriptors)
    }

    /// Collects children that have ended; the exit status of the command, if it was among them.
    fn reap(&self) -> Option<u8> {
        let mut status = None;
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) if Some(pid) == self.command => status = Some(code as u8),
                Ok(WaitStatus::Signaled(pid, signal, _)) if Some(pid) == self.command => {
                    status = Some(128 + signal as u8);
                }
                Ok(WaitStatus::StillAlive) | Err(_) => return status,
                Ok(_) => {}
            }
        }
    }

    /// Ends whatever the command has left behind: children of this process, since it is their reaper, and then theirs.
    fn end_descendants() {
        loop {
            for child in children_of_this_process() {
                // The number cannot have been given to another process: it is ours to wait for.
                let _ = kill(child, Signal::SIGKILL);
            }
            match waitpid(None, None) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return,
            }
        }
    }
}

fn children_of_this_process() -> Vec<Pid> {
    let own = std::process::id();
    let listed = std::fs::read_to_string(format!("/proc/self/task/{own}/children"));
    if let Ok(listed) = listed {
        return listed.split_whitespace().filter_map(|pid| pid.parse().ok()).map(Pid::from_raw).collect();
    }
    // A kernel without CONFIG_PROC_CHILDREN.
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    let parent_of = |pid: i32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse::<u32>().ok()
    };
    processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| parent_of(*pid) == Some(own))
        .map(Pid::from_raw)
        .collect()
}

/// What is left to do in a namespace that was joined, opening sockets, takes no right.
fn give_up_rights() -> Result<(), String> {
    use caps::CapSet;
    // Dropping from the bounding set takes a capability itself; without one there is nothing to bound.
    let _ = caps::clear(None, CapSet::Bounding);
    for set in [CapSet::Ambient, CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        caps::clear(None, set).map_err(|error| format!("capabilities cannot be given up ({error})"))?;
    }
    nix::sys::prctl::set_no_new_privs().map_err(|error| format!("no_new_privs cannot be set ({error})"))
}
