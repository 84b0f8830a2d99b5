//! Proxies that are down, slow, or do not speak as proxies do: the guest is told, others go on, and nothing stays behind.

use std::io::Write;
use std::net::TcpStream;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::rig::bytes::{accept, expect_reset, reset, transfer};
use crate::rig::cell::{ANY, on_every_cell};
use crate::rig::company::Company;
use crate::rig::company::proxies::{BY_PROXY, PORT};
use crate::rig::http::{Server, Talk};
use crate::rig::hythe::Hythe;
use crate::rig::process;
use crate::rig::site::Family;
use crate::rig::wait::{PATIENCE, wait_until};

const REQUEST: &str = "GET / HTTP/1.1\r\nHost: web.origin.test\r\n\r\n";
/// Bytes that are tunnelled.
const OTHER: &[u8] = b"neither TLS nor a request\r\n";

/// A stream that has nothing to do with any proxy.
struct Bystander(TcpStream, TcpStream);

impl Bystander {
    fn of(company: &Company, hythe: &Hythe) -> Self {
        let listener = company.site.far.listen(Family::V4.far(), 9000);
        let guest = hythe.guest.connect((Family::V4.far(), 9000)).unwrap();
        let (far, _) = accept(&listener);
        Self(guest, far)
    }

    fn goes_on(&self) {
        transfer(&self.0, &self.1, 1, 200_000);
        transfer(&self.1, &self.0, 2, 200_000);
    }
}

fn http(hythe: &Hythe) -> Talk {
    let mut guest = Talk::to(&hythe.guest, Company::origin(Family::V4), 80);
    guest.send(REQUEST);
    guest
}

fn tunnel(hythe: &Hythe) -> TcpStream {
    let guest = hythe.guest.connect((Company::origin(Family::V4), 443)).unwrap();
    (&guest).write_all(OTHER).unwrap();
    guest
}

/// The guest's request is answered with one of these, its stream is reset.
fn expect_failure(hythe: &Hythe, statuses: &[u16]) {
    let (mut request, stream) = (http(hythe), tunnel(hythe));
    let head = request.head();
    let body = String::from_utf8(request.body(&head)).unwrap();
    assert!(statuses.contains(&head.status()), "{head:?} {body}");
    assert!(body.contains("proxy") || body.contains("hythe"), "whose answer it is: {body}");
    expect_reset(&stream);
    // The explicit proxy tells both.
    let mut explicit = Talk::to(&hythe.guest, Family::V4.gateway(), PORT);
    explicit.send("CONNECT web.origin.test:443 HTTP/1.1\r\nHost: web.origin.test:443\r\n\r\n");
    let head = explicit.head();
    assert!(statuses.contains(&head.status()), "{head:?}");
}

fn sockets(hythe: &Hythe) -> usize {
    process::descriptors(hythe.pid()).iter().filter(|target| target.starts_with("socket:")).count()
}

on_every_cell! {
    a_proxy_that_is_down_is_told_of_at_once_and_found_when_it_is_back(cell) {
        let company = Company::new();
        let hythe = company.hythe(cell).options(BY_PROXY).run();
        let bystander = Bystander::of(&company, &hythe);
        expect_failure(&hythe, &[502]);
        bystander.goes_on();
        let _server = Server::mirror(&company.site.far, Family::V4.far(), PORT, "proxy");
        let head = http(&hythe).head();
        assert_eq!(head.status(), 200);
        bystander.goes_on();
        hythe.stop().assert_clean(0);
    }
}

#[test]
fn a_proxy_whose_name_is_unknown_is_told_of() {
    let company = Company::new();
    let hythe = company
        .hythe(ANY)
        .options("--proxy-http http://absent.test:3128 --proxy-https http://absent.test:3128")
        .run();
    expect_failure(&hythe, &[502]);
    hythe.stop().assert_clean(0);
}

