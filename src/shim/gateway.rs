//! Asks hythe for a port, from inside the guest.
//!
//! ```text
//! POST /v1/ports {"publish": ["0.0.0.0:8000:8000/tcp"], "while_connected": true}
//! ◀── 201, chunked: {"ports": […]} and a line's end, and then nothing as long as the port is published
//! ```
//! The answer's body is the port: hythe takes it back when the connection ends, however this process ended. A body that ends as
//! a body should says that the host's user has unpublished the port; any other end, that hythe is gone.
//!
//! A hythe that was killed tells nobody, and a guest that sends nothing hears nothing, so the connection is probed every second:
//! the next hythe resets what it does not know.
//!
//! The gateway is a peer like any: what it says is bounded, and so is the time that it may take.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use http_body_util::{BodyExt, Collected, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST, TRANSFER_ENCODING};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use socket2::{SockRef, Socket, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::control::shapes::{Ports, Problem, Publish};

/// The name by which every guest knows hythe, and the port at which hythe answers guests.
const NAME: &str = "gateway.docker.internal";
const PORT: u16 = 80;

/// How long the name may take, and the answer; together with the connection less than the 16 seconds that dockerd waits.
const NAME_PATIENCE: Duration = Duration::from_secs(4);
const ANSWER_PATIENCE: Duration = Duration::from_secs(8);
/// How long hythe has to take a port back that is given back, before this process ends all the same.
const RETURN_PATIENCE: Duration = Duration::from_secs(1);

/// How often the connection is probed, and how long what is sent may be unacknowledged: hythe's TCP acknowledges at once, however
/// busy the rest of it is.
const PROBE_EVERY: Duration = Duration::from_secs(1);
const SILENCE_MAX: Duration = Duration::from_secs(3);

/// The longest head of an answer, the longest list of the ports that were published, and the longest problem, in bytes.
const HEAD_MAX: usize = 16 << 10;
const BODY_MAX: usize = 16 << 10;
/// Addresses of the gateway that are tried.
const ADDRESSES_MAX: usize = 4;

/// Why there is no port.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The variable names no gateway.
    #[error(
        "HYTHE_GATEWAY={0} is no address: it is like 192.168.65.1, 192.168.65.1:80 or [fdc4:f303:9324::1]:80"
    )]
    Variable(String),
    /// Nobody knows the gateway.
    #[error(
        "{NAME} is not known here ({0}): let the guest's resolver be hythe's gateway, or set HYTHE_GATEWAY to its address \
         where dockerd is started"
    )]
    Unknown(io::Error),
    /// Nobody answers there.
    #[error("no hythe answers the guest at {gateway} ({error}): start hythe with --guest-api publish")]
    Nobody {
        /// Where.
        gateway: SocketAddr,
        /// Why.
        error: io::Error,
    },
    /// The answer takes too long.
    #[error("hythe's answer takes more than {} seconds", ANSWER_PATIENCE.as_secs())]
    Late,
    /// The answer is none.
    #[error("no hythe answers the guest at the gateway, but something else ({0})")]
    Garbled(String),
    /// hythe says no.
    #[error("{}", .0.detail)]
    Refused(Box<Problem>),
}

/// Where hythe is asked.
pub struct Gateway {
    addresses: Vec<SocketAddr>,
}

