//! How front-ends come: to a socket at which they call, or by being called.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;

use super::device::Machine;
use super::{PAUSE, session, tried};

/// Where front-ends come from.
pub enum Door {
    /// They call at a socket.
    Listen(UnixListener),
    /// They listen at a path, and are called.
    Call(PathBuf),
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
    pub fn serve(&self, machine: Machine, left: impl Fn()) {
        let machine = Arc::new(machine);
        loop {
            let Some(stream) = tried(self.next()) else { continue };
            tracing::info!("a virtual machine has come");
            match session::serve(stream, &machine) {
                Ok(()) => tracing::info!("the virtual machine has gone"),
                Err(error) => tracing::error!(%error, "the front-end is not spoken with any more"),
            }
            left();
        }
    }
}
