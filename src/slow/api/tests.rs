//! The API as callers see it: what each request gets, and what bad ones get.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::rc::Rc;
use std::sync::Arc;

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::presence::Presence;
use super::router::Router;
use super::{About, Caller, Explainer, connection};
use crate::control::shapes::BODY_MAX;
use crate::host::engine::EngineKind;
use crate::netlink::Netlink;
use crate::policy::guest_api::{GuestApi, GuestBounds};
use crate::policy::proxy::ProxySettings;
use crate::slow::current_addresses::CurrentAddresses;
use crate::slow::dns::{self, Dns};
use crate::slow::ports::Publishing;
use crate::slow::ports::table::{Publisher, Table};
use crate::slow::ports::tests::{Bench, free_ports};
use crate::slow::shared_stream::SharedStream;

fn router(publishing: &Rc<Publishing>) -> Rc<Router> {
    router_for(publishing, GuestApi::Publish)
}

fn router_for(publishing: &Rc<Publishing>, guest: GuestApi) -> Rc<Router> {
    let about = About {
        name: "test".into(),
        engine: EngineKind::Epoll,
        workers: 2,
        guest: vec!["192.168.65.3".parse().unwrap()],
        gateway: vec!["192.168.65.1".parse().unwrap()],
    };
    let (dns, addresses) = (dns(), Arc::new(crate::slow::neighbours::tests::addresses()));
    let current = Rc::new(CurrentAddresses::new(addresses, Vec::new()));
    let proxy = crate::slow::proxy::tests::proxy(ProxySettings::default());
    let explainer = Explainer::new(dns.clone(), current, proxy.clone(), Netlink::open().unwrap());
    Rc::new(Router::new(publishing.clone(), Rc::default(), dns, proxy, explainer, about, guest))
}

fn dns() -> Dns {
    Dns::new(dns::Settings::default(), &crate::slow::neighbours::tests::addresses(), Arc::default()).unwrap()
}

/// Somebody at the other end of a stream.
fn caller(publisher: Publisher, stream: SharedStream) -> Caller {
    let address = (publisher == Publisher::Guest).then(|| "192.168.65.3".parse().unwrap());
    Caller { publisher, address, presence: Presence::of(stream) }
}

/// Somebody who stays.
fn somebody(publisher: Publisher) -> Caller {
    let (one, other) = UnixStream::pair().unwrap();
    std::mem::forget(other);
    caller(publisher, SharedStream::new(one))
}

/// An answer, its body understood.
#[derive(Debug)]
struct Answered {
    status: u16,
    media_type: String,
    allow: Option<String>,
    body: Value,
}

async fn ask_with(
    router: &Router,
    publisher: Publisher,
    method: &str,
    target: &str,
    media_type: &str,
    body: impl Into<Bytes>,
) -> Answered {
    let method = Method::from_bytes(method.as_bytes()).unwrap();
    let request = Request::builder().method(method).uri(target).header("content-type", media_type);
    let response = router.answer(&somebody(publisher), request.body(Full::new(body.into())).unwrap()).await;
    let header = |name: &str| Some(response.headers().get(name)?.to_str().unwrap().to_string());
    let (status, media_type, allow) =
        (response.status().as_u16(), header("content-type").unwrap(), header("allow"));
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    let body = if media_type.starts_with("text/plain") {
        Value::String(String::from_utf8(bytes.into()).unwrap())
    } else {
        serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{error}: {bytes:?}"))
    };
    Answered { status, media_type, allow, body }
}

async fn ask(router: &Router, method: &str, target: &str, body: &Value) -> Answered {
    ask_with(router, Publisher::Host, method, target, "application/json", body.to_string()).await
}

async fn guest_asks(router: &Router, method: &str, target: &str, body: &Value) -> Answered {
    ask_with(router, Publisher::Guest, method, target, "application/json", body.to_string()).await
}

