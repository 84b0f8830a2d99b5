//! The control queue: what a driver asks of the device as a whole (virtio 1.3, 5.1.6.5).
//!
//! Only front-ends that leave it to the device have one here (User-Mode Linux); QEMU answers its guest itself and enables
//! rings. The one thing that can be asked is how many pairs of queues are used. The session serves it, not a worker.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::io::Piece;
use crate::link::virtqueue::{Fault, SplitQueue};

use super::Ring;
use super::memory::GuestMemory;

/// `VIRTIO_NET_CTRL_MQ`, `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET` (5.1.6.5.5).
const SET_PAIRS: [u8; 2] = [4, 0];
/// Class, command, and the number of pairs, little-endian.
const SET_PAIRS_LEN: usize = 4;

/// `VIRTIO_NET_OK` and `VIRTIO_NET_ERR`, which the device answers.
const DONE: u8 = 0;
const REFUSED: u8 = 1;

/// Requests answered before anything else is listened to.
const AT_ONCE: usize = 16;

/// The queue, while it runs.
pub struct ControlQueue {
    queue: SplitQueue,
    kick: OwnedFd,
    call: Option<OwnedFd>,
    request: Vec<Piece>,
    answer: Vec<Piece>,
}

impl ControlQueue {
    /// The queue, or `None` when its ring does not lie in the guest's memory as virtio wants it to.
    pub fn new(memory: &Arc<GuestMemory>, ring: Ring) -> Option<Self> {
        let queue = SplitQueue::new(memory.clone(), &ring.parts)?;
        let Ring { kick, call, .. } = ring;
        Some(Self { queue, kick, call, request: Vec::new(), answer: Vec::new() })
    }

    /// Readable when the driver has asked something.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// The next entry of the available ring.
    pub fn next_available(&self) -> u16 {
        self.queue.next_available()
    }

    /// Answers what the driver has asked; `use_pairs` says whether so many pairs can be used, and does it. Returns whether
    /// there may be more. After a fault the queue must not be used any more.
    pub fn serve(&mut self, mut use_pairs: impl FnMut(u16) -> bool) -> Result<bool, Fault> {
        // Only one reads it; nothing in it is no reason not to look.
        let _ = nix::unistd::read(&self.kick, &mut [0; 8]);
        for _ in 0..AT_ONCE {
            self.request.clear();
            self.answer.clear();
            let Some(chain) = self.queue.take_request(&mut self.request, &mut self.answer)? else {
                return Ok(!self.queue.ask_for_notification());
            };
            let done = pairs_wanted(&self.request).is_some_and(&mut use_pairs);
            let answer = [if done { DONE } else { REFUSED }];
            let written = self.answer.first().map_or(0, |piece| piece.copy_from(&answer));
            self.queue.give_back(chain, written as u32);
            self.queue.publish();
            if self.queue.wants_interrupt()
                && let Some(call) = &self.call
            {
                // A counter that is full says it too.
                let _ = nix::unistd::write(call, &1u64.to_ne_bytes());
            }
        }
        Ok(true)
    }
}

/// How many pairs of queues a request wants used; `None` for any other request.
fn pairs_wanted(request: &[Piece]) -> Option<u16> {
    let mut bytes = Vec::with_capacity(SET_PAIRS_LEN);
    for piece in request {
        piece.part(0, SET_PAIRS_LEN - bytes.len()).copy_to(&mut bytes);
    }
    let pairs = bytes.strip_prefix(&SET_PAIRS)?;
    Some(u16::from_le_bytes(pairs.try_into().ok()?))
}
