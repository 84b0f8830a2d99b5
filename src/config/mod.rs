//! What the user asked for, in words ([`Options`]: command line and TOML file) and checked ([`Config`]).

mod desktop;
mod options;
mod outbound;
pub mod proxy;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use crate::control::place::{PlaceError, Wanted};
use crate::frame::address::Mac;
use crate::host::engine::EngineChoice;
use crate::netlink::HostNetwork;
use crate::policy::addresses::{Addresses, Family, OTHER_SUBNETS, OTHER_SUBNETS6, SUBNET, SUBNET6};
use crate::policy::guest_api::{GuestApi, GuestBounds, port_range};
use crate::policy::names::{self, NamePolicy};
use crate::policy::publish::{self, PublishRequest};
use crate::policy::{Spread, UdpFiltering};
pub use options::{LogFormat, Options};
pub use proxy::ProxyChoice;

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
    /// What else is said about names.
    pub names: NamePolicy,
    /// Ports to publish.
    pub publish: Vec<PublishRequest>,
    /// Which control socket it has.
    pub control: Wanted,
    /// Which proxies there are.
    pub proxy: ProxyChoice,
    /// Whether each refusal by a rule is a line in the log.
    pub egress_log: bool,
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
    /// Over which workers the guest's traffic goes.
    pub spread: Spread,
    /// Where to write frames.
    pub capture: Option<PathBuf>,
    /// Whether rights are given up after the start.
    pub sandbox: bool,
    /// How much to say.
    pub verbose: u8,
    /// How to say it.
    pub log_format: LogFormat,
    /// Whether the host has a default route, for IPv4 and IPv6.
    pub host_has_default: [bool; 2],
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
        let interface = options.interface.clone().unwrap_or_else(|| "eth0".to_string());
        // IFNAMSIZ, less the final zero; the kernel takes no slash, colon or space.
        if !(1..=15).contains(&interface.len()) || interface.contains(['/', ':', ' ', '%']) {
            return Err(ConfigError::Value(format!("--interface '{interface}': is no name of an interface")));
        }
        let mut publish = Vec::new();
        for spec in &options.publish {
            publish.extend(publish::parse(spec)?);
        }
        let guest_api = options.guest_api.unwrap_or_default();
        let guest_bounds = guest_bounds(&options)?;
        let names = names_of(&options)?;
        let proxy = ProxyChoice::of(&options, &mut notes)?;
        let egress = Arc::new(proxy::rules(&options)?);
        let outbound = outbound::choose(&options, host)?;
        let control = Wanted { name: options.name, api: options.api };
        control.check()?;
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
                egress,
                proxy: (!proxy.settings.is_off()).then(|| Arc::new(proxy.settings.clone())),
                transparent: proxy.settings.transparent.clone(),
                snat_from: options.snat_from,
                own: host.own.clone(),
                outbound,
            },
            guest_mac,
            mtu,
            interface,
            hostname: options.hostname,
            dns: options.dns,
            names,
            publish,
            control,
            proxy,
            egress_log: options.egress_log,
            guest_api,
            guest_bounds,
            mirror_refusal: !options.always_listen,
            udp_filtering: options.udp_filtering.unwrap_or_default(),
            workers,
            engine: options.engine.unwrap_or_default(),
            max_flows,
            spin: Duration::from_micros(u64::from(options.spin_us.unwrap_or(SPIN_DEFAULT_US))),
            spread: options.spread.unwrap_or_default(),
            capture: options.capture,
            sandbox: !options.no_sandbox,
            verbose: options.verbose,
            log_format: options.log_format.unwrap_or_default(),
            host_has_default: host.has_default,
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

/// What the guest may publish.
fn guest_bounds(options: &Options) -> Result<GuestBounds, ConfigError> {
    let ports = options.guest_api_ports.as_deref().unwrap_or("1-65535");
    Ok(GuestBounds {
        ports: port_range(ports).ok_or_else(|| {
            ConfigError::Value(format!("--guest-api-ports '{ports}': is no range of ports, like 1024-65535"))
        })?,
        addresses: options.guest_api_address.clone(),
        most: options.guest_api_max_ports.unwrap_or(GUEST_PORTS_DEFAULT),
    })
}

/// Which names are answered how.
fn names_of(options: &Options) -> Result<NamePolicy, ConfigError> {
    let cache = options.dns_cache.unwrap_or(names::CACHE_DEFAULT);
    if cache > names::CACHE_MAX {
        let most = names::CACHE_MAX;
        return Err(ConfigError::Value(format!("--dns-cache {cache}: must be from 0 to {most}")));
    }
    if let Some(zone) = options.zone.iter().find(|zone| zone.values.is_empty()) {
        let name = &zone.name;
        return Err(ConfigError::Value(format!("--zone {name}: names no server; give one or more")));
    }
    if options.record.len() > names::RECORDS_MAX {
        let (given, most) = (options.record.len(), names::RECORDS_MAX);
        return Err(ConfigError::Value(format!("--record: {given} are too many; there can be {most}")));
    }
    if let Some(record) = options.record.iter().find(|record| record.values.len() > names::ADDRESSES_MAX) {
        let (name, most) = (&record.name, names::ADDRESSES_MAX);
        return Err(ConfigError::Value(format!("--record {name}: has more than {most} addresses")));
    }
    Ok(NamePolicy {
        zones: options.zone.clone(),
        records: options.record.clone(),
        hosts: !options.no_hosts,
        cache,
        filter: options.dns_filter.unwrap_or_default(),
        log: options.dns_log,
    })
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
    use std::path::Path;

    use super::options::FILE_MAX_BYTES;
    use super::*;
    use crate::policy::names::AddressFilter;

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
        for (options, expected) in vec![
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
            (
                Options { dns_cache: Some(100_001), ..options() },
                "--dns-cache 100001: must be from 0 to 100000",
            ),
            (Options { record: vec!["n.test=".parse().unwrap(); 4097], ..options() }, "there can be 4096"),
            (Options { zone: vec!["corp.example=".parse().unwrap()], ..options() }, "names no server"),
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
    fn tables_of_a_file_say_what_the_options_of_their_names_do() {
        let file = "dns-cache = 0\ndns-filter = 'auto'\n[zones]\n'corp.example' = ['10.8.0.53', '[fd00::53]:5353']\n\
                    [records]\n'db.test' = ['10.0.0.5', 'fd00::5']\n";
        let options = Options::parse(file, Path::new("hythe.toml")).unwrap();
        let zone = "corp.example=10.8.0.53,[fd00::53]:5353".parse().unwrap();
        let record = "db.test=10.0.0.5,fd00::5".parse().unwrap();
        assert_eq!((&options.zone, &options.record), (&vec![zone], &vec![record]));
        let names = config(options).unwrap().names;
        assert_eq!((names.cache, names.filter, names.zones.len()), (0, AddressFilter::Auto, 1));
        let error = Options::parse("[zones]\n'corp..example' = ['10.8.0.53']\n", Path::new("x.toml"));
        assert!(error.unwrap_err().to_string().contains("'corp..example' is no domain name"));
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