#[test]
fn ports_are_published_told_and_unpublished() {
    let first = free_ports(2);
    Bench::new(1000).run(async |publishing| {
        let router = router(&publishing);
        let spec = format!("127.0.0.1:{first}:80");
        let published = ask(&router, "POST", "/v1/ports", &json!({"publish": [spec]})).await;
        let port = |id: u64| {
            json!({"id": id, "address": "127.0.0.1", "host_port": first, "guest_port": 80, "protocol": "tcp"})
        };
        assert_eq!((published.status, &published.body), (201, &json!({"ports": [port(1)]})));
        assert_eq!(published.media_type, "application/json");
        TcpStream::connect((Ipv4Addr::LOCALHOST, first)).unwrap();

        let told = ask(&router, "GET", "/v1/ports", &Value::Null).await;
        assert_eq!((told.status, told.body), (200, json!({"ports": [port(1)]})));
        let told = ask(&router, "GET", "/v1/ports/1", &Value::Null).await;
        assert_eq!((told.status, told.body), (200, port(1)));
        let status = ask(&router, "GET", "/v1/status", &Value::Null).await;
        assert_eq!(status.body["ports"], 1);
        assert_eq!((&status.body["name"], &status.body["engine"]), (&json!("test"), &json!("epoll")));

        let removed = ask(&router, "DELETE", "/v1/ports/1", &Value::Null).await;
        assert_eq!((removed.status, removed.body), (200, json!({"ports": [port(1)]})));
        assert_eq!(ask(&router, "GET", "/v1/ports/1", &Value::Null).await.status, 404);
        TcpListener::bind((Ipv4Addr::LOCALHOST, first)).unwrap();

        let second = format!("127.0.0.1:{}:81/udp", first + 1);
        let published = ask(&router, "POST", "/v1/ports", &json!({"publish": [spec, second]})).await;
        assert_eq!(published.status, 201);
        let target = format!("/v1/ports?spec={spec}&spec={}", second.replace('/', "%2F"));
        let removed = ask(&router, "DELETE", &target, &Value::Null).await;
        assert_eq!((removed.status, removed.body["ports"].as_array().unwrap().len()), (200, 2));
        assert!(publishing.look(Table::is_empty));
    });
}

#[test]
fn what_cannot_be_done_is_a_problem_that_says_why() {
    let first = free_ports(2);
    Bench::new(40).run(async |publishing| {
        let router = router(&publishing);
        let _stranger = TcpListener::bind((Ipv4Addr::LOCALHOST, first + 1)).unwrap();
        let ours = format!("127.0.0.1:{first}:80");
        let theirs = format!("127.0.0.1:{}:80", first + 1);
        assert_eq!(ask(&router, "POST", "/v1/ports", &json!({"publish": [ours]})).await.status, 201);
        for (spec, status, code, detail) in [
            (ours.as_str(), 409, "port-allocated", "port is already allocated"),
            (&theirs, 409, "address-in-use", "address already in use"),
            ("203.0.113.9:8000:80", 422, "address-not-available", "does not have this address"),
            ("x:80", 422, "specification", "invalid hostPort: x"),
            ("80/sctp", 422, "specification", "sctp cannot be published"),
            ("1000-9000:1000-9000", 503, "exhausted", "descriptors"),
        ] {
            let problem = ask(&router, "POST", "/v1/ports", &json!({"publish": [spec]})).await;
            assert_eq!((problem.status, &problem.body["code"]), (status, &json!(code)), "{problem:?}");
            assert_eq!(
                (problem.media_type.as_str(), &problem.body["status"]),
                ("application/problem+json", &json!(status))
            );
            let said = problem.body["detail"].as_str().unwrap();
            assert!(said.contains(detail), "{said}");
            assert_eq!(
                problem.body["title"],
                StatusCode::from_u16(status).unwrap().canonical_reason().unwrap()
            );
        }
        let problem = ask(&router, "POST", "/v1/ports", &json!({"publish": [ours]})).await;
        assert_eq!(problem.body["port"]["host_port"], first);
        assert_eq!(publishing.look(Table::len), 1);
    });
}

