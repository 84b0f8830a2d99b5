//! The program that dockerd starts, between a gateway that the test plays and a docker-proxy that is a script.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::engine::SHIM;
use crate::rig::directory::Directory;
use crate::rig::process;
use crate::rig::wait::{PATIENCE, pause, wait_for, wait_until};

/// Says that it serves, and ends in order when it is interrupted.
const SERVES: &str = "trap 'exit 0' INT; printf '0\\n' >&3; exec 3>&-; while :; do sleep 0.02; done";

/// Does what a variable says. It is not written by a test: a file that somebody writes cannot be executed, and what is being
/// started beside this has copies of all descriptors.
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/docker/docker-proxy");

const TCP: &str = "-proto tcp -host-ip 0.0.0.0 -host-port 8000 -container-ip 172.17.0.2 -container-port 80";

/// A gateway, and the files of a docker-proxy.
struct Stage {
    gateway: TcpListener,
    directory: Directory,
}

/// The program, started as dockerd starts it.
struct Shim {
    child: Child,
    answer: ChildStdout,
    mark: String,
}

/// A request that has come to the gateway.
struct Asked {
    body: String,
    stream: TcpStream,
}

impl Stage {
    fn new() -> Self {
        Self { gateway: TcpListener::bind("127.0.0.1:0").unwrap(), directory: Directory::new() }
    }

    /// Where the script writes with which words it was started.
    fn words(&self) -> PathBuf {
        self.directory.path().join("words")
    }

    /// Starts it with a docker-proxy that does what `script` says.
    fn start(&self, words: &str, script: &str) -> Shim {
        self.start_with(words, SCRIPT, script)
    }

