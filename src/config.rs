//! What the user asked for, in words ([`Options`]: command line and TOML file) and checked ([`Config`]).

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::Deserialize;

use crate::control::place::{PlaceError, Wanted};
use crate::frame::address::Mac;
use crate::host::engine::EngineChoice;
use crate::netlink::HostNetwork;
use crate::policy::UdpFiltering;
use crate::policy::addresses::{Addresses, Family, OTHER_SUBNETS, OTHER_SUBNETS6, SUBNET, SUBNET6};
use crate::policy::guest_api::{GuestApi, GuestBounds, port_range};
use crate::policy::publish::{self, PublishRequest};

/// The gateway's MAC: locally administered, the same in every guest, so that a moved guest's cache stays right.
pub const GATEWAY_MAC: Mac = Mac([0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd]);
/// The guest's default MAC.
pub const GUEST_MAC: Mac = Mac([0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xee]);

/// Workers at the most.
pub const MAX_WORKERS: usize = 64;

/// RFC 791 and RFC 8200: the smallest MTUs of the families.
const MTU_MIN: u16 = 576;
const MTU_MIN_V6: u16 = 1280;
const MTU_MAX: u16 = 65_520;

/// About what it takes to wake a processor of a virtual machine that has halted.
const SPIN_DEFAULT_US: u32 = 50;

/// Flows that one process holds by default.
const FLOWS_DEFAULT: u32 = 262_144;

/// Ports that a guest may publish at a time by default.
const GUEST_PORTS_DEFAULT: usize = 1024;

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
    #[serde(deserialize_with = "mac")]
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

    /// Do not let the guest reach the host's loopback
    #[arg(long)]
    pub no_host_loopback: bool,

    /// Do not let the guest reach the host's other addresses
    #[arg(long)]
    pub no_host_addresses: bool,

    /// Let the guest reach the cloud's metadata service (169.254.169.254)
    #[arg(long)]
    pub allow_metadata: bool,

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
const FILE_MAX_BYTES: u64 = 1 << 20;

fn read_bounded(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    let read = std::fs::File::open(path)?.take(FILE_MAX_BYTES + 1).read_to_string(&mut text)?;
    if read as u64 > FILE_MAX_BYTES {
        return Err(std::io::Error::other("it is larger than 1 MiB"));
    }
    Ok(text)
}

fn mac<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Mac>, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map(Some).map_err(serde::de::Error::custom)
}

/// What cannot be done as asked.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("--config {path}: cannot be read ({error})", path = .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The file is not what is expected.
    #[error("--config {path}: {message}", path = .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where and what.
        message: String,
    },
    /// A specification of `--publish` means nothing.
    #[error("--publish {0}")]
    Publish(#[from] publish::PublishError),
    /// The name of the control socket cannot be one.
    #[error(transparent)]
    Name(#[from] PlaceError),
    /// A subnet covers a network of the host.
    #[error(
        "{option} {subnet}: the host has a route to {network}; choose a subnet that overlaps no network of the host",
        option = subnet_option(subnet)
    )]
    Overlap {
        /// The subnet.
        subnet: IpNet,
        /// The host's network.
        network: IpNet,
    },
    /// Every subnet that is tried by default covers a network of the host.
    #[error("no private subnet is free: the host has routes to all that are tried; choose one by {0}")]
    NoSubnet(&'static str),
    /// The kernel does not tell its routes.
    #[error("the host's routes cannot be read ({0})")]
    Routes(std::io::Error),
    /// Another value that cannot be.
    #[error("{0}")]
    Value(String),
}

