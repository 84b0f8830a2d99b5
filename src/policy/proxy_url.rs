//! Where a proxy is and how it is spoken to: `http://user:password@proxy.example:3128`.
//!
//! A password may stand in it. Nothing here shows one: not `Display`, not `Debug`, and no error, whatever is wrong with the text.

use std::fmt;
use std::str::FromStr;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use zeroize::Zeroizing;

use super::target::{host_address, host_name};

/// The longest user name and password.
const WORD_MAX: usize = 4096;
/// What stands as it is in a user name (RFC 3986, 2.3: unreserved characters).
const USER: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// How a proxy is spoken to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Scheme {
    /// HTTP.
    Http,
    /// HTTP within TLS.
    Https,
    /// SOCKS 5; it is told addresses where they are known.
    Socks5,
    /// SOCKS 5; it is told names.
    Socks5h,
}

impl Scheme {
    /// The port of a proxy that names none.
    pub fn default_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
            Self::Socks5 | Self::Socks5h => 1080,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
            Self::Socks5 => "socks5",
            Self::Socks5h => "socks5h",
        }
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What nobody is shown. Its memory is overwritten when it is no longer needed.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Keeps a text.
    pub fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    /// The text, for whoever sends it where it belongs.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// What a proxy may ask for.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The user's name.
    pub user: String,
    password: Secret,
}

impl Credentials {
    /// A user and a password, unless there are control characters in them, or too much of anything.
    pub fn new(user: String, password: Secret) -> Option<Self> {
        let is_fit = |text: &str| text.len() <= WORD_MAX && !text.contains(char::is_control);
        (is_fit(&user) && is_fit(password.reveal())).then_some(Self { user, password })
    }

    /// The password.
    pub fn password(&self) -> &str {
        self.password.reveal()
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A token is often given as a user without a password.
        f.write_str("Credentials(…)")
    }
}

/// A proxy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProxyUrl {
    /// How it is spoken to.
    pub scheme: Scheme,
    /// Its name in small letters, or its address, IPv6 without brackets.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// What it may ask for.
    pub credentials: Option<Credentials>,
}

/// What is no proxy. The text itself is not in it: a password may be in that.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ProxyUrlError {
    /// Nothing.
    #[error("a proxy is written as [http|https|socks5|socks5h]://[USER:PASSWORD@]HOST[:PORT]")]
    Empty,
    /// SOCKS 4.
    #[error(
        "SOCKS 4 knows neither IPv6 nor passwords, and hythe does not speak it: use socks5:// or socks5h://"
    )]
    Socks4,
    /// Another scheme.
    #[error("a proxy is spoken to by http://, https://, socks5:// or socks5h://")]
    Scheme,
    /// The host.
    #[error("the host of the proxy is neither a name nor an address (IPv6 stands in brackets)")]
    Host,
    /// The port.
    #[error("the port of the proxy is no number from 1 to 65535")]
    Port,
    /// What is behind it.
    #[error("behind the port of a proxy nothing can stand")]
    Path,
    /// The user or the password.
    #[error(
        "the user or the password of the proxy is not UTF-8, is longer than {WORD_MAX} bytes or has control characters"
    )]
    Credentials,
}

impl ProxyUrl {
    /// A proxy by its `HOST[:PORT]`.
    pub fn at(scheme: Scheme, place: &str) -> Result<Self, ProxyUrlError> {
        let (host, port) = match place.strip_prefix('[') {
            Some(rest) => {
                let (inside, behind) = rest.split_once(']').ok_or(ProxyUrlError::Host)?;
                if !inside.contains(':') {
                    return Err(ProxyUrlError::Host);
                }
                match behind.strip_prefix(':') {
                    None if behind.is_empty() => (inside, None),
                    None => return Err(ProxyUrlError::Host),
                    Some(port) => (inside, Some(port)),
                }
            }
            None => match place.split_once(':') {
                None => (place, None),
                Some((_, port)) if port.contains(':') => return Err(ProxyUrlError::Host),
                Some((host, port)) => (host, Some(port)),
            },
        };
        let name = || host_name(host).ok_or(ProxyUrlError::Host);
        let host = host_address(host).map_or_else(name, |address| Ok(address.to_string()))?;
        let port = match port {
            None | Some("") => scheme.default_port(),
            Some(text) => read_port(text).ok_or(ProxyUrlError::Port)?,
        };
        Ok(Self { scheme, host, port, credentials: None })
    }