#[test]
fn a_bad_request_is_told_what_is_wrong_with_it() {
    Bench::new(1000).run(async |publishing| {
        let router = router(&publishing);
        let none = json!(null);
        let many = format!("/v1/ports?{}", "spec=80&".repeat(33));
        for (method, target, body, status) in [
            ("GET", "/", &none, 404),
            ("GET", "/v1", &none, 404),
            ("GET", "/v1/ports/", &none, 404),
            ("GET", "/v1/ports/x", &none, 404),
            ("GET", "/v1/ports/-1", &none, 404),
            ("GET", "/v1/ports/+1", &none, 404),
            ("GET", "/v1/ports/99999999999999999999", &none, 404),
            ("GET", "/v1/ports/7", &none, 404),
            ("DELETE", "/v1/ports/7", &none, 404),
            ("GET", "/V1/ports", &none, 404),
            ("PUT", "/v1/ports", &none, 405),
            ("POST", "/v1/status", &none, 405),
            ("PATCH", "/v1/ports/1", &none, 405),
            ("BREW", "/v1/ports", &none, 405),
            ("POST", "/v1/ports", &none, 400),
            ("POST", "/v1/ports", &json!([]), 400),
            ("POST", "/v1/ports", &json!({}), 400),
            ("POST", "/v1/ports", &json!({"publish": "80"}), 400),
            ("POST", "/v1/ports", &json!({"publish": [80]}), 400),
            ("POST", "/v1/ports", &json!({"publish": ["80"], "more": 1}), 400),
            ("POST", "/v1/ports", &json!({"publish": []}), 422),
            ("POST", "/v1/ports", &json!({"publish": vec!["80"; 1025]}), 422),
            ("POST", "/v1/ports", &json!({"publish": vec!["1-65535:1-65535"; 100]}), 422),
            ("DELETE", "/v1/ports", &none, 422),
            ("DELETE", many.as_str(), &none, 422),
            ("DELETE", "/v1/ports?spec=x:80", &none, 422),
            ("DELETE", "/v1/ports?port=80", &none, 400),
            ("DELETE", "/v1/ports?spec=8000:80", &none, 404),
        ] {
            let answered = ask(&router, method, target, body).await;
            assert_eq!(answered.status, status, "{method} {target} {body}: {answered:?}");
            assert_eq!(answered.media_type, "application/problem+json");
            assert_eq!(answered.allow.is_some(), status == 405);
        }
        for (media_type, body, status) in [
            ("application/json", "{\"publish\": [", 400),
            ("application/json", "", 400),
            ("application/json; charset=utf-8", "{}", 400),
            ("text/plain", "{\"publish\": [\"80\"]}", 415),
            ("application/x-www-form-urlencoded", "publish=80", 415),
        ] {
            let answered = ask_with(&router, Publisher::Host, "POST", "/v1/ports", media_type, body).await;
            assert_eq!(answered.status, status, "{media_type} {body}: {answered:?}");
        }
        let nested = "[".repeat(BODY_MAX);
        assert_eq!(
            ask_with(&router, Publisher::Host, "POST", "/v1/ports", "application/json", nested).await.status,
            400
        );
        let long = " ".repeat(BODY_MAX + 1);
        assert_eq!(
            ask_with(&router, Publisher::Host, "POST", "/v1/ports", "application/json", long).await.status,
            413
        );
        assert!(publishing.look(Table::is_empty));
    });
}

#[test]
fn a_long_list_comes_in_pieces_and_whole() {
    let first = free_ports(200);
    Bench::new(2000).run(async |publishing| {
        let router = router(&publishing);
        let spec = format!("127.0.0.1:{first}-{}:1-200/udp", first + 199);
        assert_eq!(ask(&router, "POST", "/v1/ports", &json!({"publish": [spec]})).await.status, 201);
        let request = Request::builder().uri("/v1/ports").body(Full::new(Bytes::new())).unwrap();
        let mut body = router.answer(&somebody(Publisher::Host), request).await.into_body();
        let (mut pieces, mut text) = (0, Vec::new());
        while let Some(frame) = body.frame().await {
            let piece = frame.unwrap().into_data().unwrap();
            assert!(piece.len() < 8 << 10);
            pieces += 1;
            text.extend_from_slice(&piece);
            // What changes meanwhile is not told twice.
            if pieces == 2 {
                let removed = ask(&router, "DELETE", "/v1/ports/1", &Value::Null).await;
                assert_eq!(removed.status, 200);
            }
        }
        let told: Value = serde_json::from_slice(&text).unwrap();
        let ids: Vec<u64> =
            told["ports"].as_array().unwrap().iter().map(|port| port["id"].as_u64().unwrap()).collect();
        assert_eq!(ids, (1..=200).collect::<Vec<_>>());
        assert_eq!(pieces, 4);
    });
}

async fn serve(stream: UnixStream, router: Rc<Router>, publisher: Publisher) {
    let stream = SharedStream::new(stream);
    connection::serve(stream.clone(), router, caller(publisher, stream)).await;
}

