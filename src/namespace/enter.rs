//! Making the guest's namespace, or entering one that exists.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};
use nix::unistd::Uid;

use super::{Plan, Target};

/// The network namespace of the calling process.
const OWN: &str = "/proc/self/ns/net";

/// Makes or enters the namespace; the error says what to do.
pub fn enter(plan: &Plan) -> Result<(), String> {
    match &plan.target {
        Target::Run { .. } => make(plan.hostname.is_some()),
        Target::Path(path) => {
            let file = open(path)?;
            refuse_own(&file, &format!("--netns {}", path.display()))?;
            join(file, path, CloneFlags::CLONE_NEWNET)
        }
        Target::Process(pid) => {
            let path = |kind: &str| PathBuf::from(format!("/proc/{pid}/ns/{kind}"));
            let user = path("user");
            if !Uid::effective().is_root() && !same_file(&user, Path::new("/proc/self/ns/user")) {
                join(open(&user)?, &user, CloneFlags::CLONE_NEWUSER)?;
            }
            let net = path("net");
            let file = open(&net)?;
            refuse_own(&file, &format!("--pid {pid}"))?;
            join(file, &net, CloneFlags::CLONE_NEWNET)
        }
    }
}

/// A new network namespace, with mounts (and, where it is named, a host name) of its own.
pub(super) fn make(own_name: bool) -> Result<(), String> {
    if !Uid::effective().is_root() {
        new_user_namespace()?;
    }
    let mut flags = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS;
    flags.set(CloneFlags::CLONE_NEWUTS, own_name);
    unshare(flags).map_err(|error| {
        format!("a new network namespace cannot be made ({error}): it takes root, or user namespaces")
    })?;
    // Before anything else: nothing that is mounted here may be seen outside. The other way is left open.
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
        .map_err(|error| format!("the command's mounts cannot be parted from the host's ({error})"))
}

/// A user namespace in which this user is root: with the rights over the network namespace that comes next.
fn new_user_namespace() -> Result<(), String> {
    let (uid, gid) = (Uid::effective(), nix::unistd::Gid::effective());
    unshare(CloneFlags::CLONE_NEWUSER).map_err(|error| {
        format!(
            "a user namespace cannot be made ({error}): run as root, or allow it (sysctl user.max_user_namespaces, \
             kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)"
        )
    })?;
    let write = |file: &str, content: String| {
        std::fs::write(format!("/proc/self/{file}"), content)
            .map_err(|error| format!("the user namespace cannot be set up (/proc/self/{file}: {error})"))
    };
    write("setgroups", "deny".into())?;
    write("uid_map", format!("0 {uid} 1"))?;
    write("gid_map", format!("0 {gid} 1"))
}

/// Opens a namespace's file; whatever else a path may name (a FIFO that nobody writes) holds nobody up.
fn open(path: &Path) -> Result<File, String> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = file.map_err(|error| refused(path, &error))?;
    match fstatfs(&file) {
        Ok(system) if system.filesystem_type() == NSFS_MAGIC => Ok(file),
        _ => Err(format!(
            "cannot enter {}: is it a namespace? It is neither a file that `ip netns add` made nor one of /proc/PID/ns",
            path.display()
        )),
    }
}

/// hythe between the host and itself would take the host's network away from it.
fn refuse_own(file: &File, named: &str) -> Result<(), String> {
    let own = std::fs::metadata(OWN).map_err(|error| format!("{OWN}: {error}"))?;
    let theirs = file.metadata().map_err(|error| format!("{named}: {error}"))?;
    if (own.dev(), own.ino()) == (theirs.dev(), theirs.ino()) {
        return Err(format!(
            "{named} is the network namespace that hythe itself was started in: attach is for another one"
        ));
    }
    Ok(())
}

fn join(file: File, path: &Path, kind: CloneFlags) -> Result<(), String> {
    setns(file, kind).map_err(|error| refused(path, &error.into()))
}

fn refused(path: &Path, error: &io::Error) -> String {
    let hint = match error.kind() {
        io::ErrorKind::NotFound => "it is gone",
        io::ErrorKind::PermissionDenied => {
            "it takes root; as the owner of its user namespace, name a process in it (--pid PID) instead"
        }
        io::ErrorKind::InvalidInput => "it is a namespace of another kind",
        _ => "is it a network namespace?",
    };
    format!("cannot enter the namespace {} ({error}): {hint}", path.display())
}

fn same_file(a: &Path, b: &Path) -> bool {
    match (std::fs::read_link(a), std::fs::read_link(b)) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::Mode;

    #[test]
    fn what_is_no_namespace_is_said_to_be_none_and_holds_nobody_up() {
        let fifo = std::env::temp_dir().join(format!("hythe-enter-{}", std::process::id()));
        nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        for path in [fifo.as_path(), Path::new("/proc/self/status"), Path::new("/")] {
            let said = open(path).unwrap_err();
            assert!(said.contains("is it a namespace?"), "{said}");
        }
        std::fs::remove_file(&fifo).unwrap();
    }

    #[test]
    fn the_namespace_hythe_is_in_is_known_by_any_name() {
        for path in [OWN.to_string(), format!("/proc/{}/ns/net", std::process::id())] {
            let file = open(Path::new(&path)).unwrap();
            let said = refuse_own(&file, "--netns x").unwrap_err();
            assert!(said.starts_with("--netns x is the network namespace"), "{said}");
        }
        let other = open(Path::new("/proc/self/ns/mnt")).unwrap();
        refuse_own(&other, "--netns x").unwrap();
    }
}
