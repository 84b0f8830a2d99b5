//! HTTP/1.1 through hythe to a proxy: what either side sends and gets, to the byte. The proxy is the test's own.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};

use crate::rig::bytes::{expect_end, expect_reset, reset, transfer};
use crate::rig::cell::{ANY, Cell, on_every_cell};
use crate::rig::company::Company;
use crate::rig::company::proxies::{BY_PROXY, PORT};
use crate::rig::http::{Head, Server, Talk, Then, answer};
use crate::rig::hythe::Hythe;
use crate::rig::process;
use crate::rig::quiet;
use crate::rig::site::Family;
use crate::rig::wait::{PATIENCE, wait_until, wait_within};

fn start(company: &Company, cell: Cell) -> Hythe {
    company.hythe(cell).options(BY_PROXY).run()
}

/// The proxy of a test.
fn proxy(
    company: &Company,
    serve: impl Fn(&mut Talk, &Head) -> std::io::Result<Then> + Send + Sync + 'static,
) -> Server {
    Server::start(&company.site.far, Family::V4.far(), PORT, serve)
}

/// One that hands its connections to the test.
fn handed_over(company: &Company) -> (Server, mpsc::Receiver<Talk>) {
    let (send, receive) = mpsc::sync_channel(64);
    let server = Server::raw(&company.site.far, Family::V4.far(), PORT, move |talk| {
        let _ = send.send(Talk::new(talk.stream().try_clone().unwrap()));
    });
    (server, receive)
}

fn next(connections: &mpsc::Receiver<Talk>) -> Talk {
    connections.recv_timeout(PATIENCE).expect("a connection to the proxy")
}

fn talk(hythe: &Hythe) -> Talk {
    Talk::to(&hythe.guest, Company::origin(Family::V4), 80)
}

fn get(host: &str, path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n")
}

on_every_cell! {
    a_request_names_its_host_to_the_proxy_and_connections_last(cell) {
        let company = Company::new();
        let server = Server::mirror(&company.site.far, Family::V4.far(), PORT, "proxy");
        let hythe = start(&company, cell);
        hythe.assert_engine();
        for family in [Family::V4, Family::V6] {
            let mut guest = Talk::to(&hythe.guest, Company::origin(family), 80);
            let request = "GET /a/b?c=%2f&d HTTP/1.1\r\nhOsT: Web.Origin.test\r\nX-Of-The-Guest: 1\r\nConnection: x-hop\r\nX-Hop: 2\r\n\r\n";
            let (head, said) = guest.ask(request);
            assert_eq!(head.status(), 200);
            assert!(said.to_lowercase().starts_with("proxy: get http://web.origin.test/a/b?c=%2f&d http/1.1"), "{said}");
            let seen = server.heads().pop().unwrap();
            assert!(seen.field("host").unwrap().eq_ignore_ascii_case("web.origin.test"), "{seen:?}");
            assert_eq!(seen.field("x-of-the-guest"), Some("1"));
            assert_eq!(seen.field("x-hop"), None, "it was for hythe alone: {seen:?}");
            // The next one, and many at once.
            for number in 0..3 {
                let (_, said) = guest.ask(get("web.origin.test", &format!("/{number}")));
                assert!(said.contains(&format!("http://web.origin.test/{number} ")), "{said}");
            }
            let hosts = ["one.origin.test", "two.origin.test", "one.origin.test"];
            guest.send(hosts.map(|host| get(host, "/many")).concat());
            for host in hosts {
                let head = guest.head();
                let said = String::from_utf8(guest.body(&head)).unwrap();
                assert!(said.contains(&format!("http://{host}/many ")), "{said}");
            }
        }
        assert_eq!(server.connections(), 2, "requests to one proxy go on one connection");
        hythe.stop().assert_clean(0);
    }
}

