//! Network namespaces that last as long as somebody holds them: a test that dies leaves none.

use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};
use socket2::{Domain, Protocol, Socket, Type};

use super::wait::{PATIENCE, wait_within};

/// A network namespace. Sockets belong to the namespace in which they were opened, whoever uses them later.
#[derive(Clone)]
pub struct Netns(Arc<File>);

impl Netns {
    /// A new one, with its loopback up.
    pub fn new() -> Self {
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace; these tests run as root");
            Self::of_path(Path::new("/proc/thread-self/ns/net"))
        });
        let netns = made.join().unwrap();
        netns.ip("link set lo up");
        netns
    }

    /// The one that a file names.
    pub fn of_path(path: &Path) -> Self {
        Self(Arc::new(File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))))
    }

    /// A process's.
    pub fn of_process(pid: i32) -> Self {
        Self::of_path(Path::new(&format!("/proc/{pid}/ns/net")))
    }

    /// A path by which other processes may open it.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()))
    }

    /// What identifies it among all namespaces.
    pub fn inode(&self) -> u64 {
        self.0.metadata().unwrap().ino()
    }

    /// Runs `task` on a thread inside; a panic of it is one of the caller.
    pub fn run<T: Send>(&self, task: impl FnOnce() -> T + Send) -> T {
        let inside = std::thread::scope(|scope| {
            let entered = scope.spawn(|| {
                setns(&*self.0, CloneFlags::CLONE_NEWNET).unwrap();
                task()
            });
            entered.join()
        });
        inside.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Runs a program to its end.
    pub fn output(&self, words: &[&str]) -> Output {
        let started = self.run(|| Command::new(words[0]).args(&words[1..]).output());
        started.unwrap_or_else(|error| panic!("{}: {error} (tests/setup installs it)", words[0]))
    }

    /// What a program prints, which must end well.
    pub fn command(&self, words: &[&str]) -> String {
        let output = self.output(words);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words:?}: {}: {said}", output.status);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// ip(8), one command a line.
    pub fn ip(&self, commands: &str) {
        for line in commands.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let words: Vec<&str> = std::iter::once("ip").chain(line.split_whitespace()).collect();
            self.command(&words);
        }
    }

    /// Sets a kernel parameter below /proc/sys/net.
    pub fn sysctl(&self, path: &str, value: &str) {
        let path = Path::new("/proc/sys/net").join(path);
        self.run(|| std::fs::write(&path, value))
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }

    /// A kernel counter by its name as nstat(8) prints it, like `TcpExtTCPTimeouts` or `UdpInErrors`.
    pub fn counter(&self, name: &str) -> u64 {
        let (snmp, netstat, snmp6) = self.run(|| {
            let read = |file: &str| std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap();
            (read("snmp"), read("netstat"), read("snmp6"))
        });
        let found = pairs_of_lines(&snmp, name).or_else(|| pairs_of_lines(&netstat, name));
        found.or_else(|| one_a_line(&snmp6, name)).unwrap_or_else(|| panic!("no counter {name}"))
    }

    /// Packets that an interface of this namespace has dropped, in both directions.
    pub fn dropped_at(&self, interface: &str) -> u64 {
        let table = self.run(|| std::fs::read_to_string("/proc/thread-self/net/dev")).unwrap();
        let line = table.lines().find_map(|line| line.trim().strip_prefix(interface)?.strip_prefix(':'));
        let line = line.unwrap_or_else(|| panic!("no interface {interface}"));
        let fields: Vec<u64> = line.split_whitespace().map(|field| field.parse().unwrap()).collect();
        // Eight numbers of what was received, then eight of what was sent; the fourth of each counts drops.
        fields[3] + fields[11]
    }

    /// A listening TCP socket; port 0 chooses one.
    pub fn listen(&self, address: impl Into<IpAddr>, port: u16) -> TcpListener {
        let name = SocketAddr::new(address.into(), port);
        self.open(name, || {
            let socket = Socket::new(Domain::for_address(name), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_reuse_address(true)?;
            if name.is_ipv6() {
                socket.set_only_v6(true)?;
            }
            socket.bind(&name.into())?;
            socket.listen(4096)?;
            // accept(2) takes this for its own.
            socket.set_read_timeout(Some(PATIENCE))?;
            Ok(socket.into())
        })
    }

    /// A connection, whose reads and writes fail when nothing moves for long.
    pub fn connect(&self, to: impl Into<SocketAddr>) -> io::Result<TcpStream> {
        self.connect_within(to, PATIENCE)
    }

    /// A connection that stands within a time.
    pub fn connect_within(&self, to: impl Into<SocketAddr>, time: Duration) -> io::Result<TcpStream> {
        let to = to.into();
        let stream = self.run(|| TcpStream::connect_timeout(&to, time))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// A UDP socket; port 0 chooses one.
    pub fn udp(&self, address: impl Into<IpAddr>, port: u16) -> UdpSocket {
        let name = SocketAddr::new(address.into(), port);
        self.open(name, || {
            let socket = Socket::new(Domain::for_address(name), Type::DGRAM, Some(Protocol::UDP))?;
            if name.is_ipv6() {
                socket.set_only_v6(true)?;
            }
            socket.bind(&name.into())?;
            socket.set_read_timeout(Some(PATIENCE))?;
            Ok(socket.into())
        })
    }

    /// Opens a socket that is to have a name.
    fn open<T: Send>(&self, name: SocketAddr, socket: impl Fn() -> io::Result<T> + Sync) -> T {
        let opened = wait_within(PATIENCE, || match self.run(&socket) {
            // A process that is being started has copies of all sockets, also of closed ones, until it executes.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => None,
            // An address of IPv6 is tentative for a moment, also on a loopback: the kernel sets it from a queue.
            Err(error) if name.is_ipv6() && error.kind() == io::ErrorKind::AddrNotAvailable => None,
            other => Some(other),
        });
        let opened = opened.unwrap_or_else(|| Err(io::ErrorKind::AddrInUse.into()));
        opened.unwrap_or_else(|error| panic!("socket at {name}: {error}"))
    }

    /// How many processes live in it.
    pub fn processes(&self) -> Vec<i32> {
        super::process::all().filter(|pid| super::process::netns_inode(*pid) == Some(self.inode())).collect()
    }
}

/// /proc/net/snmp and netstat: a line of names, then a line of values, each behind the group's name.
fn pairs_of_lines(text: &str, name: &str) -> Option<u64> {
    let lines: Vec<&str> = text.lines().collect();
    lines.chunks_exact(2).find_map(|pair| {
        let (group, names) = pair[0].split_once(':')?;
        let wanted = name.strip_prefix(group)?;
        let at = names.split_whitespace().position(|name| name == wanted)?;
        pair[1].split_once(':')?.1.split_whitespace().nth(at)?.parse().ok()
    })
}

/// /proc/net/snmp6: a name and a value a line.
fn one_a_line(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.split_once(char::is_whitespace));
    lines.find(|(key, _)| *key == name)?.1.trim().parse().ok()
}