/// What a connection answers to bytes after which nothing comes any more. Time passes as fast as nothing happens.
fn converse(bytes: &[u8], ends: bool) -> String {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let bench = Bench::new(100);
        let (mut client, server) = UnixStream::pair().unwrap();
        let serving = serve(server, router(&bench.publishing), Publisher::Host);
        let calling = async {
            client.write_all(bytes).await.unwrap();
            if ends {
                client.shutdown().await.unwrap();
            }
            let mut said = Vec::new();
            let _ = client.read_to_end(&mut said).await;
            String::from_utf8(said).unwrap()
        };
        tokio::join!(serving, calling).1
    })
}

#[test]
fn a_request_that_does_not_come_to_its_end_is_told_so() {
    let head =
        "POST /v1/ports HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 10\r\n";
    for (bytes, status) in [
        ("GET /v1/st".to_string(), "408 Request Timeout"),
        (head.to_string(), "408 Request Timeout"),
        (format!("{head}\r\n{{"), "408 Request Timeout"),
        ("GET /v1/status HTTP/1.1\r\n\r\nGET /v1".into(), "200 OK"),
        ("BREW\r\n\r\n".into(), "400 Bad Request"),
        ("\0\0\0\0\r\n\r\n".into(), "400 Bad Request"),
        (format!("GET /v1/status HTTP/1.1\r\nx: {}", "y".repeat(80 << 10)), "431 Request Header"),
        (format!("GET /v1/status HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(200)), "431 Request Header"),
    ] {
        let said = converse(bytes.as_bytes(), false);
        assert!(said.starts_with(&format!("HTTP/1.1 {status}")), "{bytes:.40}: {said}");
    }
    assert!(converse(b"GET /v1/status HTTP/1.1\r\n\r\nGET /v1", false).contains("HTTP/1.1 408"));
    assert_eq!(converse(b"", false), "", "one that says nothing is told nothing");
    assert_eq!(converse(b"", true), "");
    let whole = "GET /v1/status HTTP/1.1\r\nconnection: close\r\n\r\n";
    assert!(converse(whole.as_bytes(), false).contains("\"name\":\"test\""));
    assert!(converse(whole.as_bytes(), true).contains("\"name\":\"test\""), "it has said all, and listens");
    let removal = "DELETE /v1/ports/7 HTTP/1.1\r\n\r\n";
    assert!(converse(removal.as_bytes(), true).starts_with("HTTP/1.1 404"), "a removal is answered too");
}

#[test]
fn one_that_does_not_read_its_answer_is_left() {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let bench = Bench::new(100);
        let (client, server) = std::os::unix::net::UnixStream::pair().unwrap();
        client.set_nonblocking(true).unwrap();
        server.set_nonblocking(true).unwrap();
        // More requests than answers fit.
        let request = b"GET /v1/status HTTP/1.1\r\n\r\n";
        let mut sending = &client;
        let server = UnixStream::from_std(server).unwrap();
        let serving = serve(server, router(&bench.publishing), Publisher::Host);
        let calling = async {
            while sending.write(request).is_ok() {
                tokio::task::yield_now().await;
            }
        };
        tokio::join!(serving, calling);
        let mut answers = Vec::new();
        let _ = (&client).read_to_end(&mut answers);
        assert!(answers.len() < 1 << 20, "{} bytes", answers.len());
    });
}

fn bounds() -> GuestBounds {
    GuestBounds { ports: 1..=65535, addresses: Vec::new(), most: 4 }
}

#[test]
fn a_guest_lists_and_removes_what_it_has_published_alone_and_the_host_everything() {
    let first = free_ports(2);
    Bench::for_guest(bounds()).run(async |publishing| {
        let router = router(&publishing);
        let [hosts, guests] = [first, first + 1].map(|port| format!("127.0.0.1:{port}:80"));
        assert_eq!(ask(&router, "POST", "/v1/ports", &json!({"publish": [hosts]})).await.status, 201);
        let published = guest_asks(&router, "POST", "/v1/ports", &json!({"publish": [guests]})).await;
        assert_eq!((published.status, &published.body["ports"][0]["id"]), (201, &json!(2)));
        let listed = guest_asks(&router, "GET", "/v1/ports", &json!(null)).await;
        assert_eq!(listed.body["ports"], published.body["ports"], "its own alone");
        assert_eq!(ask(&router, "GET", "/v1/ports", &json!(null)).await.body["ports"][1]["id"], 2, "all");
        for (method, target) in [
            ("GET", "/v1/ports/1".to_string()),
            ("DELETE", "/v1/ports/1".to_string()),
            ("DELETE", format!("/v1/ports?spec={hosts}")),
            ("DELETE", "/v1/ports?spec=127.0.0.1::80&spec=127.0.0.1::81".to_string()),
        ] {
            let refused = guest_asks(&router, method, &target, &json!(null)).await;
            assert_eq!(refused.status, 404, "{target}: {refused:?}");
        }
        let local = json!({"local": format!("127.0.0.1:{first}")});
        let refused = guest_asks(&router, "POST", "/services/forwarder/unexpose", &local).await;
        assert_eq!((refused.status, publishing.look(Table::len)), (500, 2));
        // The same words mean the host's one for nobody but the host.
        let own = guest_asks(&router, "DELETE", "/v1/ports?spec=127.0.0.1::80", &json!(null)).await;
        assert_eq!((own.status, &own.body["ports"][0]["id"]), (200, &json!(2)));
        assert_eq!(ask(&router, "DELETE", "/v1/ports/1", &json!(null)).await.status, 200);
    });
}

