//! Streams that are tunnelled: by the name that TLS says, or by their address. The proxy is the test's own.

use std::io::Write;
use std::net::TcpStream;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::rig::bytes::{expect_end, expect_reset, reset, transfer};
use crate::rig::cell::{ANY, on_every_cell};
use crate::rig::company::Company;
use crate::rig::company::proxies::{BY_PROXY, PORT};
use crate::rig::http::{Server, Talk};
use crate::rig::hythe::Hythe;
use crate::rig::site::{FAMILIES, Family};
use crate::rig::wait::PATIENCE;

/// What a guest may wait for a server that speaks first: far less than the second after which it would ask again.
const STALL: Duration = Duration::from_millis(900);

/// A proxy that opens every tunnel to the test: what it was asked for, and the other end.
struct Tunnels {
    _server: Server,
    opened: mpsc::Receiver<(String, Talk)>,
}

impl Tunnels {
    fn of(company: &Company) -> Self {
        Self::saying(company, "HTTP/1.1 200 Connection established\r\n\r\n")
    }

    fn saying(company: &Company, answer: &'static str) -> Self {
        let (send, opened) = mpsc::sync_channel(64);
        let server = Server::raw(&company.site.far, Family::V4.far(), PORT, move |talk| {
            let mut talk = Talk::new(talk.stream().try_clone().unwrap());
            let head = talk.head();
            let place = head.line.strip_prefix("CONNECT ").and_then(|rest| rest.strip_suffix(" HTTP/1.1"));
            let place = place.unwrap_or_else(|| panic!("no CONNECT: {head:?}")).to_string();
            assert_eq!(head.field("host"), Some(place.as_str()), "{head:?}");
            talk.send(answer);
            let _ = send.send((place, talk));
        });
        Self { _server: server, opened }
    }

    fn next(&self) -> (String, Talk) {
        self.opened.recv_timeout(PATIENCE).expect("a tunnel")
    }
}

/// A ClientHello (RFC 8446, 4.1.2), in records of at most `record` bytes.
fn client_hello(extensions: &[(u16, Vec<u8>)], record: usize) -> Vec<u8> {
    let list: Vec<u8> = extensions
        .iter()
        .flat_map(|(kind, data)| [&kind.to_be_bytes()[..], &(data.len() as u16).to_be_bytes(), data].concat())
        .collect();
    let mut hello = [&[3, 3][..], &[7; 32], &[32], &[9; 32]].concat();
    // Cipher suites, the first one by GREASE (RFC 8701), and no compression.
    hello.extend([0, 6, 0x2a, 0x2a, 0x13, 0x01, 0x13, 0x03, 1, 0]);
    hello.extend((list.len() as u16).to_be_bytes());
    hello.extend(list);
    let message = [&[1][..], &(hello.len() as u32).to_be_bytes()[1..], &hello].concat();
    let framed = |part: &[u8]| [&[22, 3, 1][..], &(part.len() as u16).to_be_bytes(), part].concat();
    message.chunks(record).flat_map(framed).collect()
}

fn server_name(name: &[u8]) -> (u16, Vec<u8>) {
    let len = name.len() as u16;
    (0, [&(len + 3).to_be_bytes()[..], &[0], &len.to_be_bytes(), name].concat())
}

const GREASE: u16 = 0x4a4a;
const PADDING: u16 = 21;
const ECH: u16 = 0xfe0d;
const ALPN: u16 = 16;

/// Extensions like those of a browser's.
fn browser(name: &[u8]) -> Vec<(u16, Vec<u8>)> {
    vec![
        (GREASE, vec![]),
        (ALPN, b"\0\x0c\x02h2\x08http/1.1".to_vec()),
        server_name(name),
        (43, vec![4, 0x5a, 0x5a, 3, 4]),
        (51, [&[0, 38, 0, 0x1d, 0, 32][..], &[5; 32]].concat()),
        (0x6a6a, vec![0]),
    ]
}

