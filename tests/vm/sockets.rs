//! Machines whose frames come over a socket, and peers of the tests' own at the same sockets.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use socket2::{Domain, Socket, Type};

use crate::machine::Machine;
use crate::names::look_up;
use crate::peer::arp_request;
use crate::reconnection::{ENGINES, expect_free_port};
use crate::rig::bytes::{accept, expect_reset};
use crate::rig::cell::{Cell, Engine};
use crate::rig::directory::Directory;
use crate::rig::hythe::{Hythe, PROGRAM};
use crate::rig::process::descriptors;
use crate::rig::site::{FAMILIES, Family, Site};
use crate::rig::socket::receive;
use crate::rig::wait::{PATIENCE, pause, wait_for, wait_until};
use crate::streams::{MIB, carries, expect_published_port};
use crate::world::{PORT, World, boot, expect_service, serve_at};

/// The guest's addresses of its link, one after the other.
const MACS: [[u8; 6]; 2] = [[0x52, 0x54, 0, 0x12, 0x34, 0x56], [0x52, 0x54, 0, 0x12, 0x34, 0x57]];

/// The longest frame: an IP packet of 64 KiB in Ethernet.
const FRAME_MAX: usize = 14 + 65_535;

/// Makes a test of each case of a claim: `tests_of! { a_claim: a_case(argument, …); … }`.
macro_rules! tests_of {
    ($claim:ident: $($name:ident($($argument:expr),*);)*) => {$(
        #[test]
        fn $name() {
            $claim($($argument),*);
        }
    )*};
}

fn is_served_like_any_other(machine: Machine, engine: Engine) {
    let world = World::new(machine, Cell::new(engine, 1));
    for family in FAMILIES {
        world.vm.command(&format!("ping -c 3 -i 0.2 -W 30 {}", family.far()));
        carries(&world, family, 16 * MIB);
        let far = world.site.far.udp(family.far(), 7000);
        std::thread::scope(|scope| {
            scope.spawn(|| give_back(&far, 4));
            let to = SocketAddr::new(family.far(), 7000);
            world.vm.command(&format!("talker ask {to} 1 1400 9000 65000"));
        });
    }
    assert_eq!(look_up(&world.vm, "address.test"), ["2001:db8::10", "203.0.113.10"]);
    expect_published_port(&world, 16 * MIB);
    world.finish();
}

/// Sends some datagrams back where they came from.
fn give_back(socket: &UdpSocket, count: usize) {
    let mut bytes = vec![0; 70_000];
    for _ in 0..count {
        let (len, from) = receive(socket, &mut bytes).unwrap();
        socket.send_to(&bytes[..len], from).unwrap();
    }
}

tests_of! { is_served_like_any_other:
    a_guest_over_a_stream_is_served_on_io_uring(Machine::QemuOverStream, Engine::IoUring);
    a_guest_over_a_stream_is_served_on_epoll(Machine::QemuOverStream, Engine::Epoll);
    a_guest_over_datagrams_is_served_on_io_uring(Machine::QemuOverDatagrams, Engine::IoUring);
    a_guest_over_datagrams_is_served_on_epoll(Machine::QemuOverDatagrams, Engine::Epoll);
}

/// A machine is killed; its connections are reset, and another one is served in its place.
fn another_may_come(machine: Machine) {
    let mut world = World::new(machine, Cell::new(Engine::IoUring, 1));
    let listener = world.site.far.listen(Family::V4.far(), 0);
    let name = listener.local_addr().unwrap();
    world.vm.command(&format!(
        "(echo hello; sleep 1000) | nc {} {} >/dev/null 2>&1 &",
        name.ip(),
        name.port()
    ));
    let (mut stream, _) = accept(&listener);
    stream.read_exact(&mut [0; 6]).unwrap();
    world.vm.kill();
    expect_reset(&stream);
    world.vm = boot(machine, &world.hythe.guest);
    expect_service(&world.vm, &world.site);
    world.hythe.signal(Signal::SIGTERM);
    world.hythe.end().assert_clean(0);
}

tests_of! { another_may_come:
    a_machine_over_a_stream_may_be_followed_by_another(Machine::QemuOverStream);
    a_machine_over_datagrams_may_be_followed_by_another(Machine::QemuOverDatagrams);
}

