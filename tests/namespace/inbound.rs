//! Published ports, the host's own services as the guest sees them, and what a guest may not reach.

use std::io::{ErrorKind, Read};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use crate::rig::bytes::{accept, echo, expect_echo, expect_end, expect_reset, transfer};
use crate::rig::cell::{ANY, on_every_cell};
use crate::rig::hythe::Hythe;
use crate::rig::netns::Netns;
use crate::rig::site::{FAMILIES, Family, Site};
use crate::rig::socket;
use crate::rig::wait::{wait_for, wait_until};

/// A connection through a published port, both ends of it.
fn call(
    client: &Netns,
    to: impl Into<SocketAddr>,
    listener: &TcpListener,
) -> (TcpStream, TcpStream, SocketAddr) {
    let to = to.into();
    let called = client.connect(to).unwrap_or_else(|error| panic!("{to}: {error}"));
    let (accepted, peer) = accept(listener);
    (called, accepted, peer)
}

fn exchange(one: &TcpStream, other: &TcpStream) {
    transfer(one, other, 1, 100_000);
    transfer(other, one, 2, 100_000);
}

fn refused(client: &Netns, to: impl Into<SocketAddr>) {
    let to = to.into();
    match client.connect(to) {
        Ok(_) => panic!("{to} is open"),
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}: {error}"),
    }
}

/// A datagram to a service that gives it back, and the answer from where it was sent.
fn expect_datagram_echo(client: &UdpSocket, to: SocketAddr, server: &UdpSocket) -> SocketAddr {
    let (message, mut bytes) = (to.to_string(), [0; 100]);
    client.send_to(message.as_bytes(), to).unwrap();
    let (len, peer) = socket::receive(server, &mut bytes).unwrap_or_else(|error| panic!("{to}: {error}"));
    assert_eq!(&bytes[..len], message.as_bytes());
    server.send_to(&bytes[..len], peer).unwrap();
    let (len, from) =
        socket::receive(client, &mut bytes).unwrap_or_else(|error| panic!("answer of {to}: {error}"));
    assert_eq!((&bytes[..len], from), (message.as_bytes(), to));
    peer
}

on_every_cell! {
    every_form_of_a_published_tcp_port_leads_to_the_guest(cell) {
        let site = Site::new();
        let options = "-p 8000:80 -p 127.0.0.1:8001:81/tcp -p [::1]:8001:81 -p 8100-8102:82-84 -p 10.77.0.2:8200:85";
        let hythe = Hythe::of(&site.host, cell).options(options).run();
        for family in FAMILIES {
            let listen = |port| hythe.guest.listen(family.any(), port);
            let (everywhere, loopback, range) = (listen(80), listen(81), [82, 83, 84].map(listen));
            for (client, to) in [(&site.far, family.host()), (&site.host, family.loopback())] {
                let (one, other, _) = call(client, (to, 8000), &everywhere);
                exchange(&one, &other);
                for (port, listener) in (8100..).zip(&range) {
                    let (one, other, _) = call(client, (to, port), listener);
                    exchange(&one, &other);
                }
            }
            let (one, other, _) = call(&site.host, (family.loopback(), 8001), &loopback);
            exchange(&one, &other);
            refused(&site.far, (family.host(), 8001));
        }
        let listener = hythe.guest.listen(Family::V4.any(), 85);
        let (one, other, _) = call(&site.far, (Family::V4.host(), 8200), &listener);
        exchange(&one, &other);
        refused(&site.far, (Family::V6.host(), 8200));
        refused(&site.host, (Family::V4.loopback(), 8200));
        hythe.stop().assert_clean(0);
    }
}

