//! The processes of PAC scripts: the starter, and the evaluator that it starts.

use std::cell::Cell;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

use crate::channel::{Channel, Message};
use crate::fork::{Child, Process, fork_child};

use super::engine::{Engine, World};
use super::words::{self, Failure, FromEvaluator, ToEvaluator};

/// The system calls of the starter. It sees nothing of a script; what it forks gives up all but [`EVALUATOR_SYSTEM_CALLS`].
pub const STARTER_SYSTEM_CALLS: &[libc::c_long] = &[
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_socketpair,
    libc::SYS_clone,
    libc::SYS_set_robust_list,
    libc::SYS_kill,
    libc::SYS_wait4,
    libc::SYS_close_range,
    libc::SYS_getppid,
    libc::SYS_prlimit64,
    libc::SYS_prctl,
    libc::SYS_seccomp,
    // The evaluator's: what a process may not, none of its children may.
    libc::SYS_read,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
];

/// The system calls of an evaluator. By the last one it bounds its own time, and nothing else.
pub const EVALUATOR_SYSTEM_CALLS: &[libc::c_long] =
    &[libc::SYS_read, libc::SYS_recvfrom, libc::SYS_sendto, libc::SYS_prlimit64];

/// How long the starter may take. A fork waits for nothing.
const PATIENCE: Duration = Duration::from_secs(1);
/// How much an evaluator may map what it was forked with: what the engine lets a script have, and what text takes on its
/// way.
const MEMORY_MAX: u64 = 128 << 20;
/// Seconds of the processor that an evaluator may take in its life, and for one question, begun ones included: the engine looks at
/// the clock between steps of a script, and some of its own steps are long (joining a billion holes of an array takes half a minute).
const CPU_MAX_S: u64 = 60;
const CPU_QUESTION_S: u64 = 2;
/// Questions after which an evaluator makes room for another: those of an honest script do not add up to that bound.
const QUESTIONS_MAX: u32 = 10_000;

/// Who takes rights from itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Limit {
    /// The starter, once it is there.
    Starter,
    /// An evaluator, before it sees a script.
    Evaluator,
}

/// What starts evaluators, as hythe has it.
pub struct Starter {
    channel: Channel,
    /// How many were wanted: an answer that comes too late is not taken for the next one's.
    wanted: Cell<u32>,
}

/// What hythe wants. In either case the evaluator that there is, is of no use any more.
#[derive(Clone, Copy)]
enum Wanted {
    /// A fresh one, under this number.
    Evaluator(u32),
    /// None.
    Nothing,
}

/// What became of the evaluator of a number: whether its socket comes with this.
struct Started {
    number: u32,
    is_there: bool,
}

impl Message for Wanted {
    fn encode(&self) -> Vec<u8> {
        match self {
            // Nothing at all would be the channel's end.
            Self::Nothing => vec![0],
            Self::Evaluator(number) => number.to_be_bytes().to_vec(),
        }
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [0] => Some(Self::Nothing),
            number => Some(Self::Evaluator(u32::from_be_bytes(number.try_into().ok()?))),
        }
    }
}

impl Message for Started {
    fn encode(&self) -> Vec<u8> {
        [&self.number.to_be_bytes()[..], &[u8::from(self.is_there)]].concat()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (number, is_there) = bytes.split_first_chunk()?;
        Some(Self { number: u32::from_be_bytes(*number), is_there: is_there == [1] })
    }
}

/// Forks the starter. `limit` takes from it, and from each evaluator, what it does not need; no other thread exists yet.
pub fn start(limit: impl Fn(Limit) -> io::Result<()>) -> io::Result<(Starter, Process)> {
    let (ours, theirs) = Channel::pair()?;
    let parent = Pid::this();
    let live = |child: &Child| {
        let prepared = child
            .close_all_but(theirs.as_fd())
            .and_then(|()| child.live_as_long_as(parent, c"hythe-pac-start"))
            .and_then(|()| bound());
        // While files can be read.
        Engine::learn_time_zone();
        let lived = prepared.and_then(|()| limit(Limit::Starter)).and_then(|()| serve(&theirs, &limit));
        u8::from(lived.is_err())
    };
    let process = Process::new(fork_child(live)?);
    let patience = TimeVal::new(PATIENCE.as_secs() as i64, i64::from(PATIENCE.subsec_micros()));
    setsockopt(&ours.as_fd(), sockopt::ReceiveTimeout, &patience)?;
    Ok((Starter { channel: ours, wanted: Cell::new(0) }, process))
}

