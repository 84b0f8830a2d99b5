//! Counts the datagrams of a flood: how many came, which twice, which out of order.

use std::io::{self, IoSliceMut};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, MultiHeaders, recvmmsg, setsockopt, sockopt};
use socket2::{Socket, Type};

use crate::flood::{BATCH, LAST};
use crate::report;
use crate::serve::bound;

const LONGEST: usize = 65_536;

/// No flood sends so many.
const NUMBER_MAX: u64 = 1 << 32;

/// What came so far.
#[derive(Default)]
struct Tally {
    got: u64,
    bytes: u64,
    duplicates: u64,
    /// Not a flood's, or damaged.
    strange: u64,
    /// Came behind one with a higher number.
    reordered: u64,
    highest: u64,
    latest: u64,
    /// One bit a number.
    seen: Vec<u64>,
    first: Option<Instant>,
    last: Option<Instant>,
}

/// Counts until the last datagram of a flood comes, or the time is up, and prints the count.
pub fn run(port: u16, time: Duration) -> io::Result<()> {
    let socket = bound(port, Type::DGRAM)?;
    let room: usize = 8 << 20;
    if setsockopt(&socket, sockopt::RcvBufForce, &room).is_err() {
        setsockopt(&socket, sockopt::RcvBuf, &room)?;
    }
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    println!("ready");
    let mut memory = vec![0; BATCH * LONGEST];
    let mut tally = Tally::default();
    let start = Instant::now();
    while start.elapsed() < time {
        let received = receive(&socket, &mut memory)?;
        let now = Instant::now();
        let mut payloads = received.iter().zip(memory.chunks_exact(LONGEST));
        if !payloads.all(|(len, bytes)| tally.take(&bytes[..*len], now)) {
            break;
        }
    }
    tally.print();
    Ok(())
}

/// Waits for datagrams; returns their lengths. The first comes to the start of `memory`, the others `LONGEST` apart.
fn receive(socket: &Socket, memory: &mut [u8]) -> io::Result<Vec<usize>> {
    let mut slices: Vec<[IoSliceMut<'_>; 1]> =
        memory.chunks_exact_mut(LONGEST).map(|room| [IoSliceMut::new(room)]).collect();
    let mut headers = MultiHeaders::<()>::preallocate(slices.len(), None);
    let fd = socket.as_raw_fd();
    match recvmmsg(fd, &mut headers, &mut slices, MsgFlags::MSG_WAITFORONE, None) {
        Ok(results) => Ok(results.map(|result| result.bytes).collect()),
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}

impl Tally {
    /// Takes a datagram in; says whether more may come.
    fn take(&mut self, payload: &[u8], now: Instant) -> bool {
        let number = payload.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        match number {
            LAST => return false,
            // Sent before the clock started.
            0 => return true,
            NUMBER_MAX.. => {
                self.strange += 1;
                return true;
            }
            _ => {}
        }
        let (word, bit) = ((number / 64) as usize, 1 << (number % 64));
        if self.seen.len() <= word {
            self.seen.resize(word + 1, 0);
        }
        if self.seen[word] & bit != 0 {
            self.duplicates += 1;
            return true;
        }
        self.seen[word] |= bit;
        self.got += 1;
        self.bytes += payload.len() as u64;
        self.reordered += u64::from(number < self.latest);
        self.latest = number;
        self.highest = self.highest.max(number);
        self.first.get_or_insert(now);
        self.last = Some(now);
        true
    }

    fn print(&self) {
        let seconds = match (self.first, self.last) {
            (Some(first), Some(last)) => (last - first).as_secs_f64(),
            _ => 0.0,
        };
        report::print(
            "udp_sink",
            &[
                ("got", self.got as f64),
                ("bytes", self.bytes as f64),
                ("highest", self.highest as f64),
                ("duplicates", self.duplicates as f64),
                ("strange", self.strange as f64),
                ("reordered", self.reordered as f64),
                ("secs", seconds),
            ],
        );
    }
}
