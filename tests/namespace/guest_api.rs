//! What the guest asks of hythe at the gateway.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::publishing::{Control, printed};
use crate::rig::bytes::{accept, echo, expect_echo, transfer};
use crate::rig::cell::{ANY, on_every_cell};
use crate::rig::hythe::Hythe;
use crate::rig::netns::Netns;
use crate::rig::process;
use crate::rig::site::{FAMILIES, Family, Site};
use crate::rig::wait::{PATIENCE, pause, wait_until};

/// The port of the API.
const API: u16 = 80;

/// A connection of the guest's to the gateway, and what it has asked for.
struct Call(BufReader<TcpStream>);

impl Call {
    fn new(guest: &Netns, family: Family, request: &str) -> Self {
        let stream = guest.connect((family.gateway(), API)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        (&stream).write_all(request.as_bytes()).unwrap();
        Self(BufReader::new(stream))
    }

    fn get(guest: &Netns, family: Family, path: &str) -> Self {
        Self::new(
            guest,
            family,
            &format!("GET {path} HTTP/1.1\r\nhost: gateway.docker.internal\r\nconnection: close\r\n\r\n"),
        )
    }

    fn post(guest: &Netns, family: Family, path: &str, body: &str) -> Self {
        let len = body.len();
        Self::new(
            guest,
            family,
            &format!(
                "POST {path} HTTP/1.1\r\nhost: gateway.docker.internal\r\ncontent-length: {len}\r\n\r\n{body}"
            ),
        )
    }

    /// Ports that are held, once they are there.
    fn hold(guest: &Netns, family: Family, spec: &str) -> Self {
        let body = format!("{{\"publish\": [\"{spec}\"], \"while_connected\": true}}");
        let mut call = Self::post(guest, family, "/v1/ports", &body);
        let said = call.until("]}");
        assert!(said.starts_with("HTTP/1.1 201 "), "{said}");
        call
    }

    /// What is said up to a line that ends so.
    fn until(&mut self, end: &str) -> String {
        let mut said = String::new();
        while !said.trim_end().ends_with(end) {
            assert!(self.0.read_line(&mut said).unwrap() > 0, "nothing more after {said}");
        }
        said
    }

    /// All that is said until the end.
    fn end(mut self) -> std::io::Result<String> {
        let mut said = String::new();
        self.0.read_to_string(&mut said)?;
        Ok(said)
    }
}

fn is_refused(client: &Netns, to: impl Into<SocketAddr>) -> bool {
    client.connect(to).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

on_every_cell! {
    a_port_is_published_as_long_as_the_guest_holds_it(cell) {
        let site = Site::new();
        let hythe = Hythe::of(&site.host, cell).options("--guest-api publish").run();
        for family in FAMILIES {
            let server = hythe.guest.listen(family.any(), 80);
            let spec = if family == Family::V4 { "0.0.0.0:8000:80" } else { "[::]:8000:80" };
            let held = Call::hold(&hythe.guest, family, spec);
            let clients = [(&site.far, family.host()), (&site.host, family.loopback())];
            let connected = clients.map(|(client, to)| {
                let client = client.connect((to, 8000)).unwrap();
                (client, accept(&server).0)
            });
            drop(held);
            wait_until("the port to be closed", || is_refused(&site.far, (family.host(), 8000)));
            // What came through it goes on.
            for (client, served) in &connected {
                transfer(client, served, 1, 100_000);
                transfer(served, client, 2, 100_000);
            }
        }
        hythe.stop().assert_clean(0);
    }
}

#[test]
fn nobody_answers_at_the_gateway_unless_it_is_allowed() {
    let site = Site::new();
    let hythe = Hythe::of(&site.host, ANY).run();
    for family in FAMILIES {
        assert!(is_refused(&hythe.guest, (family.gateway(), API)));
    }
    hythe.stop().assert_clean(0);
    let hythe = Hythe::of(&site.host, ANY).options("--guest-api status").run();
    let status = Call::get(&hythe.guest, Family::V4, "/v1/status").end().unwrap();
    assert!(status.contains("\"engine\""), "{status}");
    let refused =
        Call::post(&hythe.guest, Family::V4, "/v1/ports", "{\"publish\": [\"8000:80\"]}").until("}");
    assert!(refused.starts_with("HTTP/1.1 403 ") && refused.contains("--guest-api publish"), "{refused}");
    hythe.stop().assert_clean(0);
}

#[test]
fn the_guest_and_the_host_see_the_same_ports_and_the_guest_its_own_alone() {
    let site = Site::new();
    let control = Control::new();
    let options = format!(
        "--guest-api publish --guest-api-ports 8000-8999 --guest-api-max-ports 4 {} -p 7000:70",
        control.option()
    );
    let hythe = Hythe::of(&site.host, ANY).options(&options).run();
    let guest = &hythe.guest;
    let ports = || printed(&control.hythe(&site.host, "ports", &[]));
    let held = Call::hold(guest, Family::V4, "8000:80");
    assert_eq!(ports().lines().filter(|line| line.contains("80/tcp")).count(), 2, "{}", ports());
    let seen = Call::get(guest, Family::V6, "/v1/ports").end().unwrap();
    assert!(seen.contains("8000") && !seen.contains("7000"), "{seen}");
    for (spec, words) in [
        ("7000:70", "from 8000 to 8999"),
        ("8000:81", "port is already allocated"),
        ("8001-8002:80-81", "4 ports at a time"),
    ] {
        let body = format!("{{\"publish\": [\"{spec}\"]}}");
        let refused = Call::post(guest, Family::V4, "/v1/ports", &body).until("}");
        assert!(refused.contains(words), "{refused}");
    }
    // The host's user may take it back: the guest's answer ends in order.
    printed(&control.hythe(&site.host, "unpublish", &["8000:80"]));
    let mut held = held;
    held.until("\n0");
    assert!(is_refused(&site.far, (Family::V4.host(), 8000)));
    assert_eq!(ports().lines().count(), 2);
    // hythe's end is told apart from that: the answer breaks off.
    let held = Call::hold(guest, Family::V4, "8000:80");
    hythe.signal(Signal::SIGTERM);
    let broken = held.end();
    assert!(broken.as_ref().is_err() || !broken.as_ref().unwrap().ends_with("0\r\n\r\n"), "{broken:?}");
    hythe.end();
}

#[test]
fn curl_asks_at_the_gateways_name() {
    let site = Site::new();
    let script = "
        set -e
        api=http://gateway.docker.internal
        curl -sSf $api/v1/ports -H 'content-type: application/json' -d '{\"publish\": [\"8000:80\"]}' >/dev/null
        curl -sSf http://gateway.containers.internal/services/forwarder/expose -d '{\"local\": \":8001\", \"remote\": \":81\"}'
        curl -sSf $api/services/forwarder/all
        curl -sS -w '%{http_code}' $api/services/forwarder/expose -d '{\"local\": \"/x\", \"remote\": \":81\", \"protocol\": \"unix\"}'
        curl -sSf $api/services/forwarder/unexpose -d '{\"local\": \":8001\"}'
        curl -sSf -X DELETE $api/v1/ports?spec=8000:80 >/dev/null
        curl -sSf $api/v1/ports
    ";
    let ended = Hythe::of(&site.host, ANY)
        .options("--guest-api publish")
        .to_the_end("run", &["--", "sh", "-c", script]);
    ended.assert_clean(0);
    let all = r#"[{"local":"0.0.0.0:8000","remote":"192.168.65.3:80","protocol":"tcp"},{"local":"[::]:8000","remote":"[fdc4:f303:9324::3]:80","protocol":"tcp"},{"local":"0.0.0.0:8001","remote":"192.168.65.3:81","protocol":"tcp"},{"local":"[::]:8001","remote":"[fdc4:f303:9324::3]:81","protocol":"tcp"}]"#;
    let (first, rest) =
        ended.stdout.split_once("]protocol unix: ").unwrap_or_else(|| panic!("{}", ended.stdout));
    assert_eq!(format!("{first}]"), all);
    assert!(rest.contains("file system") && rest.ends_with("500{\"ports\":[]}"), "{rest}");
}

#[test]
fn a_guest_that_asks_too_much_is_sent_away_and_disturbs_nobody() {
    const HELD: usize = 64;
    let site = Site::new();
    let control = Control::new();
    let options = format!("--guest-api publish --guest-api-max-ports {HELD} {} -p 7000:70", control.option());
    let hythe = Hythe::of(&site.host, ANY).options(&options).run();
    let guest = &hythe.guest;
    let server = echo(guest.listen(Family::V4.any(), 70), 1);
    let client = site.far.connect((Family::V4.host(), 7000)).unwrap();
    let before = process::resident_kib(hythe.pid());
    let callers: Vec<TcpStream> =
        (0..1000).map(|_| guest.connect((Family::V4.gateway(), API)).unwrap()).collect();
    for mut caller in &callers {
        let _ = caller.write_all(b"POST /v1/ports HTTP/1.1\r\ncontent-length: 65536\r\n\r\n{");
    }
    // Those that have a seat are told that their request does not come to its end; so many others are told that there is none.
    let [mut seated, mut sent_away] = [0; 2];
    for mut caller in &callers {
        caller.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut said = [0; 12];
        match caller.read_exact(&mut said).map(|()| &said[9..]) {
            Ok(b"408") => seated += 1,
            Ok(b"503") => sent_away += 1,
            other => assert!(other.is_err(), "{other:?}"),
        }
    }
    assert_eq!(seated, HELD + 16);
    assert!(sent_away >= 64, "{sent_away}");
    expect_echo(&client, b"hello");
    let grown = process::resident_kib(hythe.pid()).saturating_sub(before);
    assert!(grown < 32 << 10, "{grown} KiB");
    // The host's door has seats of its own.
    assert_eq!(printed(&control.hythe(&site.host, "ports", &[])).lines().count(), 2);
    drop(callers);
    wait_until("seats to be free", || {
        pause(Duration::from_millis(50));
        Call::get(guest, Family::V4, "/v1/status").end().is_ok_and(|said| said.starts_with("HTTP/1.1 200"))
    });
    drop(client);
    server.finish();
    hythe.stop().assert_clean(0);
}
