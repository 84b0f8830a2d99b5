//! Engines: who carries out operations on descriptors and says when a descriptor is ready.
//!
//! Two engines with one surface: [`uring`] (io_uring) and [`epoll`] (mio), chosen at start. The surface is that of a
//! proactor whose operations never wait: a batch is handed over and is done when [`Engine::run`] returns, in one
//! system call (io_uring, but for [`crate::io::Kind::SendEach`], which has no entry) or one a piece (epoll). Readiness
//! comes edge-triggered from [`Engine::wait`], because data that was peeked leaves a socket readable.

pub mod direct;
pub mod epoll;
mod polls;
pub mod uring;

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use crate::flow::slab::{GENERATION_MASK, Slot};
use crate::io::Operations;

/// What a descriptor belongs to. The engine hands it back with each event.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Token {
    /// What kind of thing; the caller's choice below 128.
    pub kind: u8,
    /// Which one.
    pub slot: Slot,
}

impl Token {
    fn pack(self) -> u64 {
        u64::from(self.kind & 0x7f) << 56
            | u64::from(self.slot.generation & GENERATION_MASK) << 32
            | u64::from(self.slot.index)
    }

    fn unpack(word: u64) -> Self {
        let generation = (word >> 32) as u32 & GENERATION_MASK;
        Self { kind: (word >> 56) as u8, slot: Slot { index: word as u32, generation } }
    }
}

/// Which readiness is reported.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Interest {
    /// Something to read.
    Readable,
    /// Something to read, room to write, the peer's end, urgent data.
    Both,
}

/// A descriptor became ready.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Event {
    /// Whose.
    pub token: Token,
    /// There is something to read.
    pub readable: bool,
    /// There is room to write.
    pub writable: bool,
    /// The peer has closed its direction, or the socket failed.
    pub closed: bool,
    /// Something waits in the error queue, or the socket failed.
    pub failed: bool,
    /// Urgent data came.
    pub urgent: bool,
}

/// How much work an engine did, for reports and for tests that count.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct EngineCounts {
    /// System calls made.
    pub system_calls: u64,
    /// Operations carried out.
    pub operations: u64,
    /// Times the thread went to sleep.
    pub sleeps: u64,
}

/// An engine.
pub trait Engine {
    /// Carries out every operation of the batch; their results are in when this returns.
    fn run(&mut self, operations: &mut Operations);

    /// Reports readiness of `fd` from now on, edge-triggered.
    fn watch(&mut self, fd: RawFd, token: Token, interest: Interest) -> io::Result<()>;

    /// Reports once when `fd` is ready, also if it is already. For a link that was found empty, or full: while a worker is
    /// busy its link costs no wake-ups, nor does a send wake it that failed before. To arm it for something else it has
    /// to be unwatched first.
    fn arm(&mut self, fd: RawFd, token: Token, interest: Interest) -> io::Result<()>;

    /// Ends the reports. Must come before the descriptor is closed.
    fn unwatch(&mut self, fd: RawFd, token: Token);

    /// Appends what became ready to `events`; sleeps until something does or the time is up (`None`: for ever,
    /// zero: not at all).
    fn wait(&mut self, timeout: Option<Duration>, events: &mut Vec<Event>);

    /// Work done so far.
    fn counts(&self) -> EngineCounts;
}

/// Which engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EngineChoice {
    /// io_uring where it works, else epoll.
    #[default]
    Auto,
    /// io_uring.
    IoUring,
    /// epoll.
    Epoll,
}

impl EngineChoice {
    /// Decides `Auto` by trying; otherwise says why the wish cannot be fulfilled.
    pub fn decide(self) -> Result<EngineKind, EngineError> {
        match (self, uring::probe()) {
            (Self::Epoll, _) => Ok(EngineKind::Epoll),
            (Self::Auto | Self::IoUring, Ok(())) => Ok(EngineKind::IoUring),
            (Self::Auto, Err(_)) => Ok(EngineKind::Epoll),
            (Self::IoUring, Err(error)) => Err(EngineError(error)),
        }
    }
}

/// The engine that runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EngineKind {
    /// io_uring.
    IoUring,
    /// epoll.
    Epoll,
}

impl std::fmt::Display for EngineKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::IoUring => "io-uring",
            Self::Epoll => "epoll",
        })
    }
}

