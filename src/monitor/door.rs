//! How front-ends come: to a socket at which they call, or by being called.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::sys::stat::{Mode, umask};

use super::session::{self, Identity, Worker};

/// How long a front-end that does not listen is left alone before it is called again.
const PAUSE: Duration = Duration::from_millis(100);

/// Why there is no door.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// Somebody serves there.
    #[error("{0}: a running program listens there; choose another path, or end it")]
    Taken(PathBuf),
    /// It is no socket.
    #[error("{0}: exists and is not a socket; choose another path, or remove it")]
    NoSocket(PathBuf),
    /// The socket cannot be made.
    #[error("{path}: cannot listen there ({error})", path = .path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// Where front-ends come from.
pub enum Door {
    /// They call at a socket.
    Listen(UnixListener),
    /// They listen at a path, and are called.
    Call(PathBuf),
}

/// Listens at `path`, for this user alone; in the place of a socket that nobody serves any more.
pub fn listen(path: &Path) -> Result<(Door, Doorplate), DoorError> {
    let failed = |error| DoorError::Listen { path: path.to_path_buf(), error };
    if let Ok(metadata) = fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            return Err(DoorError::NoSocket(path.to_path_buf()));
        }
        match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path).map_err(failed)?;
            }
            _ => return Err(DoorError::Taken(path.to_path_buf())),
        }
    }
    // No thread exists yet that could make a file meanwhile.
    let before = umask(Mode::S_IRWXG | Mode::S_IRWXO);
    let bound = UnixListener::bind(path);
    umask(before);
    let listener = bound.map_err(failed)?;
    let plate = Doorplate { path: path.to_path_buf(), identity: inode(path).map_err(failed)? };
    Ok((Door::Listen(listener), plate))
}

/// The name of a listening socket, gone with this unless another one has taken its place.
pub struct Doorplate {
    path: PathBuf,
    identity: Inode,
}

/// Which file it is. A number of an inode that is gone is given to another one, but that was born later.
type Inode = (u64, u64, Option<SystemTime>);

fn inode(path: &Path) -> io::Result<Inode> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino(), metadata.created().ok()))
}

impl Doorplate {
    /// Where the socket lies.
    pub fn directory(&self) -> &Path {
        let parent = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        parent.unwrap_or(Path::new("."))
    }
}

impl Drop for Doorplate {
    fn drop(&mut self) {
        if inode(&self.path).is_ok_and(|there| there == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Door {
    fn next(&self) -> io::Result<UnixStream> {
        match self {
            Self::Listen(listener) => Ok(listener.accept()?.0),
            Self::Call(path) => loop {
                if let Ok(stream) = UnixStream::connect(path) {
                    return Ok(stream);
                }
                std::thread::sleep(PAUSE);
            },
        }
    }

    /// Serves one front-end after the other, for ever; `left` is called after each.
    pub fn serve(&self, workers: Vec<Worker>, identity: Identity, left: impl Fn()) {
        let workers = Arc::new(workers);
        loop {
            let stream = match self.next() {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::error!(%error, "no front-end can be accepted");
                    std::thread::sleep(PAUSE);
                    continue;
                }
            };
            tracing::info!("a virtual machine has come");
            match session::serve(stream, &workers, identity) {
                Ok(()) => tracing::info!("the virtual machine has gone"),
                Err(error) => tracing::error!(%error, "the front-end is not spoken with any more"),
            }
            left();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("hythe-door-{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        path
    }

    #[test]
    fn a_socket_is_for_its_user_and_gone_afterwards() {
        let directory = directory("mode");
        let path = directory.join("vm.sock");
        let (door, plate) = listen(&path).unwrap();
        assert_eq!(fs::symlink_metadata(&path).unwrap().mode() & 0o777, 0o700);
        assert!(matches!(listen(&path), Err(DoorError::Taken(_))), "somebody listens");
        drop(door);
        let (_door, new_plate) = listen(&path).unwrap();
        drop(plate);
        assert!(path.exists(), "it is another one's now");
        drop(new_plate);
        assert!(!path.exists());
        fs::remove_dir(directory).unwrap();
    }

    #[test]
    fn what_is_no_socket_stays() {
        let directory = directory("file");
        let path = directory.join("notes.txt");
        fs::write(&path, "notes").unwrap();
        assert!(matches!(listen(&path), Err(DoorError::NoSocket(_))));
        assert_eq!(fs::read_to_string(&path).unwrap(), "notes");
        assert!(matches!(listen(&directory.join("none/vm.sock")), Err(DoorError::Listen { .. })));
        fs::remove_dir_all(directory).unwrap();
    }
}
