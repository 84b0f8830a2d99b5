//! Queues against drivers that are right, wrong, and hostile.

use std::sync::Arc;

use proptest::prelude::*;

use crate::io::Piece;
use crate::link::vhost_user::memory::GuestMemory;

use super::driver::{BUFFERS, Driver, GUEST, INDIRECT, MEMORY, NEXT, WRITE};
use super::{Chain, Direction, Fault, SplitQueue, steps};

fn take(queue: &mut SplitQueue, direction: Direction) -> Result<Option<(Chain, Vec<usize>)>, Fault> {
    let mut pieces = Vec::new();
    let chain = queue.take(direction, &mut pieces)?;
    Ok(chain.map(|chain| (chain, pieces.iter().map(Piece::len).collect())))
}

fn fault_of(offer: impl FnOnce(&mut Driver)) -> Fault {
    let mut driver = Driver::new(8);
    offer(&mut driver);
    let mut queue = driver.queue();
    let mut taken = 0;
    loop {
        match take(&mut queue, Direction::FromDriver) {
            Ok(Some(_)) => taken += 1,
            Ok(None) => panic!("no fault in {taken} chains"),
            Err(fault) => return fault,
        }
    }
}

#[test]
fn chains_come_and_go_back_in_order() {
    let mut driver = Driver::new(4);
    let mut queue = driver.queue();
    for round in 0..200u32 {
        let heads = [
            driver.offer(&[(BUFFERS, 100)], 0),
            driver.offer(&[(BUFFERS + 4096, 10), (BUFFERS + 8192, 20)], 0),
        ];
        let (first, pieces) = take(&mut queue, Direction::FromDriver).unwrap().unwrap();
        assert_eq!((first.head, first.bytes, pieces), (heads[0], 100, vec![100]));
        let (second, pieces) = take(&mut queue, Direction::FromDriver).unwrap().unwrap();
        assert_eq!((second.head, second.bytes, pieces), (heads[1], 30, vec![10, 20]));
        assert_eq!(take(&mut queue, Direction::FromDriver), Ok(None));
        queue.give_back(first, round);
        queue.give_back(second, 0);
        assert_eq!(driver.take_used(), [], "not published yet");
        assert_eq!(queue.publish(), 2);
        assert_eq!(driver.take_used(), [(u32::from(heads[0]), round), (u32::from(heads[1]), 0)]);
        assert_eq!(queue.publish(), 0);
    }
}

#[test]
fn what_is_put_back_is_taken_again() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    driver.offer(&[(BUFFERS, 1500)], WRITE);
    driver.offer(&[(BUFFERS + 4096, 1500)], WRITE);
    let (first, _) = take(&mut queue, Direction::ToDriver).unwrap().unwrap();
    let (second, _) = take(&mut queue, Direction::ToDriver).unwrap().unwrap();
    assert_eq!(queue.next_available(), 2);
    queue.put_back(second);
    queue.put_back(first);
    assert_eq!(queue.next_available(), 0);
    assert_eq!(take(&mut queue, Direction::ToDriver).unwrap().unwrap().0, first);
}

#[test]
fn an_indirect_table_is_a_chain() {
    let mut driver = Driver::new(8);
    let table = BUFFERS + 0x1_0008;
    driver.describe_table(table, &[(BUFFERS, 12), (BUFFERS + 4096, 1000), (BUFFERS + 9000, 5)], 0);
    driver.offer(&[(table, 48)], INDIRECT);
    let (chain, pieces) = take(&mut driver.queue(), Direction::FromDriver).unwrap().unwrap();
    assert_eq!((chain.bytes, pieces), (1017, vec![12, 1000, 5]));
}

#[test]
fn a_buffer_may_span_regions_that_lie_next_to_each_other() {
    let mut driver = Driver::new(8);
    let edge = GUEST + MEMORY as u64 / 2;
    driver.offer(&[(edge - 10, 30)], 0);
    let (_, pieces) = take(&mut driver.queue(), Direction::FromDriver).unwrap().unwrap();
    assert_eq!(pieces, [10, 20]);
}

