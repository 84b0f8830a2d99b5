//! What the user, or the host's environment, says about proxies, and which one a destination goes through.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::bypass::Bypass;
use super::credentials::CredentialsFile;
use super::ports::{Ports, PortsError};
use super::target::{Target, TargetProtocol};

pub use super::pac_result::{PacResultError, PacWord, RESULT_MAX as PAC_RESULT_MAX, parse_pac_result};
pub use super::proxy_url::{Credentials, ProxyUrl, ProxyUrlError, Scheme, Secret};

/// Ports whose connections are looked into, where nothing else is said.
const TRANSPARENT: [u16; 2] = [80, 443];

/// Who says which proxies there are.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum, serde::Deserialize, serde::Serialize,
)]
#[serde(rename_all = "lowercase")]
pub enum ProxyMode {
    /// The host.
    #[default]
    System,
    /// Nobody: there are none.
    None,
    /// The user.
    Manual,
}

/// Where a PAC script is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PacSource {
    /// In a file of the host.
    File(PathBuf),
    /// At an address that begins with `http://`.
    Http(String),
}

/// What is no place of a PAC script.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PacSourceError {
    /// TLS.
    #[error("a PAC script over https: is not fetched: give it as a file, or over http:")]
    Https,
    /// Something else.
    #[error("a PAC script is at /PATH, file:///PATH or http://HOST[:PORT]/PATH")]
    Other,
}

impl FromStr for PacSource {
    type Err = PacSourceError;

    fn from_str(text: &str) -> Result<Self, PacSourceError> {
        let small = text.get(..8).unwrap_or(text).to_ascii_lowercase();
        let is_plain = !text.contains(|c: char| c.is_control() || c.is_whitespace());
        if small.starts_with("https://") {
            Err(PacSourceError::Https)
        } else if small.starts_with("http://") && text.len() > "http://".len() && is_plain {
            Ok(Self::Http(text.to_string()))
        } else {
            // file:///x has an empty host, and file:/x none.
            let path = if small.starts_with("file:") {
                let path = &text["file:".len()..];
                path.strip_prefix("//localhost").or_else(|| path.strip_prefix("//")).unwrap_or(path)
            } else {
                text
            };
            let is_path = path.starts_with('/') && !path.contains('\0');
            if is_path { Ok(Self::File(path.into())) } else { Err(PacSourceError::Other) }
        }
    }
}

impl fmt::Display for PacSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file://{}", path.display()),
            Self::Http(url) => f.write_str(url),
        }
    }
}

/// What becomes of a connection about which a PAC script has failed to say something.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum, serde::Deserialize, serde::Serialize,
)]
#[serde(rename_all = "lowercase")]
pub enum PacFailure {
    /// It goes without a proxy, as with browsers.
    #[default]
    Direct,
    /// It is refused.
    Block,
}

/// Ports whose connections are looked into.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TransparentPorts {
    /// All.
    All,
    /// These, which may be none.
    Ports(Option<Ports>),
}

impl TransparentPorts {
    /// Whether connections to a port are looked into.
    pub fn contains(&self, port: u16) -> bool {
        match self {
            Self::All => true,
            Self::Ports(ports) => ports.as_ref().is_some_and(|ports| ports.contains(port)),
        }
    }
}

impl Default for TransparentPorts {
    fn default() -> Self {
        Self::Ports(Some(Ports::of(&TRANSPARENT)))
    }
}

impl FromStr for TransparentPorts {
    type Err = PortsError;

    fn from_str(text: &str) -> Result<Self, PortsError> {
        match text.trim() {
            "*" => Ok(Self::All),
            "" | "none" => Ok(Self::Ports(None)),
            list => list.parse().map(|ports| Self::Ports(Some(ports))),
        }
    }
}

impl fmt::Display for TransparentPorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("*"),
            Self::Ports(None) => f.write_str("none"),
            Self::Ports(Some(ports)) => ports.fmt(f),
        }
    }
}

/// What is spoken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Kind {
    /// Plain HTTP, whose requests a proxy can take as they are.
    Http,
    /// Anything else: TLS, or bytes that a proxy is asked to pass on (CONNECT).
    Tunnel,
}

