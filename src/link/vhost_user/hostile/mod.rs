//! A link against drivers that break every rule, ten million operations of them.
//!
//! An operation is one write of the driver's (a descriptor, a table's entry, a head, an index, a header) or one call of
//! the worker's. A *story*, made from one seed, has several attachments of a pair of queues with one Queue as their
//! device. What is checked in each:
//! - nothing panics, and no call does more work than the bytes it is about explain ([`steps`]; a spin is a count);
//! - not a byte changes in the guest's memory, or in the guards around its regions, but what the driver wrote itself and
//!   what it gave: used rings, and buffers of chains that it made available to be written;
//! - a queue that fails tells so once and is not touched again, and the other one goes on as if nothing had been.
//!
//! `HYTHE_SEED=n` tells one story again; a failure names its seed.

mod driver;
mod guest;

use std::os::fd::OwnedFd;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::frame::build::{HEAD_MAX, Head};
use crate::frame::offload::{Offload, Segmentation};
use crate::frame::view::{Content, View};
use crate::io::Operations;
use crate::link::virtqueue::steps;
use crate::link::{Ahead, FRAME_MAX, InboundHead, Link, Space};
use crate::random::Random;

use super::pairs::Pairs;
use super::{Attachment, Control, Queue, Ring, Takes};
use driver::Driver;
use guest::{FAR_LEN, Guest, NEXT_LEN, PLACES};

const TRANSMIT: usize = 0;
const RECEIVE: usize = 1;

const ATTACHMENTS: u64 = 8;
const PASSES: u64 = 120;

/// Steps that `bytes` of a queue's buffers explain: each buffer has a byte at least, and no chain is longer than the
/// queue. A buffer is a descriptor and a piece a region, each looked at a few times; a chain is one more.
fn explained(size: u16, bytes: usize) -> u64 {
    let size = usize::from(size);
    8 * (size * size).min(bytes + size) as u64 + 8
}

/// What a driver does that is not hostile.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Honest {
    Transmit,
    Receive,
    Neither,
}

struct Story {
    random: Random,
    guest: Guest,
    link: Queue,
    control: Control,
    drivers: [Driver; 2],
    honest: Honest,
    /// A thread of its own writes over rings, tables and headers all the time.
    is_scribbled: bool,
    takes: Takes,
    faults: [usize; 2],
    /// They failed in this pass.
    failed_now: [bool; 2],
    /// How often the driver does wrong, of 256 times.
    malice: u64,
    /// What stands for all that is kicked and called.
    descriptor: OwnedFd,
    work: Work,
    operations: Operations,
}

/// What was done in all.
#[derive(Default)]
struct Work {
    device: u64,
    driver: u64,
    faults: u64,
    frames: u64,
    steps_max: u64,
}

impl Story {
    fn new(seed: u64, honest: Honest, is_scribbled: bool) -> Self {
        let mut random = Random::new(seed);
        let size = 1 << random.pick(&[2, 3, 4, 6]);
        let (link, control) = Queue::new(1500, 0, Pairs::default());
        Self {
            guest: Guest::new(),
            link,
            control,
            drivers: [TRANSMIT, RECEIVE].map(|which| Driver::new(which, size, !is_scribbled)),
            honest,
            is_scribbled,
            takes: Takes::default(),
            faults: [0; 2],
            failed_now: [false; 2],
            malice: 0,
            descriptor: std::fs::File::open("/dev/null").unwrap().into(),
            work: Work::default(),
            operations: Operations::default(),
            random,
        }
    }

    fn tell(&mut self) {
        for _ in 0..ATTACHMENTS {
            self.attach();
            self.malice = self.random.pick(&[0, 1, 16, 128]);
            for _ in 0..PASSES {
                self.pass();
                if self.faults.iter().any(|faults| *faults > 0) && self.random.one_in(8) {
                    break;
                }
            }
            self.honest_round();
            self.detach();
        }
    }

    /// A call of the worker's, which may do so many steps.
    fn call<T>(&mut self, steps_max: u64, call: impl FnOnce(&mut Queue, &mut Operations) -> T) -> T {
        if !self.is_scribbled {
            self.drivers[RECEIVE].give_buffers(&mut self.guest);
        }
        let Self { link, operations, .. } = self;
        let (done, steps) = steps::of(|| call(link, operations));
        assert!(steps <= steps_max, "{steps} steps where {steps_max} are explained");
        self.work.device += 1;
        self.work.steps_max = self.work.steps_max.max(steps);
        done
    }

