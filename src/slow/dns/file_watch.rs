//! Files that others write, resolv.conf and hosts: reads them, and notices when they mean something else than before.
//!
//! A file may be rewritten in place, replaced by another that is renamed over it, or be a symbolic link that is
//! switched, and the link may lead over further links (/etc/resolv.conf to /run/systemd/resolve/stub-resolv.conf). So
//! what is watched (inotify(7)) is each *directory* in which a step of the way lies, for the name of that step: every
//! link, be it to the file or to a directory above it, and the file. A directory that does not exist yet is watched for
//! in the nearest one above it that does; one that does, for being moved or removed. The file itself is watched too: one
//! that is bind-mounted is written in a directory that cannot be seen from here.
//!
//! The way is found again after every change. Watches are set before it is walked the last time, and before the file is
//! read: a change after that leaves an event.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::debug;

/// As many links are followed; `path_resolution(7)` has the same limit.
const LINKS_MAX: usize = 40;
/// So often the way is walked again if it changes under one's feet; the last change leaves an event in any case.
const WALKS_MAX: usize = 8;

/// One step of the way to the file: a directory, itself without links on its way.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Hop {
    directory: PathBuf,
    /// What is looked up in it.
    what: Looked,
}

/// What a directory is on the way for.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Looked {
    /// The next directory, which is there.
    Through,
    /// A link to a directory.
    Link(OsString),
    /// The file, a link to it, or a directory that is not there.
    End(OsString),
}

/// Reads a file as far as it may be long; what comes behind does not count, nor what is no text.
pub(super) fn read_bounded(path: &Path, max_bytes: u64) -> io::Result<String> {
    // Without waiting, should somebody have put a FIFO there.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let mut bytes = Vec::new();
    file.take(max_bytes).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The directories in which these files lie, or a file or link of theirs may come to lie, each once. They must stay
/// readable for as long as the files are followed. The root is never among them, since all else lies below it.
pub fn readable_directories(paths: &[PathBuf]) -> Vec<PathBuf> {
    let mut directories: Vec<PathBuf> = Vec::new();
    for Hop { directory, what } in ways(paths) {
        let ends = matches!(what, Looked::End(_));
        if ends && directory != Path::new("/") && !directories.contains(&directory) {
            directories.push(directory);
        }
    }
    directories
}

/// The ways to all files.
fn ways(paths: &[PathBuf]) -> Vec<Hop> {
    paths.iter().flat_map(|path| way(path)).collect()
}

/// The way to a file, as path_resolution(7) goes it: name by name, and where one is a link, over what that points to.
fn way(path: &Path) -> Vec<Hop> {
    let mut hops = Vec::new();
    let mut links = 0;
    let mut at = PathBuf::from(".");
    let mut rest = names_of(path);
    while let Some(name) = rest.pop() {
        let next = at.join(&name);
        if name == "/" {
            at = next;
            continue;
        }
        let link = std::fs::read_link(&next).ok();
        let what = match &link {
            None if !rest.is_empty() && next.is_dir() => Looked::Through,
            Some(_) if !rest.is_empty() => Looked::Link(name),
            _ => Looked::End(name),
        };
        let passes = what == Looked::Through;
        hops.push(Hop { directory: at.clone(), what });
        match link {
            None if passes => at = next,
            Some(target) if links < LINKS_MAX => {
                links += 1;
                rest.extend(names_of(&target));
            }
            _ => break,
        }
    }
    hops
}

/// The names of a path, the first one last. That of the root is one too: joined to anything, it leads there.
fn names_of(path: &Path) -> Vec<OsString> {
    path.components().rev().map(|component| component.as_os_str().to_os_string()).collect()
}

/// What waits for changes.
pub(super) struct FileWatch {
    paths: Vec<PathBuf>,
    inotify: AsyncFd<Descriptor>,
    /// For which names each watch is; a file's own is for anything that happens to it.
    wanted: HashMap<WatchDescriptor, Vec<OsString>>,
}

struct Descriptor(Inotify);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl FileWatch {
    /// Watches from now on.
    pub fn new(paths: Vec<PathBuf>) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        // SAFETY: `Descriptor` owns the instance and never exchanges it, so its descriptor stays the same and open for as
        // long as the registration.
        let inotify = unsafe { AsyncFd::register_with_interest(Descriptor(inotify), Interest::READABLE) }?;
        let mut watch = Self { paths, inotify, wanted: HashMap::new() };
        watch.arm();
        Ok(watch)
    }

    /// Waits for a change. Changes that come while nobody waits are not lost; several may count as one.
    pub async fn changed(&mut self) -> io::Result<()> {
        loop {
            let mut ready = self.inotify.readable().await?;
            let Ok(events) = ready.try_io(|inotify| Ok(inotify.get_ref().0.read_events()?)) else { continue };
            if events?.iter().any(|event| self.matters(event)) {
                self.arm();
                return Ok(());
            }
        }
    }

    fn matters(&self, event: &InotifyEvent) -> bool {
        // More happened than the kernel wrote down.
        if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
            return true;
        }
        match (self.wanted.get(&event.wd), &event.name) {
            (None, _) => false,
            // Something happened to the watched thing itself.
            (Some(_), None) => true,
            (Some(names), Some(name)) => names.contains(name),
        }
    }

    fn arm(&mut self) {
        let before = std::mem::take(&mut self.wanted);
        let mut hops = ways(&self.paths);
        for _ in 0..WALKS_MAX {
            self.wanted.clear();
            for Hop { directory, what } in &hops {
                match what {
                    Looked::Through => self.add(directory, of_itself(), None),
                    Looked::Link(name) | Looked::End(name) => {
                        self.add(directory, in_directory(), Some(name.clone()));
                    }
                }
            }
            for path in self.paths.clone() {
                self.add(&path, of_file(), None);
            }
            let again = ways(&self.paths);
            if again == hops {
                break;
            }
            hops = again;
        }
        for stale in before.into_keys().filter(|watch| !self.wanted.contains_key(watch)) {
            // It is gone already where its directory is.
            let _ = self.inotify.get_ref().0.rm_watch(stale);
        }
    }

    fn add(&mut self, path: &Path, what: AddWatchFlags, name: Option<OsString>) {
        // Beside whatever else it is watched for.
        let what = what | AddWatchFlags::from_bits_retain(libc::IN_MASK_ADD);
        match self.inotify.get_ref().0.add_watch(path, what) {
            Ok(watch) => self.wanted.entry(watch).or_default().extend(name),
            Err(error) => debug!(path = %path.display(), %error, "not watched"),
        }
    }
}

