//! What proxies are told about who hythe is, in a text of the user's.

use super::proxy::{Credentials, ProxySettings, ProxyUrl, Scheme, Secret};

/// A line that tells nothing. It may hold a password, and is not repeated.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("line {line} is no [HOST[:PORT] ]USER:PASSWORD")]
pub struct CredentialsError {
    /// Its number, from 1.
    pub line: usize,
}

/// What proxies are told about who hythe is: lines `USER:PASSWORD`, for all of them, or `HOST[:PORT] USER:PASSWORD`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CredentialsFile(Vec<(Option<String>, Credentials)>);

impl CredentialsFile {
    /// Reads its text.
    pub fn parse(text: &Secret) -> Result<Self, CredentialsError> {
        let mut known = Vec::new();
        for (number, line) in text.reveal().lines().enumerate() {
            if line.trim().is_empty() || line.starts_with('#') {
                continue;
            }
            let parsed = match line.split_once(' ') {
                // Who might be meant for one proxy is never told to all.
                Some((first, rest)) if looks_like_a_place(first) => match ProxyUrl::at(Scheme::Http, first) {
                    Ok(_) => {
                        credentials(rest).map(|credentials| (Some(first.to_ascii_lowercase()), credentials))
                    }
                    Err(_) => None,
                },
                _ => credentials(line).map(|credentials| (None, credentials)),
            };
            known.push(parsed.ok_or(CredentialsError { line: number + 1 })?);
        }
        Ok(Self(known))
    }

    /// Tells proxies that have none what they are to say.
    pub fn give_to(&self, settings: &mut ProxySettings) {
        for proxy in settings.http.iter_mut().chain(&mut settings.https) {
            if proxy.credentials.is_none() {
                proxy.credentials = self.of(proxy);
            }
        }
        settings.credentials = self.clone();
    }

    /// What is said to one proxy that is named here. A script may name any: it is not told what is for all.
    pub fn of_place(&self, proxy: &ProxyUrl) -> Option<Credentials> {
        let place = proxy.place().to_ascii_lowercase();
        let bare = place.rsplit_once(':').map_or(place.as_str(), |(host, _)| host);
        let is_for = |host: &str| host == place || host == bare;
        let own = self.0.iter().find(|(host, _)| host.as_deref().is_some_and(is_for));
        own.map(|(_, known)| known.clone())
    }

    /// What is said to one proxy.
    pub fn of(&self, proxy: &ProxyUrl) -> Option<Credentials> {
        let all = || self.0.iter().find(|(host, _)| host.is_none()).map(|(_, known)| known.clone());
        self.of_place(proxy).or_else(all)
    }
}

/// Whether a word is, or was meant to be, where a proxy is: a name, brackets, a scheme, or a number behind a colon.
fn looks_like_a_place(word: &str) -> bool {
    let port = word.rsplit_once(':').map(|(_, port)| port);
    let is_number =
        port.is_some_and(|port| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()));
    port.is_none() || is_number || word.starts_with('[') || word.contains("//")
}

fn credentials(text: &str) -> Option<Credentials> {
    let (user, password) = text.split_once(':')?;
    Credentials::new(user.to_string(), Secret::new(password.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<CredentialsFile, CredentialsError> {
        CredentialsFile::parse(&Secret::new(text.to_string()))
    }

    #[test]
    fn credentials_are_for_one_proxy_or_for_all() {
        let file = parse("# of the company\njoe:se:cret word\n\nproxy.corp:3128 ann:other one\n").unwrap();
        let said = |url: &str| {
            let known = file.of(&url.parse().unwrap()).unwrap();
            format!("{} {}", known.user, known.password())
        };
        assert_eq!(said("http://proxy.corp:3128"), "ann other one");
        assert_eq!(said("http://proxy.corp:8080"), "joe se:cret word");
        assert_eq!(said("socks5h://elsewhere"), "joe se:cret word");
        assert_eq!(parse("joe:x\nnobody\n").unwrap_err().line, 2);
        let named = parse("[2001:db8::1]:3128 joe:one\nproxy ann:two\n").unwrap();
        let of = |url: &str| named.of(&url.parse().unwrap()).map(|known| known.user);
        assert_eq!(of("http://[2001:db8::1]:3128").as_deref(), Some("joe"));
        assert_eq!(of("http://proxy:8080").as_deref(), Some("ann"));
        assert_eq!(of("http://other"), None);
        for line in ["http://proxy:3128 joe:pw", "proxy:99999 joe:pw", "[::1 joe:pw", "a b:c d", ""] {
            assert!(
                parse(line).is_err() || parse(line).unwrap().of(&"http://x".parse().unwrap()).is_none(),
                "{line}"
            );
        }
    }
}