#[test]
fn a_driver_that_breaks_the_rules_is_found_out() {
    let end = GUEST + MEMORY as u64;
    assert_eq!(fault_of(|driver| driver.set_available_index(9)), Fault::AvailableIndex);
    assert_eq!(fault_of(|driver| driver.make_available(8)), Fault::Head);
    let twice = |driver: &mut Driver| {
        let head = driver.offer(&[(BUFFERS, 10)], 0);
        driver.make_available(head);
    };
    assert_eq!(fault_of(twice), Fault::HeadTwice);
    let loops = |driver: &mut Driver| {
        driver.describe(0, BUFFERS, 10, NEXT, 1);
        driver.describe(1, BUFFERS, 10, NEXT, 0);
        driver.make_available(0);
    };
    assert_eq!(fault_of(loops), Fault::ChainLength);
    let next = |driver: &mut Driver| {
        driver.describe(0, BUFFERS, 10, NEXT, 8);
        driver.make_available(0);
    };
    assert_eq!(fault_of(next), Fault::Next);
    for (address, len) in [(0, 10), (GUEST - 1, 2), (end - 1, 2), (end, 1), (u64::MAX, 2), (GUEST, u32::MAX)]
    {
        let outside = |driver: &mut Driver| {
            driver.offer(&[(address, len)], 0);
        };
        assert_eq!(fault_of(outside), Fault::Address, "{len} bytes at {address:#x}");
    }
    let writable = |driver: &mut Driver| {
        driver.offer(&[(BUFFERS, 10)], WRITE);
    };
    assert_eq!(fault_of(writable), Fault::Direction);
    let empty = |driver: &mut Driver| {
        driver.offer(&[(BUFFERS, 10), (BUFFERS, 0)], 0);
    };
    assert_eq!(fault_of(empty), Fault::Empty);
    let much = |driver: &mut Driver| {
        driver.offer(&[(GUEST, MEMORY as u32), (GUEST, u32::MAX)], 0);
    };
    assert_eq!(fault_of(much), Fault::Bytes);
}

#[test]
fn indirect_tables_that_break_the_rules_are_found_out() {
    let table = BUFFERS + 0x1_0000;
    let fault = |len: u32, flags: u16, prepare: &dyn Fn(&Driver)| {
        fault_of(|driver| {
            prepare(driver);
            driver.describe(0, table, len, flags, 1);
            driver.describe(1, BUFFERS, 10, 0, 0);
            driver.make_available(0);
        })
    };
    let nothing = |_: &Driver| {};
    assert_eq!(fault(0, INDIRECT, &nothing), Fault::Indirect);
    assert_eq!(fault(17, INDIRECT, &nothing), Fault::Indirect);
    assert_eq!(fault(16, INDIRECT | NEXT, &nothing), Fault::Indirect);
    assert_eq!(fault(16 * 65_537, INDIRECT, &nothing), Fault::Indirect);
    let nested = |driver: &Driver| driver.describe_table(table, &[(table, 16)], INDIRECT);
    assert_eq!(fault(16, INDIRECT, &nested), Fault::Indirect);
    let behind = |driver: &Driver| driver.describe_table(table, &[(BUFFERS, 1), (BUFFERS, 1)], 0);
    assert_eq!(fault(16, INDIRECT, &behind), Fault::Next, "the next one is behind the table");
    let endless: Vec<(u64, u32)> = (0..65_535).map(|_| (BUFFERS, 1)).collect();
    let long = |driver: &Driver| driver.describe_table(table, &endless[..9], 0);
    assert_eq!(fault(16 * 65_535, INDIRECT, &long), Fault::ChainLength, "longer than the queue");
    // Without the feature a table is no table.
    let mut driver = Driver::new(8);
    driver.offer(&[(table, 16)], INDIRECT);
    let parts = super::Parts { indirect: false, ..driver.parts() };
    let mut queue = SplitQueue::new(driver.memory.clone(), &parts).unwrap();
    assert_eq!(take(&mut queue, Direction::FromDriver), Err(Fault::Indirect));
}

#[test]
fn a_queue_full_of_the_longest_chains_is_work_for_its_bytes_and_no_more() {
    const SIZE: u16 = 1 << 10;
    // Each chain is a table of 65,535 entries; of no more than the queue's length may it consist.
    for (len, last, expected) in
        [(0, SIZE - 2, Err(Fault::Empty)), (1, SIZE - 2, Ok(())), (1, 65_534, Err(Fault::ChainLength))]
    {
        let mut driver = Driver::new(SIZE);
        let table = BUFFERS + 0x1_0000;
        let entries: Vec<(u64, u32)> = (0..=last).map(|_| (BUFFERS, len)).collect();
        driver.describe_table(table, &entries, WRITE);
        for _ in 0..SIZE {
            driver.offer(&[(table, 16 * 65_535)], INDIRECT);
        }
        let mut queue = driver.queue();
        let mut pieces = Vec::new();
        let mut bytes = 0;
        let (result, steps) = steps::of(|| {
            while bytes < 66_000 {
                let Some(chain) = queue.take(Direction::ToDriver, &mut pieces)? else { return Ok(()) };
                bytes += chain.bytes;
            }
            Ok(())
        });
        assert_eq!(result, expected);
        // A step for the chain, and two for each buffer: the descriptor, the piece.
        assert!(steps <= 70 + 2 * (66_000 + u64::from(SIZE)), "{steps} steps for {bytes} bytes");
    }
}

