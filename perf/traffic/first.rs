//! The first answer that a guest gets.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::report;

/// What has no answer by then has none.
const PATIENCE: Duration = Duration::from_secs(5);

/// Connects; prints when the answer came, whatever it was, by the machine's monotonic clock.
pub fn run(to: SocketAddr) -> anyhow::Result<()> {
    match TcpStream::connect_timeout(&to, PATIENCE) {
        Err(error) if error.kind() != io::ErrorKind::ConnectionRefused => return Err(error.into()),
        _ => {}
    }
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    report::print("first", &[("at_us", now.tv_sec() as f64 * 1e6 + now.tv_nsec() as f64 / 1e3)]);
    Ok(())
}