/// io_uring was asked for and cannot be had.
#[derive(Debug, thiserror::Error)]
#[error(
    "--engine io-uring: this kernel or sandbox does not allow it ({0}); needed are Linux 6.1 and \
     kernel.io_uring_disabled = 0; --engine epoll works without"
)]
pub struct EngineError(#[source] io::Error);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Kind;
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    fn token(index: u32) -> Token {
        Token { kind: 1, slot: Slot { index, generation: 5 } }
    }

    /// Both engines, each through the same script.
    fn each(script: impl Fn(&mut dyn Engine)) {
        script(&mut epoll::Epoll::new().unwrap());
        script(&mut uring::Uring::new().unwrap());
    }

    #[test]
    fn a_batch_is_done_when_run_returns() {
        each(|engine| {
            let (a, b) = UnixStream::pair().unwrap();
            let mut buffers = crate::io::Buffers::new(300, 100);
            buffers.bytes_mut(0, 5).copy_from_slice(b"hello");
            let mut operations = Operations::default();
            let sends: Vec<_> = (0..200)
                .map(|_| operations.push(a.as_raw_fd(), Kind::Send, [buffers.piece(0).part(0, 5)]))
                .collect();
            engine.run(&mut operations);
            for id in sends {
                assert_eq!(operations.result(id).unwrap(), 5);
            }
            operations.clear();
            let receives: Vec<_> =
                (0..11).map(|i| operations.push(b.as_raw_fd(), Kind::Receive, [buffers.piece(i)])).collect();
            engine.run(&mut operations);
            for id in &receives[..10] {
                assert_eq!(operations.result(*id).unwrap(), 100);
            }
            assert_eq!(operations.result(receives[10]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
            assert_eq!(buffers.bytes(3, 10), b"hellohello");
        });
    }

    #[test]
    fn datagrams_of_one_operation_go_out_in_order_up_to_the_first_that_does_not() {
        each(|engine| {
            let (a, b) = std::os::unix::net::UnixDatagram::pair().unwrap();
            let mut buffers = crate::io::Buffers::new(20, 50_000);
            (0..20).for_each(|slot| buffers.bytes_mut(slot, 1)[0] = slot as u8);
            let mut operations = Operations::default();
            let mut bytes = vec![0; 50_000];
            for rest in [1, 2] {
                operations.clear();
                let first = operations.push(a.as_raw_fd(), Kind::SendEach, (0..20).map(|i| buffers.piece(i)));
                // One operation alone is not carried out as several are.
                let others: Vec<_> = (1..rest)
                    .map(|_| operations.push(a.as_raw_fd(), Kind::SendEach, [buffers.piece(0)]))
                    .collect();
                engine.run(&mut operations);
                let sent = operations.result(first).unwrap();
                assert!((1..20).contains(&sent), "{sent} of a megabyte in a socket's buffer");
                for id in others {
                    assert_eq!(operations.result(id).unwrap_err().kind(), io::ErrorKind::WouldBlock);
                }
                for slot in 0..sent {
                    assert_eq!((b.recv(&mut bytes).unwrap(), bytes[0]), (50_000, slot as u8));
                }
            }
            drop(b);
            operations.clear();
            let ids = [0, 1].map(|i| operations.push(a.as_raw_fd(), Kind::SendEach, [buffers.piece(i)]));
            engine.run(&mut operations);
            assert!(ids.iter().all(|id| operations.result(*id).is_err()));
        });
    }

    #[test]
    fn an_empty_tap_never_makes_a_batch_wait() {
        let created = crate::link::tap::create("hythe-test%d", 1).unwrap();
        let fd = created.queues[0].as_raw_fd();
        each(|engine| {
            let buffers = crate::io::Buffers::new(4, 2000);
            let mut operations = Operations::default();
            let reads: Vec<_> = (0..4).map(|i| operations.push(fd, Kind::Read, [buffers.piece(i)])).collect();
            engine.run(&mut operations);
            for id in reads {
                assert_eq!(operations.result(id).unwrap_err().kind(), io::ErrorKind::WouldBlock);
            }
        });
    }

    #[test]
    fn a_token_that_is_watched_anew_lets_go_of_what_it_stood_for() {
        each(|engine| {
            let (old, mut old_peer) = UnixStream::pair().unwrap();
            let (new, mut new_peer) = UnixStream::pair().unwrap();
            let mut events = Vec::new();
            engine.watch(old.as_raw_fd(), token(1), Interest::Both).unwrap();
            engine.wait(Some(Duration::from_millis(10)), &mut events);
            assert!(events.iter().any(|event| event.writable));
            engine.unwatch(old.as_raw_fd(), token(1));
            engine.watch(new.as_raw_fd(), token(1), Interest::Readable).unwrap();
            drop(old);
            events.clear();
            engine.wait(Some(Duration::from_millis(10)), &mut events);
            assert_eq!(events, [], "nothing happened to the new one");
            let end = |peer: &mut UnixStream| {
                peer.set_nonblocking(true).unwrap();
                std::io::Read::read(peer, &mut [0; 8]).map_err(|error| error.kind())
            };
            assert_eq!(end(&mut old_peer), Ok(0), "the old one was closed");
            engine.unwatch(new.as_raw_fd(), token(1));
            engine.wait(Some(Duration::ZERO), &mut events);
            drop(new);
            assert_eq!(end(&mut new_peer), Ok(0), "and so was the new one");
        });
    }

    #[test]
    fn what_is_unwatched_is_let_go_although_something_has_just_happened_to_it() {
        each(|engine| {
            for once in [false, true] {
                let (watched, mut peer) = UnixStream::pair().unwrap();
                let fd = watched.as_raw_fd();
                let mut events = Vec::new();
                if once {
                    engine.arm(fd, token(1), Interest::Readable).unwrap();
                } else {
                    engine.watch(fd, token(1), Interest::Both).unwrap();
                }
                engine.wait(Some(Duration::ZERO), &mut events);
                std::io::Write::write_all(&mut peer, b"news").unwrap();
                engine.unwatch(fd, token(1));
                drop(watched);
                events.clear();
                engine.wait(Some(Duration::ZERO), &mut events);
                assert_eq!(events, []);
                peer.set_nonblocking(true).unwrap();
                // Closed with bytes unread, it is a reset.
                let end = std::io::Read::read(&mut peer, &mut [0; 8]).map_err(|error| error.kind());
                assert_eq!(end, Err(std::io::ErrorKind::ConnectionReset));
            }
        });
    }

    #[test]
    fn readiness_comes_once_for_each_arrival() {
        each(|engine| {
            let (mut a, b) = UnixStream::pair().unwrap();
            let mut events = Vec::new();
            engine.watch(b.as_raw_fd(), token(7), Interest::Both).unwrap();
            engine.wait(Some(Duration::ZERO), &mut events);
            events.clear();
            a.write_all(b"x").unwrap();
            engine.wait(None, &mut events);
            assert!(events.iter().any(|event| event.token == token(7) && event.readable));
            events.clear();
            engine.wait(Some(Duration::ZERO), &mut events);
            assert_eq!(events, [], "unread data is not reported again");
            a.write_all(b"x").unwrap();
            drop(a);
            engine.wait(None, &mut events);
            assert!(events.iter().any(|event| event.closed));
            events.clear();
            engine.unwatch(b.as_raw_fd(), token(7));
            engine.wait(Some(Duration::from_millis(1)), &mut events);
            assert_eq!(events, []);
        });
    }

    #[test]
    fn arming_reports_what_is_there_already_and_only_once() {
        each(|engine| {
            let (mut a, b) = UnixStream::pair().unwrap();
            let mut events = Vec::new();
            for _ in 0..3 {
                a.write_all(b"x").unwrap();
                engine.arm(b.as_raw_fd(), token(9), Interest::Readable).unwrap();
                engine.wait(Some(Duration::from_secs(5)), &mut events);
                assert!(events.iter().any(|event| event.token == token(9) && event.readable));
                events.clear();
                let mut operations = Operations::default();
                let buffers = crate::io::Buffers::new(1, 10);
                operations.push(b.as_raw_fd(), Kind::Receive, [buffers.piece(0)]);
                engine.run(&mut operations);
            }
        });
    }

    #[test]
    fn a_send_that_failed_is_not_taken_for_room_that_came() {
        each(|engine| {
            // A socket of the peer's that is connected to nobody, so that its queue is what gets full.
            let peer = std::os::unix::net::UnixDatagram::unbound().unwrap();
            // The kernel chooses a name for it.
            socket2::SockRef::from(&peer).bind(&socket2::SockAddr::unix("").unwrap()).unwrap();
            let own = std::os::unix::net::UnixDatagram::unbound().unwrap();
            own.connect_addr(&peer.local_addr().unwrap()).unwrap();
            let buffers = crate::io::Buffers::new(1, 100);
            let mut operations = Operations::default();
            let mut events = Vec::new();
            let mut send = |engine: &mut dyn Engine| {
                operations.clear();
                let id = operations.push(own.as_raw_fd(), Kind::SendEach, [buffers.piece(0)]);
                engine.run(&mut operations);
                operations.result(id).is_ok()
            };
            while send(engine) {}
            // As a worker goes on: it tries, sleeps, and tries again when it was woken.
            let mut tried = 0;
            while events.drain(..).next().is_some() || tried == 0 {
                assert!(!send(engine));
                tried += 1;
                assert!(tried < 4, "its own tries wake it");
                engine.arm(own.as_raw_fd(), token(9), Interest::Both).unwrap();
                engine.wait(Some(Duration::from_millis(50)), &mut events);
            }
            peer.recv(&mut [0; 100]).unwrap();
            engine.wait(Some(Duration::from_secs(5)), &mut events);
            assert!(events.iter().any(|event| event.token == token(9) && event.writable));
            assert!(send(engine));
        });
    }

    #[test]
    fn a_watched_descriptor_is_closed_for_its_peer_once_it_is_unwatched() {
        each(|engine| {
            let (a, b) = UnixStream::pair().unwrap();
            engine.watch(b.as_raw_fd(), token(1), Interest::Both).unwrap();
            engine.wait(Some(Duration::ZERO), &mut Vec::new());
            engine.unwatch(b.as_raw_fd(), token(1));
            drop(b);
            engine.wait(Some(Duration::ZERO), &mut Vec::new());
            a.set_nonblocking(true).unwrap();
            let got = io::Read::read(&mut &a, &mut [0; 1]);
            assert!(matches!(got, Ok(0)), "{got:?}");
        });
    }

    #[test]
    fn a_timeout_ends_the_wait() {
        each(|engine| {
            let start = std::time::Instant::now();
            engine.wait(Some(Duration::from_millis(5)), &mut Vec::new());
            assert!(start.elapsed() >= Duration::from_millis(4));
        });
    }
}
