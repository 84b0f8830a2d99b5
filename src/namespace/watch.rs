//! The end of a namespace that hythe is attached to.
//!
//! hythe's own helper keeps the namespace alive, so its end shows only in what named it: the file that `ip netns del`
//! removes, or the process.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::{NamespaceError, Target};

/// Tells when what named a namespace is gone.
pub enum Departure {
    /// The command's own namespace: its end is the command's.
    Never,
    /// A file.
    File {
        /// Events of the directory.
        inotify: Inotify,
        /// The file.
        path: std::path::PathBuf,
    },
    /// A process, by its pidfd.
    Process(OwnedFd),
}

impl Departure {
    /// Watches for the end of what `target` names.
    pub fn watch(target: &Target) -> Result<Self, NamespaceError> {
        let named = match target {
            Target::Path(path) => path.display().to_string(),
            Target::Process(pid) => format!("process {pid}"),
            Target::Run { .. } => "the command".into(),
        };
        let failed = |error: io::Error| match error.raw_os_error() {
            Some(libc::ENOENT | libc::ESRCH) => NamespaceError::Missing { target: named, error },
            _ => NamespaceError::Watch { target: named, error },
        };
        match target {
            Target::Run { .. } => Ok(Self::Never),
            Target::Process(pid) => Self::process(*pid).map_err(failed),
            Target::Path(path) => match process_of(path) {
                Some(pid) => Self::process(pid).map_err(failed),
                None => Self::file(path).map_err(failed),
            },
        }
    }

    #[allow(unsafe_code)]
    fn process(pid: i32) -> io::Result<Self> {
        use std::os::fd::FromRawFd;
        // SAFETY: no memory is passed.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        Ok(Self::Process(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    fn file(path: &Path) -> io::Result<Self> {
        path.metadata()?;
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let directory =
            path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        inotify.add_watch(directory, AddWatchFlags::IN_DELETE | AddWatchFlags::IN_MOVED_FROM)?;
        Ok(Self::File { inotify, path: path.to_path_buf() })
    }

    /// The descriptor that becomes readable when it is time to ask [`Self::has_gone`].
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Never => None,
            Self::File { inotify, .. } => Some(inotify.as_fd()),
            Self::Process(fd) => Some(fd.as_fd()),
        }
    }

    /// Whether the namespace's name is gone.
    pub fn has_gone(&self) -> bool {
        match self {
            Self::Never => false,
            Self::File { inotify, path } => {
                while inotify.read_events().is_ok_and(|events| !events.is_empty()) {}
                !path.exists()
            }
            // A pidfd is readable once the process has ended.
            Self::Process(_) => true,
        }
    }
}

/// The process whose namespace a path like /proc/PID/ns/net names.
fn process_of(path: &Path) -> Option<i32> {
    path.strip_prefix("/proc").ok()?.components().next()?.as_os_str().to_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_below_proc_names_a_process() {
        assert_eq!(process_of(Path::new("/proc/123/ns/net")), Some(123));
        assert_eq!(process_of(Path::new("/run/netns/x")), None);
    }

    #[test]
    fn the_removal_of_the_file_is_seen() {
        let path = std::env::temp_dir().join(format!("hythe-watch-{}", std::process::id()));
        std::fs::write(&path, "").unwrap();
        let departure = Departure::watch(&Target::Path(path.clone())).unwrap();
        assert!(!departure.has_gone());
        std::fs::remove_file(&path).unwrap();
        let mut ready = [nix::poll::PollFd::new(departure.fd().unwrap(), nix::poll::PollFlags::POLLIN)];
        nix::poll::poll(&mut ready, 5000u16).unwrap();
        assert!(departure.has_gone());
    }
}
