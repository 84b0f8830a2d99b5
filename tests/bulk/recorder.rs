//! An engine that looks at each operation on a socket before another one carries it out: where its memory lies.

use std::io;
use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hythe::host::engine::{Engine, EngineCounts, Event, Interest, Token};
use hythe::io::{Kind, Operations};

/// What was seen.
#[derive(Default)]
pub struct Record {
    /// Bytes that sockets took.
    pub sent: AtomicUsize,
    /// Bytes that sockets gave.
    pub received: AtomicUsize,
    /// Pieces of both.
    pub pieces: AtomicUsize,
    /// Pieces that do not lie in the guest's memory.
    pub astray: AtomicUsize,
}

pub struct Recorder<E> {
    pub engine: E,
    /// Where the guest's memory lies.
    pub memory: Range<usize>,
    pub record: Arc<Record>,
}

impl<E: Engine> Engine for Recorder<E> {
    fn run(&mut self, operations: &mut Operations) {
        self.engine.run(operations);
        for operation in operations.iter() {
            let bytes = match operation.kind() {
                Kind::Send | Kind::SendDatagram | Kind::SendEach => &self.record.sent,
                Kind::Peek | Kind::Receive | Kind::ReceiveDatagram => &self.record.received,
                // Of the link itself: kicks and calls. A discard has no memory.
                Kind::Read | Kind::Write | Kind::Discard => continue,
            };
            bytes.fetch_add(operation.result().unwrap_or(0), Ordering::Relaxed);
            for piece in operations.pieces_of(operation) {
                let start = piece.start() as usize;
                let is_inside = self.memory.start <= start && start + piece.len() <= self.memory.end;
                self.record.pieces.fetch_add(1, Ordering::Relaxed);
                self.record.astray.fetch_add(usize::from(!is_inside), Ordering::Relaxed);
            }
        }
    }

    fn watch(&mut self, fd: RawFd, token: Token, interest: Interest) -> io::Result<()> {
        self.engine.watch(fd, token, interest)
    }

    fn arm(&mut self, fd: RawFd, token: Token, interest: Interest) -> io::Result<()> {
        self.engine.arm(fd, token, interest)
    }

    fn unwatch(&mut self, fd: RawFd, token: Token) {
        self.engine.unwatch(fd, token);
    }

    fn wait(&mut self, timeout: Option<Duration>, events: &mut Vec<Event>) {
        self.engine.wait(timeout, events);
    }

    fn counts(&self) -> EngineCounts {
        self.engine.counts()
    }
}
