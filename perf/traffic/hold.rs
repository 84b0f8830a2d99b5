//! Many connections, or many flows of datagrams, that do nothing.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use crate::report;
use crate::serve::raise_descriptor_limit;

const PATIENCE: Duration = Duration::from_secs(2);

/// Connections that are opened at the same time.
const AT_A_TIME: usize = 8;

/// Opens `count` connections, proves each by one exchange, prints how many stand, and holds them.
pub fn run(count: usize, to: SocketAddr, time: Duration) -> io::Result<()> {
    raise_descriptor_limit()?;
    let start = Instant::now();
    let held: Vec<TcpStream> = std::thread::scope(|scope| {
        let share = |part| count / AT_A_TIME + usize::from(part < count % AT_A_TIME);
        let open = |part| move || (0..share(part)).map_while(|_| open(to).ok()).collect::<Vec<_>>();
        let parts: Vec<_> = (0..AT_A_TIME).map(|part| scope.spawn(open(part))).collect();
        parts.into_iter().filter_map(|part| part.join().ok()).flatten().collect()
    });
    report::print("hold", &[("open", held.len() as f64), ("secs", start.elapsed().as_secs_f64())]);
    std::thread::sleep(time);
    drop(held);
    Ok(())
}

fn open(to: SocketAddr) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"P")?;
    stream.read_exact(&mut [0])?;
    Ok(stream)
}

/// So many datagrams go out in a row, and then none for a millisecond: none is to be lost.
const BURST: usize = 32;

/// Sends one datagram from each of `sockets` to each of `addresses` addresses, the first of which is `first`; prints how
/// many that were, and holds the sockets.
pub fn datagrams(sockets: usize, first: SocketAddr, addresses: u32, time: Duration) -> io::Result<()> {
    raise_descriptor_limit()?;
    let start = Instant::now();
    let any: SocketAddr = if first.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
    let held: Vec<UdpSocket> = (0..sockets).map(|_| UdpSocket::bind(any)).collect::<io::Result<_>>()?;
    let mut sent = 0usize;
    for socket in &held {
        for number in 0..addresses {
            socket.send_to(b"x", SocketAddr::new(nth_after(first.ip(), number), first.port()))?;
            sent += 1;
            if sent.is_multiple_of(BURST) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
    report::print("flows", &[("sent", sent as f64), ("secs", start.elapsed().as_secs_f64())]);
    std::thread::sleep(time);
    drop(held);
    Ok(())
}

fn nth_after(first: IpAddr, number: u32) -> IpAddr {
    match first {
        IpAddr::V4(first) => (first.to_bits() + number).to_be_bytes().into(),
        IpAddr::V6(first) => (first.to_bits() + u128::from(number)).to_be_bytes().into(),
    }
}
