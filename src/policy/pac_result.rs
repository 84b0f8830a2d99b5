//! What a PAC script says: `PROXY proxy.example:3128; SOCKS5 backup.example; DIRECT`, to be tried in this order.
//!
//! A script may come over a network that nobody has proved anything about, and so may its words. What cannot be understood is
//! left out, as browsers do, as long as something is left; else nobody knows what the script wants, which is an error.

use super::proxy_url::{ProxyUrl, ProxyUrlError, Scheme};

/// Words of one result that count: each may cost a time-out.
pub const WORDS_MAX: usize = 16;
/// The longest result, in bytes.
pub const RESULT_MAX: usize = 16 * 1024;

/// One word of a result.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PacWord {
    /// No proxy.
    Direct,
    /// This proxy.
    Via(ProxyUrl),
}

/// What no script should say.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PacResultError {
    /// It is too long.
    #[error("it has more than {RESULT_MAX} bytes")]
    TooLong,
    /// A word that means nothing here, and none that does.
    #[error("'{}' is none of DIRECT, PROXY, HTTP, HTTPS, SOCKS and SOCKS5 with HOST:PORT", .0.escape_debug())]
    Word(String),
    /// A proxy that cannot be, and none that can.
    #[error("'{}': {why}", .word.escape_debug())]
    Proxy {
        /// The word.
        word: String,
        /// What is wrong with it.
        why: ProxyUrlError,
    },
}

/// Reads a result. An empty one means that there is no proxy, as it does to browsers.
pub fn parse_pac_result(text: &str) -> Result<Vec<PacWord>, PacResultError> {
    if text.len() > RESULT_MAX {
        return Err(PacResultError::TooLong);
    }
    let mut words = Vec::new();
    let mut first_error = None;
    for word in text.split(';').map(str::trim).filter(|word| !word.is_empty()) {
        match read_word(word) {
            Ok(word) => words.push(word),
            Err(error) => first_error = first_error.or(Some(error)),
        }
        if words.len() == WORDS_MAX {
            break;
        }
    }
    match first_error {
        Some(error) if words.is_empty() => Err(error),
        None if words.is_empty() => Ok(vec![PacWord::Direct]),
        _ => Ok(words),
    }
}

fn read_word(word: &str) -> Result<PacWord, PacResultError> {
    let shown = || word.chars().take(100).collect::<String>();
    let (kind, place) = word.split_once(char::is_whitespace).unwrap_or((word, ""));
    let scheme = match kind.to_ascii_uppercase().as_str() {
        "DIRECT" if place.trim().is_empty() => return Ok(PacWord::Direct),
        "PROXY" | "HTTP" => Scheme::Http,
        "HTTPS" => Scheme::Https,
        // A name that the guest gave is told as a name: it may mean something else where the proxy is.
        "SOCKS" | "SOCKS5" => Scheme::Socks5h,
        "SOCKS4" => return Err(PacResultError::Proxy { word: shown(), why: ProxyUrlError::Socks4 }),
        _ => return Err(PacResultError::Word(shown())),
    };
    ProxyUrl::at(scheme, place.trim())
        .map(PacWord::Via)
        .map_err(|why| PacResultError::Proxy { word: shown(), why })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(text: &str) -> Vec<String> {
        let shown = |word| match word {
            PacWord::Direct => "direct".to_string(),
            PacWord::Via(proxy) => proxy.to_string(),
        };
        parse_pac_result(text).unwrap_or_else(|error| panic!("{error}")).into_iter().map(shown).collect()
    }

    #[test]
    fn a_result_is_a_list_to_fall_through() {
        for (text, expected) in [
            ("DIRECT", &["direct"][..]),
            ("", &["direct"]),
            (" ; ", &["direct"]),
            ("PROXY proxy:8080", &["http://proxy:8080"]),
            ("proxy Proxy.Example", &["http://proxy.example:80"]),
            ("PROXY a:1; PROXY b:2; DIRECT", &["http://a:1", "http://b:2", "direct"]),
            (
                "HTTP a:1;HTTPS b;SOCKS c;SOCKS5 d:9;",
                &["http://a:1", "https://b:443", "socks5h://c:1080", "socks5h://d:9"],
            ),
            ("PROXY   [2001:db8::1]:3128", &["http://[2001:db8::1]:3128"]),
            ("PROXY\t10.0.0.1:3128", &["http://10.0.0.1:3128"]),
            // What cannot be used is passed over.
            ("SOCKS4 a:1; PROXY b:2", &["http://b:2"]),
            ("QUIC a:1; PROXY b:2", &["http://b:2"]),
            ("PROXY a:b; DIRECT", &["direct"]),
            ("DIRECT x; PROXY b:2", &["http://b:2"]),
        ] {
            assert_eq!(words(text), expected, "{text}");
        }
        assert_eq!(words(&"PROXY a:1;".repeat(100)).len(), WORDS_MAX);
    }

    #[test]
    fn a_result_without_a_usable_word_is_an_error() {
        for (text, said) in [
            ("undefined", "'undefined' is none of"),
            ("PROXY", "'PROXY': the host"),
            ("PROXY u:p@h:1", "the host of the proxy"),
            ("PROXY http://a:1", "the host of the proxy"),
            ("SOCKS4 a:1", "SOCKS 4 knows neither"),
            ("<html>", "'<html>' is none of"),
        ] {
            let error = parse_pac_result(text).unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
        assert_eq!(parse_pac_result(&" ".repeat(RESULT_MAX + 1)), Err(PacResultError::TooLong));
        assert!(!parse_pac_result("\u{1b}[2J").unwrap_err().to_string().contains('\u{1b}'));
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in any::<String>(), near in "((PROXY|SOCKS|DIRECT|HTTPS) ?[a-c0-9:.\\[\\]]{0,8}; ?){0,20}") {
            for text in [text, near] {
                match parse_pac_result(&text) {
                    Ok(words) => prop_assert!((1..=WORDS_MAX).contains(&words.len())),
                    Err(error) => prop_assert!(!error.to_string().contains(char::is_control)),
                }
            }
        }
    }
}