fn start(company: &Company) -> Hythe {
    company.hythe(ANY).options(BY_PROXY).run()
}

fn connect(hythe: &Hythe, family: Family, port: u16) -> TcpStream {
    hythe.guest.connect((Company::origin(family), port)).unwrap()
}

/// Both directions of a tunnel carry what is put into them.
fn expect_stream(guest: &TcpStream, far: &Talk) {
    transfer(guest, far.stream(), 5, 300_000);
    transfer(far.stream(), guest, 6, 300_000);
}

#[test]
fn tls_goes_by_the_name_that_it_says_and_every_byte_of_it() {
    let company = Company::new();
    let tunnels = Tunnels::of(&company);
    let hythe = start(&company);
    let long = [vec![b'a'; 63], vec![b'b'; 63], vec![b'c'; 60]].join(&b'.');
    let long = [&long[..], b".origin.test"].concat();
    let padded = |name: &[u8], bytes: usize| [browser(name), vec![(PADDING, vec![0; bytes])]].concat();
    // The name that is outside of an encrypted ClientHello is all that there is to see.
    let encrypted = (ECH, [&[0, 0, 1, 0, 1, 7, 0, 32][..], &[1; 32], &[0, 200], &[2; 200]].concat());
    for (name, hello) in [
        ("web.origin.test", client_hello(&browser(b"web.origin.test"), 16384)),
        ("web.origin.test", client_hello(&browser(b"WEB.Origin.TEST"), 16384)),
        ("web.origin.test", client_hello(&[server_name(b"web.origin.test")], 16384)),
        (std::str::from_utf8(&long).unwrap(), client_hello(&browser(&long), 16384)),
        // A key of a post-quantum exchange does not fit into one segment; 16 KiB do not fit into one record.
        ("web.origin.test", client_hello(&padded(b"web.origin.test", 1500), 16384)),
        ("web.origin.test", client_hello(&padded(b"web.origin.test", 16100), 16384)),
        (
            "web.origin.test",
            client_hello(&[vec![(PADDING, vec![0; 16000])], browser(b"web.origin.test")].concat(), 16384),
        ),
        (
            "web.origin.test",
            client_hello(&[vec![(PADDING, vec![0; 20000])], browser(b"web.origin.test")].concat(), 16384),
        ),
        ("web.origin.test", client_hello(&browser(b"web.origin.test"), 100)),
        ("web.origin.test", client_hello(&browser(b"web.origin.test"), 1)),
        (
            "outer.origin.test",
            client_hello(&[browser(b"outer.origin.test"), vec![encrypted]].concat(), 16384),
        ),
    ] {
        let guest = connect(&hythe, Family::V4, 443);
        (&guest).write_all(&hello).unwrap();
        let (place, mut far) = tunnels.next();
        assert_eq!(place, format!("{name}:443"), "a ClientHello of {} bytes", hello.len());
        assert_eq!(far.exact(hello.len()), hello);
        expect_stream(&guest, &far);
    }
    hythe.stop().assert_clean(0);
}

on_every_cell! {
    a_client_hello_in_segments_is_waited_for_and_what_follows_is_not_lost(cell) {
        let company = Company::new();
        let tunnels = Tunnels::of(&company);
        let hythe = company.hythe(cell).options(BY_PROXY).run();
        let hello = client_hello(&browser(b"web.origin.test"), 16384);
        let name = hello.windows(3).position(|part| part == b"web").unwrap();
        for family in FAMILIES {
            for cut in [1, 4, 5, 9, 43, name + 1, name + 15, hello.len() - 1] {
                let guest = connect(&hythe, family, 443);
                guest.set_nodelay(true).unwrap();
                (&guest).write_all(&hello[..cut]).unwrap();
                // It is in hythe's hands when the guest's kernel has its acknowledgement.
                crate::rig::wait::wait_until("an acknowledgement", || crate::rig::socket::unacknowledged(&guest) == 0);
                (&guest).write_all(&hello[cut..]).unwrap();
                // More comes before the tunnel stands.
                let more = vec![0x17; 100_000];
                (&guest).write_all(&more).unwrap();
                let (place, mut far) = tunnels.next();
                assert_eq!(place, "web.origin.test:443", "cut at {cut}");
                assert!(far.exact(hello.len()) == hello && far.exact(more.len()) == more, "cut at {cut}");
                expect_stream(&guest, &far);
            }
        }
        hythe.stop().assert_clean(0);
    }
}

