//! What went wrong on a host socket, and what a guest is to be told about it.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;

use crate::frame::address::{Address, Endpoint};
use crate::frame::icmp::IcmpError;

use crate::io::sockaddr;

/// The system calls made here.
pub const SYSTEM_CALLS: &[libc::c_long] = &[libc::SYS_recvmsg];

/// An error of a socket, with what the network said about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SocketError {
    /// The error number.
    pub number: i32,
    /// The ICMP error behind it, when there was one.
    pub report: Option<IcmpReport>,
}

/// An ICMP error that a router, a host or the host's own kernel reported.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IcmpReport {
    /// What went wrong.
    pub error: IcmpError,
    /// Who said so; `None` when it was the host's own kernel.
    pub offender: Option<Address>,
}

/// How a guest is told that its connection or datagram failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// By a reset (TCP), or port unreachable.
    Refused,
    /// By an ICMP error, from the given router where one said so.
    Icmp(IcmpReport),
}

impl SocketError {
    /// An error without a report.
    pub fn from_number(number: i32) -> Self {
        Self { number, report: None }
    }

    /// The honest answer to a failed connect.
    pub fn answer(&self) -> Answer {
        if let Some(report) = self.report {
            return match report.error {
                IcmpError::PortUnreachable => Answer::Refused,
                _ => Answer::Icmp(report),
            };
        }
        let local = |error| Answer::Icmp(IcmpReport { error, offender: None });
        match self.number {
            // EINVAL is what a blackhole route says (ip-route(8)); ENODEV, that the interface chosen is away.
            libc::ENETUNREACH
            | libc::ENETDOWN
            | libc::ENODEV
            | libc::EADDRNOTAVAIL
            | libc::EAFNOSUPPORT
            | libc::EINVAL => local(IcmpError::NetworkUnreachable),
            libc::EHOSTUNREACH | libc::EHOSTDOWN | libc::ETIMEDOUT => local(IcmpError::HostUnreachable),
            libc::EACCES | libc::EPERM => local(IcmpError::Prohibited),
            _ => Answer::Refused,
        }
    }
}

impl From<io::Error> for SocketError {
    fn from(error: io::Error) -> Self {
        Self::from_number(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

/// Bytes of the datagram in question that an error carries along.
pub const QUOTE_MAX: usize = 1280;

/// An entry of a socket's error queue (`IP_RECVERR`, ip(7)).
#[derive(Clone, Debug)]
pub struct QueuedError {
    /// Who said what.
    pub report: IcmpReport,
    /// Where the datagram was sent.
    pub destination: Endpoint,
    /// The datagram's payload, as far as it came back.
    pub payload: Vec<u8>,
}

/// `SO_EE_ORIGIN_*` and the structure itself, which libc has.
fn parse(error: &libc::sock_extended_err, offender: Option<Endpoint>, v4: bool) -> Option<IcmpReport> {
    match error.ee_origin {
        libc::SO_EE_ORIGIN_ICMP | libc::SO_EE_ORIGIN_ICMP6 => Some(IcmpReport {
            error: IcmpError::from_wire(
                error.ee_origin == libc::SO_EE_ORIGIN_ICMP,
                error.ee_type,
                error.ee_code,
                error.ee_info,
            ),
            offender: offender.map(|endpoint| endpoint.address),
        }),
        // The host's own kernel: a datagram larger than the path's MTU.
        libc::SO_EE_ORIGIN_LOCAL if error.ee_errno == libc::EMSGSIZE as u32 => {
            let mtu = error.ee_info.max(if v4 { 68 } else { 1280 });
            Some(IcmpReport { error: IcmpError::TooBig { mtu }, offender: None })
        }
        _ => None,
    }
}

/// Takes the next entry out of a socket's error queue. Entries that say nothing about the network are passed over.
pub fn take_queued(fd: RawFd) -> Option<QueuedError> {
    loop {
        let mut payload = vec![0u8; QUOTE_MAX];
        let mut control = [0u64; 64];
        // SAFETY: zero is valid for both.
        let (mut name, mut header): (libc::sockaddr_storage, libc::msghdr) = unsafe { std::mem::zeroed() };
        let mut piece = libc::iovec { iov_base: payload.as_mut_ptr().cast(), iov_len: payload.len() };
        header.msg_name = (&raw mut name).cast();
        header.msg_namelen = size_of::<libc::sockaddr_storage>() as u32;
        header.msg_iov = &raw mut piece;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = size_of_val(&control) as _;
        // SAFETY: every pointer in the header is to a local that outlives the call, with its true length.
        let len = unsafe { libc::recvmsg(fd, &raw mut header, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT) };
        // What comes without the flag comes from no error queue.
        if len < 0 || header.msg_flags & libc::MSG_ERRQUEUE == 0 {
            return None;
        }
        payload.truncate(len as usize);
        let destination = sockaddr::load(&name);
        // SAFETY: the kernel wrote the control messages; the macros walk them within `msg_controllen`.
        let mut cmsg = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
        while !cmsg.is_null() {
            // SAFETY: not null, so a whole header lies there.
            let head = unsafe { cmsg.read_unaligned() };
            let v4 = head.cmsg_level == libc::IPPROTO_IP && head.cmsg_type == libc::IP_RECVERR;
            let v6 = head.cmsg_level == libc::IPPROTO_IPV6 && head.cmsg_type == libc::IPV6_RECVERR;
            if v4 || v6 {
                #[expect(clippy::cast_ptr_alignment, reason = "both are read unaligned")]
                // SAFETY: the kernel puts a sock_extended_err there, and behind it the offender's address; the
                // control buffer is larger than both, so reading a whole sockaddr_storage stays inside it.
                let (error, offender) = unsafe {
                    let data = libc::CMSG_DATA(cmsg).cast::<libc::sock_extended_err>();
                    let offender = data.add(1).cast::<libc::sockaddr_storage>();
                    (data.read_unaligned(), offender.read_unaligned())
                };
                if let (Some(report), Some(destination)) =
                    (parse(&error, sockaddr::load(&offender), v4), destination)
                {
                    return Some(QueuedError { report, destination, payload });
                }
            }
            // SAFETY: as for the first.
            cmsg = unsafe { libc::CMSG_NXTHDR(&raw const header, cmsg) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_error_has_an_honest_answer() {
        let icmp = |number| match SocketError::from_number(number).answer() {
            Answer::Icmp(report) => Some(report.error),
            Answer::Refused => None,
        };
        assert_eq!(icmp(libc::ECONNREFUSED), None);
        assert_eq!(icmp(libc::ENETUNREACH), Some(IcmpError::NetworkUnreachable));
        assert_eq!(icmp(libc::EHOSTUNREACH), Some(IcmpError::HostUnreachable));
        assert_eq!(icmp(libc::EACCES), Some(IcmpError::Prohibited));
        assert_eq!(icmp(libc::EINVAL), Some(IcmpError::NetworkUnreachable), "a blackhole route");
        assert_eq!(icmp(libc::ENODEV), Some(IcmpError::NetworkUnreachable), "an interface that is away");
        let report = IcmpReport { error: IcmpError::PortUnreachable, offender: None };
        let refused = SocketError { number: libc::ECONNREFUSED, report: Some(report) };
        assert_eq!(refused.answer(), Answer::Refused);
    }
}
