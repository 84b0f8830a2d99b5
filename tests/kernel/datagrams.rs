//! UDP and ICMP sockets: runs of datagrams, and who said what went wrong.

use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};

use hythe::host::datagram;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::calls::{
    LOOPBACKS, await_error, await_events, await_queue, get, in_new_namespace, ip, next_error, number,
    receive, receive_with, send_with, set, sysctl, udp_pair, when_ready,
};

fn report_errors(socket: &impl AsRawFd, v4: bool) {
    let (level, name) =
        if v4 { (libc::IPPROTO_IP, libc::IP_RECVERR) } else { (libc::IPPROTO_IPV6, libc::IPV6_RECVERR) };
    set(socket, level, name, 1).unwrap();
}

/// Whether the kernel may cut datagrams.
fn forbid_fragments(socket: &impl AsRawFd, v4: bool, forbid: bool) {
    let (level, name) = if v4 {
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER)
    } else {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER)
    };
    let value = if forbid { libc::IP_PMTUDISC_DO } else { libc::IP_PMTUDISC_DONT };
    set(socket, level, name, value).unwrap();
}

fn send_run(socket: &UdpSocket, to: SocketAddr, bytes: &[u8], size: u16) -> std::io::Result<usize> {
    send_with(socket, to, bytes, (libc::SOL_UDP, libc::UDP_SEGMENT, &size.to_ne_bytes()))
}

#[test]
fn a_run_of_datagrams_is_one_send() {
    for address in LOOPBACKS {
        let [from, to] = udp_pair(address);
        let bytes: Vec<u8> = (0..5500u32).map(|n| n as u8).collect();
        assert_eq!(send_run(&from, to.local_addr().unwrap(), &bytes, 1000).unwrap(), 5500);
        let mut got = Vec::new();
        for len in [1000, 1000, 1000, 1000, 1000, 500] {
            let mut datagram = [0; 2000];
            assert_eq!(to.recv(&mut datagram).unwrap(), len);
            got.extend_from_slice(&datagram[..len]);
        }
        assert_eq!(got, bytes);
    }
}

#[test]
fn a_run_of_datagrams_is_one_receive() {
    for address in LOOPBACKS {
        let [from, to] = udp_pair(address);
        set(&to, libc::SOL_UDP, libc::UDP_GRO, 1).unwrap();
        let bytes: Vec<u8> = (0..5500u32).map(|n| n as u8).collect();
        send_run(&from, to.local_addr().unwrap(), &bytes, 1000).unwrap();
        let (got, size) = when_ready(|| receive_with(&to, 65_535, libc::SOL_UDP, libc::UDP_GRO)).unwrap();
        assert_eq!((got, size), (bytes, Some(1000)));
        from.send_to(b"alone", to.local_addr().unwrap()).unwrap();
        let (got, size) = when_ready(|| receive_with(&to, 65_535, libc::SOL_UDP, libc::UDP_GRO)).unwrap();
        assert_eq!((got.as_slice(), size), (b"alone".as_slice(), None), "one datagram has no size told");
    }
}

#[test]
fn a_run_has_at_least_64_datagrams_and_at_most_64_kib() {
    for address in LOOPBACKS {
        let [from, to] = udp_pair(address);
        let name = to.local_addr().unwrap();
        assert_eq!(send_run(&from, name, &vec![1; 64 * 1000], 1000).unwrap(), 64_000);
        assert_eq!(number(send_run(&from, name, &vec![1; 66 * 1000], 1000)), libc::EMSGSIZE);
    }
}

#[test]
fn a_closed_port_is_reported_with_type_code_and_offender() {
    // Where nobody else takes the port that was given back.
    in_new_namespace(|| {
        for address in LOOPBACKS {
            let [from, gone] = udp_pair(address);
            report_errors(&from, address.is_ipv4());
            let name = gone.local_addr().unwrap();
            drop(gone);
            from.send_to(b"anybody there", name).unwrap();
            let reported = await_error(&from);
            let (origin, kind, code) = if address.is_ipv4() {
                (libc::SO_EE_ORIGIN_ICMP, 3, 3)
            } else {
                (libc::SO_EE_ORIGIN_ICMP6, 1, 4)
            };
            let error = &reported.error;
            assert_eq!((error.ee_origin, error.ee_type, error.ee_code), (origin, kind, code));
            assert_eq!(error.ee_errno, libc::ECONNREFUSED as u32);
            assert_eq!(reported.offender.map(|offender| offender.ip()), Some(address));
            assert_eq!(reported.destination, Some(name));
            assert_eq!(reported.payload, b"anybody there");
        }
    });
}

