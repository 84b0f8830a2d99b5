//! Socket options, as values.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;

/// `SO_PEEK_OFF`; libc names it for some architectures only.
pub const SO_PEEK_OFF: i32 = 42;
/// `SO_BINDTOIFINDEX` (Linux 5.1): `SO_BINDTODEVICE` by the interface's number.
pub const SO_BINDTOIFINDEX: i32 = 62;
/// `SO_MEMINFO`.
pub const SO_MEMINFO: i32 = 55;

/// The system calls made here.
pub const SYSTEM_CALLS: &[libc::c_long] = &[libc::SYS_setsockopt, libc::SYS_getsockopt, libc::SYS_ioctl];

/// Sets an option whose value is plain data.
fn set<T: Copy>(fd: RawFd, level: i32, name: i32, value: &T) -> io::Result<()> {
    let len = size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` is valid for `len` bytes; the kernel reads it during the call only.
    let result = unsafe { libc::setsockopt(fd, level, name, std::ptr::from_ref(value).cast(), len) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sets an option whose value is a number.
pub fn set_number(fd: RawFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    set(fd, level, name, &value)
}

/// Reads an option whose value is a number.
pub fn number(fd: RawFd, level: i32, name: i32) -> io::Result<i32> {
    let mut value = [0i32];
    numbers(fd, level, name, &mut value)?;
    Ok(value[0])
}

/// Reads an option whose value is an array of numbers; returns how many the kernel gave.
pub fn numbers(fd: RawFd, level: i32, name: i32, out: &mut [i32]) -> io::Result<usize> {
    let mut len = size_of_val(out) as libc::socklen_t;
    // SAFETY: `out` is valid for `len` bytes and any bytes make valid numbers.
    let result = unsafe { libc::getsockopt(fd, level, name, out.as_mut_ptr().cast(), &raw mut len) };
    if result == 0 { Ok(len as usize / size_of::<i32>()) } else { Err(io::Error::last_os_error()) }
}

/// Makes `close` reset the connection: `SO_LINGER` of zero seconds.
pub fn set_reset_on_close(fd: RawFd) -> io::Result<()> {
    set(fd, libc::SOL_SOCKET, libc::SO_LINGER, &libc::linger { l_onoff: 1, l_linger: 0 })
}

/// Bytes in a TCP send queue that were not sent yet (`SIOCOUTQNSD`).
pub fn unsent_bytes(fd: RawFd) -> io::Result<u32> {
    let mut value: libc::c_int = 0;
    // SAFETY: the request writes one int to the address given.
    let result = unsafe { libc::ioctl(fd, libc::SIOCOUTQNSD as _, &raw mut value) };
    if result == 0 { Ok(value.max(0) as u32) } else { Err(io::Error::last_os_error()) }
}

/// Attaches a classic BPF program that decides which packets a socket receives.
pub fn attach_filter(fd: RawFd, program: &[libc::sock_filter]) -> io::Result<()> {
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    set(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &filter)
}
