//! TCP through a second namespace, both families, opened by either side, in both directions.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crate::rig::bytes::{accept, echo, expect_echo, expect_end, expect_reset, reset, transfer};
use crate::rig::cell::{ANY, Cell, on_every_cell};
use crate::rig::hythe::Hythe;
use crate::rig::pattern::Pattern;
use crate::rig::quiet;
use crate::rig::site::{FAMILIES, Family, Site};
use crate::rig::wait::{pause, wait_until};

const MIB: u64 = 1 << 20;

/// Who opens a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Opened {
    ByGuest,
    ByFar,
}

pub const OPENED: [Opened; 2] = [Opened::ByGuest, Opened::ByFar];

/// A guest with one published port, and the far server.
pub struct Pair {
    pub site: Site,
    pub hythe: Hythe,
}

/// The published port, and the guest's.
const PORT: u16 = 8000;
const GUEST_PORT: u16 = 80;

impl Pair {
    pub fn new(cell: Cell) -> Self {
        let site = Site::new();
        let hythe = Hythe::of(&site.host, cell).options("-p 8000:80").run();
        Self { site, hythe }
    }

    /// A listener of the side that is called, and the name by which the other side calls it.
    pub fn listen(&self, opened: Opened, family: Family) -> (TcpListener, SocketAddr) {
        match opened {
            Opened::ByGuest => {
                let listener = self.site.far.listen(family.far(), 0);
                let name = listener.local_addr().unwrap();
                (listener, name)
            }
            Opened::ByFar => {
                let listener = self.hythe.guest.listen(family.any(), GUEST_PORT);
                (listener, SocketAddr::new(family.host(), PORT))
            }
        }
    }

    pub fn call(&self, opened: Opened, to: SocketAddr) -> std::io::Result<TcpStream> {
        match opened {
            Opened::ByGuest => self.hythe.guest.connect(to),
            Opened::ByFar => self.site.far.connect(to),
        }
    }

    /// A connection: the guest's end and the far server's.
    pub fn connect(&self, opened: Opened, family: Family) -> (TcpStream, TcpStream) {
        let (listener, name) = self.listen(opened, family);
        let called = self.call(opened, name).unwrap_or_else(|error| panic!("{opened:?} {name}: {error}"));
        let (accepted, _) = accept(&listener);
        match opened {
            Opened::ByGuest => (called, accepted),
            Opened::ByFar => (accepted, called),
        }
    }

    /// Both kinds of connections in both families.
    pub fn every_connection(&self) -> Vec<(TcpStream, TcpStream)> {
        let kinds = OPENED.into_iter().flat_map(|opened| FAMILIES.map(|family| (opened, family)));
        kinds.map(|(opened, family)| self.connect(opened, family)).collect()
    }

    /// Ends the guest. Nothing was dropped unless its cause is expected.
    pub fn finish(self, expected_drops: &[&str]) {
        let counters = self.hythe.counters();
        // What the guest's kernel sent once more on its own account (probes of the tail, RFC 8985, 7, on a busy machine), and
        // what another queue has overtaken: what was handed over, and the acknowledgement that opens a connection, which may leave
        // by the queue of the SYN while what is behind it leaves by the one that it was answered by.
        let opening = if self.hythe.workers() > 1 { counters.get("tcp_opened_out") } else { 0 };
        let late = self.hythe.guest.counter("TcpRetransSegs") + counters.get("frames_handed_over") + opening;
        for (cause, count) in counters.drops() {
            let expected = match cause {
                // The guest's kernel tells its multicast groups to routers (MLD), of which there are none.
                "icmp_type" => true,
                "out_of_window" if count <= late => true,
                _ => expected_drops.contains(&cause),
            };
            assert!(expected, "{count} dropped because of {cause}: {counters:?}");
        }
        self.hythe.stop().assert_clean(0);
    }
}

/// Bytes of every kind of connection, in both directions.
pub fn carries_bytes(cell: Cell, bytes: u64) {
    let pair = Pair::new(cell);
    pair.hythe.assert_engine();
    for (number, (guest, far)) in pair.every_connection().iter().enumerate() {
        transfer(guest, far, number as u64, bytes);
        transfer(far, guest, !(number as u64), bytes);
        guest.shutdown(Shutdown::Write).unwrap();
        expect_end(far);
        far.shutdown(Shutdown::Write).unwrap();
        expect_end(guest);
    }
    pair.finish(&[]);
}