impl Starter {
    /// A fresh evaluator's socket. The evaluator before is ended.
    pub fn start(&self) -> io::Result<UnixStream> {
        let number = self.wanted.get().wrapping_add(1);
        self.wanted.set(number);
        self.channel.send(&Wanted::Evaluator(number), &[])?;
        loop {
            let Some((started, mut sockets)) = self.channel.receive::<Started>()? else {
                return Err(io::ErrorKind::BrokenPipe.into());
            };
            if started.number != number {
                // Of one that was given up meanwhile.
                continue;
            }
            return match sockets.pop() {
                Some(socket) if started.is_there => Ok(UnixStream::from(socket)),
                _ => Err(io::ErrorKind::OutOfMemory.into()),
            };
        }
    }

    /// Ends the evaluator that there is.
    pub fn end(&self) {
        // Where the starter is gone, so is the evaluator.
        let _ = self.channel.send(&Wanted::Nothing, &[]);
    }
}

/// The kernel's bounds, for this process and what it forks.
fn bound() -> io::Result<()> {
    // What is mapped now is hythe's program and its libraries (proc(5): kibibytes).
    let status = std::fs::read_to_string("/proc/self/status")?;
    let mapped = status
        .lines()
        .find_map(|line| line.strip_prefix("VmSize:")?.trim().split(' ').next()?.parse::<u64>().ok());
    let memory = mapped.ok_or(io::ErrorKind::InvalidData)?.saturating_mul(1024).saturating_add(MEMORY_MAX);
    setrlimit(Resource::RLIMIT_AS, memory, memory)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    setrlimit(Resource::RLIMIT_FSIZE, 0, 0)?;
    Ok(())
}

/// The starter's life.
fn serve(channel: &Channel, limit: &impl Fn(Limit) -> io::Result<()>) -> io::Result<()> {
    let mut evaluator: Option<Process> = None;
    while let Some((wanted, _)) = channel.receive::<Wanted>()? {
        drop(evaluator.take());
        let Wanted::Evaluator(number) = wanted else { continue };
        match fork_evaluator(limit) {
            Ok((process, socket)) => {
                evaluator = Some(process);
                channel.send(&Started { number, is_there: true }, &[socket.as_raw_fd()])?;
            }
            Err(_) => channel.send(&Started { number, is_there: false }, &[])?,
        }
    }
    Ok(())
}

fn fork_evaluator(limit: &impl Fn(Limit) -> io::Result<()>) -> io::Result<(Process, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    let parent = Pid::this();
    let live = move |child: &Child| {
        let prepared = child
            .close_all_but(theirs.as_fd())
            .and_then(|()| child.live_as_long_as(parent, c"hythe-pac"))
            .and_then(|()| Ok(xcpu().thread_unblock()?))
            .and_then(|()| Ok(setrlimit(Resource::RLIMIT_NOFILE, 0, 0)?));
        let lived = prepared.and_then(|()| limit(Limit::Evaluator)).and_then(|()| evaluate(theirs));
        u8::from(lived.is_err())
    };
    Ok((Process::new(fork_child(live)?), ours))
}

/// The signal of a process whose time is over, which ends it.
fn xcpu() -> SigSet {
    Signal::SIGXCPU.into()
}

/// Has the kernel end this process if it computes for longer than any question may take.
fn bound_time() -> io::Result<()> {
    let used = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?.tv_sec() as u64;
    let until = (used + CPU_QUESTION_S).min(CPU_MAX_S);
    Ok(setrlimit(Resource::RLIMIT_CPU, until, CPU_MAX_S)?)
}

/// Names, by asking the client.
struct Client(Rc<UnixStream>);

impl World for Client {
    fn resolve(&self, name: &str) -> Vec<IpAddr> {
        let asked = words::send(&mut &*self.0, &FromEvaluator::Resolve(name.to_string()));
        match asked.and_then(|()| words::receive(&mut &*self.0)) {
            Ok(ToEvaluator::Resolved(addresses)) => addresses,
            // Nobody listens: what is read next fails as well.
            _ => Vec::new(),
        }
    }
}

/// An evaluator's life: one script, and questions about it. It ends when nobody asks any more, and after what leaves a script in
/// a state that nobody knows.
pub(super) fn evaluate(stream: UnixStream) -> io::Result<()> {
    let stream = Rc::new(stream);
    let engine = Engine::new(Client(stream.clone())).ok_or(io::ErrorKind::OutOfMemory)?;
    let ToEvaluator::Load(script) = words::receive(&mut &*stream)? else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    bound_time()?;
    let loaded = engine.load(&script);
    drop(script);
    let said = loaded.map_or_else(FromEvaluator::Failed, |()| FromEvaluator::Loaded);
    words::send(&mut &*stream, &said)?;
    for _ in 0..QUESTIONS_MAX {
        let ToEvaluator::Find { url, host, own } = words::receive(&mut &*stream)? else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        bound_time()?;
        let found = engine.find(&url, &host, own);
        let is_last = found == Err(Failure::TimedOut);
        words::send(&mut &*stream, &found.map_or_else(FromEvaluator::Failed, FromEvaluator::Found))?;
        if is_last {
            break;
        }
    }
    Ok(())
}
