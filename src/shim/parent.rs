//! What dockerd, which has started the program, waits for.
//!
//! Descriptor 3 is the end of a pipe: `0` and a line's end say that the port is served; `1`, a line's end and a text that it is not, and
//! why. The user of `docker run` reads that text. A program that ends without a word leaves the user without a reason, so
//! everything that goes wrong is said here. Descriptor 4 is, with Engine 28, a socket that listens in the guest already.
//!
//! Both are the real docker-proxy's, which inherits them and says `0` itself; this program lets go of them once it runs.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const ANSWER: RawFd = 3;
const LISTENER: RawFd = 4;

/// A reason has at most so many characters: it is read by people, and may come from elsewhere.
const REASON_MAX: usize = 2048;

/// Who waits for an answer.
pub struct Parent {
    pipe: Option<File>,
    /// There is a pipe, and nobody reads from it.
    deaf: bool,
    inherited: Vec<RawFd>,
}

impl Parent {
    /// The one that started this process. To be called before anything else is opened, which would be taken for its pipe.
    pub fn inherited() -> Self {
        let kind = |fd| Some(std::fs::metadata(path_of(fd)).ok()?.file_type());
        let has_pipe = kind(ANSWER).is_some_and(|kind| kind.is_fifo());
        let has_listener = has_pipe && kind(LISTENER).is_some_and(|kind| kind.is_socket());
        // A second way to the same pipe, which children do not inherit. Where nobody reads any more there is none.
        let open = || OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path_of(ANSWER));
        let pipe = has_pipe.then(open).and_then(Result::ok);
        Self {
            deaf: has_pipe && pipe.is_none(),
            pipe,
            inherited: [(has_pipe, ANSWER), (has_listener, LISTENER)]
                .into_iter()
                .filter_map(|(has, fd)| has.then_some(fd))
                .collect(),
        }
    }

    /// Whether it waits no more.
    pub fn has_gone(&self) -> bool {
        let Some(pipe) = &self.pipe else { return self.deaf };
        let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::POLLOUT)];
        let polled = poll(&mut fds, PollTimeout::ZERO);
        polled.is_ok() && fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR))
    }

    /// Says that the port is not served, and why.
    pub fn refuse(&mut self, reason: &str) {
        let reason: String = reason.chars().take(REASON_MAX).map(plain).collect();
        log(&reason);
        if let Some(mut pipe) = self.pipe.take() {
            // Whoever does not read any more does not want to know.
            let _ = pipe.write_all(format!("1\n{reason}").as_bytes());
        }
        self.let_go();
    }

    /// Leaves the answer to the real docker-proxy, which has its own copies: the pipe ends when that one ends.
    pub fn let_go(&mut self) {
        self.pipe = None;
        for fd in self.inherited.drain(..) {
            let _ = nix::unistd::close(fd);
        }
    }
}

fn path_of(fd: RawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{fd}"))
}

/// A terminal is not spoken to.
fn plain(character: char) -> char {
    if character.is_control() { ' ' } else { character }
}

/// A line for whoever looks. dockerd throws it away, unless a wrapper leads it elsewhere.
pub fn log(line: &str) {
    let line: String = line.chars().take(REASON_MAX).map(plain).collect();
    let _ = io::stderr().write_all(format!("hythe-docker-proxy: {line}\n").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn pair() -> (io::PipeReader, Parent) {
        let (reader, writer) = io::pipe().unwrap();
        let writer: std::os::fd::OwnedFd = writer.into();
        (reader, Parent { pipe: Some(writer.into()), deaf: false, inherited: Vec::new() })
    }

    #[test]
    fn one_that_waits_no_more_is_noticed() {
        let (reader, parent) = pair();
        assert!(!parent.has_gone());
        drop(reader);
        assert!(parent.has_gone());
    }

    #[test]
    fn a_reason_is_told_once_and_then_the_pipe_ends() {
        let (mut reader, mut parent) = pair();
        parent.refuse("Bind for 0.0.0.0:8000 failed: port is already allocated");
        parent.refuse("again");
        let mut said = String::new();
        reader.read_to_string(&mut said).unwrap();
        assert_eq!(said, "1\nBind for 0.0.0.0:8000 failed: port is already allocated");
    }

    #[test]
    fn a_reason_is_one_line_of_bounded_length() {
        let (mut reader, mut parent) = pair();
        parent.refuse(&"a\n\u{1b}[2J".repeat(1 << 16));
        let mut said = String::new();
        reader.read_to_string(&mut said).unwrap();
        assert!(said.starts_with("1\na  [2Ja ") && said.len() < 4096);
        assert!(!said[2..].contains(char::is_control));
    }

    #[test]
    fn who_does_not_read_is_no_reason_to_fail() {
        let (reader, mut parent) = pair();
        drop(reader);
        parent.refuse("nobody hears this");
    }

    #[test]
    fn letting_go_ends_the_pipe_without_a_word() {
        let (mut reader, mut parent) = pair();
        parent.let_go();
        let mut said = String::new();
        reader.read_to_string(&mut said).unwrap();
        assert_eq!(said, "");
    }
}
