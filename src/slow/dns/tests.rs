//! What the guest asks and gets: queries and replies, against resolvers made for the purpose.

use super::fake_server::{
    Directory, FakeServer, addresses, framed, query, refused_port, reply_to, soon, with_code, with_opt,
    with_record,
};
use super::*;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::policy::names::NamePolicy;

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::RecordType;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Long enough for a loopback, short enough for a test.
const PATIENCE: Patience = Patience {
    attempt: Duration::from_millis(100),
    total: Duration::from_millis(400),
    silent_last: Duration::from_secs(30),
    stream_idle: Duration::from_secs(5),
};

fn udp(port: u16) -> Transport {
    let guest = addresses().v4.unwrap().guest;
    Transport::Udp(Endpoint::new(guest, port))
}

fn dns_with(servers: Vec<SocketAddr>, limits: Limits, patience: Patience) -> Dns {
    dns_of(Settings { servers, patience, limits, ..settings() })
}

/// Neither the files of the host that the tests run on nor a cache.
fn settings() -> Settings {
    let nowhere = PathBuf::from("/nonexistent");
    Settings {
        resolv_conf: nowhere.clone(),
        hosts: nowhere.clone(),
        resolved_conf: nowhere,
        patience: PATIENCE,
        names: NamePolicy { cache: 0, ..NamePolicy::default() },
        ..Settings::default()
    }
}

fn dns_of(settings: Settings) -> Dns {
    Dns::new(settings, &addresses(), Arc::default()).unwrap()
}

fn dns(servers: &[SocketAddr]) -> Dns {
    dns_with(servers.to_vec(), Limits::default(), PATIENCE)
}

fn decode(message: &[u8]) -> Message {
    Message::from_vec(message).unwrap()
}

/// Asks for a name of the world's.
async fn ask(dns: &Dns, id: u16) -> Vec<u8> {
    soon(dns.answer(&query("example.com.", RecordType::A, id), udp(4000))).await.unwrap().unwrap()
}

/// An answer as no codec of ours would write it: an unknown type in an unknown class, a name that is not compressed,
/// an EDNS option nobody has heard of, the upper bits of an extended response code, and bytes behind the last record.
fn odd_reply(query: &[u8]) -> Vec<u8> {
    let mut reply = with_code(reply_to(query), 7);
    reply[3] |= 0x60;
    reply[7] = 1;
    reply.extend(b"\x07eXample\x03com\x00\xff\x01\x12\x34\xff\xff\xff\xff\x00\x03\xc0\xc0\xc0");
    let mut reply = with_opt(reply, 0x55, true, b"\xff\xee\x00\x02hi");
    reply.extend(b"behind");
    reply
}

#[tokio::test(flavor = "current_thread")]
async fn a_query_and_its_answer_pass_byte_for_byte_but_for_the_id() {
    let over_udp = FakeServer::udp(|query| vec![odd_reply(query)]).await;
    let over_tcp = FakeServer::tcp(|query| vec![odd_reply(query)]).await;
    for (mut server, transport) in [(over_udp, udp(4000)), (over_tcp, Transport::Tcp)] {
        let dns = dns(&[server.address]);
        for kind in [RecordType::A, RecordType::HTTPS, RecordType::ANY, RecordType::Unknown(65_399)] {
            let asked = with_opt(
                query("eXample.cOM.", kind, 0x0707),
                0,
                true,
                b"\x00\x0c\x00\x05\x00\x00\x00\x00\x00\xff\xfe\x00\x00",
            );
            let answer = soon(dns.answer(&asked, transport)).await.unwrap().unwrap();
            let heard = server.heard.recv().await.unwrap();
            assert_eq!(heard[2..], asked[2..], "{kind} {transport:?}");
            assert_eq!(answer, odd_reply(&asked), "{kind} {transport:?}");
        }
    }
}

#[tokio::test(flavor = "current_thread")]
async fn other_classes_are_forwarded() {
    let mut server = FakeServer::udp(|query| vec![reply_to(query)]).await;
    let mut asked = query("version.bind.", RecordType::TXT, 1);
    let class = asked.len() - 1;
    asked[class] = 3;
    let answer = dns(&[server.address]).answer(&asked, udp(1)).await.unwrap();
    assert_eq!(answer, reply_to(&asked));
    assert_eq!(server.heard_so_far(), 1);
}

#[tokio::test(flavor = "current_thread")]
async fn truncated_answers_and_codes_of_all_kinds_are_passed_on() {
    for code in [0, 1, 3, 6, 11] {
        let server = FakeServer::udp(move |query| {
            let mut reply = with_code(reply_to(query), code);
            reply[2] |= 2;
            vec![reply]
        })
        .await;
        let answer = ask(&dns(&[server.address]), 9).await;
        assert_eq!((answer[3] & 15, answer[2] & 2), (code, 2));
    }
}

#[tokio::test(flavor = "current_thread")]
async fn an_answer_of_full_size_passes() {
    let server = FakeServer::udp(|query| vec![[reply_to(query), vec![7; 60_000]].concat()]).await;
    let asked = query("example.com.", RecordType::TXT, 3);
    let answer = dns(&[server.address]).answer(&asked, udp(1)).await.unwrap();
    assert_eq!(answer.len(), asked.len() + 60_000);
}

#[tokio::test(flavor = "current_thread")]
async fn ids_are_drawn_anew_for_every_query() {
    let mut server = FakeServer::udp(|query| vec![reply_to(query)]).await;
    let dns = dns(&[server.address]);
    let mut ids = std::collections::HashSet::new();
    for _ in 0..32 {
        assert_eq!(ask(&dns, 0x0101).await[..2], [1, 1]);
        ids.insert(server.heard.recv().await.unwrap()[..2].to_vec());
    }
    assert!(ids.len() >= 30, "{} of 32", ids.len());
}

