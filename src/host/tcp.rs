//! TCP sockets of the host.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use crate::frame::address::Endpoint;
use crate::policy::outbound::WayOut;

use super::errors::{self, SocketError};
use super::{ConnectPlan, options};
use crate::io::sockaddr;

/// The system calls made here.
pub const SYSTEM_CALLS: &[libc::c_long] = &[
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_accept4,
    libc::SYS_getsockname,
    libc::SYS_shutdown,
    libc::SYS_close,
];

/// Unsent bytes that the kernel takes before it calls a socket full (`TCP_NOTSENT_LOWAT`): enough to keep a fast
/// path busy, and little enough that the guest's sender feels the receiver.
pub const UNSENT_MAX: u32 = 256 << 10;

const STREAM: i32 = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A new non-blocking socket.
pub(super) fn socket(v4: bool, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = check(unsafe { libc::socket(sockaddr::family(v4), kind, protocol) })?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A stream socket that is connected to nothing yet.
pub fn new_stream(v4: bool) -> io::Result<OwnedFd> {
    socket(v4, STREAM, 0)
}

/// Binds a socket to an endpoint.
pub(super) fn bind(fd: RawFd, endpoint: Endpoint) -> io::Result<()> {
    // SAFETY: zero is a valid socket address.
    let mut name = unsafe { std::mem::zeroed() };
    let len = sockaddr::store(endpoint, &mut name);
    // SAFETY: `name` holds an address of `len` bytes.
    check(unsafe { libc::bind(fd, (&raw const name).cast(), len) }).map(drop)
}

/// Connects a socket; `Ok` also when the connect is under way.
pub(super) fn connect(fd: RawFd, destination: Endpoint) -> io::Result<()> {
    // SAFETY: zero is a valid socket address.
    let mut name = unsafe { std::mem::zeroed() };
    let len = sockaddr::store(destination, &mut name);
    // SAFETY: `name` holds an address of `len` bytes.
    match check(unsafe { libc::connect(fd, (&raw const name).cast(), len) }) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(()),
    }
}

/// Options of every stream, also inherited by what a listener accepts. Their absence on an odd kernel costs speed
/// or an ill-mannered urgent byte, not correctness.
pub(super) fn prepare(fd: RawFd) {
    // The guest has decided already what to send when (RFC 896 is the guest's business).
    let _ = options::set_number(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1);
    let _ = options::set_number(fd, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, UNSENT_MAX as i32);
    // Urgent data is delivered in line.
    let _ = options::set_number(fd, libc::SOL_SOCKET, libc::SO_OOBINLINE, 1);
}

/// Takes back the limit of what waits in the socket unsent, which is for sockets that frames feed: what they do not take waits with
/// the guest. What feeds a joined socket has waited in a socket already.
pub fn lift_unsent_limit(fd: RawFd) {
    // Zero is the system's own limit. As in `prepare`, what is odd costs speed alone.
    let _ = options::set_number(fd, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, 0);
}

fn set_report_errors(fd: RawFd, v4: bool, on: bool) {
    let (level, name) =
        if v4 { (libc::IPPROTO_IP, libc::IP_RECVERR) } else { (libc::IPPROTO_IPV6, libc::IPV6_RECVERR) };
    let _ = options::set_number(fd, level, name, i32::from(on));
}

