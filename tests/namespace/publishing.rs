//! Ports that are published and unpublished while hythe runs, over the control socket and the command line.

use std::fs::{self, Permissions};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hyper::Method;
use hythe::control::client::{AskError, ask};
use hythe::control::shapes::{Code, Port, Ports, Status};
use nix::sys::signal::Signal;

use crate::rig::bytes::{accept, echo, expect_echo, read, transfer};
use crate::rig::cell::{ANY, Cell, Engine, on_every_cell};
use crate::rig::directory::Directory;
use crate::rig::hythe::{Hythe, PROGRAM};
use crate::rig::mounts::Mounts;
use crate::rig::netns::Netns;
use crate::rig::process;
use crate::rig::program::Program;
use crate::rig::quiet;
use crate::rig::site::{FAMILIES, Family, Site};
use crate::rig::socket;
use crate::rig::wait::{PATIENCE, pause, wait_for, wait_until};

/// A control socket in a directory of the test's own.
pub struct Control {
    pub path: PathBuf,
    _directory: Directory,
}

impl Control {
    pub fn new() -> Self {
        let directory = Directory::new();
        let own = directory.path().join("own");
        fs::create_dir(&own).unwrap();
        fs::set_permissions(&own, Permissions::from_mode(0o755)).unwrap();
        Self { path: own.join("api.sock"), _directory: directory }
    }

    pub fn option(&self) -> String {
        format!("--api {}", self.path.display())
    }

    fn ask(&self, method: Method, target: &str, body: Option<String>) -> Result<Vec<Port>, AskError> {
        let answer = ask(&self.path, method, target, body.map(String::into_bytes))?;
        Ok(serde_json::from_slice::<Ports>(&answer).unwrap().ports)
    }

    fn publish(&self, specs: &[&str]) -> Result<Vec<Port>, AskError> {
        let body = serde_json::json!({ "publish": specs }).to_string();
        self.ask(Method::POST, "/v1/ports", Some(body))
    }

    fn unpublish(&self, spec: &str) -> Result<Vec<Port>, AskError> {
        self.ask(Method::DELETE, &format!("/v1/ports?spec={spec}"), None)
    }

    fn ports(&self) -> Vec<Port> {
        self.ask(Method::GET, "/v1/ports", None).unwrap()
    }

    /// The program on the command line, in a namespace.
    pub fn hythe(&self, netns: &Netns, command: &str, words: &[&str]) -> Output {
        let path = self.path.display().to_string();
        netns.output(&[&[PROGRAM, command, "--api", &path], words].concat())
    }
}

/// What a command prints that ends well and says nothing else.
pub fn printed(output: &Output) -> String {
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert!(output.status.success(), "{}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The one line of a command that fails.
fn said(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.status.code(), said.lines().count()), (Some(125), 1), "{said}");
    assert_eq!(output.stdout, b"");
    said
}

fn call(client: &Netns, to: impl Into<SocketAddr>, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let to = to.into();
    let called = client.connect(to).unwrap_or_else(|error| panic!("{to}: {error}"));
    (called, accept(listener).0)
}

fn exchange((one, other): &(TcpStream, TcpStream)) {
    transfer(one, other, 1, 50_000);
    transfer(other, one, 2, 50_000);
}

