//! What the service is told when it begins.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::host::{HOSTS, RESOLV_CONF};
use crate::policy::egress::Rules;
use crate::policy::names::NamePolicy;

/// What systemd-resolved writes whenever the servers or domains of a link change: a VPN that comes changes it, while
/// /etc/resolv.conf names the same stub as before.
const RESOLVED_CONF: &str = "/run/systemd/resolve/resolv.conf";

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// How long a resolver is alone with a query before the next one is asked too.
    pub attempt: Duration,
    /// How long a query may take in all.
    pub total: Duration,
    /// How long a resolver that kept silent is asked only after the others.
    pub silent_last: Duration,
    /// How long a stream may go without progress: RFC 7766, 6.2.3, asks for "at least a few seconds".
    pub stream_idle: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            attempt: Duration::from_secs(2),
            total: Duration::from_secs(8),
            silent_last: Duration::from_secs(30),
            stream_idle: Duration::from_secs(10),
        }
    }
}

/// How much may be under way.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Queries that wait for a resolver. Each holds a socket for every resolver that it waits for, up to
    /// [`Patience::total`] / [`Patience::attempt`] of them.
    pub in_flight: usize,
    /// Queries of one stream whose answers the guest has not taken yet.
    pub per_stream: usize,
    /// Streams.
    pub streams: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { in_flight: 256, per_stream: 64, streams: 64 }
    }
}

/// What is configured.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where the host's resolvers are written down.
    pub resolv_conf: PathBuf,
    /// Where the host's own names are.
    pub hosts: PathBuf,
    /// What changes when the host's resolver asks others than before.
    pub resolved_conf: PathBuf,
    /// Resolvers that the user named; where there are any, those of the file do not count.
    pub servers: Vec<SocketAddr>,
    /// The guest's own name.
    pub hostname: Option<String>,
    /// What the user says about names.
    pub names: NamePolicy,
    /// Where the guest may go: names that lead nowhere are not resolved.
    pub egress: Arc<Rules>,
    /// How long things may take.
    pub patience: Patience,
    /// How much may be under way.
    pub limits: Limits,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            resolv_conf: RESOLV_CONF.into(),
            hosts: HOSTS.into(),
            resolved_conf: RESOLVED_CONF.into(),
            servers: Vec::new(),
            hostname: None,
            names: NamePolicy::default(),
            egress: Arc::default(),
            patience: Patience::default(),
            limits: Limits::default(),
        }
    }
}
