//! Least rights: what the process gives up once everything is set up.
//!
//! Frames are parsed by threads that have no capability, see no files (but for the slow path: the directories of
//! resolv.conf), and may make only the system calls that their modules declare beside their code. A call outside the
//! list ends the process: a data plane that does what its code does not say is not one to go on with.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use caps::{CapSet, Capability};
use landlock::{
    ABI, Access, AccessFs, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus,
};
use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::host::engine::{EngineKind, direct, epoll, uring};
use crate::host::{datagram, errors, listen, options, processors, splice, tcp};
use crate::link::tap;
use crate::monitor::{session, sockets};
use crate::observe::recorder;
use crate::{exchange, pac, port_broker, slow};

/// What is given up could not be given up.
#[derive(Debug, thiserror::Error)]
#[error("the sandbox could not be closed: {what} ({error})")]
pub struct SandboxError {
    what: &'static str,
    error: String,
}

fn failed<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> SandboxError {
    move |error| SandboxError { what, error: error.to_string() }
}

/// Gives up all capabilities but `kept` and the way to any. Threads started later have no others either.
pub fn drop_capabilities(kept: &[Capability]) -> Result<(), SandboxError> {
    // Dropping from the bounding set takes a capability itself; without one there is nothing to bound.
    let _ = caps::clear(None, CapSet::Bounding);
    let kept = kept.iter().copied().collect();
    for set in [CapSet::Ambient, CapSet::Inheritable] {
        caps::clear(None, set).map_err(failed("dropping capabilities"))?;
    }
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &kept).map_err(failed("dropping capabilities"))?;
    }
    nix::sys::prctl::set_no_new_privs().map_err(failed("no_new_privs"))
}

/// Shuts the file system but for reading below `readable`, and removing files in `tidied`. A kernel without Landlock
/// (before 5.13) leaves it open: returns whether it is shut.
pub fn shut_files(readable: &[PathBuf], tidied: &[&Path]) -> Result<bool, SandboxError> {
    let abi = ABI::V5;
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(abi))
        .and_then(Ruleset::create)
        .map_err(failed("Landlock"))?;
    for path in readable {
        // A directory that does not exist now cannot be named; one that comes later stays shut.
        let Ok(directory) = PathFd::new(path) else { continue };
        let rule = PathBeneath::new(directory, AccessFs::from_read(abi) & !AccessFs::Execute);
        ruleset = ruleset.add_rule(rule).map_err(failed("Landlock"))?;
    }
    for path in tidied {
        let directory = PathFd::new(path).map_err(failed("Landlock"))?;
        let rule = PathBeneath::new(directory, AccessFs::RemoveFile);
        ruleset = ruleset.add_rule(rule).map_err(failed("Landlock"))?;
    }
    let status = ruleset.restrict_self().map_err(failed("Landlock"))?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

/// The kinds of threads there are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Thread {
    /// A worker on an engine.
    Worker(EngineKind),
    /// The slow path.
    Slow,
    /// The writer of captures.
    Recorder,
    /// What deals with the monitor of a virtual machine.
    Link,
    /// The first thread, which waits for signals and for the end.
    Main,
    /// The process that binds privileged ports.
    PortBroker,
    /// The process that forks evaluators of PAC scripts.
    PacStarter,
    /// One of those.
    PacEvaluator,
}

/// What memory, threads, logging and the runtime take, whatever a thread does.
const RUNTIME: &[c_long] = &[
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_clock_gettime,
    libc::SYS_sched_yield,
    libc::SYS_getrandom,
    libc::SYS_write,
    libc::SYS_close,
    // The standard library of debug builds looks at what it closes.
    libc::SYS_fcntl,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    // The end of a thread, and of the process by a panic.
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    // The allocator counts processors before it makes its ninth arena.
    libc::SYS_sched_getaffinity,
];

/// What the C library tries of its own accord and does without when it is refused: the allocator reads
/// /proc/sys/vm/overcommit_memory before it gives a thread's memory back for the first time. No offence, then, but not
/// allowed either.
const REFUSED: &[c_long] = &[libc::SYS_openat];

