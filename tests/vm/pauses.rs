//! A far reader that pauses stops its own connection, and nothing else of the guest's queue.
//!
//! A guest's kernel sends no more than a bounded number of bytes to a queue before it gets some back (byte queue limits). If
//! hythe held buffers of a connection whose reader pauses, all others of that queue would stand.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::machine::Machine;
use crate::rig::bytes::{accept, expect_end};
use crate::rig::cell::{Cell, Engine};
use crate::rig::pattern::Pattern;
use crate::rig::site::Family;
use crate::rig::socket::receive;
use crate::rig::wait::{PATIENCE, pause, wait_until};
use crate::streams::{End, MIB, converse};
use crate::world::{GUEST_PORT, PORT, World};

/// What the paused reader is sent: much more than the sockets on the way take.
const PAUSED: u64 = 64 * MIB;

/// The pause, in slices.
const SLICE: Duration = Duration::from_secs(10);
const SLICES: usize = 6;

/// What every slice moves at least: a hundredth of what it does on a slow machine, and far more than a queue lets pass that
/// is held.
const SLICE_BYTES: u64 = 16 * MIB;
const SLICE_ROUND_TRIPS: u64 = 100;

/// What moves beside the paused connection.
#[derive(Default)]
struct Moved {
    is_over: AtomicBool,
    bytes: AtomicU64,
    stream_round_trips: AtomicU64,
    datagram_round_trips: AtomicU64,
}

impl Moved {
    fn counts(&self) -> [u64; 3] {
        [&self.bytes, &self.stream_round_trips, &self.datagram_round_trips]
            .map(|count| count.load(Ordering::Acquire))
    }

    /// Asks small questions over a stream until it is over.
    fn ask(&self, mut stream: &TcpStream) {
        stream.set_nodelay(true).unwrap();
        while !self.is_over.load(Ordering::Acquire) {
            stream.write_all(b"question").unwrap();
            let mut answer = [0; 8];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"question");
            self.stream_round_trips.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Asks by datagrams until it is over; none may be lost where nothing is full.
    fn ask_by_datagrams(&self, socket: &UdpSocket, to: SocketAddr) {
        let mut bytes = [0; 2000];
        let question = Pattern(7).bytes(1000);
        while !self.is_over.load(Ordering::Acquire) {
            socket.send_to(&question, to).unwrap();
            let (len, _) = receive(socket, &mut bytes).unwrap();
            assert_eq!(bytes[..len], question);
            self.datagram_round_trips.fetch_add(1, Ordering::AcqRel);
        }
    }
}

fn a_reader_that_pauses_stops_nobody_else(engine: Engine) {
    let world = World::new(Machine::UserModeLinux, Cell::new(engine, 1));
    // The limit that would make all wait for one.
    world.vm.command("test -e /sys/class/net/eth0/queues/tx-0/byte_queue_limits/limit");
    world.vm.serve(GUEST_PORT);
    let listener = world.site.far.listen(Family::V4.far(), 0);
    let name = listener.local_addr().unwrap();
    world.vm.command(&format!("(talker send {name} 1 {PAUSED}; echo $? >/tmp/sent) >/tmp/sender 2>&1 &"));
    let (paused, _) = accept(&listener);
    // Something has come, and nobody reads it.
    wait_until("the first bytes", || paused.peek(&mut [0]).is_ok_and(|len| len == 1));
    let published = SocketAddr::new(Family::V4.host(), PORT);
    let connect = || {
        let stream = world.site.far.connect(published).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    };
    let (bulk, small, datagrams) = (connect(), connect(), world.site.far.udp(Family::V4.next_hop(), 0));
    let moved = &Moved::default();
    std::thread::scope(|scope| {
        scope.spawn(|| converse(&bulk, &moved.is_over, &moved.bytes));
        scope.spawn(|| moved.ask(&small));
        scope.spawn(|| moved.ask_by_datagrams(&datagrams, published));
        let _end = End(&moved.is_over);
        let mut before = moved.counts();
        for slice in 0..SLICES {
            pause(SLICE);
            let after = moved.counts();
            let [bytes, round_trips, datagrams] = std::array::from_fn(|index| after[index] - before[index]);
            assert!(bytes >= SLICE_BYTES, "{bytes} bytes in slice {slice}");
            assert!(round_trips >= SLICE_ROUND_TRIPS, "{round_trips} round trips in slice {slice}");
            assert!(datagrams >= SLICE_ROUND_TRIPS, "{datagrams} datagrams in slice {slice}");
            before = after;
        }
    });
    world.vm.command("test ! -e /tmp/sent");
    Pattern(1).expect(&paused, 0, PAUSED).unwrap();
    expect_end(&paused);
    drop(paused);
    assert_eq!(world.vm.command("until [ -s /tmp/sent ]; do sleep 0.1; done; cat /tmp/sent"), "0");
    world.finish();
}

#[test]
fn a_reader_that_pauses_stops_nobody_else_on_io_uring() {
    a_reader_that_pauses_stops_nobody_else(Engine::IoUring);
}

#[test]
fn a_reader_that_pauses_stops_nobody_else_on_epoll() {
    a_reader_that_pauses_stops_nobody_else(Engine::Epoll);
}