/// What is said about proxies.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ProxySettings {
    /// The proxy of plain HTTP.
    pub http: Option<ProxyUrl>,
    /// The proxy of all else.
    pub https: Option<ProxyUrl>,
    /// What goes past them.
    pub bypass: Bypass,
    /// The script that is asked instead of the two.
    pub pac: Option<PacSource>,
    /// What happens where it fails.
    pub pac_failure: PacFailure,
    /// Ports whose connections are looked into.
    pub transparent: TransparentPorts,
    /// What else is known of who hythe is to proxies: those that a script names.
    pub credentials: CredentialsFile,
}

/// Why a connection goes through no proxy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    /// There is none for its kind.
    NoProxy,
    /// The list says so.
    Bypassed,
}

/// Which way a connection goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Choice<'p> {
    /// Through no proxy.
    Direct(Why),
    /// Through this one.
    Via(&'p ProxyUrl),
    /// The script says.
    Pac,
}

impl ProxySettings {
    /// What the environment of the host says, as programs understand it: small letters count before capitals, an empty value is
    /// none, ALL_PROXY is for whatever has no proxy of its own. Also gives what could not be understood and does not count,
    /// without the values: passwords may be in them.
    pub fn from_environment(variable: impl Fn(&str) -> Option<String>) -> (Self, Vec<String>) {
        let mut notes = Vec::new();
        let value = |name: &str| {
            let capitals = name.to_ascii_uppercase();
            let named = [name.to_string(), capitals].into_iter();
            named
                .filter_map(|name| Some((variable(&name)?, name)))
                .find(|(value, _)| !value.trim().is_empty())
        };
        let mut proxy = |name: &str| {
            let (text, name) = value(name)?;
            let text = Secret::new(text);
            let read = text.reveal().parse::<ProxyUrl>();
            read.map_err(|error| notes.push(format!("{name} is left out of account: {error}"))).ok()
        };
        let (http, https, all) = (proxy("http_proxy"), proxy("https_proxy"), proxy("all_proxy"));
        let (bypass, errors) = value("no_proxy").map(|(list, _)| Bypass::read(&list)).unwrap_or_default();
        notes.extend(errors.into_iter().map(|error| format!("NO_PROXY: {error}")));
        let settings =
            Self { http: http.or_else(|| all.clone()), https: https.or(all), bypass, ..Self::default() };
        (settings, notes)
    }

    /// Whether nothing goes through a proxy.
    pub fn is_off(&self) -> bool {
        self.http.is_none() && self.https.is_none() && self.pac.is_none()
    }