#[test]
fn rings_outside_of_the_memory_or_misaligned_are_no_queue() {
    let driver = Driver::new(256);
    let parts = driver.parts();
    let end = parts.descriptors + MEMORY as u64;
    let makes = |parts| SplitQueue::new(driver.memory.clone(), &parts).is_some();
    assert!(makes(parts));
    for wrong in [
        super::Parts { size: 0, ..parts },
        super::Parts { size: 100, ..parts },
        super::Parts { descriptors: parts.descriptors + 8, ..parts },
        super::Parts { available: parts.available + 1, ..parts },
        super::Parts { used: parts.used + 2, ..parts },
        super::Parts { descriptors: end - 16, ..parts },
        super::Parts { available: end - 8, ..parts },
        super::Parts { used: end - 2048, ..parts },
        super::Parts { used: 0, ..parts },
        super::Parts { descriptors: u64::MAX - 15, ..parts },
    ] {
        assert!(!makes(wrong), "{wrong:?}");
    }
}

#[test]
fn interrupts_come_where_the_driver_wants_them() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    let mut give = |driver: &mut Driver, count: usize| {
        for _ in 0..count {
            driver.offer(&[(BUFFERS, 10)], 0);
            let (chain, _) = take(&mut queue, Direction::FromDriver).unwrap().unwrap();
            queue.give_back(chain, 0);
        }
        queue.publish();
        queue.wants_interrupt()
    };
    assert!(give(&mut driver, 1), "the first one");
    assert!(!give(&mut driver, 1), "it has not asked for another");
    driver.set_used_event(4);
    assert!(!give(&mut driver, 2));
    assert!(give(&mut driver, 2));
    assert!(!give(&mut driver, 0));
}

#[test]
fn notifications_are_asked_for_and_never_missed() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    assert!(queue.ask_for_notification());
    assert_eq!(driver.available_event(), 0);
    driver.offer(&[(BUFFERS, 10)], 0);
    assert!(!queue.ask_for_notification(), "one has come meanwhile");
    let (chain, _) = take(&mut queue, Direction::FromDriver).unwrap().unwrap();
    assert!(queue.ask_for_notification());
    assert_eq!(driver.available_event(), 1);
    // Chains that were put back are known: the wish is for those behind them.
    queue.put_back(chain);
    assert!(queue.ask_for_notification());
    assert_eq!(driver.available_event(), 1);
}

#[test]
fn another_device_goes_on_where_one_died() {
    let mut driver = Driver::new(8);
    let mut dead = driver.queue();
    for length in 1..=6 {
        driver.offer(&[(BUFFERS, length)], 0);
    }
    let chains: Vec<Chain> =
        (0..4).map(|_| take(&mut dead, Direction::FromDriver).unwrap().unwrap().0).collect();
    dead.give_back(chains[0], 0);
    dead.give_back(chains[1], 0);
    dead.publish();
    assert_eq!(driver.take_used().len(), 2);
    drop(dead);
    // The front-end knows from the used index alone where to go on.
    let parts = super::Parts { next: Some(2), ..driver.parts() };
    let mut queue = SplitQueue::new(driver.memory.clone(), &parts).unwrap();
    for length in 3..=6 {
        let (chain, _) = take(&mut queue, Direction::FromDriver).unwrap().unwrap();
        assert_eq!(chain.bytes, length);
        queue.give_back(chain, 0);
    }
    assert_eq!(take(&mut queue, Direction::FromDriver), Ok(None));
    queue.publish();
    assert_eq!(driver.take_used().len(), 4, "each chain came back once");
}

