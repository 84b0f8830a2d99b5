//! The process inside the guest's namespace.
//!
//! One thread, no data plane. It makes or enters the namespace, sets it up, runs the command and hands out sockets.
#![allow(unsafe_code)]

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, Uid, fork};

use super::channel::{Channel, FromHelper, ToHelper};
use super::{Plan, Target, configure};
use crate::host::tcp;
use crate::link::tap;

/// Exit statuses of `hythe run`, as env(1) and docker(1) use them.
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

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
            let status = Helper { channel, broker, plan, command: None }.live();
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
}

impl Helper<'_> {
    fn live(&mut self) -> u8 {
        match self.set_up() {
            Ok(()) => self.serve().unwrap_or(125),
            Err(message) => {
                // hythe says it; if hythe is gone there is nobody to tell.
                let _ = self.channel.report(&FromHelper::Failed(message), &[]);
                125
            }
        }
    }

    fn set_up(&self) -> Result<(), String> {
        // Signals of the terminal are the command's; those for hythe are passed on by hythe.
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)
            .map_err(|e| format!("signal mask: {e}"))?;
        // What the command leaves behind becomes a child of this process, so that it can be found.
        // SAFETY: no memory is passed.
        unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
        self.enter()?;
        let plan = self.plan;
        let created = tap::create(&plan.interface, plan.queues).map_err(|error| error.to_string())?;
        let queues: Vec<RawFd> = created.queues.iter().map(AsRawFd::as_raw_fd).collect();
        let notes = configure::interface(plan).map_err(|error| {
            format!("the guest's interface {} cannot be set up ({error})", plan.interface)
        })?;
        for note in notes {
            self.report(&FromHelper::Note(note), &[])?;
        }
        if matches!(plan.target, Target::Run { .. }) {
            self.dress();
        }
        self.report(&FromHelper::Tap { udp_segmentation: created.udp_segmentation }, &queues)?;
        self.report(&FromHelper::Ready, &[])
    }

    fn report(&self, message: &FromHelper, descriptors: &[RawFd]) -> Result<(), String> {
        self.channel.report(message, descriptors).map_err(|error| format!("hythe is gone ({error})"))
    }

    /// Makes or enters the namespace.
    fn enter(&self) -> Result<(), String> {
        match &self.plan.target {
            Target::Run { .. } => {
                if !Uid::effective().is_root() {
                    new_user_namespace()?;
                }
                let mut flags = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS;
                if self.plan.hostname.is_some() {
                    flags |= CloneFlags::CLONE_NEWUTS;
                }
                unshare(flags).map_err(|error| {
                    format!(
                        "a new network namespace cannot be made ({error}): it takes root, or user namespaces"
                    )
                })
            }
            Target::Path(path) => join(path, CloneFlags::CLONE_NEWNET),
            Target::Process(pid) => {
                let file = |kind: &str| PathBuf::from(format!("/proc/{pid}/ns/{kind}"));
                if !Uid::effective().is_root() && !same_file(&file("user"), Path::new("/proc/self/ns/user")) {
                    join(&file("user"), CloneFlags::CLONE_NEWUSER)?;
                }
                join(&file("net"), CloneFlags::CLONE_NEWNET)
            }
        }
    }

    /// What a command expects besides the interface. None of it is worth failing for.
    fn dress(&self) {
        if let Some(name) = &self.plan.hostname
            && let Err(error) = nix::unistd::sethostname(name)
        {
            let _ =
                self.channel.report(&FromHelper::Note(format!("the host name cannot be set ({error})")), &[]);
        }
        if let Err(error) = configure::resolv_conf(&self.plan.resolv_conf) {
            let note =
                format!("the command sees the host's /etc/resolv.conf ({error}): names may not resolve");
            let _ = self.channel.report(&FromHelper::Note(note), &[]);
        }
    }

    /// Serves until hythe or the command ends; returns the exit status.
    fn serve(&mut self) -> io::Result<u8> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        let children = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        loop {
            let watched = [self.channel.as_fd(), self.broker.as_fd(), children.as_fd()];
            let mut ready = watched.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            match poll(&mut ready, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                other => other?,
            };
            let [from_hythe, from_customers, from_children] = ready.map(|fd| fd.any().unwrap_or(false));
            if from_children {
                while children.read_signal()?.is_some() {}
                if let Some(status) = self.reap() {
                    Self::end_descendants();
                    let _ = self.channel.report(&FromHelper::Exited(status), &[]);
                    return Ok(0);
                }
            }
            // The end of the broker's channel comes with that of the other one.
            if from_customers
                && let Some(ToHelper::Sockets { count, v4 }) = self.broker.receive_from_hythe()?
            {
                self.open_sockets(count, v4)?;
            }
            if from_hythe {
                let Some(message) = self.channel.receive_from_hythe()? else {
                    Self::end_descendants();
                    return Ok(0);
                };
                self.obey(&message)?;
            }
        }
    }

    fn obey(&mut self, message: &ToHelper) -> io::Result<()> {
        match (message, &self.plan.target) {
            (ToHelper::Go, Target::Run { command }) => match spawn(command) {
                Ok(child) => {
                    self.command = Some(child);
                    Ok(())
                }
                Err((status, message)) => {
                    self.channel.report(&FromHelper::Note(message), &[])?;
                    self.channel.report(&FromHelper::Exited(status), &[])
                }
            },
            (ToHelper::Go, _) => Ok(()),
            (ToHelper::Signal(signal), _) => {
                if let (Some(command), Ok(signal)) = (self.command, Signal::try_from(*signal)) {
                    // It may have ended just now.
                    let _ = kill(command, signal);
                }
                Ok(())
            }
            (ToHelper::Sockets { .. }, _) => Ok(()),
        }
    }

    /// Opens sockets of the namespace for the broker's customer.
    fn open_sockets(&self, count: u8, v4: bool) -> io::Result<()> {
        let sockets: Vec<OwnedFd> = (0..count).filter_map(|_| tcp::new_stream(v4).ok()).collect();
        let descriptors: Vec<RawFd> = sockets.iter().map(AsRawFd::as_raw_fd).collect();
        self.broker.report(&FromHelper::Sockets { v4 }, &descriptors)
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

fn same_file(a: &Path, b: &Path) -> bool {
    match (std::fs::read_link(a), std::fs::read_link(b)) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}

fn join(path: &Path, kind: CloneFlags) -> Result<(), String> {
    let refused = |error: io::Error| {
        let hint = match error.kind() {
            io::ErrorKind::NotFound => "it does not exist",
            io::ErrorKind::PermissionDenied => "it takes root, or the namespace's owner",
            _ => "is it a namespace?",
        };
        format!("cannot enter the namespace {} ({error}): {hint}", path.display())
    };
    let file = File::open(path).map_err(refused)?;
    setns(file, kind).map_err(|error| refused(error.into()))
}

/// A user namespace in which this user is root: with the rights over the network namespace that comes next.
fn new_user_namespace() -> Result<(), String> {
    let (uid, gid) = (Uid::effective(), nix::unistd::Gid::effective());
    unshare(CloneFlags::CLONE_NEWUSER).map_err(|error| {
        format!(
            "a user namespace cannot be made ({error}): run as root, or allow it (sysctl user.max_user_namespaces, \
             kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)"
        )
    })?;
    let write = |file: &str, content: String| {
        std::fs::write(format!("/proc/self/{file}"), content)
            .map_err(|error| format!("the user namespace cannot be set up (/proc/self/{file}: {error})"))
    };
    write("setgroups", "deny".into())?;
    write("uid_map", format!("0 {uid} 1"))?;
    write("gid_map", format!("0 {gid} 1"))
}

/// Starts the command. When it cannot be executed: the exit status that says so, and why.
fn spawn(command: &[OsString]) -> Result<Pid, (u8, String)> {
    let Some(program) = command.first() else { return Err((NOT_FOUND, "no command is given".into())) };
    let failed = |status: u8, error: &dyn std::fmt::Display| {
        (status, format!("{}: cannot be run ({error})", program.to_string_lossy()))
    };
    let arguments: Vec<CString> = command
        .iter()
        .map(|argument| CString::new(argument.as_bytes()))
        .collect::<Result<_, _>>()
        .map_err(|error| failed(NOT_EXECUTABLE, &error))?;
    let (reading, writing) =
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|e| failed(NOT_EXECUTABLE, &e))?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }.map_err(|error| failed(NOT_EXECUTABLE, &error))? {
        ForkResult::Child => {
            // SAFETY: no memory is passed.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
            let error = match nix::unistd::execvp(&arguments[0], &arguments) {
                Err(error) => error,
                Ok(never) => match never {},
            };
            let _ = File::from(writing).write_all(&(error as i32).to_ne_bytes());
            // SAFETY: ends the process.
            unsafe { libc::_exit(i32::from(NOT_EXECUTABLE)) }
        }
        ForkResult::Parent { child } => {
            drop(writing);
            let mut number = [0; 4];
            match File::from(reading).read_exact(&mut number) {
                // The pipe was closed by a successful exec.
                Err(_) => Ok(child),
                Ok(()) => {
                    let _ = waitpid(child, None);
                    let error = io::Error::from_raw_os_error(i32::from_ne_bytes(number));
                    let status =
                        if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { NOT_EXECUTABLE };
                    Err(failed(status, &error))
                }
            }
        }
    }
}