#[test]
fn what_says_no_name_goes_by_its_address() {
    let company = Company::new();
    let tunnels = Tunnels::of(&company);
    let hythe = start(&company);
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec();
    for (what, port, bytes) in [
        ("no SNI", 443, client_hello(&[(ALPN, b"\0\x03\x02h2".to_vec())], 16384)),
        ("no extensions", 443, client_hello(&[], 16384)),
        ("an address for a name", 443, client_hello(&[server_name(b"192.0.2.7")], 16384)),
        ("a name with a line in it", 443, client_hello(&[server_name(b"a\r\nX: y")], 16384)),
        ("a name with a zero", 443, client_hello(&[server_name(b"web\0.origin.test")], 16384)),
        ("a name with a port", 443, client_hello(&[server_name(b"web.origin.test:25")], 16384)),
        ("an empty name", 443, client_hello(&[server_name(b"")], 16384)),
        ("HTTP/2 at once", 80, preface.clone()),
        ("HTTP/2 at once", 443, preface),
        ("an older TLS", 443, b"\x80\x2e\x01\x03\x01\0\x15\0\0\0\x10 and so on, which is no record".to_vec()),
        ("SSH", 443, b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()),
        ("zeros", 80, vec![0; 5000]),
        ("lines that are no requests", 80, b"hello\r\nis anybody there?\r\n".to_vec()),
    ] {
        for family in FAMILIES {
            let guest = connect(&hythe, family, port);
            (&guest).write_all(&bytes).unwrap();
            let (place, mut far) = tunnels.next();
            let address = Company::origin(family);
            assert_eq!(place, std::net::SocketAddr::new(address, port).to_string(), "{what}");
            assert!(far.exact(bytes.len()) == bytes, "{what}");
            expect_stream(&guest, &far);
        }
    }
    hythe.stop().assert_clean(0);
}

#[test]
fn a_server_that_speaks_first_is_heard_at_once() {
    let company = Company::new();
    let tunnels = Tunnels::of(&company);
    let hythe = company.hythe(ANY).options(BY_PROXY).options("--transparent-ports *").run();
    for port in [443, 25] {
        // The shortest of some, since other tests are about.
        let shortest = (0..5).map(|_| {
            let began = Instant::now();
            let mut guest = Talk::new(connect(&hythe, Family::V4, port));
            let (place, mut far) = tunnels.next();
            assert_eq!(place, format!("198.18.9.1:{port}"));
            far.send("220 mail.origin.test ESMTP\r\n");
            assert_eq!(guest.exact(28), b"220 mail.origin.test ESMTP\r\n");
            let took = began.elapsed();
            guest.send("EHLO guest\r\n");
            assert_eq!(far.exact(12), b"EHLO guest\r\n");
            expect_stream(guest.stream(), &far);
            took
        });
        let shortest = shortest.min().unwrap();
        assert!(shortest < STALL, "port {port}: {shortest:?}");
    }
    hythe.stop().assert_clean(0);
}

#[test]
fn what_a_proxy_sends_behind_its_answer_is_the_far_servers() {
    let company = Company::new();
    let tunnels = Tunnels::saying(
        &company,
        "HTTP/1.0 200 OK\r\nX-Of-The-Proxy: 1\r\nContent-Length: 7\r\n\r\n220 early bytes\r\n",
    );
    let hythe = start(&company);
    for _ in 0..20 {
        let hello = client_hello(&browser(b"web.origin.test"), 16384);
        let mut guest = Talk::new(connect(&hythe, Family::V4, 443));
        guest.send(&hello);
        let (_, mut far) = tunnels.next();
        assert_eq!(guest.exact(17), b"220 early bytes\r\n");
        assert_eq!(far.exact(hello.len()), hello);
        expect_stream(guest.stream(), &far);
    }
    hythe.stop().assert_clean(0);
}