#[test]
fn a_pending_error_fails_the_next_send_to_anybody_and_taking_it_off_the_queue_ends_that() {
    // Where nobody else takes the port that was given back.
    in_new_namespace(|| {
        for address in LOOPBACKS {
            let [from, gone] = udp_pair(address);
            let [to, _] = udp_pair(address);
            report_errors(&from, address.is_ipv4());
            let name = gone.local_addr().unwrap();
            drop(gone);
            from.send_to(b"lost", name).unwrap();
            await_events(&from, libc::POLLERR);
            assert_eq!(number(from.send_to(b"innocent", to.local_addr().unwrap())), libc::ECONNREFUSED);
            while next_error(&from).is_some() {}
            from.send_to(b"lost", name).unwrap();
            await_error(&from);
            assert!(next_error(&from).is_none());
            from.send_to(b"innocent", to.local_addr().unwrap()).unwrap();
            await_queue(&to, 8);
            assert_eq!(receive(&to, 20, 0).unwrap(), b"innocent");
        }
    });
}

#[test]
fn a_datagram_that_may_not_be_cut_is_refused_with_the_paths_mtu() {
    in_new_namespace(|| {
        ip("link set lo mtu 1300");
        for address in LOOPBACKS {
            let [from, to] = udp_pair(address);
            report_errors(&from, address.is_ipv4());
            forbid_fragments(&from, address.is_ipv4(), true);
            let name = to.local_addr().unwrap();
            assert_eq!(number(from.send_to(&[7; 1400], name)), libc::EMSGSIZE);
            let queued = await_error(&from);
            // Of IPv4 neither the port nor the payload is told, so the sender must know what it sent.
            let port = if address.is_ipv4() { 0 } else { name.port() };
            assert_eq!(queued.destination.map(|name| name.port()), Some(port));
            assert_eq!(queued.payload, b"");
            let reported = queued.error;
            assert_eq!(reported.ee_origin, libc::SO_EE_ORIGIN_LOCAL);
            assert_eq!((reported.ee_errno, reported.ee_info), (libc::EMSGSIZE as u32, 1300));
            // Of a run nothing is reported, so it is sent again one by one.
            assert_eq!(number(send_run(&from, name, &[7; 2800], 1400)), libc::EMSGSIZE);
            assert!(next_error(&from).is_none());
            forbid_fragments(&from, address.is_ipv4(), false);
            from.send_to(&[7; 1400], name).unwrap();
            await_queue(&to, 1400);
        }
    });
}

