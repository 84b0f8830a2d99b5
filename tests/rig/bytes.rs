//! Connections that carry bytes: what one side sends, the other has to get.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread::JoinHandle;

use super::pattern::Pattern;
use super::wait::PATIENCE;

/// Bytes that one call moves.
const CHUNK: usize = 256 << 10;

/// The next client of a listener.
pub fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    let (stream, peer) = listener.accept().unwrap_or_else(|error| panic!("no client came: {error}"));
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    (stream, peer)
}

/// Sends a pattern into one stream and expects it from the other one, at the same time.
pub fn transfer(from: &TcpStream, to: &TcpStream, seed: u64, len: u64) {
    let pattern = Pattern(seed);
    std::thread::scope(|scope| {
        let sender = scope.spawn(move || pattern.send(from, 0, len));
        pattern.expect(to, 0, len).unwrap_or_else(|error| panic!("the receiver failed: {error}"));
        sender.join().unwrap().unwrap_or_else(|error| panic!("the sender failed: {error}"));
    });
}

/// One read. A machine that was stopped and goes on interrupts calls that have a time limit (signal(7)).
pub fn read(mut stream: &TcpStream, bytes: &mut [u8]) -> io::Result<usize> {
    loop {
        match stream.read(bytes) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// The other side has closed its direction.
pub fn expect_end(stream: &TcpStream) {
    let len = read(stream, &mut [0; 1]).expect("the end of the stream");
    assert_eq!(len, 0, "bytes where the end was expected");
}

/// The other side has reset the connection. Bytes may come before.
pub fn expect_reset(stream: &TcpStream) {
    let mut bytes = vec![0; CHUNK];
    loop {
        match read(stream, &mut bytes) {
            Ok(0) => panic!("the stream ended in order where a reset was expected"),
            Ok(_) => {}
            Err(error) => return assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}"),
        }
    }
}

/// Closes a connection with a reset.
pub fn reset(stream: TcpStream) {
    socket2::SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO)).unwrap();
    drop(stream);
}

/// A server that gives back what it gets, until it has had its clients.
pub struct EchoServer(JoinHandle<()>);

/// Serves `clients` clients of a listener, all at the same time; each until its end.
pub fn echo(listener: TcpListener, clients: usize) -> EchoServer {
    EchoServer(std::thread::spawn(move || {
        let serve = |mut stream: TcpStream| {
            let mut bytes = vec![0; 16 << 10];
            while let Ok(len @ 1..) = read(&stream, &mut bytes) {
                if stream.write_all(&bytes[..len]).is_err() {
                    return;
                }
            }
            // The client may have reset it.
            let _ = stream.shutdown(Shutdown::Write);
        };
        let served: Vec<_> = (0..clients)
            .map(|_| {
                let (stream, _) = accept(&listener);
                std::thread::spawn(move || serve(stream))
            })
            .collect();
        for client in served {
            client.join().unwrap();
        }
    }))
}

impl EchoServer {
    /// Waits until all clients were served.
    pub fn finish(self) {
        self.0.join().unwrap();
    }
}

/// A message goes there and comes back.
pub fn expect_echo(mut stream: &TcpStream, message: &[u8]) {
    stream.write_all(message).unwrap();
    let mut answer = vec![0; message.len()];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer, message);
}
