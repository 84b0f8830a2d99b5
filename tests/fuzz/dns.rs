//! The path of a name: what a guest sends, and what a resolver says to it, are the fuzzer's bytes.
//!
//! ```text
//! byte 0    bit 0: the query comes in a stream; bit 1: the reply repeats the question, or it is bytes alone
//! 1, 2      the length of the query
//! 3 …       the query, then the reply (behind the ID, or behind the question that it repeats)
//! ```
//! Whatever comes, an answer belongs to its query, and the second time, by the cache, too.
#![no_main]

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hythe::frame::address::{Address, Endpoint, Mac};
use hythe::policy::addresses::{Addresses, Family, SUBNET, SUBNET6};
use hythe::policy::names::NamePolicy;
use hythe::policy::outbound::Outbound;
use hythe::policy::proxy::TransparentPorts;
use hythe::slow::dns::{Dns, Patience, Settings, Transport};
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UdpSocket, UnixStream};
use tokio::runtime::Runtime;

/// A resolver that is silent, since its reply fits nothing, is not worth more of the fuzzer's time.
const PATIENCE: Duration = Duration::from_millis(2);

/// The header of a message, in bytes (RFC 1035, 4.1.1).
const HEADER: usize = 12;

struct Bench {
    runtime: Runtime,
    resolver: UdpSocket,
}

impl Bench {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let resolver = runtime.block_on(UdpSocket::bind("127.0.0.1:0")).expect("a socket");
        Self { runtime, resolver }
    }

    fn dns(&self) -> Dns {
        let nowhere = PathBuf::from("/nonexistent");
        let names = NamePolicy {
            zones: vec!["example=127.0.0.1:1".parse().expect("a zone")],
            records: vec!["*.test=10.0.0.1".parse().expect("a record")],
            ..NamePolicy::default()
        };
        let settings = Settings {
            resolv_conf: nowhere.clone(),
            hosts: nowhere.clone(),
            resolved_conf: nowhere,
            servers: vec![self.resolver.local_addr().expect("bound")],
            names,
            patience: Patience { attempt: PATIENCE, total: PATIENCE, stream_idle: PATIENCE, ..Patience::default() },
            ..Settings::default()
        };
        Dns::new(settings, &addresses(), Default::default()).expect("random numbers")
    }

    /// Answers every query with these bytes, for ever.
    async fn resolve(&self, repeats: bool, reply: &[u8]) {
        let mut query = vec![0; 65_535];
        loop {
            let (len, from) = self.resolver.recv_from(&mut query).await.expect("a query");
            let query = &query[..len];
            let mut message = if repeats {
                let mut message = query.to_vec();
                message[2] |= 0x80;
                // How many records there are is for the reply to say.
                let told = reply.len().min(6);
                message[6..6 + told].copy_from_slice(&reply[..told]);
                message.extend(&reply[told..]);
                message
            } else {
                [&query[..2], reply].concat()
            };
            message.truncate(65_000);
            let _ = self.resolver.send_to(&message, from).await;
        }
    }

    async fn run(&self, mode: u8, query: &[u8], reply: &[u8]) {
        let dns = self.dns();
        let ask = async {
            for _ in 0..2 {
                let guest = addresses().v4.expect("IPv4").guest;
                let transport = if mode & 1 == 0 { Transport::Udp(Endpoint::new(guest, 4000)) } else { Transport::Tcp };
                if let Some(answer) = dns.answer(query, transport).await {
                    check(query, &answer);
                }
            }
            if mode & 1 == 1 {
                over_stream(&dns, query).await;
            }
        };
        tokio::select! {
            () = ask => {}
            () = self.resolve(mode & 2 != 0, reply) => {}
        }
    }
}

/// The bytes as a stream: messages with their lengths before them, or not even that.
async fn over_stream(dns: &Dns, bytes: &[u8]) {
    let (mut guest, service) = UnixStream::pair().expect("a pair");
    let talk = async {
        let _ = guest.write_all(bytes).await;
        let _ = guest.shutdown().await;
        let mut answers = Vec::new();
        let _ = guest.read_to_end(&mut answers).await;
        let mut rest = answers.as_slice();
        while let [high, low, behind @ ..] = rest {
            let len = usize::from(u16::from_be_bytes([*high, *low]));
            assert!(len >= HEADER && behind.len() >= len, "an answer that is cut off");
            rest = &behind[len..];
        }
        assert!(rest.is_empty());
    };
    tokio::join!(dns.serve_stream(service), talk);
}

fn check(query: &[u8], answer: &[u8]) {
    assert!(answer.len() >= HEADER && answer.len() <= 65_535, "{} bytes", answer.len());
    assert_eq!(answer[..2], query[..2], "the ID is the query's");
    assert!(answer[2] & 0x80 != 0, "it is an answer");
}

fn addresses() -> Addresses {
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
        egress: Arc::default(),
        proxy: None,
        transparent: TransparentPorts::default(),
        snat_from: Vec::new(),
        own: Vec::new(),
        outbound: Outbound::default(),
    }
}

thread_local! {
    static BENCH: RefCell<Option<Bench>> = const { RefCell::new(None) };
}

fuzz_target!(|data: &[u8]| {
    let [mode, low, high, rest @ ..] = data else { return };
    let len = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
    let (query, reply) = rest.split_at(len);
    BENCH.with_borrow_mut(|bench| {
        let bench = bench.get_or_insert_with(Bench::new);
        bench.runtime.block_on(bench.run(*mode, query, reply));
    });
});
