//! A virtual machine whose guest executes commands that come over its serial line (tests/guest/init).

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::rig::directory::Directory;
use crate::rig::wait::PATIENCE;

/// Memory of a guest, in MiB.
const MEMORY_MIB: u32 = 256;

/// How long a command may take: longer than anything in the guest waits, so that it can still say for what.
const COMMAND_TIME: Duration = Duration::from_secs(90);

/// Lines of each of a machine's logs that a test shows when it fails.
const LAST_LINES: usize = 30;

/// What runs a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Machine {
    /// A kernel that is a process of the host: as fast as the host, on one processor.
    UserModeLinux,
    /// A processor in software. Waits for the link when it starts, and connects again when the link is lost.
    Qemu,
    /// The same, but it listens at the socket itself.
    QemuThatListens,
    /// The same as the first, with two processors and a pair of queues for each.
    QemuOfTwo,
    /// The same as the first, to which memory can be added, and of which it can be taken; it has a monitor to be told so.
    QemuThatGrows,
    /// The same processor, whose frames go over a stream.
    QemuOverStream,
    /// And over datagrams.
    QemuOverDatagrams,
}

/// A machine that was started; ends when dropped.
pub struct Vm {
    child: Child,
    commands: ChildStdin,
    /// What comes back over the serial line.
    lines: Receiver<String>,
    /// How many commands the guest was given.
    number: AtomicU32,
    directory: Directory,
}

/// What tests/guest/build has made.
fn image(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest/image").join(name);
    assert!(path.exists(), "{}: no such file (tests/setup vm and tests/guest/build make it)", path.display());
    path.display().to_string()
}

impl Machine {
    /// The option by which hythe serves it at a socket.
    pub fn door(self) -> &'static str {
        match self {
            Self::UserModeLinux
            | Self::Qemu
            | Self::QemuThatListens
            | Self::QemuOfTwo
            | Self::QemuThatGrows => "--vhost-user",
            Self::QemuOverStream => "--stream",
            Self::QemuOverDatagrams => "--dgram",
        }
    }

    /// The words that start it, attached to the socket of a link.
    fn words(self, socket: &Path, directory: &Path) -> Vec<String> {
        let (socket, directory) = (socket.display(), directory.display());
        let vhost_user = |who_calls| {
            format!(
                "-chardev socket,id=link,path={socket},{who_calls} -netdev vhost-user,id=net,chardev=link"
            )
        };
        let link = match self {
            Self::UserModeLinux => format!("virtio_uml.device={socket}:1"),
            Self::Qemu => vhost_user("reconnect=1"),
            Self::QemuThatGrows => format!(
                "{} -qmp unix:{directory}/qmp,server=on,wait=off -device virtio-balloon-pci,id=balloon",
                vhost_user("reconnect=1")
            ),
            Self::QemuThatListens => vhost_user("server=on"),
            Self::QemuOfTwo => format!("-smp 2 {},queues=2", vhost_user("reconnect=1")),
            Self::QemuOverStream => {
                format!("-netdev stream,id=net,server=off,addr.type=unix,addr.path={socket}")
            }
            Self::QemuOverDatagrams => format!(
                "-netdev dgram,id=net,local.type=unix,local.path={directory}/link,\
                 remote.type=unix,remote.path={socket}"
            ),
        };
        let several = if self == Self::QemuOfTwo { ",mq=on" } else { "" };
        let slots = if self == Self::QemuThatGrows { ",slots=2,maxmem=1G" } else { "" };
        let words = match self {
            // `seccomp=on` makes the system calls of a guest several times cheaper than ptrace(2) does.
            Self::UserModeLinux => vec![
                image("linux"),
                format!("mem={MEMORY_MIB}M"),
                "seccomp=on".into(),
                format!("initrd={}", image("initramfs")),
                link,
                format!("uml_dir={directory}"),
                "con=null".into(),
                "con0=null,fd:2".into(),
                "ssl0=fd:0,fd:1".into(),
                "commands=/dev/ttyS0".into(),
                "panic=-1".into(),
            ],
            // Without KVM, QEMU 7.2 crashes on vhost-user with MSI-X: `vectors=0` gives the device none.
            _ => format!(
                "qemu-system-x86_64 -accel tcg -cpu max -machine q35,memory-backend=memory -m {MEMORY_MIB}{slots} \
                 -object memory-backend-memfd,id=memory,size={MEMORY_MIB}M,share=on \
                 -nodefaults -no-user-config -display none -no-reboot \
                 {link} -device virtio-net-pci,netdev=net,romfile=,vectors=0{several} \
                 -serial file:{directory}/console -serial stdio -kernel {} -initrd {} -append",
                image("vmlinuz"),
                image("initramfs"),
            )
            .split_whitespace()
            .map(str::to_string)
            .chain(["console=ttyS0 quiet mitigations=off commands=/dev/ttyS1 panic=-1".into()])
            .collect(),
        };
        // Should the test be killed, nobody is left to end the machine.
        ["setpriv", "--pdeathsig=KILL", "--"].into_iter().map(str::to_string).chain(words).collect()
    }
}

