//! Asks a running hythe at its control socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use nix::unistd::geteuid;
use tokio::net::UnixStream;

use super::shapes::Problem;

/// How long an answer may take: publishing every port there is takes some seconds.
const PATIENCE: Duration = Duration::from_secs(60);
/// The longest answer, in bytes: every port there is.
const ANSWER_MAX: usize = 64 << 20;

/// Why there is no answer, or not the one that was wanted.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody answers.
    #[error("{path}: no hythe answers there ({error})", path = .path.display())]
    Nobody {
        /// The control socket.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The answer takes too long.
    #[error(
        "{path}: no answer came in {seconds} seconds; a change may still be made (hythe ports tells)",
        path = .path.display(), seconds = PATIENCE.as_secs()
    )]
    Late {
        /// The control socket.
        path: PathBuf,
    },
    /// Somebody else answers.
    #[error("{path}: user {uid} answers there, who is not to be believed", path = .path.display())]
    Stranger {
        /// The control socket.
        path: PathBuf,
        /// Who.
        uid: u32,
    },
    /// The answer is none.
    #[error("{path}: {problem}", path = .path.display())]
    Garbled {
        /// The control socket.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// hythe tells a problem.
    #[error("{}", .0.detail)]
    Problem(Box<Problem>),
}

/// Sends one request and returns the body of the answer, if it tells no problem.
pub fn ask(path: &Path, method: Method, target: &str, body: Option<Vec<u8>>) -> Result<Bytes, AskError> {
    let nobody = |error| AskError::Nobody { path: path.to_path_buf(), error };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(nobody)?;
    runtime.block_on(async {
        match tokio::time::timeout(PATIENCE, converse(path, method, target, body)).await {
            Ok(answer) => answer,
            Err(_) => Err(AskError::Late { path: path.to_path_buf() }),
        }
    })
}

async fn converse(
    path: &Path,
    method: Method,
    target: &str,
    body: Option<Vec<u8>>,
) -> Result<Bytes, AskError> {
    let garbled = |problem: String| AskError::Garbled { path: path.to_path_buf(), problem };
    let nobody = |error| AskError::Nobody { path: path.to_path_buf(), error };
    let stream = UnixStream::connect(path).await.map_err(nobody)?;
    let uid = stream.peer_cred().map_err(nobody)?.uid();
    // Root knows whom it asks; others believe themselves and root.
    let own = geteuid();
    if !own.is_root() && ![0, own.as_raw()].contains(&uid) {
        return Err(AskError::Stranger { path: path.to_path_buf(), uid });
    }
    let request = Request::builder()
        .method(method)
        .uri(target)
        .header(HOST, "hythe")
        .header(CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body.unwrap_or_default())))
        .map_err(|error| garbled(error.to_string()))?;
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| garbled(error.to_string()))?;
    let exchange = async {
        let response = sender.send_request(request).await.map_err(|error| garbled(error.to_string()))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_MAX).collect().await;
        Ok((status, body.map_err(|error| garbled(error.to_string()))?.to_bytes()))
    };
    tokio::pin!(exchange, connection);
    let (status, body) = tokio::select! {
        answered = &mut exchange => answered?,
        // Its end is told to the exchange, which has the answer or an error then.
        _ = &mut connection => exchange.await?,
    };
    if status == StatusCode::OK || status == StatusCode::CREATED {
        return Ok(body);
    }
    match serde_json::from_slice(&body) {
        Ok(problem) => Err(AskError::Problem(Box::new(problem))),
        Err(_) => Err(garbled(format!("answers {status}"))),
    }
}
