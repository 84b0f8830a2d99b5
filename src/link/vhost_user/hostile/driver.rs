//! What a hostile driver does: mostly what drivers do, and now and then whatever comes to its mind.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::io::Piece;
use crate::link::virtqueue::Parts;
use crate::link::virtqueue::driver::{INDIRECT, NEXT, WRITE};
use crate::random::Random;

use super::RECEIVE;
use super::guest::{CONTROL, FAR, FAR_LEN, FRONT_END, Guest, NEAR, NEAR_LEN, NEXT_LEN, PLACES};

/// In the control region: an empty page, the rings of each queue, indirect tables.
const RINGS: u64 = CONTROL + 0x1000;
const RING_LEN: u64 = 0x2000;
const TABLES: u64 = RINGS + 2 * RING_LEN;
const TABLES_LEN: u64 = 0x4000;
/// Of one queue.
const AVAILABLE: u64 = 0x800;
const USED: u64 = 0x1000;
const HONEST_FRAME: u64 = 0x1400;
/// A sane chain's table: so many entries.
const TABLE_ENTRIES: u64 = 16;

/// One descriptor, as the memory holds it.
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn bytes(&self) -> [u8; 16] {
        let word = u128::from(self.address)
            | u128::from(self.len) << 64
            | u128::from(self.flags) << 96
            | u128::from(self.next) << 112;
        word.to_le_bytes()
    }

    fn of(bytes: [u8; 16]) -> Self {
        let word = u128::from_le_bytes(bytes);
        let (address, len) = (word as u64, (word >> 64) as u32);
        Self { address, len, flags: (word >> 96) as u16, next: (word >> 112) as u16 }
    }
}

/// A queue's driver.
pub struct Driver {
    which: usize,
    pub size: u16,
    base: u64,
    available: u16,
    next_descriptor: u16,
    /// How many descriptors each chain has that did not come back.
    in_flight: VecDeque<u16>,
    seen_used: u16,
    pub has_failed: bool,
    /// Operations so far.
    pub writes: u64,
    /// Tables were negotiated.
    indirect: bool,
    /// Its own ring may be written over as a buffer: no index in it says anything.
    is_overwritten: bool,
    /// It names the memory that is far away, too.
    far: bool,
}

impl Driver {
    pub fn new(which: usize, size: u16, far: bool) -> Self {
        Self {
            which,
            size,
            base: RINGS + which as u64 * RING_LEN,
            available: 0,
            next_descriptor: 0,
            in_flight: VecDeque::new(),
            seen_used: 0,
            has_failed: false,
            writes: 0,
            indirect: false,
            is_overwritten: false,
            far,
        }
    }

    /// Begins anew, anywhere in the circle of indices, and gives the device its ring.
    pub fn start(&mut self, guest: &mut Guest, random: &mut Random) -> Parts {
        let any = random.bits() as u16;
        let index = random.pick(&[0, 65_530, any]);
        guest.poke(self.base, &[0; RING_LEN as usize]);
        guest.poke(self.base + AVAILABLE + 2, &index.to_le_bytes());
        guest.poke(self.base + USED + 2, &index.to_le_bytes());
        guest.give(self.which, self.base + USED, 6 + 8 * u64::from(self.size));
        (self.available, self.seen_used, self.next_descriptor) = (index, index, 0);
        self.in_flight.clear();
        (self.has_failed, self.is_overwritten) = (false, false);
        self.indirect = !random.one_in(8);
        Parts {
            size: self.size,
            descriptors: self.base + FRONT_END,
            available: self.base + AVAILABLE + FRONT_END,
            used: self.base + USED + FRONT_END,
            next: Some(index),
            event_index: !random.one_in(4),
            indirect: self.indirect,
        }
    }

    /// The used index.
    pub fn used(&self, guest: &Guest) -> u16 {
        guest.word(self.base + USED + 2)
    }

    fn write(&mut self, guest: &mut Guest, address: u64, bytes: &[u8]) {
        guest.poke(address, bytes);
        self.writes += 1;
    }

    fn describe(&mut self, guest: &mut Guest, index: u16, descriptor: &Descriptor) {
        self.write(guest, self.base + 16 * u64::from(index), &descriptor.bytes());
    }

    fn make_available(&mut self, guest: &mut Guest, head: u16) {
        let slot = u64::from(self.available % self.size);
        self.write(guest, self.base + AVAILABLE + 4 + 2 * slot, &head.to_le_bytes());
        self.set_index(guest, self.available.wrapping_add(1));
    }

    fn set_index(&mut self, guest: &mut Guest, index: u16) {
        self.available = index;
        self.write(guest, self.base + AVAILABLE + 2, &index.to_le_bytes());
    }