/// What a worker takes on any engine.
const WORKER: &[&[c_long]] = &[
    direct::SYSTEM_CALLS,
    options::SYSTEM_CALLS,
    errors::SYSTEM_CALLS,
    tcp::SYSTEM_CALLS,
    datagram::SYSTEM_CALLS,
    exchange::SYSTEM_CALLS,
    splice::SYSTEM_CALLS,
    processors::SYSTEM_CALLS,
    tap::SYSTEM_CALLS,
    // A service's stream.
    &[libc::SYS_socketpair],
];

/// What the first thread takes once the others run: it waits, takes signals, speaks with the helper, looks whether what it
/// is attached to is there, ends the others, and removes the name of its socket.
const MAIN: &[c_long] = &[
    libc::SYS_poll,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_kill,
    libc::SYS_getpgid,
    libc::SYS_statx,
    libc::SYS_newfstatat,
    libc::SYS_clock_nanosleep,
    libc::SYS_unlink,
];

fn system_calls(thread: Thread) -> Vec<c_long> {
    let own: Vec<&[c_long]> = match thread {
        Thread::Worker(EngineKind::IoUring) => [WORKER, &[uring::SYSTEM_CALLS]].concat(),
        Thread::Worker(EngineKind::Epoll) => [WORKER, &[epoll::SYSTEM_CALLS]].concat(),
        Thread::Slow => {
            vec![
                slow::SYSTEM_CALLS,
                slow::dns::SYSTEM_CALLS,
                slow::api::SYSTEM_CALLS,
                slow::proxy::SYSTEM_CALLS,
                listen::SYSTEM_CALLS,
                tcp::SYSTEM_CALLS,
                options::SYSTEM_CALLS,
                datagram::SYSTEM_CALLS,
                exchange::SYSTEM_CALLS,
                pac::SYSTEM_CALLS,
            ]
        }
        Thread::Main => vec![MAIN, exchange::SYSTEM_CALLS],
        Thread::Link => vec![session::SYSTEM_CALLS, sockets::SYSTEM_CALLS, exchange::SYSTEM_CALLS],
        Thread::PortBroker => vec![port_broker::SYSTEM_CALLS],
        Thread::PacStarter => vec![pac::STARTER_SYSTEM_CALLS],
        Thread::PacEvaluator => vec![pac::EVALUATOR_SYSTEM_CALLS],
        Thread::Recorder => vec![recorder::SYSTEM_CALLS, exchange::SYSTEM_CALLS],
    };
    [RUNTIME].into_iter().chain(own).flatten().copied().collect()
}

/// Every namespace that a clone can make.
const NEW_NAMESPACES: i32 = libc::CLONE_NEWNS
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP;

