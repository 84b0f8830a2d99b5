//! What goes past the proxy: a list as NO_PROXY has it.
//!
//! The names of the link and the guest's own subnet are not in it: they are nobody's to send to a proxy, whatever the list says.

use std::fmt;
use std::str::FromStr;

use super::pattern::{Pattern, PatternError};
use super::target::Target;

/// Words that a list can have.
const WORDS_MAX: usize = 4096;

/// What goes past the proxy.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Bypass(pub Vec<Pattern>);

/// What is no such list.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BypassError {
    /// A word of it.
    #[error(transparent)]
    Word(#[from] PatternError),
    /// It is too long.
    #[error("a list of what goes past the proxy can have {WORDS_MAX} words")]
    TooMany,
}

impl Bypass {
    /// Whether a destination goes past the proxy.
    pub fn covers(&self, target: &Target<'_>) -> bool {
        self.0.iter().any(|pattern| pattern.matches(target))
    }

    /// Reads what it can, as programs do with NO_PROXY, and gives what it cannot read.
    pub fn read(list: &str) -> (Self, Vec<BypassError>) {
        let (mut patterns, mut errors) = (Vec::new(), Vec::new());
        for word in words(list) {
            match word.parse() {
                _ if patterns.len() + errors.len() == WORDS_MAX => {
                    errors.push(BypassError::TooMany);
                    break;
                }
                Ok(pattern) => patterns.push(pattern),
                Err(error) => errors.push(BypassError::Word(error)),
            }
        }
        (Self(patterns), errors)
    }
}

fn words(list: &str) -> impl Iterator<Item = &str> {
    list.split(|c: char| c == ',' || c.is_whitespace()).filter(|word| !word.is_empty())
}

impl FromStr for Bypass {
    type Err = BypassError;

    fn from_str(list: &str) -> Result<Self, BypassError> {
        let (bypass, errors) = Self::read(list);
        errors.into_iter().next().map_or(Ok(bypass), Err)
    }
}

