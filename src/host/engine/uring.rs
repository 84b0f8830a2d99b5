//! The io_uring engine.
//!
//! One ring a worker, made on the worker's own thread (`SINGLE_ISSUER`, `DEFER_TASKRUN`). The ring starts disabled;
//! before it is enabled it is restricted to the operations of this file, because seccomp does not see what a ring
//! does. A batch is pushed and entered once: each operation carries `MSG_DONTWAIT` or is on a non-blocking descriptor,
//! so the kernel completes it during submission and no operation is ever left armed but polls. A batch of one is made
//! as a plain system call, which costs less than a ring entry; and so is `sendmmsg`, for which there is no entry.
//!
//! Polls are multishot, which makes them edge-triggered. An armed poll holds its file, so a descriptor that is closed
//! is unwatched first; the cancellation is submitted before the worker sleeps.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};

use super::polls::{Poll, Polls};
use super::{Engine, EngineCounts, Event, Interest, Token, direct};
use crate::io::{Kind, Operation, Operations};

/// The system calls made here besides those of [`direct`].
pub const SYSTEM_CALLS: &[libc::c_long] = &[libc::SYS_io_uring_enter];

/// Calls that setting a ring up takes.
pub const SETUP_SYSTEM_CALLS: &[libc::c_long] = &[libc::SYS_io_uring_setup, libc::SYS_io_uring_register];

const ENTRIES: u32 = 256;
/// Room for the events of many sockets at once. Beyond it the kernel keeps them (`NODROP`), at a price.
const COMPLETIONS: u32 = 4096;

/// User data of an operation: this bit and its index in the batch.
const OPERATION: u64 = 1 << 63;
/// User data of a cancellation, whose completion says nothing.
const CANCELLATION: u64 = u64::MAX;

/// The io_uring engine.
pub struct Uring {
    ring: IoUring,
    headers: Vec<libc::msghdr>,
    /// Events that came while a batch was run.
    pending: Vec<Event>,
    polls: Polls,
    /// Multishot polls that the kernel ended although nobody asked; to be armed anew.
    ended: Vec<u64>,
    counts: EngineCounts,
}

/// Whether this kernel and sandbox allow such a ring.
pub fn probe() -> io::Result<()> {
    Uring::new().map(|_| ())
}