/// hythe is killed; the next one serves at the same socket, whose name it has left. A machine survives that where it need not
/// call: QEMU calls once (`reconnect` came with version 8).
fn another_hythe_may_come(machine: Machine, survives: bool) {
    let mut world = World::new(machine, Cell::new(Engine::IoUring, 1));
    for engine in ENGINES {
        let socket = world.hythe.guest.clone();
        world.hythe.signal(Signal::SIGKILL);
        world.hythe.end();
        expect_free_port(&world.site);
        assert!(socket.exists());
        world.hythe = serve_at(&world.site, Cell::new(engine, 1), machine.door(), &socket);
        if !survives {
            world.vm.kill();
            world.vm = boot(machine, &socket);
        }
        expect_service(&world.vm, &world.site);
    }
    world.hythe.signal(Signal::SIGTERM);
    world.hythe.end().assert_clean(0);
}

tests_of! { another_hythe_may_come:
    a_hythe_that_was_killed_may_be_followed_by_another_which_waits_for_a_machine_over_a_stream(
        Machine::QemuOverStream, false);
    a_machine_over_datagrams_outlives_a_hythe_that_was_killed(Machine::QemuOverDatagrams, true);
}

fn is_answer(frame: &[u8], mac: [u8; 6]) -> bool {
    frame[..6] == mac && frame[12..14] == [8, 6] && frame[20..22] == [0, 2]
}

/// A connection with hythe that is none of a machine.
trait Peer {
    fn send(&self, frame: &[u8]) -> io::Result<()>;
    fn receive(&self) -> io::Result<Vec<u8>>;

    /// Waits for an answer. What the router says of its own accord may come before.
    fn answer(&self, mac: [u8; 6]) -> io::Result<()> {
        while !is_answer(&self.receive()?, mac) {}
        Ok(())
    }

    /// Asks for the gateway, and waits until it is answered.
    fn ask(&self, mac: [u8; 6]) -> io::Result<()> {
        self.send(&arp_request(mac))?;
        self.answer(mac)
    }
}

impl Peer for UnixStream {
    fn send(&self, frame: &[u8]) -> io::Result<()> {
        (&*self).write_all(&[&(frame.len() as u32).to_be_bytes()[..], frame].concat())
    }

    fn receive(&self) -> io::Result<Vec<u8>> {
        let mut len = [0; 4];
        (&*self).read_exact(&mut len)?;
        let len = u32::from_be_bytes(len) as usize;
        assert!((42..=FRAME_MAX).contains(&len), "a frame of {len} bytes");
        let mut frame = vec![0; len];
        (&*self).read_exact(&mut frame)?;
        Ok(frame)
    }
}

/// The frame that one read gives.
fn message(read: impl FnOnce(&mut [u8]) -> io::Result<usize>) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; FRAME_MAX];
    let len = read(&mut frame)?;
    frame.truncate(len);
    Ok(frame)
}

/// Messages on a socket that is connected.
impl Peer for Socket {
    fn send(&self, frame: &[u8]) -> io::Result<()> {
        Socket::send(self, frame).map(|_| ())
    }

    fn receive(&self) -> io::Result<Vec<u8>> {
        message(|bytes| (&*self).read(bytes))
    }
}

/// Datagrams as a machine sends them, from a socket that is connected to nobody.
struct Sender {
    socket: UnixDatagram,
    to: PathBuf,
}

impl Peer for Sender {
    fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.socket.send_to(frame, &self.to).map(|_| ())
    }

    fn receive(&self) -> io::Result<Vec<u8>> {
        message(|bytes| self.socket.recv(bytes))
    }
}

/// hythe at a socket, with nobody else there.
struct Alone {
    hythe: Hythe<PathBuf>,
    directory: Directory,
    site: Site,
}

impl Alone {
    fn new(engine: Engine, option: &str) -> Self {
        let (site, directory) = (Site::new(), Directory::new());
        let hythe = serve_at(&site, Cell::new(engine, 1), option, &directory.path().join("link"));
        Self { hythe, directory, site }
    }