#[test]
fn bodies_are_in_chunks_both_ways_with_their_trailers() {
    let company = Company::new();
    let (seen, trailers) = mpsc::channel();
    let _server = proxy(&company, move |talk, head| {
        assert_eq!(head.field("transfer-encoding"), Some("chunked"), "{head:?}");
        seen.send(talk.chunks()).unwrap();
        talk.try_send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n")?;
        for _ in 0..1000 {
            talk.try_send("3;ext=1\r\nabc\r\n")?;
        }
        talk.try_send("0\r\nX-Sum: 3000\r\n\r\n")?;
        Ok(Then::Next)
    });
    let hythe = start(&company, ANY);
    let mut guest = talk(&hythe);
    for _ in 0..2 {
        guest.send("POST / HTTP/1.1\r\nHost: web.origin.test\r\nTE: trailers\r\nConnection: TE\r\nTrailer: X-Guest\r\nTransfer-Encoding: chunked\r\n\r\n");
        for _ in 0..100 {
            guest.send("A\r\n0123456789\r\n");
        }
        guest.send("0\r\nX-Guest: yes\r\n\r\n");
        let (body, trailer) = trailers.recv_timeout(PATIENCE).unwrap();
        assert_eq!(body, b"0123456789".repeat(100));
        assert_eq!(trailer.field("x-guest"), Some("yes"));
        let head = guest.head();
        assert_eq!(head.field("transfer-encoding"), Some("chunked"), "{head:?}");
        let (body, trailer) = guest.chunks();
        assert_eq!(body, b"abc".repeat(1000));
        assert_eq!(trailer.field("x-sum"), Some("3000"));
    }
    hythe.stop().assert_clean(0);
}

#[test]
fn a_client_that_waits_to_go_on_is_told_by_who_answers() {
    const ASK: &str =
        "POST / HTTP/1.1\r\nHost: web.origin.test\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n";
    let company = Company::new();
    let (_server, connections) = handed_over(&company);
    let hythe = start(&company, ANY);
    let mut guest = talk(&hythe);
    guest.send(ASK);
    let mut far = next(&connections);
    let head = far.head();
    assert_eq!(head.field("expect").map(str::to_lowercase).as_deref(), Some("100-continue"), "{head:?}");
    far.send("HTTP/1.1 100 Continue\r\n\r\n");
    assert_eq!(guest.head().status(), 100);
    guest.send("hello");
    assert_eq!(far.exact(5), b"hello");
    far.send(answer("201 Created", "done"));
    let head = guest.head();
    assert_eq!((head.status(), guest.body(&head)), (201, b"done".to_vec()));

    // One that is refused sends nothing.
    let mut guest = talk(&hythe);
    guest.send(ASK);
    let mut far = next(&connections);
    far.head();
    far.send(answer("413 Content Too Large", "no"));
    let head = guest.head();
    assert_eq!(head.status(), 413, "the refusal is told, and no leave to go on");
    hythe.stop().assert_clean(0);
}

#[test]
fn an_answer_to_head_has_a_length_and_no_body() {
    let company = Company::new();
    let _server = proxy(&company, |talk, head| {
        let body = if head.line.starts_with("HEAD") { "" } else { "x" };
        let len = if body.is_empty() { 1000 } else { 1 };
        talk.try_send(format!("HTTP/1.1 200 OK\r\nContent-Length: {len}\r\nETag: \"e\"\r\n\r\n{body}"))?;
        Ok(Then::Next)
    });
    let hythe = start(&company, ANY);
    let mut guest = talk(&hythe);
    for _ in 0..3 {
        guest.send("HEAD / HTTP/1.1\r\nHost: web.origin.test\r\n\r\n");
        let head = guest.head();
        assert_eq!(
            (head.status(), head.field("content-length"), head.field("etag")),
            (200, Some("1000"), Some("\"e\""))
        );
        let (_, body) = guest.ask(get("web.origin.test", "/"));
        assert_eq!(body, "x");
    }
    hythe.stop().assert_clean(0);
}

