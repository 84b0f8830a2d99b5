//! The options in the user's words: from the command line, and from a file in TOML.

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use clap::Args;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::Deserialize;

use super::{ConfigError, proxy};
use crate::frame::address::Mac;
use crate::host::engine::EngineChoice;
use crate::policy::bypass::Bypass;
use crate::policy::guest_api::GuestApi;
use crate::policy::names::{self, AddressFilter, Entry, Server};
use crate::policy::proxy::{PacFailure, PacSource, ProxyMode, ProxyUrl, TransparentPorts};
use crate::policy::{Spread, UdpFiltering};

/// How log lines look.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For programs: one JSON object a line.
    Json,
}

/// The options of every link. The same names, with the same meaning, are the keys of the configuration file.
#[derive(Args, Deserialize, Clone, Debug, Default)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Options {
    /// Publish a port: [ADDRESS:][HOSTPORT[-END]:]GUESTPORT[-END][/tcp|udp]
    #[arg(short, long, value_name = "SPEC")]
    pub publish: Vec<String>,

    /// IPv4 only
    #[arg(short = '4', long, conflicts_with = "ipv6_only")]
    pub ipv4_only: bool,

    /// IPv6 only
    #[arg(short = '6', long)]
    pub ipv6_only: bool,

    /// The link's IPv4 subnet [default: 192.168.65.0/24, or another when a route of the host covers it]
    #[arg(long, value_name = "CIDR")]
    pub subnet: Option<Ipv4Net>,

    /// The link's IPv6 subnet [default: fdc4:f303:9324::/64, or another when a route of the host covers it]
    #[arg(long, value_name = "CIDR")]
    pub subnet6: Option<Ipv6Net>,

    /// The guest's IPv4 address [default: .3 of the subnet]
    #[arg(long, value_name = "IP")]
    pub guest_ip: Option<Ipv4Addr>,

    /// The gateway's IPv4 address [default: .1 of the subnet]
    #[arg(long, value_name = "IP")]
    pub gateway_ip: Option<Ipv4Addr>,

    /// The IPv4 address under which the guest reaches the host's loopback [default: .254 of the subnet]
    #[arg(long, value_name = "IP")]
    pub host_ip: Option<Ipv4Addr>,

    /// The link's MTU in bytes [default: 1500]
    #[arg(long, value_name = "BYTES")]
    pub mtu: Option<u16>,

    /// The guest's MAC address
    #[arg(long, value_name = "MAC")]
    #[serde(deserialize_with = "parsed")]
    pub mac: Option<Mac>,

    /// The name of the guest's interface [default: eth0]
    #[arg(long, value_name = "NAME")]
    pub interface: Option<String>,

    /// The guest's host name
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<String>,

    /// Ask this resolver instead of the host's (repeatable)
    #[arg(long, value_name = "ADDR")]
    pub dns: Vec<IpAddr>,

    /// Ask these servers, and no others, about the names of a zone (repeatable; in a file: the table zones)
    #[arg(long, value_name = "NAME=ADDR[,ADDR…]")]
    #[serde(rename = "zones", deserialize_with = "names::entries")]
    pub zone: Vec<Entry<Server>>,

    /// Answer these addresses for a name; *.NAME: for all below it (repeatable; in a file: the table records)
    #[arg(long, value_name = "NAME=ADDR[,ADDR…]")]
    #[serde(rename = "records", deserialize_with = "names::entries")]
    pub record: Vec<Entry<IpAddr>>,

    /// Do not answer by the host's /etc/hosts
    #[arg(long)]
    pub no_hosts: bool,

    /// Answers of resolvers that are kept as long as they hold; 0 none [default: 1000]
    #[arg(long, value_name = "N")]
    pub dns_cache: Option<usize>,

    /// Addresses of resolvers' answers that the guest is not told; auto: IPv6 while the host has no route for it
    #[arg(long, value_enum)]
    pub dns_filter: Option<AddressFilter>,

    /// Log every query: its name, type, sender, who answered, and how
    #[arg(long)]
    pub dns_log: bool,

    /// Let what the guest sends leave the host by this interface, whatever the routes say
    #[arg(long, value_name = "NAME")]
    pub outbound_interface: Option<String>,

    /// Let what the guest sends leave from this address of the host's (repeatable, one a family)
    #[arg(long, value_name = "ADDR")]
    pub outbound_address: Vec<IpAddr>,

    /// Do not let the guest reach the host's loopback
    #[arg(long)]
    pub no_host_loopback: bool,

    /// Do not let the guest reach the host's other addresses
    #[arg(long)]
    pub no_host_addresses: bool,

    /// Let the guest reach the cloud's metadata service (169.254.169.254)
    #[arg(long)]
    pub allow_metadata: bool,

    /// Where the guest's proxy comes from: the host's environment and desktop, nowhere, or the options that follow
    #[arg(long, value_enum)]
    pub proxy: Option<ProxyMode>,

    /// The proxy for http: http://, https://, socks5:// or socks5h://HOST[:PORT]
    #[arg(long, value_name = "URL")]
    #[serde(deserialize_with = "parsed")]
    pub proxy_http: Option<ProxyUrl>,

    /// The proxy for everything else
    #[arg(long, value_name = "URL")]
    #[serde(deserialize_with = "parsed")]
    pub proxy_https: Option<ProxyUrl>,

    /// Names, suffixes, addresses and networks that no proxy leads to, as in NO_PROXY
    #[arg(long, value_name = "LIST")]
    #[serde(deserialize_with = "parsed")]
    pub proxy_bypass: Option<Bypass>,

    /// A script that chooses the proxy (PAC): a path, or http://HOST/PATH
    #[arg(long, value_name = "PAC")]
    #[serde(deserialize_with = "parsed")]
    pub proxy_pac: Option<PacSource>,

    /// What becomes of connections about which the script has failed to say something [default: direct]
    #[arg(long, value_enum)]
    pub pac_failure: Option<PacFailure>,

    /// What proxies are told that ask who calls: lines [HOST[:PORT] ]USER:PASSWORD
    #[arg(long, value_name = "FILE")]
    pub proxy_credentials_file: Option<PathBuf>,

    /// Ports whose connections go by the proxy, and by rules about names; *: all [default: 80,443]
    #[arg(long, value_name = "PORTS")]
    #[serde(deserialize_with = "parsed")]
    pub transparent_ports: Option<TransparentPorts>,

    /// A rule about where the guest may go, the first that fits counts (repeatable): see docs/PROXY.md
    #[arg(long, value_name = "RULE")]
    pub egress: Vec<String>,

    /// Log what rules refuse
    #[arg(long)]
    pub egress_log: bool,

    /// Show clients of these networks to the guest under the gateway's address (repeatable)
    #[arg(long, value_name = "CIDR")]
    pub snat_from: Vec<IpNet>,

    /// Who may answer a guest's datagram
    #[arg(long, value_enum)]
    pub udp_filtering: Option<UdpFiltering>,

    /// Keep listening at published TCP ports although the guest refuses
    #[arg(long)]
    pub always_listen: bool,

    /// Worker threads [default: one a processor, at most 4]
    #[arg(long, value_name = "N")]
    pub workers: Option<usize>,

    /// How input and output is done
    #[arg(long, value_enum)]
    pub engine: Option<EngineChoice>,

    /// Flows held at the most [default: 262144]
    #[arg(long, value_name = "N")]
    pub max_flows: Option<u32>,

    /// Look for work for up to so many microseconds before sleeping, while that pays; 0 never [default: 50]
    #[arg(long, value_name = "US")]
    pub spin_us: Option<u32>,

    /// Over which workers the guest's traffic goes [default: auto]
    #[arg(long, value_enum)]
    pub spread: Option<Spread>,

    /// The name by which this hythe is found by others that ask it [default: the number of its process]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,

    /// Where its control socket is [default: $XDG_RUNTIME_DIR/hythe/NAME.sock, for root /run/hythe/NAME.sock]
    #[arg(long, value_name = "PATH")]
    pub api: Option<PathBuf>,

    /// What the guest may ask of hythe at http://gateway.docker.internal
    #[arg(long, value_enum)]
    pub guest_api: Option<GuestApi>,

    /// Ports of the host that the guest may publish [default: 1-65535]
    #[arg(long, value_name = "FIRST-LAST")]
    pub guest_api_ports: Option<String>,

    /// Addresses of the host on which the guest may publish (repeatable) [default: all]
    #[arg(long, value_name = "CIDR")]
    pub guest_api_address: Vec<IpNet>,

    /// Ports that the guest may publish at a time, each address for itself [default: 1024]
    #[arg(long, value_name = "N")]
    pub guest_api_max_ports: Option<usize>,

    /// Write the guest's frames to a file
    #[arg(long, value_name = "FILE.pcapng")]
    pub capture: Option<PathBuf>,

    /// Keep capabilities, files and system calls open: for debuggers and tracers
    #[arg(long, hide = true)]
    pub no_sandbox: bool,

    /// Read options from a TOML file; the command line's count more
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,

    /// Say more; twice: say everything
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub verbose: u8,

    /// How log lines look
    #[arg(long, value_enum)]
    pub log_format: Option<LogFormat>,
}

