//! A queue of the driver's: its ring, how either side tells the other, and what went through it.

use std::fmt;
use std::io;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::driver_ring::Ring;

/// A queue.
pub struct Queue {
    /// Its ring.
    pub ring: Ring,
    /// The driver tells the device.
    pub kicks: EventFd,
    /// The device tells the driver. It is never read before the end: that it is written to shows, and how often stays in it.
    pub interrupts: EventFd,
    /// Frames that the other side took.
    pub frames: u64,
    /// Frames that it did not take.
    pub lost: u64,
    chains: u64,
    kicked: u64,
}

impl Queue {
    /// A queue through which nothing went.
    pub fn new(ring: Ring) -> io::Result<Self> {
        let (kicks, interrupts) = (EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?);
        Ok(Self { ring, kicks, interrupts, frames: 0, lost: 0, chains: 0, kicked: 0 })
    }

    /// The next so many entries of the ring are available, which the device hears if it wants to.
    pub fn offer(&mut self, count: u16) -> io::Result<()> {
        if count == 0 {
            return Ok(());
        }
        self.ring.offer(count);
        self.chains += u64::from(count);
        if self.ring.wants_kick() {
            self.kicked += 1;
            self.kicks.write(1)?;
        }
        Ok(())
    }

    /// The driver looks at the ring anyway.
    pub fn wants_no_interrupt(&self) {
        self.ring.set_used_event(u16::MAX);
    }
}

impl fmt::Display for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { frames, lost, chains, kicked, .. } = self;
        let interrupts = self.interrupts.read().unwrap_or(0);
        write!(f, "{frames} frames, {lost} lost, {chains} chains, {kicked} kicks, {interrupts} interrupts")
    }
}