    /// Does something, so many times in 256 something that no driver may do.
    pub fn act(&mut self, guest: &mut Guest, random: &mut Random, malice: u64) {
        if random.below(256) < malice { self.act_wrongly(guest, random) } else { self.offer(guest, random) }
    }

    /// Offers a chain as a driver does: of one buffer or several, in a table or not.
    fn offer(&mut self, guest: &mut Guest, random: &mut Random) {
        while self.seen_used != self.used(guest) && self.in_flight.pop_front().is_some() {
            self.seen_used = self.seen_used.wrapping_add(1);
        }
        let count = 1 + random.below(3) as u16;
        let held: u32 = self.in_flight.iter().map(|count| u32::from(*count)).sum();
        if held + u32::from(count) > u32::from(self.size) {
            return;
        }
        let flag = if self.which == RECEIVE { WRITE } else { 0 };
        let room = NEAR_LEN + NEXT_LEN - 0x600;
        let buffer = |guest: &mut Guest, random: &mut Random, is_first: bool| {
            let (address, len) = (NEAR + random.below(room), random.spread(0x600) as u32);
            if is_first && flag == 0 {
                let frame = frame(random);
                guest.poke(address, &frame);
                return (address, (frame.len() as u32).max(if random.one_in(2) { len } else { 0 }));
            }
            (address, len)
        };
        let head = self.next_descriptor;
        if self.indirect && random.one_in(3) {
            let table = TABLES + u64::from(head) * 16 * TABLE_ENTRIES;
            for index in 0..count {
                let (address, len) = buffer(guest, random, index == 0);
                let next = if index + 1 < count { NEXT } else { 0 };
                let descriptor = Descriptor { address, len, flags: flag | next, next: index + 1 };
                self.write(guest, table + 16 * u64::from(index), &descriptor.bytes());
            }
            let descriptor =
                Descriptor { address: table, len: 16 * u32::from(count), flags: INDIRECT, next: 0 };
            self.describe(guest, head, &descriptor);
            self.next_descriptor = (head + 1) % self.size;
            self.in_flight.push_back(1);
        } else {
            for index in 0..count {
                let (address, len) = buffer(guest, random, index == 0);
                let at = self.next_descriptor;
                self.next_descriptor = (at + 1) % self.size;
                let next = if index + 1 < count { NEXT } else { 0 };
                self.describe(
                    guest,
                    at,
                    &Descriptor { address, len, flags: flag | next, next: self.next_descriptor },
                );
            }
            self.in_flight.push_back(count);
        }
        self.make_available(guest, head);
    }

    fn act_wrongly(&mut self, guest: &mut Guest, random: &mut Random) {
        let index = random.below(u64::from(self.size)) as u16;
        match random.below(12) {
            0..=2 => {
                let descriptor = self.any_descriptor(random);
                self.describe(guest, index, &descriptor);
            }
            3 | 4 => {
                let at = TABLES + random.below(TABLES_LEN / 16) * 16;
                let descriptor = self.any_descriptor(random);
                self.write(guest, at, &descriptor.bytes());
            }
            5 => {
                let slot = random.below(u64::from(self.size));
                let head = random.below(u64::from(self.size) + 2) as u16;
                self.write(guest, self.base + AVAILABLE + 4 + 2 * slot, &head.to_le_bytes());
            }
            6 => {
                let jump = if random.one_in(4) { random.bits() as u16 } else { 1 + random.below(4) as u16 };
                self.set_index(guest, self.available.wrapping_add(jump));
            }
            // A head twice; a chain that goes round; a table in a table, as long as can be.
            7 => self.make_available(guest, index),
            8 => {
                let (address, len) = (NEAR, random.spread(64) as u32);
                let flags = if self.which == RECEIVE { NEXT | WRITE } else { NEXT };
                self.describe(guest, index, &Descriptor { address, len, flags, next: index });
                self.make_available(guest, index);
            }
            9 => {
                let address = TABLES + random.below(TABLES_LEN);
                let len = random.pick(&[16, 16 * 65_535, 16 * 65_536, 16 * 65_537, 17, 256]);
                self.describe(guest, index, &Descriptor { address, len, flags: INDIRECT, next: 0 });
                self.make_available(guest, index);
            }
            10 => {
                let at = self.base + random.below(AVAILABLE + 4 + 2 * u64::from(self.size));
                let bytes = random.bits().to_le_bytes();
                self.write(guest, at, &bytes[..=random.below(8) as usize]);
                self.available = guest.word(self.base + AVAILABLE + 2);
            }
            // Which used index it wants to be told of, or that it wants to be told of none.
            _ => {
                let at = if random.one_in(2) { 0 } else { 4 + 2 * u64::from(self.size) };
                let word = if at == 0 { random.below(2) as u16 } else { random.bits() as u16 };
                self.write(guest, self.base + AVAILABLE + at, &word.to_le_bytes());
            }
        }
    }

