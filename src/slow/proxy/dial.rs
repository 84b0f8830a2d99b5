//! Connections of the slow path to the world: TCP, and TLS over it for proxies that want it.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::OnceCell;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto};

use super::lines::Line;
use crate::frame::address::Endpoint;
use crate::host::{ConnectPlan, tcp};
use crate::policy::addresses::Addresses;

/// How long one address is tried.
const CONNECT: Duration = Duration::from_secs(10);

/// After so long without a word the far side is asked whether it is there.
const PROBED_AFTER: Duration = Duration::from_mins(2);

/// Where hosts keep the certificates that they trust, besides what the environment names.
const CERTIFICATES: [&str; 4] = ["/etc/ssl", "/etc/pki", "/usr/lib/ssl", "/usr/share/ca-certificates"];

/// The directories in which certificates are looked for.
pub fn certificate_directories() -> Vec<PathBuf> {
    let file = std::env::var_os("SSL_CERT_FILE").map(PathBuf::from);
    let named = file.and_then(|file| Some(file.parent()?.to_path_buf()));
    let directory = std::env::var_os("SSL_CERT_DIR").map(PathBuf::from);
    CERTIFICATES.iter().map(PathBuf::from).chain(named).chain(directory).collect()
}

/// What is written to and read from.
pub enum Wire {
    /// TCP: a worker can take it over.
    Plain(Line),
    /// TLS to a proxy. It stays here, since a worker knows no keys.
    Secured(Box<TlsStream<Line>>),
}

impl Wire {
    fn get(self: Pin<&mut Self>) -> Pin<&mut dyn Both> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream),
            Self::Secured(stream) => Pin::new(&mut **stream),
        }
    }
}

trait Both: AsyncRead + AsyncWrite + Unpin {}
impl<T: AsyncRead + AsyncWrite + Unpin> Both for T {}

impl AsyncRead for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get().poll_read(cx, buffer) {
            // A tunnel's end, by a proxy that does not say it in TLS: what is inside tells its own.
            Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => Poll::Ready(Ok(())),
            read => read,
        }
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.get().poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get().poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get().poll_shutdown(cx)
    }
}

/// Connects to the first of these addresses that answers.
pub async fn connect(addresses: &[SocketAddr], rules: &Addresses) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "it has no address");
    for address in addresses {
        match timeout(CONNECT, connect_one(*address, rules)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => last = error,
            Err(_) => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(last)
}

async fn connect_one(address: SocketAddr, rules: &Addresses) -> io::Result<TcpStream> {
    let destination = Endpoint { address: address.ip().into(), port: address.port() };
    let plan = ConnectPlan {
        destination,
        local_port: None,
        traffic_class: 0,
        way: rules.way_out(destination.address),
    };
    let socket = tcp::open(&plan).map_err(|error| io::Error::from_raw_os_error(error.number))?;
    let stream = TcpStream::from_std(socket.into())?;
    stream.writable().await?;
    let fd = stream.as_raw_fd();
    tcp::outcome(fd).map_err(|error| io::Error::from_raw_os_error(error.number))?;
    tcp::establish(fd, address.is_ipv4(), true);
    tcp::keep_alive(fd, PROBED_AFTER);
    Ok(stream)
}

/// Speaks TLS to proxies, by the certificates that the host trusts. They are read when the first such proxy is called.
#[derive(Clone, Default)]
pub struct Tls(Rc<OnceCell<TlsConnector>>);

impl Tls {
    /// Opens a session with `host` over a connection.
    pub async fn open(&self, host: &str, line: Line) -> io::Result<Wire> {
        let connector = self.0.get_or_try_init(|| async { connector() }).await?;
        let name = ServerName::try_from(host.to_string()).map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidInput, "no name that a certificate could have")
        })?;
        Ok(Wire::Secured(Box::new(connector.connect(name, line).await?)))
    }
}

fn connector() -> io::Result<TlsConnector> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let provider = Arc::new(crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config).into())
}
