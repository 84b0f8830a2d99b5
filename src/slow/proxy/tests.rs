//! What a guest gets, and what a proxy and an origin hear, with real sockets on the loopback.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::task::LocalSet;
use tokio::time::timeout;

use super::http::Entry;
use super::place::Place;
use super::*;
use crate::exchange::Waker;
use crate::policy::egress::Rules;
use crate::slow::dns;
use crate::slow::neighbours::tests::addresses;

/// What leads out by these settings, with a worker that nobody plays.
pub fn proxy(settings: ProxySettings) -> Proxy {
    with_rules(settings, &[]).0
}

fn with_rules(settings: ProxySettings, rules: &[&str]) -> (Proxy, Mailbox<ToWorker<OwnedFd>>) {
    let rules = rules.iter().map(|rule| rule.parse().unwrap()).collect();
    let addresses = Addresses {
        egress: Arc::new(Rules::of_guest(rules, None).unwrap()),
        proxy: (!settings.is_off()).then(|| Arc::new(settings)),
        ..addresses()
    };
    let mail = Mailbox::new(16, Arc::new(Waker::new().unwrap()));
    let dns = Dns::new(dns::Settings::default(), &addresses, Arc::default()).unwrap();
    let start = Start { streams: 8, mode: ProxyMode::Manual, pac: None, script: None, log_refusals: false };
    let current = Rc::new(CurrentAddresses::new(Arc::new(addresses), vec![]));
    let proxy = Proxy::new(start, current, dns, vec![mail.clone()], Arc::default());
    (proxy, mail)
}

/// Settings with one proxy for everything.
fn by(address: SocketAddr, credentials: &str) -> ProxySettings {
    let url: ProxyUrl = format!("http://{credentials}{address}").parse().unwrap();
    ProxySettings { http: Some(url.clone()), https: Some(url), ..ProxySettings::default() }
}

/// Runs a test to its end, which must come.
fn soon<F: Future<Output = ()>>(test: F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, async { timeout(Duration::from_secs(20), test).await.unwrap() });
}

/// The guest's end of a stream to a place of the world, or to the gateway.
fn call(proxy: &Proxy, entry: Entry) -> UnixStream {
    let (guest, end) = UnixStream::pair().unwrap();
    let slot = Slot { index: 7, generation: 1 };
    let stream = GuestStream::new(proxy.0.workers[0].clone(), slot, None);
    spawn_local(http::serve(proxy.clone(), entry, SharedStream::new(end), stream));
    guest
}

fn world(port: u16) -> Entry {
    Entry::Through(Place { name: None, address: Some("192.0.2.1".parse().unwrap()), port })
}

/// Everything that a guest hears after it has said all.
async fn ask(proxy: &Proxy, entry: Entry, words: &str) -> String {
    let mut guest = call(proxy, entry);
    guest.write_all(words.as_bytes()).await.unwrap();
    guest.shutdown().await.unwrap();
    let mut heard = String::new();
    guest.read_to_string(&mut heard).await.unwrap();
    heard
}

/// Reads up to an empty line.
async fn head(stream: &mut TcpStream) -> String {
    let mut heard = Vec::new();
    while !heard.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        assert_eq!(stream.read(&mut byte).await.unwrap(), 1, "{}", String::from_utf8_lossy(&heard));
        heard.push(byte[0]);
    }
    String::from_utf8(heard).unwrap()
}

const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nkeep-alive: 5\r\nproxy-connection: x\r\n\r\nok";

