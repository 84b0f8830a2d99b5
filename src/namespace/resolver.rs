//! The resolv.conf that the command sees: hythe's, mounted over the host's in the command's own mount namespace.
//!
//! It covers the directory entry /etc/resolv.conf itself, be that a file or a symbolic link: where a link leads, and
//! what becomes of that, does not matter then. The kernel takes a mount away when its entry is renamed over or removed
//! in another mount namespace, which is how the host's file is replaced. So the directory is watched, and what comes
//! to be there is covered again.

use std::fs::{self, File, Metadata, Permissions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::mount::{MsFlags, mount};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::stat::Mode;
use nix::unistd::mkdtemp;

use crate::host::RESOLV_CONF;

/// A directory entry, and what is shown in its place.
pub struct Cover {
    entry: PathBuf,
    content: String,
    /// Tells of entries that come to be in the directory. Without it, what replaces the host's file is seen.
    inotify: Option<Inotify>,
    /// What was mounted last, kept open: the number of its inode is not given to another file while it is held.
    shown: Option<File>,
}

impl Cover {
    /// Shows `content` as resolv.conf, in this process's mount namespace, which must be its own.
    pub fn new(content: &str) -> Self {
        Self::of(Path::new(RESOLV_CONF), content)
    }

    fn of(entry: &Path, content: &str) -> Self {
        let inotify = entry.parent().and_then(|directory| watch(directory).ok());
        Self { entry: entry.to_path_buf(), content: content.to_string(), inotify, shown: None }
    }

    /// The descriptor that becomes readable when it is time to [`Self::follow`].
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.inotify.as_ref().map(AsFd::as_fd)
    }

    /// Covers again what has come to be at the entry.
    pub fn follow(&mut self) -> io::Result<()> {
        let mut changed = false;
        while let Some(events) = self.inotify.as_ref().and_then(|inotify| inotify.read_events().ok()) {
            let name = self.entry.file_name();
            // An event without a name: some were lost, or the directory is gone.
            changed |= events.iter().any(|event| event.name.as_deref().is_none_or(|it| Some(it) == name));
        }
        if changed { self.lay() } else { Ok(()) }
    }

    /// Covers the entry, unless it is covered. Fails with `NotFound` where there is no entry: a mount needs one, and
    /// to make one would be to change the host's directory.
    pub fn lay(&mut self) -> io::Result<()> {
        if self.is_laid() {
            return Ok(());
        }
        // The entry, not what it points to.
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let target = open(&self.entry, flags, Mode::empty())?;
        let target = format!("/proc/self/fd/{}", target.as_fd().as_raw_fd());
        self.shown = Some(self.with_file(|file| {
            let none: Option<&str> = None;
            mount(Some(file), target.as_str(), none, MsFlags::MS_BIND, none)?;
            Ok(())
        })?);
        Ok(())
    }

    /// Whether what is to be seen at the entry, links not followed, is what was mounted last.
    fn is_laid(&self) -> bool {
        let identity = |metadata: Metadata| (metadata.dev(), metadata.ino());
        let shown = self.shown.as_ref().and_then(|file| file.metadata().ok()).map(identity);
        shown.is_some() && shown == fs::symlink_metadata(&self.entry).ok().map(identity)
    }

    /// Calls `task` with a file that everybody may read, in a directory that nobody else may enter, under a name that
    /// nobody could take before; returns it. Its names are gone afterwards; a mount keeps the file.
    fn with_file(&self, task: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<File> {
        // mkdtemp(3) puts a name of its own in the place of the last six letters.
        let name = format!("hythe-{}", "X".repeat(6));
        let template = |directory: &Path| mkdtemp(&directory.join(&name));
        let directory = template(&std::env::temp_dir()).or_else(|_| template(Path::new("/dev/shm")))?;
        let path = directory.join("resolv.conf");
        let written = File::create_new(&path).and_then(|mut file| {
            file.write_all(self.content.as_bytes())?;
            // Whatever the umask is.
            file.set_permissions(Permissions::from_mode(0o644))?;
            Ok(file)
        });
        let done = written.and_then(|file| task(&path).map(|()| file));
        let _ = fs::remove_file(&path);
        let _ = fs::remove_dir(&directory);
        done
    }
}

fn watch(directory: &Path) -> nix::Result<Inotify> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    inotify.add_watch(directory, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO)?;
    Ok(inotify)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_can_be_read_by_all_lies_where_nobody_else_may_write_and_is_gone_afterwards() {
        let cover = Cover::of(Path::new("/nowhere/resolv.conf"), "nameserver 192.0.2.1\n");
        let mut directory = PathBuf::new();
        cover
            .with_file(|file| {
                let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
                directory = file.parent().unwrap().to_path_buf();
                assert_eq!((mode(file), mode(&directory)), (0o644, 0o700));
                assert_eq!(fs::read_to_string(file).unwrap(), "nameserver 192.0.2.1\n");
                Ok(())
            })
            .unwrap();
        assert!(!directory.exists());
    }

    #[test]
    fn where_there_is_no_entry_none_is_made() {
        let entry = std::env::temp_dir().join(format!("hythe-cover-{}", std::process::id()));
        let error = Cover::of(&entry, "").lay().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(!entry.exists());
    }
}
