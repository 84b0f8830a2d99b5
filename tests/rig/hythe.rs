//! hythe itself: the built program, started in a host's namespace.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::cell::{Cell, Engine, User};
use super::mounts::Mounts;
use super::netns::Netns;
use super::process;
use super::site::Family;
use super::wait::{PATIENCE, wait_for, wait_until, wait_within};

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_hythe");

/// The variable by which all processes that come of one start are known.
const MARK: &str = "HYTHE_TEST";

/// The variables by which programs find a proxy, in one of the two cases in which they are read.
const PROXY_VARIABLES: [&str; 4] = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"];

/// Lines of hythe's log that a test shows when it fails.
const LAST_LINES: usize = 150;

/// What is to be mounted differently.
type Change = dyn FnOnce(&Mounts) + Send;

/// How hythe is to be started.
pub struct Start<'h> {
    host: &'h Netns,
    cell: Cell,
    options: Vec<String>,
    mounts: Option<Box<Change>>,
    variables: Vec<(&'static str, PathBuf)>,
}

/// What was started.
struct Started {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Option<BufReader<ChildStdout>>,
    log: Log,
    log_reader: Option<JoinHandle<()>>,
    mark: String,
}

/// How a start ended.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
    /// Processes that came of it and were there when hythe was not any more.
    pub left: Vec<i32>,
}

/// A running hythe and its guest, in whatever way the guest can be reached.
pub struct Hythe<Guest = Netns> {
    started: Started,
    pub guest: Guest,
    cell: Cell,
}

/// hythe's own counters.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Counters(HashMap<String, u64>);

impl Counters {
    /// A counter's value.
    pub fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// What was dropped or refused, by cause.
    pub fn drops(&self) -> Vec<(&str, u64)> {
        let drops = self.0.iter().filter_map(|(name, count)| Some((name.strip_prefix("dropped_")?, *count)));
        let mut drops: Vec<_> = drops.collect();
        drops.sort_unstable();
        drops
    }
}

/// What hythe writes to standard error, as it comes.
#[derive(Clone)]
struct Log(Arc<Mutex<String>>);

impl Log {
    fn follow(mut from: impl Read + Send + 'static) -> (Self, JoinHandle<()>) {
        let log = Self(Arc::default());
        let written = log.clone();
        let reader = std::thread::spawn(move || {
            let mut bytes = vec![0; 64 << 10];
            // A report is one write of less than PIPE_BUF bytes, and so comes whole.
            while let Ok(len @ 1..) = from.read(&mut bytes) {
                written.0.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[..len]));
            }
        });
        (log, reader)
    }

    fn text(&self) -> String {
        self.0.lock().unwrap().clone()
    }
}