    /// The host and the port, as an authority of HTTP has them.
    pub fn place(&self) -> String {
        let is_v6 = self.host.contains(':');
        if is_v6 { format!("[{}]:{}", self.host, self.port) } else { format!("{}:{}", self.host, self.port) }
    }
}

fn read_port(text: &str) -> Option<u16> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|port| digits && *port > 0)
}

impl FromStr for ProxyUrl {
    type Err = ProxyUrlError;

    fn from_str(text: &str) -> Result<Self, ProxyUrlError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(ProxyUrlError::Empty);
        }
        let (scheme, rest) = match text.split_once("://") {
            None => (Scheme::Http, text),
            Some((scheme, rest)) => match scheme.to_ascii_lowercase().as_str() {
                "http" => (Scheme::Http, rest),
                "https" => (Scheme::Https, rest),
                // What desktops write means the newest of them.
                "socks5" | "socks" => (Scheme::Socks5, rest),
                "socks5h" => (Scheme::Socks5h, rest),
                "socks4" | "socks4a" => return Err(ProxyUrlError::Socks4),
                _ => return Err(ProxyUrlError::Scheme),
            },
        };
        // A password may hold an @ that should have been encoded; a host never does.
        let (user, place) = match rest.rsplit_once('@') {
            None => (None, rest),
            Some((user, place)) => (Some(user), place),
        };
        let place = place.strip_suffix('/').unwrap_or(place);
        if place.contains(['/', '?', '#']) {
            return Err(ProxyUrlError::Path);
        }
        let mut proxy = Self::at(scheme, place)?;
        proxy.credentials = user.filter(|user| !user.is_empty()).map(read_credentials).transpose()?;
        Ok(proxy)
    }
}

fn read_credentials(text: &str) -> Result<Credentials, ProxyUrlError> {
    let (user, password) = text.split_once(':').unwrap_or((text, ""));
    let decode = |text: &str| {
        let decoded = percent_decode_str(text).decode_utf8().map_err(|_| ProxyUrlError::Credentials)?;
        Ok(decoded.into_owned())
    };
    let (user, password) = (decode(user)?, Secret::new(decode(password)?));
    Credentials::new(user, password).ok_or(ProxyUrlError::Credentials)
}

/// Without the password; a user without one may be a token, and is not shown either.
impl fmt::Display for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://", self.scheme)?;
        match &self.credentials {
            Some(credentials) if credentials.password().is_empty() => f.write_str("…@")?,
            Some(credentials) => write!(f, "{}@", utf8_percent_encode(&credentials.user, USER))?,
            None => {}
        }
        f.write_str(&self.place())
    }
}

impl<'de> serde::Deserialize<'de> for ProxyUrl {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Secret::new(String::deserialize(deserializer)?);
        text.reveal().parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_proxy_is_read_as_it_is_written() {
        for (text, shown) in [
            ("http://proxy.example:3128", "http://proxy.example:3128"),
            ("http://proxy.example:3128/", "http://proxy.example:3128"),
            ("proxy.example:3128", "http://proxy.example:3128"),
            ("Proxy", "http://proxy:80"),
            ("HTTP://PROXY.", "http://proxy:80"),
            ("https://proxy", "https://proxy:443"),
            ("socks5://proxy", "socks5://proxy:1080"),
            ("socks5h://10.0.0.1:1081", "socks5h://10.0.0.1:1081"),
            ("socks://proxy", "socks5://proxy:1080"),
            ("http://[2001:db8::1]", "http://[2001:db8::1]:80"),
            ("http://[2001:db8::1]:8080", "http://[2001:db8::1]:8080"),
            ("[::1]:8080", "http://[::1]:8080"),
            ("  http://proxy  ", "http://proxy:80"),
            ("http://@proxy", "http://proxy:80"),
            ("http://u:p@proxy", "http://u@proxy:80"),
            ("u%40x:p@proxy:1", "http://u%40x@proxy:1"),
            ("http://ghp_token@proxy", "http://…@proxy:80"),
        ] {
            assert_eq!(text.parse::<ProxyUrl>().unwrap().to_string(), shown, "{text}");
        }
    }

