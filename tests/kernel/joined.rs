//! Splice: a stream moved between two sockets without passing through user space.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};

use nix::fcntl::OFlag;
use nix::unistd::pipe2;

use crate::calls::{LOOPBACKS, await_queue, in_new_namespace, number, splice, tcp_pair, when_ready};

#[test]
fn a_stream_passes_from_socket_to_socket_through_a_pipe() {
    for address in LOOPBACKS {
        let ((mut near, source), (sink, mut far)) = (tcp_pair(address), tcp_pair(address));
        source.set_nonblocking(true).unwrap();
        let (reading, writing) = pipe2(OFlag::O_NONBLOCK).unwrap();
        assert_eq!(number(splice(&source, &writing, 1 << 20)), libc::EAGAIN, "nothing there is not the end");
        near.write_all(b"abcdef").unwrap();
        await_queue(&source, 6);
        assert_eq!(splice(&source, &writing, 1 << 20).unwrap(), 6);
        assert_eq!(splice(&reading, &sink, 6).unwrap(), 6);
        let mut bytes = [0; 6];
        far.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"abcdef");
        near.shutdown(Shutdown::Write).unwrap();
        assert_eq!(when_ready(|| splice(&source, &writing, 1 << 20)).unwrap(), 0, "the end");
    }
}

#[test]
fn a_sink_that_nobody_reads_takes_no_more_and_the_pipe_keeps_the_rest() {
    let ((near, source), (sink, _far)) = (tcp_pair(LOOPBACKS[0]), tcp_pair(LOOPBACKS[0]));
    near.set_nonblocking(true).unwrap();
    source.set_nonblocking(true).unwrap();
    sink.set_nonblocking(true).unwrap();
    let (reading, writing) = pipe2(OFlag::O_NONBLOCK).unwrap();
    let block = vec![1; 64 << 10];
    let (mut filled, mut moved) = (0, 0);
    loop {
        let _ = (&near).write(&block);
        filled += splice(&source, &writing, 1 << 20).unwrap_or(0);
        match splice(&reading, &sink, filled) {
            Ok(len) => {
                filled -= len;
                moved += len;
            }
            Err(error) if filled > 0 => {
                assert_eq!(error.raw_os_error(), Some(libc::EAGAIN));
                break;
            }
            Err(_) => {}
        }
        assert!(moved < 64 << 20);
    }
}

#[test]
fn the_sockets_may_be_of_two_namespaces() {
    let ((mut near, source), (sink, mut far)): ((TcpStream, TcpStream), (TcpStream, TcpStream)) =
        (tcp_pair(LOOPBACKS[0]), in_new_namespace(|| tcp_pair(LOOPBACKS[0])));
    let (reading, writing) = pipe2(OFlag::empty()).unwrap();
    near.write_all(b"abcdef").unwrap();
    await_queue(&source, 6);
    assert_eq!(splice(&source, &writing, 1 << 20).unwrap(), 6);
    assert_eq!(splice(&reading, &sink, 6).unwrap(), 6);
    let mut bytes = [0; 6];
    far.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"abcdef");
}

#[test]
fn a_socket_belongs_to_the_namespace_in_which_it_was_opened() {
    let listener = in_new_namespace(|| TcpListener::bind("127.0.0.1:0").unwrap());
    let name = listener.local_addr().unwrap();
    // Unless this test's own namespace happens to listen there too, which nobody does: the port was chosen just now.
    assert!(TcpStream::connect(name).is_err(), "the listener is not of this namespace");
    let socket = in_new_namespace(|| {
        socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap()
    });
    let loopback_only = socket.connect(&std::net::SocketAddr::from(([198, 51, 100, 1], 9)).into());
    assert_eq!(number(loopback_only), libc::ENETUNREACH, "its namespace has no route");
}
