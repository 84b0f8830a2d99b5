//! The `hythe` program: see [`hythe::cli`].

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = match hythe::cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no failures.
            let status = if error.use_stderr() { hythe::cli::FAILED } else { 0 };
            // Whoever closed standard error does not want to know.
            let _ = error.print();
            return ExitCode::from(status);
        }
    };
    match cli.run() {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("hythe: {error:#}");
            ExitCode::from(hythe::cli::FAILED)
        }
    }
}
