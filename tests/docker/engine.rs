//! A Docker Engine in a guest: dockerd and all that it starts, in namespaces of the test's own, gone with the handle.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::rig::directory::Directory;
use crate::rig::netns::Netns;
use crate::rig::process;
use crate::rig::program::Program;
use crate::rig::site::Family;
use crate::rig::wait::{PATIENCE, wait_until, wait_within};

/// The program that dockerd starts.
pub const SHIM: &str = env!("CARGO_BIN_EXE_hythe-docker-proxy");

/// Which Engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Version {
    V26,
    V28,
}

impl Version {
    fn parts(self) -> PathBuf {
        let name = if self == Self::V26 { "engine26" } else { "engine28" };
        Path::new(env!("CARGO_MANIFEST_DIR")).join("target/docker/parts").join(name)
    }
}

/// A running Engine, with an image `nginx`.
pub struct Engine {
    /// Ends when it is taken.
    program: Option<Program>,
    parts: PathBuf,
    directory: Directory,
    cgroup: String,
}

impl Engine {
    /// Starts one in a guest; its ports are asked for at the gateway.
    pub fn start(version: Version, guest: &Netns) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let cgroup = format!("hythe-docker-{}-{number}", std::process::id());
        let parts = version.parts();
        assert!(parts.is_dir(), "{} is missing (tests/setup docker fetches it)", parts.display());
        let directory = Directory::new();
        let program = Program::start(
            guest,
            &[
                "unshare",
                "--mount",
                "--pid",
                "--fork",
                "--mount-proc",
                "--kill-child",
                "--",
                concat!(env!("CARGO_MANIFEST_DIR"), "/tests/docker/engine"),
                parts.to_str().unwrap(),
                directory.path().to_str().unwrap(),
                &Family::V4.gateway().to_string(),
                "--userland-proxy-path",
                SHIM,
                "--cgroup-parent",
                &format!("/{cgroup}"),
            ],
        );
        let engine = Self { program: Some(program), parts, directory, cgroup };
        wait_until("dockerd to answer", || engine.output(&["version"]).status.success());
        let image = engine.parts.with_file_name("nginx.tar");
        let command = r#"CMD ["nginx", "-g", "daemon off;"]"#;
        engine.docker(&["import", "-c", command, "-c", "EXPOSE 80", image.to_str().unwrap(), "nginx:latest"]);
        engine
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.parts.join("usr/bin/docker"));
        let socket = self.directory.path().join("docker.sock");
        command.arg("--host").arg(format!("unix://{}", socket.display())).args(words).stdin(Stdio::null());
        // Nothing of this user's is read.
        command.env("DOCKER_CONFIG", self.directory.path());
        command
    }

    /// docker(1), to its end.
    pub fn output(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// What docker(1) prints, which must end well.
    pub fn docker(&self, words: &[&str]) -> String {
        let output = self.output(words);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "docker {words:?}: {}: {said}", output.status);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A command line of docker(1)'s documentation, word for word.
    pub fn line(&self, line: &str) -> String {
        self.docker(&words_of(line))
    }

    /// The same for one that stays in the foreground.
    pub fn foreground(&self, line: &str) -> std::process::Child {
        let mut command = self.command(&words_of(line));
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    /// What a shell in a container prints. It is asked again until it ends well.
    pub fn inside(&self, container: &str, script: &str) -> String {
        let mut said = String::new();
        let ended_well = wait_within(PATIENCE, || {
            let output = self.output(&["exec", container, "sh", "-c", script]);
            said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            output.status.success().then_some(())
        });
        assert!(ended_well.is_some(), "{container}: {script}: {said}");
        said
    }

    /// Processes of the program that dockerd starts for each binding.
    pub fn shims(&self) -> Vec<i32> {
        let first = self.first_process();
        let is_shim = |pid: &i32| {
            fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|program| program == Path::new(SHIM))
        };
        first.into_iter().flat_map(process::children).filter(is_shim).collect()
    }

    /// Ends dockerd, and with it everything that runs in its namespaces.
    pub fn kill(&self) {
        if let Some(first) = self.first_process() {
            kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
        }
    }

    /// dockerd.
    fn first_process(&self) -> Option<i32> {
        process::children(self.program.as_ref()?.pid()).first().copied()
    }
}

/// The words behind `docker`.
fn words_of(line: &str) -> Vec<&str> {
    line.strip_prefix("docker ").unwrap().split_whitespace().collect()
}

impl Drop for Engine {
    fn drop(&mut self) {
        // With the first process of their namespace all others end.
        if let Some(first) = self.first_process() {
            let _ = kill(Pid::from_raw(first), Signal::SIGKILL);
        }
        if let Some(program) = self.program.take() {
            let (_, said) = program.end();
            if std::thread::panicking() {
                let lines: Vec<&str> = said.lines().filter(|line| !line.contains("level=info")).collect();
                eprintln!("--- dockerd said:\n{}\n---", lines.join("\n"));
            }
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let roots = mounts
            .lines()
            .filter(|line| line.contains(" cgroup2 "))
            .filter_map(|line| line.split(' ').nth(1));
        for root in roots {
            remove_cgroup(&Path::new(root).join(&self.cgroup));
        }
    }
}

/// A cgroup goes when no other is in it.
fn remove_cgroup(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    let _ = fs::remove_dir(path);
}