impl Options {
    /// Adds what the file named by `--config` says and the command line does not.
    pub fn with_file(self) -> Result<Self, ConfigError> {
        let Some(path) = self.config.clone() else { return Ok(self) };
        let text =
            read_bounded(&path).map_err(|error| ConfigError::Unreadable { path: path.clone(), error })?;
        let file = Self::parse(&text, &path)?;
        Ok(self.over(file))
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(1, |span| 1 + text[..span.start].matches('\n').count());
            let message = format!("line {line}: {}", error.message());
            ConfigError::Malformed { path: path.to_path_buf(), message }
        })
    }

    /// These options, and where they say nothing, the other ones.
    fn over(self, other: Self) -> Self {
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
            no_host_loopback: self.no_host_loopback || other.no_host_loopback,
            no_host_addresses: self.no_host_addresses || other.no_host_addresses,
            allow_metadata: self.allow_metadata || other.allow_metadata,
            snat_from: either(self.snat_from, other.snat_from),
            udp_filtering: self.udp_filtering.or(other.udp_filtering),
            always_listen: self.always_listen || other.always_listen,
            workers: self.workers.or(other.workers),
            engine: self.engine.or(other.engine),
            max_flows: self.max_flows.or(other.max_flows),
            spin_us: self.spin_us.or(other.spin_us),
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

/// Options that were checked and completed.
#[derive(Clone, Debug)]
pub struct Config {
    /// Addresses and rules of the link.
    pub addresses: Addresses,
    /// The guest's MAC.
    pub guest_mac: Mac,
    /// The link's MTU.
    pub mtu: u16,
    /// The name of the guest's interface.
    pub interface: String,
    /// The guest's host name.
    pub hostname: Option<String>,
    /// Resolvers to ask instead of the host's.
    pub dns: Vec<IpAddr>,
    /// Ports to publish.
    pub publish: Vec<PublishRequest>,
    /// Which control socket it has.
    pub control: Wanted,
    /// What the guest may ask.
    pub guest_api: GuestApi,
    /// What it may publish.
    pub guest_bounds: GuestBounds,
    /// A published port refuses clients while the guest does.
    pub mirror_refusal: bool,
    /// Whether strangers' datagrams reach the guest.
    pub udp_filtering: UdpFiltering,
    /// Worker threads.
    pub workers: usize,
    /// The engine that was asked for.
    pub engine: EngineChoice,
    /// Flows held at the most.
    pub max_flows: u32,
    /// How long to look for work before sleeping.
    pub spin: Duration,
    /// Where to write frames.
    pub capture: Option<PathBuf>,
    /// Whether rights are given up after the start.
    pub sandbox: bool,
    /// How much to say.
    pub verbose: u8,
    /// How to say it.
    pub log_format: LogFormat,
    /// Whether the host has a default route of IPv6.
    pub host_has_ipv6: bool,
    /// What the user should know about how the options were completed.
    pub notes: Vec<String>,
}

impl Config {
    /// Checks options against the host and each other.
    pub fn new(options: Options, host: &HostNetwork) -> Result<Self, ConfigError> {
        let mut notes = Vec::new();
        if options.ipv4_only && options.ipv6_only {
            return Err(ConfigError::Value("ipv4-only and ipv6-only: leave one out".into()));
        }
        let v4 = (!options.ipv6_only).then(|| family4(&options, host, &mut notes)).transpose()?;
        let v6 = (!options.ipv4_only).then(|| family6(&options, host, &mut notes)).transpose()?;
        let mtu = options.mtu.unwrap_or(1500);
        let least = if v6.is_some() { MTU_MIN_V6 } else { MTU_MIN };
        if !(least..=MTU_MAX).contains(&mtu) {
            return Err(ConfigError::Value(format!(
                "--mtu {mtu}: must be from {least} to {MTU_MAX} bytes{}",
                if v6.is_some() { " (IPv6 needs 1280; -4 allows less)" } else { "" }
            )));
        }
        let guest_mac = options.mac.unwrap_or(GUEST_MAC);
        if guest_mac == GATEWAY_MAC {
            return Err(ConfigError::Value(format!("--mac {guest_mac}: is the gateway's")));
        }
        if let Some(name) = &options.hostname {
            check_hostname(name)?;
        }
        let interface = options.interface.unwrap_or_else(|| "eth0".to_string());
        // IFNAMSIZ, less the final zero; the kernel takes no slash, colon or space.
        if !(1..=15).contains(&interface.len()) || interface.contains(['/', ':', ' ', '%']) {
            return Err(ConfigError::Value(format!("--interface '{interface}': is no name of an interface")));
        }
        let mut publish = Vec::new();
        for spec in &options.publish {
            publish.extend(publish::parse(spec)?);
        }
        let control = Wanted { name: options.name, api: options.api };
        control.check()?;
        let guest_api = options.guest_api.unwrap_or_default();
        let ports = options.guest_api_ports.as_deref().unwrap_or("1-65535");
        let guest_bounds = GuestBounds {
            ports: port_range(ports).ok_or_else(|| {
                ConfigError::Value(format!(
                    "--guest-api-ports '{ports}': is no range of ports, like 1024-65535"
                ))
            })?,
            addresses: options.guest_api_address,
            most: options.guest_api_max_ports.unwrap_or(GUEST_PORTS_DEFAULT),
        };
        let workers = options.workers.unwrap_or_else(default_workers);
        if !(1..=MAX_WORKERS).contains(&workers) {
            return Err(ConfigError::Value(format!("--workers {workers}: must be from 1 to {MAX_WORKERS}")));
        }
        let max_flows = options.max_flows.unwrap_or(FLOWS_DEFAULT);
        if !(64..=16_777_216).contains(&max_flows) {
            return Err(ConfigError::Value(format!("--max-flows {max_flows}: must be from 64 to 16777216")));
        }
        let global_prefix = host.global_prefix.filter(|_| v6.is_some());
        Ok(Self {
            addresses: Addresses {
                gateway_mac: GATEWAY_MAC,
                v4,
                v6,
                global_prefix,
                host_loopback: !options.no_host_loopback,
                host_addresses: !options.no_host_addresses,
                metadata: options.allow_metadata,
                guest_api: guest_api != GuestApi::Off,
                snat_from: options.snat_from,
                own: host.own.clone(),
            },
            guest_mac,
            mtu,
            interface,
            hostname: options.hostname,
            dns: options.dns,
            publish,
            control,
            guest_api,
            guest_bounds,
            mirror_refusal: !options.always_listen,
            udp_filtering: options.udp_filtering.unwrap_or_default(),
            workers,
            engine: options.engine.unwrap_or_default(),
            max_flows,
            spin: Duration::from_micros(u64::from(options.spin_us.unwrap_or(SPIN_DEFAULT_US))),
            capture: options.capture,
            sandbox: !options.no_sandbox,
            verbose: options.verbose,
            log_format: options.log_format.unwrap_or_default(),
            host_has_ipv6: host.has_default[1],
            notes,
        })
    }

    /// The guest's addresses with their prefixes, for setting up its interface.
    pub fn guest_addresses(&self) -> Vec<IpNet> {
        let own = self
            .addresses
            .families()
            .filter_map(|family| IpNet::new(family.guest.ip(), family.subnet.prefix_len()).ok());
        let global = self.addresses.global_prefix.and_then(|prefix| {
            // The guest's address in the host's prefix is made from its MAC (RFC 2464, 4). It is never on a wire, and
            // so must only differ from those that the guest wants to reach.
            let interface = crate::policy::addresses::link_local(self.guest_mac).octets();
            let mut octets = prefix.network().octets();
            octets[8..].copy_from_slice(&interface[8..]);
            IpNet::new(Ipv6Addr::from(octets).into(), 128).ok()
        });
        own.chain(global).collect()
    }
}

fn default_workers() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| cores.get().min(4))
}