fn is_refused(client: &Netns, to: impl Into<SocketAddr>) -> bool {
    client.connect(to).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

fn datagram_echo(client: &UdpSocket, to: SocketAddr, server: &UdpSocket) {
    let mut bytes = [0; 20];
    client.send_to(b"question", to).unwrap();
    let (len, peer) = socket::receive(server, &mut bytes).unwrap_or_else(|error| panic!("{to}: {error}"));
    server.send_to(&bytes[..len], peer).unwrap();
    let (len, from) = socket::receive(client, &mut bytes).unwrap_or_else(|error| panic!("{to}: {error}"));
    assert_eq!((&bytes[..len], from), (&b"question"[..], to));
}

on_every_cell! {
    a_port_is_published_fetched_and_closed_while_others_go_on(cell) {
        let site = Site::new();
        let control = Control::new();
        let hythe = Hythe::of(&site.host, cell).options(&control.option()).options("-p 7000:70").run();
        for family in FAMILIES {
            let other = hythe.guest.listen(family.any(), 70);
            let standing = [
                call(&site.far, (family.host(), 7000), &other),
                call(&site.host, (family.loopback(), 7000), &other),
            ];
            standing.iter().for_each(exchange);
            assert!(is_refused(&site.far, (family.host(), 8000)));
            let server = hythe.guest.listen(family.any(), 80);
            let datagrams = hythe.guest.udp(family.any(), 53);
            let client = site.far.udp(family.any(), 0);

            let published = control.publish(&["8000:80", "5300:53/udp"]).unwrap();
            assert_eq!(published.len(), 4, "two of each family");
            let through = [
                call(&site.far, (family.host(), 8000), &server),
                call(&site.host, (family.loopback(), 8000), &server),
            ];
            through.iter().chain(&standing).for_each(exchange);
            datagram_echo(&client, (family.host(), 5300).into(), &datagrams);
            assert_eq!(control.ports().len(), 6);

            control.unpublish("8000:80").unwrap();
            // The answer is the end of it: nobody listens, and anybody may.
            let begun = Instant::now();
            assert!(is_refused(&site.far, (family.host(), 8000)));
            assert!(is_refused(&site.host, (family.loopback(), 8000)));
            assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
            drop(site.host.run(|| TcpListener::bind((family.any(), 8000))).unwrap());
            // What was open stays so, also what came through the port.
            through.iter().chain(&standing).for_each(exchange);
            datagram_echo(&client, (family.host(), 5300).into(), &datagrams);

            control.unpublish("5300:53/udp").unwrap();
            drop(site.host.run(|| UdpSocket::bind((family.any(), 5300))).unwrap());
            let again = call(&site.far, (family.host(), 7000), &other);
            standing.iter().chain([&again]).for_each(exchange);
        }
        hythe.assert_engine();
        hythe.stop().assert_clean(0);
        assert!(!control.path.exists(), "the socket's name goes with hythe");
    }
}

on_every_cell! {
    a_port_that_is_published_at_run_time_shows_what_the_guest_shows(cell) {
        let site = Site::new();
        let control = Control::new();
        let hythe = Hythe::of(&site.host, cell).options(&control.option()).run();
        control.publish(&["8000:80"]).unwrap();
        for family in FAMILIES {
            let _first = site.far.connect((family.host(), 8000));
            wait_until("the port to refuse", || is_refused(&site.far, (family.host(), 8000)));
            let server = hythe.guest.listen(family.any(), 80);
            wait_until("the port to open", || site.far.connect((family.host(), 8000)).is_ok());
            drop(server);
        }
        // Also one that refuses can be removed.
        wait_until("the port to refuse", || is_refused(&site.far, (Family::V4.host(), 8000)));
        control.unpublish("8000:80").unwrap();
        drop(site.host.run(|| TcpListener::bind((Family::V4.any(), 8000))).unwrap());
        hythe.stop().assert_clean(0);
    }
}

#[test]
fn the_command_line_publishes_lists_and_unpublishes() {
    let site = Site::new();
    let control = Control::new();
    let hythe = Hythe::of(&site.host, ANY).options(&control.option()).options("-p 7000:70").run();
    let ask = |command: &str, words: &[&str]| control.hythe(&site.host, command, words);
    assert_eq!(printed(&ask("ports", &[])), "70/tcp -> 0.0.0.0:7000\n70/tcp -> [::]:7000\n");
    assert_eq!(printed(&ask("publish", &["8000:80", "127.0.0.1:8001:53/udp"])), "");
    // What was chosen is told.
    let told = printed(&ask("publish", &["127.0.0.1:8100-8110:81", "82"]));
    let lines: Vec<&str> = told.lines().collect();
    let [first, second, third] = lines[..] else { panic!("{told}") };
    assert_eq!(first, "81/tcp -> 127.0.0.1:8100");
    let random = second.strip_prefix("82/tcp -> 0.0.0.0:").unwrap();
    assert_eq!(third, format!("82/tcp -> [::]:{random}"));
    let range = site.host.run(|| fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap());
    assert_eq!(range.split_whitespace().next().unwrap(), random, "the first one of the host's");
    let server = hythe.guest.listen(Family::V4.any(), 82);
    exchange(&call(&site.far, (Family::V4.host(), random.parse().unwrap()), &server));

    let listed = printed(&ask("ports", &[]));
    assert_eq!(listed.lines().count(), 8, "{listed}");
    let json: serde_json::Value = serde_json::from_str(&printed(&ask("ports", &["--json"]))).unwrap();
    assert_eq!(json["ports"].as_array().unwrap().len(), 8);
    // Also what was published at the start.
    assert_eq!(printed(&ask("unpublish", &["7000:70", "8000:80", "82", "127.0.0.1:8001:53/udp"])), "");
    assert_eq!(
        said(&ask("unpublish", &["127.0.0.1::81", "9999:80"])).trim_end(),
        "hythe: 9999:80 is not published"
    );
    assert_eq!(printed(&ask("ports", &[])), "81/tcp -> 127.0.0.1:8100\n");
    assert_eq!(printed(&ask("unpublish", &["127.0.0.1::81"])), "");
    assert_eq!(printed(&ask("ports", &[])), "");
    hythe.stop().assert_clean(0);
}

#[test]
fn what_cannot_be_published_is_told_and_changes_nothing() {
    let site = Site::new();
    let control = Control::new();
    let hythe = Hythe::of(&site.host, ANY).options(&control.option()).options("-p 8000:80").run();
    let publish = |words: &[&str]| said(&control.hythe(&site.host, "publish", words));
    let bound = || site.host.command(&["ss", "-Hltun"]);
    let before = bound();
    let _tcp = site.host.listen(Family::V4.loopback(), 9005);
    let taken = bound();
    assert_ne!(before, taken);
    assert_eq!(publish(&["8000:80"]), "hythe: Bind for 0.0.0.0:8000 failed: port is already allocated\n");
    let line = publish(&["9000-9009:80-89"]);
    assert!(line.starts_with("hythe: Bind for 0.0.0.0:9005 failed: address already in use"), "{line}");
    assert!(line.contains(&format!("process {}", std::process::id())), "{line}");
    for (spec, part) in [
        ("203.0.113.9:9000:80", "does not have this address"),
        ("9000:80/sctp", "sctp cannot be published"),
        ("9000-9001:80-82", "invalid ranges specified for container and host Ports: 80-82 and 9000-9001"),
        ("127.0.0.1:9005-9005:80", "address already in use"),
    ] {
        let line = publish(&[spec]);
        assert!(line.contains(part), "{line}");
    }
    assert_eq!(bound(), taken);
    assert_eq!(control.ports().len(), 2);
    hythe.stop().assert_clean(0);
}

/// The effective capabilities of a process.
fn capabilities(pid: i32) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap().trim().to_string()
}