#[test]
fn answers_without_a_body_and_up_to_the_end_are_what_they_were() {
    let company = Company::new();
    let _server = proxy(&company, |talk, head| match head.line.split(' ').nth(1).unwrap() {
        "http://web.origin.test/204" => {
            talk.try_send("HTTP/1.1 204 No Content\r\n\r\n")?;
            Ok(Then::Next)
        }
        "http://web.origin.test/304" => {
            talk.try_send("HTTP/1.1 304 Not Modified\r\nContent-Length: 77\r\n\r\n")?;
            Ok(Then::Next)
        }
        _ => {
            talk.try_send("HTTP/1.0 200 OK\r\nContent-Type: x/y\r\n\r\nup to the end")?;
            Ok(Then::Close)
        }
    });
    let hythe = start(&company, ANY);
    let mut guest = talk(&hythe);
    for status in [204, 304, 204] {
        guest.send(get("web.origin.test", &format!("/{status}")));
        assert_eq!(guest.head().status(), status);
    }
    guest.send("GET /end HTTP/1.1\r\nHost: web.origin.test\r\n\r\n");
    let head = guest.head();
    assert_eq!((head.status(), head.field("content-type")), (200, Some("x/y")));
    let body = match head.field("transfer-encoding") {
        Some(_) => guest.chunks().0,
        None => guest.rest().unwrap(),
    };
    assert_eq!(body, b"up to the end");
    // A client of the past, which has the end of the connection for the end of the body.
    let mut guest = talk(&hythe);
    guest.send("GET /end HTTP/1.0\r\nHost: web.origin.test\r\n\r\n");
    let all = String::from_utf8(guest.rest().unwrap()).unwrap();
    let (head, body) = all.split_once("\r\n\r\n").unwrap();
    assert!(!head.to_lowercase().contains("transfer-encoding") && body == "up to the end", "{all}");
    hythe.stop().assert_clean(0);
}

#[test]
fn a_gibibyte_streams_either_way_with_little_memory() {
    const BODY: u64 = 1 << 30;
    let _busy = quiet::busy();
    let company = Company::new();
    let _server = proxy(&company, |talk, head| {
        if head.line.starts_with("POST") {
            let len: u64 = head.field("content-length").unwrap().parse().unwrap();
            talk.skip(len)?;
            talk.try_send(answer("200 OK", &len.to_string()))?;
        } else {
            talk.try_send(format!("HTTP/1.1 200 OK\r\nContent-Length: {BODY}\r\n\r\n"))?;
            let zeros = vec![0; 1 << 20];
            for _ in 0..BODY >> 20 {
                talk.try_send(&zeros)?;
            }
        }
        Ok(Then::Next)
    });
    let hythe = start(&company, ANY);
    let mut guest = talk(&hythe);
    guest.ask("POST / HTTP/1.1\r\nHost: web.origin.test\r\nContent-Length: 1\r\n\r\nx");
    let before = process::resident_kib(hythe.pid());
    guest.send(get("web.origin.test", "/"));
    let head = guest.head();
    assert_eq!(head.field("content-length"), Some(BODY.to_string().as_str()));
    guest.skip(BODY).unwrap();
    let expect_little = |direction: &str| {
        let grown = process::peak_resident_kib(hythe.pid()).saturating_sub(before);
        assert!(grown < 32 << 10, "{direction}: {grown} KiB more at the most");
    };
    expect_little("back");
    guest.send(format!("POST / HTTP/1.1\r\nHost: web.origin.test\r\nContent-Length: {BODY}\r\n\r\n"));
    let zeros = vec![0; 1 << 20];
    for _ in 0..BODY >> 20 {
        guest.send(&zeros);
    }
    let head = guest.head();
    assert_eq!(guest.body(&head), BODY.to_string().into_bytes());
    expect_little("out");
    hythe.stop().assert_clean(0);
}

