//! `hythe proxy`: which proxy the connections of a running hythe's guest go by.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, Subcommand};
use hyper::Method;

use super::ask::print;
use crate::config::proxy::secret_of;
use crate::control::client::ask;
use crate::control::place::Wanted;
use crate::control::shapes::{Proxy, ProxyChange};
use crate::policy::proxy::{PacFailure, PacSource, ProxyUrl};

/// The path of it.
const PATH: &str = "/v1/proxy";

/// A script or a file of credentials is read as far as the API takes it.
const FILE_MAX_BYTES: u64 = 60 << 10;

#[derive(Subcommand, Debug)]
pub enum Action {
    /// Show which proxy the guest's connections go by
    Show {
        #[command(flatten)]
        wanted: Wanted,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Have new connections go by another proxy; those that stand go on
    Set {
        #[command(flatten)]
        wanted: Wanted,
        #[command(flatten)]
        words: Box<Words>,
    },
    /// Have new connections go by no proxy
    Off {
        #[command(flatten)]
        wanted: Wanted,
    },
}

/// What is to hold. What is not said is not there.
#[derive(Args, Debug)]
pub struct Words {
    /// The proxy for http: http://, https://, socks5:// or socks5h://HOST[:PORT]
    #[arg(long, value_name = "URL", required_unless_present_any = ["https", "pac"])]
    http: Option<ProxyUrl>,
    /// The proxy for everything else
    #[arg(long, value_name = "URL")]
    https: Option<ProxyUrl>,
    /// Names, suffixes, addresses and networks that no proxy leads to, as in NO_PROXY
    #[arg(long, value_name = "LIST")]
    bypass: Option<String>,
    /// A script that chooses the proxy (PAC): a path, or http://HOST/PATH
    #[arg(long, value_name = "PAC")]
    pac: Option<PacSource>,
    /// What becomes of connections about which the script has failed to say something
    #[arg(long, value_enum)]
    pac_failure: Option<PacFailure>,
    /// What proxies are told that ask who calls: lines [HOST[:PORT] ]USER:PASSWORD
    #[arg(long, value_name = "FILE")]
    credentials_file: Option<PathBuf>,
    /// Ports whose connections go by the proxy; *: all
    #[arg(long, value_name = "PORTS")]
    transparent_ports: Option<String>,
}

/// Does it.
pub fn run(action: Action) -> anyhow::Result<u8> {
    match action {
        Action::Show { wanted, json } => {
            let answer = ask(&wanted.find()?, Method::GET, PATH, None)?;
            let shown: Proxy = serde_json::from_slice(&answer).context("what holds is not understood")?;
            print(&if json {
                format!("{}\n", serde_json::to_string_pretty(&shown)?)
            } else {
                lines(&shown)
            })?;
        }
        Action::Set { wanted, words } => {
            let body = serde_json::to_vec(&change(*words)?)?;
            ask(&wanted.find()?, Method::PUT, PATH, Some(body))?;
        }
        Action::Off { wanted } => {
            ask(&wanted.find()?, Method::DELETE, PATH, None)?;
        }
    }
    Ok(0)
}

fn change(words: Words) -> anyhow::Result<ProxyChange> {
    for (name, proxy) in [("http", &words.http), ("https", &words.https)] {
        if proxy.as_ref().is_some_and(|proxy| proxy.credentials.is_some()) {
            anyhow::bail!(
                "--{name}: a password on a command line is there for all to read; put it into a file for --credentials-file"
            );
        }
    }
    let script = match &words.pac {
        Some(PacSource::File(path)) => Some(read(path)?),
        _ => None,
    };
    let credentials = match &words.credentials_file {
        Some(path) => Some(secret_of("--credentials-file", path)?.reveal().to_string()),
        None => None,
    };
    Ok(ProxyChange {
        http: words.http.map(|proxy| proxy.to_string()),
        https: words.https.map(|proxy| proxy.to_string()),
        bypass: words.bypass,
        pac: words.pac.map(|source| source.to_string()),
        script,
        pac_failure: words.pac_failure,
        transparent_ports: words.transparent_ports,
        credentials,
    })
}

fn read(path: &Path) -> anyhow::Result<String> {
    let mut text = String::new();
    let read = std::fs::File::open(path)
        .and_then(|file| file.take(FILE_MAX_BYTES + 1).read_to_string(&mut text))
        .with_context(|| path.display().to_string())?;
    anyhow::ensure!(read as u64 <= FILE_MAX_BYTES, "{}: is larger than 60 KiB", path.display());
    Ok(text)
}

fn lines(shown: &Proxy) -> String {
    let mode = serde_json::to_value(shown.mode).ok().and_then(|mode| Some(mode.as_str()?.to_string()));
    let failure =
        serde_json::to_value(shown.pac_failure).ok().and_then(|word| Some(word.as_str()?.to_string()));
    let rows = [
        ("mode", mode),
        ("http", shown.http.clone()),
        ("https", shown.https.clone()),
        ("pac", shown.pac.clone()),
        ("pac failure", failure.filter(|_| shown.pac.is_some())),
        ("bypass", Some(shown.bypass.clone()).filter(|list| !list.is_empty())),
        ("ports", Some(shown.transparent_ports.clone())),
    ];
    rows.into_iter().filter_map(|(name, value)| Some(format!("{name:<12} {}\n", value?))).collect()
}