#[test]
fn a_port_below_1024_is_published_later_by_a_process_that_can_do_nothing_else() {
    const BIND_SERVICE: &str = "0000000000000400";
    let site = Site::new();
    let control = Control::new();
    let hythe = Hythe::of(&site.host, ANY).options(&control.option()).run();
    control.publish(&["80:80", "127.0.0.1:53:53/udp"]).unwrap();
    let server = hythe.guest.listen(Family::V6.any(), 80);
    for family in FAMILIES {
        exchange(&call(&site.far, (family.host(), 80), &server));
    }
    let udp = hythe.guest.udp(Family::V4.any(), 53);
    datagram_echo(&site.host.udp(Family::V4.loopback(), 0), (Family::V4.loopback(), 53).into(), &udp);
    let taken = site.host.listen(Family::V4.any(), 81);
    let line = said(&control.hythe(&site.host, "publish", &["81:81"]));
    assert!(line.contains("Bind for 0.0.0.0:81 failed: address already in use"), "{line}");
    drop(taken);

    let named = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap() == "hythe-ports\n";
    let broker = process::children(hythe.pid()).into_iter().find(named).unwrap();
    assert_eq!(capabilities(hythe.pid()), "0000000000000000");
    assert_eq!(capabilities(broker), BIND_SERVICE);
    assert_eq!(process::descriptors(broker).len(), 1);
    let status = &process::thread_statuses(broker)[0];
    assert!(status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"), "{status}");
    control.unpublish("80:80").unwrap();
    assert!(is_refused(&site.far, (Family::V4.host(), 80)));

    // Without it, others are served on.
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(broker), Signal::SIGKILL).unwrap();
    let line = said(&control.hythe(&site.host, "publish", &["82:82"]));
    assert!(line.contains("Bind for 0.0.0.0:82 failed"), "{line}");
    control.publish(&["8000:80"]).unwrap();
    exchange(&call(&site.far, (Family::V4.host(), 8000), &server));
    hythe.stop().assert_clean(0);
}

