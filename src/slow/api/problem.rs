//! What went wrong, as problem details (RFC 9457).

use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};

use super::list::Answer;
use crate::control::shapes::{Code, Problem};
use crate::policy::publish::Binding;
use crate::slow::ports::table::PortError;

/// RFC 9457, 3.
pub const MEDIA_TYPE: &str = "application/problem+json";

/// Why a request is not done.
#[derive(Debug)]
pub struct Refusal {
    status: StatusCode,
    code: Code,
    detail: String,
    port: Option<Binding>,
    /// Which methods there are, where it is about that.
    allow: Option<&'static str>,
}

impl Refusal {
    /// A refusal in words.
    pub fn new(status: StatusCode, code: Code, detail: impl Into<String>) -> Self {
        Self { status, code, detail: detail.into(), port: None, allow: None }
    }

    /// The methods that a resource has (RFC 9110, 15.5.6).
    pub fn method(methods: &'static str) -> Self {
        let detail = format!("this takes {methods}");
        Self { allow: Some(methods), ..Self::new(StatusCode::METHOD_NOT_ALLOWED, Code::Method, detail) }
    }

    /// Its status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// Its reason, in words.
    pub fn detail(&self) -> &str {
        &self.detail
    }

    /// The refusal in JSON.
    pub fn json(&self) -> Vec<u8> {
        let problem = Problem {
            title: self.status.canonical_reason().unwrap_or_default().to_string(),
            status: self.status.as_u16(),
            detail: self.detail.clone(),
            code: self.code,
            port: self.port,
        };
        // Strings and numbers: nothing that could fail.
        serde_json::to_vec(&problem).unwrap_or_default()
    }

    /// The answer that tells it.
    pub fn answer(self) -> Response<Answer> {
        let mut response = Response::new(Answer::Whole(Some(self.json().into())));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
        if let Some(methods) = self.allow {
            headers.insert(ALLOW, HeaderValue::from_static(methods));
        }
        response
    }
}

/// Why ports are as they were.
impl From<PortError> for Refusal {
    fn from(error: PortError) -> Self {
        let (status, code, port) = match &error {
            PortError::Allocated(port) => (StatusCode::CONFLICT, Code::PortAllocated, Some(*port)),
            PortError::InUse { binding, .. } => (StatusCode::CONFLICT, Code::AddressInUse, Some(*binding)),
            PortError::RangeFull(..) | PortError::NoRandom(_) => (StatusCode::CONFLICT, Code::NoneFree, None),
            PortError::OutOfBounds(_) => (StatusCode::FORBIDDEN, Code::Forbidden, None),
            PortError::Privileged(port) => (StatusCode::FORBIDDEN, Code::Privileged, Some(*port)),
            PortError::NotHere(port) => {
                (StatusCode::UNPROCESSABLE_ENTITY, Code::AddressNotAvailable, Some(*port))
            }
            PortError::NotPublished(_) => (StatusCode::NOT_FOUND, Code::NotPublished, None),
            PortError::Descriptors { .. } | PortError::Busy => {
                (StatusCode::SERVICE_UNAVAILABLE, Code::Exhausted, None)
            }
            PortError::System { binding, .. } => {
                (StatusCode::INTERNAL_SERVER_ERROR, Code::System, Some(*binding))
            }
        };
        Self { port, ..Self::new(status, code, error.to_string()) }
    }
}
