//! Numbered datagrams as fast as the socket takes them.
//!
//! A datagram begins with its number, from 1 on, in eight bytes (little-endian); [`LAST`] says that no more come.

use std::io::{self, IoSlice};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, MultiHeaders, sendmmsg, setsockopt, sockopt};

use crate::report;

/// The number of the datagram that ends a flood.
pub const LAST: u64 = u64::MAX;

/// Datagrams of one system call at the most.
pub const BATCH: usize = 32;

/// Payload of one `UDP_SEGMENT` send at the most: an IPv4 packet's, with a little to spare.
const SEGMENTED_MAX: usize = 65_000;

/// The last datagram is sent so often, in case it is lost.
const FAREWELLS: u32 = 5;

/// Sends for a time, and prints how many.
pub fn run(to: SocketAddr, size: usize, time: Duration, rate: Option<f64>, gso: bool) -> io::Result<()> {
    let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.connect(to)?;
    setsockopt(&socket, sockopt::SndBuf, &(4 << 20))?;
    let mut flood = Flood::new(socket, size, gso);
    // The neighbour is resolved and the forwarder's flow is opened before the clock starts.
    flood.send_one(0)?;
    sleep(Duration::from_millis(200));
    flood.cut_by_kernel(gso)?;
    let start = Instant::now();
    loop {
        let elapsed = start.elapsed();
        if elapsed >= time {
            break;
        }
        if rate.is_some_and(|rate| flood.sent as f64 > rate * elapsed.as_secs_f64()) {
            sleep(Duration::from_micros(200));
        } else if flood.send_batch().is_err() {
            flood.errors += 1;
        }
    }
    let elapsed = start.elapsed().as_secs_f64();
    report::print(
        "udp_send",
        &[
            ("size", size as f64),
            ("sent", flood.sent as f64),
            ("per_s", flood.sent as f64 / elapsed),
            ("errors", flood.errors as f64),
            ("secs", elapsed),
        ],
    );
    flood.cut_by_kernel(false)?;
    for _ in 0..FAREWELLS {
        sleep(Duration::from_millis(100));
        // Who has heard one does not listen to the others.
        let _ = flood.send_one(LAST);
    }
    Ok(())
}

struct Flood {
    socket: UdpSocket,
    size: usize,
    /// The payloads of a batch, one behind the other.
    payloads: Vec<u8>,
    gso: bool,
    sent: u64,
    errors: u64,
}

impl Flood {
    fn new(socket: UdpSocket, size: usize, gso: bool) -> Self {
        let batch = if gso { BATCH.min(SEGMENTED_MAX / size).max(1) } else { BATCH };
        Self { socket, size, payloads: vec![0; batch * size], gso, sent: 0, errors: 0 }
    }

    /// Whether the kernel cuts what is sent into datagrams.
    fn cut_by_kernel(&self, cut: bool) -> io::Result<()> {
        let size = if cut { self.size as i32 } else { 0 };
        Ok(setsockopt(&self.socket, sockopt::UdpGsoSegment, &size)?)
    }

    fn send_one(&mut self, number: u64) -> io::Result<()> {
        let payload = &mut self.payloads[..self.size];
        payload[..8].copy_from_slice(&number.to_le_bytes());
        self.socket.send(payload).map(|_| ())
    }

    fn send_batch(&mut self) -> io::Result<()> {
        for (payload, number) in self.payloads.chunks_exact_mut(self.size).zip(self.sent + 1..) {
            payload[..8].copy_from_slice(&number.to_le_bytes());
        }
        if self.gso {
            self.socket.send(&self.payloads)?;
            self.sent += (self.payloads.len() / self.size) as u64;
            return Ok(());
        }
        let slices: Vec<[IoSlice<'_>; 1]> =
            self.payloads.chunks_exact(self.size).map(|payload| [IoSlice::new(payload)]).collect();
        let connected: [Option<()>; BATCH] = [None; BATCH];
        let mut headers = MultiHeaders::preallocate(slices.len(), None);
        let fd = self.socket.as_raw_fd();
        let results = sendmmsg(fd, &mut headers, &slices, connected, [], MsgFlags::empty())?;
        self.sent += results.count() as u64;
        Ok(())
    }
}