impl Uring {
    /// A ring for the calling thread, the only one that may use it.
    pub fn new() -> io::Result<Self> {
        let ring: IoUring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .setup_r_disabled()
            .setup_cqsize(COMPLETIONS)
            .build(ENTRIES)?;
        let allowed = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::SendMsg::CODE,
            opcode::RecvMsg::CODE,
            opcode::Recv::CODE,
            opcode::PollAdd::CODE,
            opcode::AsyncCancel::CODE,
        ];
        let mut restrictions: Vec<Restriction> = allowed.into_iter().map(Restriction::sqe_op).collect();
        ring.submitter().register_restrictions(&mut restrictions)?;
        ring.submitter().register_enable_rings()?;
        Ok(Self {
            ring,
            headers: Vec::with_capacity(ENTRIES as usize),
            pending: Vec::with_capacity(ENTRIES as usize),
            polls: Polls::new(),
            ended: Vec::new(),
            counts: EngineCounts::default(),
        })
    }

    /// Puts an entry into the submission queue, entering the kernel first when it is full.
    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: what an entry points to lives until the kernel is done with it: operations are waited for in
        // `run`, and polls point to nothing.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            self.counts.system_calls += 1;
            if let Err(error) = self.ring.submit() {
                debug_assert!(is_passing(&error), "submission: {error}");
            }
            self.reap(None);
        }
    }

    /// Takes completions in: results go into the batch, events to `pending`. Returns how many were results.
    fn reap(&mut self, mut operations: Option<&mut Operations>) -> usize {
        let mut results = 0;
        // The usual case of a worker that looks for work.
        if self.ring.completion().is_empty() {
            return 0;
        }
        let mut taken: [(u64, i32, u32); 64] = [(0, 0, 0); 64];
        loop {
            let mut count = 0;
            for completion in self.ring.completion().take(taken.len()) {
                taken[count] = (completion.user_data(), completion.result(), completion.flags());
                count += 1;
            }
            for (data, result, flags) in &taken[..count] {
                if *data == CANCELLATION {
                    continue;
                }
                if data & OPERATION == 0 {
                    self.poll_completed(*data, *result, *flags);
                } else if let Some(operations) = operations.as_deref_mut() {
                    let index = (data & !OPERATION) as usize;
                    operations.list[index].result = *result;
                    results += 1;
                }
            }
            if count < taken.len() {
                return results;
            }
        }
    }

    fn poll_completed(&mut self, id: u64, result: i32, flags: u32) {
        // One that was removed has its last word still to say.
        let Some(Poll { token, once, .. }) = self.polls.get(id) else { return };
        if once {
            self.polls.remove(token);
        } else if !cqueue::more(flags) {
            self.ended.push(id);
        }
        if result < 0 {
            // The poll itself failed: let the owner find out by using the descriptor.
            let event =
                Event { token, readable: true, writable: true, closed: true, failed: true, urgent: false };
            self.pending.push(event);
            return;
        }
        let mask = result as i16;
        let has = |bits: i16| mask & bits != 0;
        self.pending.push(Event {
            token,
            readable: has(libc::POLLIN),
            writable: has(libc::POLLOUT),
            closed: has(libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR),
            failed: has(libc::POLLERR),
            urgent: has(libc::POLLPRI),
        });
    }

    fn begin_poll(&mut self, poll: Poll) -> io::Result<()> {
        let id = self.polls.add(poll).ok_or(io::ErrorKind::StorageFull)?;
        self.add_poll(id, poll);
        Ok(())
    }

    fn add_poll(&mut self, id: u64, poll: Poll) {
        let events = match poll.interest {
            Interest::Readable => libc::POLLIN,
            Interest::Both => libc::POLLIN | libc::POLLOUT | libc::POLLRDHUP | libc::POLLPRI,
        };
        let entry = opcode::PollAdd::new(Fd(poll.fd), events as u32).multi(!poll.once).build().user_data(id);
        self.push(&entry);
    }

    /// Submits without waiting, and lets the kernel do its deferred work: ends polls that were cancelled, posts events.
    fn enter_and_return(&self, unsent: u32) -> io::Result<usize> {
        const GET_EVENTS: u32 = 1;
        // SAFETY: `unsent` entries are in the queue; no argument is passed.
        unsafe { self.ring.submitter().enter::<libc::sigset_t>(unsent, 0, GET_EVENTS, None) }
    }

    /// Puts an operation into the submission queue; returns whether it is done already, as one that has no entry is.
    fn push_operation(&mut self, operations: &mut Operations, index: usize) -> bool {
        let Operations { list, pieces, messages, .. } = operations;
        let operation = &list[index];
        let fd = Fd(operation.fd);
        let first = operation.first_piece as usize;
        let memory = &pieces[first..first + operation.pieces as usize];
        let message = match operation.kind {
            Kind::SendDatagram | Kind::ReceiveDatagram => messages.get_mut(operation.extra as usize),
            _ => None,
        };
        let header = &raw mut self.headers[index];
        // SAFETY: the pointer is to an element of `headers`, which `run` has sized for the batch and leaves alone
        // until the batch is done.
        unsafe { header.write(direct::header(memory, message)) };
        let receive_flags = direct::receive_flags(operation.kind) as u32;
        let (iov, count) = (memory.as_ptr().cast(), memory.len() as u32);
        let entry = match operation.kind {
            // O_NONBLOCK alone would let the kernel wait for a frame on a file that can be polled.
            Kind::Read => opcode::Readv::new(fd, iov, count).rw_flags(libc::RWF_NOWAIT).build(),
            Kind::Write => opcode::Writev::new(fd, iov, count).rw_flags(libc::RWF_NOWAIT).build(),
            Kind::Send | Kind::SendDatagram => {
                opcode::SendMsg::new(fd, header).flags(direct::SEND_FLAGS as u32).build()
            }
            Kind::Peek | Kind::Receive | Kind::ReceiveDatagram => {
                opcode::RecvMsg::new(fd, header).flags(receive_flags).build()
            }
            Kind::Discard => opcode::Recv::new(fd, std::ptr::null_mut(), operation.extra)
                .flags(receive_flags as i32)
                .build(),
            Kind::SendEach => {
                self.perform(operations, index);
                return true;
            }
        };
        self.push(&entry.user_data(OPERATION | index as u64));
        false
    }

    fn run_on_ring(&mut self, operations: &mut Operations) {
        let total = operations.list.len();
        // SAFETY: zero is a valid msghdr.
        self.headers.resize(total, unsafe { std::mem::zeroed() });
        let mut done = 0;
        let mut pushed = 0;
        while done < total {
            // At most one queue full at a time, so that `push` never has to reap results itself.
            let room = self.ring.params().sq_entries() as usize - self.ring.submission().len();
            let end = total.min(pushed + room);
            for index in pushed..end {
                done += usize::from(self.push_operation(operations, index));
            }
            pushed = end;
            if done == total {
                break;
            }
            self.counts.system_calls += 1;
            if let Err(error) = self.ring.submit_and_wait(pushed - done) {
                debug_assert!(is_passing(&error), "io_uring_enter: {error}");
            }
            done += self.reap(Some(operations));
        }
        for index in 0..total {
            let Operation { kind, result, extra, .. } = operations.list[index];
            if result == -libc::EOPNOTSUPP && matches!(kind, Kind::Read | Kind::Write) {
                // A kernel whose tap knows no RWF_NOWAIT (before 6.4): the plain call does not wait either.
                self.perform(operations, index);
            }
            if kind == Kind::ReceiveDatagram {
                direct::take_header(&mut operations.messages[extra as usize], &self.headers[index]);
            }
        }
    }

    /// Carries an operation without a message out as a plain system call.
    fn perform(&mut self, operations: &mut Operations, index: usize) {
        let Operations { list, pieces, .. } = operations;
        let operation = &mut list[index];
        let first = operation.first_piece as usize;
        direct::perform(operation, &pieces[first..first + operation.pieces as usize], None);
        self.counts.system_calls += 1;
    }
}

