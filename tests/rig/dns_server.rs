//! A small DNS server with a zone of its own, over UDP and TCP.
//!
//! It knows the names below `test.`: one for each kind of record, and some that misbehave. Messages are made by hand, so
//! that what hythe passes on is not judged by the codec that hythe uses.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::netns::Netns;

const A: u16 = 1;
const MX: u16 = 15;
const TXT: u16 = 16;
const AAAA: u16 = 28;
const SRV: u16 = 33;
const OPT: u16 = 41;
const HTTPS: u16 = 65;

const SERVFAIL: u8 = 2;
const NXDOMAIN: u8 = 3;
const REFUSED: u8 = 5;

/// RFC 1035, 4.2.1: what a client takes over UDP that does not say otherwise.
const PLAIN_UDP_MAX: usize = 512;
/// How often a thread looks whether it is to end.
const LOOK: Duration = Duration::from_millis(50);

/// How a query came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Over {
    Udp,
    Tcp,
}

/// What the server has been asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Asked {
    pub name: String,
    pub over: Over,
}

struct Shared {
    /// The address that `whoami.test` has: tells one server from another.
    identity: [u8; 4],
    silent: bool,
    asked: Mutex<Vec<Asked>>,
    ended: AtomicBool,
    streams: AtomicU32,
}

/// A running server; ends when dropped.
pub struct DnsServer {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl DnsServer {
    /// Serves at port 53 of an address; `whoami.test` has the address 203.0.113.`identity`.
    pub fn start(netns: &Netns, address: IpAddr, identity: u8) -> Self {
        Self::make(netns, address, identity, false)
    }

    /// One that takes queries and never answers.
    pub fn silent(netns: &Netns, address: IpAddr) -> Self {
        Self::make(netns, address, 0, true)
    }

    fn make(netns: &Netns, address: IpAddr, identity: u8, silent: bool) -> Self {
        let shared = Arc::new(Shared {
            identity: [203, 0, 113, identity],
            silent,
            asked: Mutex::default(),
            ended: AtomicBool::new(false),
            streams: AtomicU32::new(0),
        });
        let udp = netns.udp(address, 53);
        udp.set_read_timeout(Some(LOOK)).unwrap();
        let tcp = netns.listen(address, 53);
        socket2::SockRef::from(&tcp).set_read_timeout(Some(LOOK)).unwrap();
        let datagrams = {
            let shared = shared.clone();
            move || {
                let mut query = [0; 4096];
                while !shared.ended.load(Ordering::Relaxed) {
                    let Ok((len, client)) = udp.recv_from(&mut query) else { continue };
                    if let Some(answer) = shared.answer(&query[..len], Over::Udp) {
                        let _ = udp.send_to(&answer, client);
                    }
                }
            }
        };
        let streams = {
            let shared = shared.clone();
            move || {
                while !shared.ended.load(Ordering::Relaxed) {
                    let Ok((stream, _)) = tcp.accept() else { continue };
                    shared.streams.fetch_add(1, Ordering::Relaxed);
                    stream.set_read_timeout(Some(LOOK)).unwrap();
                    let shared = shared.clone();
                    std::thread::spawn(move || shared.serve_stream(stream));
                }
            }
        };
        Self { shared, threads: vec![std::thread::spawn(datagrams), std::thread::spawn(streams)] }
    }

    /// All queries so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.shared.asked.lock().unwrap().clone()
    }

    /// How often a name was asked for.
    pub fn count(&self, name: &str, over: Over) -> usize {
        self.asked().iter().filter(|asked| asked.name == name && asked.over == over).count()
    }
}

impl Drop for DnsServer {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn serve_stream(&self, mut stream: TcpStream) {
        let mut got = Vec::new();
        let mut bytes = [0; 4096];
        while !self.ended.load(Ordering::Relaxed) {
            match stream.read(&mut bytes) {
                Ok(0) => return,
                Ok(len) => got.extend_from_slice(&bytes[..len]),
                Err(_) => continue,
            }
            // RFC 1035, 4.2.2: each message comes after its length.
            while let Some((length, rest)) = got.split_first_chunk::<2>() {
                let len = usize::from(u16::from_be_bytes(*length));
                let Some(query) = rest.get(..len) else { break };
                let answer = self.answer(query, Over::Tcp);
                got.drain(..2 + len);
                let Some(answer) = answer else { continue };
                let mut framed = (answer.len() as u16).to_be_bytes().to_vec();
                framed.extend(answer);
                if stream.write_all(&framed).is_err() {
                    return;
                }
            }
        }
    }

    fn answer(&self, query: &[u8], over: Over) -> Option<Vec<u8>> {
        let question = Question::parse(query)?;
        self.asked.lock().unwrap().push(Asked { name: question.name.clone(), over });
        if self.silent {
            return None;
        }
        let (code, records) = self.look_up(&question);
        let whole = message(query, &question, code, &records, false);
        let fits = over == Over::Tcp || whole.len() <= question.udp_max;
        Some(if fits { whole } else { message(query, &question, code, &[], true) })
    }

