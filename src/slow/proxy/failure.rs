//! What a guest is told when a way ends before it begins.

use std::io;

use hyper::StatusCode;

use super::http::Answer;

/// Why there is no way to where the guest wants to go.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Policy refuses it, in these words.
    #[error("{0}")]
    Refused(String),
    /// It has no address.
    #[error("its name has no address")]
    NoAddress,
    /// It, or the proxy, cannot be reached.
    #[error("it cannot be reached ({0})")]
    Unreachable(io::Error),
    /// It, or the proxy, is silent.
    #[error("there is no answer")]
    Silent,
    /// What the guest says cannot be understood.
    #[error("the body of the request cannot be read")]
    Cut,
    /// What the proxy says cannot be understood.
    #[error("the proxy does not speak as proxies do")]
    Garbled,
    /// The proxy refuses it.
    #[error("the proxy refuses it ({})", .0.status())]
    Answered(Box<hyper::Response<Answer>>),
    /// The proxy of SOCKS refuses it.
    #[error("the proxy refuses it ({0})")]
    Socks(String),
    /// No proxy is known, and there is to be no other way.
    #[error("the proxy's configuration script has failed, and nothing goes past it")]
    Script,
}

impl Failure {
    /// The status by which an HTTP client hears of it (RFC 9110, 15.5.4, 15.6.3, 15.6.5).
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Refused(_) => StatusCode::FORBIDDEN,
            Self::Cut => StatusCode::BAD_REQUEST,
            Self::Silent => StatusCode::GATEWAY_TIMEOUT,
            Self::Answered(response) => response.status(),
            _ => StatusCode::BAD_GATEWAY,
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::TimedOut => Self::Silent,
            _ => Self::Unreachable(error),
        }
    }
}
