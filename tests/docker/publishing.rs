//! Ports of containers are ports of the host.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::rig::netns::Netns;
use crate::rig::site::{FAMILIES, Family};
use crate::rig::socket;
use crate::rig::wait::{PATIENCE, wait_for, wait_until, wait_within};
use crate::world::{expect_page_at, page_at, with_both_engines};

/// How long a port may be open that is not published any more.
const SOON: Duration = Duration::from_secs(1);

fn places<const N: usize>(expected: [&str; N]) -> BTreeSet<String> {
    expected.map(str::to_string).into()
}

/// A datagram to a container's port 53 is answered; each try is a conversation of its own.
fn answers_datagrams(client: &Netns, address: IpAddr, port: u16) -> bool {
    let any = if address.is_ipv4() { Family::V4.any() } else { Family::V6.any() };
    let socket = client.udp(any, 0);
    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut answer = [0; 64];
    socket.send_to(b"question", SocketAddr::new(address, port)).is_ok()
        && socket::receive(&socket, &mut answer)
            .is_ok_and(|(length, _)| &answer[..length] == b"datagrams are served\n")
}

fn expect_datagrams(client: &Netns, address: IpAddr, port: u16) {
    let answered = wait_within(PATIENCE, || answers_datagrams(client, address, port).then_some(()));
    assert!(answered.is_some(), "nobody answers datagrams at {address} port {port}");
}

