//! What the tests of DNS share: resolvers that do as they are told, queries, and a directory of one's own.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use hickory_proto::op::{self, Message, MessageType, OpCode};
use hickory_proto::rr::{Name, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::mpsc;

use crate::frame::address::{Address, Mac};
use crate::policy::addresses::{Addresses, Family, SUBNET, SUBNET6};

/// A resolver on a port of the loopback.
pub(super) struct FakeServer {
    /// Where it listens.
    pub address: SocketAddr,
    /// What it has heard.
    pub heard: mpsc::UnboundedReceiver<Vec<u8>>,
}

impl FakeServer {
    /// Answers each datagram with those that `script` makes of it.
    pub async fn udp(mut script: impl FnMut(&[u8]) -> Vec<Vec<u8>> + Send + 'static) -> Self {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = socket.local_addr().unwrap();
        let (tell, heard) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut bytes = vec![0; 65_535];
            loop {
                let (len, from) = socket.recv_from(&mut bytes).await.unwrap();
                let _ = tell.send(bytes[..len].to_vec());
                for reply in script(&bytes[..len]) {
                    let _ = socket.send_to(&reply, from).await;
                }
            }
        });
        Self { address, heard }
    }

    /// Answers the message of each connection with those that `script` makes of it.
    pub async fn tcp(mut script: impl FnMut(&[u8]) -> Vec<Vec<u8>> + Send + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (tell, heard) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let len = stream.read_u16().await.unwrap();
                let mut bytes = vec![0; len.into()];
                stream.read_exact(&mut bytes).await.unwrap();
                let replies = script(&bytes);
                let _ = tell.send(bytes);
                for reply in replies {
                    let _ = stream.write_all(&framed(&reply)).await;
                }
            }
        });
        Self { address, heard }
    }

    /// Hears everything and says nothing.
    pub async fn silent() -> Self {
        Self::udp(|_| vec![]).await
    }

    /// Answers every datagram with this code.
    pub async fn failing(code: u8) -> Self {
        Self::udp(move |query| vec![with_code(reply_to(query), code)]).await
    }

    /// How many messages it has heard.
    pub fn heard_so_far(&mut self) -> usize {
        std::iter::from_fn(|| self.heard.try_recv().ok()).count()
    }
}

/// A port of the loopback that nobody listens on, of either transport.
pub(super) fn refused_port() -> SocketAddr {
    let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    socket.local_addr().unwrap()
}

/// A query.
pub(super) fn query(name: &str, kind: RecordType, id: u16) -> Vec<u8> {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(op::Query::query(Name::from_ascii(name).unwrap(), kind));
    message.to_vec().unwrap()
}

/// A query with an OPT record more, and these bytes for its options.
pub(super) fn with_opt(mut query: Vec<u8>, version: u8, dnssec_ok: bool, options: &[u8]) -> Vec<u8> {
    query.extend([0, 0, 41, 0x10, 0, 0, version, u8::from(dnssec_ok) << 7, 0]);
    query.extend((options.len() as u16).to_be_bytes());
    query.extend(options);
    query[11] += 1;
    query
}

/// A reply with a record more, of the name asked for, at the end of section 0, 1 or 2, behind which there is none.
pub(super) fn with_record(mut reply: Vec<u8>, section: usize, kind: u16, ttl: u32, data: &[u8]) -> Vec<u8> {
    reply.extend([0xc0, 12]);
    reply.extend(kind.to_be_bytes());
    reply.extend([0, 1]);
    reply.extend(ttl.to_be_bytes());
    reply.extend((data.len() as u16).to_be_bytes());
    reply.extend(data);
    reply[7 + 2 * section] += 1;
    reply
}

/// The query sent back as its own answer, with QR and RA set.
pub(super) fn reply_to(query: &[u8]) -> Vec<u8> {
    let mut reply = query.to_vec();
    reply[2] |= 0x80;
    reply[3] |= 0x80;
    reply
}

/// A reply with another response code.
pub(super) fn with_code(mut reply: Vec<u8>, code: u8) -> Vec<u8> {
    reply[3] = reply[3] & 0xf0 | code;
    reply
}

/// A message as it goes over a stream.
pub(super) fn framed(message: &[u8]) -> Vec<u8> {
    [&(message.len() as u16).to_be_bytes(), message].concat()
}

/// The default addresses of a link.
pub(super) fn addresses() -> Addresses {
    let v4 = |last| Address::v4([192, 168, 65, last]);
    let v6 = |last: u128| Address::v6((u128::from(SUBNET6.network()) | last).to_be_bytes());
    Addresses {
        v4: Some(Family { subnet: SUBNET.into(), gateway: v4(1), host: v4(254), guest: v4(3) }),
        v6: Some(Family { subnet: SUBNET6.into(), gateway: v6(1), host: v6(0x254), guest: v6(3) }),
        gateway_mac: Mac([0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd]),
        global_prefix: None,
        host_loopback: true,
        host_addresses: true,
        metadata: false,
        guest_api: false,
        egress: std::sync::Arc::default(),
        proxy: None,
        transparent: crate::policy::proxy::TransparentPorts::default(),
        snat_from: vec![],
        own: vec![],
        outbound: crate::policy::outbound::Outbound::default(),
    }
}

/// Waits for something that must come: a test that hangs fails.
pub(super) async fn soon<F: Future>(future: F) -> Result<F::Output, tokio::time::error::Elapsed> {
    tokio::time::timeout(Duration::from_secs(10), future).await
}

/// A directory that is removed at the end.
pub(super) struct Directory(PathBuf);

impl Directory {
    /// A new one, under its canonical path.
    pub fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("hythe-dns-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path.canonicalize().unwrap())
    }

    /// A path in it; itself for the empty name.
    pub fn path(&self, name: &str) -> PathBuf {
        if name.is_empty() { self.0.clone() } else { self.0.join(name) }
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