#[test]
fn a_port_below_1024_takes_a_right_later_too() {
    let site = Site::new();
    let directory = Directory::new();
    let own = directory.path().join("own");
    fs::create_dir(&own).unwrap();
    std::os::unix::fs::chown(&own, Some(65534), Some(65534)).unwrap();
    let control = Control { path: own.join("api.sock"), _directory: directory };
    let hythe = Hythe::of(&site.host, ANY.as_nobody()).options(&control.option()).run();
    let line = said(&control.hythe(&site.host, "publish", &["80:80"]));
    assert!(line.contains("Bind for 0.0.0.0:80 failed: permission denied"), "{line}");
    assert!(line.contains("net.ipv4.ip_unprivileged_port_start=80"), "{line}");
    // What the message says helps.
    site.host.sysctl("ipv4/ip_unprivileged_port_start", "80");
    control.publish(&["80:80"]).unwrap();
    let server = hythe.guest.listen(Family::V6.any(), 80);
    exchange(&call(&site.far, (Family::V6.host(), 80), &server));
    hythe.stop().assert_clean(0);
}

#[test]
fn several_are_told_apart_by_name() {
    let site = Site::new();
    let directory = Control::new();
    let runtime = directory.path.parent().unwrap();
    let start = |options: &str| Hythe::of(&site.host, ANY).runtime_directory(runtime).options(options);
    let ask = |words: &[&str]| {
        let runtime = format!("XDG_RUNTIME_DIR={}", runtime.display());
        site.host.output(&[&["env", &runtime, PROGRAM, "ports"], words].concat())
    };
    assert!(said(&ask(&[])).contains("no hythe of this user runs"));
    let web = start("--name web -p 8000:80").run();
    assert_eq!(printed(&ask(&[])).lines().count(), 2, "the only one is asked");
    let other = start("-p 127.0.0.1:8001:81").run();
    let line = said(&ask(&[]));
    assert!(line.contains("choose one by --name") && line.contains("web"), "{line}");
    assert!(printed(&ask(&["--name", "web"])).contains("80/tcp -> 0.0.0.0:8000"));
    let own = other.pid().to_string();
    assert_eq!(printed(&ask(&["--name", &own])), "81/tcp -> 127.0.0.1:8001\n");
    assert!(said(&ask(&["--name", "db"])).contains("no hythe answers there"));

    // A name that somebody has is refused; one that somebody had is not.
    let ended = start("--name web").to_the_end("run", &["--", "true"]);
    ended.assert_clean(125);
    assert!(ended.one_line().contains("a running program has this socket"), "{}", ended.stderr);
    web.signal(Signal::SIGKILL);
    web.end();
    let again = start("--name web").run();
    assert_eq!(printed(&ask(&["--name", "web"])), "");
    other.signal(Signal::SIGKILL);
    other.end();
    // What it left is removed by the next one.
    let third = start("--name third").run();
    let mut names: Vec<String> = fs::read_dir(runtime.join("hythe"))
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["third.sock", "web.sock"]);
    again.stop().assert_clean(0);
    third.stop().assert_clean(0);
}