/// What the arguments of a call must be: any of these, or anything where there are none. Landlock does not see the
/// sockets of other programs in the file system, nor what is not a file at all.
fn rules(thread: Thread, call: c_long) -> Result<Vec<SeccompRule>, SandboxError> {
    let is = |index: u8, value: i32| {
        SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value as u64)
    };
    // Without SOCK_NONBLOCK and SOCK_CLOEXEC.
    let is_type = |index: u8, value: i32| {
        SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(0xf), value as u64)
    };
    let mut rules = match call {
        libc::SYS_socket => vec![vec![is(0, libc::AF_INET)], vec![is(0, libc::AF_INET6)]],
        libc::SYS_socketpair => vec![vec![is_type(1, libc::SOCK_STREAM)]],
        libc::SYS_tgkill => vec![vec![is(0, std::process::id() as i32)]],
        // The calling thread, and no other.
        libc::SYS_sched_setaffinity => vec![vec![is(0, 0)]],
        libc::SYS_getrusage => vec![vec![is(0, libc::RUSAGE_THREAD)]],
        _ => Vec::new(),
    };
    if (call, thread) == (libc::SYS_prlimit64, Thread::PacEvaluator) {
        rules = vec![vec![is(0, 0), is(1, libc::RLIMIT_CPU as i32)]];
    }
    if (call, thread) == (libc::SYS_clone, Thread::PacStarter) {
        // A process, in the namespaces that this one is in; not a thread. The other flags are the C library's.
        let others = libc::CLONE_VM | libc::CLONE_THREAD | NEW_NAMESPACES;
        rules = vec![vec![SeccompCondition::new(
            0,
            SeccompCmpArgLen::Dword,
            SeccompCmpOp::MaskedEq(others as u32 as u64),
            0,
        )]];
    }
    if (call, thread) == (libc::SYS_socket, Thread::Link) {
        rules = vec![vec![is(0, libc::AF_UNIX), is_type(1, libc::SOCK_STREAM)]];
    }
    if (call, thread) == (libc::SYS_socket, Thread::Slow) {
        // The C library asks by such a socket which interface a name belongs to.
        rules.push(vec![is(0, libc::AF_UNIX), is_type(1, libc::SOCK_DGRAM)]);
    }
    let rule = |conditions: Vec<Result<SeccompCondition, _>>| {
        conditions.into_iter().collect::<Result<Vec<_>, _>>().and_then(SeccompRule::new)
    };
    rules.into_iter().map(rule).collect::<Result<_, _>>().map_err(failed("seccomp"))
}

fn program(
    thread: Thread,
    calls: impl Iterator<Item = c_long>,
    others: SeccompAction,
    these: SeccompAction,
) -> Result<BpfProgram, SandboxError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(failed("seccomp"))?;
    let rules = calls.map(|call| Ok((call, rules(thread, call)?)));
    let rules: BTreeMap<i64, Vec<_>> = rules.collect::<Result<_, SandboxError>>()?;
    SeccompFilter::new(rules, others, these, arch).and_then(TryInto::try_into).map_err(failed("seccomp"))
}