#[test]
fn a_reader_that_stops_stops_the_writer() {
    let _busy = quiet::busy();
    let company = Company::new();
    let sent = Arc::new(AtomicU64::new(0));
    let counted = sent.clone();
    let _server = proxy(&company, move |talk, _| {
        talk.try_send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
        let chunk = [b"100000\r\n".to_vec(), vec![0; 1 << 20], b"\r\n".to_vec()].concat();
        loop {
            talk.try_send(&chunk)?;
            counted.fetch_add(1, Ordering::Relaxed);
        }
    });
    let hythe = start(&company, ANY);
    let mut guest = talk(&hythe);
    guest.send(get("web.origin.test", "/"));
    guest.head();
    let before = process::resident_kib(hythe.pid());
    // The way is full when nothing more has gone into it for a while.
    let mut last = (0, std::time::Instant::now());
    wait_until("the way to be full", || {
        let now = sent.load(Ordering::Relaxed);
        if now != last.0 {
            last = (now, std::time::Instant::now());
        }
        last.1.elapsed().as_millis() > 500
    });
    let (full, grown) =
        (sent.load(Ordering::Relaxed), process::resident_kib(hythe.pid()).saturating_sub(before));
    assert!(full < 128 && grown < 32 << 10, "{full} MiB were taken, hythe has {grown} KiB more");
    for _ in 0..full + 16 {
        assert!(!guest.chunk().is_empty());
    }
    hythe.stop().assert_clean(0);
}

on_every_cell! {
    an_upgrade_changes_a_connection_into_a_stream_of_bytes(cell) {
        let company = Company::new();
        let (_server, connections) = handed_over(&company);
        let hythe = start(&company, cell);
        for early in [true, false] {
            let mut guest = talk(&hythe);
            guest.send("GET /chat HTTP/1.1\r\nHost: web.origin.test\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n\r\n");
            let mut far = next(&connections);
            let head = far.head();
            assert_eq!(head.line, "GET http://web.origin.test/chat HTTP/1.1");
            assert_eq!(head.field("upgrade"), Some("websocket"));
            assert_eq!(head.field("sec-websocket-key"), Some("k"));
            assert!(head.field("connection").unwrap().to_lowercase().contains("upgrade"));
            let says = if early { "early bytes" } else { "" };
            far.send(format!("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n{says}"));
            let head = guest.head();
            assert_eq!((head.status(), head.field("upgrade")), (101, Some("websocket")));
            assert_eq!(guest.exact(says.len()), says.as_bytes(), "what came with the answer");
            transfer(guest.stream(), far.stream(), 1, 3_000_000);
            transfer(far.stream(), guest.stream(), 2, 3_000_000);
            // Each direction has its own end.
            guest.finish();
            expect_end(far.stream());
            transfer(far.stream(), guest.stream(), 3, 100_000);
            far.finish();
            expect_end(guest.stream());
        }
        hythe.stop().assert_clean(0);
    }
}

#[test]
fn an_upgrade_that_is_refused_leaves_the_connection_as_it_was() {
    let company = Company::new();
    let server = proxy(&company, |talk, _| {
        talk.try_send(answer("200 OK", "no"))?;
        Ok(Then::Next)
    });
    let hythe = start(&company, ANY);
    let mut guest = talk(&hythe);
    let ask = "GET / HTTP/1.1\r\nHost: web.origin.test\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n";
    assert_eq!(guest.ask(ask).1, "no");
    assert_eq!(guest.ask(get("web.origin.test", "/")).1, "no");
    assert_eq!(server.heads().len(), 2);
    hythe.stop().assert_clean(0);
}