    /// Which way a destination goes.
    pub fn choose(&self, kind: Kind, target: &Target<'_>) -> Choice<'_> {
        let proxy = match kind {
            Kind::Http => &self.http,
            Kind::Tunnel => &self.https,
        };
        let is_relayed = target.protocol == TargetProtocol::Tcp;
        if !is_relayed || (proxy.is_none() && self.pac.is_none()) {
            return Choice::Direct(Why::NoProxy);
        }
        if self.bypass.covers(target) {
            return Choice::Direct(Why::Bypassed);
        }
        match proxy {
            _ if self.pac.is_some() => Choice::Pac,
            Some(proxy) => Choice::Via(proxy),
            None => Choice::Direct(Why::NoProxy),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn environment(pairs: &[(&str, &str)]) -> (ProxySettings, Vec<String>) {
        ProxySettings::from_environment(|name| {
            pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_string())
        })
    }

    fn shown(proxy: Option<&ProxyUrl>) -> String {
        proxy.map_or("-".to_string(), ToString::to_string)
    }

    #[test]
    fn the_environment_is_read_as_programs_read_it() {
        for (pairs, http, https) in [
            (&[][..], "-", "-"),
            (&[("http_proxy", "p:1")], "http://p:1", "-"),
            (&[("HTTP_PROXY", "p:1"), ("HTTPS_PROXY", "q:2")], "http://p:1", "http://q:2"),
            (&[("http_proxy", "p:1"), ("HTTP_PROXY", "q:2")], "http://p:1", "-"),
            (&[("http_proxy", ""), ("HTTP_PROXY", "q:2")], "http://q:2", "-"),
            (&[("all_proxy", "socks5h://p")], "socks5h://p:1080", "socks5h://p:1080"),
            (&[("ALL_PROXY", "p:1"), ("https_proxy", "q:2")], "http://p:1", "http://q:2"),
        ] {
            let (settings, notes) = environment(pairs);
            assert_eq!(
                (shown(settings.http.as_ref()), shown(settings.https.as_ref())),
                (http.into(), https.into())
            );
            assert_eq!((settings.is_off(), notes), (http == "-" && https == "-", vec![]));
        }
    }

    #[test]
    fn what_cannot_be_understood_is_said_without_its_password() {
        let (settings, notes) = environment(&[
            ("HTTPS_PROXY", "http://joe:hunter2@host:x"),
            ("all_proxy", "p:1"),
            ("no_proxy", "a.test,10.0.0.0/99"),
        ]);
        assert_eq!(shown(settings.https.as_ref()), "http://p:1");
        assert_eq!(settings.bypass.to_string(), "a.test");
        assert!(notes[0].starts_with("HTTPS_PROXY is left out of account: the port"), "{notes:?}");
        assert!(notes[1].starts_with("NO_PROXY: '10.0.0.0/99'"), "{notes:?}");
        assert!(!notes.concat().contains("hunter2"));
    }

    #[test]
    fn a_destination_goes_the_way_of_its_kind() {
        let (mut settings, _) =
            environment(&[("http_proxy", "p:1"), ("no_proxy", "corp.example,10.0.0.0/8,x.test:8443")]);
        let said = |settings: &ProxySettings, kind, host, port| match settings
            .choose(kind, &Target::tcp(host, port))
        {
            Choice::Direct(why) => format!("{why:?}"),
            Choice::Via(proxy) => proxy.to_string(),
            Choice::Pac => "pac".to_string(),
        };
        for (kind, host, port, expected) in [
            (Kind::Http, "example.com", 80, "http://p:1"),
            (Kind::Tunnel, "example.com", 443, "NoProxy"),
            (Kind::Http, "www.corp.example", 80, "Bypassed"),
            (Kind::Http, "10.1.2.3", 80, "Bypassed"),
            (Kind::Http, "x.test", 8443, "Bypassed"),
            (Kind::Http, "x.test", 80, "http://p:1"),
        ] {
            assert_eq!(said(&settings, kind, host, port), expected, "{host}");
        }
        settings.pac = Some(PacSource::File("/x".into()));
        assert_eq!(said(&settings, Kind::Tunnel, "example.com", 443), "pac");
        assert_eq!(said(&settings, Kind::Tunnel, "corp.example", 443), "Bypassed");
        let datagram = Target { protocol: TargetProtocol::Udp, ..Target::tcp("example.com", 443) };
        assert_eq!(settings.choose(Kind::Tunnel, &datagram), Choice::Direct(Why::NoProxy));
    }

    #[test]
    fn a_script_is_in_a_file_or_comes_over_http() {
        for (text, expected) in [
            ("/etc/proxy.pac", Ok(PacSource::File("/etc/proxy.pac".into()))),
            ("file:///etc/proxy.pac", Ok(PacSource::File("/etc/proxy.pac".into()))),
            ("FILE:/etc/proxy.pac", Ok(PacSource::File("/etc/proxy.pac".into()))),
            ("file://localhost/x", Ok(PacSource::File("/x".into()))),
            ("http://wpad/wpad.dat", Ok(PacSource::Http("http://wpad/wpad.dat".into()))),
            ("https://wpad/wpad.dat", Err(PacSourceError::Https)),
            ("http://", Err(PacSourceError::Other)),
            ("http://a b", Err(PacSourceError::Other)),
            ("file://host/x", Err(PacSourceError::Other)),
            ("proxy.pac", Err(PacSourceError::Other)),
            ("", Err(PacSourceError::Other)),
        ] {
            assert_eq!(text.parse::<PacSource>(), expected, "{text}");
        }
    }

    #[test]
    fn ports_are_all_some_or_none() {
        for (text, shown, at_80, at_8080) in [
            ("*", "*", true, true),
            ("80,443", "80,443", true, false),
            ("8000-8999", "8000-8999", false, true),
            ("none", "none", false, false),
            ("", "none", false, false),
        ] {
            let ports: TransparentPorts = text.parse().unwrap();
            assert_eq!(
                (ports.to_string().as_str(), ports.contains(80), ports.contains(8080)),
                (shown, at_80, at_8080)
            );
        }
        assert_eq!(TransparentPorts::default().to_string(), "80,443");
        assert!("http".parse::<TransparentPorts>().is_err());
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in any::<String>(), near in "(file:|http:|/)[/a-z]{0,12}") {
            for text in [text, near] {
                if let Ok(source) = text.parse::<PacSource>() {
                    prop_assert_eq!(source.to_string().parse(), Ok(source));
                }
                let _ = text.parse::<TransparentPorts>();
                environment(&[("http_proxy", &text), ("no_proxy", &text)]);
            }
        }
    }
}