#[tokio::test(flavor = "current_thread")]
async fn replies_that_do_not_match_are_passed_over_and_the_wait_goes_on() {
    fn replies(query: &[u8]) -> Vec<Vec<u8>> {
        let good = reply_to(query);
        let edited = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            bytes
        };
        let wrong_id = edited(0, good[0] ^ 1);
        let wrong_question = edited(14, b'z');
        vec![wrong_id, wrong_question, query.to_vec(), edited(2, 0xa8), vec![], vec![0; 11], good]
    }
    let over_udp = FakeServer::udp(replies).await;
    let over_tcp = FakeServer::tcp(replies).await;
    for (server, transport) in [(over_udp, udp(4000)), (over_tcp, Transport::Tcp)] {
        let dns = dns(&[server.address]);
        let asked = query("example.com.", RecordType::A, 5);
        let answer = soon(dns.answer(&asked, transport)).await.unwrap();
        assert_eq!(answer, Some(reply_to(&asked)), "{transport:?}");
        assert_eq!(dns.counters().metric(Metric::DnsMismatched), 6);
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_datagram_from_another_address_never_arrives() {
    // The forger knows everything, the ID included, but cannot send from the resolver's address.
    let forger = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let dns = dns(&[socket.local_addr().unwrap()]);
    let serve = async {
        let mut bytes = [0; 512];
        let (len, from) = socket.recv_from(&mut bytes).await.unwrap();
        forger.send_to(&with_code(reply_to(&bytes[..len]), 3), from).unwrap();
        socket.send_to(&reply_to(&bytes[..len]), from).await.unwrap();
    };
    let (answer, ()) = tokio::join!(ask(&dns, 5), serve);
    assert_eq!(answer[3] & 15, 0);
    assert_eq!(dns.counters().metric(Metric::DnsMismatched), 0);
}

#[tokio::test(flavor = "current_thread")]
async fn after_a_time_out_the_next_resolver_is_asked_and_the_silent_one_comes_last() {
    let mut silent = FakeServer::silent().await;
    let good = FakeServer::udp(|query| vec![reply_to(query)]).await;
    let dns = dns(&[silent.address, good.address]);
    let start = Instant::now();
    assert_eq!(ask(&dns, 1).await[3] & 15, 0);
    assert!(start.elapsed() >= PATIENCE.attempt);
    assert_eq!((silent.heard_so_far(), dns.counters().metric(Metric::DnsServerTimeouts)), (1, 1));
    // From now on nobody waits for it.
    for id in 2..10 {
        assert_eq!(ask(&dns, id).await[3] & 15, 0);
    }
    assert_eq!(silent.heard_so_far(), 0);
}

/// Runs what goes on without queries beside a test.
async fn beside(dns: &Dns, test: impl Future<Output = ()>) {
    tokio::select! {
        () = dns.0.forwarder.run(dns.counters()) => panic!("it does not end"),
        () = test => {}
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_silent_resolver_is_tried_after_a_while_and_no_query_waits_for_it() {
    let mut silent = FakeServer::silent().await;
    let good = FakeServer::udp(|query| vec![reply_to(query)]).await;
    let patience = Patience {
        attempt: Duration::from_secs(60),
        total: Duration::from_secs(100),
        silent_last: Duration::from_millis(300),
        ..PATIENCE
    };
    let dns = dns_with(vec![silent.address, good.address], Limits::default(), patience);
    // As if it had kept silent long ago: after a minute nobody would be waiting any more.
    dns.0.forwarder.remember_silence(silent.address);
    tokio::time::sleep(patience.silent_last).await;
    let test = async {
        let both = async { tokio::join!(ask(&dns, 1), ask(&dns, 2)) };
        let (first, second) = soon(both).await.unwrap();
        assert_eq!([first[3] & 15, second[3] & 15], [0, 0]);
        silent.heard.recv().await.unwrap();
    };
    Box::pin(beside(&dns, test)).await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_resolver_that_is_slower_than_the_next_one_is_forgiven_all_the_same() {
    let slow = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut good = FakeServer::udp(|query| vec![reply_to(query)]).await;
    let patience = Patience {
        attempt: Duration::from_secs(5),
        total: Duration::from_secs(10),
        silent_last: Duration::from_millis(300),
        ..PATIENCE
    };
    let dns = dns_with(vec![slow.local_addr().unwrap(), good.address], Limits::default(), patience);
    dns.0.forwarder.remember_silence(slow.local_addr().unwrap());
    tokio::time::sleep(patience.silent_last).await;
    let test = async {
        let mut bytes = [0; 512];
        soon(ask(&dns, 1)).await.unwrap();
        // The query is answered long since when it answers its copy.
        let (len, from) = soon(slow.recv_from(&mut bytes)).await.unwrap().unwrap();
        slow.send_to(&reply_to(&bytes[..len]), from).await.unwrap();
        let forgiven = async {
            while !dns.0.forwarder.is_trusted(slow.local_addr().unwrap()) {
                tokio::task::yield_now().await;
            }
        };
        soon(forgiven).await.unwrap();
        good.heard_so_far();
        let answer = async {
            let (len, from) = slow.recv_from(&mut bytes).await.unwrap();
            slow.send_to(&reply_to(&bytes[..len]), from).await.unwrap();
        };
        soon(async { tokio::join!(ask(&dns, 2), answer) }).await.unwrap();
        assert_eq!(good.heard_so_far(), 0, "it is the first one again");
    };
    Box::pin(beside(&dns, test)).await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_slow_resolver_is_still_heard_while_the_others_are_asked() {
    let slow = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut other = FakeServer::silent().await;
    let dns = dns(&[slow.local_addr().unwrap(), other.address]);
    let serve = async {
        let mut bytes = [0; 512];
        let (len, from) = slow.recv_from(&mut bytes).await.unwrap();
        // It answers only when the next one has been asked.
        other.heard.recv().await.unwrap();
        slow.send_to(&reply_to(&bytes[..len]), from).await.unwrap();
    };
    let (answer, ()) = tokio::join!(ask(&dns, 5), serve);
    assert_eq!(answer[3] & 15, 0);
    // Having spoken, it is not silent: the next query goes to it first.
    let serve_again = async {
        let mut bytes = [0; 512];
        let (len, from) = slow.recv_from(&mut bytes).await.unwrap();
        slow.send_to(&reply_to(&bytes[..len]), from).await.unwrap();
    };
    tokio::join!(ask(&dns, 6), serve_again);
    assert_eq!(other.heard_so_far(), 0);
}

#[tokio::test(flavor = "current_thread")]
async fn a_resolver_that_fails_late_is_not_asked_again() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let other = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dns = dns(&[&listener, &other].map(|listener| listener.local_addr().unwrap()));
    let asked = query("example.com.", RecordType::A, 5);
    let serve = async {
        let first = listener.accept().await.unwrap();
        // It hangs up only when its time is over and the next one has been asked.
        let _second = other.accept().await.unwrap();
        drop(first);
        let _third = other.accept().await.unwrap();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        answer = dns.answer(&asked, Transport::Tcp) => assert_eq!(answer.unwrap()[3] & 15, 2),
        () = serve => {}
    }
    let again = listener.into_std().unwrap().accept();
    assert_eq!(again.unwrap_err().kind(), io::ErrorKind::WouldBlock);
}

#[tokio::test(flavor = "current_thread")]
async fn a_slow_answer_is_better_than_a_refusal_by_the_next_one() {
    let slow = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut refusing = FakeServer::udp(|query| vec![with_code(reply_to(query), 5)]).await;
    let dns = dns(&[slow.local_addr().unwrap(), refusing.address]);
    let serve = async |answers: bool| {
        let mut bytes = [0; 512];
        let (len, from) = slow.recv_from(&mut bytes).await.unwrap();
        refusing.heard.recv().await.unwrap();
        while dns.counters().metric(Metric::DnsServerFailures) == 0 {
            tokio::task::yield_now().await;
        }
        if answers {
            slow.send_to(&reply_to(&bytes[..len]), from).await.unwrap();
        }
    };
    let mut serve = serve;
    let (answer, ()) = soon(async { tokio::join!(ask(&dns, 5), serve(true)) }).await.unwrap();
    assert_eq!(answer[3] & 15, 0);
    // Where it never comes, the refusal is what there is, and nobody is blamed for silence who has spoken.
    let (answer, ()) = soon(async { tokio::join!(ask(&dns, 6), serve(false)) }).await.unwrap();
    assert_eq!(answer[3] & 15, 5);
    assert!(
        dns.0.forwarder.is_trusted(refusing.address)
            && !dns.0.forwarder.is_trusted(slow.local_addr().unwrap())
    );
}

#[tokio::test(flavor = "current_thread")]
async fn a_query_under_way_is_asked_anew_when_the_ways_are_others_and_not_for_ever() {
    let server = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let patience = Patience { attempt: Duration::from_secs(60), total: Duration::from_secs(60), ..PATIENCE };
    let dns = dns_with(vec![server.local_addr().unwrap()], Limits::default(), patience);
    let serve = async {
        let (mut bytes, mut ports) = ([0; 512], Vec::new());
        loop {
            let (len, from) = server.recv_from(&mut bytes).await.unwrap();
            ports.push(from.port());
            dns.network_has_changed(false);
            if ports.len() == STARTS_MAX as usize {
                dns.network_has_changed(true);
                server.send_to(&reply_to(&bytes[..len]), from).await.unwrap();
                return ports;
            }
            dns.network_has_changed(true);
        }
    };
    let (answer, mut ports) = soon(async { tokio::join!(ask(&dns, 1), serve) }).await.unwrap();
    assert_eq!(answer[3] & 15, 0);
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports.len(), STARTS_MAX as usize, "each start has a socket of its own");
}

#[tokio::test(flavor = "current_thread")]
async fn a_query_under_way_waits_for_the_next_network_where_there_is_none_for_a_moment() {
    let before = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = before.local_addr().unwrap();
    let patience = Patience { attempt: Duration::from_secs(60), total: Duration::from_secs(60), ..PATIENCE };
    let dns = dns_with(vec![address], Limits::default(), patience);
    let serve = async {
        let mut bytes = [0; 512];
        before.recv_from(&mut bytes).await.unwrap();
        // The way is gone: whoever asks is refused.
        drop(before);
        dns.network_has_changed(true);
        while dns.counters().metric(Metric::DnsServerUnreachable) == 0 {
            tokio::task::yield_now().await;
        }
        let after = tokio::net::UdpSocket::bind(address).await.unwrap();
        dns.network_has_changed(true);
        let (len, from) = after.recv_from(&mut bytes).await.unwrap();
        after.send_to(&reply_to(&bytes[..len]), from).await.unwrap();
    };
    let (answer, ()) = soon(async { tokio::join!(ask(&dns, 1), serve) }).await.unwrap();
    assert_eq!(answer[3] & 15, 0);
    // One that begins where there is no way has its answer at once, as ever.
    drop(dns);
    let dns = dns_with(vec![refused_port()], Limits::default(), patience);
    assert_eq!(ask(&dns, 2).await[3] & 15, 2);
}

#[tokio::test(flavor = "current_thread")]
async fn a_silent_resolver_is_tried_when_the_network_changes_and_trusted_when_the_ways_are_others() {
    let mut silent = FakeServer::silent().await;
    let good = FakeServer::udp(|query| vec![reply_to(query)]).await;
    let dns = dns(&[silent.address, good.address]);
    let test = async {
        dns.0.forwarder.remember_silence(silent.address);
        soon(ask(&dns, 1)).await.unwrap();
        assert_eq!(silent.heard_so_far(), 0);
        dns.network_has_changed(false);
        soon(ask(&dns, 2)).await.unwrap();
        soon(silent.heard.recv()).await.unwrap().unwrap();
        assert_eq!(dns.counters().metric(Metric::DnsServerTimeouts), 0, "no query waits for it");
        dns.network_has_changed(true);
        assert!(dns.0.forwarder.is_trusted(silent.address));
    };
    Box::pin(beside(&dns, test)).await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_lost_datagram_is_sent_again() {
    let mut heard = 0;
    let server = FakeServer::udp(move |query| {
        heard += 1;
        if heard == 1 { vec![] } else { vec![reply_to(query)] }
    })
    .await;
    assert_eq!(ask(&dns(&[server.address]), 5).await[3] & 15, 0);
}

#[tokio::test(flavor = "current_thread")]
async fn a_refused_port_and_an_unreachable_resolver_are_passed_over_at_once() {
    // No scope: the kernel knows no way to a link-local address.
    let unreachable = "[fe80::1]:53".parse().unwrap();
    let over_udp = FakeServer::udp(|query| vec![reply_to(query)]).await;
    let over_tcp = FakeServer::tcp(|query| vec![reply_to(query)]).await;
    for (server, transport) in [(over_udp, udp(4000)), (over_tcp, Transport::Tcp)] {
        let patience =
            Patience { attempt: Duration::from_secs(60), total: Duration::from_secs(100), ..PATIENCE };
        let dns = dns_with(vec![refused_port(), unreachable, server.address], Limits::default(), patience);
        let asked = query("example.com.", RecordType::A, 5);
        let answer = soon(dns.answer(&asked, transport)).await.unwrap();
        assert_eq!(answer, Some(reply_to(&asked)));
        assert_eq!(dns.counters().metric(Metric::DnsServerUnreachable), 2);
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_resolver_that_fails_is_not_the_last_word_but_its_answer_is_better_than_none() {
    for code in [2, 4, 5] {
        let failing = FakeServer::failing(code).await;
        let good = FakeServer::failing(3).await;
        assert_eq!(ask(&dns(&[failing.address, good.address]), 1).await[3] & 15, 3, "{code}");
        let mut also = FakeServer::failing(2).await;
        let dns = dns(&[also.address, failing.address, refused_port()]);
        assert_eq!(ask(&dns, 1).await[3] & 15, code);
        assert_eq!(also.heard_so_far(), 1, "a failure is not asked for twice");
    }
    let failing = FakeServer::failing(2).await;
    let mut silent = FakeServer::silent().await;
    assert_eq!(ask(&dns(&[failing.address, silent.address]), 1).await[3] & 15, 2);
    assert_eq!(silent.heard_so_far(), 1, "where there is some answer nobody is asked twice");
}

#[tokio::test(flavor = "current_thread")]
async fn when_nobody_answers_it_is_servfail_with_the_reason_and_never_no_such_name() {
    let silent = FakeServer::silent().await;
    let nobody = dns(&[]);
    nobody.0.resolvers.send_modify(|conf| conf.servers.clear());
    for (dns, code) in [(dns(&[silent.address]), 22), (dns(&[refused_port()]), 23), (nobody, 22)] {
        let plain = query("example.com.", RecordType::A, 77);
        let answer = decode(&soon(dns.answer(&plain, udp(1))).await.unwrap().unwrap());
        assert_eq!((answer.response_code, answer.id, answer.edns), (ResponseCode::ServFail, 77, None));
        let answer = dns.answer(&with_opt(plain, 0, false, &[]), udp(1)).await.unwrap();
        let options = decode(&answer).edns.unwrap().options().options.clone();
        let hickory_proto::rr::rdata::opt::EdnsOption::Unknown(15, error) = &options[0].1 else { panic!() };
        assert_eq!(error[..2], [0, code]);
        assert_eq!(dns.counters().metric(Metric::DnsUnanswered), 2);
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_query_takes_no_longer_than_it_may() {
    let silent = [FakeServer::silent().await, FakeServer::silent().await];
    let dns = dns(&silent.each_ref().map(|server| server.address));
    let start = Instant::now();
    assert_eq!(ask(&dns, 1).await[3] & 15, 2);
    assert!(start.elapsed() >= PATIENCE.total, "{:?}", start.elapsed());
    let heard: usize = silent.map(|mut server| server.heard_so_far()).iter().sum();
    assert_eq!(heard, 4);
}

#[tokio::test(flavor = "current_thread")]
async fn names_of_the_link_are_answered_here_and_never_forwarded() {
    let mut server = FakeServer::udp(|query| vec![reply_to(query)]).await;
    let dns = dns(&[server.address]);
    let long = format!("{0}.{0}.{0}.docker.internal.", "x".repeat(60));
    for (name, kind, code, answers) in [
        ("host.docker.internal.", RecordType::A, ResponseCode::NoError, 1),
        ("HOST.docker.internal.", RecordType::AAAA, ResponseCode::NoError, 1),
        ("host.docker.internal.", RecordType::ANY, ResponseCode::NoError, 2),
        ("host.docker.internal.", RecordType::MX, ResponseCode::NoError, 0),
        ("1.65.168.192.in-addr.arpa.", RecordType::PTR, ResponseCode::NoError, 1),
        ("other.containers.internal.", RecordType::A, ResponseCode::NXDomain, 0),
        (&long, RecordType::A, ResponseCode::NXDomain, 0),
    ] {
        for transport in [udp(4000), Transport::Tcp] {
            let asked = with_opt(query(name, kind, 0xbeef), 0, true, &[]);
            let bytes = dns.answer(&asked, transport).await.unwrap();
            // RFC 1035, 4.2.1: what any guest can take.
            assert!(bytes.len() <= 512, "{name}: {}", bytes.len());
            let answer = decode(&bytes);
            assert_eq!(
                (answer.id, answer.response_code, answer.answers.len()),
                (0xbeef, code, answers),
                "{name}"
            );
            assert!(answer.authoritative && answer.recursion_available && answer.recursion_desired);
            assert_eq!(answer.authorities.len(), usize::from(answers == 0), "{name}");
            assert_eq!(
                bytes[12..asked.len() - 11],
                asked[12..asked.len() - 11],
                "{name} is repeated as it was asked"
            );
            assert!(answer.edns.unwrap().flags().dnssec_ok);
        }
    }
    let plain = dns.answer(&query("host.docker.internal.", RecordType::A, 1), udp(1)).await.unwrap();
    assert_eq!(decode(&plain).edns, None);
    let version_1 = with_opt(query("host.docker.internal.", RecordType::A, 1), 1, false, &[]);
    let answer = decode(&dns.answer(&version_1, udp(1)).await.unwrap());
    // RFC 6891, 9: BADVERS is 16, a number that it shares.
    assert_eq!((u16::from(answer.response_code), answer.answers.len()), (16, 0));
    assert_eq!((server.heard_so_far(), dns.counters().metric(Metric::DnsOwnNames)), (0, 16));
}

#[tokio::test(flavor = "current_thread")]
async fn transfers_are_refused_and_other_opcodes_not_implemented() {
    let mut server = FakeServer::udp(|query| vec![reply_to(query)]).await;
    let dns = dns(&[server.address]);
    for transport in [udp(4000), Transport::Tcp] {
        for kind in [RecordType::AXFR, RecordType::IXFR] {
            let answer = dns.answer(&query("example.com.", kind, 1), transport).await.unwrap();
            assert_eq!(decode(&answer).response_code, ResponseCode::Refused);
        }
        let mut update = query("example.com.", RecordType::SOA, 0x0102);
        update[2] = 5 << 3;
        let answer = dns.answer(&update, transport).await.unwrap();
        assert_eq!(answer, [1, 2, 0x80 | 5 << 3, 4, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(dns.answer(&reply_to(&update), transport).await, None);
        assert_eq!(dns.answer(b"short", transport).await, None);
        assert_eq!(dns.answer(&vec![0; 65_536], transport).await, None);
    }
    assert_eq!(server.heard_so_far(), 0);
    assert_eq!((dns.counters().metric(Metric::DnsUnfit), dns.counters().metric(Metric::DnsGarbage)), (6, 6));
}

#[tokio::test(flavor = "current_thread")]
async fn a_retransmission_is_not_forwarded_while_the_first_is_under_way() {
    let mut server = FakeServer::silent().await;
    let dns = dns(&[server.address, refused_port()]);
    let asked = query("example.com.", RecordType::A, 5);
    let first = dns.answer(&asked, udp(4000));
    tokio::pin!(first);
    let again = async {
        server.heard.recv().await.unwrap();
        assert_eq!(dns.answer(&asked, udp(4000)).await, None);
        assert_eq!(dns.counters().metric(Metric::DnsRetransmissions), 1);
        // Another port, another ID or another question is another query.
        let other_id = query("example.com.", RecordType::A, 6);
        let other_question = query("example.com.", RecordType::AAAA, 5);
        tokio::join!(
            dns.answer(&asked, udp(4001)),
            dns.answer(&other_id, udp(4000)),
            dns.answer(&other_question, udp(4000)),
            dns.answer(&asked, Transport::Tcp),
        );
    };
    tokio::join!(&mut first, again);
    assert_eq!(
        (dns.counters().metric(Metric::DnsForwarded), dns.counters().metric(Metric::DnsRetransmissions)),
        (5, 1)
    );
    // The first has landed: the same may be asked anew.
    soon(dns.answer(&asked, udp(4000))).await.unwrap().unwrap();
    assert_eq!(dns.counters().metric(Metric::DnsForwarded), 6);
}

#[tokio::test(flavor = "current_thread")]
async fn beyond_the_budget_the_answer_is_servfail_at_once_and_all_is_given_back() {
    let server = FakeServer::silent().await;
    let limits = Limits { in_flight: 3, ..Limits::default() };
    let dns = dns_with(vec![server.address], limits, PATIENCE);
    for _ in 0..2 {
        let before = dns.counters().metric(Metric::DnsOverBudget);
        let mut race = race::Race::default();
        for id in 0..10 {
            let dns = dns.clone();
            race.push(async move { dns.answer(&query("example.com.", RecordType::A, id), udp(4000)).await });
        }
        // The seven that found no place are ready before any resolver has had its time.
        for _ in 0..7 {
            let answer = race.next().await.unwrap();
            assert_eq!(decode(&answer).response_code, ResponseCode::ServFail);
        }
        assert_eq!(dns.counters().metric(Metric::DnsOverBudget) - before, 7);
        assert_eq!(race.len(), 3);
    }
    // Those that nobody waits for any more have given their places back, in both rounds.
    assert_eq!(dns.counters().metric(Metric::DnsForwarded), 6);
}

/// The guest's end of a stream, and its answers.
struct Guest(UnixStream);

impl Guest {
    async fn next(&mut self) -> Vec<u8> {
        let len = self.0.read_u16().await.unwrap();
        let mut bytes = vec![0; len.into()];
        self.0.read_exact(&mut bytes).await.unwrap();
        bytes
    }

    async fn is_closed(&mut self) {
        assert_eq!(self.0.read(&mut [0; 1]).await.unwrap(), 0);
    }
}

/// Runs `guest` against a stream that `dns` serves; both must end.
async fn over_stream<F: AsyncFnOnce(&mut Guest)>(dns: &Dns, guest: F) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut end = Guest(theirs);
    soon(async {
        tokio::join!(dns.serve_stream(ours), async {
            guest(&mut end).await;
            drop(end);
        })
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn pipelined_queries_are_answered_as_their_answers_come() {
    // The resolver has nothing for the first: its failure comes when its time has passed.
    let server = FakeServer::tcp(|query| {
        if query.windows(4).any(|bytes| bytes == b"slow") { vec![] } else { vec![reply_to(query)] }
    })
    .await;
    let dns = dns(&[server.address]);
    over_stream(&dns, async |guest| {
        let all: Vec<u8> = [
            query("slow.example.", RecordType::A, 1),
            query("host.docker.internal.", RecordType::A, 2),
            query("fast.example.", RecordType::A, 3),
        ]
        .iter()
        .flat_map(|query| framed(query))
        .collect();
        // In pieces that respect no boundary.
        for piece in all.chunks(7) {
            guest.0.write_all(piece).await.unwrap();
        }
        let mut ids = Vec::new();
        for _ in 0..3 {
            ids.push(guest.next().await[1]);
        }
        ids.sort_unstable();
        assert_eq!(ids, [1, 2, 3]);
    })
    .await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_slow_answer_holds_up_no_other() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let patience = Patience { attempt: Duration::from_secs(60), total: Duration::from_secs(60), ..PATIENCE };
    let dns = dns_with(vec![listener.local_addr().unwrap()], Limits::default(), patience);
    over_stream(&dns, async |guest| {
        guest.0.write_all(&framed(&query("slow.example.", RecordType::A, 1))).await.unwrap();
        let (mut upstream, _) = listener.accept().await.unwrap();
        let len = upstream.read_u16().await.unwrap();
        let mut asked = vec![0; len.into()];
        upstream.read_exact(&mut asked).await.unwrap();
        guest.0.write_all(&framed(&query("host.docker.internal.", RecordType::A, 2))).await.unwrap();
        assert_eq!(guest.next().await[1], 2);
        upstream.write_all(&framed(&reply_to(&asked))).await.unwrap();
        assert_eq!(guest.next().await[1], 1);
    })
    .await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_guest_that_closes_its_half_still_gets_its_answers() {
    let server = FakeServer::tcp(|query| vec![reply_to(query)]).await;
    let dns = dns(&[server.address]);
    over_stream(&dns, async |guest| {
        guest.0.write_all(&framed(&query("example.com.", RecordType::A, 1))).await.unwrap();
        guest.0.shutdown().await.unwrap();
        assert_eq!(guest.next().await[1], 1);
        guest.is_closed().await;
    })
    .await;
}

#[tokio::test(flavor = "current_thread")]
async fn half_a_message_and_an_unread_answer_do_not_hold_a_stream_open() {
    let patience = Patience { stream_idle: Duration::from_millis(50), ..PATIENCE };
    let dns = dns_with(vec![], Limits::default(), patience);
    over_stream(&dns, async |guest| {
        guest.0.write_all(&[0, 50, 1, 2, 3]).await.unwrap();
        guest.is_closed().await;
    })
    .await;
    over_stream(&dns, async |guest| guest.is_closed().await).await;
    over_stream(&dns, async |guest| {
        let asked = framed(&query("host.docker.internal.", RecordType::A, 2)).repeat(10_000);
        // Until the stream is closed under the guest's hand: it never reads.
        guest.0.write_all(&asked).await.unwrap_err();
    })
    .await;
    assert_eq!(dns.counters().metric(Metric::DnsStreamsIdle), 3);
}

#[tokio::test(flavor = "current_thread")]
async fn a_stream_has_no_more_under_way_than_it_may() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let patience = Patience { attempt: Duration::from_secs(60), total: Duration::from_secs(60), ..PATIENCE };
    let limits = Limits { per_stream: 3, ..Limits::default() };
    let dns = dns_with(vec![listener.local_addr().unwrap()], limits, patience);
    over_stream(&dns, async |guest| {
        for id in 0..3 {
            guest.0.write_all(&framed(&query("slow.example.", RecordType::A, id))).await.unwrap();
        }
        // Answered at once if it were read.
        guest.0.write_all(&framed(&query("host.docker.internal.", RecordType::A, 3))).await.unwrap();
        let mut connections = Vec::new();
        for _ in 0..3 {
            connections.push(listener.accept().await.unwrap().0);
        }
        for connection in &mut connections {
            let len = connection.read_u16().await.unwrap();
            let mut asked = vec![0; len.into()];
            connection.read_exact(&mut asked).await.unwrap();
            connection.write_all(&framed(&reply_to(&asked))).await.unwrap();
        }
        assert!(guest.next().await[1] < 3, "the fourth was read while three were under way");
        for _ in 0..3 {
            guest.next().await;
        }
    })
    .await;
}

#[tokio::test(flavor = "current_thread")]
async fn there_are_no_more_streams_than_there_may_be() {
    let dns = dns_with(vec![], Limits { streams: 1, ..Limits::default() }, PATIENCE);
    over_stream(&dns, async |_| over_stream(&dns, async |guest| guest.is_closed().await).await).await;
    assert_eq!(
        (dns.counters().metric(Metric::DnsStreams), dns.counters().metric(Metric::DnsStreamsRefused)),
        (1, 1)
    );
    over_stream(&dns, async |guest| {
        guest.0.write_all(&framed(&query("host.docker.internal.", RecordType::A, 2))).await.unwrap();
        guest.next().await;
    })
    .await;
}

#[tokio::test(flavor = "current_thread")]
async fn resolv_conf_is_followed_through_rewriting_renaming_and_switching() {
    let directory = Directory::new();
    let (path, file) = (directory.path("resolv.conf"), directory.path("file"));
    std::fs::write(&file, "nameserver 192.0.2.1\nsearch a.example\n").unwrap();
    std::os::unix::fs::symlink("file", &path).unwrap();
    let settings = Settings { resolv_conf: path.clone(), ..settings() };
    let dns = dns_of(settings);
    let mut changes = dns.resolv_conf();
    let servers = changes.borrow().servers.clone();
    assert_eq!(
        (servers[0].to_string(), &changes.borrow().search[..]),
        ("192.0.2.1:53".into(), &["a.example".into()][..])
    );

    let mut until = async |server: &str| {
        let server: SocketAddr = server.parse().unwrap();
        let found = changes.wait_for(|conf| conf.servers == [server]);
        soon(found).await.unwrap_or_else(|_| panic!("{server} was not noticed")).unwrap();
    };
    let changed = async {
        std::fs::write(&file, "nameserver 192.0.2.2\n").unwrap();
        until("192.0.2.2:53").await;
        let new = directory.path("new");
        std::fs::write(&new, "nameserver 192.0.2.3\n").unwrap();
        std::fs::rename(&new, &file).unwrap();
        until("192.0.2.3:53").await;
        std::fs::write(directory.path("other"), "nameserver 192.0.2.4\n").unwrap();
        std::os::unix::fs::symlink("other", &new).unwrap();
        std::fs::rename(&new, &path).unwrap();
        until("192.0.2.4:53").await;
        std::fs::remove_file(&path).unwrap();
        until("127.0.0.1:53").await;
    };
    tokio::select! {
        biased;
        () = dns.follow_files() => panic!("not followed"),
        () = changed => {}
    }
}

#[tokio::test(flavor = "current_thread")]
async fn resolvers_that_the_user_named_override_the_file() {
    let directory = Directory::new();
    let path = directory.path("resolv.conf");
    std::fs::write(&path, "nameserver 192.0.2.1\nsearch a.example\n").unwrap();
    let servers = vec!["192.0.2.9:53".parse().unwrap()];
    let settings = Settings { resolv_conf: path, servers: servers.clone(), ..settings() };
    let dns = dns_of(settings);
    let conf = dns.resolv_conf().borrow().clone();
    assert_eq!(conf, ResolvConf { servers, search: vec!["a.example".into()] });
}

/// A service with these options, as they are written on the command line.
fn dns_by(servers: &[SocketAddr], zones: &[String], records: &[&str]) -> Dns {
    let names = NamePolicy {
        zones: zones.iter().map(|zone| zone.parse().unwrap()).collect(),
        records: records.iter().map(|record| record.parse().unwrap()).collect(),
        ..settings().names
    };
    dns_of(Settings { servers: servers.to_vec(), names, ..settings() })
}

async fn ask_for(dns: &Dns, name: &str, kind: RecordType) -> Message {
    decode(&soon(dns.answer(&query(name, kind, 7), udp(4000))).await.unwrap().unwrap())
}

/// The data of the answer's records.
async fn data_of(dns: &Dns, name: &str, kind: RecordType) -> Vec<String> {
    let answer = ask_for(dns, name, kind).await;
    assert_eq!(answer.response_code, ResponseCode::NoError, "{name} {kind}");
    answer.answers.iter().map(|record| record.data.to_string()).collect()
}

#[tokio::test(flavor = "current_thread")]
async fn names_of_a_zone_are_asked_of_its_servers_and_never_of_others() {
    let mut office = FakeServer::failing(3).await;
    let mut lab = FakeServer::failing(5).await;
    let mut world = FakeServer::failing(0).await;
    let zones = [
        format!("corp.example={}", office.address),
        format!("lab.corp.example={}", lab.address),
        format!("dead.example={}", refused_port()),
    ];
    let dns = dns_by(&[world.address], &zones, &[]);
    for (name, code) in [
        ("corp.example.", ResponseCode::NXDomain),
        ("Git.CORP.example.", ResponseCode::NXDomain),
        // Not even a failure of the zone's is a reason to ask others.
        ("x.lab.corp.example.", ResponseCode::Refused),
        ("x.dead.example.", ResponseCode::ServFail),
        ("notcorp.example.", ResponseCode::NoError),
        ("example.", ResponseCode::NoError),
        ("corp.example.com.", ResponseCode::NoError),
    ] {
        for kind in [RecordType::A, RecordType::SOA, RecordType::DS] {
            assert_eq!(ask_for(&dns, name, kind).await.response_code, code, "{name} {kind}");
        }
    }
    assert_eq!([office.heard_so_far(), lab.heard_so_far(), world.heard_so_far()], [6, 3, 9]);
}

#[tokio::test(flavor = "current_thread")]
async fn the_users_records_count_more_than_the_link_and_the_hosts_file_and_may_change() {
    let directory = Directory::new();
    std::fs::write(
        directory.path("hosts"),
        "10.0.0.1 db.test\n10.0.0.2 file.test\n10.0.0.3 host.docker.internal\n",
    )
    .unwrap();
    let mut world = FakeServer::failing(0).await;
    let records =
        ["db.test=10.0.0.9,fd00::9", "new.docker.internal=10.0.0.8"].map(|record| record.parse().unwrap());
    let names = NamePolicy { records: records.to_vec(), ..settings().names };
    let dns = dns_of(Settings {
        servers: vec![world.address],
        hosts: directory.path("hosts"),
        names,
        ..settings()
    });
    assert_eq!(data_of(&dns, "db.test.", RecordType::ANY).await, ["10.0.0.9", "fd00::9"]);
    assert_eq!(data_of(&dns, "new.docker.internal.", RecordType::A).await, ["10.0.0.8"]);
    assert_eq!(data_of(&dns, "host.docker.internal.", RecordType::A).await, ["192.168.65.254"]);
    assert_eq!(data_of(&dns, "file.test.", RecordType::A).await, ["10.0.0.2"]);
    assert_eq!(data_of(&dns, "2.0.0.10.in-addr.arpa.", RecordType::PTR).await, ["file.test."]);
    for (name, kind) in
        [("file.test.", RecordType::AAAA), ("file.test.", RecordType::TXT), ("db.test.", RecordType::MX)]
    {
        assert_eq!(data_of(&dns, name, kind).await, [""; 0], "there, but without such records");
    }
    assert_eq!(world.heard_so_far(), 0);

    let name = "late.test".parse().unwrap();
    dns.add_record(&name, &["10.0.0.7".parse().unwrap()]).unwrap();
    assert_eq!(data_of(&dns, "LATE.test.", RecordType::A).await, ["10.0.0.7"]);
    assert_eq!(dns.records().len(), 3);
    assert!(dns.remove_record(&name, &[]));
    ask_for(&dns, "late.test.", RecordType::A).await;
    assert_eq!(world.heard_so_far(), 1, "it is the world's again");
}

#[tokio::test(flavor = "current_thread")]
async fn what_systemd_resolved_writes_of_a_vpn_empties_the_cache() {
    let directory = Directory::new();
    let resolved_conf = directory.path("resolved.conf");
    std::fs::write(&resolved_conf, "nameserver 192.0.2.1\n").unwrap();
    let server = lasting(300).await;
    let names = NamePolicy { cache: 10, ..settings().names };
    let dns = dns_of(Settings {
        servers: vec![server.address],
        resolved_conf: resolved_conf.clone(),
        names,
        ..settings()
    });
    let test = async {
        // What was read at first is read again when it is watched: that is over when an answer stays.
        let kept = async {
            while dns.counters().metric(Metric::DnsCacheHits) == 0 {
                ask(&dns, 1).await;
            }
        };
        soon(kept).await.unwrap();
        std::fs::write(&resolved_conf, "nameserver 192.0.2.1\nnameserver 10.8.0.53\n").unwrap();
        let forgotten = async {
            while dns.0.cache.borrow().len() > 0 {
                tokio::task::yield_now().await;
            }
        };
        soon(forgotten).await.unwrap();
    };
    tokio::select! {
        biased;
        () = dns.follow_files() => panic!("not followed"),
        () = test => {}
    }
}

#[tokio::test(flavor = "current_thread")]
async fn the_hosts_file_is_followed_and_can_be_left_out() {
    let directory = Directory::new();
    let (path, file) = (directory.path("hosts"), directory.path("file"));
    std::fs::write(&file, "10.0.0.1 box.test\n").unwrap();
    std::os::unix::fs::symlink("file", &path).unwrap();
    let world = FakeServer::failing(3).await;
    let of_file = Settings { servers: vec![world.address], hosts: path.clone(), ..settings() };
    let without = NamePolicy { hosts: false, ..settings().names };
    let without = dns_of(Settings { names: without, ..of_file.clone() });
    let dns = dns_of(of_file);
    let until = async |address: &str| {
        let found = async {
            while data_of(&dns, "box.test.", RecordType::A).await != [address] {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        soon(found).await.unwrap_or_else(|_| panic!("{address} was not noticed"));
    };
    let changed = async {
        until("10.0.0.1").await;
        std::fs::write(&file, "10.0.0.2 box.test\n").unwrap();
        until("10.0.0.2").await;
        let new = directory.path("new");
        std::fs::write(&new, "10.0.0.3 box.test\n").unwrap();
        std::fs::rename(&new, &file).unwrap();
        until("10.0.0.3").await;
        std::fs::write(directory.path("other"), "10.0.0.4 box.test\n").unwrap();
        std::os::unix::fs::symlink("other", &new).unwrap();
        std::fs::rename(&new, &path).unwrap();
        until("10.0.0.4").await;
        assert_eq!(ask_for(&without, "box.test.", RecordType::A).await.response_code, ResponseCode::NXDomain);
    };
    tokio::select! {
        biased;
        () = dns.follow_files() => panic!("not followed"),
        () = changed => {}
    }
}

#[tokio::test(flavor = "current_thread")]
async fn an_answer_that_is_too_long_for_the_guests_datagram_brings_it_back_over_tcp() {
    let addresses: Vec<String> = (0..64).map(|last| format!("fd00::{last:x}")).collect();
    let dns = dns_by(&[], &[], &[&format!("many.test={}", addresses.join(","))]);
    let plain = query("many.test.", RecordType::AAAA, 1);
    let cut = dns.answer(&plain, udp(1)).await.unwrap();
    assert!(cut.len() <= 512 && decode(&cut).truncation && decode(&cut).answers.is_empty());
    let whole = dns.answer(&plain, Transport::Tcp).await.unwrap();
    assert_eq!((decode(&whole).truncation, decode(&whole).answers.len()), (false, 64));
    // 4,096 bytes, says the test's OPT record.
    let whole = dns.answer(&with_opt(plain, 0, false, &[]), udp(1)).await.unwrap();
    assert_eq!(decode(&whole).answers.len(), 64);
}

/// A service that keeps so many answers.
fn dns_with_cache(server: SocketAddr, cache: usize) -> Dns {
    let names = NamePolicy { cache, ..settings().names };
    dns_of(Settings { servers: vec![server], names, ..settings() })
}

/// A resolver that knows every name for a while, and says so in an odd way.
async fn lasting(ttl: u32) -> FakeServer {
    FakeServer::udp(move |query| {
        // An OPT record of the query's would stand between.
        let question_end = 12 + query[12..].iter().position(|byte| *byte == 0).unwrap() + 5;
        let mut plain = query[..question_end].to_vec();
        plain[11] = 0;
        let reply = with_record(reply_to(&plain), 0, 65_280, ttl, b"data");
        vec![if query[11] == 0 { reply } else { with_opt(reply, 0, true, b"\xff\xee\x00\x02hi") }]
    })
    .await
}

/// Lets time pass for the service alone.
async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

#[tokio::test(flavor = "current_thread")]
async fn a_kept_answer_is_the_resolvers_but_for_id_letters_and_passed_time() {
    let mut server = lasting(300).await;
    let dns = dns_with_cache(server.address, 10);
    for asked in [
        query("example.com.", RecordType::A, 1),
        with_opt(query("Example.com.", RecordType::A, 1), 0, true, &[]),
    ] {
        let first = dns.answer(&asked, udp(1)).await.unwrap();
        pass(Duration::from_secs(100)).await;
        let mut again = asked.clone();
        again[..2].copy_from_slice(&[0xab, 0xcd]);
        again[13..20].copy_from_slice(b"eXAMPLE");
        let second = dns.answer(&again, udp(2)).await.unwrap();
        let mut expected = first.clone();
        expected[..2].copy_from_slice(&[0xab, 0xcd]);
        expected[13..20].copy_from_slice(b"eXAMPLE");
        let ttl = first.windows(4).position(|bytes| bytes == 300u32.to_be_bytes()).unwrap();
        expected[ttl..ttl + 4].copy_from_slice(&200u32.to_be_bytes());
        assert_eq!(second, expected);
        assert_eq!(server.heard_so_far(), 1);
        pass(Duration::from_secs(200)).await;
        assert_eq!(dns.answer(&asked, udp(1)).await.unwrap(), first, "it is asked anew");
        assert_eq!(server.heard_so_far(), 1);
    }
    assert_eq!(dns.counters().metric(Metric::DnsCacheHits), 2);
}

#[tokio::test(flavor = "current_thread")]
async fn queries_that_differ_in_anything_have_answers_of_their_own() {
    let mut server = lasting(300).await;
    let dns = dns_with_cache(server.address, 100);
    let plain = query("example.com.", RecordType::A, 1);
    let flagged = |at: usize, bits: u8| {
        let mut query = plain.clone();
        query[at] ^= bits;
        query
    };
    let mut other_size = with_opt(plain.clone(), 0, false, &[]);
    let size = other_size.len() - 8;
    other_size[size] = 2;
    let kinds = [
        plain.clone(),
        query("example.com.", RecordType::AAAA, 1),
        query("www.example.com.", RecordType::A, 1),
        // RD, AD and CD.
        flagged(2, 1),
        flagged(3, 0x20),
        flagged(3, 0x10),
        flagged(plain.len() - 1, 2),
        with_opt(plain.clone(), 0, false, &[]),
        with_opt(plain.clone(), 0, true, &[]),
        other_size,
    ];
    for _ in 0..2 {
        for kind in &kinds {
            dns.answer(kind, udp(1)).await.unwrap();
        }
    }
    assert_eq!(server.heard_so_far(), kinds.len());
    // What is meant for the resolver itself is asked each time.
    let cookie = with_opt(plain.clone(), 0, false, b"\x00\x0a\x00\x0812345678");
    let mut signed = plain;
    signed.extend([0, 0, 250, 0, 255, 0, 0, 0, 0, 0, 0]);
    signed[11] = 1;
    for foreign in [cookie, signed] {
        for _ in 0..2 {
            dns.answer(&foreign, udp(1)).await.unwrap();
        }
    }
    assert_eq!(server.heard_so_far(), 4);
}

#[tokio::test(flavor = "current_thread")]
async fn what_was_asked_of_others_is_forgotten_also_while_it_is_asked() {
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let dns = dns_with_cache(socket.local_addr().unwrap(), 10);
    let serve = async |reload: bool| {
        let mut bytes = [0; 512];
        let (len, from) = socket.recv_from(&mut bytes).await.unwrap();
        if reload {
            dns.reload();
        }
        socket.send_to(&with_record(reply_to(&bytes[..len]), 0, 1, 300, &[1; 4]), from).await.unwrap();
    };
    tokio::join!(ask(&dns, 1), serve(true));
    tokio::join!(ask(&dns, 2), serve(false));
    ask(&dns, 3).await;
    assert_eq!(dns.counters().metric(Metric::DnsCacheHits), 1);
    dns.reload();
    tokio::join!(ask(&dns, 4), serve(false));
    assert_eq!(dns.counters().metric(Metric::DnsForwarded), 3);
}

#[tokio::test(flavor = "current_thread")]
async fn the_cache_is_bounded_and_what_was_not_asked_for_longest_goes_first() {
    let mut server = lasting(300).await;
    let dns = dns_with_cache(server.address, 3);
    let ask = async |number: u32| {
        ask_for(&dns, &format!("n{number}.test."), RecordType::A).await;
    };
    for number in [1, 2, 3, 1, 4, 1, 3, 4] {
        ask(number).await;
    }
    assert_eq!(server.heard_so_far(), 4);
    ask(2).await;
    assert_eq!(server.heard_so_far(), 1, "the second had gone");

    let large = FakeServer::udp(|query| vec![with_record(reply_to(query), 0, 16, 300, &[7; 60_000])]).await;
    let dns = dns_with_cache(large.address, 100_000);
    let small = dns_with_cache(large.address, 100);
    for number in 0..20 {
        for dns in [&dns, &small] {
            ask_for(dns, &format!("n{number}.test."), RecordType::A).await;
        }
    }
    let kept = |dns: &Dns| (dns.0.cache.borrow().len(), dns.0.cache.borrow().bytes());
    assert_eq!(kept(&dns).0, 20);
    assert!(kept(&small).1 <= 512 << 10 && kept(&small).0 < 10, "{:?}", kept(&small));
    dns.0.cache.borrow_mut().clear();
    assert_eq!(kept(&dns), (0, 0));
}

#[tokio::test(flavor = "current_thread")]
async fn failures_are_remembered_for_two_seconds_and_without_a_cache_nothing_is() {
    let mut server = FakeServer::failing(2).await;
    let dns = dns_with_cache(server.address, 10);
    for (pause_s, heard) in [(0, 1), (1, 0), (1, 1)] {
        pass(Duration::from_secs(pause_s)).await;
        assert_eq!(ask(&dns, 1).await[3] & 15, 2);
        assert_eq!(server.heard_so_far(), heard, "{pause_s}");
    }
    let mut server = lasting(300).await;
    let dns = dns_with_cache(server.address, 0);
    ask(&dns, 1).await;
    ask(&dns, 2).await;
    assert_eq!(server.heard_so_far(), 2);
}

#[tokio::test(flavor = "current_thread")]
async fn addresses_that_are_filtered_are_not_there_and_not_asked_for() {
    use crate::policy::names::AddressFilter;
    let mut server = FakeServer::failing(3).await;
    for (filter, dropped) in [
        (AddressFilter::None, None),
        (AddressFilter::Ipv4, Some(RecordType::A)),
        (AddressFilter::Ipv6, Some(RecordType::AAAA)),
    ] {
        let records = vec!["own.test=10.0.0.1,fd00::1".parse().unwrap()];
        let names = NamePolicy { records, filter, ..settings().names };
        let dns = dns_of(Settings { servers: vec![server.address], names, ..settings() });
        for kind in [RecordType::A, RecordType::AAAA, RecordType::MX, RecordType::ANY] {
            let answer = ask_for(&dns, "example.com.", kind).await;
            let is_dropped = dropped == Some(kind);
            let code = if is_dropped { ResponseCode::NoError } else { ResponseCode::NXDomain };
            assert_eq!((answer.response_code, answer.answers.len()), (code, 0), "{filter:?} {kind}");
            assert_eq!(server.heard_so_far(), usize::from(!is_dropped));
            // What the user or the link says is told in any case.
            assert_eq!(data_of(&dns, "own.test.", RecordType::ANY).await.len(), 2);
            assert_eq!(data_of(&dns, "host.docker.internal.", RecordType::AAAA).await.len(), 1);
        }
        assert_eq!(dns.counters().metric(Metric::DnsFiltered), u64::from(dropped.is_some()));
    }
}

#[tokio::test(flavor = "current_thread")]
async fn names_that_rules_deny_get_the_answer_that_the_rule_chooses() {
    use crate::policy::egress::{Rule, Rules};
    use ResponseCode::{NXDomain, NoError, Refused};
    let mut server = FakeServer::failing(3).await;
    let texts = [
        "allow ok.ads.test:443/tcp",
        "deny ads.test",
        "deny hidden.test dns=nxdomain",
        "deny block.test dns=192.0.2.1",
        "deny block6.test dns=2001:db8::1",
        "deny told.test dns=resolve",
        "deny port.test:443",
        "deny docker.internal",
    ];
    let rules = texts.iter().map(|text| text.parse().unwrap()).collect();
    let egress = Arc::new(Rules::of_guest(rules, None).unwrap());
    let records = vec!["own.ads.test=10.0.0.1".parse().unwrap(), "ok.ads.test=10.0.0.2".parse().unwrap()];
    let names = NamePolicy { records, ..settings().names };
    let servers = vec![server.address];
    let dns = dns_of(Settings { servers, names, egress: egress.clone(), ..settings() });
    for (name, kind, code, data) in [
        ("ads.test.", RecordType::A, Refused, None),
        ("Deep.Ads.Test.", RecordType::MX, Refused, None),
        // Whatever else may be known of it.
        ("own.ads.test.", RecordType::A, Refused, None),
        ("ok.ads.test.", RecordType::A, NoError, Some("10.0.0.2")),
        ("hidden.test.", RecordType::A, NXDomain, None),
        ("block.test.", RecordType::A, NoError, Some("192.0.2.1")),
        ("x.block.test.", RecordType::ANY, NoError, Some("192.0.2.1")),
        ("block.test.", RecordType::AAAA, NoError, None),
        ("block6.test.", RecordType::AAAA, NoError, Some("2001:db8::1")),
        ("block6.test.", RecordType::HTTPS, NoError, None),
        // The link's own names are always told.
        ("host.docker.internal.", RecordType::A, NoError, Some("192.168.65.254")),
    ] {
        let answer = ask_for(&dns, name, kind).await;
        let told: Vec<_> = answer.answers.iter().map(|record| record.data.to_string()).collect();
        assert_eq!((answer.response_code, told.first().map(String::as_str)), (code, data), "{name} {kind}");
        assert_eq!(server.heard_so_far(), 0, "{name} is nobody's to know");
    }
    assert_eq!(dns.counters().metric(Metric::DnsDenied), 9);
    let counted: Vec<u64> = egress.iter().map(Rule::refusals).collect();
    assert_eq!(counted, [0, 3, 1, 3, 2, 0, 0, 0]);
    for name in ["told.test.", "port.test.", "example.com."] {
        ask_for(&dns, name, RecordType::A).await;
        assert_eq!(server.heard_so_far(), 1, "{name} is resolved");
    }
    // Why, for those who can read it (RFC 8914).
    let mut asked = decode(&query("ads.test.", RecordType::A, 7));
    asked.set_edns(hickory_proto::op::Edns::new());
    let answer = soon(dns.answer(&asked.to_vec().unwrap(), udp(4000))).await.unwrap().unwrap();
    assert!(answer.windows(8).any(|bytes| bytes == b"\0\x0fhythe:"), "15: blocked");
}

/// What is written while this lives, by this thread.
#[derive(Clone, Default)]
struct Written(Arc<std::sync::Mutex<Vec<u8>>>);

impl io::Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test(flavor = "current_thread")]
async fn each_query_has_a_line_for_those_who_ask_and_hostile_names_cannot_forge_any() {
    let written = Written::default();
    let writer = written.clone();
    let subscriber = tracing_subscriber::fmt()
        .without_time()
        .with_target(false)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    let server = lasting(300).await;
    let names = NamePolicy { log: true, cache: 10, ..settings().names };
    let dns = dns_of(Settings { servers: vec![server.address], names, ..settings() });
    let _guard = tracing::subscriber::set_default(subscriber);
    let mut hostile = query("aaaaaaaa.example.", RecordType::Unknown(65_399), 1);
    hostile[13..21].copy_from_slice(b"a\n\x1b[2J. ");
    for query in
        [&query("Example.com.", RecordType::A, 1), &query("example.com.", RecordType::A, 1), &hostile]
    {
        dns.answer(query, udp(4000)).await.unwrap();
    }
    ask_for(&dns, "host.docker.internal.", RecordType::AAAA).await;
    dns.answer(&query("example.com.", RecordType::AXFR, 1), Transport::Tcp).await.unwrap();
    let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
    let lines: Vec<&str> = text.lines().map(|line| line.split_once(" ms=").unwrap().0.trim()).collect();
    let guest = "from=192.168.65.3:4000";
    assert_eq!(
        lines,
        [
            format!("INFO query name=example.com kind=A {guest} server={} rcode=NOERROR", server.address),
            format!("INFO query name=example.com kind=A {guest} server=cache rcode=NOERROR"),
            format!(
                "INFO query name=a\\010\\027\\0912j\\046\\032.example kind=TYPE65399 {guest} server={} rcode=NOERROR",
                server.address
            ),
            format!("INFO query name=host.docker.internal kind=AAAA {guest} server=link rcode=NOERROR"),
            "INFO query name=example.com kind=AXFR from=tcp server=nobody rcode=REFUSED".to_string(),
        ]
    );
}

#[tokio::test(flavor = "current_thread")]
async fn a_resolver_that_answers_garbage_is_a_resolver_that_does_not_answer() {
    let replies = |query: &[u8]| {
        let mut pointer = reply_to(query);
        pointer.truncate(12);
        pointer.extend([0xc0, 12, 0, 1, 0, 1]);
        vec![vec![0xff; 600], query[..12].to_vec(), pointer, vec![], reply_to(&query[..query.len() - 1])]
    };
    let over_udp = FakeServer::udp(replies).await;
    let over_tcp = FakeServer::tcp(replies).await;
    for (server, transport) in [(over_udp, udp(1)), (over_tcp, Transport::Tcp)] {
        let dns = dns_with_cache(server.address, 10);
        let answer = soon(dns.answer(&query("example.com.", RecordType::A, 1), transport)).await.unwrap();
        assert_eq!(decode(&answer.unwrap()).response_code, ResponseCode::ServFail, "{transport:?}");
        assert!(dns.counters().metric(Metric::DnsMismatched) >= 5);
        assert_eq!(dns.counters().metric(Metric::DnsUnanswered), 1);
        assert_eq!(dns.0.cache.borrow().len(), 0);
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_flood_of_queries_leaves_nothing_behind() {
    let server = lasting(300).await;
    let dns = dns_with_cache(server.address, 20);
    for round in 0..20u16 {
        let mut race = race::Race::default();
        for number in 0..300u16 {
            let dns = dns.clone();
            let asked = query(&format!("n{number}.r{round}.test."), RecordType::A, number);
            race.push(async move { dns.answer(&asked, udp(number)).await });
        }
        while !race.is_empty() {
            assert!(race.next().await.is_some());
        }
    }
    let over = dns.counters().metric(Metric::DnsOverBudget);
    assert_eq!(over + dns.counters().metric(Metric::DnsForwarded), 6000);
    assert!(over > 0);
    assert_eq!(dns.0.cache.borrow().len(), 20);
    assert_eq!(dns.0.flights.under_way(), 0);
}

/// A service that has everything that can be had, but no resolvers.
fn everything_at_once() -> Dns {
    use crate::policy::names::AddressFilter;
    let names = NamePolicy {
        zones: vec!["example=127.0.0.1:1".parse().unwrap(), "a.example=127.0.0.1:1".parse().unwrap()],
        records: vec!["*.test=10.0.0.1".parse().unwrap(), "db.test=fd00::1".parse().unwrap()],
        filter: AddressFilter::Auto,
        log: true,
        ..NamePolicy::default()
    };
    let dns = dns_of(Settings { names, ..settings() });
    dns.0.resolvers.send_modify(|conf| conf.servers.clear());
    dns
}

fn run<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_bytes_make_the_answer_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        shape in 0u8..3,
        udp_too in any::<bool>(),
    ) {
        // Random bytes seldom get past the header: two of three begin like a query, one of those asks for a name of the
        // link and has random records behind it.
        let mut message = bytes.clone();
        if shape > 0 && message.len() > 12 {
            message[2..6].copy_from_slice(&[1, 0, 0, 1]);
        }
        if shape > 1 {
            message = query("host.docker.internal.", RecordType::A, 1);
            message[11] = bytes.len() as u8 % 4;
            message.extend(bytes);
        }
        let transport = if udp_too { udp(1) } else { Transport::Tcp };
        let answer = run(async {
            let dns = everything_at_once();
            dns.answer(&message, transport).await
        });
        if let Some(answer) = answer {
            prop_assert_eq!(&answer[..2], &message[..2]);
            prop_assert!(answer[2] & 0x80 != 0 && answer.len() <= message.len() + 256);
        }
    }

    #[test]
    fn no_stream_makes_the_service_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), piece in 1usize..50) {
        run(async {
            let dns = everything_at_once();
            over_stream(&dns, async |guest| {
                for piece in bytes.chunks(piece) {
                    guest.0.write_all(piece).await.unwrap();
                }
                guest.0.shutdown().await.unwrap();
                guest.0.read_to_end(&mut Vec::new()).await.unwrap();
            })
            .await;
        });
    }

    #[test]
    fn whatever_a_resolver_says_is_passed_on_and_kept_only_as_it_was(
        counts in proptest::array::uniform3(0u8..3),
        code in 0u8..6,
        records in proptest::collection::vec((0u16..70, 0u32..400, proptest::collection::vec(any::<u8>(), 0..30)), 0..4),
        noise in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..2),
        passed in 1u64..300,
    ) {
        let asked = query("Example.com.", RecordType::A, 1);
        let mut reply = with_code(reply_to(&asked), code);
        for (kind, ttl, data) in &records {
            reply = with_record(reply, 0, *kind, *ttl, data);
        }
        (reply[7], reply[9], reply[11]) = counts.into();
        for (at, byte) in noise {
            let at = at.index(reply.len()).max(asked.len() - 1);
            if at < reply.len() && at >= asked.len() {
                reply[at] = byte;
            }
        }
        let bytes = reply.clone();
        let (first, second, hits) = run(async move {
            let server = FakeServer::udp(move |query| vec![[&query[..2], &bytes[2..]].concat()]).await;
            let dns = dns_with_cache(server.address, 10);
            let first = dns.answer(&asked, udp(1)).await.unwrap();
            pass(Duration::from_secs(passed)).await;
            let second = dns.answer(&asked, udp(1)).await.unwrap();
            (first, second, dns.counters().metric(Metric::DnsCacheHits))
        });
        prop_assert_eq!(&first, &reply);
        prop_assert_eq!(second.len(), reply.len());
        if hits == 0 {
            prop_assert_eq!(&second, &reply);
        } else {
            let kept = reply::keeping(&reply).unwrap();
            prop_assert!(kept.lifetime > Duration::from_secs(passed));
            let mut expected = reply;
            reply::age(&mut expected, &kept.ttls, passed as u32);
            prop_assert_eq!(second, expected);
        }
    }
}