#[test]
fn whichever_side_goes_early_the_other_one_hears_of_it() {
    let company = Company::new();
    let (_server, connections) = handed_over(&company);
    let hythe = start(&company, ANY);

    // The proxy, in the middle of an answer: it does not look whole.
    for (framing, part) in
        [("Content-Length: 100", "ten bytes."), ("Transfer-Encoding: chunked", "a\r\nten bytes.\r\n")]
    {
        let mut guest = talk(&hythe);
        guest.send(get("web.origin.test", "/"));
        let mut far = next(&connections);
        far.head();
        far.send(format!("HTTP/1.1 200 OK\r\n{framing}\r\n\r\n{part}"));
        drop(far);
        assert_eq!(guest.head().status(), 200);
        let rest = guest.rest().unwrap_or_default();
        assert!(!rest.ends_with(b"0\r\n\r\n"), "it looks whole: {rest:?}");
    }

    // The proxy, before it answers.
    let mut guest = talk(&hythe);
    guest.send(get("web.origin.test", "/"));
    let mut far = next(&connections);
    far.head();
    drop(far);
    assert_eq!(guest.head().status(), 502);

    // The guest, in the middle of its request, in order or not.
    for orderly in [true, false] {
        let mut guest = talk(&hythe);
        guest.send("POST / HTTP/1.1\r\nHost: web.origin.test\r\nContent-Length: 1000\r\n\r\nhalf");
        let mut far = next(&connections);
        far.head();
        assert_eq!(far.exact(4), b"half");
        if orderly {
            drop(guest);
        } else {
            reset(guest.into_stream());
        }
        far.wait_for_end();
    }

    // The guest, while the answer comes.
    let mut guest = talk(&hythe);
    guest.send(get("web.origin.test", "/"));
    let mut far = next(&connections);
    far.head();
    far.send("HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n");
    guest.head();
    drop(guest);
    let zeros = vec![0; 1 << 20];
    let ended = wait_within(PATIENCE, || far.try_send(&zeros).err());
    assert!(ended.is_some(), "the proxy goes on sending to nobody");

    // The guest, which waits for nothing any more.
    let mut guest = talk(&hythe);
    guest.send(get("web.origin.test", "/"));
    let mut far = next(&connections);
    far.head();
    reset(guest.into_stream());
    far.wait_for_end();
    hythe.stop().assert_clean(0);
}

#[test]
fn heads_have_a_limit_and_what_is_over_it_is_told() {
    let company = Company::new();
    let server = Server::mirror(&company.site.far, Family::V4.far(), PORT, "proxy");
    let hythe = start(&company, ANY);
    let before = process::resident_kib(hythe.pid());
    // As large as browsers' may be.
    let (head, _) = talk(&hythe)
        .ask(format!("GET / HTTP/1.1\r\nHost: web.origin.test\r\nCookie: {}\r\n\r\n", "c".repeat(16 << 10)));
    assert_eq!(head.status(), 200);
    let (head, _) = talk(&hythe).ask(get("web.origin.test", &format!("/{}", "p".repeat(16 << 10))));
    assert_eq!(head.status(), 200);
    assert_eq!(server.heads().len(), 2);
    for (what, request, statuses) in [
        (
            "fields",
            format!(
                "GET / HTTP/1.1\r\nHost: web.origin.test\r\n{}",
                format!("X: {}\r\n", "x".repeat(1000)).repeat(100_000)
            ),
            [431, 431],
        ),
        (
            "many fields",
            format!("GET / HTTP/1.1\r\nHost: web.origin.test\r\n{}\r\n", "a:b\r\n".repeat(2000)),
            [431, 431],
        ),
        ("a target", get("web.origin.test", &format!("/{}", "p".repeat(100 << 10))), [414, 431]),
    ] {
        let mut guest = talk(&hythe);
        // It may be told before it has said all.
        let _ = guest.try_send(&request);
        let status = guest.try_head().map(|head| head.map(|head| head.status()));
        match status {
            Ok(Some(status)) => assert!(statuses.contains(&status), "{what}: {status}"),
            // What is sent to somebody who listens no more is answered by a reset, which may overtake the answer.
            other => assert!(other.is_err() && request.len() > 1 << 20, "{what}: {other:?}"),
        }
    }
    assert_eq!(server.heads().len(), 2, "nothing of them has gone on");
    let grown = process::peak_resident_kib(hythe.pid()).saturating_sub(before);
    assert!(grown < 16 << 10, "{grown} KiB more at the most");
    let (head, _) = talk(&hythe).ask(get("web.origin.test", "/"));
    assert_eq!(head.status(), 200);
    hythe.stop().assert_clean(0);
}

