//! Where the control socket lies.
//!
//! ```text
//! --api PATH     there
//! --name NAME    $XDG_RUNTIME_DIR/hythe/NAME.sock, or /run/hythe/NAME.sock for root
//! neither        the same, by the number of the process
//! ```
//! Who asks without either finds the one that there is, or is told which there are.
//!
//! The directory must be root's or the user's own and nobody else's to write, so that nobody else can put something in the
//! socket's place or lead it elsewhere. In the default directory a lock orders those who come at the same time, and what killed
//! processes have left is removed.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;

use crate::monitor::place::{self, Doorplate, claim_for, is_deserted};

/// The name of the socket, which goes with this.
pub type Plate = Doorplate;

/// Names in a directory that are looked at.
const ENTRIES_MAX: usize = 4096;

/// How often the directory's lock is tried, and how long apart: a second, and others have it for moments.
const LOCK_TRIES: u32 = 50;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// Nobody but the user, and nothing to execute: 0600.
const MASK: u32 = 0o177;

/// Why there is no control socket, or none is found.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// No directory is the user's.
    #[error(
        "the control socket has no place: XDG_RUNTIME_DIR names no directory of this user; choose one by --api PATH"
    )]
    NoDirectory,
    /// The directory cannot be used.
    #[error("the control socket cannot be in {}: {problem}", .directory.display())]
    Directory {
        /// The directory.
        directory: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// The socket cannot be made.
    #[error("control socket {0}")]
    Socket(#[from] place::PlaceError),
    /// A name that cannot be one of a file.
    #[error(
        "--name '{0}': letters, digits, '-', '_' and '.' make a name, 64 at the most, a letter or digit first"
    )]
    Name(String),
    /// Nobody is there.
    #[error("no hythe of this user runs (--api PATH asks one whose control socket is elsewhere)")]
    Nobody,
    /// Several are there.
    #[error("several run: choose one by --name: {}", .0.join(", "))]
    Several(Vec<String>),
}

/// Which control socket is wanted.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Wanted {
    /// The name of a running hythe, which tells it apart from others
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Its control socket, where that is elsewhere
    #[arg(long, value_name = "PATH", conflicts_with = "name")]
    pub api: Option<PathBuf>,
}

/// A control socket at which nobody is answered yet. Its name goes with it.
pub struct Listening {
    listener: UnixListener,
    plate: Plate,
    name: String,
}

impl Listening {
    /// The name by which it is found.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it lies.
    pub fn directory(&self) -> &Path {
        self.plate.directory()
    }

    /// The socket, and its name in the file system.
    pub fn apart(self) -> (UnixListener, Plate) {
        (self.listener, self.plate)
    }
}

impl Wanted {
    /// Whether the name can be one.
    pub fn check(&self) -> Result<(), PlaceError> {
        let Some(name) = &self.name else { return Ok(()) };
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        let is_name = name.len() <= 64
            && name.bytes().all(fits)
            && name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
        if is_name { Ok(()) } else { Err(PlaceError::Name(name.escape_debug().to_string())) }
    }

    /// Makes the socket. One that nobody has asked for may be missing: then the note tells why.
    pub fn claim(&self, note: impl FnOnce(&PlaceError)) -> Result<Option<Listening>, PlaceError> {
        self.check()?;
        match self {
            Self { api: Some(path), name } => {
                let name = name.clone().unwrap_or_else(|| path.display().to_string());
                listen_at(path, name).map(Some)
            }
            Self { name: Some(name), .. } => listen_as(name).map(Some),
            _ => match listen_as(&std::process::id().to_string()) {
                Ok(listening) => Ok(Some(listening)),
                Err(error) => {
                    note(&error);
                    Ok(None)
                }
            },
        }
    }

    /// Where a running hythe is asked.
    pub fn find(&self) -> Result<PathBuf, PlaceError> {
        self.check()?;
        if let Some(path) = &self.api {
            return Ok(path.clone());
        }
        let directory = default_directory()?;
        if let Some(name) = &self.name {
            return Ok(socket_of(&directory, name));
        }
        let mut living: Vec<PathBuf> =
            sockets_in(&directory).into_iter().filter(|path| !is_deserted(path)).collect();
        living.sort();
        match living.len() {
            0 => Err(PlaceError::Nobody),
            1 => Ok(living.remove(0)),
            _ => Err(PlaceError::Several(
                living.iter().filter_map(|path| Some(path.file_stem()?.to_str()?.to_string())).collect(),
            )),
        }
    }
}

fn socket_of(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}.sock"))
}

fn listen_as(name: &str) -> Result<Listening, PlaceError> {
    let directory = default_directory()?;
    let failed = |error: io::Error| unusable(&directory, &error);
    match DirBuilder::new().mode(0o700).create(&directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    let opened = open_own(&directory)?;
    // One that has a name and does not listen yet looks deserted.
    let _lock = lock(&directory, opened)?;
    for path in sockets_in(&directory) {
        if is_deserted(&path) {
            let _ = std::fs::remove_file(path);
        }
    }
    listen(&socket_of(&directory, name), name.to_string())
}

/// Takes a directory's lock, if it is free soon: whoever may read the directory can keep it for ever.
fn lock(directory: &Path, mut opened: File) -> Result<Flock<File>, PlaceError> {
    for _ in 0..LOCK_TRIES {
        match Flock::lock(opened, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => return Ok(locked),
            Err((back, Errno::EAGAIN)) => opened = back,
            Err((_, error)) => return Err(unusable(directory, &error.into())),
        }
        std::thread::sleep(LOCK_PAUSE);
    }
    let problem = "another program keeps it locked; end that one, or choose another place by --api PATH";
    Err(PlaceError::Directory { directory: directory.to_path_buf(), problem: problem.into() })
}

fn listen_at(path: &Path, name: String) -> Result<Listening, PlaceError> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    open_own(parent.unwrap_or(Path::new(".")))?;
    listen(path, name)
}

