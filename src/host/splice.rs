//! Moving a stream from one socket to another inside the kernel: `splice` through a pipe.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// The system calls made here.
pub const SYSTEM_CALLS: &[libc::c_long] =
    &[libc::SYS_splice, libc::SYS_pipe2, libc::SYS_fcntl, libc::SYS_shutdown];

/// Bytes that a pipe holds, if the user's share of pipe memory allows (`fs.pipe-user-pages-soft`).
const PIPE_BYTES: usize = 512 << 10;

/// Most bytes that one pump moves before others get their turn.
const PUMP_BYTES: usize = 2 << 20;

/// One direction of a joined pair of sockets.
pub struct Conduit {
    reading: OwnedFd,
    writing: OwnedFd,
    /// Bytes in the pipe.
    filled: usize,
    /// The source may have bytes, or its end, to give.
    pub source_ready: bool,
    /// The sink may have room.
    pub sink_ready: bool,
    source_ended: bool,
    done: bool,
}

/// What a pump came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pumped {
    /// Bytes that the sink took.
    pub bytes: usize,
    /// Whether more can be moved at once; if not, a socket says when.
    pub more: bool,
}

impl Conduit {
    /// An empty conduit.
    pub fn new() -> io::Result<Self> {
        let mut ends = [0; 2];
        // SAFETY: room for two descriptors.
        if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_NONBLOCK | libc::O_CLOEXEC) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptors are new and nobody else's.
        let [reading, writing] = ends.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
        // A smaller pipe works too.
        // SAFETY: no memory is passed.
        let _ = unsafe { libc::fcntl(writing.as_raw_fd(), libc::F_SETPIPE_SZ, PIPE_BYTES as i32) };
        Ok(Self {
            reading,
            writing,
            filled: 0,
            source_ready: true,
            sink_ready: true,
            source_ended: false,
            done: false,
        })
    }

    /// Whether the source's end has been passed on.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// The conduit for another pair of sockets, if nothing is left in it.
    pub fn renewed(self) -> Option<Self> {
        (self.filled == 0).then_some(Self {
            source_ready: true,
            sink_ready: true,
            source_ended: false,
            done: false,
            ..self
        })
    }

    /// Moves what can be moved; passes the end of the stream on behind the last byte.
    pub fn pump(&mut self, source: RawFd, sink: RawFd) -> io::Result<Pumped> {
        let mut bytes = 0;
        while bytes < PUMP_BYTES {
            let mut progress = false;
            if self.source_ready && !self.source_ended {
                match splice(source, self.writing.as_raw_fd(), PIPE_BYTES)? {
                    Some(0) => self.source_ended = true,
                    Some(len) => {
                        self.filled += len;
                        progress = true;
                    }
                    // An empty pipe has room, so it is the socket that has nothing.
                    None if self.filled == 0 => self.source_ready = false,
                    None => {}
                }
            }
            if self.sink_ready && self.filled > 0 {
                match splice(self.reading.as_raw_fd(), sink, self.filled)? {
                    Some(len) => {
                        self.filled -= len.min(self.filled);
                        bytes += len;
                        progress = true;
                    }
                    None => self.sink_ready = false,
                }
            }
            if self.source_ended && self.filled == 0 && !self.done {
                // SAFETY: no memory is passed. A sink that is gone needs no end.
                let _ = unsafe { libc::shutdown(sink, libc::SHUT_WR) };
                self.done = true;
            }
            if !progress {
                return Ok(Pumped { bytes, more: false });
            }
        }
        Ok(Pumped { bytes, more: true })
    }
}

/// Moves up to `len` bytes; `None` when nothing can be moved now.
fn splice(from: RawFd, to: RawFd, len: usize) -> io::Result<Option<usize>> {
    let flags = libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK;
    // SAFETY: the offsets are null, as they must be for pipes and sockets; no other memory is passed.
    let moved = unsafe { libc::splice(from, std::ptr::null_mut(), to, std::ptr::null_mut(), len, flags) };
    if moved >= 0 {
        return Ok(Some(moved as usize));
    }
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::WouldBlock { Ok(None) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, listener.accept().unwrap().0)
    }

    #[test]
    fn bytes_and_their_end_pass_through() {
        let ((mut near, source), (sink, mut far)) = (pair(), pair());
        source.set_nonblocking(true).unwrap();
        sink.set_nonblocking(true).unwrap();
        let bytes: Vec<u8> = (0..5_000_000u32).map(|n| (n ^ (n >> 8)) as u8).collect();
        let sent = bytes.clone();
        let writer = std::thread::spawn(move || {
            near.write_all(&sent).unwrap();
            near.shutdown(Shutdown::Write).unwrap();
            near
        });
        let reader = std::thread::spawn(move || {
            let mut received = Vec::new();
            far.read_to_end(&mut received).unwrap();
            received
        });
        let mut conduit = Conduit::new().unwrap();
        while !conduit.is_done() {
            conduit.source_ready = true;
            conduit.sink_ready = true;
            conduit.pump(source.as_raw_fd(), sink.as_raw_fd()).unwrap();
        }
        assert!(reader.join().unwrap() == bytes);
        drop(writer.join().unwrap());
        assert!(conduit.renewed().is_some_and(|conduit| !conduit.is_done()));
    }
}
