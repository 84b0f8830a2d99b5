//! A program that runs beside a test, in a namespace.

use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;

use super::netns::Netns;
use super::wait::wait_for;

/// A running program; ends when dropped.
pub struct Program {
    child: Child,
    /// What it says, on either output.
    said: Vec<JoinHandle<String>>,
    name: String,
}

impl Program {
    pub fn start(netns: &Netns, words: &[&str]) -> Self {
        let started = netns.run(|| {
            let mut command = Command::new(words[0]);
            command
                .args(&words[1..])
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
        });
        let mut child =
            started.unwrap_or_else(|error| panic!("{}: {error} (tests/setup installs it)", words[0]));
        let follow = |mut from: Box<dyn Read + Send>| {
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                let _ = from.read_to_end(&mut bytes);
                String::from_utf8_lossy(&bytes).into_owned()
            })
        };
        let outputs: [Box<dyn Read + Send>; 2] =
            [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        Self { child, said: outputs.map(follow).into_iter().collect(), name: words.join(" ") }
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Waits for its end.
    pub fn end(mut self) -> (ExitStatus, String) {
        let what = format!("{} to end", self.name);
        let status = wait_for(&what, || self.child.try_wait().unwrap());
        (status, self.said.drain(..).map(|said| said.join().unwrap()).collect())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let ended = self.child.try_wait();
        if let Ok(None) = ended {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let said: String = self.said.drain(..).map(|said| said.join().unwrap()).collect();
        if std::thread::panicking() {
            if let Ok(Some(status)) = ended {
                eprintln!("--- {} had ended before the test: {status}", self.name);
            }
            eprintln!("--- {} said:\n{said}---", self.name);
        }
    }
}