fn listen(path: &Path, name: String) -> Result<Listening, PlaceError> {
    let bind = |path: &Path| {
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true).map(|()| listener)
    };
    let (listener, plate) = claim_for(path, MASK, bind)?;
    Ok(Listening { listener, plate, name })
}

/// $XDG_RUNTIME_DIR if it is this user's, as its specification wants it; for root /run.
fn default_directory() -> Result<PathBuf, PlaceError> {
    let own = |directory: &PathBuf| {
        let metadata = std::fs::symlink_metadata(directory);
        directory.is_absolute() && metadata.is_ok_and(|there| there.uid() == geteuid().as_raw())
    };
    let of_session = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(own);
    let base = of_session.or_else(|| geteuid().is_root().then(|| PathBuf::from("/run")));
    Ok(base.ok_or(PlaceError::NoDirectory)?.join("hythe"))
}

fn unusable(directory: &Path, error: &io::Error) -> PlaceError {
    PlaceError::Directory { directory: directory.to_path_buf(), problem: error.to_string() }
}

/// A directory in which nobody else can do anything.
fn open_own(directory: &Path) -> Result<File, PlaceError> {
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
        .open(directory)
        .map_err(|error| unusable(directory, &error))?;
    let metadata = opened.metadata().map_err(|error| unusable(directory, &error))?;
    let problem = if ![0, geteuid().as_raw()].contains(&metadata.uid()) {
        "it is another user's; choose one of your own"
    } else if metadata.mode() & 0o022 != 0 {
        "others may write there; choose a directory of your own, or close it (chmod go-w)"
    } else {
        return Ok(opened);
    };
    Err(PlaceError::Directory { directory: directory.to_path_buf(), problem: problem.into() })
}

fn sockets_in(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten().take(ENTRIES_MAX);
    let sockets = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_socket()));
    let paths = sockets.map(|entry| entry.path());
    paths.filter(|path| path.extension().is_some_and(|extension| extension == "sock")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    fn directory(name: &str, mode: u32) -> PathBuf {
        let path = std::env::temp_dir().join(format!("hythe-control-{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        path
    }

    fn at(path: &Path) -> Wanted {
        Wanted { api: Some(path.to_path_buf()), name: None }
    }

    fn claim(wanted: &Wanted) -> Result<Listening, PlaceError> {
        Ok(wanted.claim(|_| {})?.unwrap())
    }

    #[test]
    fn the_socket_is_for_its_user_and_one_that_lives_is_not_replaced() {
        let directory = directory("own", 0o755);
        let path = directory.join("a.sock");
        let listening = claim(&at(&path)).unwrap();
        assert_eq!(fs::symlink_metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(listening.directory(), directory);
        let error = claim(&at(&path)).err().unwrap().to_string();
        assert!(error.contains("a running program has this socket"), "{error}");
        let (listener, plate) = listening.apart();
        drop(listener);
        let again = claim(&at(&path)).unwrap();
        drop(plate);
        assert!(path.exists(), "it is another one's now");
        drop(again);
        assert!(!path.exists());
        fs::remove_dir(directory).unwrap();
    }

    #[test]
    fn a_directory_in_which_others_may_write_is_refused() {
        for mode in [0o777, 0o1777, 0o775] {
            let directory = directory("open", mode);
            let error = claim(&at(&directory.join("a.sock"))).err().unwrap().to_string();
            assert!(error.contains("others may write there"), "{mode:o}: {error}");
            fs::remove_dir(directory).unwrap();
        }
    }

    #[test]
    fn a_directory_that_somebody_keeps_locked_is_given_up() {
        let directory = directory("locked", 0o755);
        let kept = Flock::lock(File::open(&directory).unwrap(), FlockArg::LockShared).unwrap();
        let error = lock(&directory, open_own(&directory).unwrap()).err().unwrap().to_string();
        assert!(error.contains("keeps it locked"), "{error}");
        drop(kept);
        drop(lock(&directory, open_own(&directory).unwrap()).unwrap());
        fs::remove_dir(directory).unwrap();
    }

    #[test]
    fn no_link_is_followed() {
        let real = directory("real", 0o700);
        let link = real.join("link");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert!(matches!(claim(&at(&link.join("a.sock"))), Err(PlaceError::Directory { .. })));
        let dangling = real.join("a.sock");
        std::os::unix::fs::symlink(real.join("b.sock"), &dangling).unwrap();
        assert!(matches!(claim(&at(&dangling)), Err(PlaceError::Socket(_))));
        assert!(!real.join("b.sock").exists());
        fs::remove_dir_all(real).unwrap();
    }

    #[test]
    fn names_are_names_of_files_in_one_directory() {
        let named = |name: &str| Wanted { name: Some(name.to_string()), api: None }.check();
        for name in ["web", "web-1", "1", "a.b_c"] {
            named(name).unwrap();
        }
        for name in ["", ".", "..", "../x", "a/b", ".hidden", "a b", "\n", &"a".repeat(65)] {
            assert!(matches!(named(name), Err(PlaceError::Name(_))), "{name}");
        }
    }
}
