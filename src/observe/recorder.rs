//! The thread that writes captures.
//!
//! A file, and more so a pipe, may keep its writer waiting. So it has a thread of its own, which nobody waits for: workers
//! mail it copies and count those that do not fit.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::capture::Capture;
use crate::exchange::mail::ToRecorder;
use crate::exchange::{Mailbox, Waker};

/// Frames that wait to be written.
const MAILBOX: usize = 1024;
/// How long the end of the process waits for a file that takes nothing more.
const PATIENCE: Duration = Duration::from_secs(1);

/// The system calls made here.
pub const SYSTEM_CALLS: &[libc::c_long] = &[libc::SYS_poll];

/// A capture that is being written.
pub struct Recorder {
    mail: Mailbox<ToRecorder>,
    thread: JoinHandle<()>,
}

impl Recorder {
    /// Begins to write; `limit` takes rights from the thread.
    pub fn start(file: File, limit: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<Self> {
        let waker = Arc::new(Waker::new()?);
        let mail = Mailbox::new(MAILBOX, waker.clone());
        let received = mail.clone();
        let record = move || {
            let recorded = limit().and_then(|()| record(&received, &waker, Capture::new(file)?));
            if let Err(error) = recorded {
                tracing::warn!(%error, "the capture ends here: its file cannot be written");
            }
        };
        let thread = std::thread::Builder::new().name("recorder".into()).spawn(record)?;
        Ok(Self { mail, thread })
    }

    /// Where frames are mailed to.
    pub fn mail(&self) -> Mailbox<ToRecorder> {
        self.mail.clone()
    }

    /// Has what was mailed so far written, unless the file takes too long.
    pub fn finish(self) {
        let end = Instant::now() + PATIENCE;
        let mut told = false;
        while !self.thread.is_finished() && Instant::now() < end {
            told = told || self.mail.put(ToRecorder::End).is_ok();
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn record(mail: &Mailbox<ToRecorder>, waker: &Waker, mut capture: Capture<File>) -> io::Result<()> {
    loop {
        waker.announce_sleep();
        if mail.is_empty() {
            let mut descriptors = [PollFd::new(waker.as_fd(), PollFlags::POLLIN)];
            match poll(&mut descriptors, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        waker.awake();
        waker.clear();
        while let Some(mail) = mail.take() {
            match mail {
                ToRecorder::Frame { time_ns, outbound, bytes } => capture.frame(time_ns, outbound, &bytes)?,
                ToRecorder::End => return Ok(()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::OwnedFd;

    fn frame() -> ToRecorder {
        ToRecorder::Frame { time_ns: 1, outbound: true, bytes: vec![7; 60_000] }
    }

    #[test]
    fn what_was_mailed_is_written_before_the_end() {
        let (mut reading, writing) = io::pipe().unwrap();
        let recorder = Recorder::start(File::from(OwnedFd::from(writing)), || Ok(())).unwrap();
        let mail = recorder.mail();
        for _ in 0..20 {
            assert!(mail.put(frame()).is_ok());
        }
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            reading.read_to_end(&mut all).map(|_| all.len())
        });
        recorder.finish();
        assert!(reader.join().unwrap().unwrap() > 20 * 60_000);
    }

    #[test]
    fn a_pipe_that_nobody_reads_holds_nobody_up() {
        let (reading, writing) = io::pipe().unwrap();
        let recorder = Recorder::start(File::from(OwnedFd::from(writing)), || Ok(())).unwrap();
        let mail = recorder.mail();
        while mail.put(frame()).is_ok() {}
        recorder.finish();
        drop(reading);
    }
}
