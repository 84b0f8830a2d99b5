//! When a socket is reported: by epoll, edge-triggered, and by io_uring's multishot poll, which both engines take to
//! be the same.

use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, types::Fd};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll};

use crate::calls::{LOOPBACKS, SO_PEEK_OFF, await_queue, discard, peek, receive, send, set, tcp_pair};
use crate::ring;

/// What is told about a socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Told {
    readable: bool,
    writable: bool,
    closed: bool,
    failed: bool,
}

trait Reporter {
    fn new() -> Self;
    fn watch(&mut self, fd: RawFd, token: u64);
    /// Waits until there is something; then all there is.
    fn wait(&mut self) -> Vec<(u64, Told)>;
}

struct Edge(Poll);

impl Reporter for Edge {
    fn new() -> Self {
        Self(Poll::new().unwrap())
    }

    fn watch(&mut self, fd: RawFd, token: u64) {
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.0.registry().register(&mut SourceFd(&fd), mio::Token(token as usize), interest).unwrap();
    }

    fn wait(&mut self) -> Vec<(u64, Told)> {
        let mut events = Events::with_capacity(64);
        self.0.poll(&mut events, Some(Duration::from_secs(20))).unwrap();
        let told = |event: &mio::event::Event| Told {
            readable: event.is_readable(),
            writable: event.is_writable(),
            closed: event.is_read_closed(),
            failed: event.is_error(),
        };
        events.iter().map(|event| (event.token().0 as u64, told(event))).collect()
    }
}

struct Multishot(IoUring);

impl Reporter for Multishot {
    fn new() -> Self {
        Self(ring::restricted())
    }

    fn watch(&mut self, fd: RawFd, token: u64) {
        let events = libc::POLLIN | libc::POLLOUT | libc::POLLRDHUP;
        let poll = opcode::PollAdd::new(Fd(fd), events as u32).multi(true).build();
        ring::push(&mut self.0, &poll.user_data(token));
    }

    fn wait(&mut self) -> Vec<(u64, Told)> {
        let completions = ring::complete(&mut self.0, 1);
        let told = completions.into_iter().map(|(token, mask, flags)| {
            assert!(mask > 0 && cqueue::more(flags), "the poll has ended: {mask}");
            let has = |bit: i16| mask & i32::from(bit) != 0;
            let told = Told {
                readable: has(libc::POLLIN),
                writable: has(libc::POLLOUT),
                closed: has(libc::POLLRDHUP),
                failed: has(libc::POLLERR),
            };
            (token, told)
        });
        told.collect()
    }
}

/// A reporter, and a socket whose only use is to be reported: what is told before it was told first.
struct Watch<R> {
    reporter: R,
    bell: (UnixStream, UnixStream),
}

const BELL: u64 = u64::MAX >> 1;

impl<R: Reporter> Watch<R> {
    fn of(fd: RawFd) -> Self {
        let mut reporter = R::new();
        let bell = UnixStream::pair().unwrap();
        bell.1.set_nonblocking(true).unwrap();
        reporter.watch(bell.1.as_raw_fd(), BELL);
        reporter.watch(fd, 1);
        let mut watch = Self { reporter, bell };
        watch.told();
        watch
    }

    /// All that was told about the watched socket up to now.
    fn told(&mut self) -> Option<Told> {
        self.bell.0.write_all(&[1]).unwrap();
        let mut all: Option<Told> = None;
        loop {
            let told = self.reporter.wait();
            assert!(!told.is_empty(), "nothing was told");
            for (_, one) in told.iter().filter(|(token, _)| *token == 1) {
                let all = all.get_or_insert_default();
                all.readable |= one.readable;
                all.writable |= one.writable;
                all.closed |= one.closed;
                all.failed |= one.failed;
            }
            if told.iter().any(|(token, told)| *token == BELL && told.readable) {
                receive(&self.bell.1, 8, 0).unwrap();
                return all;
            }
        }
    }

    /// Waits for a report for which something holds.
    fn await_told(&mut self, what: impl Fn(Told) -> bool) {
        loop {
            let told = self.reporter.wait();
            assert!(!told.is_empty(), "nothing was told");
            if told.iter().any(|(token, told)| *token == 1 && what(*told)) {
                return;
            }
        }
    }
}

fn peeked_bytes_are_told_once<R: Reporter>() {
    for address in LOOPBACKS {
        let (mut from, to) = tcp_pair(address);
        set(&to, libc::SOL_SOCKET, SO_PEEK_OFF, 0).unwrap();
        let mut watch = Watch::<R>::of(to.as_raw_fd());
        assert_eq!(watch.told(), None);
        from.write_all(b"abcd").unwrap();
        watch.await_told(|told| told.readable);
        assert_eq!(peek(&to, 20).unwrap(), b"abcd");
        assert_eq!(watch.told(), None, "peeked bytes stay, and are not told again");
        discard(&to, 2).unwrap();
        assert_eq!(watch.told(), None);
        from.write_all(b"ef").unwrap();
        watch.await_told(|told| told.readable);
        assert_eq!(peek(&to, 20).unwrap(), b"ef");
    }
}

fn the_end_is_told_although_bytes_are_left<R: Reporter>() {
    for address in LOOPBACKS {
        let (mut from, to) = tcp_pair(address);
        let mut watch = Watch::<R>::of(to.as_raw_fd());
        from.write_all(b"abcd").unwrap();
        watch.await_told(|told| told.readable && !told.closed);
        from.shutdown(std::net::Shutdown::Write).unwrap();
        watch.await_told(|told| told.closed && !told.failed);
    }
}

fn a_reset_is_told_as_a_failure<R: Reporter>() {
    for address in LOOPBACKS {
        let (from, to) = tcp_pair(address);
        let mut watch = Watch::<R>::of(to.as_raw_fd());
        socket2::SockRef::from(&from).set_linger(Some(Duration::ZERO)).unwrap();
        drop(from);
        watch.await_told(|told| told.failed);
    }
}

fn room_is_told_after_a_send_fell_short<R: Reporter>() {
    for address in LOOPBACKS {
        let (from, to) = tcp_pair(address);
        set(&from, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, 256 << 10).unwrap();
        let mut watch = Watch::<R>::of(from.as_raw_fd());
        let block = vec![7; 64 << 10];
        let mut queued = 0;
        while let Ok(sent) = send(&from, &block) {
            queued += sent;
        }
        while watch.told().is_some() {}
        while queued > 0 {
            await_queue(&to, 1);
            queued -= discard(&to, 1 << 20).unwrap();
        }
        watch.await_told(|told| told.writable);
        send(&from, &block).unwrap();
    }
}

fn what_is_ready_when_the_watch_begins_is_told<R: Reporter>() {
    let (mut from, to) = tcp_pair(LOOPBACKS[0]);
    from.write_all(b"abcd").unwrap();
    await_queue(&to, 4);
    let mut reporter = R::new();
    reporter.watch(to.as_raw_fd(), 1);
    let told = reporter.wait();
    assert_eq!(told, [(1, Told { readable: true, writable: true, ..Told::default() })]);
}

macro_rules! by_both {
    ($($claim:ident),*) => {
        mod edge_triggered_epoll {
            $(#[test] fn $claim() { super::$claim::<super::Edge>(); })*
        }
        mod multishot_poll {
            $(#[test] fn $claim() { super::$claim::<super::Multishot>(); })*
        }
    };
}

by_both!(
    peeked_bytes_are_told_once,
    the_end_is_told_although_bytes_are_left,
    a_reset_is_told_as_a_failure,
    room_is_told_after_a_send_fell_short,
    what_is_ready_when_the_watch_begins_is_told
);