    fn connect(&self) -> UnixStream {
        // It has its name before it is listened to.
        let stream = wait_for("the socket to listen", || UnixStream::connect(&self.hythe.guest).ok());
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Who sends datagrams to hythe, under a name.
    fn sender(&self, name: &str) -> Sender {
        let socket = UnixDatagram::bind(self.directory.path().join(name)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Sender { socket, to: self.hythe.guest.clone() }
    }

    /// Waits until hythe serves a new client: it may not have seen yet that the last one has gone.
    fn next_client(&self, mac: [u8; 6]) -> UnixStream {
        wait_for("the next client to be served", || {
            let stream = self.connect();
            stream.ask(mac).ok().map(|()| stream)
        })
    }

    fn finish(self) {
        self.hythe.assert_engine();
        self.hythe.signal(Signal::SIGTERM);
        self.hythe.end().assert_clean(0);
        assert!(!self.directory.names().contains(&"link".to_string()), "the socket's name is left");
    }
}

/// There is nothing that hythe can do, and it comes to rest.
fn expect_rest(hythe: &Hythe<PathBuf>) {
    let passes = || hythe.counters().get("passes");
    wait_until("hythe to rest", || {
        let before = passes();
        pause(Duration::from_secs(1));
        // A report takes a few.
        passes() - before < 50
    });
}

/// hythe closes the connection. What the router says of its own accord may come before.
fn expect_end(mut stream: &UnixStream) {
    stream.read_to_end(&mut Vec::new()).unwrap();
}

#[test]
fn a_streams_second_client_is_refused_while_the_first_is_served() {
    for engine in ENGINES {
        let alone = Alone::new(engine, "--stream");
        let first = alone.connect();
        first.ask(MACS[0]).unwrap();
        for _ in 0..3 {
            let second = alone.connect();
            expect_end(&second);
            first.ask(MACS[0]).unwrap();
        }
        drop(first);
        alone.next_client(MACS[1]).ask(MACS[1]).unwrap();
        alone.finish();
    }
}

#[test]
fn what_is_wrong_with_a_stream_is_counted_and_ends_it_alone() {
    for engine in ENGINES {
        let alone = Alone::new(engine, "--stream");
        for len in [FRAME_MAX + 1, 0x7fff_ffff, 0xffff_ffff] {
            let mut client = alone.next_client(MACS[0]);
            client.write_all(&(len as u32).to_be_bytes()).unwrap();
            expect_end(&client);
        }
        let whole = [&42u32.to_be_bytes()[..], &arp_request(MACS[0])].concat();
        for cut in [1, 3, 4, 20] {
            let mut client = alone.next_client(MACS[0]);
            client.write_all(&whole[..cut]).unwrap();
        }
        // Too short for what it should be, but frames all the same.
        let client = alone.next_client(MACS[1]);
        client.send(b"").unwrap();
        client.send(&arp_request(MACS[1])[..13]).unwrap();
        client.ask(MACS[1]).unwrap();
        let counters = alone.hythe.counters();
        let drops = counters.drops();
        assert!(drops.contains(&("frame_too_long", 3)) && drops.contains(&("truncated", 4 + 2)), "{drops:?}");
        alone.finish();
    }
}

/// A peer asks so often without reading that there is no room for answers; then it reads so many, and is served as before.
fn reads_late(alone: &Alone, peer: &impl Peer, questions: usize, answers: usize) {
    for _ in 0..questions {
        peer.send(&arp_request(MACS[0])).unwrap();
    }
    wait_until("answers to have no room", || alone.hythe.counters().get("dropped_link_full") > 100);
    expect_rest(&alone.hythe);
    for _ in 0..answers {
        peer.answer(MACS[0]).unwrap();
    }
    peer.ask(MACS[0]).unwrap();
}

#[test]
fn a_peer_that_does_not_read_gets_whole_frames_once_it_does() {
    for engine in ENGINES {
        let alone = Alone::new(engine, "--stream");
        reads_late(&alone, &alone.connect(), 20_000, 100);
        alone.finish();
    }
}

#[test]
fn a_sender_of_datagrams_that_does_not_read_gets_answers_once_it_does() {
    for engine in ENGINES {
        let alone = Alone::new(engine, "--dgram");
        // The queue of a socket is shorter than what waits in the link.
        reads_late(&alone, &alone.sender("sender"), 2000, 60);
        alone.finish();
    }
}

#[test]
fn datagrams_for_a_machine_that_is_not_there_cost_nothing() {
    for (engine, door) in ENGINES
        .into_iter()
        .flat_map(|engine| ["--vhost-user", "--stream", "--dgram"].map(|door| (engine, door)))
    {
        let alone = Alone::new(engine, door);
        let listens = || alone.site.host.command(&["ss", "-unlH"]).matches(&format!(":{PORT} ")).count();
        wait_until("the port to be published", || listens() == FAMILIES.len());
        for family in FAMILIES {
            let far = alone.site.far.udp(family.far(), 7000);
            far.send_to(b"anybody there?", (family.host(), PORT)).unwrap();
        }
        expect_rest(&alone.hythe);
        alone.finish();
    }
}

#[test]
fn a_stranger_is_refused_while_a_sender_of_datagrams_is_there() {
    for engine in ENGINES {
        let alone = Alone::new(engine, "--dgram");
        let first = alone.sender("first");
        first.ask(MACS[0]).unwrap();
        let second = alone.sender("second");
        let refused = second.send(&arp_request(MACS[1])).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
        first.send(&vec![0; FRAME_MAX + 1]).unwrap();
        first.ask(MACS[0]).unwrap();
        assert_eq!(alone.hythe.counters().get("dropped_frame_too_long"), 1);
        // Nothing is sent to it any more that would show that it has gone.
        drop(first);
        wait_until("the second to be served", || second.ask(MACS[1]).is_ok());
        // Somebody else under the same name, who is not the one before.
        drop(second);
        fs::remove_file(alone.directory.path().join("second")).unwrap();
        let third = alone.sender("second");
        wait_until("the third to be served", || third.ask(MACS[0]).is_ok());
        alone.finish();
    }
}

#[test]
fn a_datagram_from_a_socket_without_a_name_is_left_unanswered() {
    let alone = Alone::new(Engine::IoUring, "--dgram");
    UnixDatagram::unbound().unwrap().send_to(&arp_request(MACS[0]), &alone.hythe.guest).unwrap();
    wait_until("the user to be told", || alone.hythe.log().contains("has it a name?"));
    alone.sender("first").ask(MACS[1]).unwrap();
    alone.finish();
}

/// hythe with its end of a connection as descriptor `fd`.
fn inherit(engine: Engine, fd: u32, own: impl Into<OwnedFd>) -> Child {
    let options = format!("vm --engine {} --fd {fd}", Cell::new(engine, 1).engine_name());
    let mut command = Command::new("sh");
    let stdin = if fd == 0 { "" } else { "0</dev/null" };
    command.args(["-c", &format!("exec {PROGRAM} {options} {fd}<&0 {stdin}")]);
    command.stdin(Stdio::from(own.into())).stderr(Stdio::piped()).spawn().unwrap()
}

/// The inode of a socket.
fn inode(socket: &impl AsRawFd) -> u64 {
    fs::metadata(format!("/proc/self/fd/{}", socket.as_raw_fd())).unwrap().ino()
}

/// Closes a socket of this thread's network; waits until nobody has it. What other tests start does, for a moment before it
/// executes something.
fn expect_closed(socket: impl AsRawFd) {
    let inode = inode(&socket).to_string();
    drop(socket);
    wait_until("a socket to be closed", || {
        let sockets = fs::read_to_string("/proc/thread-self/net/unix").unwrap();
        !sockets.lines().any(|line| line.split_whitespace().nth(6) == Some(&inode))
    });
}

fn expect_good_end(mut child: Child) {
    let status = wait_for("hythe to end", || child.try_wait().unwrap());
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(status.success() && said.is_empty(), "{status}: {said}");
}

#[test]
fn a_connection_that_hythe_was_started_with_is_served_to_its_end() {
    for engine in ENGINES {
        let (own, peer) = UnixStream::pair().unwrap();
        let name = format!("socket:[{}]", inode(&own));
        let child = inherit(engine, 7, own);
        peer.ask(MACS[0]).unwrap();
        let has = descriptors(child.id() as i32);
        assert_eq!(has.iter().filter(|has| **has == name).count(), 1, "{has:?}");
        drop(peer);
        expect_good_end(child);

        let (own, peer) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None).unwrap();
        let child = inherit(engine, 0, own);
        peer.ask(MACS[0]).unwrap();
        drop(peer);
        expect_good_end(child);

        let (own, peer) = Socket::pair(Domain::UNIX, Type::DGRAM, None).unwrap();
        let child = inherit(engine, 3, own);
        peer.ask(MACS[0]).unwrap();
        // Its end shows when the answer cannot be sent.
        let pid = Pid::from_raw(child.id() as i32);
        kill(pid, Signal::SIGSTOP).unwrap();
        assert_eq!(waitpid(pid, Some(WaitPidFlag::WUNTRACED)), Ok(WaitStatus::Stopped(pid, Signal::SIGSTOP)));
        peer.send(&arp_request(MACS[0])).unwrap();
        expect_closed(peer);
        kill(pid, Signal::SIGCONT).unwrap();
        expect_good_end(child);
    }
}

/// What hythe says about a connection that is none, in one line.
fn refused(words: &str) -> String {
    let site = Site::new();
    let words: Vec<&str> = words.split_whitespace().collect();
    let ended = Hythe::of(&site.host, Cell::new(Engine::IoUring, 1)).to_the_end("vm", &words);
    ended.assert_clean(125);
    ended.one_line().to_string()
}

#[test]
fn a_descriptor_that_is_no_connection_is_refused_in_one_line() {
    assert_eq!(refused("--fd 99"), "hythe: --fd 99: is not open; whoever starts hythe has to leave it open");
    assert_eq!(refused("--fd 1"), "hythe: --fd 1: is not a socket");
    // Nor is it taken for one of hythe's own.
    let output = Command::new(PROGRAM).args(["vm", "--fd", "3"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said, "hythe: --fd 3: is not open; whoever starts hythe has to leave it open\n");
    let said = |own: OwnedFd| {
        let child = inherit(Engine::IoUring, 9, own);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(125));
        String::from_utf8(output.stderr).unwrap()
    };
    let internet = UdpSocket::bind("127.0.0.1:0").unwrap();
    assert_eq!(said(internet.into()), "hythe: --fd 9: is a socket, but not of AF_UNIX\n");
    let lonely = "hythe: --fd 9: is a socket that is not connected\n";
    assert_eq!(said(UnixDatagram::unbound().unwrap().into()), lonely);
    let directory = Directory::new();
    assert_eq!(said(UnixListener::bind(directory.path().join("listener")).unwrap().into()), lonely);
}

#[test]
fn a_socket_that_somebody_has_is_refused_and_one_that_nobody_has_replaced() {
    const OPTIONS: [&str; 2] = ["--stream", "--dgram"];
    let directory = Directory::new();
    let path = directory.path().join("link");
    let shown = path.display();
    for had in OPTIONS {
        let live: OwnedFd = match had {
            "--stream" => UnixListener::bind(&path).unwrap().into(),
            _ => UnixDatagram::bind(&path).unwrap().into(),
        };
        for option in OPTIONS {
            let said = refused(&format!("{option} {shown}"));
            assert_eq!(
                said,
                format!(
                    "hythe: {option}: {shown}: a running program has this socket; choose another path, or end it"
                )
            );
        }
        expect_closed(live);
        let site = Site::new();
        let before = fs::metadata(&path).unwrap().modified().unwrap();
        let hythe = Hythe::of(&site.host, Cell::new(Engine::IoUring, 1)).serve(
            "vm",
            &format!("{had} {shown}"),
            path.clone(),
        );
        wait_until("the socket to be replaced", || {
            fs::metadata(&path).is_ok_and(|now| now.modified().unwrap() != before)
        });
        hythe.signal(Signal::SIGTERM);
        hythe.end().assert_clean(0);
    }
    fs::write(&path, "notes").unwrap();
    let said = refused(&format!("--dgram {shown}"));
    assert!(said.contains("exists and is not a socket"), "{said}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "notes");
}
