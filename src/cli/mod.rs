//! The command line: words to configuration, configuration to a running node.

mod ask;
mod guest;
mod proxy;
mod signals;
mod vm;

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::{LogFormat, Options};
use crate::control::place::Wanted;
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
    /// Serve a virtual machine
    ///
    /// The machine may come before or after hythe, go, and come again. Serves until it is told to end.
    Vm {
        #[command(flatten)]
        options: Box<Options>,
        #[command(flatten)]
        monitor: vm::Monitor,
    },
    /// Publish ports of a hythe that runs: all of them, or none
    Publish {
        #[command(flatten)]
        wanted: Wanted,
        /// What to publish, as for -p: [ADDRESS:][HOSTPORT[-END]:]GUESTPORT[-END][/tcp|udp]
        #[arg(required = true, value_name = "SPEC")]
        specs: Vec<String>,
    },
    /// Unpublish ports of a hythe that runs: all of them, or none
    ///
    /// Their host ports are free when this ends. Without a host port, every one that leads to the guest's is meant.
    Unpublish {
        #[command(flatten)]
        wanted: Wanted,
        /// What to unpublish, in the words in which it was published
        #[arg(required = true, value_name = "SPEC")]
        specs: Vec<String>,
    },
    /// Show or change the proxy that the guest's connections go by
    Proxy {
        #[command(subcommand)]
        action: proxy::Action,
    },
    /// Look whether hythe can run here, and what would make it better
    ///
    /// The exit status is 0 when it can, 1 when it cannot.
    Doctor {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Tell what would become of the guest's traffic to a destination, and why
    ///
    /// Asked of a hythe that runs, so that it is what its guest gets.
    Explain {
        #[command(flatten)]
        wanted: Wanted,
        /// A name or an address, with a port or without: DEST[:PORT][/tcp|udp]
        #[arg(value_name = "DEST")]
        destination: String,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// List the published ports of a hythe that runs, as docker port does
    Ports {
        #[command(flatten)]
        wanted: Wanted,
        /// As JSON
        #[arg(long)]
        json: bool,
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
            Command::Publish { wanted, specs } => return ask::publish(&wanted, specs),
            Command::Unpublish { wanted, specs } => return ask::unpublish(&wanted, &specs),
            Command::Proxy { action } => return proxy::run(action),
            Command::Doctor { json } => return ask::doctor(json),
            Command::Explain { wanted, destination, json } => {
                return ask::explain(&wanted, &destination, json);
            }
            Command::Ports { wanted, json } => return ask::ports(&wanted, json),
            Command::Vm { options, monitor } => {
                let options = options.with_file()?;
                log(options.verbose, options.dns_log, options.log_format.unwrap_or_default());
                return vm::serve(options, &monitor);
            }
            Command::Run { options, command } => (options, Target::Run { command }),
            Command::Attach { options, target: AttachTarget { netns: Some(path), .. } } => {
                (options, Target::Path(path))
            }
            Command::Attach { options, target: AttachTarget { pid, .. } } => {
                (options, Target::Process(pid.unwrap_or_default()))
            }
        };
        let options = options.with_file()?;
        if let (Some(name), Target::Path(_) | Target::Process(_)) = (&options.hostname, &target) {
            anyhow::bail!(
                "--hostname {name}: attach leaves the host name to those who live in the namespace; it is for hythe run"
            );
        }
        log(options.verbose, options.dns_log, options.log_format.unwrap_or_default());
        guest::serve(options, target)
    }
}

/// Writes to standard error, in one piece. Whoever closed it does not want to know.
pub fn say(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// What is wrong with the words of the command line, and where the right ones are told.
pub fn in_one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let (problem, rest) = text.split_once("\n\nUsage: ").unwrap_or((&text, ""));
    let problem = problem.split("\n\nFor more information").next().unwrap_or_default();
    let paragraphs = problem.trim_start_matches("error: ").split("\n\n");
    let sentences: Vec<String> =
        paragraphs.map(|words| words.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    // The usage begins with the command's name, before what it takes.
    let name = |word: &&str| word.bytes().all(|byte| byte.is_ascii_lowercase());
    let command: Vec<&str> = rest.split_whitespace().take_while(name).collect();
    let command = if command.is_empty() { "hythe".to_string() } else { command.join(" ") };
    format!("{} (see {command} --help)", sentences.join("; "))
}

/// Log lines go to standard error; what they say is chosen by `-v`, or by `HYTHE_LOG`.
fn log(verbose: u8, dns: bool, format: LogFormat) {
    use tracing_subscriber::EnvFilter;
    let default = match (verbose, dns) {
        (0, false) => "warn",
        (0, true) => "warn,dns=info",
        (1, _) => "info",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_env("HYTHE_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    // What cannot be written is not complained about, by writing.
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .log_internal_errors(false);
    match format {
        LogFormat::Text => builder.without_time().with_target(false).init(),
        LogFormat::Json => builder.json().init(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(words: &[&str]) -> String {
        in_one_line(&Cli::try_parse_from(words).unwrap_err())
    }

    #[test]
    fn a_mistake_is_told_in_one_line_with_where_to_find_help() {
        for (words, expected) in [
            (&["hythe", "run", "--bogus", "true"][..], "unexpected argument '--bogus' found; tip: "),
            (&["hythe", "run"], "the following required arguments were not provided: <COMMAND>..."),
            (&["hythe", "run", "--engine", "warp", "true"], "[possible values: auto, io-uring, epoll]"),
            (&["hythe", "atach"], "unrecognized subcommand 'atach'; tip: "),
        ] {
            let line = line(words);
            assert!(line.contains(expected), "{line}");
            assert!(!line.contains('\n') && line.ends_with(" --help)"), "{line}");
        }
        assert!(line(&["hythe", "run", "--bogus"]).ends_with("(see hythe run --help)"));
        assert!(line(&["hythe", "bogus"]).ends_with("(see hythe --help)"));
    }
}