/// The subnet that was chosen, or one that is free of the default and other ones.
fn subnet<N: Copy + Into<IpNet> + std::fmt::Display>(
    chosen: Option<N>,
    default: N,
    others: &[N],
    host: &HostNetwork,
    notes: &mut Vec<String>,
) -> Result<N, ConfigError> {
    if let Some(subnet) = chosen {
        check_scope(subnet.into())?;
        return match host.overlap(subnet.into()) {
            Some(network) => Err(ConfigError::Overlap { subnet: subnet.into(), network }),
            None => Ok(subnet),
        };
    }
    let is_free = |subnet: &&N| host.overlap((**subnet).into()).is_none();
    if is_free(&&default) {
        return Ok(default);
    }
    let other = others.iter().find(is_free).copied();
    let other = other.ok_or(ConfigError::NoSubnet(subnet_option(&default.into())))?;
    notes.push(format!("a route of the host covers {default}: the link's subnet is {other}"));
    Ok(other)
}

fn subnet_option(subnet: &IpNet) -> &'static str {
    if subnet.addr().is_ipv4() { "--subnet" } else { "--subnet6" }
}

/// Networks whose addresses mean something else in any kernel: unspecified and "this network" (RFC 1122, 3.2.1.3),
/// loopback, link-local, multicast, and 240.0.0.0/4 (RFC 1112, 4).
const SPECIAL: [&str; 9] = [
    "0.0.0.0/8",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "224.0.0.0/4",
    "240.0.0.0/4",
    "::/64",
    "::ffff:0:0/96",
    "fe80::/10",
    "ff00::/8",
];

fn check_scope(subnet: IpNet) -> Result<(), ConfigError> {
    let special = SPECIAL.iter().filter_map(|text| text.parse::<IpNet>().ok());
    let mut covered =
        special.filter(|net| net.contains(&subnet.network()) || subnet.contains(&net.network()));
    match covered.next() {
        Some(special) => Err(ConfigError::Value(format!(
            "{} {subnet}: {special} is no place for a link (loopback, link-local, multicast or reserved); choose a private \
             subnet",
            subnet_option(&subnet)
        ))),
        None => Ok(()),
    }
}