    fn any_descriptor(&mut self, random: &mut Random) -> Descriptor {
        let right = if self.which == RECEIVE { WRITE } else { 0 };
        let flags = match random.below(8) {
            0..=3 => right,
            4 | 5 => right | NEXT,
            6 => INDIRECT,
            _ => random.bits() as u16 & 0xf,
        };
        let len = match random.below(16) {
            0..=9 => random.spread(0xf00) as u32,
            10..=13 => random.below(16) as u32 + 1,
            // Nothing, or more than lies together anywhere.
            _ => random.pick(&[0, 0x2_0000, u32::MAX, u32::MAX - 11]),
        };
        let next = random.below(u64::from(self.size) + 1) as u16;
        Descriptor { address: self.any_address(random), len, flags, next }
    }

    fn any_address(&mut self, random: &mut Random) -> u64 {
        match random.below(12) {
            0..=5 => NEAR + random.below(NEAR_LEN + NEXT_LEN),
            6 if self.far => FAR + random.below(FAR_LEN),
            7 => {
                self.is_overwritten = true;
                self.base + random.below(RING_LEN)
            }
            8 => TABLES + random.below(TABLES_LEN),
            9 | 10 => {
                let (start, len) = PLACES[random.below(if self.far { 4 } else { 3 }) as usize];
                random.pick(&[start, start + len]).wrapping_add(random.below(33)).wrapping_sub(16)
            }
            // No guest has memory there; the highest ones lead to overflows.
            _ => {
                let any = random.bits();
                random.pick(&[u64::MAX, u64::MAX - 15, any | 1 << 63, 0, any >> 40])
            }
        }
    }

    /// Notes what the device may write to: the buffers to be written of each chain that is available. Found by a walk
    /// of its own, over the memory as it is now.
    pub fn give_buffers(&self, guest: &mut Guest) {
        if self.has_failed {
            return;
        }
        let (index, used) = (guest.word(self.base + AVAILABLE + 2), self.seen_used);
        let count = if self.is_overwritten { self.size } else { index.wrapping_sub(used).min(self.size) };
        for entry in 0..count {
            let slot = u64::from(used.wrapping_add(entry) % self.size);
            let head = guest.word(self.base + AVAILABLE + 4 + 2 * slot);
            if head < self.size {
                self.give_chain(guest, self.base, u64::from(self.size), head);
            }
        }
    }

    fn give_chain(&self, guest: &mut Guest, table: u64, entries: u64, head: u16) {
        let mut index = u64::from(head);
        for _ in 0..self.size {
            let Some(bytes) = guest.peek(table.wrapping_add(16 * index)) else { return };
            let descriptor = Descriptor::of(bytes);
            if descriptor.flags & INDIRECT != 0 {
                if table == self.base {
                    let entries = u64::from(descriptor.len / 16);
                    self.give_chain(guest, descriptor.address, entries, 0);
                }
                return;
            }
            if descriptor.flags & WRITE != 0 {
                guest.give(self.which, descriptor.address, u64::from(descriptor.len));
            }
            index = u64::from(descriptor.next);
            if descriptor.flags & NEXT == 0 || index >= entries {
                return;
            }
        }
    }

    /// Sends a frame; returns its bytes, and the used index once its chain is back.
    pub fn send_honestly(&mut self, guest: &mut Guest, random: &mut Random) -> (Vec<u8>, u16) {
        let bytes: Vec<u8> = (0..=1000 - random.spread(900)).map(|_| random.bits() as u8).collect();
        let address = self.base + HONEST_FRAME;
        guest.poke(address, &[&[0; 12][..], &bytes].concat());
        let (head, len) = (self.available % self.size, 12 + bytes.len() as u32);
        self.describe(guest, head, &Descriptor { address, len, flags: 0, next: 0 });
        self.make_available(guest, head);
        (bytes, self.available)
    }

    /// Offers a buffer for any frame of the link's MTU; returns the used index.
    pub fn offer_honestly(&mut self, guest: &mut Guest) -> u16 {
        let head = self.available % self.size;
        let address = self.base + HONEST_FRAME;
        self.describe(guest, head, &Descriptor { address, len: 1526, flags: WRITE, next: 0 });
        self.make_available(guest, head);
        self.used(guest)
    }