#[test]
fn a_plain_user_has_a_control_socket_too() {
    let site = Site::new();
    let directory = Directory::new();
    let own = directory.path().join("own");
    fs::create_dir(&own).unwrap();
    std::os::unix::fs::chown(&own, Some(65534), Some(65534)).unwrap();
    let path = own.join("api.sock");
    let hythe = Hythe::of(&site.host, ANY.as_nobody()).options(&format!("--api {}", path.display())).run();
    let mode = fs::symlink_metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // Root may call.
    let control = Control { path, _directory: directory };
    control.publish(&["8000:80"]).unwrap();
    let server = hythe.guest.listen(Family::V4.any(), 80);
    exchange(&call(&site.far, (Family::V4.host(), 8000), &server));
    hythe.stop().assert_clean(0);
}

/// Echoes until it is told to stop; connections that stand, and new ones. Returns how many exchanges there were.
fn load(client: &Netns, to: SocketAddr, stop: &AtomicBool) -> u64 {
    let standing: Vec<TcpStream> = (0..4).map(|_| client.connect(to).unwrap()).collect();
    let mut exchanges = 0;
    while !stop.load(Ordering::Relaxed) {
        for stream in &standing {
            round_trip(stream);
        }
        round_trip(&client.connect(to).unwrap_or_else(|error| panic!("a new connection: {error}")));
        exchanges += 5;
        // Each new connection keeps a port for a minute after its end (TIME-WAIT), on both sides: there are 28,000.
        pause(Duration::from_millis(5));
    }
    exchanges
}

fn round_trip(mut stream: &TcpStream) {
    stream.write_all(b"hello").unwrap();
    let mut bytes = [0; 5];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello");
}

/// A server that gives back what it gets, until its clients go.
fn serve_echo(listener: &TcpListener, stop: &AtomicBool) {
    std::thread::scope(|scope| {
        while !stop.load(Ordering::Relaxed) {
            let Ok((stream, _)) = listener.accept() else { continue };
            // What the listener has it would have too.
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            scope.spawn(move || {
                let mut bytes = [0; 4096];
                while let Ok(len @ 1..) = read(&stream, &mut bytes) {
                    if (&stream).write_all(&bytes[..len]).is_err() {
                        break;
                    }
                }
            });
        }
    });
}

/// Ends a load, also when the test fails.
struct Stopper<'s>(&'s AtomicBool);

impl Drop for Stopper<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs `task` while connections through a published port are busy, none of which may fail.
fn under_load<T: Send>(
    site: &Site,
    guest: &Netns,
    port: u16,
    guest_port: u16,
    task: impl FnOnce() -> T + Send,
) -> T {
    let (stop, served, exchanges) = (AtomicBool::new(false), AtomicBool::new(false), AtomicU64::new(0));
    let listener = guest.listen(Family::V4.any(), guest_port);
    socket2::SockRef::from(&listener).set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let begun = Instant::now();
    std::thread::scope(|scope| {
        // The server outlasts its clients: a connection that one of them has just made is still to be accepted.
        let ended = Stopper(&served);
        let server = scope.spawn(|| serve_echo(&listener, &served));
        let clients: Vec<_> = [(&site.far, Family::V4.host()), (&site.host, Family::V4.loopback())]
            .into_iter()
            .map(|(client, to)| {
                let (stop, exchanges) = (&stop, &exchanges);
                scope.spawn(move || {
                    exchanges.fetch_add(load(client, (to, port).into(), stop), Ordering::Relaxed)
                })
            })
            .collect();
        let stopper = Stopper(&stop);
        let done = task();
        drop(stopper);
        for client in clients {
            client.join().expect("the load lost nothing");
        }
        drop(ended);
        server.join().unwrap();
        let exchanges = exchanges.load(Ordering::Relaxed);
        assert!(exchanges > 100, "there was no load");
        println!("{:.0} exchanges a second", exchanges as f64 / begun.elapsed().as_secs_f64());
        done
    })
}