#[test]
fn a_request_that_can_be_read_in_two_ways_goes_on_in_one_or_not_at_all() {
    let company = Company::new();
    let server = proxy(&company, |talk, head| {
        let body = talk.body(head);
        talk.try_send(answer("200 OK", &String::from_utf8_lossy(&body)))?;
        Ok(Then::Next)
    });
    let hythe = start(&company, ANY);
    let inner = "GET /smuggled HTTP/1.1\r\nHost: inner.origin.test\r\n\r\n";
    let len = inner.len();
    let host = "Host: web.origin.test\r\n";
    for request in [
        format!(
            "POST / HTTP/1.1\r\n{host}Content-Length: {}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{inner}",
            len + 5
        ),
        format!(
            "POST / HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\nContent-Length: {}\r\n\r\n0\r\n\r\n{inner}",
            len + 5
        ),
        format!("POST / HTTP/1.1\r\n{host}Content-Length: 0\r\nContent-Length: {len}\r\n\r\n{inner}"),
        format!("POST / HTTP/1.1\r\n{host}Content-Length: 0, {len}\r\n\r\n{inner}"),
        format!("POST / HTTP/1.1\r\n{host}Content-Length: +{len}\r\n\r\n{inner}"),
        format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n{inner}"),
        format!(
            "POST / HTTP/1.1\r\n{host}Transfer-Encoding: xchunked\r\nContent-Length: {len}\r\n\r\n{inner}"
        ),
        format!(
            "POST / HTTP/1.1\r\n{host}Transfer-Encoding : chunked\r\nContent-Length: {len}\r\n\r\n{inner}"
        ),
        format!(
            "POST / HTTP/1.1\r\n{host}Transfer-Encoding:\r\n chunked\r\nContent-Length: {len}\r\n\r\n{inner}"
        ),
        format!(
            "POST / HTTP/1.0\r\n{host}Transfer-Encoding: chunked\r\nContent-Length: {len}\r\n\r\n{inner}"
        ),
        format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\n\r\n-1\r\n{inner}"),
        format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\n\r\n1 \n\rx\r\n0\r\n\r\n{inner}"),
        format!("GET / HTTP/1.1\r\n{host}X: a\rb\r\n\r\n"),
        format!("GET / HTTP/1.1\r\n{host}X: a\0b\r\n\r\n"),
        "GET / HTTP/1.1\r\nHost: web.origin.test\r\nHost: other.origin.test\r\n\r\n".to_string(),
        "GET / HTTP/1.1\r\nHost: web.origin.test, other.origin.test\r\n\r\n".to_string(),
        "GET / HTTP/1.1\r\nHost: web.origin.test/../other\r\n\r\n".to_string(),
        "GET / HTTP/1.1\r\nHost: user@web.origin.test\r\n\r\n".to_string(),
        format!("GET http://other.origin.test/ HTTP/1.1\r\n{host}\r\n"),
    ] {
        let before = server.heads().len();
        let mut guest = talk(&hythe);
        guest.send(&request);
        guest.finish();
        let said = guest.rest().map(|said| String::from_utf8_lossy(&said).into_owned());
        let refused = said.as_ref().is_err()
            || said.as_ref().is_ok_and(|said| {
                said.is_empty()
                    || said.starts_with("HTTP/1.1 400")
                    || said.starts_with("HTTP/1.0 400")
                    || said.starts_with("HTTP/1.1 501")
            });
        for head in &server.heads()[before..] {
            // Whatever went on says one thing: how long it is, and for whom it is.
            let framings = head.all("content-length").len() + head.all("transfer-encoding").len();
            assert!(framings < 2, "{request:?} went on as {head:?}");
            assert_eq!(head.all("host").len(), 1, "{request:?} went on as {head:?}");
            let target = head.line.split(' ').nth(1).unwrap();
            assert!(target.starts_with(&format!("http://{}/", head.field("host").unwrap())), "{head:?}");
            assert!(head.fields.iter().all(|(name, _)| name.trim() == name), "{head:?}");
        }
        let went_on = server.heads().len() - before;
        let twice = request.contains("web.origin.test\r\nHost:") || request.contains(", other");
        assert!(!twice || (refused && went_on == 0), "two Hosts: {request:?}: {said:?}");
        // What a body hides is no request, unless it comes behind one whose end was clear.
        assert!(refused || went_on > 0, "{request:?}: {said:?}");
    }
    hythe.stop().assert_clean(0);
}