    /// How many bytes came into that buffer.
    pub fn look_honestly(&mut self, guest: &Guest, used: u16) -> u32 {
        assert_eq!(self.used(guest), used.wrapping_add(1));
        let slot = u64::from(used % self.size);
        let entry: [u8; 8] = guest.peek(self.base + USED + 4 + 8 * slot).unwrap();
        let entry = u64::from_le_bytes(entry);
        assert_eq!(entry as u32, u32::from(slot as u16), "its head");
        assert_eq!(
            guest.peek(self.base + HONEST_FRAME + 12 + 54),
            Some([0x77]),
            "the payload is behind a head of 54 bytes"
        );
        self.seen_used = used.wrapping_add(1);
        (entry >> 32) as u32
    }
}

/// The first bytes of a frame: headers that are right, or lie about offsets, lengths and sizes.
fn frame(random: &mut Random) -> Vec<u8> {
    let mut bytes = vec![0; 90 + random.below(200) as usize];
    for word in bytes.chunks_mut(8) {
        let noise = random.bits().to_le_bytes();
        word.copy_from_slice(&noise[..word.len()]);
    }
    // The virtio-net header: checksum wanted or not, a kind of segmentation, and whatever it says about lengths.
    bytes[0] &= 1;
    bytes[1] = random.pick(&[0, 1, 4, 5, 0x81, bytes[1]]);
    let is_v4 = random.one_in(2);
    bytes[24..26].copy_from_slice(if is_v4 { &[8, 0] } else { &[0x86, 0xdd] });
    let any = random.bits() as u16;
    let len = random.pick(&[0, 20, 40, 60, 300, 65_535, any]);
    let protocol = random.pick(&[1, 6, 17, 44, 0, 58]);
    let ip = &mut bytes[26..];
    if is_v4 {
        ip[0] = if random.one_in(8) { ip[0] } else { 0x45 };
        ip[2..4].copy_from_slice(&len.to_be_bytes());
        ip[6..8].copy_from_slice(if random.one_in(4) { &[0x20, 1] } else { &[0, 0] });
        ip[9] = protocol;
        ip[10..12].fill(0);
        let header_len = usize::from(ip[0] & 0xf).max(5) * 4;
        let sum = crate::frame::checksum::Sum::default().with(&ip[..header_len]).finish();
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
    } else {
        ip[0] = 0x60;
        ip[4..6].copy_from_slice(&len.to_be_bytes());
        ip[6] = protocol;
    }
    bytes
}

/// Writes over the memory of hostile queues while it is being read.
pub struct Scribbler {
    rings: Vec<(usize, Piece)>,
    tables: Piece,
    frames: Piece,
    size: u16,
    random: Random,
}

impl Scribbler {
    pub fn new(guest: &Guest, size: u16, hostile: &[usize], seed: u64) -> Self {
        let ring = |which: &usize| (*which, guest.piece(RINGS + *which as u64 * RING_LEN, RING_LEN as usize));
        Self {
            rings: hostile.iter().map(ring).collect(),
            tables: guest.piece(TABLES, TABLES_LEN as usize),
            frames: guest.piece(NEAR, NEAR_LEN as usize),
            size,
            random: Random::new(seed),
        }
    }

    /// Scribbles until it is over.
    pub fn scribble(mut self, over: &AtomicBool) {
        let random = &mut self.random;
        while !over.load(Ordering::Relaxed) {
            let (which, ring) = self.rings[random.below(self.rings.len() as u64) as usize];
            let index = random.below(u64::from(self.size)) as usize;
            let right = if which == RECEIVE { WRITE } else { 0 };
            // What fails the queue at once is rare, or nothing else would be seen.
            let flags = match random.below(4096) {
                0 => random.bits() as u16 & 7,
                1..1024 => right | NEXT,
                _ => right,
            };
            let address = NEAR + random.below(NEAR_LEN + NEXT_LEN - 0x600);
            let next = random.below(u64::from(self.size)) as u16;
            let descriptor = Descriptor { address, len: random.spread(0x600) as u32, flags, next }.bytes();
            match random.below(1 << 16) {
                0 => {
                    let word = ring.part((AVAILABLE + 4) as usize + 2 * index, 2);
                    word.copy_from(&(random.bits() as u16 % self.size).to_le_bytes());
                }
                1 => {
                    ring.part(AVAILABLE as usize + 2, 2).copy_from(&(random.bits() as u16).to_le_bytes());
                }
                2..0x4000 => {
                    ring.part(16 * index, 16).copy_from(&descriptor);
                }
                0x4000..0x8000 => {
                    self.tables.part(16 * random.below(TABLES_LEN / 16) as usize, 16).copy_from(&descriptor);
                }
                _ => {
                    let at = random.below(NEAR_LEN) as usize;
                    self.frames.part(at, 64).copy_from(&frame(random));
                }
            }
        }
    }
}