with_both_engines! {
    the_documented_commands_work_word_for_word(world) {
        for (line, port, name) in [
            ("docker run -p 80:80 -d nginx", 80, None),
            ("docker run -p 8000:80 -d nginx", 8000, None),
            ("docker run -d -p 80:80 --name webserver nginx", 80, Some("webserver")),
        ] {
            let id = world.engine.line(line);
            let container = name.unwrap_or(id.trim());
            world.expect_page(port);
            assert_eq!(world.engine.shims().len(), 2, "{line}");
            assert_eq!(world.places(), places([&format!("0.0.0.0:{port}/tcp"), &format!("[::]:{port}/tcp")]), "{line}");
            assert_eq!(world.places_of(container), world.places(), "{line}");
            world.engine.docker(&["rm", "-f", container]);
            world.expect_closed_within(port, SOON);
            assert_eq!(world.published(), BTreeSet::new(), "{line}");
            assert_eq!(world.engine.shims(), Vec::<i32>::new(), "{line}");
        }

        let mut client = world.engine.foreground("docker run --publish 8000:80 --name webserver nginx");
        world.expect_page(8000);
        world.engine.docker(&["rm", "-f", "webserver"]);
        world.expect_closed_within(8000, SOON);
        wait_for("docker run to end", || client.try_wait().unwrap());

        world.engine.line("docker run -d -P --name webserver nginx");
        let chosen = world.places_of("webserver");
        assert_eq!(chosen.len(), 2, "{chosen:?}");
        assert_eq!(world.places(), chosen);
        let port = chosen.first().unwrap().rsplit_once(':').unwrap().1.strip_suffix("/tcp").unwrap().parse().unwrap();
        world.expect_page(port);
        world.engine.docker(&["rm", "-f", "webserver"]);
        world.expect_closed_within(port, SOON);
    }

    a_port_of_one_address_is_published_there_only(world) {
        let host = Family::V4.host();
        world.engine.docker(&[
            "run", "-d", "--name", "webserver",
            "-p", "127.0.0.1:8001:80", "-p", "[::1]:8001:80", "-p", "127.0.0.1:8053:53/udp",
            "-p", &format!("{host}:8002:80"), "-p", "8003:80", "nginx",
        ]);
        let expected = ["127.0.0.1:8001/tcp", "[::1]:8001/tcp", "127.0.0.1:8053/udp", &format!("{host}:8002/tcp"), "0.0.0.0:8003/tcp", "[::]:8003/tcp"];
        assert_eq!(world.places(), places(expected));
        for family in FAMILIES {
            expect_page_at(&world.site.host, family.loopback(), 8001);
            assert!(page_at(&world.site.host, family.host(), 8001).is_err());
            assert!(page_at(&world.site.far, family.host(), 8001).is_err());
        }
        expect_datagrams(&world.site.host, Family::V4.loopback(), 8053);
        assert!(!answers_datagrams(&world.site.far, host, 8053));
        expect_page_at(&world.site.far, host, 8002);
        assert!(page_at(&world.site.host, Family::V4.loopback(), 8002).is_err());
        // Another container reaches the guest's end of a port of all addresses, but not of one of one address.
        let own = Family::V4.guest();
        for line in world.published().iter().filter(|line| !line.contains("[::") && !line.contains("/udp")) {
            let (port, place) = line.split_once("/tcp -> ").unwrap();
            let output = world.engine.output(&[
                "run", "--rm", "nginx", "wget", "-q", "-O", "-", &format!("http://{own}:{port}/"),
            ]);
            assert_eq!(output.status.success(), place.starts_with("0.0.0.0:"), "{line}: {output:?}");
        }
        world.engine.docker(&["rm", "-f", "webserver"]);
        assert!(wait_within(SOON, || world.published().is_empty().then_some(())).is_some());
    }

    datagrams_and_ranges_are_published_in_both_families(world) {
        world.engine.docker(&[
            "run", "-d", "--name", "webserver", "-p", "5353:53/udp", "-p", "9000-9003:80-83", "nginx",
        ]);
        assert_eq!(world.places().len(), 2 + 8);
        assert_eq!(world.places_of("webserver"), world.places());
        for family in FAMILIES {
            expect_datagrams(&world.site.host, family.loopback(), 5353);
            expect_datagrams(&world.site.far, family.host(), 5353);
        }
        world.expect_page(9000);
        world.engine.docker(&["rm", "-f", "webserver"]);
        assert!(wait_within(SOON, || world.published().is_empty().then_some(())).is_some());
    }

    a_port_that_the_host_has_not_free_is_refused_in_hythes_words(world) {
        let taken = world.site.host.listen(Family::V4.any(), 8000);
        let output = world.engine.output(&["run", "-d", "--name", "webserver", "-p", "8000:80", "nginx"]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{said}");
        assert!(said.contains("Bind for 0.0.0.0:8000 failed: address already in use"), "{said}");
        assert_eq!(world.published(), BTreeSet::new());
        assert_eq!(world.engine.docker(&["ps", "--quiet"]), "");
        assert_eq!(world.engine.shims(), Vec::<i32>::new());
        drop(taken);
        world.engine.docker(&["start", "webserver"]);
        world.expect_page(8000);
        assert_eq!(world.places(), places(["0.0.0.0:8000/tcp", "[::]:8000/tcp"]));
    }

    a_container_that_is_restarted_has_its_port_again(world) {
        world.engine.line("docker run -d -p 8000:80 --name webserver nginx");
        for _ in 0..5 {
            world.engine.docker(&["restart", "--time", "0", "webserver"]);
            world.expect_page(8000);
        }
        assert_eq!(world.places(), places(["0.0.0.0:8000/tcp", "[::]:8000/tcp"]));
    }
}

/// A guest that may not publish: hythe does not answer it.
fn is_told_what_to_do(version: crate::engine::Version) {
    let world = crate::world::World::with_options(version, "");
    let output = world.engine.output(&["run", "-d", "--name", "webserver", "-p", "8000:80", "nginx"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{said}");
    assert!(said.contains("start hythe with --guest-api publish"), "{said}");
    // What publishes nothing works.
    world.engine.docker(&["run", "-d", "--name", "quiet", "nginx"]);
    wait_until("a server", || {
        world.engine.output(&["exec", "quiet", "wget", "-q", "-O-", "http://127.0.0.1/"]).status.success()
    });
}

#[test]
fn who_may_not_publish_is_told_what_to_do_engine_26() {
    is_told_what_to_do(crate::engine::Version::V26);
}

#[test]
fn who_may_not_publish_is_told_what_to_do_engine_28() {
    is_told_what_to_do(crate::engine::Version::V28);
}
