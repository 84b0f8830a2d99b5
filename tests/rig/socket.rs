//! What sockets need besides what the standard library has.
#![allow(unsafe_code)]

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;

use super::site::Family;

/// The next datagram. A machine that was stopped and goes on interrupts calls that have a time limit (signal(7)).
pub fn receive(socket: &UdpSocket, bytes: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
    loop {
        match socket.recv_from(bytes) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

fn set(socket: &impl AsRawFd, level: i32, name: i32, value: i32) {
    let len = size_of::<i32>() as u32;
    // SAFETY: `value` is valid for `len` bytes.
    let set = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), len) };
    assert_eq!(set, 0, "{}", io::Error::last_os_error());
}

fn discover_mtu(socket: &impl AsRawFd, family: Family, how: i32) {
    match family {
        Family::V4 => set(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, how),
        Family::V6 => set(socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, how),
    }
}

/// The kernel tells of every error, those that may pass included.
pub fn report_errors(socket: &impl AsRawFd, family: Family) {
    match family {
        Family::V4 => set(socket, libc::IPPROTO_IP, libc::IP_RECVERR, 1),
        Family::V6 => set(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVERR, 1),
    }
}

/// What it sends may not be cut on the way.
pub fn forbid_fragments(socket: &impl AsRawFd, family: Family) {
    discover_mtu(socket, family, libc::IP_PMTUDISC_DO);
}

/// What it sends may be cut.
pub fn allow_fragments(socket: &impl AsRawFd, family: Family) {
    discover_mtu(socket, family, libc::IP_PMTUDISC_DONT);
}

/// The MTU of the path of a connected socket, as far as its kernel knows.
pub fn path_mtu(socket: &impl AsRawFd, family: Family) -> i32 {
    let (level, name) = match family {
        Family::V4 => (libc::IPPROTO_IP, libc::IP_MTU),
        Family::V6 => (libc::IPPROTO_IPV6, libc::IPV6_MTU),
    };
    let (mut mtu, mut len) = (0i32, size_of::<i32>() as u32);
    // SAFETY: `mtu` is valid for `len` bytes.
    let got =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut mtu).cast(), &raw mut len) };
    assert_eq!(got, 0, "{}", io::Error::last_os_error());
    mtu
}

/// Bytes that the other side has not acknowledged yet.
pub fn unacknowledged(socket: &impl AsRawFd) -> i32 {
    let mut bytes = 0i32;
    // SAFETY: `bytes` is an int, which is what this call writes (tcp(7)).
    let got = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    assert_eq!(got, 0, "{}", io::Error::last_os_error());
    bytes
}

/// Bytes of a stream that its peer has acknowledged (`TCP_INFO`).
pub fn bytes_acknowledged(stream: &impl AsRawFd) -> u64 {
    /// Where `tcpi_bytes_acked` lies (linux/tcp.h).
    const BYTES_ACKED: usize = 120;
    let (mut info, mut len) = ([0u8; 256], 256u32);
    // SAFETY: `info` is valid for `len` bytes.
    let got = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    assert!(got == 0 && len as usize >= BYTES_ACKED + 8, "{}", io::Error::last_os_error());
    u64::from_ne_bytes(*info[BYTES_ACKED..].first_chunk().unwrap())
}
