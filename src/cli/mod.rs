//! The command line: words to configuration, configuration to a running node.

mod guest;
mod signals;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::{LogFormat, Options};
use crate::namespace::Target;

/// hythe failed itself: docker(1)'s status for the same.
pub const FAILED: u8 = 125;

/// The network data plane for containers and their VMs.
#[derive(Parser, Debug)]
#[command(name = "hythe", version, about, long_about = None, max_term_width = 110)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run a command in a new network namespace whose traffic goes through the host's sockets
    ///
    /// The exit status is the command's; 125 when hythe failed, 126 when the command cannot be executed, 127 when it is
    /// not found.
    Run {
        #[command(flatten)]
        options: Box<Options>,
        /// The command and its arguments
        #[arg(trailing_var_arg = true, required = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
    /// Join a network namespace that exists; leaves when it goes away
    Attach {
        #[command(flatten)]
        options: Box<Options>,
        #[command(flatten)]
        target: AttachTarget,
    },
}

#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
struct AttachTarget {
    /// The namespace's file, like /run/netns/NAME
    #[arg(long, value_name = "PATH")]
    netns: Option<PathBuf>,
    /// A process in the namespace
    #[arg(long, value_name = "PID")]
    pid: Option<i32>,
}

impl Cli {
    /// Does what the command line says; returns the exit status.
    pub fn run(self) -> anyhow::Result<u8> {
        let (options, target): (Box<Options>, Target) = match self.command {
            Command::Run { options, command } => (options, Target::Run { command }),
            Command::Attach { options, target: AttachTarget { netns: Some(path), .. } } => {
                (options, Target::Path(path))
            }
            Command::Attach { options, target: AttachTarget { pid, .. } } => {
                (options, Target::Process(pid.unwrap_or_default()))
            }
        };
        let options = options.with_file()?;
        log(options.verbose, options.log_format.unwrap_or_default());
        guest::serve(options, target)
    }
}

/// Log lines go to standard error; what they say is chosen by `-v`, or by `HYTHE_LOG`.
fn log(verbose: u8, format: LogFormat) {
    use tracing_subscriber::EnvFilter;
    let default = match verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_env("HYTHE_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => builder.without_time().with_target(false).init(),
        LogFormat::Json => builder.json().init(),
    }
}