#[test]
fn a_guest_publishes_within_its_bounds_and_only_where_it_may() {
    let first = free_ports(6);
    let bounds =
        GuestBounds { ports: first..=first + 4, addresses: vec!["127.0.0.0/8".parse().unwrap()], most: 4 };
    Bench::for_guest(bounds).run(async |publishing| {
        let router = router(&publishing);
        let publish = |spec: String| json!({"publish": [spec]});
        for (spec, words) in [
            (format!("127.0.0.1:{}:80", first + 5), "is none of them"),
            (format!("{first}:80"), "may not publish on 0.0.0.0"),
            (format!("127.0.0.1:{first}-{}:80-84", first + 4), "4 ports at a time"),
        ] {
            let refused = guest_asks(&router, "POST", "/v1/ports", &publish(spec.clone())).await;
            assert_eq!((refused.status, &refused.body["code"]), (403, &json!("forbidden")), "{refused:?}");
            assert!(refused.body["detail"].as_str().unwrap().contains(words), "{refused:?}");
            // The host is bound by nothing of that.
            let free = ask(&router, "POST", "/v1/ports", &publish(spec.clone())).await;
            assert_eq!(free.status, 201, "{free:?}");
            assert_eq!(
                ask(&router, "DELETE", &format!("/v1/ports?spec={spec}"), &json!(null)).await.status,
                200
            );
        }
        // A port that nobody names is one of those.
        let random = guest_asks(&router, "POST", "/v1/ports", &publish("127.0.0.1::80".into())).await;
        let drawn = random.body["ports"][0]["host_port"].as_u64();
        assert!(drawn.is_none_or(|port| (first..=first + 4).contains(&(port as u16))), "{random:?}");
        let status = router_for(&publishing, GuestApi::Status);
        let refused =
            guest_asks(&status, "POST", "/v1/ports", &publish(format!("127.0.0.1:{}:80", first + 4))).await;
        assert_eq!((refused.status, &refused.body["code"]), (403, &json!("forbidden")));
        let local = json!({"local": format!("127.0.0.1:{}", first + 4), "remote": ":80"});
        let refused = guest_asks(&status, "POST", "/services/forwarder/expose", &local).await;
        assert_eq!(refused.status, 500);
        assert!(refused.body.as_str().unwrap().contains("hythe --guest-api publish"), "{refused:?}");
        assert_eq!(guest_asks(&status, "GET", "/v1/status", &json!(null)).await.status, 200);
    });
}

