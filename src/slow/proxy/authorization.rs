//! Who hythe is to a proxy (RFC 9110, 11.7): Basic (RFC 7617) and Digest (RFC 7616).
//!
//! Nothing is told before it is asked for. What a proxy has asked for once is remembered, so that the next request brings its
//! answer along; a challenge to that is answered once more (a nonce may have grown old), and then shown to who asks.

use digest_auth::{AuthContext, WwwAuthenticateHeader};
use hyper::header::{HeaderMap, HeaderValue, PROXY_AUTHENTICATE};

use crate::policy::proxy::Credentials;

/// What a proxy has asked for.
pub enum Challenge {
    /// The password as it is.
    Basic,
    /// Proof that it is known.
    Digest(Box<WwwAuthenticateHeader>),
}

impl Challenge {
    /// The best of what a response (407) asks for.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let values = || headers.get_all(PROXY_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
        let digest = values().find_map(|value| {
            let at = find_scheme(value, "digest")?;
            digest_auth::parse(&value[at..]).ok()
        });
        match digest {
            Some(prompt) => Some(Self::Digest(Box::new(prompt))),
            None => values().any(|value| find_scheme(value, "basic").is_some()).then_some(Self::Basic),
        }
    }

    /// The value of `Proxy-Authorization` for a request.
    pub fn answer(&mut self, credentials: &Credentials, method: &str, target: &str) -> Option<HeaderValue> {
        let (user, password) = (credentials.user.as_str(), credentials.password());
        let text = match self {
            Self::Basic => format!("Basic {}", base64(format!("{user}:{password}").as_bytes())),
            Self::Digest(prompt) => {
                let context =
                    AuthContext::new_with_method(user, password, target, None::<&[u8]>, method.into());
                prompt.respond(&context).ok()?.to_header_string()
            }
        };
        let mut value = HeaderValue::try_from(text).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

/// Where a scheme begins in a list of challenges: at the start, or behind a comma.
fn find_scheme(value: &str, scheme: &str) -> Option<usize> {
    let lower = value.to_ascii_lowercase();
    lower.match_indices(scheme).map(|(at, _)| at).find(|at| {
        let before = lower[..*at].trim_end();
        let after = lower[at + scheme.len()..].chars().next();
        (before.is_empty() || before.ends_with(',')) && after.is_none_or(|next| next == ' ' || next == ',')
    })
}

/// RFC 4648, 4.
fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let group =
            chunk.iter().fold(0u32, |group, byte| group << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for index in 0..4 {
            let letter = LETTERS[(group >> (18 - 6 * index) & 63) as usize];
            text.push(if index <= chunk.len() { char::from(letter) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(values: &[&'static str]) -> Option<Challenge> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(PROXY_AUTHENTICATE, HeaderValue::from_static(value));
        }
        Challenge::of(&headers)
    }

    #[test]
    fn base64_is_that_of_the_rfc() {
        let table = [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("foobar", "Zm9vYmFy"),
        ];
        for (bytes, text) in table {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }

    #[test]
    fn the_better_challenge_is_answered_wherever_it_stands() {
        const DIGEST: &str = r#"Digest realm="a, basic b", nonce="n", qop="auth", algorithm=MD5"#;
        let is_digest = |values: &[&'static str]| matches!(asked(values), Some(Challenge::Digest(_)));
        assert!(is_digest(&[DIGEST]));
        assert!(is_digest(&["Basic realm=\"x\"", DIGEST]));
        assert!(is_digest(&[r#"Basic realm="x", Digest realm="y", nonce="n", qop="auth""#]));
        assert!(matches!(asked(&["BASIC realm=\"a digest of it\""]), Some(Challenge::Basic)));
        assert!(asked(&["Negotiate", "NTLM"]).is_none());
        assert!(asked(&["Digest nonsense"]).is_none());
    }
}
