//! What went wrong, as problem details (RFC 9457).

use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};

use super::list::Answer;
use crate::control::shapes::{Code, Problem};
use crate::policy::publish::Binding;
use crate::slow::ports::table::PortError;

/// RFC 9457, 3.
pub const MEDIA_TYPE: &str = "application/problem+json";

/// A problem in JSON.
pub fn json(status: StatusCode, code: Code, detail: &str, port: Option<Binding>) -> Vec<u8> {
    let title = status.canonical_reason().unwrap_or_default().to_string();
    let problem = Problem { title, status: status.as_u16(), detail: detail.to_string(), code, port };
    // Strings and numbers: nothing that could fail.
    serde_json::to_vec(&problem).unwrap_or_default()
}

/// An answer that tells a problem.
pub fn answer(status: StatusCode, code: Code, detail: &str) -> Response<Answer> {
    about(status, code, detail, None)
}

fn about(status: StatusCode, code: Code, detail: &str, port: Option<Binding>) -> Response<Answer> {
    let mut response = Response::new(Answer::Whole(Some(json(status, code, detail, port).into())));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
    response
}

/// An answer that tells why ports are as they were.
pub fn of_ports(error: &PortError) -> Response<Answer> {
    let (status, code, port) = match error {
        PortError::Allocated(port) => (StatusCode::CONFLICT, Code::PortAllocated, Some(*port)),
        PortError::InUse { binding, .. } => (StatusCode::CONFLICT, Code::AddressInUse, Some(*binding)),
        PortError::RangeFull(..) | PortError::NoRandom(_) => (StatusCode::CONFLICT, Code::NoneFree, None),
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
    about(status, code, &error.to_string(), port)
}