/// Opens a connection as planned; it is under way when this returns.
pub fn open(plan: &ConnectPlan) -> Result<OwnedFd, SocketError> {
    let v4 = plan.destination.address.is_v4();
    let socket = socket(v4, STREAM, 0)?;
    let fd = socket.as_raw_fd();
    prepare(fd);
    // While connecting, an ICMP error is the guest's to know; afterwards it would end connections (RFC 1122, 4.2.3.9).
    set_report_errors(fd, v4, true);
    if plan.traffic_class & !3 != 0 {
        let (level, name) =
            if v4 { (libc::IPPROTO_IP, libc::IP_TOS) } else { (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) };
        // The ECN bits belong to the host's own congestion control.
        let _ = options::set_number(fd, level, name, i32::from(plan.traffic_class & !3));
    }
    // Two connections may leave from one port (RFC 5382, REQ-1), if both say so: also from one that the kernel picks now
    // and another connection asks for later.
    options::set_number(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    choose_way(fd, v4, &plan.way, plan.local_port)?;
    match connect(fd, plan.destination) {
        Ok(()) => Ok(socket),
        Err(error) => Err(with_report(fd, error.into())),
    }
}

/// Has a socket that is not connected yet leave from a port, and by a way. That takes no right, as long as it has no way yet
/// (Linux 5.7).
pub fn choose_way(fd: RawFd, v4: bool, way: &WayOut, port: Option<u16>) -> io::Result<()> {
    if let Some(index) = way.interface {
        options::set_number(fd, libc::SOL_SOCKET, options::SO_BINDTOIFINDEX, index as i32)?;
    }
    if port.is_none() && way.source.is_some() {
        // The kernel chooses the port when it knows where to, and so may use one for many destinations.
        options::set_number(fd, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)?;
    }
    if port.is_some() || way.source.is_some() {
        let address = way.source.unwrap_or_else(|| unspecified(v4));
        bind(fd, Endpoint { address, port: port.unwrap_or(0) })?;
    }
    Ok(())
}

/// 0.0.0.0 or ::.
pub(super) fn unspecified(v4: bool) -> crate::frame::address::Address {
    if v4 { std::net::Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() }
}

/// Adds what the error queue says about an error. A socketpair has no such queue: it would give its data.
fn with_report(fd: RawFd, error: SocketError) -> SocketError {
    if options::number(fd, libc::SOL_SOCKET, libc::SO_DOMAIN).is_ok_and(|domain| domain == libc::AF_UNIX) {
        return error;
    }
    SocketError { report: errors::take_queued(fd).map(|queued| queued.report), ..error }
}

/// What became of a connect that was under way, or of a connection that reported an error.
pub fn outcome(fd: RawFd) -> Result<(), SocketError> {
    match options::number(fd, libc::SOL_SOCKET, libc::SO_ERROR) {
        Ok(0) => Ok(()),
        Ok(number) => Err(with_report(fd, SocketError::from_number(number))),
        Err(error) => Err(error.into()),
    }
}

/// The connection stands: errors are the kernel's again, peeking starts at the first byte. Returns whether the kernel
/// keeps a peek offset (Linux 6.9 for IPv4, 6.11 for IPv6).
pub fn establish(fd: RawFd, v4: bool, connecting: bool) -> bool {
    if connecting {
        set_report_errors(fd, v4, false);
    }
    seek(fd, 0).is_ok()
}

/// Puts the offset at which the next peek starts.
pub fn seek(fd: RawFd, offset: u32) -> io::Result<()> {
    options::set_number(fd, libc::SOL_SOCKET, options::SO_PEEK_OFF, offset as i32)
}

/// How many bytes the socket would take now.
pub fn room(fd: RawFd) -> u32 {
    const SEND_ALLOCATED: usize = 2;
    const SEND_BUFFER: usize = 3;
    const SEND_QUEUED: usize = 5;
    let mut memory = [0i32; 9];
    let Ok(count) = options::numbers(fd, libc::SOL_SOCKET, options::SO_MEMINFO, &mut memory) else {
        return 0;
    };
    if count <= SEND_QUEUED {
        return 0;
    }
    let free = (memory[SEND_BUFFER] - memory[SEND_QUEUED]).max(0) as u32;
    match options::unsent_bytes(fd) {
        Ok(unsent) => free.min(UNSENT_MAX.saturating_sub(unsent)),
        // A socketpair has no such limit, and counts what its other end has not read as memory, about twice the bytes.
        Err(_) => (memory[SEND_BUFFER] - memory[SEND_ALLOCATED]).max(0) as u32 / 2,
    }
}

/// Closes the sending direction.
pub fn shut_down(fd: RawFd) {
    // SAFETY: no memory is passed. A connection that is gone already needs no closing.
    let _ = unsafe { libc::shutdown(fd, libc::SHUT_WR) };
}

/// Ends a connection with a reset, at both ends, and keeps the descriptor: whoever uses it next is told (`ECONNRESET`).
pub fn disconnect(fd: RawFd) {
    let nobody = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    let len = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: the address is valid for its length. A connection that is gone already needs no end.
    let _ = unsafe { libc::connect(fd, &raw const nobody, len) };
}

/// Has the kernel probe the peer, as the guest does: after the same silence. How long it is patient then is the default of
/// Linux, nine probes at up to 75 s each: the guest may be more patient than its probes are frequent.
pub fn keep_alive(fd: RawFd, after: Duration) {
    // TCP_KEEPIDLE takes up to 32,767 s.
    let idle_s = after.as_secs().clamp(1, 32_767) as i32;
    for (level, name, value) in [
        (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, idle_s),
        (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, idle_s.min(75)),
        (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 9),
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
    ] {
        let _ = options::set_number(fd, level, name, value);
    }
}

/// A client that was accepted.
pub struct Accepted<S> {
    /// Its connection.
    pub socket: S,
    /// Where it comes from.
    pub peer: Endpoint,
}

/// Accepts the next client of a listener; `None` when there is none.
pub fn accept(listener: RawFd) -> io::Result<Option<Accepted<OwnedFd>>> {
    // SAFETY: zero is a valid socket address.
    let mut name: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let mut len = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: `name` is valid for `len` bytes.
    let fd = match check(unsafe { libc::accept4(listener, (&raw mut name).cast(), &raw mut len, flags) }) {
        Ok(fd) => fd,
        // The client is gone already, or there is none.
        Err(error) => {
            return match error.raw_os_error() {
                Some(libc::EAGAIN | libc::ECONNABORTED | libc::EINTR | libc::EINVAL) => Ok(None),
                _ => Err(error),
            };
        }
    };
    // SAFETY: the descriptor is new and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok(sockaddr::load(&name).map(|peer| Accepted { socket, peer }))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_socketpair_has_room_for_what_its_other_end_may_still_hold() {
        let (mut one, mut other) = UnixStream::pair().unwrap();
        one.set_nonblocking(true).unwrap();
        let empty = room(one.as_raw_fd());
        assert!(empty > 16 << 10, "{empty}");
        while one.write(&[0; 4096]).is_ok() {}
        assert_eq!(room(one.as_raw_fd()), 0);
        other.read_exact(&mut vec![0; 64 << 10]).unwrap();
        assert!((1..=empty).contains(&room(one.as_raw_fd())));
    }

    #[test]
    fn a_socketpair_that_was_broken_off_tells_so_and_keeps_its_data() {
        let (mut one, mut other) = UnixStream::pair().unwrap();
        one.write_all(b"never read").unwrap();
        other.write_all(b"still to be read").unwrap();
        drop(other);
        let error = outcome(one.as_raw_fd()).unwrap_err();
        assert_eq!((error.number, error.report.is_none()), (libc::ECONNRESET, true));
        assert_eq!(outcome(one.as_raw_fd()).map_err(|error| error.number), Ok(()));
        let mut data = [0; 16];
        one.read_exact(&mut data).unwrap();
        assert_eq!(&data, b"still to be read");
    }
}
