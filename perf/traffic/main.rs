//! traffic: the two ends of a measurement.
//!
//! One program, run on both sides of a forwarder, so that both ends are the same code whatever is measured. Clients
//! print one line of JSON; servers say `ready` and run until they are killed. Bulk transfers are iperf3's job.
//!
//! ```text
//! serve ◀── ping-pong, connects, hold, first          sink ◀── flood, flows
//! ```

use std::net::SocketAddr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

mod connects;
mod dial;
mod first;
mod flood;
mod hold;
mod latencies;
mod ping_pong;
mod report;
mod serve;
mod sink;

/// Traffic whose count and delay are known.
#[derive(Parser)]
#[command(max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answer on a TCP and a UDP port, of all addresses of both families
    ///
    /// The first byte of a connection says what it wants: `P`: every byte back; `C`: one byte back and the end.
    /// Datagrams go back as they came.
    Serve {
        /// The port
        port: u16,
    },
    /// One byte there and back over TCP, again and again
    Pp(Exchange),
    /// One byte there and back over UDP, again and again
    Udppp(Exchange),
    /// Connect, one byte there and back, close
    Crr {
        #[command(flatten)]
        exchange: Exchange,
        /// So many connections at a time
        #[arg(default_value_t = 1)]
        concurrent: usize,
    },
    /// Numbered datagrams, as fast as the socket takes them
    Udpsend {
        /// Whom to send to
        to: SocketAddr,
        /// Payload bytes of a datagram
        #[arg(value_parser = clap::value_parser!(u16).range(8..=65_000))]
        size: u16,
        /// For how long
        #[arg(value_parser = seconds)]
        seconds: Duration,
        /// No more than so many a second
        #[arg(long)]
        rate: Option<f64>,
        /// Many datagrams in one send, cut by the kernel (`UDP_SEGMENT`), instead of sendmmsg
        #[arg(long)]
        gso: bool,
    },
    /// Count the datagrams of `udpsend` until its last one, but no longer than so many seconds
    Udpsink {
        /// The port
        port: u16,
        /// For how long at the most
        #[arg(value_parser = seconds)]
        seconds: Duration,
    },
    /// Begin many connections and wait for none of them
    Dial {
        /// How many
        connections: usize,
        /// Where nobody answers
        to: SocketAddr,
        /// For how long
        #[arg(value_parser = seconds)]
        seconds: Duration,
    },
    /// Open many connections and leave them idle
    Hold {
        /// How many
        connections: usize,
        /// The server: a `serve`
        to: SocketAddr,
        /// For how long
        #[arg(value_parser = seconds)]
        seconds: Duration,
    },
    /// Send one datagram from each of many sockets to each of many addresses, and leave it at that
    Flows {
        /// How many sockets
        sockets: usize,
        /// The first address, and the port
        to: SocketAddr,
        /// How many addresses, one after the other
        addresses: u32,
        /// For how long the sockets are kept
        #[arg(value_parser = seconds)]
        seconds: Duration,
    },
    /// Connect, and tell when the answer came, be it a refusal
    First {
        /// Whom to ask
        to: SocketAddr,
    },
}

/// A measurement of round trips.
#[derive(Args)]
struct Exchange {
    /// The server: a `serve`
    to: SocketAddr,
    /// For how long
    #[arg(value_parser = seconds)]
    seconds: Duration,
    /// Print the histogram too
    #[arg(long)]
    histogram: bool,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("'{text}' is no number of seconds"))?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Serve { port } => serve::run(port)?,
        Command::Pp(exchange) => {
            ping_pong::tcp(exchange.to, exchange.seconds)?.print("tcp_pp", exchange.histogram);
        }
        Command::Udppp(exchange) => {
            ping_pong::udp(exchange.to, exchange.seconds)?.print("udp_pp", exchange.histogram);
        }
        Command::Crr { exchange, concurrent: 1 } => {
            connects::one_by_one(exchange.to, exchange.seconds)?.print("tcp_crr", exchange.histogram);
        }
        Command::Crr { exchange, concurrent } => {
            connects::many(exchange.to, exchange.seconds, concurrent)?.print("tcp_crr", exchange.histogram);
        }
        Command::Udpsend { to, size, seconds, rate, gso } => {
            flood::run(to, usize::from(size), seconds, rate, gso)?;
        }
        Command::Udpsink { port, seconds } => sink::run(port, seconds)?,
        Command::Dial { connections, to, seconds } => dial::run(connections, to, seconds)?,
        Command::Hold { connections, to, seconds } => hold::run(connections, to, seconds)?,
        Command::Flows { sockets, to, addresses, seconds } => {
            hold::datagrams(sockets, to, addresses, seconds)?;
        }
        Command::First { to } => first::run(to)?,
    }
    Ok(())
}
