//! The model engine: carries a worker's operations out on the model kernel, and reports readiness.

use std::cell::RefCell;
use std::io;
use std::os::fd::RawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::exchange::Waker;
use crate::host::engine::{Engine, EngineCounts, Event, Interest, Token};
use crate::io::Operations;

use super::kernel::{FIRST_LINK_FD, Kernel, ROOM_FD};
use super::link::Port;
use super::stage::Stage;

/// What wakes a worker out of its sleep, seen from outside.
pub struct Alarm {
    waker: Arc<Waker>,
    /// Somebody may have put something into the mailbox since the last look: saves system calls.
    pub suspected: std::cell::Cell<bool>,
}

impl Alarm {
    /// The alarm of a worker with this waker.
    pub fn new(waker: Arc<Waker>) -> Self {
        Self { waker, suspected: std::cell::Cell::new(true) }
    }

    /// Whether the worker's waker was signalled and not cleared.
    pub fn rings(&self) -> bool {
        if !self.suspected.get() {
            return false;
        }
        let mut fds = [PollFd::new(self.waker.as_fd(), PollFlags::POLLIN)];
        let rings = poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0);
        self.suspected.set(rings);
        rings
    }
}

/// The engine of one worker.
pub struct ModelEngine {
    id: usize,
    stage: Rc<Stage>,
    kernel: Rc<RefCell<Kernel>>,
    port: Rc<RefCell<Port>>,
    alarm: Rc<Alarm>,
    waker_token: Option<Token>,
    counts: EngineCounts,
}

impl ModelEngine {
    /// The engine of the worker with this number, on a kernel and a link.
    pub fn new(
        id: usize,
        stage: Rc<Stage>,
        kernel: Rc<RefCell<Kernel>>,
        port: Rc<RefCell<Port>>,
        alarm: Rc<Alarm>,
    ) -> Self {
        Self { id, stage, kernel, port, alarm, waker_token: None, counts: EngineCounts::default() }
    }
}

impl Engine for ModelEngine {
    fn run(&mut self, operations: &mut Operations) {
        operations.perform(|operation, memory, message| {
            let mut kernel = self.kernel.borrow_mut();
            let result = kernel.operate(operation.kind, operation.fd, memory, operation.extra, message);
            self.counts.operations += 1;
            if result > 0 {
                self.stage.note_activity();
            }
            result
        });
    }

    fn watch(&mut self, fd: RawFd, token: Token, interest: Interest) -> io::Result<()> {
        if fd < super::kernel::FIRST_FD {
            // The only real descriptor that is watched is the mailbox's.
            self.waker_token = Some(token);
            return Ok(());
        }
        if self.kernel.borrow_mut().watch(self.id, fd, token, interest) {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::EBADF))
        }
    }

    fn arm(&mut self, fd: RawFd, token: Token, interest: Interest) -> io::Result<()> {
        self.stage.check(fd >= FIRST_LINK_FD && interest == Interest::Readable, || {
            format!("descriptor {fd} is armed for {interest:?}, which the link does not ask for")
        });
        let mut port = self.port.borrow_mut();
        if fd < FIRST_LINK_FD + ROOM_FD {
            port.armed = Some(token);
        } else {
            port.room.arm(Some(token));
        }
        Ok(())
    }

    fn unwatch(&mut self, fd: RawFd, token: Token) {
        if fd >= FIRST_LINK_FD + ROOM_FD {
            self.port.borrow_mut().room.arm(None);
        } else {
            self.kernel.borrow_mut().unwatch(fd, token);
        }
    }

    fn wait(&mut self, _timeout: Option<Duration>, events: &mut Vec<Event>) {
        let before = events.len();
        for token in self.port.borrow_mut().ring().into_iter().flatten() {
            events.push(Event {
                token,
                readable: true,
                writable: false,
                closed: false,
                failed: false,
                urgent: false,
            });
        }
        if let Some(token) = self.waker_token
            && self.alarm.rings()
        {
            events.push(Event {
                token,
                readable: true,
                writable: false,
                closed: false,
                failed: false,
                urgent: false,
            });
        }
        self.kernel.borrow_mut().report(self.id, &mut |token, ready| {
            events.push(Event {
                token,
                readable: ready.readable,
                writable: ready.writable,
                closed: ready.closed,
                failed: ready.failed,
                urgent: false,
            });
        });
        if events.len() > before {
            self.stage.note_activity();
        }
    }

    fn counts(&self) -> EngineCounts {
        self.counts
    }
}
