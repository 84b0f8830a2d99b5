//! Control messages of datagrams (cmsg(3)): what is asked of the kernel for one datagram, and what it tells.

use crate::frame::address::Address;
use crate::io::{CONTROL_LEN, Message};

const HEADER_LEN: usize = 16;

/// What is asked for one datagram, besides its destination.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SendControl {
    /// The hop limit, where it is not the host's default.
    pub hop_limit: Option<u8>,
    /// The traffic class, ECN included.
    pub traffic_class: u8,
    /// The payload is a run of datagrams of this size, in bytes (`UDP_SEGMENT`).
    pub segment: Option<u16>,
    /// The local address to send from.
    pub local: Option<Address>,
    /// The number of the interface to send by.
    pub interface: Option<u32>,
}

/// What the kernel tells about one datagram.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ReceiveControl {
    /// The payload is a run of datagrams of this size, in bytes (`UDP_GRO`).
    pub segment: Option<u16>,
    /// The traffic class, ECN included.
    pub traffic_class: u8,
    /// The local address that it was sent to.
    pub local: Option<Address>,
}

fn push(message: &mut Message, level: i32, kind: i32, data: &[u8]) {
    let start = message.control_len;
    let end = start + HEADER_LEN + data.len().next_multiple_of(8);
    if end > CONTROL_LEN {
        // All messages of one datagram together need less; a test proves it.
        return;
    }
    let control = &mut message.control[start..end];
    control.fill(0);
    control[0..8].copy_from_slice(&(HEADER_LEN + data.len()).to_ne_bytes());
    control[8..12].copy_from_slice(&level.to_ne_bytes());
    control[12..16].copy_from_slice(&kind.to_ne_bytes());
    control[16..16 + data.len()].copy_from_slice(data);
    message.control_len = end;
}

/// Writes what is asked into a datagram's message.
pub fn write(message: &mut Message, v4: bool, control: &SendControl) {
    message.control_len = 0;
    let (level, ttl, class) = if v4 {
        (libc::IPPROTO_IP, libc::IP_TTL, libc::IP_TOS)
    } else {
        (libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT, libc::IPV6_TCLASS)
    };
    if let Some(hop_limit) = control.hop_limit {
        push(message, level, ttl, &i32::from(hop_limit).to_ne_bytes());
    }
    if control.traffic_class != 0 {
        push(message, level, class, &i32::from(control.traffic_class).to_ne_bytes());
    }
    if let Some(segment) = control.segment {
        push(message, libc::SOL_UDP, libc::UDP_SEGMENT, &segment.to_ne_bytes());
    }
    if control.local.is_none() && control.interface.is_none() {
        return;
    }
    let interface = control.interface.unwrap_or(0).to_ne_bytes();
    if v4 {
        // struct in_pktinfo: interface, the source to use, an address that is not read.
        let mut info = [0; 12];
        info[..4].copy_from_slice(&interface);
        info[4..8].copy_from_slice(&control.local.map_or([0; 4], Address::v4_octets));
        push(message, level, libc::IP_PKTINFO, &info);
    } else {
        // struct in6_pktinfo: the address, the interface.
        let mut info = [0; 20];
        info[..16].copy_from_slice(&control.local.map_or([0; 16], Address::octets));
        info[16..].copy_from_slice(&interface);
        push(message, level, libc::IPV6_PKTINFO, &info);
    }
}

/// Reads what the kernel told about a datagram.
pub fn read(message: &Message) -> ReceiveControl {
    let mut told = ReceiveControl::default();
    let mut rest = &message.control[..message.control_len.min(CONTROL_LEN)];
    while let Some((header, _)) = rest.split_at_checked(HEADER_LEN) {
        let word =
            |at: usize| i32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let len = word(0) as usize;
        let Some(data) = rest.get(HEADER_LEN..len) else { break };
        match (word(8), word(12), data) {
            (libc::SOL_UDP, libc::UDP_GRO, [a, b, ..]) => told.segment = Some(u16::from_ne_bytes([*a, *b])),
            (libc::IPPROTO_IP, libc::IP_TOS, [class, ..])
            | (libc::IPPROTO_IPV6, libc::IPV6_TCLASS, [class, ..]) => {
                told.traffic_class = *class;
            }
            (libc::IPPROTO_IP, libc::IP_PKTINFO, [_, _, _, _, _, _, _, _, a, b, c, d]) => {
                told.local = Some(Address::v4([*a, *b, *c, *d]));
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, data) => {
                told.local = data.first_chunk::<16>().map(|octets| Address::v6(*octets));
            }
            _ => {}
        }
        let Some(next) = rest.get(len.next_multiple_of(8)..) else { break };
        rest = next;
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::{Kind, Operations};
    use std::net::{IpAddr, UdpSocket};
    use std::os::fd::AsRawFd;

    #[test]
    fn the_kernel_reads_what_is_written_and_tells_what_is_read() {
        for (host, v4) in [("127.0.0.1", true), ("::1", false)] {
            let host: IpAddr = host.parse().unwrap();
            let [a, b] = [(); 2].map(|()| UdpSocket::bind((host, 0)).unwrap());
            let fd = b.as_raw_fd();
            let level = if v4 { libc::IPPROTO_IP } else { libc::IPPROTO_IPV6 };
            let options = if v4 {
                [libc::IP_RECVTOS, libc::IP_PKTINFO]
            } else {
                [libc::IPV6_RECVTCLASS, libc::IPV6_RECVPKTINFO]
            };
            for name in options {
                crate::host::options::set_number(fd, level, name, 1).unwrap();
            }
            crate::host::options::set_number(fd, libc::SOL_UDP, libc::UDP_GRO, 1).unwrap();

            let mut buffers = crate::io::Buffers::new(2, 3000);
            buffers.bytes_mut(0, 3000).fill(7);
            let mut operations = Operations::default();
            let mut begun = operations.begin(a.as_raw_fd(), Kind::SendDatagram);
            begun.piece(buffers.piece(0));
            let (id, message) = begun.finish_datagram();
            message.set_destination(Some(b.local_addr().unwrap().into()));
            let everything = SendControl {
                hop_limit: Some(9),
                traffic_class: 0xb9,
                segment: Some(1000),
                local: Some(host.into()),
                interface: nix::net::if_::if_nametoindex("lo").ok(),
            };
            write(message, v4, &everything);
            let mut epoll = crate::host::engine::epoll::Epoll::new().unwrap();
            crate::host::engine::Engine::run(&mut epoll, &mut operations);
            assert_eq!(operations.result(id).unwrap(), 3000);

            operations.clear();
            let mut begun = operations.begin(fd, Kind::ReceiveDatagram);
            begun.piece(buffers.piece(1));
            let (id, _) = begun.finish_datagram();
            crate::host::engine::Engine::run(&mut epoll, &mut operations);
            let message = operations.message(id);
            let told = read(message);
            assert_eq!(told.traffic_class, 0xb9);
            assert_eq!(told.local, Some(host.into()));
            assert_eq!(told.segment, Some(1000), "loopback keeps the run together");
            assert_eq!(message.source(), Some(a.local_addr().unwrap().into()));
        }
    }

    #[test]
    fn nonsense_is_passed_over() {
        let mut operations = Operations::default();
        let (_, message) = operations.begin(0, Kind::ReceiveDatagram).finish_datagram();
        for fill in [0u8, 1, 0x7f, 0xff] {
            message.control.fill(fill);
            message.control_len = CONTROL_LEN;
            read(message);
        }
    }
}