    fn attach(&mut self) {
        // The memory behind the next region, or far away, may be gone this time.
        let present = [true, true, !self.random.one_in(4), !self.random.one_in(4)];
        let memory = self.guest.share(present);
        self.faults = [0; 2];
        self.takes = Takes { merged: !self.random.one_in(4), partial_checksums: !self.random.one_in(4) };
        let rings = [TRANSMIT, RECEIVE].map(|which| {
            let parts = self.drivers[which].start(&mut self.guest, &mut self.random);
            let fd = || self.descriptor.try_clone().unwrap();
            Some(Ring { parts, kick: fd(), call: Some(fd()), error: Some(fd()) })
        });
        let [transmit, receive] = rings;
        let (tcp_segmentation, udp_segmentation) = (true, true);
        let attachment = Attachment {
            memory,
            transmit,
            discards: false,
            receive,
            takes: self.takes,
            tcp_segmentation,
            udp_segmentation,
        };
        let Self { control, link, .. } = self;
        let attached = control.attach(attachment, || {
            link.take_news();
        });
        assert!(attached.unwrap(), "the rings lie where they belong");
    }

    /// The memory goes away, whatever was under way.
    fn detach(&mut self) {
        if !self.is_scribbled {
            self.drivers[RECEIVE].give_buffers(&mut self.guest);
        }
        let Self { control, link, .. } = self;
        let next = control.detach(|| {
            link.take_news();
        });
        for (which, next) in next.unwrap().into_iter().enumerate() {
            assert!(next.is_some());
            // A hostile driver may have had its used index written over.
            if self.is_honest(which) || self.malice == 0 && !self.is_scribbled && self.faults[which] == 0 {
                assert_eq!(next, Some(self.drivers[which].used(&self.guest)), "what was taken came back");
            }
        }
        self.check();
        self.work.driver +=
            self.drivers.iter_mut().map(|driver| std::mem::take(&mut driver.writes)).sum::<u64>();
    }

    fn check(&mut self) {
        if self.is_scribbled { self.guest.check_guards() } else { self.guest.check() }
    }

    /// The driver does what it likes, and then the worker has its turn.
    fn pass(&mut self) {
        for which in [TRANSMIT, RECEIVE] {
            if !self.is_honest(which) {
                for _ in 0..=self.random.below(6) {
                    self.drivers[which].act(&mut self.guest, &mut self.random, self.malice);
                }
            }
        }
        self.publish();
        if !self.is_honest(TRANSMIT) {
            self.receive();
        }
        if !self.is_honest(RECEIVE) {
            self.send();
        }
        self.call(4, |link, _| link.release());
        if self.random.one_in(4) {
            self.publish();
        }
        if self.random.one_in(8) {
            self.call(4, |link, _| link.prepare_sleep());
            self.call(4, |link, _| link.has_work());
            let which = self.random.below(2) as usize;
            self.call(4, |link, _| link.woken(which));
        }
        self.end_pass();
        if self.random.one_in(32) {
            self.honest_round();
        }
    }

    fn is_honest(&self, which: usize) -> bool {
        self.honest == [Honest::Transmit, Honest::Receive][which]
    }

    fn publish(&mut self) {
        // Each of the staged frames may be as long as any.
        let explained = 65 * explained(self.drivers[RECEIVE].size, FRAME_MAX + 12);
        self.call(explained, |link, operations| {
            operations.clear();
            link.begin_publish(operations);
            assert!(operations.len() <= 4, "an interrupt and an error for each queue");
            link.end_publish(operations);
        });
        self.take_faults();
    }

    /// Faults are told once, and a queue that has failed is not touched again.
    fn take_faults(&mut self) {
        while let Some(words) = self.link.take_fault() {
            let which = usize::from(words.contains("receive queue"));
            assert!(!self.is_honest(which), "{words}");
            self.faults[which] += 1;
            assert_eq!(self.faults[which], 1, "told once: {words}");
            self.work.faults += 1;
            self.drivers[which].has_failed = true;
            self.failed_now[which] = true;
        }
    }

    /// The pass in which a queue failed is over: its spaces are closed, and its memory is the guest's alone.
    fn end_pass(&mut self) {
        for which in [TRANSMIT, RECEIVE] {
            if std::mem::take(&mut self.failed_now[which]) {
                self.check();
                self.guest.take_away(which);
            }
        }
    }

