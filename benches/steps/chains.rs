//! A virtqueue, and a driver that offers chains in it.
#![allow(dead_code, clippy::unwrap_used)]

use std::hint::black_box;

use hythe::io::Piece;
use hythe::link::virtqueue::{Chain, Direction, Parts, SplitQueue};

use crate::ring::{INDIRECT, Memory, NEXT, Ring, START, WRITE};

const SIZE: u16 = 256;
const TABLES: u64 = START + Ring::LEN;
const BUFFERS: u64 = TABLES + SIZE as u64 * 64;
const MEMORY: usize = 4 << 20;

/// How a chain is written down.
#[derive(Clone, Copy)]
pub enum Form {
    /// A table of a head and payload.
    Indirect,
    /// The same in descriptors of the queue.
    Direct,
    /// One buffer to be written, as receive queues have them.
    Writable,
}

/// A queue and its driver, with as many chains as there is room for.
pub struct Chains {
    queue: SplitQueue,
    ring: Ring,
    direction: Direction,
    pieces: Vec<Piece>,
    taken: Vec<Chain>,
}

impl Chains {
    pub fn new(form: Form) -> Self {
        let memory = Memory::new(MEMORY);
        let ring = Ring::new(&memory, START, SIZE);
        for slot in 0..SIZE {
            let buffer = BUFFERS + u64::from(slot) * 4096;
            match form {
                Form::Indirect => {
                    let table = TABLES + u64::from(slot) * 64;
                    memory.describe(table, buffer, 66, NEXT, 1);
                    memory.describe(table + 16, buffer + 1024, 1448, 0, 0);
                    ring.describe(slot, table, 32, INDIRECT, 0);
                }
                Form::Direct => {
                    // Two descriptors a chain: the second half of the ring's entries names the same chains again.
                    let head = slot * 2 % SIZE;
                    ring.describe(head, buffer, 66, NEXT, head + 1);
                    ring.describe(head + 1, buffer + 1024, 1448, 0, 0);
                    ring.set_entry(slot, head);
                }
                Form::Writable => ring.describe(slot, buffer, 1536, WRITE, 0),
            }
        }
        let parts = Parts { event_index: true, indirect: true, ..ring.parts() };
        let direction =
            if matches!(form, Form::Writable) { Direction::ToDriver } else { Direction::FromDriver };
        let queue = SplitQueue::new(memory.map.clone(), &parts).unwrap();
        Self { queue, ring, direction, pieces: Vec::new(), taken: Vec::new() }
    }

    /// The driver offers so many chains; the device takes them, gives them back, and considers an interrupt.
    pub fn step(&mut self, batch: u16) {
        let Self { queue, ring, direction, pieces, taken } = self;
        ring.offer(batch);
        ring.set_used_event(batch - 1);
        while let Ok(Some(chain)) = queue.take(*direction, pieces) {
            taken.push(chain);
        }
        assert_eq!(black_box(&*taken).len(), usize::from(batch));
        black_box(&*pieces);
        for chain in taken.drain(..) {
            queue.give_back(chain, chain.bytes);
        }
        pieces.clear();
        queue.publish();
        assert!(queue.wants_interrupt());
        ring.skip_used();
    }
}