#[test]
fn a_request_without_a_host_goes_by_its_address() {
    let company = Company::new();
    let server = Server::mirror(&company.site.far, Family::V4.far(), PORT, "proxy");
    let hythe = start(&company, ANY);
    let mut guest = talk(&hythe);
    guest.send("GET /old HTTP/1.0\r\n\r\n");
    let said = String::from_utf8(guest.rest().unwrap()).unwrap();
    assert!(said.contains("200 OK") && said.contains("GET http://198.18.9.1/old"), "{said}");
    let mut guest = Talk::to(&hythe.guest, Company::origin(Family::V6), 80);
    guest.send("GET /old HTTP/1.0\r\n\r\n");
    let said = String::from_utf8(guest.rest().unwrap()).unwrap();
    assert!(said.contains("GET http://[2001:db8:9::1]/old"), "{said}");
    let hosts: Vec<String> =
        server.heads().iter().map(|head| head.field("host").unwrap_or_default().into()).collect();
    assert_eq!(hosts, ["198.18.9.1", "[2001:db8:9::1]"]);
    hythe.stop().assert_clean(0);
}

#[test]
fn connections_end_when_either_side_says_so() {
    let company = Company::new();
    let server = proxy(&company, |talk, _| {
        talk.try_send("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok")?;
        Ok(Then::Close)
    });
    let hythe = start(&company, ANY);
    // The proxy's connection is the proxy's affair.
    let mut guest = talk(&hythe);
    for _ in 0..3 {
        assert_eq!(guest.ask(get("web.origin.test", "/")).1, "ok");
    }
    assert_eq!(server.connections(), 3);
    // The guest's is the guest's.
    guest.send("GET / HTTP/1.1\r\nHost: web.origin.test\r\nConnection: close\r\n\r\n");
    assert!(guest.rest().unwrap().ends_with(b"ok"));
    // A guest that says that it will say no more is answered.
    let mut guest = talk(&hythe);
    guest.send(get("web.origin.test", "/"));
    guest.finish();
    assert!(guest.rest().unwrap().ends_with(b"ok"));
    hythe.stop().assert_clean(0);
}

#[test]
fn requests_in_small_pieces_are_whole_at_the_other_end() {
    let company = Company::new();
    let _server = Server::mirror(&company.site.far, Family::V4.far(), PORT, "proxy");
    let hythe = start(&company, ANY);
    let mut guest = talk(&hythe);
    for byte in b"POST /slow HTTP/1.1\r\nHost: web.origin.test\r\nContent-Length: 3\r\n\r\nabc" {
        guest.stream().write_all(&[*byte]).unwrap();
    }
    let head = guest.head();
    let said = String::from_utf8(guest.body(&head)).unwrap();
    assert_eq!(said, "proxy: POST http://web.origin.test/slow HTTP/1.1 abc\n");
    hythe.stop().assert_clean(0);
}

#[test]
fn a_reset_of_a_stream_that_was_upgraded_is_one_at_the_other_end() {
    let company = Company::new();
    let (_server, connections) = handed_over(&company);
    let hythe = start(&company, ANY);
    for guest_goes in [true, false] {
        let mut guest = talk(&hythe);
        guest.send("GET / HTTP/1.1\r\nHost: web.origin.test\r\nConnection: Upgrade\r\nUpgrade: any\r\n\r\n");
        let mut far = next(&connections);
        far.head();
        far.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: any\r\n\r\n");
        guest.head();
        transfer(guest.stream(), far.stream(), 1, 100_000);
        let (goes, stays) = if guest_goes { (guest, far) } else { (far, guest) };
        let clone = stays.stream().try_clone().unwrap();
        reset(goes.into_stream());
        expect_reset(&clone);
    }
    hythe.stop().assert_clean(0);
}
