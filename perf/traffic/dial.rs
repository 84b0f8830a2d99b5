//! Connections to whom nobody answers.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

use crate::report;
use crate::serve::raise_descriptor_limit;

/// Begins `count` connections, waits for none, prints how many are under way, and lets them try for a time.
pub fn run(count: usize, to: SocketAddr, time: Duration) -> io::Result<()> {
    raise_descriptor_limit()?;
    let start = Instant::now();
    let under_way: Vec<Socket> = (0..count).map_while(|_| begin(to).ok()).collect();
    let members = [("under_way", under_way.len() as f64), ("secs", start.elapsed().as_secs_f64())];
    report::print("dial", &members);
    std::thread::sleep(time);
    drop(under_way);
    Ok(())
}

fn begin(to: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket),
    }
}