impl fmt::Display for Bypass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, pattern) in self.0.iter().enumerate() {
            write!(f, "{}{pattern}", if index == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::pattern::tests::any_pattern;
    use super::*;
    use crate::policy::target::{Target, host_name};
    use proptest::prelude::*;

    fn covers(list: &str, host: &str, port: u16) -> bool {
        let host = host_name(host).unwrap_or_else(|| host.to_string());
        Bypass::read(list).0.covers(&Target::tcp(&host, port))
    }

    /// A list, a destination, whether it goes past the proxy here, and which programs say the same in the documentation of how they
    /// read NO_PROXY. c: curl (CURLOPT_NOPROXY), g: Go (httpproxy.Config), p: Python (urllib).
    const CASES: &[(&str, &str, u16, bool, &str)] = &[
        // A name is itself and all below it, at label boundaries: all three.
        ("example.com", "example.com", 80, true, "cgp"),
        ("example.com", "www.example.com", 443, true, "cgp"),
        ("example.com", "a.b.example.com", 443, true, "cgp"),
        ("ample.com", "www.example.com", 80, false, "cgp"),
        ("ample.com", "example.com", 80, false, "cgp"),
        ("example.com", "example.com.org", 80, false, "cgp"),
        ("example.com", "com", 80, false, "cgp"),
        ("EXAMPLE.com", "www.Example.COM", 80, true, "cgp"),
        // A list: commas, blanks beside them, empty words.
        ("a.test,b.test", "b.test", 80, true, "cgp"),
        ("a.test , b.test", "b.test", 80, true, "cgp"),
        (",,a.test,", "a.test", 80, true, "cgp"),
        ("", "a.test", 80, false, "cgp"),
        // Blanks alone were enough for curl before 8.0, and people write them.
        ("a.test b.test", "b.test", 80, true, ""),
        // A point before it: Go takes it for "below", the others for nothing.
        (".example.com", "www.example.com", 80, true, "cgp"),
        (".example.com", "example.com", 80, true, "cp"),
        (".example.com", "notexample.com", 80, false, "cgp"),
        // An asterisk before it: Go's alone.
        ("*.example.com", "www.example.com", 80, true, "g"),
        ("*.example.com", "example.com", 80, false, "cgp"),
        ("*.example.com", "anexample.com", 80, false, "cgp"),
        // Last points mean nothing: curl's word.
        ("example.com.", "example.com", 80, true, "c"),
        ("example.com", "example.com.", 80, true, "c"),
        // An asterisk is everything: alone for all, among others for Go.
        ("*", "example.com", 80, true, "cgp"),
        ("*", "192.0.2.1", 80, true, "cgp"),
        ("a.test,*", "b.test", 80, true, "g"),
        ("*:443", "b.test", 443, true, ""),
        // Addresses are not names.
        ("192.0.2.1", "192.0.2.1", 80, true, "cgp"),
        ("192.0.2.1", "192.0.2.10", 80, false, "cgp"),
        ("2.1", "192.0.2.1", 80, false, "cg"),
        ("::1,localhost", "[::1]", 80, true, "cg"),
        ("2001:db8::1", "[2001:0db8:0::1]", 80, true, "cg"),
        ("[2001:db8::1]", "[2001:db8::1]", 80, true, "gp"),
        ("2001:db8::1", "[2001:db8::2]", 80, false, "cgp"),
        // Networks: curl since 7.86, Go.
        ("192.168.0.0/16", "192.168.7.1", 80, true, "cg"),
        ("192.168.0.0/16", "192.169.0.1", 80, false, "cgp"),
        ("192.168.1.2/16", "192.168.7.1", 80, true, "cg"),
        ("192.168.0.0/16", "host.test", 80, false, "cgp"),
        ("2001:db8::/32", "[2001:db8:7::1]", 80, true, "cg"),
        ("2001:db8::/32", "[2001:db9::1]", 80, false, "cgp"),
        ("10.0.0.0/8:80", "10.1.1.1", 80, true, ""),
        ("10.0.0.0/8:80", "10.1.1.1", 81, false, "cgp"),
        // Ports: Go and Python; curl's list has none.
        ("example.com:8080", "example.com", 8080, true, "gp"),
        ("example.com:8080", "www.example.com", 8080, true, "gp"),
        ("example.com:8080", "example.com", 80, false, "cgp"),
        (".example.com:8080", "www.example.com", 8080, true, "gp"),
        ("192.0.2.1:80", "192.0.2.1", 80, true, "gp"),
        ("192.0.2.1:80", "192.0.2.1", 81, false, "cgp"),
        ("[2001:db8::1]:443", "[2001:db8::1]", 443, true, "gp"),
        ("[2001:db8::1]:443", "[2001:db8::1]", 80, false, "cgp"),
        // What cannot be read means nothing, and the rest counts.
        (":1,example.com", "example.com", 80, true, "cgp"),
        ("10.0.0.0/99,a.test", "10.0.0.1", 80, false, "cgp"),
        // Go never sends loopback to a proxy; here nothing does that is not in the list (the guest's loopback never comes here,
        // the host's is a name of the link).
        ("a.test", "127.0.0.1", 80, false, "cp"),
        ("a.test", "localhost", 80, false, "cp"),
    ];

    #[test]
    fn lists_are_read_as_the_table_says() {
        for (list, host, port, expected, _) in CASES {
            assert_eq!(covers(list, host, *port), *expected, "{list} {host}:{port}");
        }
    }

    /// Every difference of the table is stated where users read.
    #[test]
    fn the_documentation_counts_the_same_differences() {
        let differences = CASES.iter().filter(|case| case.4 != "cgp").count();
        let agreed = CASES.len() - differences;
        let said = format!("{agreed} of {} cases", CASES.len());
        let text = include_str!("../../docs/PROXY.md").replace('\n', " ");
        assert!(text.contains(&said), "docs/PROXY.md does not say {said:?}");
    }

    #[test]
    fn a_name_and_an_address_count_both() {
        let bypass: Bypass = "corp.example,10.0.0.0/8".parse().unwrap();
        let target = |name, address: &str| Target {
            name,
            address: Some(address.parse().unwrap()),
            ..Target::tcp("", 443)
        };
        assert!(bypass.covers(&target(Some("git.corp.example"), "198.51.100.1")));
        assert!(bypass.covers(&target(Some("example.com"), "10.1.1.1")));
        assert!(bypass.covers(&target(None, "::ffff:10.1.1.1")));
        assert!(!bypass.covers(&target(Some("example.com"), "198.51.100.1")));
    }

    #[test]
    fn a_users_own_list_has_to_be_right() {
        let error = "a.test,10.0.0.0/99".parse::<Bypass>().unwrap_err().to_string();
        assert!(error.starts_with("'10.0.0.0/99' is neither"), "{error}");
        assert_eq!("a.test, .b.test:80".parse::<Bypass>().unwrap().to_string(), "a.test,b.test:80");
        let (bypass, errors) = Bypass::read(&"a,".repeat(5000));
        assert_eq!((bypass.0.len(), errors), (WORDS_MAX, vec![BypassError::TooMany]));
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_as_it_was(patterns in proptest::collection::vec(any_pattern(), 0..6)) {
            let bypass = Bypass(patterns);
            prop_assert_eq!(bypass.to_string().parse(), Ok(bypass));
        }

        #[test]
        fn no_text_makes_it_panic(text in any::<String>(), near in "[a-c0-9.,:/* \\[\\]-]{0,60}", host in "[a-c0-9.:]{0,12}") {
            for text in [text, near] {
                Bypass::read(&text).0.covers(&Target::tcp(&host, 80));
            }
        }
    }
}
