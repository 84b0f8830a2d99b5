//! The engine for where io_uring is forbidden or old: readiness by mio (epoll), operations as system calls at once.

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Poll};

use super::{Engine, EngineCounts, Event, Interest, Token, direct};
use crate::io::{Kind, Operations};

/// The system calls made here besides those of [`direct`].
pub const SYSTEM_CALLS: &[libc::c_long] = &[libc::SYS_epoll_wait, libc::SYS_epoll_pwait, libc::SYS_epoll_ctl];

const EVENTS_AT_ONCE: usize = 256;

/// The epoll engine.
pub struct Epoll {
    poll: Poll,
    events: Events,
    counts: EngineCounts,
    /// Descriptors that `arm` has registered: with edge-triggered reports it has to be done once only.
    armed: Vec<(RawFd, Token)>,
}

impl Epoll {
    /// A new engine.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            poll: Poll::new()?,
            events: Events::with_capacity(EVENTS_AT_ONCE),
            counts: EngineCounts::default(),
            armed: Vec::new(),
        })
    }
}

impl Engine for Epoll {
    fn run(&mut self, operations: &mut Operations) {
        let Operations { list, pieces, messages, .. } = operations;
        for operation in list {
            let first = operation.first_piece as usize;
            let message = match operation.kind {
                Kind::SendDatagram | Kind::ReceiveDatagram => messages.get_mut(operation.extra as usize),
                _ => None,
            };
            direct::perform(operation, &pieces[first..first + operation.pieces as usize], message);
            self.counts.system_calls += 1;
            self.counts.operations += 1;
        }
    }

    fn watch(&mut self, fd: RawFd, token: Token, interest: Interest) -> io::Result<()> {
        self.counts.system_calls += 1;
        let interest = match interest {
            Interest::Readable => mio::Interest::READABLE,
            Interest::Both => mio::Interest::READABLE | mio::Interest::WRITABLE | mio::Interest::PRIORITY,
        };
        self.poll.registry().register(&mut SourceFd(&fd), mio::Token(token.pack() as usize), interest)
    }

    fn arm(&mut self, fd: RawFd, token: Token, interest: Interest) -> io::Result<()> {
        if self.armed.contains(&(fd, token)) {
            return Ok(());
        }
        self.watch(fd, token, interest)?;
        self.armed.push((fd, token));
        Ok(())
    }

    fn unwatch(&mut self, fd: RawFd, token: Token) {
        self.counts.system_calls += 1;
        self.armed.retain(|known| *known != (fd, token));
        // It fails only for a descriptor that is not registered, which is what is wanted.
        let _ = self.poll.registry().deregister(&mut SourceFd(&fd));
    }

    fn wait(&mut self, timeout: Option<Duration>, events: &mut Vec<Event>) {
        self.counts.system_calls += 1;
        if timeout != Some(Duration::ZERO) {
            self.counts.sleeps += 1;
        }
        // A signal ends the wait early, with no events.
        if self.poll.poll(&mut self.events, timeout).is_err() {
            return;
        }
        events.extend(self.events.iter().map(|event| Event {
            token: Token::unpack(event.token().0 as u64),
            readable: event.is_readable(),
            writable: event.is_writable(),
            closed: event.is_read_closed() || event.is_error(),
            failed: event.is_error(),
            urgent: event.is_priority(),
        }));
    }

    fn counts(&self) -> EngineCounts {
        self.counts
    }
}
