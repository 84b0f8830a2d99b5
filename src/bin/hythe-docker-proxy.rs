//! The `hythe-docker-proxy` program: see [`hythe::shim`].

use std::process::ExitCode;

fn main() -> ExitCode {
    hythe::shim::run()
}