#[test]
fn a_request_goes_to_the_proxy_by_name_and_loses_what_is_for_one_hop() {
    soon(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (proxy, _) = with_rules(by(listener.local_addr().unwrap(), ""), &[]);
        let words = "GET /a?b HTTP/1.1\r\nHost: One.example\r\nConnection: x-hop\r\nX-Hop: 1\r\n\
                     Proxy-Authorization: Basic c2VjcmV0\r\n\r\n\
                     GET /c HTTP/1.1\r\nHost: two.example\r\nConnection: close\r\n\r\n";
        let played = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let first = head(&mut stream).await;
            stream.write_all(OK).await.unwrap();
            // The second one comes by the same connection.
            let second = head(&mut stream).await;
            stream.write_all(OK).await.unwrap();
            (first, second)
        };
        let (heard, (first, second)) = tokio::join!(ask(&proxy, world(8080), words), played);
        assert!(first.starts_with("GET http://one.example:8080/a?b HTTP/1.1\r\n"), "{first}");
        assert!(second.starts_with("GET http://two.example:8080/c HTTP/1.1\r\n"), "{second}");
        for absent in ["x-hop", "connection", "authorization"] {
            assert!(!first.to_ascii_lowercase().contains(absent), "{first}");
        }
        assert_eq!(heard.matches("HTTP/1.1 200 OK").count(), 2, "{heard}");
        assert!(!heard.contains("keep-alive: 5") && !heard.contains("proxy-connection"), "{heard}");
    });
}

#[test]
fn a_proxy_that_asks_is_answered_once_and_the_body_comes_again() {
    soon(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (proxy, _) = with_rules(by(listener.local_addr().unwrap(), "joe:hunter2@"), &[]);
        let words = "POST / HTTP/1.1\r\nHost: one.example\r\ncontent-length: 4\r\n\r\nbody";
        let played = async {
            let mut asked = Vec::new();
            for _ in 0..2 {
                let (mut stream, _) = listener.accept().await.unwrap();
                asked.push(head(&mut stream).await);
                let mut body = [0; 4];
                stream.read_exact(&mut body).await.unwrap();
                assert_eq!(&body, b"body");
                let refused = b"HTTP/1.1 407 Asked\r\nproxy-authenticate: Basic realm=\"x\"\r\ncontent-length: 0\r\n\r\n";
                stream.write_all(refused).await.unwrap();
            }
            asked
        };
        let (heard, asked) = tokio::join!(ask(&proxy, world(80), words), played);
        assert!(!asked[0].contains("uthorization"), "{}", asked[0]);
        assert!(
            asked[1]
                .to_ascii_lowercase()
                .contains("proxy-authorization: basic am9lomh1bnrlcjI=".to_ascii_lowercase().as_str()),
            "{}",
            asked[1]
        );
        // The second refusal is the guest's to know.
        assert!(heard.starts_with("HTTP/1.1 407 "), "{heard}");
    });
}

#[test]
fn what_two_readers_could_read_in_two_ways_goes_no_further() {
    soon(async {
        let nobody = by("127.0.0.1:9".parse().unwrap(), "");
        let (proxy, _) = with_rules(nobody, &[]);
        for words in [
            "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a@b\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
            "GET https://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
            "GET / HTTP/1.1\r\nHost: a\r\n folded: x\r\n\r\n",
            "GET /\u{1} HTTP/1.1\r\nHost: a\r\n\r\n",
        ] {
            let heard = ask(&proxy, world(80), words).await;
            assert!(heard.starts_with("HTTP/1.1 400 "), "{words:?}: {heard}");
        }
        let heard = ask(&proxy, world(80), "GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert!(heard.starts_with("HTTP/1.1 502 "), "{heard}");
    });
}

#[test]
fn rules_refuse_requests_in_words_and_nobody_else_hears_of_them() {
    soon(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let settings = by(listener.local_addr().unwrap(), "");
        let (proxy, _) = with_rules(settings, &["deny *.bad.example"]);
        for (entry, words) in [
            (world(80), "GET / HTTP/1.1\r\nHost: x.bad.example\r\n\r\n"),
            (Entry::Gateway, "GET http://x.bad.example/ HTTP/1.1\r\nHost: good\r\n\r\n"),
            (Entry::Gateway, "CONNECT x.bad.example:443 HTTP/1.1\r\nHost: good\r\n\r\n"),
        ] {
            let heard = ask(&proxy, entry, words).await;
            assert!(heard.starts_with("HTTP/1.1 403 "), "{words:?}: {heard}");
        }
        assert!(timeout(Duration::from_millis(1), listener.accept()).await.is_err());
    });
}

