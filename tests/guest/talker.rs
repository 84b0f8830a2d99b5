//! The guest's end of the tests' conversations: the one program beside busybox in its image.
//!
//! ```text
//! talker send ADDRESS:PORT SEED BYTES      connects, sends a pattern, and waits for the other side's end
//! talker receive ADDRESS:PORT SEED BYTES   connects, and expects a pattern and the end
//! talker ask ADDRESS:PORT BYTES...         sends datagrams of so many bytes, and expects each back
//! talker serve PORT                        says `ready`; gives back what comes, over TCP and UDP, both families
//! talker lose ADDRESS:PORT                 connects and says `ready`; at a line of input sends something, and says `reset`
//!                                          once the connection is
//! talker queues INTERFACE PAIRS            has an interface use so many pairs of queues
//! ```
//! It ends with status 0 when everything went as it should. tests/guest/build compiles it alone: the standard library has to do.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

#[path = "../rig/pattern.rs"]
mod pattern;

#[path = "channels.rs"]
mod channels;

use pattern::Pattern;

/// How long a peer may be silent.
const PATIENCE: Duration = Duration::from_mins(1);

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["send", to, seed, bytes] => send(to, Pattern(number(seed)), number(bytes)),
        ["receive", from, seed, bytes] => receive(from, Pattern(number(seed)), number(bytes)),
        ["ask", to, ref sizes @ ..] => ask(to, sizes),
        ["lose", to] => lose(to),
        ["serve", port] => serve(number(port) as u16),
        ["queues", interface, pairs] => {
            channels::set(interface, number(pairs) as u32).expect("the driver to use so many queues");
        }
        _ => panic!("talker does not know {words:?}"),
    }
}

fn number(word: &str) -> u64 {
    word.parse().unwrap_or_else(|_| panic!("{word} is no number"))
}

fn connect(to: &str) -> TcpStream {
    let stream = TcpStream::connect(to).unwrap_or_else(|error| panic!("connect to {to}: {error}"));
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn expect_end(mut stream: &TcpStream) {
    let len = stream.read(&mut [0]).expect("the end of the stream");
    assert_eq!(len, 0, "bytes where the end was expected");
}

fn send(to: &str, pattern: Pattern, bytes: u64) {
    let stream = connect(to);
    pattern.send(&stream, 0, bytes).expect("the other side takes all");
    stream.shutdown(Shutdown::Write).unwrap();
    expect_end(&stream);
}

fn lose(to: &str) {
    let mut stream = connect(to);
    println!("ready");
    io::stdin().read_line(&mut String::new()).unwrap();
    let error = stream.write_all(b"still there?").and_then(|()| stream.read(&mut [0])).expect_err("a reset");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
    println!("reset");
}

fn receive(from: &str, pattern: Pattern, bytes: u64) {
    let stream = connect(from);
    pattern.expect(&stream, 0, bytes).expect("the other side sends all");
    expect_end(&stream);
}

fn ask(to: &str, sizes: &[&str]) {
    let any = if to.starts_with('[') { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind::<(std::net::IpAddr, u16)>((any, 0)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.connect(to).unwrap_or_else(|error| panic!("{to}: {error}"));
    for size in sizes {
        let question = Pattern(number(size)).bytes(number(size) as usize);
        socket.send(&question).unwrap_or_else(|error| panic!("{size} bytes to {to}: {error}"));
        let mut answer = vec![0; 70_000];
        let len =
            socket.recv(&mut answer).unwrap_or_else(|error| panic!("{size} bytes do not return: {error}"));
        assert!(answer[..len] == question, "{len} bytes return of {size}, or others");
    }
}

fn serve(port: u16) {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).unwrap();
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).unwrap();
    println!("ready");
    std::thread::spawn(move || {
        let mut bytes = vec![0; 70_000];
        loop {
            // An answer that nobody took any more is told by an error of the next call.
            let Ok((len, from)) = socket.recv_from(&mut bytes) else { continue };
            let _ = socket.send_to(&bytes[..len], from);
        }
    });
    for stream in listener.incoming() {
        let stream = stream.unwrap();
        std::thread::spawn(move || give_back(&stream));
    }
}

/// Ends when the client does, in whatever way.
fn give_back(mut stream: &TcpStream) -> io::Result<()> {
    let mut bytes = vec![0; 256 << 10];
    loop {
        let len = stream.read(&mut bytes)?;
        if len == 0 {
            return stream.shutdown(Shutdown::Write);
        }
        stream.write_all(&bytes[..len])?;
    }
}
