//! Datagram sockets of the host: UDP, and ICMP echo.
//!
//! Echo goes through unprivileged ping sockets where `net.ipv4.ping_group_range` allows them. Where it does not (a
//! new network namespace shuts out even root) and raw sockets were had at start, one of those serves a mapping, with a
//! filter that lets only its own replies in.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use crate::frame::address::Endpoint;

use super::{options, tcp};
use crate::io::sockaddr;

/// The system calls made here besides those of [`tcp`] and [`options`].
pub const SYSTEM_CALLS: &[libc::c_long] = &[];

/// Room for datagrams that wait to be relayed, in bytes; the kernel caps it at `net.core.rmem_max`.
const RECEIVE_BUFFER: i32 = 4 << 20;

fn set_option(fd: RawFd, v4: bool, for_v4: i32, for_v6: i32, value: i32) -> io::Result<()> {
    let (level, name) = if v4 { (libc::IPPROTO_IP, for_v4) } else { (libc::IPPROTO_IPV6, for_v6) };
    options::set_number(fd, level, name, value)
}

/// Options of every UDP socket, also of published ones.
pub fn prepare_udp(fd: RawFd, v4: bool) -> io::Result<()> {
    set_option(fd, v4, libc::IP_RECVERR, libc::IPV6_RECVERR, 1)?;
    set_option(fd, v4, libc::IP_RECVTOS, libc::IPV6_RECVTCLASS, 1)?;
    let _ = options::set_number(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, RECEIVE_BUFFER);
    let _ = options::set_number(fd, libc::SOL_UDP, libc::UDP_GRO, 1);
    Ok(())
}

/// Has the kernel tell which local address a datagram was sent to, so that answers leave from it.
pub fn tell_local_address(fd: RawFd, v4: bool) -> io::Result<()> {
    set_option(fd, v4, libc::IP_PKTINFO, libc::IPV6_RECVPKTINFO, 1)
}

/// A UDP socket, bound to `port` of every address, or to one that the kernel chooses.
pub fn open_udp(v4: bool, port: Option<u16>) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_DGRAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    let socket = tcp::socket(v4, kind, 0)?;
    let fd = socket.as_raw_fd();
    prepare_udp(fd, v4)?;
    if !v4 {
        options::set_number(fd, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)?;
    }
    tcp::bind(fd, Endpoint { address: tcp::unspecified(v4), port: port.unwrap_or(0) })?;
    Ok(socket)
}

/// A ping socket (icmp(7)), whose identifier is `id` or one that the kernel chooses.
pub fn open_ping(v4: bool, id: Option<u16>) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_DGRAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    let protocol = if v4 { libc::IPPROTO_ICMP } else { libc::IPPROTO_ICMPV6 };
    let socket = tcp::socket(v4, kind, protocol)?;
    let fd = socket.as_raw_fd();
    set_option(fd, v4, libc::IP_RECVERR, libc::IPV6_RECVERR, 1)?;
    tcp::bind(fd, Endpoint { address: tcp::unspecified(v4), port: id.unwrap_or(0) })?;
    Ok(socket)
}

/// A raw ICMP socket that lets nothing in yet. Takes `CAP_NET_RAW`.
pub fn open_raw(v4: bool) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    let protocol = if v4 { libc::IPPROTO_ICMP } else { libc::IPPROTO_ICMPV6 };
    let socket = tcp::socket(v4, kind, protocol)?;
    admit_replies(socket.as_raw_fd(), v4, None)?;
    Ok(socket)
}

/// Lets the echo replies with an identifier into a raw socket, and nothing else; `None`: nothing at all. Errors pass every
/// filter: the kernel queues those about anybody's echo, and forgets them when they are not wanted any more.
pub fn admit_replies(fd: RawFd, v4: bool, id: Option<u16>) -> io::Result<()> {
    const LOAD_HALF: u16 = (libc::BPF_LD | libc::BPF_H | libc::BPF_IND) as u16;
    const LOAD_BYTE: u16 = (libc::BPF_LD | libc::BPF_B | libc::BPF_IND) as u16;
    const IP_HEADER_LEN: u16 = (libc::BPF_LDX | libc::BPF_B | libc::BPF_MSH) as u16;
    const INDEX: u16 = (libc::BPF_LDX | libc::BPF_W | libc::BPF_IMM) as u16;
    const JUMP_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    set_option(fd, v4, libc::IP_RECVERR, libc::IPV6_RECVERR, i32::from(id.is_some()))?;
    let Some(id) = id else { return options::attach_filter(fd, &[step(RETURN, 0, 0, 0)]) };
    // A raw IPv4 socket sees the IP header, a raw ICMPv6 socket does not.
    let start = if v4 { step(IP_HEADER_LEN, 0, 0, 0) } else { step(INDEX, 0, 0, 0) };
    let reply = if v4 { 0 } else { 129 };
    options::attach_filter(
        fd,
        &[
            start,
            step(LOAD_BYTE, 0, 0, 0),
            step(JUMP_EQUAL, 0, 3, reply),
            step(LOAD_HALF, 0, 0, 4),
            step(JUMP_EQUAL, 0, 1, u32::from(id)),
            step(RETURN, 0, 0, u32::MAX),
            step(RETURN, 0, 0, 0),
        ],
    )
}

/// Whether the host may cut datagrams of this socket into fragments: not those that the guest forbade to cut.
pub fn set_dont_fragment(fd: RawFd, v4: bool, on: bool) -> io::Result<()> {
    let value = if on { libc::IP_PMTUDISC_DO } else { libc::IP_PMTUDISC_DONT };
    set_option(fd, v4, libc::IP_MTU_DISCOVER, libc::IPV6_MTU_DISCOVER, value)
}

/// The port (or identifier) that a socket is bound to.
pub fn port_of(fd: RawFd) -> Option<u16> {
    sockaddr::local(fd).map(|local| local.port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_udp_socket_has_the_port_that_is_asked_for_or_says_why_not() {
        for v4 in [true, false] {
            let first = open_udp(v4, None).unwrap();
            let port = port_of(first.as_raw_fd()).unwrap();
            assert_ne!(port, 0);
            assert_eq!(open_udp(v4, Some(port)).unwrap_err().raw_os_error(), Some(libc::EADDRINUSE));
            set_dont_fragment(first.as_raw_fd(), v4, true).unwrap();
            set_dont_fragment(first.as_raw_fd(), v4, false).unwrap();
            tell_local_address(first.as_raw_fd(), v4).unwrap();
        }
    }
}
