//! HTTP/1.1 by hand: a test says and sees every byte. The same hands serve as a client, an origin and a proxy.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::netns::Netns;
use super::wait::PATIENCE;

/// How often a thread looks whether it is to end.
const LOOK: Duration = Duration::from_millis(50);

/// The first line of a message, and its fields in their order; names as they were sent.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Head {
    pub line: String,
    pub fields: Vec<(String, String)>,
}

impl Head {
    /// All values of a field.
    pub fn all(&self, name: &str) -> Vec<&str> {
        let fields = self.fields.iter().filter(|(key, _)| key.eq_ignore_ascii_case(name));
        fields.map(|(_, value)| value.as_str()).collect()
    }

    /// The value of a field that may be there once.
    pub fn field(&self, name: &str) -> Option<&str> {
        let all = self.all(name);
        assert!(all.len() < 2, "{name} is there {} times: {self:?}", all.len());
        all.first().copied()
    }

    /// The status of an answer.
    pub fn status(&self) -> u16 {
        let words: Vec<&str> = self.line.split(' ').collect();
        assert!(words[0] == "HTTP/1.1" || words[0] == "HTTP/1.0", "no answer: {self:?}");
        words[1].parse().unwrap()
    }
}

/// One end of a connection on which HTTP is spoken.
pub struct Talk {
    from: BufReader<TcpStream>,
}

impl Talk {
    pub fn new(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self { from: BufReader::with_capacity(64 << 10, stream) }
    }

    /// A client's connection.
    pub fn to(netns: &Netns, address: IpAddr, port: u16) -> Self {
        let stream =
            netns.connect((address, port)).unwrap_or_else(|error| panic!("{address} {port}: {error}"));
        Self::new(stream)
    }

    pub fn stream(&self) -> &TcpStream {
        self.from.get_ref()
    }

    /// What nobody reads through it any more.
    pub fn into_stream(self) -> TcpStream {
        self.from.into_inner()
    }