    #[test]
    fn credentials_are_decoded() {
        for (text, user, password) in [
            ("http://user:pass@p", "user", "pass"),
            ("http://user:p%40ss%3A%2F%25@p", "user", "p@ss:/%"),
            ("http://user:p@ss@p", "user", "p@ss"),
            ("http://user:a:b@p", "user", "a:b"),
            ("http://CORP%5Cuser:%C3%BC@p", "CORP\\user", "ü"),
            ("http://user@p", "user", ""),
            ("http://:p@p", "", "p"),
        ] {
            let credentials = text.parse::<ProxyUrl>().unwrap().credentials.unwrap();
            assert_eq!((credentials.user.as_str(), credentials.password()), (user, password), "{text}");
        }
    }

    #[test]
    fn what_is_no_proxy_is_refused_with_the_reason() {
        for (text, error) in [
            ("", ProxyUrlError::Empty),
            ("socks4://p", ProxyUrlError::Socks4),
            ("socks4a://p", ProxyUrlError::Socks4),
            ("ftp://p", ProxyUrlError::Scheme),
            ("http://", ProxyUrlError::Host),
            ("http://a b", ProxyUrlError::Host),
            ("http://::1", ProxyUrlError::Host),
            ("http://[::1", ProxyUrlError::Host),
            ("http://[p]:1", ProxyUrlError::Host),
            ("http://[::1]1", ProxyUrlError::Host),
            ("http://10.0.0.256", ProxyUrlError::Host),
            ("http://p:0", ProxyUrlError::Port),
            ("http://p:70000", ProxyUrlError::Port),
            ("http://p:+80", ProxyUrlError::Port),
            ("http://p/x", ProxyUrlError::Path),
            ("http://p?x", ProxyUrlError::Path),
            ("http://u:%ff@p", ProxyUrlError::Credentials),
            ("http://u:a%0d%0ab@p", ProxyUrlError::Credentials),
            ("http://u%00:a@p", ProxyUrlError::Credentials),
        ] {
            assert_eq!(text.parse::<ProxyUrl>(), Err(error), "{text}");
        }
    }

    #[test]
    fn nothing_shows_a_password() {
        let proxy: ProxyUrl = "http://joe:hunter2@proxy".parse().unwrap();
        assert!(!format!("{proxy} {proxy:?} {proxy:#?}").contains("hunter2"));
        assert!(!format!("{:?}", proxy.credentials).contains("joe"));
        let token: ProxyUrl = "http://hunter2@proxy".parse().unwrap();
        assert!(!format!("{token} {token:?}").contains("hunter2"));
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_as_it_was(
            scheme in prop_oneof![Just(Scheme::Http), Just(Scheme::Https), Just(Scheme::Socks5), Just(Scheme::Socks5h)],
            host in prop_oneof!["[a-z]{1,5}(\\.[a-z]{1,5}){0,2}", any::<[u8; 16]>().prop_map(|octets| std::net::Ipv6Addr::from(octets).to_canonical().to_string())],
            port in 1u16..,
        ) {
            let proxy = ProxyUrl { scheme, host, port, credentials: None };
            prop_assert_eq!(proxy.to_string().parse(), Ok(proxy));
        }

        #[test]
        fn encoded_credentials_come_out_as_they_were(user in "[^:\\x00-\\x1f\\x7f-\\u{9f}]{1,10}", password in "[^\\x00-\\x1f\\x7f-\\u{9f}]{0,10}") {
            let encode = |text: &str| utf8_percent_encode(text, USER).to_string();
            let proxy: ProxyUrl = format!("http://{}:{}@p", encode(&user), encode(&password)).parse().unwrap();
            let credentials = proxy.credentials.unwrap();
            prop_assert_eq!((credentials.user.as_str(), credentials.password()), (user.as_str(), password.as_str()));
        }

        #[test]
        fn no_text_makes_it_panic(text in any::<String>(), near in "(http|socks5)?(://)?[a-c0-9%:@/\\[\\]]{0,24}") {
            let _ = (text.parse::<ProxyUrl>(), near.parse::<ProxyUrl>());
        }
    }
}