fn a_thousand_changes(engine: Engine) {
    let _busy = quiet::busy();
    let site = Site::new();
    let control = Control::new();
    let hythe =
        Hythe::of(&site.host, Cell::new(engine, 2)).options(&control.option()).options("-p 7000:70").run();
    let changing = hythe.guest.listen(Family::V4.any(), 80);
    let cycle = |number: u32| {
        control
            .publish(&["8000:80", "8000:80/udp"])
            .unwrap_or_else(|error| panic!("cycle {number}: {error}"));
        if number.is_multiple_of(50) {
            exchange(&call(&site.far, (Family::V4.host(), 8000), &changing));
        }
        control.unpublish("8000:80&spec=8000:80/udp").unwrap();
    };
    let descriptors = || process::descriptors(hythe.pid()).len();
    let at_rest = || {
        wait_for("hythe to rest", || {
            let before = descriptors();
            pause(Duration::from_secs(1));
            (descriptors() == before).then_some(before)
        })
    };
    (0..50).for_each(cycle);
    let before = at_rest();
    under_load(&site, &hythe.guest, 7000, 70, || (0..1000).for_each(cycle));
    // Sockets of the guest's namespace and pipes are kept for the next joins, a bounded number of each worker.
    wait_until("descriptors to be closed", || descriptors() <= before + 600);
    (0..2).for_each(cycle);
    let kept = at_rest();
    (0..1000).for_each(cycle);
    wait_until("all descriptors to be closed", || descriptors() <= kept);
    assert_eq!(control.ports().len(), 2);
    assert!(is_refused(&site.far, (Family::V4.host(), 8000)));
    hythe.stop().assert_clean(0);
}

#[test]
fn a_thousand_changes_under_load_lose_no_connection_and_no_descriptor_on_io_uring() {
    a_thousand_changes(Engine::IoUring);
}

#[test]
fn a_thousand_changes_under_load_lose_no_connection_and_no_descriptor_on_epoll() {
    a_thousand_changes(Engine::Epoll);
}

/// Sends bytes and reads until the end.
fn converse(path: &Path, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let _ = stream.write_all(bytes);
    let mut said = Vec::new();
    let _ = stream.read_to_end(&mut said);
    String::from_utf8_lossy(&said).into_owned()
}

#[test]
fn bad_requests_are_answered_and_disturb_nobody() {
    let site = Site::new();
    let control = Control::new();
    let hythe = Hythe::of(&site.host, ANY).options(&control.option()).options("-p 7000:70").run();
    let post = |body: &str| {
        format!(
            "POST /v1/ports HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    under_load(&site, &hythe.guest, 7000, 70, || {
        for (request, status) in [
            (post("{"), 400),
            (post("[[[[[[[["), 400),
            (post(&"[".repeat(60_000)), 400),
            (post("{\"publish\": 80}"), 400),
            (post("{\"publish\": [\"x\"]}"), 422),
            (post(&" ".repeat(65_537)), 413),
            ("PUT /v1/ports HTTP/1.1\r\nconnection: close\r\n\r\n".into(), 405),
            ("GET /v2/ports HTTP/1.1\r\nconnection: close\r\n\r\n".into(), 404),
            ("no HTTP at all\r\n\r\n".into(), 400),
            ("GET /v1/status HTTP/1.1\r\n".into(), 408),
            ("POST /v1/ports HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{".into(), 408),
        ] {
            let said = converse(&control.path, request.as_bytes());
            assert!(said.starts_with(&format!("HTTP/1.1 {status} ")), "{request:.60}: {said}");
            if !request.starts_with("no HTTP") {
                assert!(said.contains("content-type: application/problem+json"), "{said}");
            }
        }
    });
    assert_eq!(control.ports().len(), 2);
    hythe.stop().assert_clean(0);
}