impl Gateway {
    /// The one that a variable names, else the one that has the name. Found once: a hythe that is gone takes its names along, and
    /// comes back where it was.
    pub async fn find(variable: Option<String>) -> Result<Self, AskError> {
        if let Some(text) = variable.filter(|text| !text.is_empty()) {
            let address = text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, PORT));
            let address = address.or_else(|_| text.parse()).map_err(|_| AskError::Variable(text))?;
            return Ok(Self { addresses: vec![address] });
        }
        let found = timeout(NAME_PATIENCE, tokio::net::lookup_host((NAME, PORT))).await;
        let found =
            found.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map_err(AskError::Unknown)?;
        let addresses: Vec<SocketAddr> = found.take(ADDRESSES_MAX).collect();
        if addresses.is_empty() {
            return Err(AskError::Unknown(io::ErrorKind::NotFound.into()));
        }
        Ok(Self { addresses })
    }

    /// A connection to the first of its addresses that answers.
    pub async fn connect(&self, patience: Duration) -> Result<TcpStream, AskError> {
        let mut first_error = None;
        let each = patience / self.addresses.len() as u32;
        for gateway in &self.addresses {
            let connected = timeout(each, TcpStream::connect(gateway)).await;
            let connected = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            match connected.and_then(probed) {
                Ok(stream) => return Ok(stream),
                Err(error) => _ = first_error.get_or_insert(AskError::Nobody { gateway: *gateway, error }),
            }
        }
        Err(first_error.unwrap_or(AskError::Unknown(io::ErrorKind::NotFound.into())))
    }
}

/// Has the kernel look every second whether the other end is there.
fn probed(stream: TcpStream) -> io::Result<TcpStream> {
    let socket = SockRef::from(&stream);
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(PROBE_EVERY).with_interval(PROBE_EVERY))?;
    socket.set_tcp_user_timeout(Some(SILENCE_MAX))?;
    Ok(stream)
}

/// How a port that was published ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended {
    /// The host's user has unpublished it.
    Unpublished,
    /// hythe is gone.
    Broken,
}

/// A port that is published as long as this is held.
pub struct Grant {
    body: Incoming,
    _sender: http1::SendRequest<Full<Bytes>>,
    /// The connection's socket, whatever is done with it elsewhere.
    socket: Socket,
}

/// Asks over a connection for a port.
pub async fn publish(stream: TcpStream, specification: String) -> Result<Grant, AskError> {
    timeout(ANSWER_PATIENCE, converse(stream, specification)).await.unwrap_or(Err(AskError::Late))
}

async fn converse(stream: TcpStream, specification: String) -> Result<Grant, AskError> {
    let garbled = |error: &dyn std::error::Error| AskError::Garbled(error.to_string());
    let socket = SockRef::from(&stream).try_clone().map_err(|error| garbled(&error))?;
    let wanted = Publish { publish: vec![specification], while_connected: true };
    let body = serde_json::to_vec(&wanted).map_err(|error| garbled(&error))?;
    let request = Request::builder()
        .method(Method::POST)
        .uri("/v1/ports")
        .header(HOST, NAME)
        .header(CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| garbled(&error))?;
    let mut protocol = http1::Builder::new();
    let handshake = protocol.max_buf_size(HEAD_MAX).handshake(TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.map_err(|error| garbled(&error))?;
    // Its end is told to whoever reads the body.
    tokio::spawn(connection);
    let response = sender.send_request(request).await.map_err(|error| garbled(&error))?;
    let status = response.status();
    if status != StatusCode::CREATED {
        let body = Limited::new(response.into_body(), BODY_MAX).collect().await;
        let body = body.map(Collected::to_bytes).unwrap_or_default();
        let problem = serde_json::from_slice(&body);
        return Err(problem.map_or_else(|_| AskError::Garbled(status.to_string()), AskError::Refused));
    }
    // Of a body whose end is the connection's nobody can say how it ended.
    if !is_chunked(&response) {
        return Err(AskError::Garbled("a body that is not chunked".into()));
    }
    let mut body = response.into_body();
    let ports = first_line(&mut body).await?;
    let ports: Ports = serde_json::from_slice(&ports).map_err(|error| garbled(&error))?;
    if ports.ports.len() != 1 {
        return Err(AskError::Garbled(format!("{} ports instead of one", ports.ports.len())));
    }
    Ok(Grant { body, _sender: sender, socket })
}

fn is_chunked(response: &Response<Incoming>) -> bool {
    response
        .headers()
        .get(TRANSFER_ENCODING)
        .is_some_and(|coding| coding.as_bytes().eq_ignore_ascii_case(b"chunked"))
}

/// Reads up to the end of the first line.
async fn first_line(body: &mut Incoming) -> Result<Vec<u8>, AskError> {
    let mut line = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| AskError::Garbled(error.to_string()))?;
        let data = frame.into_data().unwrap_or_default();
        let end = data.iter().position(|byte| *byte == b'\n');
        line.extend_from_slice(&data[..end.unwrap_or(data.len())]);
        if line.len() > BODY_MAX {
            return Err(AskError::Garbled("an endless answer".into()));
        }
        if end.is_some() {
            return Ok(line);
        }
    }
    Err(AskError::Garbled("an answer that stops".into()))
}