impl Start<'_> {
    /// Adds options, space between them.
    pub fn options(mut self, options: &str) -> Self {
        self.options.extend(options.split_whitespace().map(str::to_string));
        self
    }

    /// Adds words as they are.
    pub fn words(mut self, words: &[&str]) -> Self {
        self.options.extend(words.iter().map(|word| (*word).to_string()));
        self
    }

    /// A variable of its environment.
    pub fn variable(mut self, name: &'static str, value: &str) -> Self {
        self.variables.push((name, value.into()));
        self
    }

    /// What hythe is to see differently; called on the thread that starts it.
    pub fn mounts(mut self, change: impl FnOnce(&Mounts) + Send + 'static) -> Self {
        self.mounts = Some(Box::new(change));
        self
    }

    /// Where hythe and what it starts put temporary files.
    pub fn temporary(mut self, directory: &Path) -> Self {
        self.variables.push(("TMPDIR", directory.to_path_buf()));
        self
    }

    /// The user's directory of sockets.
    pub fn runtime_directory(mut self, directory: &Path) -> Self {
        self.variables.push(("XDG_RUNTIME_DIR", directory.to_path_buf()));
        self
    }

    fn spawn(self, mode: &str, words: &[&str]) -> Started {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let mark = format!("{MARK}={}.{number}", std::process::id());
        let Self { host, cell, options, mounts, variables } = self;
        let child = host.run(|| {
            let own = (cell.user == User::Nobody || mounts.is_some()).then(Mounts::unshare);
            // Whoever runs the tests may ignore signals, as a shell's background does, and a shell in the guest cannot trap those.
            let mut command = Command::new("env");
            command.arg("--default-signal");
            match (&own, cell.user) {
                (Some(mounts), User::Nobody) => {
                    let program = mounts.offer_program(Path::new(PROGRAM));
                    mounts.offer_tun();
                    command
                        .args(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"])
                        .arg(program);
                }
                _ => {
                    command.arg(PROGRAM);
                }
            }
            if let (Some(own), Some(change)) = (&own, mounts) {
                change(own);
            }
            let (name, value) = mark.split_once('=').unwrap();
            command.env(name, value).env_remove("HYTHE_LOG").current_dir("/");
            // Whoever runs the tests may be behind a proxy.
            for name in PROXY_VARIABLES {
                command.env_remove(name).env_remove(name.to_lowercase());
            }
            command.envs(variables);
            command.args([mode, "--engine", cell.engine_name(), "--workers", &cell.workers.to_string()]);
            // Of the cells of many workers, half show them all taking part, whatever there is to do.
            if mode != "vm" && cell.workers >= 4 && cell.engine == Engine::IoUring {
                command.args(["--spread", "always"]);
            }
            command.args(&options).args(words);
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()
        });
        let mut child = child.unwrap_or_else(|error| panic!("{PROGRAM}: {error}"));
        let (log, log_reader) = Log::follow(child.stderr.take().unwrap());
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().map(BufReader::new);
        Started { child, stdin, stdout, log, log_reader: Some(log_reader), mark }
    }

    /// A guest that does nothing until it is told to end.
    pub fn run(self) -> Hythe {
        let cell = self.cell;
        // It tells its process, and so its namespace, and ends when the test does.
        let mut started = self.options("-v").spawn("run", &["--", "sh", "-c", "echo $$; exec cat"]);
        let pid: i32 = started.line().parse().unwrap_or_else(|_| panic!("{}", started.log.text()));
        Hythe { guest: Netns::of_process(pid), started, cell }
    }

    /// Serves a guest that somebody else makes; `words` say which.
    pub fn serve<Guest>(self, mode: &str, words: &str, guest: Guest) -> Hythe<Guest> {
        let cell = self.cell;
        let started = self.options("-v").options(words).spawn(mode, &[]);
        Hythe { started, guest, cell }
    }

    /// Joins a namespace that exists; `target` is `--netns PATH` or `--pid PID`, `guest` the namespace.
    pub fn attach(self, target: &str, guest: &Netns) -> Hythe {
        let v6_only = self.options.iter().any(|option| option == "-6");
        let hythe = self.serve("attach", target, guest.clone());
        let family = if v6_only { Family::V6 } else { Family::V4 };
        let gateway = (family.gateway(), 53).into();
        // Where it is not ready yet, there is no route.
        wait_until("hythe to serve the guest", || {
            assert!(hythe.is_running(), "{}", hythe.log());
            guest.run(|| std::net::TcpStream::connect_timeout(&gateway, super::wait::PATIENCE)).is_ok()
        });
        hythe
    }

    /// Starts `hythe run` with a command of the test's own.
    pub fn command(self, words: &[&str]) -> Running {
        let words: Vec<&str> = ["--"].iter().chain(words).copied().collect();
        Running(self.spawn("run", &words))
    }

    /// `hythe run` or `hythe attach` with words as they are, to its end.
    #[expect(clippy::wrong_self_convention, reason = "it starts something; nothing is converted")]
    pub fn to_the_end(self, mode: &str, words: &[&str]) -> Ended {
        let mut started = self.spawn(mode, words);
        started.stdin = None;
        started.end()
    }
}

impl Started {
    /// The next line of what the command prints.
    fn line(&mut self) -> String {
        let mut line = String::new();
        if let Some(stdout) = &mut self.stdout {
            stdout.read_line(&mut line).unwrap();
        }
        line.trim_end().to_string()
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// Waits for the end of hythe.
    fn end(mut self) -> Ended {
        let status = wait_for("hythe to end", || self.child.try_wait().unwrap());
        let left = process::with_environment(&self.mark);
        // Both pipes end with the last process that has them.
        wait_until("all processes to end", || process::with_environment(&self.mark).is_empty());
        let mut stdout = String::new();
        if let Some(mut from) = self.stdout.take() {
            from.read_to_string(&mut stdout).unwrap();
        }
        self.log_reader.take().map(JoinHandle::join);
        Ended { status, stdout, stderr: self.log.text(), left }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let ended = self.child.try_wait();
        if let Ok(None) = ended {
            if std::thread::panicking() {
                // Its counters are among what it said, where it is able to tell them.
                let before = self.log.text().len();
                let _ = kill(Pid::from_raw(self.pid()), Signal::SIGUSR1);
                let _ = wait_within(Duration::from_secs(2), || parse_report(&self.log.text()[before..]));
            }
            // The helper sees it and ends the command, and so does hythe's own end of everything else.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            if let Ok(Some(status)) = ended {
                eprintln!("--- hythe had ended before the test: {status}");
            }
            let log = self.log.text();
            let lines: Vec<&str> = log.lines().collect();
            let last = &lines[lines.len().saturating_sub(LAST_LINES)..];
            eprintln!("--- hythe said:\n{}\n---", last.join("\n"));
        }
    }
}

