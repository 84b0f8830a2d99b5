//! Many connections that do nothing.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::report;
use crate::serve::raise_descriptor_limit;

const PATIENCE: Duration = Duration::from_secs(2);

/// Opens `count` connections, proves each by one exchange, prints how many stand, and holds them.
pub fn run(count: usize, to: SocketAddr, time: Duration) -> io::Result<()> {
    raise_descriptor_limit()?;
    let start = Instant::now();
    let held: Vec<TcpStream> = (0..count).map_while(|_| open(to).ok()).collect();
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