fn either<T>(own: Vec<T>, other: Vec<T>) -> Vec<T> {
    if own.is_empty() { other } else { own }
}

/// A configuration file is read as far as one can be long.
pub(super) const FILE_MAX_BYTES: u64 = 1 << 20;

fn read_bounded(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    let read = std::fs::File::open(path)?.take(FILE_MAX_BYTES + 1).read_to_string(&mut text)?;
    if read as u64 > FILE_MAX_BYTES {
        return Err(std::io::Error::other("it is larger than 1 MiB"));
    }
    Ok(text)
}

/// A value that the command line has as a word.
fn parsed<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: std::str::FromStr<Err: std::fmt::Display>,
{
    let text = String::deserialize(deserializer)?;
    text.parse().map(Some).map_err(serde::de::Error::custom)
}

impl Options {
    /// Adds what the file named by `--config` says and the command line does not.
    pub fn with_file(self) -> Result<Self, ConfigError> {
        proxy::refuse_passwords(&self)?;
        let Some(path) = self.config.clone() else { return Ok(self) };
        let text =
            read_bounded(&path).map_err(|error| ConfigError::Unreadable { path: path.clone(), error })?;
        let file = Self::parse(&text, &path)?;
        Ok(self.over(file))
    }

    pub(super) fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(1, |span| 1 + text[..span.start].matches('\n').count());
            let message = format!("line {line}: {}", error.message());
            ConfigError::Malformed { path: path.to_path_buf(), message }
        })
    }

    /// These options, and where they say nothing, the other ones.
    pub(super) fn over(self, other: Self) -> Self {
        Self {
            publish: either(self.publish, other.publish),
            ipv4_only: self.ipv4_only || (other.ipv4_only && !self.ipv6_only),
            ipv6_only: self.ipv6_only || (other.ipv6_only && !self.ipv4_only),
            subnet: self.subnet.or(other.subnet),
            subnet6: self.subnet6.or(other.subnet6),
            guest_ip: self.guest_ip.or(other.guest_ip),
            gateway_ip: self.gateway_ip.or(other.gateway_ip),
            host_ip: self.host_ip.or(other.host_ip),
            mtu: self.mtu.or(other.mtu),
            mac: self.mac.or(other.mac),
            interface: self.interface.or(other.interface),
            hostname: self.hostname.or(other.hostname),
            dns: either(self.dns, other.dns),
            zone: either(self.zone, other.zone),
            record: either(self.record, other.record),
            no_hosts: self.no_hosts || other.no_hosts,
            dns_cache: self.dns_cache.or(other.dns_cache),
            dns_filter: self.dns_filter.or(other.dns_filter),
            dns_log: self.dns_log || other.dns_log,
            outbound_interface: self.outbound_interface.or(other.outbound_interface),
            outbound_address: either(self.outbound_address, other.outbound_address),
            no_host_loopback: self.no_host_loopback || other.no_host_loopback,
            no_host_addresses: self.no_host_addresses || other.no_host_addresses,
            allow_metadata: self.allow_metadata || other.allow_metadata,
            proxy: self.proxy.or(other.proxy),
            proxy_http: self.proxy_http.or(other.proxy_http),
            proxy_https: self.proxy_https.or(other.proxy_https),
            proxy_bypass: self.proxy_bypass.or(other.proxy_bypass),
            proxy_pac: self.proxy_pac.or(other.proxy_pac),
            pac_failure: self.pac_failure.or(other.pac_failure),
            proxy_credentials_file: self.proxy_credentials_file.or(other.proxy_credentials_file),
            transparent_ports: self.transparent_ports.or(other.transparent_ports),
            egress: either(self.egress, other.egress),
            egress_log: self.egress_log || other.egress_log,
            snat_from: either(self.snat_from, other.snat_from),
            udp_filtering: self.udp_filtering.or(other.udp_filtering),
            always_listen: self.always_listen || other.always_listen,
            workers: self.workers.or(other.workers),
            engine: self.engine.or(other.engine),
            max_flows: self.max_flows.or(other.max_flows),
            spin_us: self.spin_us.or(other.spin_us),
            spread: self.spread.or(other.spread),
            name: self.name.or(other.name),
            api: self.api.or(other.api),
            guest_api: self.guest_api.or(other.guest_api),
            guest_api_ports: self.guest_api_ports.or(other.guest_api_ports),
            guest_api_address: either(self.guest_api_address, other.guest_api_address),
            guest_api_max_ports: self.guest_api_max_ports.or(other.guest_api_max_ports),
            capture: self.capture.or(other.capture),
            no_sandbox: self.no_sandbox || other.no_sandbox,
            config: self.config,
            verbose: self.verbose.max(other.verbose),
            log_format: self.log_format.or(other.log_format),
        }
    }
}