#[test]
fn a_proxy_that_goes_in_the_middle_is_told_of() {
    for how in ["close", "reset", "half a head", "reset in a head"] {
        let company = Company::new();
        let _server = Server::raw(&company.site.far, Family::V4.far(), PORT, move |talk| {
            talk.head();
            if how.contains("head") {
                talk.send("HTTP/1.1 200 O");
            }
            if how.contains("reset") {
                reset(talk.stream().try_clone().unwrap());
            }
        });
        let hythe = company.hythe(ANY).options(BY_PROXY).run();
        let bystander = Bystander::of(&company, &hythe);
        expect_failure(&hythe, &[502]);
        bystander.goes_on();
        hythe.stop().assert_clean(0);
    }
}

#[test]
fn a_proxy_that_talks_nonsense_is_told_of_and_takes_no_memory() {
    let endless = [
        b"HTTP/1.1 200 OK\r\n".to_vec(),
        b"X-Filler: 0123456789012345678901234567890123456789\r\n".repeat(2 << 20),
    ]
    .concat();
    assert!(endless.len() > 100 << 20);
    let line = [b"HTTP/1.1 200 ".to_vec(), vec![b'x'; 1 << 20]].concat();
    for (what, bytes) in [
        ("100 MB of fields", endless),
        ("a long line", line),
        ("noise", (0..100_000u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect()),
        ("another protocol", b"220 mail.origin.test ESMTP\r\n".to_vec()),
        ("an old protocol", b"<html>hello</html>\r\n".to_vec()),
        ("a status that is none", b"HTTP/1.1 abc OK\r\n\r\n".to_vec()),
        ("a broken field", b"HTTP/1.1 200 OK\r\nno field\r\n\r\n".to_vec()),
        ("two lengths", b"HTTP/1.1 403 No\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxy".to_vec()),
    ] {
        let company = Company::new();
        let hythe = company.hythe(ANY).options(BY_PROXY).run();
        let bystander = Bystander::of(&company, &hythe);
        let server = Server::raw(&company.site.far, Family::V4.far(), PORT, move |talk| {
            talk.head();
            // hythe goes when it has heard enough.
            let _ = talk.try_send(&bytes);
            talk.wait_for_end();
        });
        let before = process::resident_kib(hythe.pid());
        expect_failure(&hythe, &[502]);
        bystander.goes_on();
        let grown = process::peak_resident_kib(hythe.pid()).saturating_sub(before);
        assert!(grown < 16 << 10, "{what}: {grown} KiB more at the most");
        drop(server);
        hythe.stop().assert_clean(0);
    }
}

#[test]
fn a_proxy_that_is_silent_is_waited_for_only_so_long() {
    let company = Company::new();
    // It takes connections and says nothing; or nobody is there at all.
    let (send, calls) = mpsc::sync_channel(64);
    let _server = Server::raw(&company.site.far, Family::V4.far(), PORT, move |talk| {
        let mut talk = Talk::new(talk.stream().try_clone().unwrap());
        talk.head();
        let _ = send.send(talk);
    });
    company.site.far.command(&["nft", "add table inet t"]);
    company.site.far.command(&["nft", "add chain inet t input { type filter hook input priority 0; }"]);
    company.site.far.command(&["nft", "add rule inet t input tcp dport 3999 drop"]);
    let silent = company.hythe(ANY).options(BY_PROXY).run();
    let absent = company.hythe(ANY).options(&BY_PROXY.replace("3128", "3999")).run();
    let bystanders = Bystander::of(&company, &silent);
    let began = Instant::now();
    let before = sockets(&silent);
    let waiting = [&silent, &absent].map(|hythe| (http(hythe), tunnel(hythe)));
    bystanders.goes_on();
    // Everything that the guest does meanwhile works as ever.
    assert_eq!(
        silent.guest.command(&["ping", "-c1", "-W20", "192.168.65.1"]).matches("1 received").count(),
        1
    );
    let [(asked, silent_stream), (mut request, stream)] = waiting;
    let head = request.head();
    assert_eq!(head.status(), 504, "{head:?}");
    expect_reset(&stream);
    expect_reset(&silent_stream);
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
    bystanders.goes_on();
    // A proxy that has taken a request may have an origin that thinks: it is waited for longer, as long as the guest does.
    reset(asked.into_stream());
    // Both calls of the proxy were given up.
    for _ in 0..2 {
        calls.recv_timeout(PATIENCE).unwrap().wait_for_end();
    }
    wait_until("sockets to be closed", || sockets(&silent) <= before);
    silent.stop().assert_clean(0);
    absent.stop().assert_clean(0);
}

#[test]
fn a_slow_proxy_is_slow_for_those_who_use_it_alone() {
    let company = Company::new();
    let (send, calls) = mpsc::sync_channel(64);
    let _server = Server::raw(&company.site.far, Family::V4.far(), PORT, move |talk| {
        let mut talk = Talk::new(talk.stream().try_clone().unwrap());
        talk.head();
        let _ = send.send(talk);
    });
    let hythe = company.hythe(ANY).options(BY_PROXY).run();
    let bystander = Bystander::of(&company, &hythe);
    let mut waiting: Vec<Talk> = (0..30).map(|_| http(&hythe)).collect();
    let mut called: Vec<Talk> = waiting.iter().map(|_| calls.recv_timeout(PATIENCE).unwrap()).collect();
    bystander.goes_on();
    // Byte by byte.
    for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok" {
        for talk in &mut called {
            talk.send([*byte]);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    for talk in &mut waiting {
        let head = talk.head();
        assert_eq!(talk.body(&head), b"ok");
    }
    bystander.goes_on();
    hythe.stop().assert_clean(0);
}

#[test]
fn a_socks_proxy_that_fails_is_told_of() {
    let company = Company::new();
    for answer in [
        &[][..],
        b"\x05\xff",
        b"\x04\x00",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        // RFC 1928, 6: not allowed by the ruleset; host unreachable; a kind of address that there is not.
        b"\x05\x00\x05\x02\x00\x01\0\0\0\0\0\0",
        b"\x05\x00\x05\x04\x00\x01\0\0\0\0\0\0",
        b"\x05\x00\x05\x00\x00\x09\0\0\0\0\0\0",
        b"\x05\x00\x05\x00\x00\x03",
    ] {
        let _server = Server::raw(&company.site.far, Family::V4.far(), 1080, move |talk| {
            talk.exact(3);
            let _ = talk.try_send(&answer[..answer.len().min(2)]);
            if answer.len() > 2 && answer.starts_with(b"\x05\x00") {
                talk.exact(5);
                let _ = talk.try_send(&answer[2..]);
            }
            talk.finish();
            talk.wait_for_end();
        });
        let hythe = company
            .hythe(ANY)
            .options("--proxy-http socks5h://198.51.100.1 --proxy-https socks5h://198.51.100.1")
            .run();
        expect_failure(&hythe, &[502]);
        hythe.stop().assert_clean(0);
    }
}

#[test]
fn a_guest_that_opens_and_says_nothing_costs_little_and_keeps_nobody_out() {
    const IDLE: usize = 2000;
    let company = Company::new();
    let _proxy = Server::mirror(&company.site.far, Family::V4.far(), PORT, "proxy");
    let hythe = company.hythe(ANY).options(BY_PROXY).run();
    let bystander = Bystander::of(&company, &hythe);
    let before = process::resident_kib(hythe.pid());
    // Half a head each, on the port of the proxy and on a transparent one.
    let half: Vec<TcpStream> = (0..IDLE)
        .filter_map(|number| {
            let to = if number % 2 == 0 {
                (Family::V4.gateway(), PORT)
            } else {
                (Company::origin(Family::V4), 80)
            };
            let stream = hythe.guest.connect(to).ok()?;
            let _ = (&stream).write_all(b"GET / HTTP/1.1\r\nHost: web.ori");
            Some(stream)
        })
        .collect();
    bystander.goes_on();
    let grown = process::resident_kib(hythe.pid()).saturating_sub(before);
    // A stream may have 64 KiB of a head looked at while it is peeked.
    assert!(grown < 160 << 10, "{grown} KiB for {} streams", half.len());
    drop(half);
    wait_until("room for a request", || {
        let mut guest = Talk::to(&hythe.guest, Company::origin(Family::V4), 80);
        guest.try_send(REQUEST).is_ok()
            && guest.try_head().is_ok_and(|head| head.is_some_and(|head| head.status() == 200))
    });
    hythe.stop().assert_clean(0);
}