/// An echo request.
fn request(v4: bool, id: u16, payload: &[u8]) -> Vec<u8> {
    let mut message = vec![if v4 { 8 } else { 128 }, 0, 0, 0];
    message.extend(id.to_be_bytes());
    message.extend([0, 1]);
    message.extend(payload);
    if v4 {
        // RFC 1071; a ping socket and the kernel's ICMPv6 fill it in themselves, a raw IPv4 socket does not.
        let words =
            message.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
        let sum: u32 = words.sum();
        let sum = (sum & 0xffff) + (sum >> 16);
        message[2..4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    }
    message
}

fn ping_socket(v4: bool) -> std::io::Result<Socket> {
    let (domain, protocol) =
        if v4 { (Domain::IPV4, Protocol::ICMPV4) } else { (Domain::IPV6, Protocol::ICMPV6) };
    Socket::new(domain, Type::DGRAM, Some(protocol))
}

fn nowhere(address: IpAddr) -> SockAddr {
    SocketAddr::new(address, 0).into()
}

#[test]
fn a_new_namespace_shuts_even_root_out_of_ping_sockets_until_it_is_told_otherwise() {
    in_new_namespace(|| {
        for v4 in [true, false] {
            assert_eq!(number(ping_socket(v4)), libc::EACCES);
        }
        sysctl("ipv4/ping_group_range", "0 2147483647");
        for v4 in [true, false] {
            ping_socket(v4).unwrap();
        }
    });
}

#[test]
fn a_ping_sockets_port_is_its_identifier_and_it_gets_its_own_replies_only() {
    in_new_namespace(|| {
        sysctl("ipv4/ping_group_range", "0 2147483647");
        for address in LOOPBACKS {
            let v4 = address.is_ipv4();
            let sockets = [0x1234u16, 0x1235].map(|id| {
                let socket = ping_socket(v4).unwrap();
                let any = if v4 { "0.0.0.0" } else { "::" };
                socket.bind(&SocketAddr::new(any.parse().unwrap(), id).into()).unwrap();
                socket
            });
            // Whatever identifier the message has, the socket's is sent.
            sockets[0].send_to(&request(v4, 0x7777, b"ping"), &nowhere(address)).unwrap();
            await_events(&sockets[0], libc::POLLIN);
            let reply = receive(&sockets[0], 100, 0).unwrap();
            assert_eq!(reply[0], if v4 { 0 } else { 129 });
            assert_eq!(reply[4..6], [0x12, 0x34]);
            assert_eq!(&reply[8..], b"ping");
            assert_eq!(number(receive(&sockets[1], 100, 0)), libc::EAGAIN);
        }
    });
}

#[test]
fn a_raw_socket_gets_the_replies_that_its_filter_admits_and_no_others() {
    in_new_namespace(|| {
        for address in LOOPBACKS {
            let v4 = address.is_ipv4();
            let sockets: [OwnedFd; 3] = [(); 3].map(|()| datagram::open_raw(v4).unwrap());
            datagram::admit_replies(sockets[0].as_raw_fd(), v4, Some(0x1111)).unwrap();
            datagram::admit_replies(sockets[1].as_raw_fd(), v4, Some(0x2222)).unwrap();
            for id in [0x1111, 0x2222] {
                let sending = socket2::SockRef::from(&sockets[2]);
                sending.send_to(&request(v4, id, b"ping"), &nowhere(address)).unwrap();
            }
            for (socket, id) in sockets.iter().zip([0x1111u16, 0x2222]) {
                await_events(socket, libc::POLLIN);
                let got = receive(socket, 100, 0).unwrap();
                let message = if v4 { &got[20..] } else { &got[..] };
                assert_eq!(message[0], if v4 { 0 } else { 129 });
                assert_eq!(message[4..6], id.to_be_bytes());
                assert_eq!(number(receive(socket, 100, 0)), libc::EAGAIN);
            }
            assert_eq!(number(receive(&sockets[2], 100, 0)), libc::EAGAIN, "it admits nothing");
        }
    });
}

#[test]
fn every_raw_socket_hears_of_errors_about_anybodys_echo_until_it_does_not_want_to() {
    in_new_namespace(|| {
        let rules = "table inet refusing {
            chain input {
                type filter hook input priority 0
                icmp type echo-request reject with icmp type host-unreachable
                icmpv6 type echo-request reject with icmpv6 type addr-unreachable
            }
        }";
        assert!(std::process::Command::new("nft").arg(rules).status().unwrap().success());
        for address in LOOPBACKS {
            let v4 = address.is_ipv4();
            let [hearing, sending] = [(); 2].map(|()| datagram::open_raw(v4).unwrap());
            let send = || {
                let socket = socket2::SockRef::from(&sending);
                socket.send_to(&request(v4, 0x2222, b"ping"), &nowhere(address)).unwrap();
            };
            datagram::admit_replies(hearing.as_raw_fd(), v4, Some(0x1111)).unwrap();
            send();
            let queued = await_error(&hearing);
            let told = if v4 { (3, 1) } else { (1, 3) };
            assert_eq!((queued.error.ee_type, queued.error.ee_code), told);
            // Whose it was is in the message that comes back.
            assert_eq!(queued.payload[4..6], [0x22, 0x22]);
            send();
            await_events(&hearing, libc::POLLERR);
            datagram::admit_replies(hearing.as_raw_fd(), v4, None).unwrap();
            assert!(next_error(&hearing).is_none(), "what was queued is forgotten");
        }
    });
}

#[test]
fn a_connect_is_refused_by_the_kernels_own_routes_without_a_report() {
    // The answers are made from these numbers then.
    in_new_namespace(|| {
        ip("route add unreachable 198.51.100.0/25
            route add prohibit 198.51.100.128/25
            -6 route add unreachable 2001:db8:1::/64
            -6 route add prohibit 2001:db8:2::/64");
        for (destination, expected) in [
            ("198.51.100.1", libc::EHOSTUNREACH),
            ("198.51.100.129", libc::EACCES),
            ("203.0.113.1", libc::ENETUNREACH),
            ("2001:db8:1::1", libc::EHOSTUNREACH),
            ("2001:db8:2::1", libc::EACCES),
            ("2001:db8:3::1", libc::ENETUNREACH),
        ] {
            let destination: IpAddr = destination.parse().unwrap();
            assert_eq!(number(TcpStream::connect((destination, 80))), expected, "{destination}");
        }
    });
}

#[test]
fn a_receive_buffer_is_capped_by_the_administrators_limit_and_not_refused() {
    let [socket, _] = udp_pair(LOOPBACKS[0]);
    set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUF, 1 << 30).unwrap();
    let limit: i32 = std::fs::read_to_string("/proc/sys/net/core/rmem_max").unwrap().trim().parse().unwrap();
    // socket(7): the kernel doubles it for its bookkeeping.
    assert_eq!(get::<1>(&socket, libc::SOL_SOCKET, libc::SO_RCVBUF).unwrap(), [2 * limit]);
}