on_every_cell! {
    every_byte_arrives_once_and_in_order(cell) {
        let _busy = quiet::busy();
        carries_bytes(cell, 64 * MIB);
    }
}

#[test]
fn a_gibibyte_arrives_each_way() {
    let _busy = quiet::busy();
    let pair = Pair::new(ANY);
    let connections = [pair.connect(Opened::ByGuest, Family::V4), pair.connect(Opened::ByFar, Family::V6)];
    for (guest, far) in &connections {
        // Both ways at once.
        std::thread::scope(|scope| {
            scope.spawn(|| transfer(guest, far, 1, 1024 * MIB));
            transfer(far, guest, 2, 1024 * MIB);
        });
    }
    drop(connections);
    pair.finish(&[]);
}

on_every_cell! {
    parallel_streams_do_not_mix(cell) {
        let _busy = quiet::busy();
        let pair = Pair::new(cell);
        let streams: Vec<_> = (0..16).flat_map(|_| pair.every_connection()).collect();
        assert_eq!(streams.len(), 64);
        std::thread::scope(|scope| {
            for (number, (guest, far)) in streams.iter().enumerate() {
                scope.spawn(move || transfer(guest, far, number as u64, MIB));
                scope.spawn(move || transfer(far, guest, !(number as u64), MIB));
            }
        });
        drop(streams);
        pair.finish(&[]);
    }
}

on_every_cell! {
    each_side_may_close_its_direction_and_go_on_listening(cell) {
        let _busy = quiet::busy();
        let pair = Pair::new(cell);
        // `nc -N`: the one that closes first still gets everything that the other one says.
        for (guest, far) in pair.every_connection() {
            transfer(&guest, &far, 1, MIB);
            guest.shutdown(Shutdown::Write).unwrap();
            expect_end(&far);
            transfer(&far, &guest, 2, 4 * MIB);
            far.shutdown(Shutdown::Write).unwrap();
            expect_end(&guest);
        }
        for (guest, far) in pair.every_connection() {
            transfer(&far, &guest, 1, MIB);
            far.shutdown(Shutdown::Write).unwrap();
            expect_end(&guest);
            transfer(&guest, &far, 2, 4 * MIB);
            guest.shutdown(Shutdown::Write).unwrap();
            expect_end(&far);
        }
        wait_until("all connections to be over", || {
            let counters = pair.hythe.counters();
            counters.get("tcp_over") == counters.get("tcp_opened_out") + counters.get("tcp_opened_in")
        });
        pair.finish(&[]);
    }
}

on_every_cell! {
    bytes_before_a_close_are_not_lost(cell) {
        let _busy = quiet::busy();
        let pair = Pair::new(cell);
        // The whole connection is written and closed before the reader looks.
        for (guest, far) in pair.every_connection() {
            Pattern(7).send(&far, 0, 40_000).unwrap();
            drop(far);
            Pattern(7).expect(&guest, 0, 40_000).unwrap();
            expect_end(&guest);
        }
        for (guest, far) in pair.every_connection() {
            Pattern(8).send(&guest, 0, 40_000).unwrap();
            drop(guest);
            Pattern(8).expect(&far, 0, 40_000).unwrap();
            expect_end(&far);
        }
        pair.finish(&[]);
    }
}

on_every_cell! {
    a_receiver_that_stops_reading_gets_everything_when_it_goes_on(cell) {
        const BYTES: u64 = 32 * MIB;
        let pair = Pair::new(cell);
        std::thread::scope(|scope| {
            for (number, (guest, far)) in pair.every_connection().into_iter().enumerate() {
                scope.spawn(move || {
                    let (from, to) = if number % 2 == 0 { (guest, far) } else { (far, guest) };
                    let sender = scope.spawn(move || Pattern(number as u64).send(&from, 0, BYTES));
                    Pattern(number as u64).expect(&to, 0, MIB).unwrap();
                    pause(Duration::from_secs(10));
                    Pattern(number as u64).expect(&to, MIB, BYTES - MIB).unwrap();
                    sender.join().unwrap().unwrap();
                    expect_end(&to);
                });
            }
        });
        // Probes of a closed window are outside it.
        pair.finish(&["out_of_window"]);
    }
}

on_every_cell! {
    a_byte_a_second_passes_at_once(cell) {
        let pair = Pair::new(cell);
        let connections = pair.every_connection();
        for number in 0..6 {
            for (guest, far) in &connections {
                // Each byte has to be there before the next is sent: none waits for company.
                for (mut from, mut to) in [(guest, far), (far, guest)] {
                    from.write_all(&[number]).unwrap();
                    let mut byte = [0];
                    to.read_exact(&mut byte).unwrap();
                    assert_eq!(byte, [number]);
                }
            }
            pause(Duration::from_secs(1));
        }
        drop(connections);
        pair.finish(&[]);
    }
}