impl Grant {
    /// Waits for the end of the port.
    pub async fn ended(&mut self) -> Ended {
        loop {
            match self.body.frame().await {
                // Nothing more is to be said; who says something is not listened to.
                Some(Ok(_)) => tokio::task::yield_now().await,
                Some(Err(_)) => return Ended::Broken,
                None => return Ended::Unpublished,
            }
        }
    }

    /// Gives the port back. Waits until hythe has ended the connection too, so that whoever comes next finds the port free.
    pub async fn give_back(mut self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Write);
        let _ = timeout(RETURN_PATIENCE, self.ended()).await;
    }
}

#[cfg(test)]
pub mod fake_server;

#[cfg(test)]
mod tests {
    use super::fake_server::{FakeHythe, GRANTED};
    use super::*;

    async fn ask(hythe: &FakeHythe) -> Result<Grant, AskError> {
        let gateway = Gateway::find(Some(hythe.address.to_string())).await?;
        let stream = gateway.connect(Duration::from_secs(5)).await?;
        publish(stream, "0.0.0.0:8000:8000/tcp".into()).await
    }

    async fn said(hythe: &FakeHythe) -> String {
        match ask(hythe).await {
            Ok(_) => panic!("granted"),
            Err(error) => error.to_string(),
        }
    }

