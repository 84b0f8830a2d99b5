//! UDP: every size, both families, both directions; ports, refusals, bursts and the path's MTU.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use crate::rig::cell::{ANY, Cell, on_every_cell};
use crate::rig::hythe::Hythe;
use crate::rig::netns::Netns;
use crate::rig::pattern::Pattern;
use crate::rig::quiet;
use crate::rig::site::{FAMILIES, Family, Site};
use crate::rig::socket::receive;
use crate::rig::wait::{PATIENCE, pause, wait_until, wait_within};

/// Bytes of a datagram: the least, one packet, fragments, the most that IPv4 carries.
const SIZES: [usize; 4] = [1, 1400, 9000, 65_507];

/// A datagram goes there and comes back, as it is.
fn expect_exchange(asking: &UdpSocket, to: SocketAddr, answering: &UdpSocket, size: usize) -> SocketAddr {
    let message = Pattern(size as u64).bytes(size);
    asking.send_to(&message, to).unwrap();
    let mut bytes = vec![0; 70_000];
    let (len, from) =
        receive(answering, &mut bytes).unwrap_or_else(|error| panic!("{size} bytes did not come: {error}"));
    assert!(bytes[..len] == message, "{len} bytes came of {size}, or others");
    let answer = Pattern(!(size as u64)).bytes(size);
    answering.send_to(&answer, from).unwrap();
    let (len, answerer) =
        receive(asking, &mut bytes).unwrap_or_else(|error| panic!("{size} bytes did not return: {error}"));
    assert!(bytes[..len] == answer, "{len} bytes returned of {size}, or others");
    assert_eq!(answerer, to, "the answer comes from whom was asked");
    from
}

/// No datagram was dropped by hythe.
fn expect_no_drops(hythe: &Hythe) {
    let drops: Vec<_> =
        hythe.counters().drops().into_iter().map(|(cause, count)| (cause.to_string(), count)).collect();
    // The guest's kernel tells its multicast groups to routers (MLD), of which there are none.
    assert!(drops.iter().all(|(cause, _)| cause == "icmp_type"), "{drops:?}");
}

on_every_cell! {
    datagrams_of_every_size_go_there_and_back(cell) {
        let site = Site::new();
        let hythe = Hythe::of(&site.host, cell).run();
        hythe.assert_engine();
        for family in FAMILIES {
            let far = site.far.udp(family.far(), 7000);
            let guest = hythe.guest.udp(family.any(), 0);
            for size in SIZES {
                expect_exchange(&guest, far.local_addr().unwrap(), &far, size);
            }
        }
        expect_no_drops(&hythe);
        hythe.stop().assert_clean(0);
    }
}

on_every_cell! {
    a_published_port_takes_datagrams_of_every_size(cell) {
        let site = Site::new();
        let hythe = Hythe::of(&site.host, cell).options("-p 5300:53/udp").run();
        for family in FAMILIES {
            let server = hythe.guest.udp(family.any(), 53);
            let clients = [site.far.udp(family.next_hop(), 0), site.far.udp(family.next_hop(), 0)];
            for size in SIZES {
                for client in &clients {
                    let seen = expect_exchange(client, (family.host(), 5300).into(), &server, size);
                    assert_eq!(seen, client.local_addr().unwrap(), "the server sees who asks");
                }
            }
        }
        expect_no_drops(&hythe);
        hythe.stop().assert_clean(0);
    }
}

on_every_cell! {
    two_destinations_see_the_guest_s_own_port(cell) {
        // RFC 4787, REQ-1.
        let site = Site::new();
        let hythe = Hythe::of(&site.host, cell).run();
        for family in FAMILIES {
            let guest = hythe.guest.udp(family.any(), 23_456);
            for port in [7100, 7101] {
                let far = site.far.udp(family.far(), port);
                let seen = expect_exchange(&guest, far.local_addr().unwrap(), &far, 10);
                assert_eq!(seen, SocketAddr::new(family.host(), 23_456));
            }
            let elsewhere = site.far.udp(family.next_hop(), 7102);
            let seen = expect_exchange(&guest, elsewhere.local_addr().unwrap(), &elsewhere, 10);
            assert_eq!(seen, SocketAddr::new(family.host(), 23_456));
        }
        hythe.stop().assert_clean(0);
    }
}

on_every_cell! {
    two_destinations_see_the_same_port_where_the_guest_s_own_is_taken(cell) {
        let site = Site::new();
        let hythe = Hythe::of(&site.host, cell).run();
        for family in FAMILIES {
            let _taken = site.host.udp(family.any(), 23_457);
            let guest = hythe.guest.udp(family.any(), 23_457);
            let seen = [7100, 7101].map(|port| {
                let far = site.far.udp(family.far(), port);
                expect_exchange(&guest, far.local_addr().unwrap(), &far, 10)
            });
            assert_eq!(seen[0], seen[1]);
            assert_ne!(seen[0].port(), 23_457);
        }
        hythe.stop().assert_clean(0);
    }
}

