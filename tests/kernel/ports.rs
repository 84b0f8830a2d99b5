//! Who may have a port: published ones that refuse, and one source port for several destinations.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;

use socket2::{Domain, Socket, Type};

use crate::calls::{LOOPBACKS, await_events, await_queue, number, receive};

fn stream_socket(name: SocketAddr) -> Socket {
    Socket::new(Domain::for_address(name), Type::STREAM, None).unwrap()
}

/// Sockets of one port, all with `SO_REUSEPORT`.
fn group(address: std::net::IpAddr, count: usize) -> (Vec<Socket>, SocketAddr) {
    let mut name = SocketAddr::new(address, 0);
    let mut sockets = Vec::new();
    for _ in 0..count {
        let socket = stream_socket(name);
        socket.set_reuse_port(true).unwrap();
        socket.bind(&name.into()).unwrap();
        name = socket.local_addr().unwrap().as_socket().unwrap();
        sockets.push(socket);
    }
    (sockets, name)
}

fn stop_listening(socket: &Socket) {
    nix::sys::socket::shutdown(socket.as_raw_fd(), nix::sys::socket::Shutdown::Read).unwrap();
}

#[test]
fn a_bound_socket_that_does_not_listen_keeps_a_port_and_refuses() {
    for address in LOOPBACKS {
        let (_sockets, name) = group(address, 2);
        assert_eq!(TcpStream::connect(name).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert_eq!(TcpListener::bind(name).unwrap_err().kind(), ErrorKind::AddrInUse);
    }
}

#[test]
fn a_listener_may_stop_and_start_and_keeps_its_port_all_the_while() {
    for address in LOOPBACKS {
        let (sockets, name) = group(address, 3);
        for _ in 0..3 {
            for socket in &sockets {
                socket.listen(16).unwrap();
            }
            let client = TcpStream::connect(name).unwrap();
            sockets.iter().for_each(stop_listening);
            // The client had not been accepted yet.
            await_events(&client, libc::POLLIN);
            assert_eq!(number(receive(&client, 1, 0)), libc::ECONNRESET);
            assert_eq!(TcpStream::connect(name).unwrap_err().kind(), ErrorKind::ConnectionRefused);
            assert_eq!(TcpListener::bind(name).unwrap_err().kind(), ErrorKind::AddrInUse);
        }
    }
}

#[test]
fn clients_that_were_accepted_do_not_care_whether_the_listener_listens() {
    for address in LOOPBACKS {
        let (sockets, name) = group(address, 1);
        sockets[0].listen(16).unwrap();
        let client = TcpStream::connect(name).unwrap();
        let (accepted, _) = sockets[0].accept().unwrap();
        stop_listening(&sockets[0]);
        accepted.send(b"still here").unwrap();
        await_queue(&client, 10);
        assert_eq!(receive(&client, 20, 0).unwrap(), b"still here");
    }
}

#[test]
fn the_kernel_spreads_clients_over_listeners_of_one_port() {
    for address in LOOPBACKS {
        let (sockets, name) = group(address, 2);
        for socket in &sockets {
            socket.listen(256).unwrap();
            socket.set_nonblocking(true).unwrap();
        }
        // Each client goes to either with the same chance: for one to get none, 100 coins must fall alike.
        let _clients: Vec<_> = (0..100).map(|_| TcpStream::connect(name).unwrap()).collect();
        let waiting = |socket: &Socket| std::iter::from_fn(|| socket.accept().ok()).count();
        let served: Vec<usize> = sockets.iter().map(waiting).collect();
        assert!(served.iter().all(|count| *count > 0), "{served:?}");
        assert_eq!(served.iter().sum::<usize>(), 100);
    }
}

#[test]
fn two_connections_may_leave_from_one_port_to_two_destinations() {
    // RFC 5382, REQ-1.
    for address in LOOPBACKS {
        let listeners = [(); 2].map(|()| TcpListener::bind((address, 0)).unwrap());
        let mut port = 0;
        let leaving: Vec<Socket> = listeners
            .iter()
            .map(|listener| {
                let socket = stream_socket(SocketAddr::new(address, 0));
                socket.set_reuse_address(true).unwrap();
                socket.bind(&SocketAddr::new(address, port).into()).unwrap();
                socket.connect(&listener.local_addr().unwrap().into()).unwrap();
                port = socket.local_addr().unwrap().as_socket().unwrap().port();
                socket
            })
            .collect();
        for (listener, socket) in listeners.iter().zip(&leaving) {
            let (_, peer) = listener.accept().unwrap();
            assert_eq!(Some(peer), socket.local_addr().unwrap().as_socket());
            assert_eq!(peer.port(), port);
        }
        // To the same destination once more it is refused.
        let again = stream_socket(SocketAddr::new(address, 0));
        again.set_reuse_address(true).unwrap();
        again.bind(&SocketAddr::new(address, port).into()).unwrap();
        let twice = again.connect(&listeners[0].local_addr().unwrap().into());
        assert_eq!(number(twice), libc::EADDRNOTAVAIL);
    }
}

#[test]
fn what_a_listener_accepts_inherits_its_options() {
    for address in LOOPBACKS {
        let listener = TcpListener::bind((address, 0)).unwrap();
        let options = [
            (libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
            (libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, 256 << 10),
            (libc::SOL_SOCKET, libc::SO_OOBINLINE, 1),
        ];
        for (level, name, value) in options {
            crate::calls::set(&listener, level, name, value).unwrap();
        }
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        for (level, name, value) in options {
            assert_eq!(crate::calls::get::<1>(&accepted, level, name).unwrap(), [value]);
        }
    }
}

#[test]
fn an_accepted_socket_is_told_which_address_was_called() {
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let _client = TcpStream::connect(("127.0.0.77", port)).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    assert_eq!(accepted.local_addr().unwrap(), SocketAddr::from(([127, 0, 0, 77], port)));
}
