//! The `hythe` program: see [`hythe::cli`].

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = match hythe::cli::Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version are no failures.
        Err(error) if !error.use_stderr() => {
            // Whoever closed standard output does not want to know.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            hythe::cli::say(&format!("hythe: {}\n", hythe::cli::in_one_line(&error)));
            return ExitCode::from(hythe::cli::FAILED);
        }
    };
    match cli.run() {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            hythe::cli::say(&format!("hythe: {error:#}\n"));
            ExitCode::from(hythe::cli::FAILED)
        }
    }
}