on_every_cell! {
    a_closed_port_refuses_datagrams(cell) {
        let site = Site::new();
        let hythe = Hythe::of(&site.host, cell).run();
        for family in FAMILIES {
            let guest = hythe.guest.udp(family.any(), 0);
            hythe.guest.run(|| guest.connect((family.far(), 7999))).unwrap();
            guest.send(b"anybody?").unwrap();
            let error = receive(&guest, &mut [0; 10]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
        }
        hythe.stop().assert_clean(0);
    }
}

/// Sends `count` datagrams at a rate, each with its number.
fn send_paced(socket: &UdpSocket, count: u32, per_second: u32) {
    let begun = Instant::now();
    for number in 0..count {
        let due = Duration::from_secs(1) * number / per_second;
        if let Some(early) = due.checked_sub(begun.elapsed()).filter(|early| early.as_micros() > 500) {
            pause(early);
        }
        // Only what the kernel has taken counts as sent.
        while let Err(error) = socket.send(&number.to_be_bytes()) {
            assert_eq!(error.raw_os_error(), Some(libc::ENOBUFS), "{error}");
        }
    }
}

/// Counters of a kernel by which datagrams may be lost, for one direction.
struct Losses<'n> {
    counters: Vec<(&'n Netns, &'static str)>,
    interfaces: Vec<(&'n Netns, &'static str)>,
}

impl Losses<'_> {
    fn count(&self) -> Vec<(&'static str, u64)> {
        let counters = self.counters.iter().map(|(netns, name)| (*name, netns.counter(name)));
        let interfaces = self.interfaces.iter().map(|(netns, name)| (*name, netns.dropped_at(name)));
        counters.chain(interfaces).collect()
    }
}

/// Every datagram of many either comes or is counted by the kernel that dropped it.
fn all_accounted_for(hythe: &Hythe, from: &UdpSocket, to: &UdpSocket, losses: &Losses<'_>) {
    const COUNT: u32 = 100_000;
    let before = losses.count();
    let mut seen = vec![false; COUNT as usize];
    let lost = || -> Vec<_> {
        losses.count().into_iter().zip(&before).map(|((name, now), (_, then))| (name, now - then)).collect()
    };
    to.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let mut received = 0;
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| send_paced(from, COUNT, 50_000));
        let complete = wait_within(PATIENCE, || {
            let mut bytes = [0; 16];
            while let Ok((len, _)) = receive(to, &mut bytes) {
                let number = u32::from_be_bytes(bytes[..len].try_into().unwrap()) as usize;
                assert!(!std::mem::replace(&mut seen[number], true), "{number} came twice");
                received += 1;
            }
            let missing = u64::from(COUNT - received);
            let counted: u64 = lost().iter().map(|(_, count)| count).sum();
            (sender.is_finished() && missing <= counted).then_some(())
        });
        assert!(complete.is_some(), "{received} of {COUNT} came; lost {:?}; {:?}", lost(), hythe.counters());
        sender.join().unwrap();
    });
    // How many fit into the receiver's buffer is a matter of the machine.
    assert!(received > COUNT / 10, "only {received} came; lost: {:?}", lost());
}

on_every_cell! {
    a_hundred_thousand_datagrams_come_or_are_counted_by_the_kernel(cell) {
        let _busy = quiet::busy();
        let site = Site::new();
        let hythe = Hythe::of(&site.host, cell).run();
        let wire = [(&site.host, "up0"), (&site.far, "down0"), (&hythe.guest, "eth0")];
        let far = site.far.udp(Family::V4.far(), 7000);
        let guest = hythe.guest.udp(Family::V4.any(), 0);
        guest.connect(far.local_addr().unwrap()).unwrap();
        guest.send(&[0xff; 4]).unwrap();
        let (_, seen) = receive(&far, &mut [0; 16]).unwrap();
        far.connect(seen).unwrap();
        all_accounted_for(
            &hythe,
            &guest,
            &far,
            &Losses { counters: vec![(&site.far, "UdpRcvbufErrors")], interfaces: wire.to_vec() },
        );
        all_accounted_for(
            &hythe,
            &far,
            &guest,
            &Losses {
                counters: vec![(&site.host, "UdpRcvbufErrors"), (&hythe.guest, "UdpRcvbufErrors")],
                interfaces: wire.to_vec(),
            },
        );
        expect_no_drops(&hythe);
        hythe.stop().assert_clean(0);
    }
}

#[test]
fn a_stranger_s_datagram_does_not_reach_the_guest() {
    let site = Site::new();
    let hythe = Hythe::of(&site.host, Cell { workers: 1, ..ANY }).run();
    for family in FAMILIES {
        let far = site.far.udp(family.far(), 7000);
        let guest = hythe.guest.udp(family.any(), 0);
        let seen = expect_exchange(&guest, far.local_addr().unwrap(), &far, 10);
        // Another address of the far server's that the guest has never spoken to.
        let stranger = site.far.udp(family.next_hop(), 7000);
        let filtered = hythe.counters().get("dropped_filtered");
        stranger.send_to(b"let me in", seen).unwrap();
        wait_until("the stranger to be refused", || hythe.counters().get("dropped_filtered") == filtered + 1);
        // Whoever shares an address with somebody the guest has spoken to may answer (RFC 4787, REQ-8).
        let other_port = site.far.udp(family.far(), 7001);
        other_port.send_to(b"also me", seen).unwrap();
        let mut bytes = [0; 20];
        let (len, from) = receive(&guest, &mut bytes).unwrap();
        assert_eq!((&bytes[..len], from), (&b"also me"[..], other_port.local_addr().unwrap()));
    }
    hythe.stop().assert_clean(0);
}
