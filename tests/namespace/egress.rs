//! Rules about where the guest may go: how each kind of traffic is refused, and what is said of it.

use std::io::{ErrorKind, Write};
use std::net::{IpAddr, TcpStream};

use crate::publishing::Control;
use crate::rig::bytes::{accept, expect_reset, transfer};
use crate::rig::cell::{ANY, on_every_cell};
use crate::rig::company::Company;
use crate::rig::company::proxies::{BY_PROXY, PORT};
use crate::rig::http::{Server, Talk};
use crate::rig::hythe::{Hythe, PROGRAM};
use crate::rig::site::{FAMILIES, Family};
use crate::rig::socket::receive;
use crate::rig::wait::wait_until;

fn ask(hythe: &Hythe, to: IpAddr, host: &str) -> (u16, String) {
    let (head, said) = Talk::to(&hythe.guest, to, 80).ask(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"));
    (head.status(), said)
}

fn dig(hythe: &Hythe, words: &str) -> String {
    let words: Vec<&str> = words.split(' ').collect();
    let fixed = ["dig", "@192.168.65.1", "+tries=1", "+time=20", "+noall", "+comments", "+answer"];
    hythe.guest.command(&[&fixed[..], &words].concat())
}

/// A connection that does not stand.
fn is_refused(stream: std::io::Result<TcpStream>) -> bool {
    stream.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

on_every_cell! {
    addresses_networks_ports_and_protocols_are_refused_and_others_are_not(cell) {
        let company = Company::new();
        let hythe = company
            .hythe(cell)
            .words(&["--egress", "allow 198.51.100.1:9000/tcp", "--egress", "deny 198.51.100.0/24/tcp"])
            .words(&["--egress", "deny 2001:db8::/64", "--egress", "deny 10.77.0.0/24:7000-7999/udp"])
            .run();
        hythe.assert_engine();
        let far = &company.site.far;
        // TCP is refused by a reset, without a connection to anybody.
        let listener = far.listen(Family::V4.far(), 9001);
        assert!(is_refused(hythe.guest.connect((Family::V4.far(), 9001))));
        assert!(is_refused(hythe.guest.connect((Family::V6.far(), 9000))));
        // The first rule that means it decides.
        let allowed = far.listen(Family::V4.far(), 9000);
        let guest = hythe.guest.connect((Family::V4.far(), 9000)).unwrap();
        let (other, _) = accept(&allowed);
        transfer(&guest, &other, 1, 100_000);
        drop(listener);
        // UDP is dropped, or answered by an error; never delivered.
        let heard = far.udp(Family::V4.next_hop(), 7500);
        let spoken = hythe.guest.udp(Family::V4.any(), 0);
        let _ = spoken.send_to(b"refused", (Family::V4.next_hop(), 7500));
        let good = far.udp(Family::V4.next_hop(), 8000);
        wait_until("a datagram that is allowed", || {
            let _ = spoken.send_to(b"allowed", (Family::V4.next_hop(), 8000));
            good.set_read_timeout(Some(std::time::Duration::from_millis(500))).unwrap();
            receive(&good, &mut [0; 20]).is_ok()
        });
        heard.set_nonblocking(true).unwrap();
        assert_eq!(receive(&heard, &mut [0; 20]).unwrap_err().kind(), ErrorKind::WouldBlock);
        // The rule about TCP says nothing about echoes; the one about everything does.
        assert!(hythe.guest.command(&["ping", "-c1", "-W20", "198.51.100.1"]).contains("1 received"));
        assert!(!hythe.guest.output(&["ping", "-c1", "-W2", "2001:db8::1"]).status.success());
        let counters = hythe.counters();
        let refused = counters.get("egress_refused") + counters.get("dropped_policy");
        assert!(refused >= 4, "two streams, a datagram and an echo: {counters:?}");
        hythe.stop().assert_clean(0);
    }
}

#[test]
fn requests_are_refused_in_the_words_of_the_rule() {
    let company = Company::new();
    let proxy = Server::mirror(&company.site.far, Family::V4.far(), PORT, "proxy");
    let hythe = company
        .hythe(ANY)
        .options(BY_PROXY)
        .words(&[
            "--egress",
            "allow good.secret.origin.test",
            "--egress",
            "deny .secret.origin.test dns=resolve text=ask the desk first",
        ])
        .run();
    for family in FAMILIES {
        let to = Company::origin(family);
        let (status, said) = ask(&hythe, to, "a.secret.origin.test");
        assert!(status == 403 && said.contains("ask the desk first"), "{status} {said}");
        assert_eq!(ask(&hythe, to, "good.secret.origin.test").0, 200);
        assert_eq!(ask(&hythe, to, "web.origin.test").0, 200);
        // Each request of a connection is asked for its name.
        let mut guest = Talk::to(&hythe.guest, to, 80);
        for (host, status) in [("web", 200), ("a.secret", 403), ("web", 200), ("B.SECRET", 403)] {
            let (head, _) = guest.ask(format!("GET / HTTP/1.1\r\nHost: {host}.origin.test\r\n\r\n"));
            assert_eq!(head.status(), status, "{host}");
        }
    }
    // With a port, with a final point, in absolute form: the same host.
    for request in [
        "GET / HTTP/1.1\r\nHost: a.secret.origin.test:80\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.secret.origin.test.\r\n\r\n",
        "GET http://a.secret.origin.test/ HTTP/1.1\r\nHost: web.origin.test\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.secret.origin.test\r\nContent-Length: 4\r\n\r\nbody",
        "GET / HTTP/1.1\r\nHost: a.secret.origin.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    ] {
        let (head, said) = Talk::to(&hythe.guest, Company::origin(Family::V4), 80).ask(request);
        assert_eq!(head.status(), 403, "{request:?}: {said}");
    }
    let (head, _) = Talk::to(&hythe.guest, Family::V4.gateway(), PORT)
        .ask("CONNECT a.secret.origin.test:443 HTTP/1.1\r\nHost: a.secret.origin.test:443\r\n\r\n");
    assert_eq!(head.status(), 403);
    assert!(
        proxy
            .lines()
            .iter()
            .all(|line| !line.to_lowercase().contains("/a.secret")
                && !line.to_lowercase().contains("/b.secret")),
        "{:?}",
        proxy.lines()
    );
    assert!(hythe.counters().get("egress_refused") >= 11);
    hythe.stop().assert_clean(0);
}

#[test]
fn names_are_refused_without_any_proxy_too() {
    let company = Company::new();
    let direct = Server::mirror(&company.site.far, Family::V4.far(), 80, "direct");
    let secure = company.site.far.listen(Family::V4.far(), 443);
    let hythe = company
        .hythe(ANY)
        .options("--proxy none --egress-log")
        .words(&["--egress", "deny bad.direct.test text=not this one", "--egress", "allow *"])
        .run();
    let far = Family::V4.far();
    assert_eq!(ask(&hythe, far, "good.direct.test"), (200, "direct: GET / HTTP/1.1 \n".into()));
    let (status, said) = ask(&hythe, far, "bad.direct.test");
    assert!(status == 403 && said.contains("not this one"), "{status} {said}");
    assert_eq!(direct.heads().len(), 1);
    // TLS is refused by a reset, by its name.
    let ca = "/nonexistent";
    let curl = |name: &str| {
        let resolve = format!("{name}:443:{far}");
        hythe.guest.output(&[
            "curl",
            "-sS",
            "-m",
            "20",
            "--cacert",
            ca,
            "--resolve",
            &resolve,
            &format!("https://{name}/"),
        ])
    };
    let mut connection = None;
    assert!(!curl("bad.direct.test").status.success());
    secure.set_nonblocking(true).unwrap();
    assert_eq!(secure.accept().unwrap_err().kind(), ErrorKind::WouldBlock, "nobody has called");
    secure.set_nonblocking(false).unwrap();
    std::thread::scope(|scope| {
        let client = scope.spawn(|| {
            let guest = hythe.guest.connect((far, 443)).unwrap();
            (&guest).write_all(b"neither TLS nor a request\r\n").unwrap();
            guest
        });
        let (mut other, _) = accept(&secure);
        let guest = client.join().unwrap();
        let mut bytes = [0; 27];
        std::io::Read::read_exact(&mut other, &mut bytes).unwrap();
        assert_eq!(&bytes, b"neither TLS nor a request\r\n");
        transfer(&guest, &other, 1, 1_000_000);
        connection = Some((guest, other));
    });
    wait_until("lines about what was refused", || hythe.log().matches("bad.direct.test").count() >= 2);
    hythe.stop().assert_clean(0);
}

#[test]
fn tls_that_is_refused_is_reset_behind_its_greeting() {
    let company = Company::new();
    let proxy = Server::mirror(&company.site.far, Family::V4.far(), PORT, "proxy");
    let hythe = company.hythe(ANY).options(BY_PROXY).words(&["--egress", "deny *:443 text=x"]).run();
    let guest = hythe.guest.connect((Company::origin(Family::V4), 443));
    match guest {
        // A rule about every name needs no greeting.
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionRefused),
        Ok(guest) => {
            (&guest).write_all(b"\x16\x03\x01 and so on").unwrap();
            expect_reset(&guest);
        }
    }
    assert_eq!(proxy.connections(), 0);
    hythe.stop().assert_clean(0);
}

#[test]
fn names_that_are_refused_have_the_answer_that_the_rule_says() {
    let company = Company::new();
    let hythe = company
        .hythe(ANY)
        .words(&["--egress", "deny one.origin.test", "--egress", "deny .two.origin.test dns=nxdomain"])
        .words(&[
            "--egress",
            "deny three.origin.test dns=192.0.2.80",
            "--egress",
            "deny four.origin.test dns=resolve",
        ])
        .words(&["--egress", "deny five.origin.test:8080"])
        .run();
    for (words, status, address) in [
        ("one.origin.test A", "REFUSED", None),
        ("one.origin.test AAAA", "REFUSED", None),
        ("ONE.origin.test TXT", "REFUSED", None),
        ("a.two.origin.test A", "NXDOMAIN", None),
        ("a.b.two.origin.test AAAA", "NXDOMAIN", None),
        ("three.origin.test A", "NOERROR", Some("192.0.2.80")),
        ("three.origin.test AAAA", "NOERROR", None),
        ("four.origin.test A", "NOERROR", Some("198.18.9.1")),
        // It is not refused on every port.
        ("five.origin.test A", "NOERROR", Some("198.18.9.1")),
        ("web.origin.test A", "NOERROR", Some("198.18.9.1")),
        ("+tcp one.origin.test A", "REFUSED", None),
    ] {
        let said = dig(&hythe, words);
        assert!(said.contains(&format!("status: {status}")), "{words}: {said}");
        match address {
            Some(address) => assert!(said.contains(address), "{words}: {said}"),
            None => assert!(!said.contains("\tA\t") && !said.contains("\tAAAA\t"), "{words}: {said}"),
        }
    }
    let asked: Vec<String> = company.names.asked().into_iter().map(|asked| asked.name).collect();
    assert!(
        !asked.iter().any(|name| name.starts_with("one.") || name.ends_with("two.origin.test")),
        "{asked:?}"
    );
    hythe.stop().assert_clean(0);
}

#[test]
fn rules_are_of_a_guest_or_of_all_and_are_explained() {
    let company = Company::new();
    let _direct = Server::mirror(&company.site.far, Family::V4.far(), 80, "direct");
    let control = Control::new();
    let hythe = company
        .hythe(ANY)
        .options("--hostname web")
        .options(&control.option())
        .words(&[
            "--egress",
            "deny a.direct.test guest=web dns=resolve text=not for web",
            "--egress",
            "deny b.direct.test guest=other",
        ])
        .run();
    let far = Family::V4.far();
    assert_eq!(ask(&hythe, far, "a.direct.test").0, 403);
    assert_eq!(ask(&hythe, far, "b.direct.test").0, 200);
    let path = control.path.display().to_string();
    let explain = |words: &[&str]| {
        let output = company.site.host.output(&[&[PROGRAM, "explain", "--api", &path], words].concat());
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    };
    let said = explain(&["a.direct.test:80"]);
    assert!(said.contains("deny a.direct.test") && said.contains("not for web"), "{said}");
    let said = explain(&["c.direct.test:80"]);
    assert!(!said.contains("deny"), "{said}");
    hythe.stop().assert_clean(0);
}

#[test]
fn rules_that_are_none_are_told_at_the_start() {
    let company = Company::new();
    for rule in [
        "forbid x.test",
        "deny",
        "deny x.test/sctp",
        "deny x.test:99999",
        "allow x.test text=no",
        "deny 10.0.0.0/40",
        "deny x.test dns=maybe",
    ] {
        let ended = company.hythe(ANY).words(&["--egress", rule]).to_the_end("run", &["--", "true"]);
        assert_eq!(ended.status.code(), Some(125), "{rule}: {}", ended.stderr);
        assert!(ended.one_line().contains("--egress"), "{rule}: {}", ended.stderr);
    }
}