impl Vm {
    /// Starts a machine, and waits for nothing.
    pub fn start(machine: Machine, socket: &Path) -> Self {
        let directory = Directory::new();
        let words = machine.words(socket, directory.path());
        let said = fs::File::create(directory.path().join("said")).unwrap();
        let started = Command::new(&words[0])
            .args(&words[1..])
            // Where User-Mode Linux has the guest's memory, as a file that it shares.
            .env("TMPDIR", "/dev/shm")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(said)
            .spawn();
        let mut child = started.unwrap_or_else(|error| panic!("{words:?}: {error}"));
        let commands = child.stdin.take().unwrap();
        let from = BufReader::new(child.stdout.take().unwrap());
        let (to, lines) = channel();
        std::thread::spawn(move || {
            for line in from.split(b'\n').map_while(Result::ok) {
                // The test may have ended.
                let _ = to.send(String::from_utf8_lossy(&line).trim_end_matches('\r').to_string());
            }
        });
        Self { child, commands, lines, number: AtomicU32::new(0), directory }
    }

    /// Waits until the guest takes commands.
    pub fn wait_until_booted(&self) {
        self.until("the guest to boot", PATIENCE, |line| (line == "ready").then_some(()));
    }

    /// Reads lines until there is the one that `wanted` makes something of; gives that and the lines before.
    fn until<T>(&self, what: &str, time: Duration, wanted: impl Fn(&str) -> Option<T>) -> (T, Vec<String>) {
        let deadline = Instant::now() + time;
        let mut lines = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => match wanted(&line) {
                    Some(found) => return (found, lines),
                    None => lines.push(line),
                },
                Err(RecvTimeoutError::Timeout) => panic!("waited {time:?} in vain for {what}: {lines:?}"),
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("the machine has ended; waited for {what}: {lines:?}")
                }
            }
        }
    }

    /// What a command of the guest's shell prints, which must end well in so much time.
    pub fn command_within(&self, time: Duration, command: &str) -> String {
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        writeln!(&self.commands, "{number} {command}").unwrap();
        let begin = format!("begin {number}");
        self.until(&format!("the guest to take {command}"), time, |line| (line == begin).then_some(()));
        let end = format!("end {number} ");
        let (status, mut lines) =
            self.until(command, time, |line| line.strip_prefix(&end)?.parse::<u8>().ok());
        // The guest ends a last line that has no end.
        if lines.last().is_some_and(String::is_empty) {
            lines.pop();
        }
        let said = lines.join("\n");
        assert_eq!(status, 0, "{command}: {said}");
        said
    }

    /// What a command of the guest's shell prints, which must end well.
    pub fn command(&self, command: &str) -> String {
        self.command_within(COMMAND_TIME, command)
    }

    /// A counter of the guest's kernel, by its name in /proc/net/snmp or netstat.
    pub fn counter(&self, file: &str, name: &str) -> u64 {
        // A line of names and a line of values for each group.
        let program = format!(
            "{{ if ($2 ~ /[A-Za-z]/) {{ delete n; for (i = 2; i <= NF; i++) n[i] = $i }} \
             else for (i = 2; i <= NF; i++) if (n[i] == \"{name}\") print $i }}"
        );
        self.command(&format!("awk '{program}' /proc/net/{file}")).parse().unwrap()
    }

    /// Serves a port in the guest, for TCP and UDP: what comes goes back.
    pub fn serve(&self, port: u16) {
        self.command(&format!("talker serve {port} >/tmp/served 2>&1 &"));
        self.command("until grep ready /tmp/served; do sleep 0.1; done");
    }

    /// Has QEMU's monitor execute a command (QEMU Machine Protocol).
    pub fn monitor(&self, command: &str) -> String {
        let stream = UnixStream::connect(self.directory.path().join("qmp")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut lines = BufReader::new(&stream).lines();
        let greeting = lines.next().unwrap().unwrap();
        assert!(greeting.contains("QMP"), "{greeting}");
        let mut execute = |command: &str| {
            writeln!(&stream, "{command}").unwrap();
            // What happens meanwhile is told in between.
            let answer = lines.by_ref().map(Result::unwrap).find(|line| !line.contains("\"event\""));
            answer.filter(|line| line.contains("\"return\"")).unwrap_or_else(|| panic!("{command}: refused"))
        };
        execute(r#"{"execute": "qmp_capabilities"}"#);
        execute(command)
    }

    /// Ends it as a power failure does.
    pub fn kill(&mut self) {
        // User-Mode Linux is several processes.
        let _ = killpg(Pid::from_raw(self.child.id() as i32), Signal::SIGKILL);
        let _ = self.child.wait();
    }

    /// What the machine itself has said.
    pub fn said(&self) -> String {
        self.log("said")
    }

    fn log(&self, name: &str) -> String {
        let path: PathBuf = self.directory.path().join(name);
        // User-Mode Linux has both in one.
        String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            for name in ["said", "console"] {
                let log = self.log(name);
                let lines: Vec<&str> = log.lines().collect();
                let last = &lines[lines.len().saturating_sub(LAST_LINES)..];
                eprintln!("--- the machine's {name}:\n{}\n---", last.join("\n"));
            }
        }
    }
}