#[test]
fn the_hosts_loopback_is_reached_by_no_other_name_than_its_own() {
    soon(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        for settings in [ProxySettings::default(), by("127.0.0.1:9".parse().unwrap(), "")] {
            let (proxy, _) = with_rules(settings, &[]);
            for host in [
                "127.0.0.1",
                "localhost",
                "[::1]",
                "0.0.0.0",
                "[::ffff:127.0.0.1]",
                "x.localhost",
                "192.168.65.1",
            ] {
                let words = format!("CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}\r\n\r\n");
                let heard = ask(&proxy, Entry::Gateway, &words).await;
                let status = heard.split(' ').nth(1).unwrap_or_default();
                assert!(["403", "502"].contains(&status), "{host}: {heard}");
            }
            let mut guest = call(&proxy, Entry::Gateway);
            let words = format!("CONNECT host.docker.internal:{port} HTTP/1.1\r\nHost: x\r\n\r\n");
            guest.write_all(words.as_bytes()).await.unwrap();
            listener.accept().await.unwrap();
            let mut heard = [0; 12];
            guest.read_exact(&mut heard).await.unwrap();
            assert_eq!(&heard, b"HTTP/1.1 200");
        }
    });
}

#[test]
fn a_tunnel_is_given_to_the_worker_with_all_that_was_said_before() {
    soon(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (proxy, mail) = with_rules(by(listener.local_addr().unwrap(), ""), &[]);
        let mut guest = call(&proxy, Entry::Gateway);
        // The guest does not wait for the answer, and the far side speaks first.
        guest.write_all(b"CONNECT a.example:1 HTTP/1.1\r\nHost: a\r\n\r\nearly").await.unwrap();
        let (mut far, _) = listener.accept().await.unwrap();
        assert!(head(&mut far).await.starts_with("CONNECT a.example:1 HTTP/1.1\r\n"));
        far.write_all(b"HTTP/1.1 200 There\r\n\r\nhello").await.unwrap();
        let mut early = [0; 5];
        far.read_exact(&mut early).await.unwrap();
        assert_eq!(&early, b"early");
        let rehomed = loop {
            match mail.take() {
                Some(ToWorker::Rehome { socket, stream, .. }) => break (socket, stream),
                Some(_) => panic!("something else was said"),
                None => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        };
        assert_eq!(rehomed.1.index, 7);
        // As a worker does: nothing more is said to the old end, and all of it is read.
        guest.write_all(b" and late").await.unwrap();
        guest.shutdown().await.unwrap();
        let mut heard = String::new();
        guest.read_to_string(&mut heard).await.unwrap();
        assert!(heard.starts_with("HTTP/1.1 200 OK\r\n") && heard.ends_with("\r\n\r\nhello"), "{heard}");
        let mut late = [0; 9];
        far.read_exact(&mut late).await.unwrap();
        assert_eq!(&late, b" and late");
        let mut own = TcpStream::from_std(rehomed.0.into()).unwrap();
        own.write_all(b"the worker").await.unwrap();
        let mut worker = [0; 10];
        far.read_exact(&mut worker).await.unwrap();
        assert_eq!(&worker, b"the worker");
    });
}