on_every_cell! {
    a_reset_in_the_middle_of_a_stream_is_one_on_the_other_side(cell) {
        let pair = Pair::new(cell);
        for resets_guest in [false, true] {
            for (guest, far) in pair.every_connection() {
                let (resetting, seeing) = if resets_guest { (guest, far) } else { (far, guest) };
                transfer(&resetting, &seeing, 3, MIB);
                Pattern(4).send(&seeing, 0, 10_000).unwrap();
                reset(resetting);
                expect_reset(&seeing);
            }
        }
        pair.finish(&["reset", "no_flow", "out_of_window"]);
    }
}

on_every_cell! {
    a_refused_port_is_refused_at_once(cell) {
        let pair = Pair::new(cell);
        for family in FAMILIES {
            let begun = Instant::now();
            for _ in 0..20 {
                let refused = pair.hythe.guest.connect((family.far(), 7999)).unwrap_err();
                assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{refused}");
            }
            // A connect that hears nothing takes a second to ask again.
            assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        }
        assert_eq!(pair.hythe.counters().get("dropped_host_refused"), 40);
        pair.finish(&["host_refused"]);
    }
}

on_every_cell! {
    a_destination_that_cannot_be_reached_is_told_as_such(cell) {
        let pair = Pair::new(cell);
        for family in FAMILIES {
            let option = if family == Family::V4 { "-4" } else { "-6" };
            for (net, kind) in (1..).zip(["unreachable", "prohibit", "blackhole"]) {
                pair.site.host.ip(&format!("{option} route add {kind} {}", family.elsewhere_network(net)));
                let begun = Instant::now();
                let error = pair.hythe.guest.connect((family.elsewhere(net, 1), 80)).unwrap_err();
                // What the guest's kernel makes of the ICMP error: net, host, or prohibited (EACCES for IPv6).
                let told = [ErrorKind::HostUnreachable, ErrorKind::NetworkUnreachable, ErrorKind::PermissionDenied];
                assert!(told.contains(&error.kind()), "{family:?} {kind}: {error}");
                assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
            }
            pair.site.host.ip(&format!("{option} route del default"));
            let error = pair.hythe.guest.connect((family.far(), 80)).unwrap_err();
            let told = [ErrorKind::HostUnreachable, ErrorKind::NetworkUnreachable];
            assert!(told.contains(&error.kind()), "{family:?} without a route: {error}");
        }
        pair.finish(&["host_refused"]);
    }
}

on_every_cell! {
    two_destinations_see_the_same_source_port(cell) {
        // RFC 5382, REQ-1, and the guest's own port where it is free.
        let pair = Pair::new(cell);
        for family in FAMILIES {
            let listeners = [7100, 7101].map(|port| pair.site.far.listen(family.far(), port));
            let seen = listeners.each_ref().map(|listener| {
                let stream = pair.hythe.guest.run(|| {
                    let socket = socket2::Socket::new(
                        socket2::Domain::for_address(listener.local_addr().unwrap()),
                        socket2::Type::STREAM,
                        None,
                    )?;
                    socket.set_reuse_address(true)?;
                    socket.bind(&SocketAddr::new(family.any(), 23_456).into())?;
                    socket.connect(&listener.local_addr()?.into())?;
                    std::io::Result::Ok(socket)
                });
                let (accepted, peer) = accept(listener);
                (stream.unwrap(), accepted, peer)
            });
            for (_, _, peer) in &seen {
                assert_eq!(*peer, SocketAddr::new(family.host(), 23_456));
            }
        }
        pair.finish(&[]);
    }
}

on_every_cell! {
    small_exchanges_are_echoed_by_many_at_once(cell) {
        let pair = Pair::new(cell);
        let (listener, name) = pair.listen(Opened::ByGuest, Family::V4);
        let server = echo(listener, 200);
        std::thread::scope(|scope| {
            for client in 0..8u8 {
                let pair = &pair;
                scope.spawn(move || {
                    for round in 0..25u8 {
                        let stream = pair.call(Opened::ByGuest, name).unwrap();
                        expect_echo(&stream, &[client, round]);
                    }
                });
            }
        });
        server.finish();
        pair.finish(&[]);
    }
}
