//! io_uring, set up as hythe's workers do.
#![allow(unsafe_code)]

use std::io::Write;
use std::net::TcpStream;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};

use crate::calls::{LOOPBACKS, SO_PEEK_OFF, await_events, await_queue, number, peek, receive, set, tcp_pair};

/// A ring that is not enabled.
fn disabled() -> IoUring {
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all()
        .setup_r_disabled()
        .setup_cqsize(4096)
        .build(256)
        .unwrap()
}

/// A ring that may receive and poll, for the calling thread.
pub fn restricted() -> IoUring {
    let ring = disabled();
    let allowed = [
        opcode::Recv::CODE,
        opcode::Readv::CODE,
        opcode::PollAdd::CODE,
        opcode::PollRemove::CODE,
        opcode::AsyncCancel::CODE,
    ];
    let mut restrictions = allowed.map(Restriction::sqe_op);
    ring.submitter().register_restrictions(&mut restrictions).unwrap();
    ring.submitter().register_enable_rings().unwrap();
    ring
}

pub fn push(ring: &mut IoUring, entry: &squeue::Entry) {
    // SAFETY: whatever an entry points to outlives its test's wait for the completion.
    unsafe { ring.submission().push(entry) }.unwrap();
}

/// Submits and waits for `count` completions: user data, result, flags. Fewer when that takes too long.
pub fn complete(ring: &mut IoUring, count: usize) -> Vec<(u64, i32, u32)> {
    let time = Timespec::from(Duration::from_secs(20));
    let _ = ring.submitter().submit_with_args(count, &SubmitArgs::new().timespec(&time));
    let mut completions: Vec<_> =
        ring.completion().map(|done| (done.user_data(), done.result(), done.flags())).collect();
    completions.sort_unstable();
    completions
}

/// The kernel's threads that work for this thread's rings.
pub fn kernel_workers() -> usize {
    let own = format!("iou-wrk-{}", nix::unistd::gettid());
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm"));
    tasks.filter_map(|task| name(task).ok()).filter(|name| name.trim_end() == own).count()
}

fn peek_entry(fd: RawFd, into: &mut [u8]) -> squeue::Entry {
    let flags = libc::MSG_DONTWAIT | libc::MSG_PEEK;
    opcode::Recv::new(Fd(fd), into.as_mut_ptr(), into.len() as u32).flags(flags).build()
}

#[test]
fn a_restricted_ring_refuses_other_operations_and_goes_on_with_the_batch() {
    let mut ring = restricted();
    let (from, to) = tcp_pair(LOOPBACKS[0]);
    (&from).write_all(b"abc").unwrap();
    await_queue(&to, 3);
    let mut bytes = [0; 8];
    push(&mut ring, &opcode::Nop::new().build().user_data(1));
    push(&mut ring, &peek_entry(to.as_raw_fd(), &mut bytes).user_data(2));
    let completions = complete(&mut ring, 2);
    assert_eq!(
        completions.iter().map(|done| (done.0, done.1)).collect::<Vec<_>>(),
        [(1, -libc::EACCES), (2, 3)]
    );
    assert_eq!(&bytes[..3], b"abc");
}

#[test]
fn a_restricted_ring_can_be_changed_no_more() {
    let ring = restricted();
    assert_eq!(number(ring.submitter().register_files_sparse(4)), libc::EACCES);
    let mut more = [Restriction::sqe_op(opcode::Nop::CODE)];
    assert_eq!(number(ring.submitter().register_restrictions(&mut more)), libc::EACCES);
}

#[test]
fn a_ring_that_was_not_started_disabled_cannot_be_restricted() {
    let ring = IoUring::new(8).unwrap();
    let mut restrictions = [Restriction::sqe_op(opcode::Nop::CODE)];
    assert_eq!(number(ring.submitter().register_restrictions(&mut restrictions)), libc::EBADFD);
}

#[test]
fn a_ring_belongs_to_the_thread_that_enabled_it() {
    let mut ring = restricted();
    let (_from, to) = tcp_pair(LOOPBACKS[0]);
    let entry = opcode::PollAdd::new(Fd(to.as_raw_fd()), libc::POLLIN as u32).build();
    push(&mut ring, &entry);
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(number(ring.submitter().submit()), libc::EEXIST));
    });
}