    pub fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.from.get_mut().write_all(bytes.as_ref())
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send(bytes).unwrap();
    }

    /// No more bytes will be sent.
    pub fn finish(&self) {
        self.stream().shutdown(Shutdown::Write).unwrap();
    }

    /// The next head, or nothing where the other side has ended in order.
    pub fn try_head(&mut self) -> io::Result<Option<Head>> {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if self.from.read_line(&mut line)? == 0 {
                assert!(lines.is_empty(), "the stream ended in a head: {lines:?}");
                return Ok(None);
            }
            match line.trim_end_matches(['\r', '\n']) {
                "" => break,
                line => lines.push(line.to_string()),
            }
        }
        let fields = lines[1..].iter().map(|line| {
            let (name, value) =
                line.split_once(':').unwrap_or_else(|| panic!("no field: {line:?} in {lines:?}"));
            (name.to_string(), value.trim().to_string())
        });
        Ok(Some(Head { line: lines[0].clone(), fields: fields.collect() }))
    }

    pub fn head(&mut self) -> Head {
        self.try_head()
            .unwrap_or_else(|error| panic!("no head came: {error}"))
            .expect("a head before the end")
    }

    pub fn exact(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.from.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// What is there, or comes next; nothing at the end.
    pub fn try_some(&mut self) -> io::Result<Vec<u8>> {
        let bytes = self.from.fill_buf()?.to_vec();
        self.from.consume(bytes.len());
        Ok(bytes)
    }

    /// One chunk (RFC 9112, 7.1); the last one is empty.
    pub fn chunk(&mut self) -> Vec<u8> {
        let mut line = String::new();
        self.from.read_line(&mut line).unwrap();
        let len = usize::from_str_radix(line.split(';').next().unwrap().trim(), 16);
        let len = len.unwrap_or_else(|_| panic!("no chunk's size: {line:?}"));
        let bytes = self.exact(len);
        if len > 0 {
            assert_eq!(self.exact(2), b"\r\n");
        }
        bytes
    }

    /// A body in chunks, and its trailer.
    pub fn chunks(&mut self) -> (Vec<u8>, Head) {
        let mut body = Vec::new();
        loop {
            match self.chunk() {
                last if last.is_empty() => break,
                chunk => body.extend(chunk),
            }
        }
        let mut trailer = Head::default();
        loop {
            let mut line = String::new();
            self.from.read_line(&mut line).unwrap();
            let Some((name, value)) = line.split_once(':') else { break };
            trailer.fields.push((name.to_string(), value.trim().to_string()));
        }
        (body, trailer)
    }

    /// The body behind a head: in chunks, or of a length that is told.
    pub fn body(&mut self, head: &Head) -> Vec<u8> {
        if head.field("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
            return self.chunks().0;
        }
        let len = head.field("content-length").map_or(0, |len| len.parse().unwrap());
        self.exact(len)
    }

    /// Sends a request; gets the answer and its body.
    pub fn ask(&mut self, request: impl AsRef<[u8]>) -> (Head, String) {
        self.send(request);
        let head = self.head();
        let body = self.body(&head);
        (head, String::from_utf8_lossy(&body).into_owned())
    }

    /// Everything up to the end.
    pub fn rest(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.from.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Reads and forgets so many bytes, in pieces.
    pub fn skip(&mut self, len: u64) -> io::Result<()> {
        let copied = io::copy(&mut (&mut self.from).take(len), &mut io::sink())?;
        if copied == len { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// Waits until the other side ends or resets, whatever comes before.
    pub fn wait_for_end(&mut self) {
        let end = io::copy(&mut self.from, &mut io::sink());
        let timed_out =
            |error: &io::Error| matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
        assert!(!end.as_ref().is_err_and(timed_out), "the connection is left open");
    }
}

/// An answer with a body of a known length.
pub fn answer(status: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

/// What one connection's server goes on with.
pub enum Then {
    /// The next request.
    Next,
    /// The end.
    Close,
}

#[derive(Default)]
struct Shared {
    heads: Mutex<Vec<Head>>,
    connections: AtomicUsize,
    ended: AtomicBool,
}

/// A server of the test's own, an origin or a proxy; ends when dropped.
pub struct Server {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves at an address; `serve` is called for the head of every request, and reads the rest of it.
    pub fn start(
        netns: &Netns,
        address: IpAddr,
        port: u16,
        serve: impl Fn(&mut Talk, &Head) -> io::Result<Then> + Send + Sync + 'static,
    ) -> Self {
        let noted = Arc::new(Shared::default());
        let shared = noted.clone();
        let each = move |talk: &mut Talk| {
            while let Ok(Some(head)) = talk.try_head() {
                noted.heads.lock().unwrap().push(head.clone());
                match serve(talk, &head) {
                    Ok(Then::Next) => {}
                    // A peer that has gone is the test's affair.
                    Ok(Then::Close) | Err(_) => return,
                }
            }
        };
        Self::of_connections(netns, address, port, shared, each)
    }

    /// Serves connections, whatever is spoken there.
    pub fn raw(
        netns: &Netns,
        address: IpAddr,
        port: u16,
        serve: impl Fn(&mut Talk) + Send + Sync + 'static,
    ) -> Self {
        let shared = Arc::new(Shared::default());
        Self::of_connections(netns, address, port, shared, serve)
    }

    fn of_connections(
        netns: &Netns,
        address: IpAddr,
        port: u16,
        shared: Arc<Shared>,
        serve: impl Fn(&mut Talk) + Send + Sync + 'static,
    ) -> Self {
        let listener = netns.listen(address, port);
        socket2::SockRef::from(&listener).set_read_timeout(Some(LOOK)).unwrap();
        let serve = Arc::new(serve);
        let accepting = shared.clone();
        let thread = std::thread::spawn(move || {
            while !accepting.ended.load(Ordering::Relaxed) {
                let Ok((stream, _)) = listener.accept() else { continue };
                accepting.connections.fetch_add(1, Ordering::Relaxed);
                let serve = serve.clone();
                std::thread::spawn(move || serve(&mut Talk::new(stream)));
            }
        });
        Self { shared, thread: Some(thread) }
    }

    /// Answers every request with what it was asked, and who asked.
    pub fn mirror(netns: &Netns, address: IpAddr, port: u16, name: &'static str) -> Self {
        Self::start(netns, address, port, move |talk, head| {
            let body = talk.body(head);
            let said = format!("{name}: {} {}\n", head.line, String::from_utf8_lossy(&body));
            let len = said.len();
            let said = if head.line.starts_with("HEAD") { "" } else { &said };
            talk.try_send(format!("HTTP/1.1 200 OK\r\ncontent-length: {len}\r\n\r\n{said}"))?;
            Ok(Then::Next)
        })
    }

    /// Requests so far.
    pub fn heads(&self) -> Vec<Head> {
        self.shared.heads.lock().unwrap().clone()
    }

    /// Their first lines.
    pub fn lines(&self) -> Vec<String> {
        self.heads().into_iter().map(|head| head.line).collect()
    }

    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