/// Heads of requests as an upstream proxy hears them, each answered and closed behind.
async fn hear(listener: TcpListener, heard: Rc<RefCell<Vec<Vec<u8>>>>) {
    loop {
        let Ok((mut stream, _)) = listener.accept().await else { return };
        let heard = heard.clone();
        spawn_local(async move {
            let mut bytes = Vec::new();
            while !bytes.windows(4).any(|end| end == b"\r\n\r\n") {
                if stream.read_buf(&mut bytes).await.unwrap_or(0) == 0 {
                    break;
                }
            }
            heard.borrow_mut().push(bytes);
            let _ = stream.write_all(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n").await;
        });
    }
}

/// A request of a guest's that may be anything: words that matter, in any order and number, and bytes between them.
fn any_request() -> impl Strategy<Value = Vec<u8>> {
    let word = prop::sample::select(vec![
        "GET ",
        "POST ",
        "OPTIONS ",
        "CONNECT ",
        "/ ",
        "* ",
        "http://a.example/x ",
        "http://u:p@b/ ",
        "//c ",
        "HTTP/1.1\r\n",
        "HTTP/1.0\r\n",
        "HTTP/2.0\r\n",
        "Host: a.example\r\n",
        "host: B.example:81\r\n",
        "Host: [::1]\r\n",
        "Host:\r\n",
        "Content-Length: 5\r\n",
        "Content-Length: 0, 5\r\n",
        "Content-Length: -1\r\n",
        "Transfer-Encoding: chunked\r\n",
        "Transfer-Encoding: x, chunked\r\n",
        "Connection: Host, close\r\n",
        "Connection: upgrade\r\n",
        "Upgrade: x\r\n",
        "Proxy-Authorization: Basic c2VjcmV0\r\n",
        "Proxy-Connection: keep-alive\r\n",
        "Expect: 100-continue\r\n",
        "TE: trailers\r\n",
        " folded\r\n",
        "\r\n",
        "\n",
        "5\r\nhello\r\n0\r\n\r\n",
        "hello",
        "\0",
        "\u{7f}",
    ]);
    let piece = prop_oneof![9 => word.prop_map(|word| word.as_bytes().to_vec()), 1 => prop::collection::vec(any::<u8>(), 0..6)];
    let begun =
        prop::sample::select(vec!["", "GET / HTTP/1.1\r\n", "POST /x HTTP/1.1\r\nHost: a.example\r\n"]);
    (begun, prop::collection::vec(piece, 0..12))
        .prop_map(|(begun, pieces)| [begun.as_bytes(), &pieces.concat(), b"\r\n\r\n"].concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn whatever_a_guest_says_a_proxy_hears_requests_that_can_be_read_in_one_way(words in any_request(), explicit in any::<bool>()) {
        soon(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let (proxy, _) = with_rules(by(listener.local_addr().unwrap(), ""), &[]);
            let heard: Rc<RefCell<Vec<Vec<u8>>>> = Rc::default();
            spawn_local(hear(listener, heard.clone()));
            let mut guest = call(&proxy, if explicit { Entry::Gateway } else { world(80) });
            // It may have been refused before it was read.
            let _ = guest.write_all(&words).await;
            let _ = guest.shutdown().await;
            let _ = guest.read_to_end(&mut Vec::new()).await;
            for bytes in heard.borrow().iter() {
                let text = String::from_utf8_lossy(bytes);
                let mut fields = [httparse::EMPTY_HEADER; http::HEADERS_MAX];
                let mut request = httparse::Request::new(&mut fields);
                assert!(request.parse(bytes).unwrap().is_complete(), "{text}");
                let all = |name: &str| {
                    let named = request.headers.iter().filter(|field| field.name.eq_ignore_ascii_case(name));
                    named.map(|field| String::from_utf8_lossy(field.value).into_owned()).collect::<Vec<_>>()
                };
                let target = request.path.unwrap();
                let authority = target.strip_prefix("http://").unwrap_or(target);
                assert_eq!(all("host"), [authority.split('/').next().unwrap()], "{text}");
                assert!(all("content-length").len() + all("transfer-encoding").len() <= 1, "{text}");
                assert!(all("proxy-connection").is_empty(), "{text}");
                // RFC 9112, 5.2: no line goes on in the next one.
                assert!(!text.contains("\r\n ") && !text.contains("\r\n\t"), "{text}");
                assert!(all("connection").iter().all(|value| value == "upgrade"), "{text}");
                assert!(explicit || all("proxy-authorization").is_empty(), "{text}");
            }
        });
    }
}
