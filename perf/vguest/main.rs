//! vguest: a virtio network driver in user space, behind which a network namespace is the guest.
//!
//! What a virtual machine does at the front of a vhost-user back-end, without the machine: the guest's TCP is that of the
//! host's kernel at its own speed, and only the back-end and its rings are measured. vguest is to them what Linux's
//! virtio-net is: split rings with event indices, indirect descriptors, merged receive buffers, and every offload that the
//! back-end offers and a tap has.
//!
//! ```text
//! back-end ══ memory, kicks, interrupts ══ vguest ── tap0 ── the guest's TCP
//!   (hythe vm, passt)                        (the guest's namespace)
//! ```
//!
//! A frame to the back-end is read from the tap into the guest's memory and offered there; one from it is written to the
//! tap out of the buffers that it fills. So vguest touches no payload, and the copies between tap and memory stand for
//! those that a program in a machine makes at its sockets. What a pass does is one batch of the engine that hythe itself
//! would use: reads and writes in one system call. It asks for interrupts only before it sleeps, and allocates nothing once
//! it runs.
//!
//! With `--queues N` there are N pairs of virtqueues, as many queues of the tap, and a thread for each, as each processor of
//! a machine serves its own. The guest's kernel sends a flow's frames over the queue by which its last one came, so the
//! back-end decides, as it does with a tap of its own. How many pairs are used is said over the control queue.
//!
//! It says `ready` once the rings are served, and ends with the back-end's connection or by SIGTERM, when it prints what
//! went through its queues. Addresses, and setting the interface up, are the caller's job.

mod control;
mod front_end;
mod pair;
mod queue;
mod receive;
mod tap;
mod transmit;

#[path = "../../tests/rig/driver_ring.rs"]
mod driver_ring;

use std::os::fd::AsRawFd;
use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use hythe::host::engine::epoll::Epoll;
use hythe::host::engine::{Engine, EngineChoice, EngineKind, Interest};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use control::Control;
use driver_ring::{Memory, START};
use front_end::Connection;
use pair::{OVER, Pair, Shape, token};

/// Joins a tap of a network namespace to a vhost-user back-end.
#[derive(Parser)]
struct Cli {
    /// The back-end's socket
    socket: PathBuf,
    /// The guest's namespace, as a file
    guest: PathBuf,
    /// What the tap is called in there
    #[arg(long, value_name = "NAME", default_value = "tap0")]
    interface: String,
    /// Pairs of queues
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
    queues: u16,
    /// Entries of each queue, a power of two
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = power_of_two)]
    queue: u16,
    /// Bytes of a receive buffer; a frame may fill several
    #[arg(long, value_name = "BYTES", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(128..=65_536))]
    buffer: u32,
    /// How input and output is done
    #[arg(long, value_enum, default_value = "auto")]
    engine: EngineChoice,
}

fn power_of_two(text: &str) -> Result<u16, String> {
    let number: u16 = text.parse().map_err(|error| format!("{error}"))?;
    let fits = number.is_power_of_two() && (2..=1024).contains(&number);
    if fits { Ok(number) } else { Err("must be a power of two from 2 to 1024".to_string()) }
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let signals = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect::<SigSet>();
    signals.thread_block()?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    let mut guest = Guest::start(&cli)?;
    let engine = cli.engine.decide()?;
    println!("ready");
    let end = guest.serve(engine, &signals);
    for (number, Pair { transmit, receive, .. }) in guest.pairs.iter().enumerate() {
        eprintln!("vguest: pair {number}, to the back-end: {}", transmit.queue);
        eprintln!("vguest: pair {number}, from the back-end: {}", receive.queue);
    }
    end
}

/// A tap, and the driver between it and the back-end.
struct Guest {
    pairs: Vec<Pair>,
    connection: Connection,
}

impl Guest {
    fn start(cli: &Cli) -> anyhow::Result<Self> {
        let tap = tap::create(&cli.guest, &cli.interface, cli.queues)?;
        let mut connection = Connection::open(&cli.socket, tap.udp_segmentation, cli.queues)
            .with_context(|| cli.socket.display().to_string())?;
        let features = connection.features();
        tap::set_offloads(tap.queues.first().context("a tap without a queue")?, features)?;

        // One pair behind the other, and the control queue behind them.
        let shape = Shape { size: cli.queue, buffer: cli.buffer, features };
        let at = |pair: u16| START + u64::from(pair) * shape.room();
        let control_at = at(cli.queues);
        let memory = Memory::new((control_at + Control::ROOM - START) as usize);
        let pairs = (0..).zip(tap.queues).map(|(number, queue)| Pair::new(queue, &memory, at(number), shape));
        let pairs = pairs.collect::<anyhow::Result<Vec<Pair>>>()?;
        let mut control = None;
        if cli.queues > 1 {
            control = Some(Control::new(&memory, control_at, shape)?);
        }
        connection.start(&memory, &pairs, control.as_mut())?;
        Ok(Self { pairs, connection })
    }

    /// Until the connection ends, a signal comes, or a pair has failed.
    fn serve(&mut self, engine: EngineKind, signals: &SignalFd) -> anyhow::Result<()> {
        let Self { pairs, connection } = self;
        let over = EventFd::new(EFD_NONBLOCK)?;
        let mut watch = Epoll::new()?;
        for fd in [over.as_raw_fd(), connection.as_raw_fd(), signals.as_raw_fd()] {
            watch.watch(fd, token(OVER), Interest::Readable)?;
        }
        std::thread::scope(|scope| {
            let serve = |pair: &'_ mut Pair| {
                let end = pair.serve(engine, over.as_raw_fd());
                over.write(1)?;
                end
            };
            let threads: Vec<_> = pairs.iter_mut().map(|pair| scope.spawn(move || serve(pair))).collect();
            // Whoever writes to the connection of his own accord has nothing that a driver would wait for: it has ended.
            let mut events = Vec::new();
            while events.is_empty() {
                watch.wait(None, &mut events);
            }
            over.write(1)?;
            let failed = || anyhow::anyhow!("the thread of a pair has failed");
            threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| failed())?)
        })
    }
}
