//! One operation as one system call.
#![allow(unsafe_code)]

use std::os::fd::RawFd;

use crate::io::{Kind, Message, Operation, Piece};

/// The system calls made here.
pub const SYSTEM_CALLS: &[libc::c_long] = &[
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvmsg,
    libc::SYS_recvfrom,
];

/// The flags of a `sendmsg`: never wait, never raise a signal.
pub(super) const SEND_FLAGS: i32 = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;

/// The flags of a `recvmsg` of a kind of operation.
pub(super) fn receive_flags(kind: Kind) -> i32 {
    match kind {
        Kind::Peek => libc::MSG_DONTWAIT | libc::MSG_PEEK,
        Kind::Discard => libc::MSG_DONTWAIT | libc::MSG_TRUNC,
        _ => libc::MSG_DONTWAIT,
    }
}

/// The kernel's description of a message with these pieces.
pub(super) fn header(pieces: &[Piece], message: Option<&mut Message>) -> libc::msghdr {
    // SAFETY: msghdr is plain data for which zero is a valid value (and its padding must be zero on some targets).
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = pieces.as_ptr().cast_mut().cast();
    header.msg_iovlen = pieces.len() as _;
    if let Some(message) = message {
        if message.name_len > 0 {
            header.msg_name = (&raw mut message.name).cast();
            header.msg_namelen = message.name_len;
        }
        if message.control_len > 0 {
            header.msg_control = message.control.as_mut_ptr().cast();
            header.msg_controllen = message.control_len as _;
        }
    }
    header
}

/// Takes what the kernel wrote into a header back into its message.
pub(super) fn take_header(message: &mut Message, header: &libc::msghdr) {
    message.name_len = header.msg_namelen;
    message.control_len = header.msg_controllen;
    message.flags = header.msg_flags;
}

/// Datagrams of one `sendmmsg` at the most.
const DATAGRAMS: usize = 64;

/// Sends each piece as a datagram; the result is the kernel's.
fn send_each(fd: RawFd, pieces: &[Piece]) -> isize {
    // SAFETY: mmsghdr is plain data for which zero is a valid value.
    let mut messages: [libc::mmsghdr; DATAGRAMS] = unsafe { std::mem::zeroed() };
    let mut count = 0;
    for (message, piece) in messages.iter_mut().zip(pieces) {
        message.msg_hdr = header(std::slice::from_ref(piece), None);
        count += 1;
    }
    // SAFETY: `count` messages are filled in; their pieces are mapped and unreferenced, as `Piece::new` promises.
    (unsafe { libc::sendmmsg(fd, messages.as_mut_ptr(), count, SEND_FLAGS) }) as isize
}

/// Carries out one operation; its result is the kernel's: bytes, or the error number negated.
pub(super) fn perform(operation: &mut Operation, pieces: &[Piece], mut message: Option<&mut Message>) {
    let fd = operation.fd;
    let mut header = header(pieces, message.as_deref_mut());
    let (iov, count) = (header.msg_iov, pieces.len() as i32);
    // SAFETY: the pieces are memory that their makers promised to be mapped and unreferenced while a batch is run
    // (`Piece::new`); header, name and control live in `header` and `message` for the length of the call.
    let result = unsafe {
        match operation.kind {
            Kind::Read => libc::readv(fd, iov, count),
            Kind::Write => libc::writev(fd, iov, count),
            Kind::Send | Kind::SendDatagram => libc::sendmsg(fd, &raw const header, SEND_FLAGS),
            Kind::SendEach => send_each(fd, pieces),
            Kind::Peek | Kind::Receive | Kind::ReceiveDatagram => {
                libc::recvmsg(fd, &raw mut header, receive_flags(operation.kind))
            }
            Kind::Discard => {
                libc::recv(fd, std::ptr::null_mut(), operation.extra as usize, receive_flags(Kind::Discard))
            }
        }
    };
    operation.result = if result < 0 { -nix::errno::Errno::last_raw() } else { result as i32 };
    if let Some(message) = message
        && operation.kind == Kind::ReceiveDatagram
    {
        take_header(message, &header);
    }
}