    #[tokio::test]
    async fn a_port_is_asked_for_and_held_until_it_is_given_back() {
        let hythe = FakeHythe::new().await;
        let (grant, mut asked) = tokio::join!(ask(&hythe), hythe.grant());
        let grant = grant.unwrap();
        assert!(asked.head.starts_with("POST /v1/ports HTTP/1.1\r\n"), "{}", asked.head);
        assert!(asked.head.contains("content-type: application/json\r\n"), "{}", asked.head);
        assert!(asked.head.contains("host: gateway.docker.internal\r\n"), "{}", asked.head);
        assert_eq!(asked.body, r#"{"publish":["0.0.0.0:8000:8000/tcp"],"while_connected":true}"#);
        let returned = async {
            asked.until_closed().await;
            drop(asked);
        };
        tokio::join!(grant.give_back(), returned);
    }

    #[tokio::test]
    async fn a_grant_that_is_dropped_ends_the_connection() {
        let hythe = FakeHythe::new().await;
        let (grant, mut asked) = tokio::join!(ask(&hythe), hythe.grant());
        drop(grant.unwrap());
        asked.until_closed().await;
    }

    #[tokio::test]
    async fn a_body_that_ends_as_it_should_is_told_from_one_that_breaks() {
        let hythe = FakeHythe::new().await;
        let (grant, mut asked) = tokio::join!(ask(&hythe), hythe.grant());
        asked.say("0\r\n\r\n").await;
        assert_eq!(grant.unwrap().ended().await, Ended::Unpublished);

        let (grant, asked) = tokio::join!(ask(&hythe), hythe.grant());
        drop(asked);
        assert_eq!(grant.unwrap().ended().await, Ended::Broken);

        let (grant, asked) = tokio::join!(ask(&hythe), hythe.grant());
        asked.reset();
        assert_eq!(grant.unwrap().ended().await, Ended::Broken);
    }

    #[tokio::test]
    async fn what_is_said_after_the_grant_is_not_listened_to() {
        let hythe = FakeHythe::new().await;
        let (grant, mut asked) = tokio::join!(ask(&hythe), hythe.grant());
        let chatter = async {
            for _ in 0..100 {
                asked.say(&format!("1000\r\n{}\r\n", "x".repeat(0x1000))).await;
            }
            asked.say("0\r\n\r\n").await;
        };
        let mut grant = grant.unwrap();
        let (ended, ()) = tokio::join!(grant.ended(), chatter);
        assert_eq!(ended, Ended::Unpublished);
    }

    #[tokio::test]
    async fn a_refusal_is_told_in_hythes_words() {
        let hythe = FakeHythe::new().await;
        let detail = "Bind for 0.0.0.0:8000 failed: port is already allocated";
        let (said, _asked) = tokio::join!(said(&hythe), hythe.refuse(detail));
        assert_eq!(said, detail);
    }

    #[tokio::test]
    async fn where_nobody_answers_it_is_said_what_to_do() {
        let hythe = FakeHythe::new().await.away();
        let said = said(&hythe).await;
        assert!(said.contains("Connection refused") && said.contains("--guest-api publish"), "{said}");
    }

    #[tokio::test]
    async fn who_is_no_hythe_is_not_believed() {
        for answer in [
            "SSH-2.0-OpenSSH_9.2\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
            "HTTP/1.1 404 Not Found\r\ncontent-length: 5\r\n\r\n<html",
            "HTTP/1.1 201 Created\r\ncontent-length: 2\r\n\r\n{}",
            "HTTP/1.1 201 Created\r\n\r\n{\"ports\":[]}\n",
            "HTTP/1.1 201 Created\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            "HTTP/1.1 201 Created\r\ntransfer-encoding: chunked\r\n\r\nd\r\n{\"ports\":[]}\n\r\n",
            "HTTP/1.1 201 Created\r\ntransfer-encoding: chunked\r\n\r\n4\r\nnot\n\r\n",
            "HTTP/1.1 201 Created\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
            "",
        ] {
            let hythe = FakeHythe::new().await;
            let peer = async {
                let mut asked = hythe.accept().await;
                asked.say(answer).await;
                asked.finish().await;
            };
            let (said, ()) = tokio::join!(said(&hythe), peer);
            assert!(said.contains("something else"), "{answer:?}: {said}");
        }
    }

    #[tokio::test]
    async fn an_answer_without_an_end_is_not_waited_for() {
        for piece in ["x-y: z\r\n".to_string(), format!("1000\r\n{}\r\n", "x".repeat(0x1000))] {
            let hythe = FakeHythe::new().await;
            let peer = async {
                let mut asked = hythe.accept().await;
                asked.say(if piece.starts_with('x') { "HTTP/1.1 201 Created\r\n" } else { GRANTED }).await;
                while asked.tries_to_say(&piece).await {}
            };
            let (said, ()) = tokio::join!(said(&hythe), peer);
            assert!(said.contains("something else"), "{said}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_hythe_that_says_nothing_is_given_up() {
        let hythe = FakeHythe::new().await;
        let (said, _asked) = tokio::join!(said(&hythe), hythe.accept());
        assert_eq!(said, "hythe's answer takes more than 8 seconds");
    }

    #[tokio::test]
    async fn a_variable_names_the_gateway() {
        for (text, expected) in [
            ("192.168.65.1", "192.168.65.1:80"),
            ("192.168.65.1:8080", "192.168.65.1:8080"),
            ("fdc4:f303:9324::1", "[fdc4:f303:9324::1]:80"),
            ("[fdc4:f303:9324::1]:8080", "[fdc4:f303:9324::1]:8080"),
        ] {
            let gateway = Gateway::find(Some(text.into())).await.unwrap();
            assert_eq!(gateway.addresses, [expected.parse().unwrap()]);
        }
        assert!(matches!(Gateway::find(Some("gateway".into())).await, Err(AskError::Variable(_))));
    }
}