#[test]
fn ports_are_forwarded_in_gvproxys_words() {
    let first = free_ports(2);
    Bench::for_guest(bounds()).run(async |publishing| {
        let router = router(&publishing);
        let local = format!("127.0.0.1:{first}");
        let expose = json!({"local": local, "remote": ":80"});
        let exposed = guest_asks(&router, "POST", "/services/forwarder/expose", &expose).await;
        assert_eq!((exposed.status, &exposed.body), (200, &json!("")));
        let all = guest_asks(&router, "GET", "/services/forwarder/all", &json!(null)).await;
        let forward = json!({"local": local, "remote": "192.168.65.3:80", "protocol": "tcp"});
        assert_eq!((all.status, &all.body), (200, &json!([forward])));
        let again = ask(&router, "POST", "/services/forwarder/expose", &expose).await;
        assert_eq!(again.status, 500);
        assert_eq!(again.body, format!("Bind for {local} failed: port is already allocated\n"));
        // As curl -d says it.
        let unexpose = json!({"local": local}).to_string();
        let form = "application/x-www-form-urlencoded";
        let target = "/services/forwarder/unexpose";
        let gone = ask_with(&router, Publisher::Guest, "POST", target, form, unexpose.clone()).await;
        assert_eq!((gone.status, &gone.body), (200, &json!("")));
        let gone = ask_with(&router, Publisher::Guest, "POST", target, form, unexpose).await;
        assert_eq!((gone.status, gone.body), (500, json!(format!("{local}/tcp is not published\n"))));
        for body in ["", "{", "[]", "{\"local\": 5}"] {
            let target = "/services/forwarder/expose";
            let refused = ask_with(&router, Publisher::Guest, "POST", target, form, body).await;
            assert_eq!(refused.status, 500, "{body}");
        }
        assert_eq!(guest_asks(&router, "GET", "/services/forwarder/expose", &json!(null)).await.status, 405);
        assert_eq!(guest_asks(&router, "GET", "/services/forwarder/x", &json!(null)).await.status, 404);
    });
}

#[test]
fn a_destination_is_explained_to_the_host_alone() {
    Bench::for_guest(bounds()).run(async |publishing| {
        let router = router(&publishing);
        let target = "/v1/explain?destination=192.168.65.254:8080/udp";
        let explained = ask(&router, "GET", target, &json!(null)).await;
        let way = &explained.body["ways"][0];
        assert_eq!((explained.status, &way["meaning"]), (200, &json!("host")), "{explained:?}");
        assert_eq!(way["route"]["interface"], "lo");
        let named =
            ask(&router, "GET", "/v1/explain?destination=gateway.docker.internal", &json!(null)).await;
        assert_eq!(named.body["names"][0]["from"], "link");
        assert_eq!(named.body["ways"][0]["meaning"], "gateway");
        assert_eq!(guest_asks(&router, "GET", target, &json!(null)).await.status, 403);
        assert_eq!(ask(&router, "POST", target, &json!(null)).await.status, 405);
        for (query, status) in [
            ("", 400),
            ("?destination", 422),
            ("?destination=a&destination=b", 400),
            ("?destination=a%00b", 422),
            ("?host=a", 400),
            ("?destination=a:b", 422),
        ] {
            let refused = ask(&router, "GET", &format!("/v1/explain{query}"), &json!(null)).await;
            assert_eq!(refused.status, status, "{query}: {refused:?}");
        }
    });
}

#[test]
fn names_are_added_told_and_removed_by_the_host_alone() {
    Bench::for_guest(bounds()).run(async |publishing| {
        let router = router(&publishing);
        let record = json!({"name": "db.test", "addresses": ["10.0.0.5", "fd00::5"]});
        let added = ask(&router, "POST", "/v1/dns", &record).await;
        assert_eq!((added.status, &added.body), (201, &record));
        let zone = json!({"Name": "apps.test.", "Records": [{"Name": "www", "IP": "10.0.0.6"}], "DefaultIP": "10.0.0.7"});
        let added = ask_with(&router, Publisher::Host, "POST", "/services/dns/add", "x/y", zone.to_string()).await;
        assert_eq!((added.status, &added.body), (200, &json!("")));
        let all = ask(&router, "GET", "/v1/dns", &json!(null)).await;
        let names: Vec<_> = all.body["records"].as_array().unwrap().iter().map(|record| record["name"].clone()).collect();
        assert_eq!(all.status, 200);
        for name in ["db.test", "*.apps.test", "www.apps.test"] {
            assert!(names.contains(&json!(name)), "{names:?}");
        }
        let zones = ask(&router, "GET", "/services/dns/all", &json!(null)).await;
        let default = zones.body.as_array().unwrap().iter().find(|zone| zone["DefaultIP"] == "10.0.0.7").unwrap();
        assert_eq!(default["Name"], "apps.test");
        for (method, target, body, status) in [
            ("POST", "/v1/dns", json!({"name": "a..b"}), 422),
            ("POST", "/v1/dns", json!({"name": "a.b", "addresses": ["x"]}), 400),
            ("POST", "/v1/dns", json!({"name": "a.b", "more": 1}), 400),
            ("DELETE", "/v1/dns?name=nobody.test", json!(null), 404),
            ("DELETE", "/v1/dns", json!(null), 400),
            ("DELETE", "/v1/dns?name=db.test&address=x", json!(null), 400),
            ("PUT", "/v1/dns", json!(null), 405),
            ("POST", "/services/dns/add", json!({"Name": "x.test.", "Records": [{"Name": "a", "IP": "x"}]}), 500),
            ("POST", "/services/dns/add", json!({"Name": "x.test.", "Records": [{"Regexp": ".*", "IP": "10.0.0.1"}]}), 500),
        ] {
            assert_eq!(ask(&router, method, target, &body).await.status, status, "{method} {target} {body}");
            assert_eq!(guest_asks(&router, method, target, &body).await.status, if status == 405 { 405 } else { 403 });
        }
        let removed = ask(&router, "DELETE", "/v1/dns?name=db.test&address=10.0.0.5", &json!(null)).await;
        assert_eq!(removed.status, 200);
        assert!(removed.body.to_string().contains("fd00::5") && !removed.body.to_string().contains("10.0.0.5"));
        assert_eq!(ask(&router, "DELETE", "/v1/dns?name=db.test", &json!(null)).await.status, 200);
        assert_eq!(ask(&router, "DELETE", "/v1/dns?name=db.test", &json!(null)).await.status, 404);
    });
}