/// Limits the calling thread to the system calls of its kind.
pub fn limit_system_calls(thread: Thread) -> Result<(), SandboxError> {
    let allowed = system_calls(thread);
    let refused: Vec<c_long> = REFUSED.iter().copied().filter(|call| !allowed.contains(call)).collect();
    // Of the answers of several filters the strictest counts: the second one passes on what the first one refuses.
    let error = SeccompAction::Errno(libc::EACCES as u32);
    let refusing = program(thread, refused.iter().copied(), SeccompAction::Allow, error)?;
    let allowed = allowed.into_iter().chain(refused);
    // The first thread handles nothing of the guest's: what it does that it should not is a mistake of ours.
    let offence = if thread == Thread::Main {
        SeccompAction::Errno(libc::EPERM as u32)
    } else {
        SeccompAction::KillProcess
    };
    let limiting = program(thread, allowed, offence, SeccompAction::Allow)?;
    seccompiler::apply_filter(&refusing).map_err(failed("seccomp"))?;
    seccompiler::apply_filter(&limiting).map_err(failed("seccomp"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::Signal;
    use nix::sys::wait::WaitStatus;

    #[test]
    fn no_thread_may_start_programs_or_open_new_ways_in() {
        let forbidden = [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_ptrace,
            libc::SYS_mount,
            libc::SYS_setns,
            libc::SYS_unshare,
            libc::SYS_io_uring_setup,
            libc::SYS_io_uring_register,
            libc::SYS_bpf,
        ];
        let workers = [EngineKind::IoUring, EngineKind::Epoll].map(Thread::Worker);
        for thread in workers.into_iter().chain([Thread::Slow, Thread::Recorder, Thread::Link, Thread::Main])
        {
            let allowed = system_calls(thread);
            for call in forbidden {
                assert!(!allowed.contains(&call), "{thread:?} may call {call}");
            }
        }
        let worker = system_calls(Thread::Worker(EngineKind::IoUring));
        assert!(!worker.contains(&libc::SYS_openat), "a worker opens no file");
        let evaluator = system_calls(Thread::PacEvaluator);
        let ways_out =
            [libc::SYS_openat, libc::SYS_socket, libc::SYS_connect, libc::SYS_sendmsg, libc::SYS_kill];
        for call in forbidden.into_iter().chain(ways_out) {
            assert!(!evaluator.contains(&call), "a script may call {call}");
        }
        let starter = system_calls(Thread::PacStarter);
        let forks = [libc::SYS_clone];
        for call in forbidden.into_iter().chain([libc::SYS_openat, libc::SYS_socket]) {
            assert!(!starter.contains(&call) || forks.contains(&call), "the starter may call {call}");
        }
    }

    /// What becomes of a process that limits itself as a worker does and then makes a call; its status is the call's
    /// error. In a process of its own: the filters cannot be taken off again.
    #[allow(unsafe_code)]
    fn after_call(call: fn()) -> WaitStatus {
        // SAFETY: the child makes system calls only, and ends without running anything of the parent's.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let limited =
                drop_capabilities(&[]).and_then(|()| limit_system_calls(Thread::Worker(EngineKind::Epoll)));
            if limited.is_ok() {
                call();
            }
            let error = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
            // SAFETY: ends the process.
            unsafe { libc::_exit(error) }
        }
        nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(child), None).unwrap()
    }

    #[test]
    fn a_call_outside_the_list_ends_the_process() {
        let status = after_call(|| {
            // SAFETY: no memory is passed.
            #[allow(unsafe_code)]
            unsafe {
                libc::syscall(libc::SYS_getppid);
            }
        });
        assert!(matches!(status, WaitStatus::Signaled(_, Signal::SIGSYS, _)), "{status:?}");
    }

    #[test]
    fn sockets_are_of_the_internet_signals_for_the_own_process_and_processors_for_the_own_thread() {
        let killed = |call| matches!(after_call(call), WaitStatus::Signaled(_, Signal::SIGSYS, _));
        #[allow(unsafe_code)]
        // SAFETY: no memory is passed, but to `socketpair`, which gets room for its two descriptors.
        unsafe {
            let internet = after_call(|| {
                libc::socket(libc::AF_INET6, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0);
                libc::socketpair(
                    libc::AF_UNIX,
                    libc::SOCK_STREAM | libc::SOCK_CLOEXEC,
                    0,
                    [0; 2].as_mut_ptr(),
                );
            });
            assert!(matches!(internet, WaitStatus::Exited(..)), "{internet:?}");
            assert!(killed(|| {
                libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0);
            }));
            assert!(killed(|| {
                libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, 0);
            }));
            assert!(killed(|| {
                libc::socketpair(libc::AF_UNIX, libc::SOCK_DGRAM, 0, [0; 2].as_mut_ptr());
            }));
            assert!(killed(|| {
                libc::syscall(libc::SYS_tgkill, 1, 1, libc::SIGURG);
            }));
            assert!(killed(|| {
                libc::syscall(libc::SYS_sched_setaffinity, 1, 0, 0);
            }));
            assert!(killed(|| {
                libc::syscall(libc::SYS_getrusage, libc::RUSAGE_SELF, 0);
            }));
            let own = after_call(|| {
                libc::syscall(libc::SYS_getrusage, libc::RUSAGE_THREAD, 0);
                libc::syscall(libc::SYS_sched_setaffinity, 0, 0, 0);
            });
            assert!(matches!(own, WaitStatus::Exited(..)), "{own:?}");
        }
    }

    #[test]
    fn what_the_allocator_tries_to_read_is_refused_and_no_offence() {
        let status = after_call(|| {
            // SAFETY: the path ends with a zero.
            #[allow(unsafe_code)]
            unsafe {
                libc::open(c"/proc/sys/vm/overcommit_memory".as_ptr(), libc::O_RDONLY);
            }
        });
        assert!(matches!(status, WaitStatus::Exited(_, libc::EACCES)), "{status:?}");
    }
}