on_every_cell! {
    every_form_of_a_published_udp_port_leads_to_the_guest(cell) {
        let site = Site::new();
        let options = "-p 9000-9003:90-93/udp -p 127.0.0.1:9100:94/udp -p [::1]:9100:94/udp";
        let hythe = Hythe::of(&site.host, cell).options(options).run();
        for family in FAMILIES {
            let client = site.far.udp(family.any(), 0);
            let near = site.host.udp(family.any(), 0);
            for (port, guest_port) in (9000..9004).zip(90..) {
                let server = hythe.guest.udp(family.any(), guest_port);
                let to = SocketAddr::new(family.host(), port);
                let peer = expect_datagram_echo(&client, to, &server);
                assert_eq!(peer, SocketAddr::new(family.next_hop(), client.local_addr().unwrap().port()));
                // Who could not be answered under its own address is shown under the gateway's.
                let to = SocketAddr::new(family.loopback(), port);
                let peer = expect_datagram_echo(&near, to, &server);
                assert_eq!(peer.ip(), family.gateway());
            }
            let server = hythe.guest.udp(family.any(), 94);
            let to = SocketAddr::new(family.loopback(), 9100);
            expect_datagram_echo(&near, to, &server);
            client.connect((family.host(), 9100)).unwrap();
            client.send(b"anybody there").unwrap();
            assert_eq!(socket::receive(&client, &mut [0; 20]).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        }
        hythe.stop().assert_clean(0);
    }
}

on_every_cell! {
    a_client_is_seen_under_its_own_address(cell) {
        let site = Site::new();
        let hythe = Hythe::of(&site.host, cell).options("-p 8000:80").run();
        for family in FAMILIES {
            let listener = hythe.guest.listen(family.any(), 80);
            let (one, other, peer) = call(&site.far, (family.host(), 8000), &listener);
            assert_eq!(peer, one.local_addr().unwrap());
            assert_eq!(peer.ip(), family.next_hop());
            exchange(&one, &other);
            // The host's own loopback is not the guest's: such a client comes from the guest's own address, once its worker
            // has sockets of the guest's namespace, and until then from the gateway's.
            let (one, other) = wait_for("a client to be joined to the guest's own socket", || {
                let (one, other, peer) = call(&site.host, (family.loopback(), 8000), &listener);
                assert!([family.guest(), family.gateway()].contains(&peer.ip()), "{peer}");
                (peer.ip() == family.guest()).then_some((one, other))
            });
            exchange(&one, &other);
            drop(one);
            expect_end(&other);
        }
        let counters = hythe.counters();
        assert_eq!(counters.get("tcp_joined"), 2);
        // Both ways of both, and nothing of the clients that came too early: those sent nothing.
        assert_eq!(counters.get("tcp_bytes_joined"), 2 * 200_000);
        hythe.stop().assert_clean(0);
    }
}

on_every_cell! {
    clients_of_chosen_networks_are_shown_under_the_gateways_address(cell) {
        let site = Site::new();
        let options = "-p 8000:80 --snat-from 10.77.0.0/24 --snat-from fd77::/64";
        let hythe = Hythe::of(&site.host, cell).options(options).run();
        for family in FAMILIES {
            let listener = hythe.guest.listen(family.any(), 80);
            let (one, other, peer) = call(&site.far, (family.host(), 8000), &listener);
            assert_eq!(peer.ip(), family.gateway());
            exchange(&one, &other);
            // Of another network, in the same place.
            let stream = site.far.run(|| {
                let socket = socket2::Socket::new(
                    socket2::Domain::for_address((family.far(), 0).into()),
                    socket2::Type::STREAM,
                    None,
                )?;
                socket.bind(&SocketAddr::new(family.far(), 0).into())?;
                socket.connect(&SocketAddr::new(family.host(), 8000).into())?;
                std::io::Result::Ok(TcpStream::from(socket))
            });
            let stream = stream.unwrap();
            let (other, peer) = accept(&listener);
            assert_eq!(peer.ip(), family.far());
            exchange(&stream, &other);
        }
        hythe.stop().assert_clean(0);
    }
}

#[test]
fn a_plain_user_may_publish_ports_above_1023() {
    let site = Site::new();
    let hythe = Hythe::of(&site.host, ANY.as_nobody()).options("-p 8000:80 -p 9000:90/udp").run();
    for family in FAMILIES {
        let listener = hythe.guest.listen(family.any(), 80);
        let (one, other, peer) = call(&site.far, (family.host(), 8000), &listener);
        assert_eq!(peer, one.local_addr().unwrap());
        exchange(&one, &other);
        let (one, other, peer) = call(&site.host, (family.loopback(), 8000), &listener);
        assert!([family.guest(), family.gateway()].contains(&peer.ip()), "{peer}");
        exchange(&one, &other);
        let server = hythe.guest.udp(family.any(), 90);
        let client = site.far.udp(family.any(), 0);
        expect_datagram_echo(&client, SocketAddr::new(family.host(), 9000), &server);
    }
    hythe.stop().assert_clean(0);
}

on_every_cell! {
    a_port_shows_what_the_guest_shows(cell) {
        let site = Site::new();
        let hythe = Hythe::of(&site.host, cell).options("-p 8000:80").run();
        for (client, family, to) in [
            (&site.far, Family::V4, Family::V4.host()),
            (&site.far, Family::V6, Family::V6.host()),
            (&site.host, Family::V4, Family::V4.loopback()),
            (&site.host, Family::V6, Family::V6.loopback()),
        ] {
            // Its first client finds the port out: open, then reset, since nobody could be asked before.
            if let Ok(stream) = client.connect((to, 8000)) {
                expect_reset(&stream);
            }
            wait_until("the port to refuse", || {
                client.connect((to, 8000)).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
            });
            let begun = Instant::now();
            for _ in 0..20 {
                refused(client, (to, 8000));
            }
            assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
            // It is nobody else's for all that.
            let taken = site.host.run(|| TcpListener::bind((family.any(), 8000)));
            assert_eq!(taken.unwrap_err().kind(), ErrorKind::AddrInUse);

            let listener = hythe.guest.listen(family.any(), 80);
            let mut stream = None;
            wait_until("the port to open", || {
                stream = client.connect((to, 8000)).ok();
                stream.is_some()
            });
            let (accepted, _) = accept_from(&listener, stream.as_ref().unwrap());
            exchange(stream.as_ref().unwrap(), &accepted);
            drop(listener);
        }
        hythe.stop().assert_clean(0);
    }
}

/// The client's connection among those that were accepted: a probe may have come before it.
fn accept_from(listener: &TcpListener, client: &TcpStream) -> (TcpStream, SocketAddr) {
    use std::io::Write;
    (&mut &*client).write_all(b"it is I").unwrap();
    loop {
        let (accepted, peer) = accept(listener);
        let mut bytes = [0; 7];
        if (&mut &accepted).read_exact(&mut bytes).is_ok() {
            assert_eq!(&bytes, b"it is I");
            return (accepted, peer);
        }
    }
}

on_every_cell! {
    a_client_whose_network_the_guest_has_itself_is_answered_all_the_same(cell) {
        let site = Site::new();
        let hythe = Hythe::of(&site.host, cell).options("-p 8000:80").run();
        // A bridge of the guest's own, like docker0, has the network of the host's wire.
        hythe.guest.ip(
            "link add docker0 type bridge
             link add port0 type veth peer name port1
             link set port0 master docker0
             link set port1 up
             link set port0 up
             addr add 10.77.0.254/24 dev docker0
             addr add fd77::254/64 dev docker0 nodad
             link set docker0 up",
        );
        for family in FAMILIES {
            let listener = hythe.guest.listen(family.any(), 80);
            let (one, other, peer) = call(&site.far, (family.host(), 8000), &listener);
            assert_eq!(peer.ip(), family.gateway());
            exchange(&one, &other);
            // That is remembered: the next one need not wait for a second.
            let begun = Instant::now();
            for _ in 0..5 {
                let (one, other, peer) = call(&site.far, (family.host(), 8000), &listener);
                assert_eq!(peer.ip(), family.gateway());
                exchange(&one, &other);
            }
            assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
        }
        hythe.stop().assert_clean(0);
    }
}

on_every_cell! {
    a_guest_reaches_its_own_published_port_through_the_host(cell) {
        let site = Site::new();
        let hythe = Hythe::of(&site.host, cell).options("-p 8000:80 -p 9000:90/udp").run();
        for family in FAMILIES {
            let listener = hythe.guest.listen(family.any(), 80);
            let server = hythe.guest.udp(family.any(), 90);
            for to in [family.host_internal(), family.host()] {
                let (one, other, _) = call(&hythe.guest, (to, 8000), &listener);
                exchange(&one, &other);
                drop(one);
                expect_end(&other);
                let client = hythe.guest.udp(family.any(), 0);
                expect_datagram_echo(&client, SocketAddr::new(to, 9000), &server);
            }
        }
        hythe.stop().assert_clean(0);
    }
}

on_every_cell! {
    a_guest_that_calls_itself_through_the_host_without_listening_is_refused_and_does_not_loop(cell) {
        let site = Site::new();
        // Both ports are the same, as if the call could come back for ever.
        let hythe = Hythe::of(&site.host, cell).options("-p 8000:8000").run();
        for family in FAMILIES {
            for to in [family.host_internal(), family.host()] {
                if let Ok(stream) = hythe.guest.connect((to, 8000)) {
                    expect_reset(&stream);
                }
                wait_until("the port to refuse", || {
                    hythe.guest.connect((to, 8000)).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
                });
            }
        }
        let counters = hythe.counters();
        assert!(counters.get("tcp_opened_out") < 100, "{counters:?}");
        hythe.stop().assert_clean(0);
    }
}

on_every_cell! {
    services_on_the_hosts_loopback_are_reached_by_its_name(cell) {
        let site = Site::new();
        let hythe = Hythe::of(&site.host, cell).run();
        // A port of its own each: one that was closed may be open for a moment still, in a child of a test beside this
        // one that has not got to its exec(3).
        for (called, first) in FAMILIES.into_iter().zip([7010, 7020]) {
            for (port, served) in (first..).zip(FAMILIES) {
                // 127.0.0.1, then ::1: whichever has the service.
                let listener = site.host.listen(served.loopback(), port);
                let stream = hythe.guest.connect((called.host_internal(), port));
                let stream = stream.unwrap_or_else(|error| panic!("{called:?} to {served:?}: {error}"));
                let (accepted, peer) = accept(&listener);
                assert_eq!(peer.ip(), served.loopback());
                exchange(&stream, &accepted);
            }
            let server = site.host.udp(called.loopback(), 7001);
            let client = hythe.guest.udp(called.any(), 0);
            let peer = expect_datagram_echo(&client, SocketAddr::new(called.host_internal(), 7001), &server);
            assert_eq!(peer.ip(), called.loopback());
            refused(&hythe.guest, (called.host_internal(), 7002));
            // What listens on the wire only is reached by that address.
            let listener = site.host.listen(called.host(), 7003);
            let (one, other, _) = call(&hythe.guest, (called.host(), 7003), &listener);
            exchange(&one, &other);
            refused(&hythe.guest, (called.host_internal(), 7003));
        }
        hythe.stop().assert_clean(0);
    }
}

/// What a guest may not reach is refused soon, by reset or ICMP, and nobody hears of it.
fn forbidden(guest: &Netns, to: SocketAddr, listener: &TcpListener, server: &UdpSocket) {
    let begun = Instant::now();
    let error = guest.connect(to).map(|_| ()).expect_err("a refusal");
    let kinds = [ErrorKind::ConnectionRefused, ErrorKind::HostUnreachable, ErrorKind::PermissionDenied];
    // What the standard library says of a socket that was closed before it was looked at has no number.
    assert!(kinds.contains(&error.kind()) || error.raw_os_error().is_none(), "{to}: {error}");
    let any: IpAddr = if to.is_ipv4() { Family::V4.any() } else { Family::V6.any() };
    let client = guest.udp(any, 0);
    guest.run(|| client.connect(to)).unwrap();
    client.send(b"anybody there").unwrap();
    let error = socket::receive(&client, &mut [0; 20]).expect_err("a refusal");
    assert!(kinds.contains(&error.kind()), "{to}: {error}");
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    listener.set_nonblocking(true).unwrap();
    assert_eq!(listener.accept().map(|_| ()).unwrap_err().kind(), ErrorKind::WouldBlock, "{to} was reached");
    server.set_nonblocking(true).unwrap();
    assert_eq!(
        socket::receive(server, &mut [0; 20]).unwrap_err().kind(),
        ErrorKind::WouldBlock,
        "{to} was reached"
    );
}

on_every_cell! {
    what_is_switched_off_is_refused(cell) {
        let site = Site::new();
        for (option, names) in [
            ("--no-host-loopback", FAMILIES.map(|family| (family.host_internal(), family.loopback()))),
            ("--no-host-addresses", FAMILIES.map(|family| (family.host(), family.host()))),
        ] {
            let hythe = Hythe::of(&site.host, cell).options(option).run();
            for ((to, serving), family) in names.into_iter().zip(FAMILIES) {
                let listener = site.host.listen(serving, 7000);
                let server = site.host.udp(serving, 7000);
                forbidden(&hythe.guest, (to, 7000).into(), &listener, &server);
                // The world is as far as ever.
                let listener = site.far.listen(family.far(), 0);
                let (one, other, _) = call(&hythe.guest, listener.local_addr().unwrap(), &listener);
                exchange(&one, &other);
            }
            hythe.stop().assert_clean(0);
        }
    }
}

on_every_cell! {
    the_metadata_service_is_refused_unless_it_is_allowed(cell) {
        let site = Site::new();
        let services: [IpAddr; 2] = ["169.254.169.254".parse().unwrap(), "fd00:ec2::254".parse().unwrap()];
        site.far.ip(
            "addr add 169.254.169.254/32 dev lo
             addr add fd00:ec2::254/128 dev lo nodad",
        );
        let hythe = Hythe::of(&site.host, cell).run();
        for service in services {
            let listener = site.far.listen(service, 80);
            let server = site.far.udp(service, 80);
            forbidden(&hythe.guest, (service, 80).into(), &listener, &server);
        }
        hythe.stop().assert_clean(0);
        let hythe = Hythe::of(&site.host, cell).options("--allow-metadata").run();
        for service in services {
            let listener = site.far.listen(service, 80);
            let (one, other, _) = call(&hythe.guest, (service, 80), &listener);
            exchange(&one, &other);
        }
        hythe.stop().assert_clean(0);
    }
}

on_every_cell! {
    clients_on_the_hosts_loopback_are_joined_to_the_guests_own_socket(cell) {
        let site = Site::new();
        let hythe = Hythe::of(&site.host, cell).options("-p 8000:80 -p 8001:81").run();
        for family in FAMILIES {
            let server = echo(hythe.guest.listen(family.any(), 80), 50);
            std::thread::scope(|scope| {
                for client in 0..5u8 {
                    let host = &site.host;
                    scope.spawn(move || {
                        for round in 0..10u8 {
                            expect_echo(&host.connect((family.loopback(), 8000)).unwrap(), &[client, round]);
                        }
                    });
                }
            });
            server.finish();
            let listener = hythe.guest.listen(family.any(), 81);
            let (one, other, _) = call(&site.host, (family.loopback(), 8001), &listener);
            transfer(&one, &other, 3, 16 << 20);
            transfer(&other, &one, 4, 16 << 20);
        }
        hythe.stop().assert_clean(0);
    }
}