fn family4(options: &Options, host: &HostNetwork, notes: &mut Vec<String>) -> Result<Family, ConfigError> {
    let subnet = subnet(options.subnet, SUBNET, &OTHER_SUBNETS, host, notes)?;
    if subnet.prefix_len() > 29 {
        return Err(ConfigError::Value(format!(
            "--subnet {subnet}: needs room for at least six hosts (a /29)"
        )));
    }
    let first = u32::from(subnet.network());
    let last = u32::from(subnet.broadcast());
    let inside = |name: &str, ip: Ipv4Addr| {
        let number = u32::from(ip);
        if number > first && number < last {
            Ok(ip)
        } else {
            Err(ConfigError::Value(format!("--{name} {ip}: is no host address of the subnet {subnet}")))
        }
    };
    let gateway = inside("gateway-ip", options.gateway_ip.unwrap_or(Ipv4Addr::from(first + 1)))?;
    let guest = inside("guest-ip", options.guest_ip.unwrap_or(Ipv4Addr::from(first + 3)))?;
    // .254 of the default subnet; the last host address of any other.
    let host = inside("host-ip", options.host_ip.unwrap_or(Ipv4Addr::from(last - 1)))?;
    if gateway == guest || guest == host || gateway == host {
        return Err(ConfigError::Value(format!(
            "--gateway-ip {gateway}, --guest-ip {guest}, --host-ip {host}: must differ from each other"
        )));
    }
    Ok(Family {
        subnet: subnet.trunc().into(),
        gateway: gateway.into(),
        host: host.into(),
        guest: guest.into(),
    })
}

fn family6(options: &Options, host: &HostNetwork, notes: &mut Vec<String>) -> Result<Family, ConfigError> {
    let subnet = subnet(options.subnet6, SUBNET6, &OTHER_SUBNETS6, host, notes)?.trunc();
    if subnet.prefix_len() != 64 {
        return Err(ConfigError::Value(format!(
            "--subnet6 {subnet}: must be a /64, as SLAAC needs (RFC 4862)"
        )));
    }
    let at = |last: u128| Ipv6Addr::from(u128::from(subnet.network()) + last).into();
    Ok(Family { subnet: subnet.into(), gateway: at(1), host: at(0x254), guest: at(3) })
}

