//! One byte there and back, one exchange at a time.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use crate::latencies::Latencies;

/// Exchanges that are not counted: neighbours are resolved and caches are filled in them.
const WARM_UP: u32 = 20;

/// A byte that is not back by then is lost.
const PATIENCE: Duration = Duration::from_secs(1);

/// Over one connection. A byte that does not come back ends the measurement with an error: TCP loses nothing.
pub fn tcp(to: SocketAddr, time: Duration) -> anyhow::Result<Latencies> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let exchange = || {
        stream.write_all(b"P")?;
        stream.read_exact(&mut [0])?;
        Ok(true)
    };
    measure(time, exchange)
}

/// Over one pair of ports.
pub fn udp(to: SocketAddr, time: Duration) -> anyhow::Result<Latencies> {
    let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut number = 0u8;
    let exchange = || {
        number = number.wrapping_add(1);
        socket.send(&[number])?;
        let mut answer = [0];
        loop {
            match socket.recv(&mut answer) {
                Ok(_) if answer == [number] => return Ok(true),
                // An answer that was given up, come late.
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
    };
    measure(time, exchange)
}

/// Repeats an exchange; it returns whether the answer came.
fn measure(time: Duration, mut exchange: impl FnMut() -> io::Result<bool>) -> anyhow::Result<Latencies> {
    for _ in 0..WARM_UP {
        exchange()?;
    }
    let mut latencies = Latencies::new()?;
    let start = Instant::now();
    let mut begun = start;
    while begun - start < time {
        let answered = exchange()?;
        let done = Instant::now();
        if answered {
            latencies.record(done - begun);
        } else {
            latencies.lose();
        }
        begun = done;
    }
    Ok(latencies.within(begun - start))
}