#[test]
fn a_thousand_callers_at_once_are_answered_in_bounded_memory() {
    const SEATS: usize = 1024;
    let _busy = quiet::busy();
    let site = Site::new();
    let control = Control::new();
    let hythe = Hythe::of(&site.host, ANY).options(&control.option()).options("-p 7000:70").run();
    // A list that is longer than a socket's buffer.
    control.publish(&["127.0.0.1:9000-11999:1-3000/udp"]).unwrap();
    let before = process::resident_kib(hythe.pid());
    // To compare with.
    under_load(&site, &hythe.guest, 7000, 70, || pause(Duration::from_secs(3)));
    under_load(&site, &hythe.guest, 7000, 70, || {
        let mut callers: Vec<UnixStream> =
            (0..1000).map(|_| UnixStream::connect(&control.path).unwrap()).collect();
        for caller in &mut callers {
            caller.set_read_timeout(Some(PATIENCE)).unwrap();
            caller.write_all(b"GET /v1/ports HTTP/1.1\r\nconnection: close\r\n\r\n").unwrap();
        }
        // Nobody has read yet: lists are made as they are read.
        wait_until("all to be taken", || {
            process::descriptors(hythe.pid()).iter().filter(|name| name.starts_with("socket:")).count() > 4000
        });
        let grown = process::resident_kib(hythe.pid()).saturating_sub(before);
        assert!(grown < 64 << 10, "{grown} KiB for {} callers", callers.len());
        for caller in &mut callers {
            let mut answer = String::new();
            caller.read_to_string(&mut answer).unwrap();
            assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("\r\n0\r\n\r\n"));
            assert_eq!(answer.matches("\"id\"").count(), 3002);
        }
        drop(callers);
        // Those that say nothing have their seats, and the others are told so.
        wait_until("all seats to be free", || control.ask(Method::GET, "/v1/ports", None).is_ok());
        let silent: Vec<UnixStream> =
            (0..SEATS).map(|_| UnixStream::connect(&control.path).unwrap()).collect();
        for mut caller in &silent {
            // One that was sent away already is one of those that came while the list was asked for.
            let _ = caller.write_all(b"GET /v1/");
        }
        let refused = converse(&control.path, b"GET /v1/status HTTP/1.1\r\n\r\n");
        assert!(refused.starts_with("HTTP/1.1 503 ") && refused.contains("too many callers"), "{refused}");
        // They are left after a while, each with a word.
        for mut caller in &silent {
            caller.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut answer = String::new();
            let _ = caller.read_to_string(&mut answer);
            assert!(answer.starts_with("HTTP/1.1 408 ") || answer.starts_with("HTTP/1.1 503 "), "{answer}");
        }
        wait_until("a caller to be answered", || control.ask(Method::GET, "/v1/ports", None).is_ok());
    });
    hythe.stop().assert_clean(0);
}

#[test]
fn ten_thousand_ports_are_published_by_one_process() {
    let _busy = quiet::busy();
    let site = Site::new();
    let control = Control::new();
    // A descriptor each: containers have limits of 20,000, and a test must not need more.
    let hythe = Hythe::of(&site.host, Cell::new(Engine::IoUring, 1))
        .options(&control.option())
        .options("--always-listen -p 0.0.0.0:20000-29999:10000-19999")
        .run();
    assert_eq!(control.ports().len(), 10_000);
    let listening = site.host.command(&["ss", "-Hltn"]);
    assert_eq!(listening.lines().count(), 10_000);
    for port in [20_000, 24_321, 29_999] {
        let server = hythe.guest.listen(Family::V4.any(), port - 10_000);
        exchange(&call(&site.far, (Family::V4.host(), port), &server));
    }
    // One goes, and comes again; the others stay.
    let error = control.publish(&["25000:80"]).unwrap_err();
    assert_eq!(error.to_string(), "Bind for 0.0.0.0:25000 failed: port is already allocated");
    control.unpublish("0.0.0.0:25000:15000").unwrap();
    assert!(is_refused(&site.far, (Family::V4.host(), 25_000)));
    control.publish(&["0.0.0.0:25000:15000"]).unwrap();
    let server = hythe.guest.listen(Family::V4.any(), 15_000);
    exchange(&call(&site.far, (Family::V4.host(), 25_000), &server));
    let removed = control.unpublish("0.0.0.0:20000-29999:10000-19999").unwrap();
    assert_eq!((removed.len(), control.ports().len()), (10_000, 0));
    assert!(is_refused(&site.far, (Family::V4.host(), 20_000)));
    hythe.stop().assert_clean(0);
}

