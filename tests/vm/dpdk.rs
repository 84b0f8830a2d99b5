//! A guest without a kernel: DPDK's testpmd, which polls its queues and asks for no interrupt (virtio-user).

use std::fs;
use std::io::Write;
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

use nix::sys::signal::Signal;

use crate::rig::cell::{Cell, Engine};
use crate::rig::directory::Directory;
use crate::rig::pattern::Pattern;
use crate::rig::site::{Family, Site};
use crate::rig::socket::receive;
use crate::rig::wait::{wait_for, wait_until};
use crate::world::{PORT, serve};

/// What testpmd sends at first: so many datagrams, of frames of so many bytes.
const BURST: usize = 32;
const FRAME: usize = 200;

/// Payload bytes of datagrams: none, and as many as a packet takes. What comes in several fragments it does not understand.
const SIZES: [usize; 5] = [0, 1, 100, 1400, 1472];

/// A running testpmd. It sends a burst of datagrams to a far server when it is told to start; from then on it gives back
/// every datagram that comes, to whoever it is from.
struct Testpmd {
    child: Child,
    commands: ChildStdin,
    directory: Directory,
}

/// Where tests/guest/fetch has put it.
fn parts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest/parts/dpdk/usr")
}

/// A library of DPDK's, of whichever version.
fn library(name: &str) -> String {
    let libraries = parts().join("lib/x86_64-linux-gnu");
    let entries = fs::read_dir(&libraries)
        .unwrap_or_else(|error| panic!("{}: {error} (tests/setup vm fetches it)", libraries.display()));
    let names = entries.flatten().map(|entry| entry.path().display().to_string());
    names.into_iter().find(|path| path.contains(&format!("/{name}.so."))).unwrap()
}

impl Testpmd {
    fn start(socket: &Path, to: SocketAddr) -> Self {
        let directory = Directory::new();
        let said = fs::File::create(directory.path().join("said")).unwrap();
        // Without huge pages its memory is a file that it can share. Two threads: one for commands, one that polls.
        let options = format!(
            "--no-huge -m 64 --no-pci --no-telemetry --no-shconf --lcores 0@(0-1),1@(0-1) \
             --vdev net_virtio_user0,path={},mac=52:54:00:00:00:01,queues=1 -- \
             -i --forward-mode=5tswap --total-num-mbufs=4096 --txpkts={FRAME} \
             --tx-ip={},{} --tx-udp=5000,{} --eth-peer=0,5a:94:ef:e4:0c:dd",
            socket.display(),
            Family::V4.guest(),
            to.ip(),
            to.port()
        );
        let libraries = parts().join("lib/x86_64-linux-gnu");
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig=KILL", "--"])
            .arg(parts().join("bin/dpdk-testpmd"))
            .args(options.split_whitespace())
            .env("LD_LIBRARY_PATH", &libraries)
            // Its drivers; it would refuse to load them from below a directory like /tmp.
            .env("LD_PRELOAD", format!("{}:{}", library("librte_net_virtio"), library("librte_mempool_ring")))
            .env("RUNTIME_DIRECTORY", directory.path())
            .stdin(Stdio::piped())
            .stdout(said.try_clone().unwrap())
            .stderr(said)
            .spawn()
            .unwrap_or_else(|error| panic!("dpdk-testpmd: {error} (tests/setup vm fetches it)"));
        let commands = child.stdin.take().unwrap();
        Self { child, commands, directory }
    }

    fn said(&self) -> String {
        fs::read_to_string(self.directory.path().join("said")).unwrap_or_default()
    }

    fn command(&mut self, command: &str) {
        writeln!(self.commands, "{command}").unwrap();
    }

    fn expect_running(&mut self) {
        wait_until("testpmd to take commands", || {
            assert!(self.child.try_wait().unwrap().is_none(), "testpmd has ended");
            self.said().contains("testpmd>")
        });
    }

    fn finish(mut self) {
        self.command("stop");
        self.command("quit");
        let status = wait_for("testpmd to end", || self.child.try_wait().unwrap());
        assert!(status.success(), "{status}");
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- testpmd said:\n{}\n---", self.said());
        }
    }
}

/// Datagrams from `socket` come back.
fn expect_echoes(socket: &UdpSocket, to: SocketAddr) {
    let mut bytes = vec![0; 2000];
    for size in SIZES {
        let question = Pattern(size as u64).bytes(size);
        socket.send_to(&question, to).unwrap();
        let (len, from) = receive(socket, &mut bytes).unwrap_or_else(|error| panic!("{size} bytes: {error}"));
        assert!(bytes[..len] == question, "{len} bytes returned of {size}, or others");
        assert_eq!(from, to);
    }
}

fn datagrams_go_there_and_back(engine: Engine) {
    let (site, directory) = (Site::new(), Directory::new());
    let socket = directory.path().join("link");
    let hythe = serve(&site, Cell::new(engine, 1), &socket);
    let far = site.far.udp(Family::V4.far(), 0);
    let client = site.far.udp(Family::V4.next_hop(), 0);
    let mut bytes = vec![0; 2000];
    // One follows another.
    for _ in 0..2 {
        let mut testpmd = Testpmd::start(&socket, far.local_addr().unwrap());
        testpmd.expect_running();
        testpmd.command("start tx_first");
        let mut guest = None;
        for number in 0..BURST {
            let (len, from) =
                receive(&far, &mut bytes).unwrap_or_else(|error| panic!("datagram {number}: {error}"));
            // Ethernet, IPv4, UDP.
            assert_eq!(len, FRAME - 14 - 20 - 8);
            assert_eq!(*guest.get_or_insert(from), from, "one flow, one port");
        }
        expect_echoes(&far, guest.unwrap());
        expect_echoes(&client, SocketAddr::new(Family::V4.host(), PORT));
        testpmd.finish();
        wait_until("hythe to see it go", || {
            let log = hythe.log();
            log.matches("has gone").count() == log.matches("has come").count()
        });
    }
    for (cause, count) in hythe.counters().drops() {
        // The router advertises itself while nobody is there.
        assert!(cause == "link_full" && count <= 2, "{count} dropped because of {cause}");
    }
    hythe.signal(Signal::SIGTERM);
    hythe.end().assert_clean(0);
}

#[test]
fn a_program_that_polls_is_served_on_io_uring() {
    datagrams_go_there_and_back(Engine::IoUring);
}

#[test]
fn a_program_that_polls_is_served_on_epoll() {
    datagrams_go_there_and_back(Engine::Epoll);
}
