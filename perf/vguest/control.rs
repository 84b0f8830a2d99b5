//! The control queue: by it a driver says how many pairs of queues it uses (virtio 1.3, 5.1.6.5.5).

use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::{Context, ensure};
use hythe::host::engine::epoll::Epoll;
use hythe::host::engine::{Engine, Interest};

use crate::driver_ring::{Memory, NEXT, Ring, WRITE};
use crate::pair::{Shape, token};
use crate::queue::Queue;

/// `VIRTIO_NET_CTRL_MQ`, `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET`.
const SET_PAIRS: [u8; 2] = [4, 0];

/// `VIRTIO_NET_OK`.
const DONE: u8 = 0;

/// What an event is about.
const CONTROL: u8 = 1;

const PATIENCE: Duration = Duration::from_secs(5);

/// The queue, through which one request goes at a time.
pub struct Control {
    /// Its ring.
    pub queue: Queue,
    memory: Memory,
    question: u64,
    answer: u64,
}

impl Control {
    /// How much memory it takes: its ring, and behind that a request and its answer.
    pub const ROOM: u64 = Ring::LEN + 4096;

    /// The one whose memory begins at `at`.
    pub fn new(memory: &Memory, at: u64, shape: Shape) -> anyhow::Result<Self> {
        let (question, answer) = (at + Ring::LEN, at + Ring::LEN + 64);
        let ring = shape.ring(memory, at);
        ring.describe(0, question, 4, NEXT, 1);
        ring.describe(1, answer, 1, WRITE, 0);
        Ok(Self { queue: Queue::new(ring)?, memory: memory.clone(), question, answer })
    }

    /// The first so many pairs are used from now on. Returns once the device has said so.
    pub fn use_pairs(&mut self, pairs: u16) -> anyhow::Result<()> {
        self.memory.write(self.question, &SET_PAIRS);
        self.memory.write(self.question + 2, &pairs.to_le_bytes());
        self.memory.write(self.answer, &[!DONE]);
        let ring = &self.queue.ring;
        ring.set_entry(ring.counts().0, 0);
        self.queue.offer(1)?;
        if self.queue.ring.awaits_used(0) {
            let mut engine = Epoll::new()?;
            engine.watch(self.queue.interrupts.as_raw_fd(), token(CONTROL), Interest::Readable)?;
            engine.wait(Some(PATIENCE), &mut Vec::new());
        }
        self.queue.ring.take_used().context("no answer on the control queue")?;
        let mut answer = [0];
        self.memory.read(self.answer, &mut answer);
        ensure!(answer == [DONE], "the device does not serve {pairs} pairs of queues");
        Ok(())
    }
}