#[test]
fn a_page_in_a_browser_asks_nothing() {
    Bench::for_guest(bounds()).run(async |publishing| {
        let (origin, host) = (("origin", "http://example.org"), "host");
        for (method, path, (name, value)) in [
            ("POST", "/services/forwarder/expose", origin),
            ("OPTIONS", "/v1/ports", origin),
            // Its name has been made to mean the gateway.
            ("GET", "/v1/ports", (host, "example.org")),
            ("GET", "/v1/status", (host, "example.org:80")),
            ("GET", "/v1/status", (host, "gateway.docker.internal.example.org")),
        ] {
            let request = Request::builder().method(method).uri(path).header(name, value);
            let request = request.body(Full::new(Bytes::from("{\"local\": \":8000\", \"remote\": \":80\"}")));
            let answer = router(&publishing).answer(&somebody(Publisher::Guest), request.unwrap()).await;
            assert_eq!(answer.status(), 403);
        }
        assert!(publishing.look(Table::is_empty));
        for host in [
            "gateway.docker.internal",
            "Gateway.Containers.Internal:80",
            "192.168.65.1",
            "[fdc4:f303:9324::1]:80",
        ] {
            let request =
                Request::builder().uri("/v1/status").header("host", host).body(Full::new(Bytes::new()));
            let answer = router(&publishing).answer(&somebody(Publisher::Guest), request.unwrap()).await;
            assert_eq!(answer.status(), 200, "{host}");
        }
    });
}

/// How a caller that holds a port lets it go.
enum End {
    Closes,
    SaysItIsDone,
    SaysMore,
    Unpublished,
}