/// Joins TCP connections to a unix socket: what checks the API speaks TCP.
fn bridge(listener: TcpListener, path: PathBuf) {
    std::thread::spawn(move || {
        while let Ok((tcp, _)) = listener.accept() {
            let Ok(unix) = UnixStream::connect(&path) else { return };
            let (mut tcp_from, mut unix_to) = (tcp.try_clone().unwrap(), unix.try_clone().unwrap());
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut tcp_from, &mut unix_to);
                let _ = unix_to.shutdown(std::net::Shutdown::Write);
            });
            std::thread::spawn(move || {
                let (mut unix, mut tcp) = (unix, tcp);
                let _ = std::io::copy(&mut unix, &mut tcp);
                let _ = tcp.shutdown(std::net::Shutdown::Both);
            });
        }
    });
}

/// The description without what no checker can wait for: an answer that lasts as long as its reader.
fn checkable(description: &Path) -> String {
    let mut description: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(description).unwrap()).unwrap();
    let publish = &mut description["components"]["schemas"]["Publish"]["properties"];
    publish.as_object_mut().unwrap().remove("while_connected").expect("it is described");
    description.to_string()
}

#[test]
fn the_api_is_as_its_description_says() {
    let _busy = quiet::busy();
    let site = Site::new();
    let control = Control::new();
    // Names are asked of nobody, who refuses at once.
    let nobody = |mounts: &Mounts| mounts.resolv_conf("nameserver 127.0.0.1\n");
    let hythe = Hythe::of(&site.host, ANY).options(&control.option()).mounts(nobody).run();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let listener = site.host.listen(Family::V4.loopback(), 0);
    socket2::SockRef::from(&listener).set_read_timeout(None).unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    bridge(listener, control.path.clone());
    let checker = root.join("target/schemathesis/bin/schemathesis").display().to_string();
    let directory = Directory::new();
    let description = directory.path().join("openapi.json");
    fs::write(&description, checkable(&root.join("docs/openapi.json"))).unwrap();
    let description = description.display().to_string();
    // A specification may be one that is refused for what it means: no grammar in the description says which.
    let words = [
        &checker,
        "run",
        &description,
        "--url",
        &url,
        "--checks",
        "all",
        "--exclude-checks",
        "positive_data_acceptance",
        // gvproxy's way of telling what is wrong is a server's error, and events have no end.
        "--exclude-path-regex",
        "^/(services/|v1/events)",
        "--max-examples",
        "40",
        "--seed",
        "1",
        "--generation-database",
        "none",
        "--no-color",
    ];
    let (status, said) = Program::start(&site.host, &words.map(|word| word as &str)).end();
    assert!(status.success(), "{said}");
    let status: Status =
        serde_json::from_slice(&ask(&control.path, Method::GET, "/v1/status", None).unwrap()).unwrap();
    assert_eq!((status.pid, status.workers), (Some(hythe.pid() as u32), 2));
    assert!(hythe.is_running());
    hythe.stop().assert_clean(0);
}

#[test]
fn a_program_can_tell_problems_apart() {
    let site = Site::new();
    let control = Control::new();
    let hythe = Hythe::of(&site.host, ANY).options(&control.option()).options("-p 8000:80").run();
    let server = echo(hythe.guest.listen(Family::V4.any(), 80), 1);
    expect_echo(&site.far.connect((Family::V4.host(), 8000)).unwrap(), b"hello");
    server.finish();
    let AskError::Problem(problem) = control.publish(&["8000:81"]).unwrap_err() else { panic!() };
    assert_eq!(
        (problem.code, problem.status, problem.port.unwrap().host_port),
        (Code::PortAllocated, 409, 8000)
    );
    let AskError::Problem(problem) = control.unpublish("8001:80").unwrap_err() else { panic!() };
    assert_eq!((problem.code, problem.status), (Code::NotPublished, 404));
    hythe.stop().assert_clean(0);
}