on_every_cell! {
    a_tunnel_is_a_stream_like_any_other(cell) {
        let company = Company::new();
        let tunnels = Tunnels::of(&company);
        let hythe = company.hythe(cell).options(BY_PROXY).run();
        hythe.assert_engine();
        for family in FAMILIES {
            let open = || {
                let hello = client_hello(&browser(b"web.origin.test"), 16384);
                let guest = connect(&hythe, family, 443);
                (&guest).write_all(&hello).unwrap();
                let (_, mut far) = tunnels.next();
                assert_eq!(far.exact(hello.len()), hello);
                (guest, far)
            };
            // Much, both ways at the same time.
            let (guest, far) = open();
            std::thread::scope(|scope| {
                scope.spawn(|| transfer(&guest, far.stream(), 1, 20_000_000));
                scope.spawn(|| transfer(far.stream(), &guest, 2, 20_000_000));
            });
            // Each direction has its own end.
            guest.shutdown(std::net::Shutdown::Write).unwrap();
            expect_end(far.stream());
            transfer(far.stream(), &guest, 3, 1_000_000);
            far.finish();
            expect_end(&guest);

            let (guest, far) = open();
            far.finish();
            expect_end(&guest);
            transfer(&guest, far.stream(), 4, 1_000_000);
            drop(guest);
            expect_end(far.stream());

            let (guest, far) = open();
            reset(guest);
            expect_reset(far.stream());
            let (guest, far) = open();
            reset(far.into_stream());
            expect_reset(&guest);
        }
        let ended = hythe.stop();
        ended.assert_clean(0);
    }
}

#[test]
fn many_streams_at_once_each_have_their_own_tunnel() {
    const STREAMS: usize = 40;
    let company = Company::new();
    let tunnels = Tunnels::of(&company);
    let hythe = start(&company);
    let guests: Vec<TcpStream> = (0..STREAMS)
        .map(|number| {
            let guest = connect(&hythe, Family::V4, 443);
            let hello = client_hello(&browser(format!("n{number}.origin.test").as_bytes()), 16384);
            (&guest).write_all(&hello).unwrap();
            (&guest).write_all(format!("{number:08}").as_bytes()).unwrap();
            guest
        })
        .collect();
    for _ in 0..STREAMS {
        let (place, mut far) = tunnels.next();
        let number: usize = place.trim_start_matches('n').split('.').next().unwrap().parse().unwrap();
        let hello = client_hello(&browser(format!("n{number}.origin.test").as_bytes()), 16384);
        assert_eq!(far.exact(hello.len()), hello);
        assert_eq!(far.exact(8), format!("{number:08}").into_bytes());
        expect_stream(&guests[number], &far);
    }
    hythe.stop().assert_clean(0);
}

#[test]
fn a_guest_that_goes_before_its_tunnel_stands_leaves_nothing() {
    let company = Company::new();
    let (send, called) = mpsc::sync_channel(64);
    let _server = Server::raw(&company.site.far, Family::V4.far(), PORT, move |talk| {
        let mut talk = Talk::new(talk.stream().try_clone().unwrap());
        talk.head();
        let _ = send.send(talk);
    });
    let hythe = start(&company);
    let hello = client_hello(&browser(b"web.origin.test"), 16384);
    for len in [0, 3, hello.len()] {
        let guest = connect(&hythe, Family::V4, 443);
        (&guest).write_all(&hello[..len]).unwrap();
        if len == hello.len() {
            let mut far = called.recv_timeout(PATIENCE).unwrap();
            reset(guest);
            // The proxy has not answered, and nobody waits for its answer.
            far.wait_for_end();
        } else {
            reset(guest);
        }
    }
    hythe.stop().assert_clean(0);
}
