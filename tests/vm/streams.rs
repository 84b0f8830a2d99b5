//! TCP between a guest and the far server, opened by either.

use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use crate::rig::bytes::{accept, expect_end};
use crate::rig::pattern::Pattern;
use crate::rig::site::{FAMILIES, Family};
use crate::world::{GUEST_PORT, PORT, World, with_every_guest};

pub const MIB: u64 = 1 << 20;

/// How long many bytes may take on a machine that is busy with other guests.
const LONG: Duration = Duration::from_mins(3);

/// So many bytes one way, over a connection of the guest's, and then so many the other way.
pub fn carries(world: &World, family: Family, bytes: u64) {
    let listener = world.site.far.listen(family.far(), 0);
    let name = listener.local_addr().unwrap();
    std::thread::scope(|scope| {
        let far = scope.spawn(|| {
            let (stream, _) = accept(&listener);
            Pattern(1).expect(&stream, 0, bytes).unwrap();
            expect_end(&stream);
        });
        world.vm.command_within(LONG, &format!("talker send {name} 1 {bytes}"));
        far.join().unwrap();
        let far = scope.spawn(|| {
            let (stream, _) = accept(&listener);
            Pattern(2).send(&stream, 0, bytes).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            expect_end(&stream);
        });
        world.vm.command_within(LONG, &format!("talker receive {name} 2 {bytes}"));
        far.join().unwrap();
    });
}

with_every_guest! {
    every_byte_arrives_each_way(world) {
        carries(&world, Family::V4, 1024 * MIB);
        carries(&world, Family::V6, 64 * MIB);
        let counters = world.hythe.counters();
        let [chains, kicks, interrupts] =
            ["chains", "kicks", "interrupts"].map(|name| counters.get(&format!("virtqueue_{name}")));
        // Both sides speak of many buffers at once; far more than these are usual.
        assert!(chains >= 4 * kicks && chains >= 3 * interrupts, "{counters:?}");
        world.finish();
    }
}

/// A client of the published port gets so many bytes back from the guest.
pub fn expect_published_port(world: &World, bytes: u64) {
    world.vm.serve(GUEST_PORT);
    for family in FAMILIES {
        let stream = world.site.far.connect((family.host(), PORT)).unwrap();
        // Both ways at once.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                Pattern(3).send(&stream, 0, bytes).unwrap_or_else(|error| panic!("{family:?}: {error}"));
                stream.shutdown(Shutdown::Write).unwrap();
            });
            Pattern(3).expect(&stream, 0, bytes).unwrap_or_else(|error| panic!("{family:?}: {error}"));
            expect_end(&stream);
        });
    }
}

with_every_guest! {
    a_published_port_leads_to_the_guest(world) {
        expect_published_port(&world, 16 * MIB);
        world.finish();
    }
}

/// So many MiB of a conversation are sent before the first has returned: a window or two are always under way.
const AHEAD: u64 = 4;

/// One conversation with a guest that gives back what it gets, both ways at once, until it is over. Adds up its bytes.
pub fn converse(stream: &TcpStream, is_over: &AtomicBool, bytes: &AtomicU64) {
    let (more, wanted) = channel();
    (0..AHEAD).for_each(|_| more.send(()).unwrap());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for (index, ()) in (0..).zip(wanted) {
                Pattern(5).send(stream, index * MIB, MIB).unwrap();
            }
            stream.shutdown(Shutdown::Write).unwrap();
        });
        let (mut sent, mut got) = (AHEAD, 0);
        while got < sent {
            Pattern(5).expect(stream, got * MIB, MIB).unwrap();
            got += 1;
            bytes.fetch_add(MIB, Ordering::AcqRel);
            if !is_over.load(Ordering::Acquire) {
                more.send(()).unwrap();
                sent += 1;
            }
        }
        drop(more);
        expect_end(stream);
    });
}

/// Ends conversations with the test, whichever way that ends.
pub struct End<'a>(pub &'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Conversations with the guest's server over the published port, one a family in the list, that go on while `task` runs;
/// every byte of them arrives.
pub fn while_conversing(world: &World, families: &[Family], task: impl FnOnce()) {
    let is_over = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        for family in families {
            let stream = world.site.far.connect((family.host(), PORT)).unwrap();
            scope.spawn(move || converse(&stream, is_over, &AtomicU64::default()));
        }
        let _end = End(is_over);
        task();
    });
}
