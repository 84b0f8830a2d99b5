//! The real docker-proxy, which serves the port inside the guest as it would without hythe.
//!
//! It inherits what dockerd gave (see [`super::parent`]) and gets the same words, so it is whatever the Engine expects. It is
//! killed by the kernel when this process ends before it: nothing is left behind, not even by SIGKILL.

use std::ffi::OsString;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid, getppid};
use tokio::process::{Child, Command};
use tokio::time::timeout;

/// Names the real docker-proxy, where it is none of these.
const VARIABLE: &str = "HYTHE_REAL_DOCKER_PROXY";
const PLACES: &[&str] = &["/usr/bin", "/usr/sbin", "/usr/libexec/docker", "/usr/local/bin"];

/// Is set for the child, so that a wrapper which leads back here is no endless chain.
const MARK: &str = "HYTHE_DOCKER_PROXY_STARTED";

/// How long it may take to end once it was told to.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why it does not run.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// None is there.
    #[error(
        "found no docker-proxy: set {VARIABLE} to the path of the Engine's own, where dockerd is started"
    )]
    Missing,
    /// What was found leads back.
    #[error(
        "what was started as docker-proxy is hythe-docker-proxy again: set {VARIABLE} to the path of the Engine's own"
    )]
    Circle,
    /// It cannot be executed.
    #[error("cannot start {}: {error}", .path.display())]
    Start {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// Finds it: what the variable names, else the first that there is, but never this program.
pub fn find() -> Result<PathBuf, ProxyError> {
    if std::env::var_os(MARK).is_some() {
        return Err(ProxyError::Circle);
    }
    if let Some(path) = std::env::var_os(VARIABLE).filter(|path| !path.is_empty()) {
        return Ok(path.into());
    }
    let searched = std::env::var_os("PATH").unwrap_or_default();
    let places = PLACES.iter().map(PathBuf::from).chain(std::env::split_paths(&searched));
    first_in(places, Path::new("/proc/self/exe")).ok_or(ProxyError::Missing)
}

fn first_in(places: impl Iterator<Item = PathBuf>, own: &Path) -> Option<PathBuf> {
    let identity = |path: &Path| std::fs::metadata(path).ok().map(|file| (file.dev(), file.ino()));
    let own = identity(own);
    let is_program = |path: &Path| {
        let file = std::fs::metadata(path);
        file.is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
    };
    let mut paths = places.filter(|place| place.is_absolute()).map(|place| place.join("docker-proxy"));
    paths.find(|path| is_program(path) && identity(path) != own)
}

/// It runs.
pub struct Proxy(Child);

impl Proxy {
    /// Starts it with the words that this program got.
    #[expect(unsafe_code, reason = "only the child itself can ask for the signal")]
    pub fn start(path: &Path, words: &[OsString]) -> Result<Self, ProxyError> {
        let own = getpid();
        let mut command = Command::new(path);
        command.args(words).env(MARK, "1").kill_on_drop(true);
        let wait_no_longer_than_us = move || {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            // Who ended before this was asked for is not noticed.
            if getppid() == own { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
        };
        // SAFETY: between fork and execute it makes two system calls, and allocates nothing.
        unsafe { command.pre_exec(wait_no_longer_than_us) };
        let child = command.spawn();
        child.map(Self).map_err(|error| ProxyError::Start { path: path.to_path_buf(), error })
    }

    /// Waits for its end.
    pub async fn ended(&mut self) -> u8 {
        self.0.wait().await.map_or(1, status_of)
    }

    /// Passes a signal on, and waits for its end, which comes.
    pub async fn stop(&mut self, signal: Signal) -> u8 {
        if let Some(pid) = self.0.id() {
            let _ = kill(Pid::from_raw(pid as i32), signal);
        }
        if let Ok(status) = timeout(PATIENCE, self.ended()).await {
            return status;
        }
        let _ = self.0.start_kill();
        self.ended().await
    }
}

/// As shells tell it.
fn status_of(status: ExitStatus) -> u8 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default()) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};

    #[test]
    fn the_first_that_is_a_program_and_not_this_one_is_taken() {
        let base = std::env::temp_dir().join(format!("hythe-proxy-{}", std::process::id()));
        let place = |name: &str| base.join(name);
        let names = ["missing", "directory", "plain", "own", "real", "later"];
        for name in &names[1..] {
            fs::create_dir_all(place(name)).unwrap();
        }
        fs::create_dir(place("directory").join("docker-proxy")).unwrap();
        let own = base.join("hythe-docker-proxy");
        for (file, mode) in [
            (own.clone(), 0o755),
            (place("plain").join("docker-proxy"), 0o644),
            (place("real").join("docker-proxy"), 0o755),
            (place("later").join("docker-proxy"), 0o755),
        ] {
            fs::write(&file, "#!/bin/sh\n").unwrap();
            fs::set_permissions(&file, Permissions::from_mode(mode)).unwrap();
        }
        std::os::unix::fs::symlink(&own, place("own").join("docker-proxy")).unwrap();
        let relative = std::iter::once(PathBuf::from("."));
        let found = first_in(relative.chain(names.iter().map(|name| place(name))), &own);
        assert_eq!(found, Some(place("real").join("docker-proxy")));
        assert_eq!(first_in(names[..4].iter().map(|name| place(name)), &own), None);
        fs::remove_dir_all(base).unwrap();
    }
}
