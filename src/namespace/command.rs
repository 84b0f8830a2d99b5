//! The command of `hythe run`.
#![allow(unsafe_code)]

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, signal, sigprocmask};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork};

/// Exit statuses of `hythe run`, as env(1) and docker(1) use them.
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

/// Starts the command, with `mask` as its signal mask. When it cannot be executed: the exit status that says so, and why.
pub fn spawn(command: &[OsString], mask: &SigSet) -> Result<Pid, (u8, String)> {
    let Some(program) = command.first() else { return Err((NOT_FOUND, "no command is given".into())) };
    let failed =
        |error: io::Error| (NOT_EXECUTABLE, format!("{}: cannot be executed ({error})", program.display()));
    let arguments: Vec<CString> = command
        .iter()
        .map(|argument| CString::new(argument.as_bytes()))
        .collect::<Result<_, _>>()
        .map_err(|error| failed(error.into()))?;
    let (reading, writing) =
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|error| failed(error.into()))?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }.map_err(|error| failed(error.into()))? {
        ForkResult::Child => {
            // SAFETY: no memory is passed.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            // Rust's runtime ignores SIGPIPE; what is ignored stays so in what is executed.
            // SAFETY: no handler of this process's takes the place of another.
            let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) };
            let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(mask), None);
            let error = match nix::unistd::execvp(&arguments[0], &arguments) {
                Err(error) => error,
                Ok(never) => match never {},
            };
            let _ = File::from(writing).write_all(&(error as i32).to_ne_bytes());
            // SAFETY: ends the process.
            unsafe { libc::_exit(i32::from(NOT_EXECUTABLE)) }
        }
        ForkResult::Parent { child } => {
            drop(writing);
            let mut number = [0; 4];
            match File::from(reading).read_exact(&mut number) {
                // The pipe was closed by a successful exec.
                Err(_) => Ok(child),
                Ok(()) => {
                    let _ = waitpid(child, None);
                    let error = io::Error::from_raw_os_error(i32::from_ne_bytes(number));
                    Err(if error.kind() == io::ErrorKind::NotFound {
                        (NOT_FOUND, not_found(program, &error))
                    } else {
                        failed(error)
                    })
                }
            }
        }
    }
}

/// execve(2): `ENOENT` is also about the interpreter.
fn not_found(program: &OsStr, error: &io::Error) -> String {
    let name = program.display();
    if !program.as_bytes().contains(&b'/') {
        format!("{name}: not found in any directory of PATH")
    } else if Path::new(program).exists() {
        format!("{name}: its interpreter is not found ({error}): see its first line, or ldd(1)")
    } else {
        format!("{name}: not found ({error})")
    }
}