/// RFC 1123, 2.1.
fn check_hostname(name: &str) -> Result<(), ConfigError> {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    // 64 is the kernel's limit (sethostname(2)).
    if name.len() <= 64 && name.split('.').all(label) {
        Ok(())
    } else {
        Err(ConfigError::Value(format!("--hostname '{name}': is no host name (letters, digits, hyphens)")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(options: Options) -> Result<Config, ConfigError> {
        Config::new(options, &HostNetwork::default())
    }

    fn message(options: Options) -> String {
        config(options).unwrap_err().to_string()
    }

    #[test]
    fn the_defaults_are_those_of_the_design() {
        let config = config(Options::default()).unwrap();
        let v4 = config.addresses.v4.unwrap();
        assert_eq!(
            [v4.gateway, v4.host, v4.guest].map(|address| address.to_string()),
            ["192.168.65.1", "192.168.65.254", "192.168.65.3"]
        );
        let v6 = config.addresses.v6.unwrap();
        assert_eq!(
            [v6.gateway, v6.host, v6.guest].map(|address| address.to_string()),
            ["fdc4:f303:9324::1", "fdc4:f303:9324::254", "fdc4:f303:9324::3"]
        );
        assert_eq!((config.mtu, config.max_flows), (1500, 262_144));
    }

    #[test]
    fn a_default_subnet_that_the_host_uses_gives_way_and_a_chosen_one_does_not() {
        let host =
            HostNetwork { networks: vec!["192.168.0.0/16".parse().unwrap()], ..HostNetwork::default() };
        let config = Config::new(Options::default(), &host).unwrap();
        assert_eq!(config.addresses.v4.unwrap().subnet, "172.30.65.0/24".parse().unwrap());
        assert_eq!(config.notes.len(), 1);
        let chosen = Options { subnet: Some("192.168.65.0/24".parse().unwrap()), ..Options::default() };
        let error = Config::new(chosen, &host).unwrap_err().to_string();
        assert!(error.contains("192.168.0.0/16"), "{error}");
    }

    #[test]
    fn a_default_subnet_of_ipv6_gives_way_too_and_the_option_is_named_after_the_family() {
        let host = HostNetwork { networks: vec![SUBNET6.into()], ..HostNetwork::default() };
        let config = Config::new(Options::default(), &host).unwrap();
        assert_eq!(config.addresses.v6.unwrap().subnet, OTHER_SUBNETS6[0].into());
        assert!(config.notes[0].contains("fd9a:6c1e:27b8::/64"), "{:?}", config.notes);
        let chosen = Options { subnet6: Some(SUBNET6), ..Options::default() };
        let error = Config::new(chosen, &host).unwrap_err().to_string();
        assert!(error.starts_with("--subnet6 fdc4:f303:9324::/64: "), "{error}");
        let all: Vec<IpNet> = OTHER_SUBNETS6.iter().chain([&SUBNET6]).map(|net| (*net).into()).collect();
        let host = HostNetwork { networks: all, ..HostNetwork::default() };
        let error = Config::new(Options::default(), &host).unwrap_err().to_string();
        assert!(error.ends_with("by --subnet6"), "{error}");
        // A family that is off is not looked for a place.
        let v4 = Options { ipv4_only: true, ..Options::default() };
        Config::new(v4, &host).unwrap();
    }

    #[test]
    fn a_file_that_is_no_configuration_is_not_read_to_its_end() {
        let path = std::env::temp_dir().join(format!("hythe-config-{}", std::process::id()));
        std::fs::write(&path, " ".repeat(FILE_MAX_BYTES as usize + 1)).unwrap();
        let options = Options { config: Some(path.clone()), ..Options::default() };
        let error = options.with_file().unwrap_err().to_string();
        std::fs::remove_file(&path).unwrap();
        assert!(error.contains("larger than 1 MiB"), "{error}");
    }

    #[test]
    fn values_that_cannot_be_are_refused_with_what_to_do() {
        let options = Options::default;
        for (options, expected) in [
            (Options { mtu: Some(1000), ..options() }, "--mtu 1000: must be from 1280"),
            (Options { workers: Some(0), ..options() }, "--workers 0: must be from 1 to 64"),
            (
                Options { guest_ip: Some(Ipv4Addr::new(10, 0, 0, 1)), ..options() },
                "--guest-ip 10.0.0.1: is no host",
            ),
            (Options { guest_ip: Some(Ipv4Addr::new(192, 168, 65, 1)), ..options() }, "must differ"),
            (Options { subnet6: Some("fd00::/48".parse().unwrap()), ..options() }, "must be a /64"),
            (Options { hostname: Some("a_b".into()), ..options() }, "is no host name"),
            (Options { ipv4_only: true, ipv6_only: true, ..options() }, "leave one out"),
            (
                Options { subnet: Some("127.1.0.0/16".parse().unwrap()), ..options() },
                "127.0.0.0/8 is no place",
            ),
            (Options { subnet: Some("0.0.0.0/0".parse().unwrap()), ..options() }, "is no place"),
            (
                Options { subnet: Some("224.0.1.0/24".parse().unwrap()), ..options() },
                "224.0.0.0/4 is no place",
            ),
            (Options { subnet: Some("169.254.1.0/24".parse().unwrap()), ..options() }, "is no place"),
            (Options { subnet6: Some("fe80::/64".parse().unwrap()), ..options() }, "--subnet6 fe80::/64: "),
            (Options { subnet6: Some("ff05::/64".parse().unwrap()), ..options() }, "ff00::/8 is no place"),
            (Options { subnet6: Some("::/64".parse().unwrap()), ..options() }, "is no place"),
            (Options { mac: Some(GATEWAY_MAC), ..options() }, "is the gateway's"),
            (Options { publish: vec!["x:80".into()], ..options() }, "expected [ADDRESS:]"),
            (
                Options { guest_api_ports: Some("9-5".into()), ..options() },
                "--guest-api-ports '9-5': is no range",
            ),
            (Options { name: Some("../x".into()), ..options() }, "--name '../x': "),
        ] {
            let message = message(options);
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn a_file_has_the_same_keys_and_the_command_line_counts_more() {
        let path = Path::new("hythe.toml");
        let file = Options::parse(
            "publish = ['8000:80']\nmtu = 9000\nmac = '52:54:00:12:34:56'\nengine = 'io-uring'\nipv4-only = true\n",
            path,
        )
        .unwrap();
        let merged = Options { mtu: Some(1400), ..Options::default() }.over(file);
        assert_eq!(
            (merged.mtu, merged.publish, merged.ipv4_only),
            (Some(1400), vec!["8000:80".to_string()], true)
        );
        assert_eq!(merged.engine, Some(EngineChoice::IoUring));
    }

    #[test]
    fn an_unknown_key_and_a_wrong_value_are_named_with_their_line() {
        for (text, expected) in
            [("mtu = 1500\nmtuu = 3\n", "line 2: unknown field `mtuu`"), ("\n\nmtu = 'x'", "line 3")]
        {
            let error = Options::parse(text, Path::new("x.toml")).unwrap_err().to_string();
            assert!(error.starts_with("--config x.toml: ") && error.contains(expected), "{error}");
        }
    }
}
