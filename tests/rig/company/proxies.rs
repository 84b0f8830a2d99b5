//! Proxies that others wrote, as Debian has them, at the company's address 198.51.100.1 (proxy.test).

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;

use super::{Company, names};
use crate::rig::directory::Directory;
use crate::rig::mounts::Mounts;
use crate::rig::netns::Netns;
use crate::rig::program::Program;
use crate::rig::site::Family;
use crate::rig::wait::{PATIENCE, wait_for, wait_until, wait_within};

/// Who may use a proxy: `USER` with `PASSWORD`, or everybody.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Asks {
    Nothing,
    Basic,
    Digest,
}

/// Letters that a URL has to write in another way.
pub const USER: &str = "ann@company";
pub const PASSWORD: &str = "pass:w/rd %1";
/// The same in a URL.
pub const IN_URL: &str = "ann%40company:pass%3Aw%2Frd%20%251";

/// What the proxy that asks for Digest calls itself.
const REALM: &str = "the company";

/// The ports of the proxies.
pub const PORT: u16 = 3128;
pub const TLS_PORT: u16 = 3130;
pub const SOCKS_PORT: u16 = 1080;

/// A running proxy, and what it has written down.
pub struct Proxy {
    _program: Program,
    _directory: Directory,
    log: PathBuf,
}

impl Proxy {
    /// Starts a program that sees the company's names, and waits until it serves.
    fn start(netns: &Netns, directory: Directory, words: &[&str], port: u16) -> Self {
        // A helper of a proxy before, forked as that one was ended, may hold its port for a moment.
        let at = SocketAddr::new(Family::V4.far(), port);
        wait_until("the proxy's port to be free", || netns.run(|| TcpListener::bind(at).is_ok()));
        // Mounts are those of a thread and of what it starts.
        let started = std::thread::scope(|scope| {
            let start = || {
                let mounts = Mounts::unshare();
                names(&mounts);
                mounts.shared_memory();
                Program::start(netns, words)
            };
            scope.spawn(start).join()
        });
        let log = directory.path().join("log");
        let proxy = Self { _program: started.unwrap(), log, _directory: directory };
        wait_until(words[0], || netns.connect((Family::V4.far(), port)).is_ok());
        proxy
    }

    /// squid(8). It denies CONNECT to port 80 and all of forbidden.origin.test, and serves TLS at [`TLS_PORT`].
    pub fn squid(company: &Company, asks: Asks) -> Self {
        let directory = Directory::new();
        let path = directory.path().display().to_string();
        let helpers = "/usr/lib/squid";
        let authentication = match asks {
            Asks::Nothing => String::new(),
            Asks::Basic => {
                let hash = company.outside.command(&["openssl", "passwd", "-apr1", PASSWORD]);
                directory.file("passwords", &format!("{USER}:{hash}"));
                format!(
                    "auth_param basic program {helpers}/basic_ncsa_auth {path}/passwords\nauth_param basic children 1\n"
                )
            }
            Asks::Digest => {
                let secret = directory.file("secret", &format!("{USER}:{REALM}:{PASSWORD}"));
                let hash = company.outside.command(&["openssl", "md5", "-r", &secret.display().to_string()]);
                let hash = hash.split(' ').next().unwrap();
                directory.file("passwords", &format!("{USER}:{REALM}:{hash}\n"));
                format!(
                    "auth_param digest program {helpers}/digest_file_auth -c {path}/passwords
auth_param digest children 1
auth_param digest realm {REALM}
"
                )
            }
        };
        let allow = match asks {
            Asks::Nothing => "http_access allow all",
            _ => "acl users proxy_auth REQUIRED\nhttp_access allow users",
        };
        let certificates = company.certificates().display().to_string();
        let address = Family::V4.far();
        let config = format!(
            "{authentication}
http_port {address}:{PORT}
https_port {address}:{TLS_PORT} tls-cert={certificates}/server.pem tls-key={certificates}/server.key
visible_hostname proxy.test
dns_nameservers {address}
acl to_http port 80
acl forbidden dstdomain forbidden.origin.test
http_access deny CONNECT to_http
http_access deny forbidden
{allow}
http_access deny all
http_upgrade_request_protocols websocket allow all
cache deny all
logformat names %rm %ru %>Hs
access_log stdio:{path}/log names
buffered_logs off
cache_log {path}/cache.log
cache_store_log none
pid_filename none
netdb_filename none
pinger_enable off
coredump_dir {path}
shutdown_lifetime 0 seconds
max_filedescriptors 1024
"
        );
        let file = directory.file("squid.conf", &config).display().to_string();
        Self::start(&company.site.far, directory, &["squid", "-N", "-f", &file], PORT)
    }

    /// tinyproxy(8), with Basic or without.
    pub fn tinyproxy(company: &Company, asks: Asks) -> Self {
        let directory = Directory::new();
        // It knows no way to write such letters as PASSWORD has.
        let authentication = if asks == Asks::Basic { "BasicAuth ann company" } else { "" };
        let config = format!(
            "{authentication}
Port {PORT}
Listen {}
Timeout 600
LogLevel Connect
LogFile \"{}/log\"
MaxClients 100
",
            Family::V4.far(),
            directory.path().display()
        );
        let file = directory.file("tinyproxy.conf", &config).display().to_string();
        Self::start(&company.site.far, directory, &["tinyproxy", "-d", "-c", &file], PORT)
    }

    /// microsocks(1), a SOCKS5 proxy, with a password or without.
    pub fn microsocks(company: &Company, asks: Asks) -> Self {
        let directory = Directory::new();
        let authentication = match asks {
            Asks::Nothing => String::new(),
            _ => format!("-u '{USER}' -P '{PASSWORD}'"),
        };
        let address = Family::V4.far();
        let log = directory.path().join("log").display().to_string();
        let script = format!("exec microsocks -i {address} -p {SOCKS_PORT} {authentication} >{log} 2>&1");
        Self::start(&company.site.far, directory, &["sh", "-c", &script], SOCKS_PORT)
    }

    /// What it has written down.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until it has written all of `words` into one line.
    pub fn wait_for_line(&self, words: &[&str]) {
        let found = |log: &String| log.lines().any(|line| words.iter().all(|word| line.contains(word)));
        let mut log = String::new();
        let seen = wait_within(PATIENCE, || {
            log = self.log();
            found(&log).then_some(())
        });
        assert!(seen.is_some(), "no line with {words:?} in the proxy's log:\n{log}");
    }

    /// Nothing in its log names an origin by its address.
    pub fn assert_names_alone(&self) {
        let log = wait_for("the proxy's log", || Some(self.log()).filter(|log| !log.is_empty()));
        for address in ["198.18.9.", "2001:db8:9:"] {
            assert!(!log.contains(address), "{address} in the proxy's log:\n{log}");
        }
    }
}

/// Options by which everything goes by one proxy of HTTP.
pub const BY_PROXY: &str = "--proxy-http http://198.51.100.1:3128 --proxy-https http://198.51.100.1:3128";
