//! tapbridge: copies frames between two taps and understands none of them.
//!
//! The bound of every forwarder that serves a tap: what the kernel's tap and the copy through user space cost, with no
//! TCP of its own. Both taps offload checksums and segmentation, so a 64 KiB segment is one read and one write; the
//! frames of a batch are one system call each way, by the engine that hythe itself would use.
//!
//! ```text
//! guest ── tap0 ──┐                 ┌── tap0 ── the namespace in which this runs
//!    (its own     └─── tapbridge ───┘
//!     namespace)
//! ```
//!
//! It says `ready` once both taps are there, and runs until it is killed. Setting their addresses is the caller's job.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use hythe::flow::slab::Slot;
use hythe::host::engine::epoll::Epoll;
use hythe::host::engine::uring::Uring;
use hythe::host::engine::{Engine, EngineChoice, EngineKind, Interest, Token};
use hythe::io::{Buffers, Kind, OperationId, Operations};
use hythe::link::tap;
use nix::sched::{CloneFlags, setns};

/// The virtio-net header, Ethernet, and an IP packet of 64 KiB.
const FRAME_MAX: usize = 12 + 14 + 65_535;

/// Frames of a batch at the most.
const BATCH: usize = 64;

const TAP: &str = "tap0";

/// Copies frames between a tap of a guest's namespace and one of this namespace, both named tap0.
#[derive(Parser)]
struct Cli {
    /// The guest's namespace, as a file
    guest: PathBuf,
    /// How input and output is done
    #[arg(long, value_enum, default_value = "auto")]
    engine: EngineChoice,
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let here = create_tap()?;
    let namespace = File::open(&cli.guest).with_context(|| cli.guest.display().to_string())?;
    // Only this thread changes its namespace; a tap stays in the one where it was made.
    let inside = std::thread::spawn(move || {
        setns(&namespace, CloneFlags::CLONE_NEWNET)?;
        create_tap()
    });
    let there =
        inside.join().map_err(|_| anyhow::anyhow!("the thread in the guest's namespace has failed"))??;
    println!("ready");
    match cli.engine.decide()? {
        EngineKind::IoUring => bridge(Uring::new()?, &[here, there]),
        EngineKind::Epoll => bridge(Epoll::new()?, &[here, there]),
    }
}

fn create_tap() -> anyhow::Result<OwnedFd> {
    tap::create(TAP, 1)?.queues.pop().context("a tap without a queue")
}

fn bridge(mut engine: impl Engine, taps: &[OwnedFd; 2]) -> anyhow::Result<()> {
    let [here, there] = taps;
    let mut directions = [Direction::new(here, there), Direction::new(there, here)];
    let (mut operations, mut events) = (Operations::default(), Vec::new());
    loop {
        operations.clear();
        for direction in &mut directions {
            direction.begin_read(&mut operations);
        }
        engine.run(&mut operations);
        for direction in &mut directions {
            direction.end_read(&operations);
        }
        if directions.iter().all(|direction| direction.frames.is_empty()) {
            for (number, tap) in taps.iter().enumerate() {
                let slot = Slot { index: number as u32, generation: 0 };
                engine.arm(tap.as_raw_fd(), Token { kind: 1, slot }, Interest::Readable)?;
            }
            engine.wait(None, &mut events);
            events.clear();
            continue;
        }
        operations.clear();
        for direction in &mut directions {
            direction.write(&mut operations);
        }
        // A frame that the other side does not take is lost, as on a wire.
        engine.run(&mut operations);
    }
}

/// Frames from one tap to the other.
struct Direction<'t> {
    from: &'t OwnedFd,
    to: &'t OwnedFd,
    buffers: Buffers,
    reads: Vec<OperationId>,
    /// Buffer and length of each frame that was read.
    frames: Vec<(usize, usize)>,
    /// How many frames to ask for: one more than came last.
    ask: usize,
}

impl<'t> Direction<'t> {
    fn new(from: &'t OwnedFd, to: &'t OwnedFd) -> Self {
        let buffers = Buffers::new(BATCH, FRAME_MAX);
        Self { from, to, buffers, reads: Vec::new(), frames: Vec::new(), ask: 1 }
    }

    fn begin_read(&mut self, operations: &mut Operations) {
        let read = |slot| operations.push(self.from.as_raw_fd(), Kind::Read, [self.buffers.piece(slot)]);
        self.reads.clear();
        self.reads.extend((0..self.ask).map(read));
    }

    fn end_read(&mut self, operations: &Operations) {
        // A frame may come between two reads of a batch: behind one that found nothing there can be one that did.
        let reads = self.reads.iter().enumerate();
        self.frames.clear();
        self.frames.extend(reads.filter_map(|(slot, id)| Some((slot, operations.result(*id).ok()?))));
        self.ask =
            if self.frames.len() == self.ask { self.ask * 2 } else { self.frames.len() + 1 }.min(BATCH);
    }

    fn write(&mut self, operations: &mut Operations) {
        for (slot, len) in &self.frames {
            operations.push(self.to.as_raw_fd(), Kind::Write, [self.buffers.piece(*slot).part(0, *len)]);
        }
    }
}