#[test]
fn a_peek_that_may_not_wait_ends_at_once_and_takes_no_kernel_thread() {
    let mut ring = restricted();
    let pairs: Vec<_> = (0..50).map(|_| tcp_pair(LOOPBACKS[0])).collect();
    let mut bytes = vec![[0u8; 64]; 50];
    for ((_, to), into) in pairs.iter().zip(&mut bytes) {
        push(&mut ring, &peek_entry(to.as_raw_fd(), into));
    }
    let completions = complete(&mut ring, 50);
    assert_eq!(completions.len(), 50);
    assert!(completions.iter().all(|(_, result, _)| *result == -libc::EAGAIN), "{completions:?}");
    assert_eq!(kernel_workers(), 0);
}

#[test]
fn peek_offset_and_discard_work_through_a_ring_as_by_system_calls() {
    for address in LOOPBACKS {
        let mut ring = restricted();
        let (mut from, to) = tcp_pair(address);
        set(&to, libc::SOL_SOCKET, SO_PEEK_OFF, 0).unwrap();
        from.write_all(b"abcdefgh").unwrap();
        await_queue(&to, 8);
        let mut bytes = [0; 5];
        push(&mut ring, &peek_entry(to.as_raw_fd(), &mut bytes));
        assert_eq!(complete(&mut ring, 1)[0].1, 5);
        assert_eq!(&bytes, b"abcde");
        let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
        let entry = opcode::Recv::new(Fd(to.as_raw_fd()), std::ptr::null_mut(), 2).flags(flags).build();
        push(&mut ring, &entry);
        assert_eq!(complete(&mut ring, 1)[0].1, 2);
        assert_eq!(peek(&to, 20).unwrap(), b"fgh");
        assert_eq!(receive(&to, 20, 0).unwrap(), b"cdefgh");
    }
}

/// A poll of a connection's end that is closed although it is polled; the other end.
fn polled_and_closed(ring: &mut IoUring, news: bool) -> TcpStream {
    let (near, far) = tcp_pair(LOOPBACKS[0]);
    let poll = opcode::PollAdd::new(Fd(near.as_raw_fd()), libc::POLLIN as u32).multi(true).build();
    push(ring, &poll.user_data(7));
    ring.submit().unwrap();
    if news {
        (&far).write_all(b"news").unwrap();
        await_queue(&near, 4);
    }
    far
}

/// Cancels the poll by an entry; what is completed with that.
fn cancel(ring: &mut IoUring, entry: squeue::Entry, count: usize) -> Vec<(u64, i32)> {
    push(ring, &entry.user_data(8));
    complete(ring, count).iter().map(|done| (done.0, done.1)).collect()
}

#[test]
fn an_armed_poll_holds_its_file_until_it_is_cancelled() {
    let mut ring = restricted();
    let far = polled_and_closed(&mut ring, false);
    assert_eq!(number(peek(&far, 1)), libc::EAGAIN, "the connection is not closed");
    let cancelled = cancel(&mut ring, opcode::AsyncCancel::new(7).build(), 2);
    assert_eq!(cancelled, [(7, -libc::ECANCELED), (8, 0)]);
    await_events(&far, libc::POLLIN);
    assert_eq!(peek(&far, 1).unwrap(), b"");
}

#[test]
fn a_poll_whose_event_is_about_to_be_told_is_cancelled_and_not_removed() {
    let mut ring = restricted();
    let far = polled_and_closed(&mut ring, true);
    // Which is why hythe does not use POLL_REMOVE.
    let removed = cancel(&mut ring, opcode::PollRemove::new(7).build(), 2);
    assert_eq!(removed, [(7, i32::from(libc::POLLIN)), (8, -libc::EALREADY)]);
    assert_eq!(number(peek(&far, 1)), libc::EAGAIN, "the file is held");

    let mut ring = restricted();
    let far = polled_and_closed(&mut ring, true);
    let cancelled = cancel(&mut ring, opcode::AsyncCancel::new(7).build(), 2);
    assert_eq!(cancelled, [(7, -libc::ECANCELED), (8, 0)]);
    await_events(&far, libc::POLLIN);
    assert_eq!(number(peek(&far, 1)), libc::ECONNRESET, "closed with bytes unread");
}
