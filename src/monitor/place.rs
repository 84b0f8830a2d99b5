//! Sockets in the file system: at which path one may be made, and when its name goes.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::sys::stat::{Mode, umask};

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// Somebody has it.
    #[error("{0}: a running program has this socket; choose another path, or end it")]
    Taken(PathBuf),
    /// It is no socket.
    #[error("{0}: exists and is not a socket; choose another path, or remove it")]
    NoSocket(PathBuf),
    /// The socket cannot be made.
    #[error("{path}: cannot make a socket there ({error})", path = .path.display())]
    Bind {
        /// Where.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// Makes a socket at `path` by `bind`, for this user alone; in the place of one that nobody has any more.
pub fn claim<'p, S>(
    path: &'p Path,
    bind: impl FnOnce(&'p Path) -> io::Result<S>,
) -> Result<(S, Doorplate), PlaceError> {
    claim_for(path, (Mode::S_IRWXG | Mode::S_IRWXO).bits(), bind)
}

/// The same, with permissions that the mask leaves.
pub fn claim_for<'p, S>(
    path: &'p Path,
    mask: u32,
    bind: impl FnOnce(&'p Path) -> io::Result<S>,
) -> Result<(S, Doorplate), PlaceError> {
    let failed = |error| PlaceError::Bind { path: path.to_path_buf(), error };
    if let Ok(metadata) = fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            return Err(PlaceError::NoSocket(path.to_path_buf()));
        }
        match probe(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path).map_err(failed)?;
            }
            Err(error) if error.raw_os_error() == Some(libc::EACCES) => return Err(failed(error)),
            _ => return Err(PlaceError::Taken(path.to_path_buf())),
        }
    }
    // No thread exists yet that could make a file meanwhile.
    let before = umask(Mode::from_bits_truncate(mask));
    let bound = bind(path);
    umask(before);
    let socket = bound.map_err(failed)?;
    let plate = Doorplate { path: path.to_path_buf(), identity: inode(path).map_err(failed)? };
    Ok((socket, plate))
}

/// To connect a socket for datagrams disturbs nobody; that the other one is of another type is said too.
fn probe(path: &Path) -> io::Result<()> {
    UnixDatagram::unbound()?.connect(path)
}

/// Whether a socket is nobody's any more.
pub fn is_deserted(path: &Path) -> bool {
    probe(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// The name of a socket, gone with this unless another one has taken its place.
pub struct Doorplate {
    path: PathBuf,
    identity: Inode,
}

/// Which file it is. A number of an inode that is gone is given to another one, but that was born later.
pub type Inode = (u64, u64, Option<SystemTime>);

/// Which file has a name.
pub fn inode(path: &Path) -> io::Result<Inode> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("hythe-place-{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        path
    }

    #[test]
    fn a_socket_is_for_its_user_and_gone_afterwards() {
        let directory = directory("mode");
        let path = directory.join("vm.sock");
        let (listener, plate) = claim(&path, UnixListener::bind).unwrap();
        assert_eq!(fs::symlink_metadata(&path).unwrap().mode() & 0o777, 0o700);
        assert!(matches!(claim(&path, UnixListener::bind), Err(PlaceError::Taken(_))), "somebody listens");
        listener.set_nonblocking(true).unwrap();
        assert!(listener.accept().is_err(), "and was not disturbed");
        drop(listener);
        let (_listener, new_plate) = claim(&path, UnixListener::bind).unwrap();
        drop(plate);
        assert!(path.exists(), "it is another one's now");
        drop(new_plate);
        assert!(!path.exists());
        fs::remove_dir(directory).unwrap();
    }

    #[test]
    fn a_socket_for_datagrams_is_taken_too_while_somebody_has_it() {
        let directory = directory("datagrams");
        let path = directory.join("vm.sock");
        let (socket, _plate) = claim(&path, UnixDatagram::bind).unwrap();
        assert!(matches!(claim(&path, UnixListener::bind), Err(PlaceError::Taken(_))));
        // One that speaks with another one already refuses the probe.
        let (peer, _peer_plate) = claim(&directory.join("peer.sock"), UnixDatagram::bind).unwrap();
        socket.connect(directory.join("peer.sock")).unwrap();
        assert!(matches!(claim(&path, UnixDatagram::bind), Err(PlaceError::Taken(_))));
        drop((socket, peer));
        assert!(claim(&path, UnixListener::bind).is_ok());
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn what_is_no_socket_stays() {
        let directory = directory("file");
        let path = directory.join("notes.txt");
        fs::write(&path, "notes").unwrap();
        assert!(matches!(claim(&path, UnixListener::bind), Err(PlaceError::NoSocket(_))));
        assert_eq!(fs::read_to_string(&path).unwrap(), "notes");
        let nowhere = directory.join("none/vm.sock");
        assert!(matches!(claim(&nowhere, UnixListener::bind), Err(PlaceError::Bind { .. })));
        fs::remove_dir_all(directory).unwrap();
    }
}