/// Errors after which the same call works again.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ETIME))
}

impl Engine for Uring {
    fn run(&mut self, operations: &mut Operations) {
        self.counts.operations += operations.len() as u64;
        match operations.list.as_mut_slice() {
            [] => {}
            [operation] => {
                let message = match operation.kind {
                    Kind::SendDatagram | Kind::ReceiveDatagram => operations.messages.first_mut(),
                    _ => None,
                };
                self.counts.system_calls += 1;
                direct::perform(operation, &operations.pieces, message);
            }
            _ => self.run_on_ring(operations),
        }
    }

    fn watch(&mut self, fd: RawFd, token: Token, interest: Interest) -> io::Result<()> {
        self.begin_poll(Poll { token, fd, interest, once: false })
    }

    fn arm(&mut self, fd: RawFd, token: Token, interest: Interest) -> io::Result<()> {
        if !self.polls.has(token) {
            self.begin_poll(Poll { token, fd, interest, once: true })?;
        }
        Ok(())
    }

    fn unwatch(&mut self, _fd: RawFd, token: Token) {
        self.pending.retain(|event| event.token != token);
        if let Some(id) = self.polls.remove(token) {
            // Not POLL_REMOVE: it lets a poll be (EALREADY) whose event the kernel is about to tell, and so its file.
            self.push(&opcode::AsyncCancel::new(id).build().user_data(CANCELLATION));
        }
    }

    fn wait(&mut self, timeout: Option<Duration>, events: &mut Vec<Event>) {
        for id in std::mem::take(&mut self.ended) {
            if let Some(poll) = self.polls.get(id) {
                self.add_poll(id, poll);
            }
        }
        self.reap(None);
        let sleep = self.pending.is_empty() && timeout != Some(Duration::ZERO);
        let unsent = self.ring.submission().len();
        let work = unsent > 0 || self.ring.submission().taskrun() || self.ring.submission().cq_overflow();
        if sleep || work {
            self.counts.system_calls += 1;
            self.counts.sleeps += u64::from(sleep);
            let result = if !sleep {
                self.enter_and_return(unsent as u32)
            } else if let Some(timeout) = timeout {
                let time = Timespec::from(timeout);
                self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&time))
            } else {
                self.ring.submit_and_wait(1)
            };
            if let Err(error) = result {
                debug_assert!(is_passing(&error), "io_uring_enter: {error}");
            }
            self.reap(None);
        }
        events.append(&mut self.pending);
    }

    fn counts(&self) -> EngineCounts {
        self.counts
    }
}
