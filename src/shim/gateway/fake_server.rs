//! A hythe that says what a test wants.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// The head of an answer that grants.
pub const GRANTED: &str =
    "HTTP/1.1 201 Created\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";

pub struct FakeHythe {
    pub address: SocketAddr,
    listener: Option<TcpListener>,
}

/// A request that has come, and the way back.
pub struct Asked {
    pub head: String,
    pub body: String,
    stream: TcpStream,
}

impl FakeHythe {
    pub async fn new() -> Self {
        Self::at("127.0.0.1:0".parse().unwrap()).await
    }

    pub async fn at(address: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        Self { address: listener.local_addr().unwrap(), listener: Some(listener) }
    }

    /// Nobody is there any more.
    pub fn away(mut self) -> Self {
        self.listener = None;
        self
    }

    /// Takes the next request.
    pub async fn accept(&self) -> Asked {
        let (mut stream, _) = self.listener.as_ref().unwrap().accept().await.unwrap();
        let mut bytes = Vec::new();
        loop {
            let text = String::from_utf8_lossy(&bytes);
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
                if body.len() >= length.unwrap().parse().unwrap() {
                    return Asked { head: format!("{head}\r\n"), body: body.to_string(), stream };
                }
            }
            assert_ne!(stream.read_buf(&mut bytes).await.unwrap(), 0, "half a request");
        }
    }

    /// Takes the next request, and grants what it asks for.
    pub async fn grant(&self) -> Asked {
        let mut asked = self.accept().await;
        let line =
            r#"{"ports":[{"id":1,"address":"0.0.0.0","host_port":8000,"guest_port":8000,"protocol":"tcp"}]}"#;
        asked.say(&format!("{GRANTED}{:x}\r\n{line}\n\r\n", line.len() + 1)).await;
        asked
    }

    /// Takes the next request, and refuses.
    pub async fn refuse(&self, detail: &str) -> Asked {
        let mut asked = self.accept().await;
        let problem =
            format!(r#"{{"title":"Conflict","status":409,"detail":"{detail}","code":"port-allocated"}}"#);
        let head = "HTTP/1.1 409 Conflict\r\ncontent-type: application/problem+json\r\ncontent-length: ";
        asked.say(&format!("{head}{}\r\n\r\n{problem}", problem.len())).await;
        asked
    }
}

impl Asked {
    pub async fn say(&mut self, text: &str) {
        assert!(self.tries_to_say(text).await);
    }

    /// Says something, if somebody is there to hear it.
    pub async fn tries_to_say(&mut self, text: &str) -> bool {
        self.stream.write_all(text.as_bytes()).await.is_ok()
    }

    /// Nothing more is said.
    pub async fn finish(&mut self) {
        let _ = self.stream.shutdown().await;
        let _ = self.stream.read(&mut [0; 64]).await;
    }

    /// Waits until the other side has ended the connection.
    pub async fn until_closed(&mut self) {
        let mut rest = Vec::new();
        let _ = self.stream.read_to_end(&mut rest).await;
    }

    /// Ends the connection as a host does that is switched on again.
    pub fn reset(self) {
        socket2::SockRef::from(&self.stream).set_linger(Some(std::time::Duration::ZERO)).unwrap();
    }
}