    /// A batch from the guest, parsed as far as its headers allow.
    fn receive(&mut self) {
        let size = self.drivers[TRANSMIT].size;
        let (frames, _) = self.call(64 * explained(size, usize::MAX / 2), |link, operations| {
            link.begin_receive(operations);
            let received = link.end_receive(operations);
            (received.frames, received.empty)
        });
        assert!(frames <= 64);
        self.work.frames += frames as u64;
        let lie = self.random.bits();
        for index in 0..frames {
            self.call(2 * explained(size, usize::MAX / 2), |link, _| {
                let frame = link.frame(index).unwrap();
                assert!(frame.head.len() <= frame.len && frame.len <= FRAME_MAX + 40);
                let (mut from, mut len) = (lie as usize & 0x3ff, lie as usize >> 48);
                if let Ok(Content::Ip(packet)) = View::parse(frame.head, frame.len).map(|view| view.content) {
                    assert!(packet.transport_start + packet.transport_len <= frame.len);
                    (from, len) = (packet.transport_start, packet.transport_len);
                }
                let mut bytes = 0;
                link.payload(index, from, len, &mut |piece| bytes += piece.len());
                assert!(bytes <= len);
            });
        }
        assert!(self.link.frame(frames).is_none());
        self.take_faults();
    }

    /// Spaces of all kinds, filled, left empty, committed with heads of other lengths.
    fn send(&mut self) {
        let size = self.drivers[RECEIVE].size;
        let mut spaces: Vec<(Space, usize, bool)> = Vec::new();
        if self.link.may_reserve_ahead() {
            for _ in 0..self.random.below(4) {
                let (head_len, payload) = (self.head_len(), self.random.spread(65_483) as usize);
                let is_datagram = self.random.one_in(3);
                let ahead = if is_datagram { Ahead::Datagram(payload) } else { Ahead::Bytes(payload) };
                let space = self
                    .call(3 * explained(size, payload + 200), |link, _| link.reserve_ahead(head_len, ahead));
                spaces.extend(space.map(|space| (space, head_len, is_datagram)));
            }
        }
        for _ in 0..self.random.below(3) {
            let payload = self.random.spread(1500) as usize;
            let space = self.call(0, |link, _| link.reserve(payload));
            spaces.extend(space.map(|space| (space, 0, false)));
        }
        if self.random.one_in(4) {
            self.publish();
        }
        if self.random.one_in(4) && spaces.len() > 1 {
            spaces.swap(0, 1);
        }
        for (space, head_len, is_datagram) in spaces {
            let steps = 3 * explained(size, space.capacity + 200);
            if self.random.one_in(4) {
                self.call(steps, |link, _| link.cancel(space));
                continue;
            }
            let len = if self.random.one_in(2) {
                space.capacity
            } else {
                self.random.below(space.capacity as u64 + 1) as usize
            };
            let len = if is_datagram { len } else { len.max(usize::from(space.capacity > 0)) };
            let head_len = if head_len == 0 || self.random.one_in(8) { self.head_len() } else { head_len };
            self.call(steps, |link, _| fill(link, space, len));
            self.call(steps, |link, _| commit(link, space, head_len, len));
        }
        self.take_faults();
    }

    fn head_len(&mut self) -> usize {
        // Ethernet and IPv4 at least, and a checksum behind them.
        44 + self.random.below(HEAD_MAX as u64 - 43) as usize
    }

    /// What the other queue is given comes through.
    fn honest_round(&mut self) {
        match self.honest {
            Honest::Transmit => {
                let (sent, used) = self.drivers[TRANSMIT].send_honestly(&mut self.guest, &mut self.random);
                let got = self.call(64, |link, operations| {
                    link.begin_receive(operations);
                    assert_eq!(link.end_receive(operations).frames, 1);
                    let mut bytes = link.frame(0).unwrap().head.to_vec();
                    let head = bytes.len();
                    link.payload(0, head, FRAME_MAX, &mut |piece| piece.copy_to(&mut bytes));
                    link.release();
                    bytes
                });
                assert!(got == sent, "a frame of {} bytes", sent.len());
                assert_eq!(self.drivers[TRANSMIT].used(&self.guest), used, "its chain came back");
            }
            Honest::Receive => {
                let room = self.drivers[RECEIVE].offer_honestly(&mut self.guest);
                let len = self.random.below(1000) as usize + 1;
                let is_ahead = self.random.one_in(2);
                self.call(256, |link, operations| {
                    let space =
                        if is_ahead { link.reserve_ahead(54, Ahead::Bytes(len)) } else { link.reserve(len) };
                    let space = space.unwrap();
                    fill(link, space, len);
                    commit(link, space, 54, len);
                    operations.clear();
                    link.begin_publish(operations);
                });
                let written = self.drivers[RECEIVE].look_honestly(&self.guest, room);
                assert_eq!(written as usize, 12 + 54 + len);
            }
            Honest::Neither => {}
        }
        self.take_faults();
        self.end_pass();
    }
}