/// Every piece lies inside of the guest's memory.
fn inside(memory: &GuestMemory, pieces: &[Piece]) -> bool {
    let regions = memory.regions();
    pieces.iter().all(|piece| {
        regions.iter().any(|region| {
            let start = memory.at_guest(region.place().guest, 1).unwrap() as usize;
            let at = piece.start() as usize;
            at >= start && at + piece.len() <= start + region.place().len as usize
        })
    })
}

/// What a hostile driver does next.
#[derive(Clone, Debug)]
enum Step {
    Scribble { at: u64, bytes: Vec<u8> },
    Describe { index: u16, address: u64, len: u32, flags: u16, next: u16 },
    Table { at: u64, count: u8, flags: u16 },
    Available(u16),
    Index(u16),
    Take(bool),
    GiveBack,
    PutBack,
    Publish,
    Ask,
}

fn address() -> impl Strategy<Value = u64> {
    let edge = GUEST + MEMORY as u64;
    prop_oneof![
        4 => BUFFERS..edge,
        2 => Driver::rings(),
        1 => (edge - 64)..(edge + 64),
        1 => (GUEST + MEMORY as u64 / 2 - 64)..(GUEST + MEMORY as u64 / 2 + 64),
        1 => any::<u64>(),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let bytes = proptest::collection::vec(any::<u8>(), 1..32);
    prop_oneof![
        1 => (Driver::rings(), bytes).prop_map(|(at, bytes)| Step::Scribble { at, bytes }),
        6 => (0..16u16, address(), prop_oneof![0..4096u32, any::<u32>()], 0..8u16, 0..17u16).prop_map(
            |(index, address, len, flags, next)| Step::Describe { index, address, len, flags, next }
        ),
        2 => (BUFFERS..BUFFERS + 0x1000, any::<u8>(), 0..8u16)
            .prop_map(|(at, count, flags)| Step::Table { at, count, flags }),
        6 => (0..18u16).prop_map(Step::Available),
        1 => any::<u16>().prop_map(Step::Index),
        8 => any::<bool>().prop_map(Step::Take),
        4 => Just(Step::GiveBack),
        2 => Just(Step::PutBack),
        2 => Just(Step::Publish),
        1 => Just(Step::Ask),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_driver_does_nothing_outside_of_its_memory_is_named(
        steps in proptest::collection::vec(step(), 1..120)
    ) {
        let mut driver = Driver::new(16);
        let mut queue = driver.queue();
        let (mut taken, mut has_failed) = (Vec::new(), false);
        for step in steps {
            match step {
                Step::Scribble { at, bytes } => driver.write(at, &bytes),
                Step::Describe { index, address, len, flags, next } => {
                    driver.describe(index, address, len, flags, next);
                }
                Step::Table { at, count, flags } => {
                    let buffers = vec![(BUFFERS, 100); usize::from(count % 20) + 1];
                    driver.describe_table(at, &buffers, flags);
                    driver.describe(count.into(), at, 16 * buffers.len() as u32, INDIRECT, 0);
                }
                Step::Available(head) => driver.make_available(head),
                Step::Index(index) => driver.set_available_index(index),
                Step::Take(to_driver) if !has_failed => {
                    let direction = if to_driver { Direction::ToDriver } else { Direction::FromDriver };
                    let mut pieces = Vec::new();
                    match queue.take(direction, &mut pieces) {
                        Ok(Some(chain)) => {
                            prop_assert!(inside(&driver.memory, &pieces));
                            prop_assert_eq!(chain.pieces as usize, pieces.len());
                            prop_assert_eq!(chain.bytes as usize, pieces.iter().map(Piece::len).sum::<usize>());
                            taken.push(chain);
                        }
                        Ok(None) => {}
                        Err(_) => has_failed = true,
                    }
                }
                Step::GiveBack if !taken.is_empty() => queue.give_back(taken.remove(0), 1),
                Step::PutBack if !taken.is_empty() && !has_failed => queue.put_back(taken.pop().unwrap()),
                Step::Publish => {
                    queue.publish();
                    queue.wants_interrupt();
                }
                Step::Ask => {
                    queue.ask_for_notification();
                }
                _ => {}
            }
            prop_assert!(taken.len() <= 16, "more chains than descriptors");
        }
    }
}

#[test]
fn regions_that_overlap_are_no_memory() {
    let driver = Driver::new(8);
    let regions: Vec<_> =
        driver.memory.regions().iter().chain(driver.memory.regions()).map(Arc::clone).collect();
    assert!(GuestMemory::new(regions).is_err());
}