    fn start_with(&self, words: &str, docker_proxy: &str, script: &str) -> Shim {
        let mut command = Command::new("sh");
        command.args(["-c", r#"exec "$0" "$@" 3>&1 1>/dev/null"#, SHIM]).args(words.split_whitespace());
        let mark = format!("HYTHE_TEST=shim.{}", self.directory.path().display());
        let (name, value) = mark.split_once('=').unwrap();
        command
            .env(name, value)
            .env("HYTHE_GATEWAY", self.gateway.local_addr().unwrap().to_string())
            .env("HYTHE_REAL_DOCKER_PROXY", docker_proxy)
            .env("HYTHE_TEST_SCRIPT", script)
            .env("HYTHE_TEST_WORDS", self.words())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let answer = child.stdout.take().unwrap();
        Shim { child, answer, mark }
    }

    fn accept(&self) -> Asked {
        self.gateway.set_nonblocking(true).unwrap();
        let (stream, _) = wait_for("the program to ask", || self.gateway.accept().ok());
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut reader = BufReader::new(&stream);
        let mut length = 0;
        loop {
            let mut line = String::new();
            assert!(reader.read_line(&mut line).unwrap() > 0, "the program has ended the connection");
            if let Some(value) = line.strip_prefix("content-length: ") {
                length = value.trim().parse().unwrap();
            }
            if line == "\r\n" {
                break;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        drop(reader);
        Asked { body: String::from_utf8(body).unwrap(), stream }
    }

    fn grant(&self) -> Asked {
        let asked = self.accept();
        let line =
            r#"{"ports":[{"id":1,"address":"0.0.0.0","host_port":8000,"guest_port":8000,"protocol":"tcp"}]}"#;
        let head =
            "HTTP/1.1 201 Created\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
        (&asked.stream).write_all(format!("{head}{:x}\r\n{line}\n\r\n", line.len() + 1).as_bytes()).unwrap();
        asked
    }
}

impl Asked {
    /// Waits until the program has ended the connection.
    fn expect_end(mut self) {
        let mut rest = Vec::new();
        let ended = self.stream.read_to_end(&mut rest);
        let is_reset = |error: &std::io::Error| error.kind() == std::io::ErrorKind::ConnectionReset;
        assert!(ended.as_ref().err().is_none_or(is_reset), "{ended:?}");
        assert!(rest.is_empty());
    }
}

impl Shim {
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// What is said to dockerd.
    fn answer(&mut self) -> String {
        let mut answer = String::new();
        self.answer.read_to_string(&mut answer).unwrap();
        answer
    }

    fn end(&mut self) -> ExitStatus {
        wait_for("the program to end", || self.child.try_wait().unwrap())
    }

    fn expect_nothing_left(&self) {
        wait_until("nothing to be left", || process::with_environment(&self.mark).is_empty());
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_real_docker_proxy_is_started_when_the_port_is_granted_and_answers_itself() {
    let stage = Stage::new();
    let mut shim = stage.start(&format!("{TCP} -use-listen-fd"), SERVES);
    let asked = stage.accept();
    assert_eq!(asked.body, r#"{"publish":["0.0.0.0:8000:8000/tcp"],"while_connected":true}"#);
    pause(std::time::Duration::from_millis(100));
    assert!(!stage.words().exists(), "it is started before the port is granted");
    // One that goes before it has answered is told to the user: nothing was promised.
    drop(asked);
    assert!(shim.answer().starts_with("1\nno hythe answers"));
    assert_eq!(shim.end().code(), Some(1));

    let mut shim = stage.start(&format!("{TCP} -use-listen-fd"), SERVES);
    let asked = stage.grant();
    assert_eq!(shim.answer(), "0\n");
    let words = fs::read_to_string(stage.words()).unwrap();
    assert_eq!(words.trim(), format!("{TCP} -use-listen-fd"));
    shim.signal(Signal::SIGINT);
    asked.expect_end();
    assert_eq!(shim.end().code(), Some(0));
    shim.expect_nothing_left();
}

#[test]
fn nothing_is_left_when_it_is_killed() {
    let stage = Stage::new();
    let mut shim = stage.start(TCP, SERVES);
    let asked = stage.grant();
    assert_eq!(shim.answer(), "0\n");
    shim.signal(Signal::SIGKILL);
    asked.expect_end();
    shim.end();
    shim.expect_nothing_left();
}

#[test]
fn a_docker_proxy_that_fails_speaks_for_itself_and_the_port_is_given_back() {
    let stage = Stage::new();
    let mut shim = stage.start(TCP, "printf '1\\nits own words' >&3; exit 7");
    let asked = stage.grant();
    assert_eq!(shim.answer(), "1\nits own words");
    asked.expect_end();
    assert_eq!(shim.end().code(), Some(7));
}

#[test]
fn a_docker_proxy_that_cannot_be_started_is_named() {
    let stage = Stage::new();
    let mut shim = stage.start_with(TCP, "/nowhere/docker-proxy", "");
    let asked = stage.grant();
    assert_eq!(
        shim.answer(),
        "1\ncannot start /nowhere/docker-proxy: No such file or directory (os error 2)"
    );
    assert_eq!(shim.end().code(), Some(1));
    asked.expect_end();
}

#[test]
fn one_that_does_not_end_is_ended() {
    let stage = Stage::new();
    let mut shim =
        stage.start(TCP, "trap '' INT TERM; printf '0\\n' >&3; exec 3>&-; while :; do sleep 0.02; done");
    let asked = stage.grant();
    assert_eq!(shim.answer(), "0\n");
    shim.signal(Signal::SIGTERM);
    asked.expect_end();
    assert_eq!(shim.end().code(), Some(128 + 9));
    shim.expect_nothing_left();
}

#[test]
fn an_interruption_before_the_port_is_granted_ends_it() {
    let stage = Stage::new();
    let mut shim = stage.start(TCP, SERVES);
    let asked = stage.accept();
    shim.signal(Signal::SIGINT);
    asked.expect_end();
    assert_eq!(shim.end().code(), Some(130));
    assert!(!stage.words().exists());
}

#[test]
fn what_hythe_cannot_publish_is_refused_without_asking() {
    for (words, expected) in [
        (
            TCP.replace("tcp", "sctp"),
            "sctp cannot be published: hythe relays TCP, UDP and ICMP echo, and has no SCTP",
        ),
        (TCP.replace("-host-port 8000", ""), "-host-port is missing: dockerd starts this program"),
        (TCP.replace("172.17.0.2", "container"), "-container-ip is no address: 'container'"),
    ] {
        let stage = Stage::new();
        let mut shim = stage.start(&words, SERVES);
        let answer = shim.answer();
        assert!(answer.starts_with("1\n") && answer.contains(expected), "{answer}");
        assert_eq!(shim.end().code(), Some(1));
        stage.gateway.set_nonblocking(true).unwrap();
        assert!(stage.gateway.accept().is_err(), "the gateway was asked");
    }
}

#[test]
fn a_way_back_to_itself_is_no_docker_proxy() {
    let stage = Stage::new();
    let mut shim = stage.start(TCP, &format!("exec {SHIM} \"$@\""));
    let asked = stage.grant();
    let answer = shim.answer();
    assert!(answer.contains("is hythe-docker-proxy again: set HYTHE_REAL_DOCKER_PROXY"), "{answer}");
    asked.expect_end();
}