/// A `hythe run` with a command of the test's own.
pub struct Running(Started);

impl Running {
    /// The next line of what the command prints.
    pub fn line(&mut self) -> String {
        self.0.line()
    }

    pub fn pid(&self) -> i32 {
        self.0.pid()
    }

    pub fn signal(&self, signal: Signal) {
        self.0.signal(signal);
    }

    /// What hythe and the command have written to standard error.
    pub fn log(&self) -> String {
        self.0.log.text()
    }

    /// Waits for the end.
    pub fn end(self) -> Ended {
        self.0.end()
    }
}

impl Ended {
    /// What hythe said besides its log and its counters, which must be one line.
    pub fn one_line(&self) -> &str {
        let lines: Vec<&str> = self.stderr.lines().collect();
        assert_eq!(lines.len(), 1, "one line was expected:\n{}", self.stderr);
        lines[0]
    }

    /// hythe ended with a status, and nothing that came of it was left.
    pub fn assert_clean(&self, status: i32) {
        assert_eq!(self.status.code(), Some(status), "{}", self.stderr);
        assert!(self.left.is_empty(), "processes are left: {:?}", self.left);
    }
}

impl Hythe {
    /// Starts with options of this cell.
    pub fn of(host: &Netns, cell: Cell) -> Start<'_> {
        Start { host, cell, options: Vec::new(), mounts: None, variables: Vec::new() }
    }

    /// Ends the guest's command in order, and with it hythe.
    pub fn stop(mut self) -> Ended {
        self.started.stdin = None;
        let Self { started, .. } = self;
        started.end()
    }
}

impl<Guest> Hythe<Guest> {
    pub fn pid(&self) -> i32 {
        self.started.pid()
    }

    /// Whether it has not ended.
    pub fn is_running(&self) -> bool {
        process::all().any(|pid| pid == self.pid())
            && !std::fs::read_to_string(format!("/proc/{}/stat", self.pid()))
                .unwrap_or_default()
                .contains(") Z")
    }

    /// What it has written to standard error.
    pub fn log(&self) -> String {
        self.started.log.text()
    }

    pub fn signal(&self, signal: Signal) {
        self.started.signal(signal);
    }

    /// Its counters, as SIGUSR1 has it print them.
    pub fn counters(&self) -> Counters {
        let before = self.log().len();
        // A worker that has not passed yet has nothing to report.
        wait_for("a report", || {
            self.signal(Signal::SIGUSR1);
            wait_within(Duration::from_secs(2), || parse_report(&self.log()[before..]))
        })
    }

    /// Waits for its end.
    pub fn end(self) -> Ended {
        self.started.end()
    }

    /// How many workers it has.
    pub fn workers(&self) -> u8 {
        self.cell.workers
    }

    /// It really runs the engine that was asked for: each worker makes its own.
    pub fn assert_engine(&self) {
        let workers = self.cell.workers as usize;
        let count = || {
            let descriptors = process::descriptors(self.pid());
            let of = |name: &str| descriptors.iter().filter(|target| *target == name).count();
            (of("anon_inode:[io_uring]"), of("anon_inode:[eventpoll]"))
        };
        let right = wait_within(PATIENCE, || {
            let (rings, epolls) = count();
            // Other threads have an epoll of their own.
            let right = match self.cell.engine {
                Engine::IoUring => rings == workers,
                Engine::Epoll => rings == 0 && epolls > workers,
            };
            right.then_some(())
        });
        assert!(right.is_some(), "{:?} rings and epolls with {:?}", count(), self.cell);
    }
}

/// Lines `name value`; one of them is `passes`, since a worker that runs has made some.
fn parse_report(text: &str) -> Option<Counters> {
    let pairs = text.lines().filter_map(|line| {
        let (name, value) = line.split_once(' ')?;
        Some((name.to_string(), value.parse().ok()?))
    });
    let counters: HashMap<String, u64> = pairs.collect();
    counters.contains_key("passes").then_some(Counters(counters))
}
