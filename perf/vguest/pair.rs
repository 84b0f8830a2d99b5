//! A pair of virtqueues, and the tap's queue that they are joined to: served by a thread of its own.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use hythe::flow::slab::Slot;
use hythe::host::engine::epoll::Epoll;
use hythe::host::engine::uring::Uring;
use hythe::host::engine::{Engine, EngineKind, Interest, Token};
use hythe::io::Operations;

use crate::driver_ring::{Memory, Ring};
use crate::front_end::Features;
use crate::receive::Receive;
use crate::transmit::Transmit;

/// What an event is about.
const FROM_TAP: u8 = 1;
const RECEIVED: u8 = 2;
const TRANSMITTED: u8 = 3;
pub const OVER: u8 = 4;

/// A token for events of a kind.
pub fn token(kind: u8) -> Token {
    Token { kind, slot: Slot { index: 0, generation: 0 } }
}

/// What all pairs have in common.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Entries of a queue.
    pub size: u16,
    /// Bytes of a receive buffer.
    pub buffer: u32,
    /// What was agreed on.
    pub features: Features,
}

impl Shape {
    /// How much memory a pair takes: its rings, and behind them its buffers.
    pub fn room(self) -> u64 {
        let buffers = Transmit::room(self.size) + Receive::room(self.size, self.buffer);
        2 * Ring::LEN + buffers.next_multiple_of(4096)
    }

    /// A ring at an address.
    pub fn ring(self, memory: &Memory, at: u64) -> Ring {
        let ring = Ring::new(memory, at, self.size);
        if self.features.has(Features::EVENT_INDEX) { ring } else { ring.without_event_index() }
    }
}

/// A pair of queues.
pub struct Pair {
    tap: OwnedFd,
    pub transmit: Transmit,
    pub receive: Receive,
}

impl Pair {
    /// The one whose memory begins at `at`.
    pub fn new(tap: OwnedFd, memory: &Memory, at: u64, shape: Shape) -> anyhow::Result<Self> {
        let Shape { size, buffer, features } = shape;
        let (receive_at, buffers) = (at + Ring::LEN, at + 2 * Ring::LEN);
        let receive_buffers = buffers + Transmit::room(size);
        let indirect = features.has(Features::INDIRECT);
        let transmit = Transmit::new(shape.ring(memory, at), memory, buffers, size, indirect)?;
        let receive = Receive::new(shape.ring(memory, receive_at), memory, receive_buffers, size, buffer)?;
        Ok(Self { tap, transmit, receive })
    }

    /// Moves frames until `over` is readable.
    pub fn serve(&mut self, engine: EngineKind, over: RawFd) -> anyhow::Result<()> {
        match engine {
            EngineKind::IoUring => self.serve_on(Uring::new()?, over),
            EngineKind::Epoll => self.serve_on(Epoll::new()?, over),
        }
    }

    fn serve_on(&mut self, mut engine: impl Engine, over: RawFd) -> anyhow::Result<()> {
        let Self { tap, transmit, receive } = self;
        let watched = [
            (RECEIVED, receive.queue.interrupts.as_raw_fd()),
            (TRANSMITTED, transmit.queue.interrupts.as_raw_fd()),
            (OVER, over),
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
            if events.drain(..).any(|event| event.token.kind == OVER) {
                return Ok(());
            }
        }
    }
}