    /// The response code and the data of records of the kind asked for.
    fn look_up(&self, question: &Question) -> (u8, Vec<Vec<u8>>) {
        let kind = question.kind;
        let records: Vec<(u16, Vec<u8>)> = match question.name.as_str() {
            "address.test" => vec![
                (A, vec![203, 0, 113, 10]),
                (AAAA, [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10].to_vec()),
            ],
            // A company's proxies; what is reached through them alone, and what is not (tests/rig/company).
            "proxy.test" => both([198, 51, 100, 1], 0, 1),
            "websocket.origin.test" => both([198, 18, 9, 2], 9, 2),
            name if name.ends_with(".origin.test") => both([198, 18, 9, 1], 9, 1),
            name if name == "direct.test" || name.ends_with(".direct.test") => both([198, 51, 100, 1], 0, 1),
            "whoami.test" => vec![(A, self.identity.to_vec())],
            "text.test" => vec![(TXT, [strings(b"one string"), strings(b"another")].concat())],
            "mail.test" => vec![(MX, [&[0, 10][..], &name("mx.test")].concat())],
            "_http._tcp.test" => vec![(SRV, [&[0, 1, 0, 2, 31, 144][..], &name("web.test")].concat())],
            // RFC 9460: priority 1, the name itself, alpn=h2.
            "https.test" => vec![(HTTPS, [&[0, 1, 0][..], &[0, 1, 0, 3, 2], b"h2"].concat())],
            "large.test" => vec![(TXT, strings(&[b'x'; LARGE]))],
            // There, but without records of any kind.
            "empty.test" => vec![],
            "broken.test" => return (SERVFAIL, vec![]),
            "refused.test" => return (REFUSED, vec![]),
            _ => return (NXDOMAIN, vec![]),
        };
        (0, records.into_iter().filter(|(of, _)| *of == kind).map(|(_, data)| data).collect())
    }
}

/// A name's addresses of both families: `v4`, and 2001:db8:`net`::`host`.
fn both(v4: [u8; 4], net: u8, host: u8) -> Vec<(u16, Vec<u8>)> {
    let v6 = [0x20, 1, 0xd, 0xb8, 0, net, 0, 0, 0, 0, 0, 0, 0, 0, 0, host];
    vec![(A, v4.to_vec()), (AAAA, v6.to_vec())]
}

/// Bytes of text that `large.test` has.
pub const LARGE: usize = 3000;

/// RFC 1035, 3.3: text in strings of 255 bytes at the most.
fn strings(text: &[u8]) -> Vec<u8> {
    text.chunks(255).flat_map(|part| [&[part.len() as u8][..], part].concat()).collect()
}

fn name(text: &str) -> Vec<u8> {
    let mut bytes: Vec<u8> =
        text.split('.').flat_map(|label| [&[label.len() as u8][..], label.as_bytes()].concat()).collect();
    bytes.push(0);
    bytes
}

struct Question {
    name: String,
    kind: u16,
    /// Where it ends in the message.
    end: usize,
    has_opt: bool,
    /// The longest answer that the client takes over UDP.
    udp_max: usize,
}

impl Question {
    fn parse(query: &[u8]) -> Option<Self> {
        let number = |at: usize| Some(u16::from_be_bytes(*query.get(at..)?.first_chunk()?));
        let (mut at, mut labels) = (12, Vec::new());
        loop {
            let len = usize::from(*query.get(at)?);
            if len == 0 {
                break;
            }
            labels.push(String::from_utf8_lossy(query.get(at + 1..at + 1 + len)?).to_lowercase());
            at += 1 + len;
        }
        let (kind, end) = (number(at + 1)?, at + 5);
        // RFC 6891, 6.1.2: the root's name, the type, and the size as the class.
        let has_opt = query.get(end) == Some(&0) && number(end + 1) == Some(OPT);
        let udp_max = if has_opt { usize::from(number(end + 3)?) } else { PLAIN_UDP_MAX };
        Some(Self { name: labels.join("."), kind, end, has_opt, udp_max: udp_max.max(PLAIN_UDP_MAX) })
    }
}

fn message(query: &[u8], question: &Question, code: u8, records: &[Vec<u8>], truncated: bool) -> Vec<u8> {
    let mut bytes = query[..2].to_vec();
    // A response; recursion desired as in the query, recursion available.
    bytes.extend([0x80 | (query[2] & 1) | if truncated { 2 } else { 0 }, 0x80 | code]);
    bytes.extend([0, 1, 0, records.len() as u8, 0, 0, 0, u8::from(question.has_opt)]);
    bytes.extend(&query[12..question.end]);
    for data in records {
        // The name is that of the question, at byte 12.
        bytes.extend([0xc0, 12]);
        bytes.extend(question.kind.to_be_bytes());
        bytes.extend([0, 1, 0, 0, 1, 44]);
        bytes.extend((data.len() as u16).to_be_bytes());
        bytes.extend(data);
    }
    if question.has_opt {
        bytes.extend([0, 0, OPT as u8, 0x10, 0, 0, 0, 0, 0, 0, 0]);
    }
    bytes
}