/// Not `IN_MODIFY`: half a file is not read where its writer is about to close it.
fn in_directory() -> AddWatchFlags {
    of_file()
        | AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_MOVE
        | AddWatchFlags::IN_ONLYDIR
}

/// `IN_ATTRIB` tells of new permissions, and of an open file that lost its last name.
fn of_file() -> AddWatchFlags {
    of_itself() | AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_ATTRIB
}

/// Of a directory, nothing that happens in it.
fn of_itself() -> AddWatchFlags {
    AddWatchFlags::IN_DELETE_SELF | AddWatchFlags::IN_MOVE_SELF
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slow::dns::fake_server::{Directory, soon};
    use std::fs;
    use std::os::unix::fs::symlink;

    /// Waits for the change that `change` makes, and for no other.
    async fn is_noticed(watch: &mut FileWatch, what: &str, change: impl FnOnce()) {
        change();
        soon(watch.changed()).await.unwrap_or_else(|_| panic!("{what} was not noticed")).unwrap();
    }

    fn canonical_directories(path: &Path) -> Vec<PathBuf> {
        let readable = readable_directories(&[path.to_path_buf()]);
        readable.iter().map(|path| path.canonicalize().unwrap()).collect()
    }

    #[tokio::test(flavor = "current_thread")]
    async fn rewriting_renaming_over_and_removing_are_noticed() {
        let directory = Directory::new();
        let (path, other) = (directory.path("resolv.conf"), directory.path("other"));
        let mut watch = FileWatch::new(vec![path.clone()]).unwrap();
        is_noticed(&mut watch, "creation", || fs::write(&path, "1").unwrap()).await;
        is_noticed(&mut watch, "rewriting", || fs::write(&path, "2").unwrap()).await;
        fs::write(&other, "3").unwrap();
        is_noticed(&mut watch, "renaming over", || fs::rename(&other, &path).unwrap()).await;
        is_noticed(&mut watch, "rewriting the renamed", || fs::write(&path, "4").unwrap()).await;
        is_noticed(&mut watch, "removal", || fs::remove_file(&path).unwrap()).await;
    }

    #[tokio::test(flavor = "current_thread")]
    async fn every_link_on_the_way_is_watched() {
        let directory = Directory::new();
        for name in ["etc", "run", "elsewhere"] {
            fs::create_dir(directory.path(name)).unwrap();
        }
        let path = directory.path("etc/resolv.conf");
        symlink("../run/link", &path).unwrap();
        symlink(directory.path("elsewhere/file"), directory.path("run/link")).unwrap();
        fs::write(directory.path("elsewhere/file"), "1").unwrap();
        assert_eq!(
            canonical_directories(&path),
            ["etc", "run", "elsewhere"].map(|name| directory.path(name))
        );

        let mut watch = FileWatch::new(vec![path.clone()]).unwrap();
        is_noticed(&mut watch, "rewriting", || fs::write(directory.path("elsewhere/file"), "2").unwrap())
            .await;
        symlink(directory.path("etc/file"), directory.path("run/new")).unwrap();
        let switch = || fs::rename(directory.path("run/new"), directory.path("run/link")).unwrap();
        is_noticed(&mut watch, "the switch", switch).await;
        let create = || fs::write(directory.path("etc/file"), "3").unwrap();
        is_noticed(&mut watch, "the new target", create).await;
        assert_eq!(canonical_directories(&path), ["etc", "run"].map(|name| directory.path(name)));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn links_to_directories_are_watched_and_give_nothing_to_read() {
        let directory = Directory::new();
        for name in ["var", "one", "two", "two/etc"] {
            fs::create_dir(directory.path(name)).unwrap();
        }
        fs::create_dir(directory.path("one/etc")).unwrap();
        symlink("../one", directory.path("var/current")).unwrap();
        symlink("var/current/etc", directory.path("etc")).unwrap();
        let path = directory.path("etc/hosts");
        fs::write(&path, "1").unwrap();
        assert_eq!(canonical_directories(&path), [directory.path("one/etc")]);

        let mut watch = FileWatch::new(vec![path.clone()]).unwrap();
        symlink("../two", directory.path("var/new")).unwrap();
        let switch = || fs::rename(directory.path("var/new"), directory.path("var/current")).unwrap();
        is_noticed(&mut watch, "the switch of a link on the way of a link", switch).await;
        is_noticed(&mut watch, "the file there", || fs::write(&path, "2").unwrap()).await;
        assert_eq!(canonical_directories(&path), [directory.path("two/etc")]);
        symlink("one/etc", directory.path("new")).unwrap();
        let switch = || fs::rename(directory.path("new"), directory.path("etc")).unwrap();
        is_noticed(&mut watch, "the switch of a link to a directory", switch).await;
        is_noticed(&mut watch, "the file as it was", || fs::write(&path, "3").unwrap()).await;
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_directory_on_the_way_that_is_moved_or_comes_is_noticed() {
        let directory = Directory::new();
        fs::create_dir_all(directory.path("run/resolve/now")).unwrap();
        let path = directory.path("run/resolve/now/resolv.conf");
        fs::write(&path, "1").unwrap();
        let mut watch = FileWatch::new(vec![path.clone()]).unwrap();
        let move_away = || fs::rename(directory.path("run/resolve"), directory.path("run/away")).unwrap();
        is_noticed(&mut watch, "a directory that is moved", move_away).await;
        let move_back = || fs::rename(directory.path("run/away"), directory.path("run/resolve")).unwrap();
        is_noticed(&mut watch, "a directory that comes", move_back).await;
        is_noticed(&mut watch, "the file in it", || fs::write(&path, "2").unwrap()).await;
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_link_into_a_directory_that_is_not_there_yet_is_noticed_when_it_is() {
        let directory = Directory::new();
        let path = directory.path("resolv.conf");
        symlink("run/systemd/resolve/stub", &path).unwrap();
        let mut watch = FileWatch::new(vec![path.clone()]).unwrap();
        fs::create_dir_all(directory.path("run/systemd/resolve")).unwrap();
        is_noticed(&mut watch, "the directory", || {}).await;
        is_noticed(&mut watch, "the file", || {
            fs::write(directory.path("run/systemd/resolve/stub"), "1").unwrap();
        })
        .await;
    }

    #[tokio::test(flavor = "current_thread")]
    async fn several_files_are_watched_each_for_itself() {
        let directory = Directory::new();
        for name in ["etc", "run"] {
            fs::create_dir(directory.path(name)).unwrap();
        }
        let paths = ["etc/resolv.conf", "etc/hosts", "run/resolv.conf"].map(|name| directory.path(name));
        let mut watch = FileWatch::new(paths.to_vec()).unwrap();
        for path in &paths {
            let name = path.display().to_string();
            is_noticed(&mut watch, &name, || fs::write(path, "1").unwrap()).await;
        }
        is_noticed(&mut watch, "removal", || fs::remove_file(&paths[1]).unwrap()).await;
        assert_eq!(readable_directories(&paths).len(), 2);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_happens_beside_the_file_is_not_a_change() {
        let directory = Directory::new();
        let path = directory.path("resolv.conf");
        fs::write(&path, "1").unwrap();
        let watch = FileWatch::new(vec![path.clone()]).unwrap();
        for number in 0..50 {
            fs::write(directory.path(&format!("other{number}")), "x").unwrap();
        }
        fs::read(&path).unwrap();
        // The kernel queues an event before the call that caused it returns.
        let read = || watch.inotify.get_ref().0.read_events().ok();
        let events: Vec<_> = std::iter::from_fn(read).flatten().collect();
        assert!(events.len() >= 50, "{}", events.len());
        assert!(!events.iter().any(|event| watch.matters(event)));
    }

    #[test]
    fn links_that_go_in_a_circle_end() {
        let directory = Directory::new();
        symlink("b", directory.path("a")).unwrap();
        symlink("a", directory.path("b")).unwrap();
        let ends = way(&directory.path("a")).into_iter().filter(|hop| matches!(hop.what, Looked::End(_)));
        assert_eq!(ends.count(), LINKS_MAX + 1);
        assert_eq!(canonical_directories(&directory.path("a")), [directory.path("")]);
    }

    #[test]
    fn the_root_is_not_given_to_read_for_what_is_not_there() {
        assert!(readable_directories(&[PathBuf::from("/no-such-directory/hosts")]).is_empty());
    }
}
