//! A host in a company: what is outside is reached through the company's proxy, or not at all.
//!
//! ```text
//! guest ── hythe ── host ──── company ──── origins
//!                             proxies      *.origin.test, websocket.origin.test
//!                             names
//!                             direct.test
//! ```
//! The host has no route to the origins, and they have none back. The proxies are those of Debian, or of the test's own
//! ([`super::http`]).

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::cell::Cell;
use super::directory::Directory;
use super::dns_server::DnsServer;
use super::hythe::{Hythe, Start};
use super::mounts::Mounts;
use super::netns::Netns;
use super::process;
use super::program::Program;
use super::site::{Family, Site, wire};
use super::wait::{wait_for, wait_until};

pub mod proxies;

const ORIGIN: &str = include_str!("origin.py");
/// Debian's, which has what tests/setup installs.
pub const PYTHON: &str = "/usr/bin/python3";

/// The network of the origins ([`Family::elsewhere`]), in which `.1` is any name of origin.test.
const ORIGINS: u8 = 9;

/// The namespaces and names of a company.
pub struct Company {
    pub site: Site,
    /// Where the origins are.
    pub outside: Netns,
    pub names: DnsServer,
    /// Certificates: `ca.pem`, `server.pem` and `server.key` for all names of origin.test, and for proxy.test.
    pub directory: Directory,
}

/// The running origins.
pub struct Origins {
    _programs: Vec<Program>,
    directory: Directory,
}

/// A request that an origin has got.
#[derive(Debug)]
pub struct Request {
    /// GET / HTTP/1.1
    pub line: String,
    /// In their order; names in small letters.
    pub headers: Vec<(String, String)>,
    /// The version of TLS, or nothing.
    pub tls: String,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

impl Company {
    pub fn new() -> Self {
        let (site, outside) = (Site::new(), Netns::new());
        wire(1, &site.far, &outside);
        site.far.sysctl("ipv4/ip_forward", "0");
        site.far.sysctl("ipv6/conf/all/forwarding", "0");
        for family in [Family::V4, Family::V6] {
            let network = family.elsewhere_network(ORIGINS);
            let (next, option) =
                if family == Family::V4 { ("10.77.1.1", "") } else { ("fd77:0:0:1::1", "-6 ") };
            site.host.ip(&format!("{option}route add unreachable {network}"));
            site.far.ip(&format!("{option}route add {network} via {next}"));
            for host in [1, 2] {
                let plain = if family == Family::V4 { 32 } else { 128 };
                outside.ip(&format!("addr add {}/{plain} dev lo", family.elsewhere(ORIGINS, host)));
            }
        }
        let names = DnsServer::start(&site.far, Family::V4.far(), 1);
        Self { site, outside, names, directory: Directory::new() }
    }

    /// A start of hythe on the host, which asks the company's names.
    pub fn hythe(&self, cell: Cell) -> Start<'_> {
        Hythe::of(&self.site.host, cell).mounts(names)
    }

    /// An address of the origins.
    pub fn origin(family: Family) -> std::net::IpAddr {
        family.elsewhere(ORIGINS, 1)
    }

    /// The certificates, made once.
    pub fn certificates(&self) -> &Path {
        let path = self.directory.path();
        if !path.join("server.pem").exists() {
            let script = "
                key='-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes'
                openssl req -x509 $key -keyout ca.key -out ca.pem -subj '/CN=CA of the tests' -days 2
                openssl req -new $key -keyout server.key -out request.pem -subj /CN=origin.test
                printf 'subjectAltName=DNS:*.origin.test,DNS:proxy.test,DNS:*.direct.test,IP:198.18.9.1' >names
                openssl x509 -req -in request.pem -CA ca.pem -CAkey ca.key -out server.pem -days 2 -extfile names
                chmod a+r server.key";
            self.outside.command(&["sh", "-e", "-c", &format!("cd {}; {script}", path.display())]);
        }
        path
    }

    /// Starts the servers of origin.test. `files` is a script that fills the directories files/ and git/.
    pub fn origins(&self, files: &str) -> Origins {
        let directory = Directory::new();
        let path = directory.path().display().to_string();
        directory.file("origin.py", ORIGIN);
        directory.file("requests", "");
        let certificates = self.certificates().display();
        let prepare = format!("cd {path}; mkdir files git; cp {certificates}/server.* .; {files}");
        self.outside.command(&["sh", "-e", "-c", &prepare]);
        let script = format!("{path}/origin.py");
        let start = |words: &[&str]| {
            let program = Program::start(&self.outside, &[&[PYTHON, &script, &path], words].concat());
            wait_until("an origin", || {
                let address: std::net::IpAddr = words[1].parse().unwrap();
                self.outside.connect((address, 443)).is_ok()
            });
            program
        };
        let [v4, v6] = [Family::V4, Family::V6].map(|family| Self::origin(family).to_string());
        let socket = Family::V4.elsewhere(ORIGINS, 2).to_string();
        let programs = vec![start(&["http", &v4, &v6]), start(&["websocket", &socket])];
        Origins { _programs: programs, directory }
    }
}

impl Origins {
    /// What they have been asked so far.
    pub fn requests(&self) -> Vec<Request> {
        let text = fs::read_to_string(self.directory.path().join("requests")).unwrap();
        let request = |line: &str| {
            let entry: Value = serde_json::from_str(line).unwrap();
            Request {
                line: entry["line"].as_str().unwrap().to_string(),
                headers: serde_json::from_value(entry["headers"].clone()).unwrap(),
                tls: entry["tls"].as_str().unwrap().to_string(),
            }
        };
        text.lines().map(request).collect()
    }
}

/// The company's nameserver, for whoever starts something.
pub fn names(mounts: &Mounts) {
    mounts.resolv_conf(&format!("nameserver {}\n", Family::V4.far()));
}

/// What a shell script prints in the guest, as its users see names and networks; it must end well.
pub fn in_guest(hythe: &Hythe, script: &str) -> String {
    let output = try_in_guest(hythe, script);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {}: {said}", script.trim(), output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The same, however it ends.
pub fn try_in_guest(hythe: &Hythe, script: &str) -> std::process::Output {
    // What `hythe run` has started sees the guest's resolv.conf.
    let command = wait_for("the guest's command", || {
        let is_command = |pid: &i32| process::name(*pid).is_some_and(|name| name == "cat");
        hythe.guest.processes().into_iter().find(is_command)
    });
    let target = command.to_string();
    let words = ["--target", &target, "--mount", "--net", "--wd=/", "--", "sh", "-e", "-c", script];
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    Command::new("nsenter")
        .args(words)
        .env_clear()
        .env("PATH", path)
        .env("HOME", "/nonexistent")
        .output()
        .unwrap()
}