/// The kernel writes so many bytes of payload.
fn fill(link: &mut Queue, space: Space, len: usize) {
    static PAYLOAD: [u8; 1 << 16] = [0x77; 1 << 16];
    let mut left = len;
    link.space(space, &mut |piece| left -= piece.copy_from(&PAYLOAD[..left]));
    assert_eq!(left, 0, "a space of {} bytes", space.capacity);
}

fn commit(link: &mut Queue, space: Space, head_len: usize, len: usize) {
    let bytes = [0x66; HEAD_MAX];
    let head = Head { len: head_len, transport_start: 34, checksum_offset: 6 };
    let offload = Offload { checksum_partial: true, segmentation: Segmentation::Tcp { size: 1448 } };
    link.commit(space, &InboundHead { bytes: &bytes[..head_len], head, v4: true, offload }, len);
}

/// Says which story failed.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("it was the story of HYTHE_SEED={}", self.0);
        }
    }
}

/// Tells stories until so many operations were done.
fn tell_stories(first_seed: u64, operations: u64, honest: Honest, is_scribbled: bool) {
    let only = std::env::var("HYTHE_SEED").ok().map(|seed| seed.parse().expect("HYTHE_SEED is a number"));
    let mut done = Work::default();
    let mut seed = only.unwrap_or(first_seed);
    while done.device + done.driver < operations {
        let named = Seed(seed);
        let mut story = Story::new(seed, honest, is_scribbled);
        if is_scribbled {
            scribbled(&mut story);
        } else {
            story.tell();
        }
        done.device += story.work.device;
        done.driver += story.work.driver;
        done.faults += story.work.faults;
        done.frames += story.work.frames;
        done.steps_max = done.steps_max.max(story.work.steps_max);
        drop(named);
        seed += 1;
        if only.is_some() {
            return;
        }
    }
    let Work { device, driver, faults, frames, steps_max } = done;
    println!(
        "{} stories: {device} calls, {driver} writes, {faults} faults, {frames} frames; {steps_max} steps in a call",
        seed - first_seed
    );
    assert!(
        faults > 100 && frames.max(u64::from(honest == Honest::Transmit)) > 0,
        "they were hostile, and got somewhere"
    );
}

/// A story under which another thread changes what is being read.
fn scribbled(story: &mut Story) {
    let (begin, over) = (Barrier::new(2), AtomicBool::new(false));
    let hostile: Vec<usize> =
        [TRANSMIT, RECEIVE].into_iter().filter(|which| !story.is_honest(*which)).collect();
    let scribbler =
        driver::Scribbler::new(&story.guest, story.drivers[0].size, &hostile, story.random.bits());
    std::thread::scope(|scope| {
        let (begun, is_over) = (&begin, &over);
        let scribbling = scope.spawn(move || {
            begun.wait();
            scribbler.scribble(is_over);
        });
        begin.wait();
        // Not only when the story is told, also when it fails.
        let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| story.tell()));
        over.store(true, Ordering::Relaxed);
        scribbling.join().unwrap();
        if let Err(failure) = told {
            std::panic::resume_unwind(failure);
        }
    });
}

#[test]
fn a_hostile_transmit_queue_harms_nothing() {
    tell_stories(1_000_000, 4_000_000, Honest::Receive, false);
}

#[test]
fn a_hostile_receive_queue_harms_nothing() {
    tell_stories(2_000_000, 4_000_000, Honest::Transmit, false);
}

#[test]
fn two_hostile_queues_harm_nothing() {
    tell_stories(3_000_000, 1_000_000, Honest::Neither, false);
}

#[test]
fn what_changes_while_it_is_read_harms_nothing() {
    tell_stories(4_000_000, 500_000, Honest::Receive, true);
    tell_stories(5_000_000, 500_000, Honest::Transmit, true);
}

#[test]
fn the_books_find_what_was_not_given() {
    let find = |written: &dyn Fn(&Guest)| {
        let mut guest = Guest::new();
        guest.share([true; 4]);
        guest.give(RECEIVE, PLACES[3].0, 100);
        written(&guest);
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| guest.check())).is_err()
    };
    assert!(!find(&|guest| assert_eq!(guest.piece(PLACES[3].0, 100).copy_from(&[1; 100]), 100)));
    assert!(find(&|guest| assert_eq!(guest.piece(PLACES[3].0, 101).copy_from(&[1; 101]), 101)));
    let behind = |guest: &Guest| {
        let last = guest.piece(PLACES[2].0 + NEXT_LEN - 1, 2);
        assert_eq!(last.part(1, 1).copy_from(&[1]), 1, "the first byte of a guard");
    };
    assert!(find(&behind));
    assert!(find(&|guest| assert_eq!(guest.piece(PLACES[3].0 + FAR_LEN - 1, 1).copy_from(&[1]), 1)));
}
