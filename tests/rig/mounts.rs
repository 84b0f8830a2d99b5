//! Files that one process sees differently: mounts in a mount namespace of its own, gone with it.
#![expect(clippy::unused_self, reason = "whoever has a `Mounts` has parted from everybody else's")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::netns::Netns;

/// An empty file system of the calling thread's own lies here once [`Mounts::unshare`] was called.
const STAGE: &str = "/mnt";
/// Where programs are offered to users who may not see the build's directory.
const OFFERED: &str = "/mnt/hythe";

/// The mounts of the calling thread and of what it starts.
pub struct Mounts(());

impl Mounts {
    /// Parts the calling thread from everybody else's mounts.
    pub fn unshare() -> Self {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount(Some("none"), STAGE, Some("tmpfs"), MsFlags::empty(), Some("mode=755")).unwrap();
        Self(())
    }

    fn bind(from: &Path, to: &Path) {
        let none: Option<&str> = None;
        mount(Some(from), to, none, MsFlags::MS_BIND, none)
            .unwrap_or_else(|error| panic!("mount {} at {}: {error}", from.display(), to.display()));
    }

    /// Shows a program to every user; returns its path.
    pub fn offer_program(&self, program: &Path) -> &'static Path {
        fs::write(OFFERED, "").unwrap();
        Self::bind(program, Path::new(OFFERED));
        Path::new(OFFERED)
    }

    /// /dev/net/tun for everybody, as udev makes it.
    pub fn offer_tun(&self) {
        let device = Path::new(STAGE).join("tun");
        mknod(&device, SFlag::S_IFCHR, Mode::empty(), makedev(10, 200)).unwrap();
        fs::set_permissions(&device, fs::Permissions::from_mode(0o666)).unwrap();
        Self::bind(&device, Path::new("/dev/net/tun"));
    }

    /// No /dev/net/tun.
    pub fn hide_tun(&self) {
        let empty = Path::new(STAGE).join("empty");
        fs::create_dir(&empty).unwrap();
        Self::bind(&empty, Path::new("/dev/net"));
    }

    /// Shared memory of its own: programs of one kind name theirs alike, whatever namespace they serve (shm_open(3)).
    pub fn shared_memory(&self) {
        let none: Option<&str> = None;
        mount(Some("none"), "/dev/shm", Some("tmpfs"), MsFlags::empty(), none).unwrap();
    }

    /// Gives a network namespace a name: a file that exists.
    pub fn name(&self, netns: &Netns, file: &Path) {
        Self::bind(&netns.path(), file);
    }

    /// Another /etc/resolv.conf.
    pub fn resolv_conf(&self, content: &str) {
        let file = Path::new(STAGE).join("resolv.conf");
        fs::write(&file, content).unwrap();
        let target = fs::canonicalize("/etc/resolv.conf").unwrap();
        Self::bind(&file, &target);
    }

    /// Another /etc, with nothing in it but these files and links (`name -> target`). They can be replaced and renamed,
    /// as whoever keeps a host does.
    pub fn etc(&self, files: &[(&str, &str)]) {
        let directory = Path::new(STAGE).join("etc");
        fs::create_dir(&directory).unwrap();
        for (name, content) in files {
            match name.split_once(" -> ") {
                Some((name, target)) => std::os::unix::fs::symlink(target, directory.join(name)).unwrap(),
                None => fs::write(directory.join(name), content).unwrap(),
            }
        }
        Self::bind(&directory, Path::new("/etc"));
    }
}
