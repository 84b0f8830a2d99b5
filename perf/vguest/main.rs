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
//! It says `ready` once the rings are served, and ends with the back-end's connection or by SIGTERM, when it prints what
//! went through its queues. Addresses, and setting the interface up, are the caller's job.

mod front_end;
mod queue;
mod receive;
mod tap;
mod transmit;

#[path = "../../tests/rig/driver_ring.rs"]
mod driver_ring;

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use hythe::flow::slab::Slot;
use hythe::host::engine::epoll::Epoll;
use hythe::host::engine::uring::Uring;
use hythe::host::engine::{Engine, EngineChoice, EngineKind, Interest, Token};
use hythe::io::Operations;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use driver_ring::{Memory, Ring, START};
use front_end::{Connection, Features};
use receive::Receive;
use transmit::Transmit;

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
    /// Entries of either queue, a power of two
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
    let mut guest = Guest::start(&cli)?;
    println!("ready");
    let end = match cli.engine.decide()? {
        EngineKind::IoUring => guest.serve(Uring::new()?),
        EngineKind::Epoll => guest.serve(Epoll::new()?),
    };
    eprintln!("vguest: to the back-end: {}", guest.transmit.queue);
    eprintln!("vguest: from the back-end: {}", guest.receive.queue);
    end
}

/// Where the rings lie in the guest's memory.
const TRANSMIT: u64 = START;
const RECEIVE: u64 = TRANSMIT + Ring::LEN;
const BUFFERS: u64 = RECEIVE + Ring::LEN;

/// What an event is about.
const FROM_TAP: u8 = 1;
const RECEIVED: u8 = 2;
const TRANSMITTED: u8 = 3;
const CONNECTION: u8 = 4;
const SIGNAL: u8 = 5;

/// A tap, and the driver between it and the back-end.
struct Guest {
    tap: OwnedFd,
    transmit: Transmit,
    receive: Receive,
    connection: Connection,
    signals: SignalFd,
}

impl Guest {
    fn start(cli: &Cli) -> anyhow::Result<Self> {
        let signals = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect::<SigSet>();
        signals.thread_block()?;
        let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;

        let (tap, udp_segmentation) = tap::create(&cli.guest, &cli.interface)?;
        let mut connection = Connection::open(&cli.socket, udp_segmentation)
            .with_context(|| cli.socket.display().to_string())?;
        let features = connection.features();
        tap::set_offloads(&tap, features)?;

        let receive_buffers = BUFFERS + Transmit::room(cli.queue);
        let end = receive_buffers + Receive::room(cli.queue, cli.buffer);
        let memory = Memory::new((end - START) as usize);
        let ring = |base| {
            let ring = Ring::new(&memory, base, cli.queue);
            if features.has(Features::EVENT_INDEX) { ring } else { ring.without_event_index() }
        };
        let indirect = features.has(Features::INDIRECT);
        let transmit = Transmit::new(ring(TRANSMIT), &memory, BUFFERS, cli.queue, indirect)?;
        let receive = Receive::new(ring(RECEIVE), &memory, receive_buffers, cli.queue, cli.buffer)?;
        connection.start(&memory, &receive.queue, &transmit.queue)?;
        Ok(Self { tap, transmit, receive, connection, signals })
    }

    /// Until the connection ends, or a signal comes.
    fn serve(&mut self, mut engine: impl Engine) -> anyhow::Result<()> {
        let Self { tap, transmit, receive, connection, signals } = self;
        let watched: [(u8, RawFd); 4] = [
            (RECEIVED, receive.queue.interrupts.as_raw_fd()),
            (TRANSMITTED, transmit.queue.interrupts.as_raw_fd()),
            (CONNECTION, connection.as_raw_fd()),
            (SIGNAL, signals.as_raw_fd()),
        ];
        for (kind, fd) in watched {
            engine.watch(fd, token(kind), Interest::Readable)?;
        }
        let (mut operations, mut events) = (Operations::default(), Vec::new());
        loop {
            operations.clear();
            receive.begin(&mut operations, tap)?;
            transmit.begin(&mut operations, tap);
            engine.run(&mut operations);
            receive.end(&operations)?;
            let more = transmit.end(&operations)?;

            // Readiness of the tap is told also when it came in between.
            let sleeps = !more && receive.awaits_frames() && transmit.awaits_room();
            if sleeps && transmit.has_room() {
                engine.arm(tap.as_raw_fd(), token(FROM_TAP), Interest::Readable)?;
            }
            engine.wait(if sleeps { None } else { Some(Duration::ZERO) }, &mut events);
            if sleeps {
                receive.queue.wants_no_interrupt();
                transmit.queue.wants_no_interrupt();
            }
            // Whoever writes to the connection of his own accord has nothing that a driver would wait for: it has ended.
            if events.drain(..).any(|event| matches!(event.token.kind, CONNECTION | SIGNAL)) {
                return Ok(());
            }
        }
    }
}

fn token(kind: u8) -> Token {
    Token { kind, slot: Slot { index: 0, generation: 0 } }
}