#[test]
fn a_port_that_is_held_goes_with_its_holder() {
    for end in [End::Closes, End::SaysItIsDone, End::SaysMore, End::Unpublished] {
        let first = free_ports(1);
        Bench::for_guest(bounds()).run(async |publishing| {
            let router = router(&publishing);
            let (mut client, server) = UnixStream::pair().unwrap();
            let serving = tokio::task::spawn_local({
                let router = router.clone();
                async move { serve(server, router, Publisher::Guest).await }
            });
            let body =
                json!({"publish": [format!("127.0.0.1:{first}:80")], "while_connected": true}).to_string();
            let head = format!(
                "POST /v1/ports HTTP/1.1\r\nhost: 192.168.65.1\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            client.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
            let mut said = Vec::new();
            while !said.ends_with(b"]}\n\r\n") {
                assert!(client.read_buf(&mut said).await.unwrap() > 0, "{}", String::from_utf8_lossy(&said));
            }
            let text = String::from_utf8_lossy(&said);
            assert!(
                text.starts_with("HTTP/1.1 201 Created\r\n") && text.contains(&first.to_string()),
                "{text}"
            );
            TcpStream::connect((Ipv4Addr::LOCALHOST, first)).unwrap();
            match end {
                End::Closes => drop(client),
                End::SaysItIsDone => client.shutdown().await.unwrap(),
                End::SaysMore => client.write_all(b"x").await.unwrap(),
                End::Unpublished => {
                    assert_eq!(ask(&router, "DELETE", "/v1/ports/1", &json!(null)).await.status, 200);
                    let mut rest = Vec::new();
                    while !rest.ends_with(b"0\r\n\r\n") {
                        assert!(client.read_buf(&mut rest).await.unwrap() > 0, "an answer that broke off");
                    }
                    drop(client);
                }
            }
            // Gone from the table first, and free when the workers have let it go.
            while TcpListener::bind((Ipv4Addr::LOCALHOST, first)).is_err() {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
            assert!(publishing.look(Table::is_empty));
            serving.await.unwrap();
        });
    }
}

#[test]
fn a_port_is_not_left_behind_by_one_that_goes_before_it_is_answered() {
    let first = free_ports(1);
    Bench::for_guest(bounds()).run(async |publishing| {
        let requests = crate::policy::publish::parse(&format!("127.0.0.1:{first}:80")).unwrap();
        let turn = publishing.turn(Publisher::Guest).await;
        let publishing_it = publishing.publish_held(requests.clone(), Publisher::Guest, turn);
        tokio::select! {
            biased;
            _ = publishing_it => panic!("it takes longer than that"),
            () = tokio::task::yield_now() => {}
        }
        // The change that was begun is made, and undone: then the port is free, and has had a number.
        loop {
            let turn = publishing.turn(Publisher::Guest).await;
            match publishing.publish(requests.clone(), Publisher::Guest, turn).await {
                Ok(published) => break assert_eq!(published[0].id, 2),
                Err(_) => tokio::time::sleep(std::time::Duration::from_millis(1)).await,
            }
        }
        assert_eq!(publishing.look(Table::len), 1);
    });
}

#[test]
fn a_holder_that_has_vanished_is_found_out_by_writing_to_it() {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let (let_go, _) = tokio::sync::mpsc::unbounded_channel::<Vec<u32>>();
        let (one, _other) = UnixStream::pair().unwrap();
        let (told, removed) = tokio::sync::oneshot::channel();
        let held = crate::slow::ports::held::Held::new(vec![1], vec![removed], let_go);
        let mut lasting =
            super::held::Lasting::new(Bytes::from_static(b"x"), held, Presence::of(SharedStream::new(one)));
        let mut next = async || std::future::poll_fn(|cx| lasting.poll_piece(cx)).await;
        assert_eq!(next().await.unwrap(), "x");
        assert_eq!(next().await.unwrap(), "\n");
        assert_eq!(next().await.unwrap(), "\n");
        drop(told);
        assert_eq!(next().await, None);
    });
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        any::<Vec<u8>>(),
        "\\{\"publish\": ?\\[(\"[0-9a-z:./\\[\\]-]{0,12}\",?){0,4}\\]\\}".prop_map(String::into_bytes),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_request_is_answered_but_as_documented(
        method in prop_oneof![Just("GET"), Just("POST"), Just("DELETE"), Just("PUT"), Just("OPTIONS")],
        path in prop_oneof!["/v1/ports", "/v1/dns", "/services/dns/(all|add)", "/services/forwarder/(all|expose|x)", "/v1/ports/[0-9a-z%]{0,6}", "/v1/status", "/[!-~&&[^?#]]{0,20}"],
        query in "(\\?[a-z]{0,4}=[0-9a-z:%&+]{0,12})?",
        body in bytes(),
    ) {
        let Ok(uri) = format!("{path}{query}").parse::<hyper::Uri>() else { return Ok(()) };
        // No descriptors: nothing is published whatever is asked.
        let (answered, _) = Bench::new(0).run(async |publishing| {
            ask_with(&router(&publishing), Publisher::Host, method, &uri.to_string(), "application/json", body).await
        });
        prop_assert!([200, 400, 404, 405, 413, 415, 422, 500, 503].contains(&answered.status), "{answered:?}");
        if answered.media_type.starts_with("text/plain") {
            prop_assert!(path.starts_with("/services/") && [200, 500].contains(&answered.status));
            return Ok(());
        }
        prop_assert_ne!(answered.status, 500);
        let is_problem = answered.media_type == "application/problem+json";
        prop_assert_eq!(is_problem, answered.status != 200);
    }

    #[test]
    fn no_bytes_make_a_connection_panic(bytes in any::<Vec<u8>>()) {
        let said = converse(&bytes, true);
        prop_assert!(said.is_empty() || said.starts_with("HTTP/1.1 "), "{said}");
    }
}
