//! Connect, one byte there and back, close: what a short request costs.
//!
//! The server closes first, so that the state that a closed connection leaves behind (TIME-WAIT) is not the client's.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use socket2::{Domain, Protocol, Socket, Type};

use crate::latencies::Latencies;

/// What is not done by then has failed.
const PATIENCE: Duration = Duration::from_secs(2);

fn socket(to: SocketAddr) -> io::Result<Socket> {
    Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))
}

/// One connection after the other.
pub fn one_by_one(to: SocketAddr, time: Duration) -> anyhow::Result<Latencies> {
    let mut latencies = Latencies::new()?;
    let start = Instant::now();
    let mut begun = start;
    while begun - start < time {
        let exchanged = exchange(to);
        let done = Instant::now();
        match exchanged {
            Ok(()) => latencies.record(done - begun),
            Err(_) => latencies.lose(),
        }
        begun = done;
    }
    Ok(latencies.within(begun - start))
}

fn exchange(to: SocketAddr) -> io::Result<()> {
    let socket = socket(to)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    socket.connect(&to.into())?;
    let mut stream = TcpStream::from(socket);
    stream.write_all(b"C")?;
    stream.read_exact(&mut [0])?;
    match stream.read(&mut [0])? {
        0 => Ok(()),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// So many connections at a time.
pub fn many(to: SocketAddr, time: Duration, concurrent: usize) -> anyhow::Result<Latencies> {
    let mut latencies = Latencies::new()?;
    let mut under_way = UnderWay::new()?;
    let start = Instant::now();
    let mut now = start;
    loop {
        while now - start < time && under_way.count < concurrent {
            if under_way.begin(to).is_err() {
                latencies.lose();
                break;
            }
        }
        if under_way.count == 0 || now - start >= time + PATIENCE {
            break;
        }
        under_way.wait(&mut latencies)?;
        now = Instant::now();
    }
    (0..under_way.count).for_each(|_| latencies.lose());
    Ok(latencies.within(now - start))
}

struct Attempt {
    stream: TcpStream,
    begun: Instant,
    asked: bool,
}

/// Connections that are not closed yet.
struct UnderWay {
    epoll: Epoll,
    /// By descriptor.
    attempts: Vec<Option<Attempt>>,
    count: usize,
}

impl UnderWay {
    fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new(EpollCreateFlags::empty())?, attempts: Vec::new(), count: 0 })
    }

    fn begin(&mut self, to: SocketAddr) -> io::Result<()> {
        let begun = Instant::now();
        let socket = socket(to)?;
        socket.set_nonblocking(true)?;
        match socket.connect(&to.into()) {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error),
            _ => {}
        }
        let fd = socket.as_raw_fd() as usize;
        self.epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLOUT, fd as u64))?;
        if self.attempts.len() <= fd {
            self.attempts.resize_with(fd + 1, || None);
        }
        self.attempts[fd] = Some(Attempt { stream: socket.into(), begun, asked: false });
        self.count += 1;
        Ok(())
    }

    /// Waits for progress, and takes out what is over.
    fn wait(&mut self, latencies: &mut Latencies) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); 64];
        let ready = self.epoll.wait(&mut events, EpollTimeout::from(100u8))?;
        for event in &events[..ready] {
            let fd = event.data() as RawFd;
            let Some(attempt) = self.attempts.get_mut(fd as usize).and_then(Option::as_mut) else { continue };
            let over = match attempt.step(&self.epoll) {
                Ok(false) => continue,
                Ok(true) => Ok(attempt.begun.elapsed()),
                Err(error) => Err(error),
            };
            match over {
                Ok(time) => latencies.record(time),
                Err(_) => latencies.lose(),
            }
            self.attempts[fd as usize] = None;
            self.count -= 1;
        }
        Ok(())
    }
}

impl Attempt {
    /// Goes on as far as is possible now; says whether the connection is over.
    fn step(&mut self, epoll: &Epoll) -> io::Result<bool> {
        if !self.asked {
            self.stream.write_all(b"C")?;
            self.asked = true;
            let mut interest = EpollEvent::new(EpollFlags::EPOLLIN, self.stream.as_raw_fd() as u64);
            epoll.modify(&self.stream, &mut interest)?;
            return Ok(false);
        }
        match self.stream.read(&mut [0; 16]) {
            Ok(0) => Ok(true),
            Ok(_) => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }
}
