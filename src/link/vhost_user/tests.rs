//! A pair of queues as a worker uses it, against a driver in the same process.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use crate::frame::build::{HEAD_MAX, Head};
use crate::frame::drop_reason::DropReason;
use crate::frame::offload::{HEADER_LEN, Offload, Segmentation};
use crate::host::engine::Engine;
use crate::host::engine::epoll::Epoll;
use crate::io::{Operations, Piece};
use crate::link::virtqueue::driver::{BUFFERS, Driver, GUEST, INDIRECT, MEMORY, WRITE};
use crate::link::{Ahead, InboundHead, Link, Space};

use super::pairs::Pairs;
use super::{Attachment, Control, Queue, Ring, Takes};

/// The buffers of the receive queue: far enough apart for the longest.
const APART: u64 = 0x2000;

struct Bench {
    link: Queue,
    control: Control,
    transmit: Driver,
    receive: Driver,
    /// What a front-end would read its interrupts from.
    calls: [UnixStream; 2],
    engine: Epoll,
    operations: Operations,
}

/// A descriptor for a kick or a call, and its other end.
fn event() -> (OwnedFd, UnixStream) {
    let (a, b) = UnixStream::pair().unwrap();
    a.set_nonblocking(true).unwrap();
    b.set_nonblocking(true).unwrap();
    (a.into(), b)
}

impl Bench {
    fn new(takes: Takes) -> Self {
        let transmit = Driver::new(64);
        let receive = transmit.beside();
        let (link, control) = Queue::new(1500, 0, Pairs::default());
        let (transmit_call, transmit_end) = event();
        let (receive_call, receive_end) = event();
        let ring = |driver: &Driver, call| Ring {
            parts: driver.parts(),
            kick: event().0,
            call: Some(call),
            error: None,
        };
        let attachment = Attachment {
            memory: transmit.memory.clone(),
            transmit: Some(ring(&transmit, transmit_call)),
            discards: false,
            receive: Some(ring(&receive, receive_call)),
            takes,
            tcp_segmentation: true,
            udp_segmentation: true,
        };
        let calls = [transmit_end, receive_end];
        let engine = Epoll::new().unwrap();
        let operations = Operations::default();
        let mut bench = Self { link, control, transmit, receive, calls, engine, operations };
        bench.command(move |control| assert!(control.attach(attachment, || ()).unwrap()));
        bench
    }

    /// Does what a session does, while the worker answers.
    fn command<T: Send>(&mut self, task: impl FnOnce(&Control) -> T + Send) -> T {
        let Self { control, link, .. } = self;
        std::thread::scope(|scope| {
            let session = scope.spawn(|| task(control));
            while !session.is_finished() {
                link.take_news();
            }
            session.join().unwrap()
        })
    }

    /// Offers the guest's buffers of so many bytes each.
    fn offer(&mut self, lens: &[u32]) {
        for (index, len) in lens.iter().enumerate() {
            self.receive.offer(&[(BUFFERS + index as u64 * APART, *len)], WRITE);
        }
    }

    /// The kernel writes `payload` into a space, and the frame is committed with a head of `head_len` bytes.
    fn fill(&mut self, space: Space, head_len: usize, payload: &[u8]) {
        let mut at = 0;
        self.link.space(space, &mut |piece| at += piece.copy_from(&payload[at..]));
        assert_eq!(at, payload.len().min(space.capacity));
        self.commit(space, head_len, payload.len());
    }

    fn commit(&mut self, space: Space, head_len: usize, payload_len: usize) {
        let bytes: Vec<u8> = (1..=head_len as u8).collect();
        let head = Head { len: head_len, transport_start: 34, checksum_offset: 6 };
        let offload = Offload { checksum_partial: true, segmentation: Segmentation::None };
        self.link.commit(space, &InboundHead { bytes: &bytes, head, v4: true, offload }, payload_len);
    }

    fn publish(&mut self) -> usize {
        self.operations.clear();
        self.link.begin_publish(&mut self.operations);
        self.engine.run(&mut self.operations);
        self.link.end_publish(&self.operations)
    }

    fn interrupts(&mut self, which: usize) -> usize {
        let mut bytes = [0; 64];
        self.calls[which].read(&mut bytes).unwrap_or(0) / 8
    }

    /// The frames that the guest got, without their virtio-net headers, and how many buffers each fills.
    fn frames(&mut self) -> Vec<(Vec<u8>, usize)> {
        let used = self.receive.take_used();
        let mut used = used.iter();
        let mut frames = Vec::new();
        while let Some((head, len)) = used.next() {
            let read = |driver: &Driver, head: u32, len: u32| {
                driver.read(BUFFERS + u64::from(head) * APART, len as usize)
            };
            let mut bytes = read(&self.receive, *head, *len);
            let buffers = u16::from_le_bytes([bytes[10], bytes[11]]) as usize;
            for _ in 1..buffers {
                let (head, len) = used.next().unwrap();
                bytes.extend(read(&self.receive, *head, *len));
            }
            frames.push((bytes.split_off(HEADER_LEN), buffers));
        }
        frames
    }
}

const MERGED: Takes = Takes { merged: true, partial_checksums: true };

/// A frame as [`Bench::fill`] makes it.
fn frame(head_len: usize, payload: &[u8]) -> Vec<u8> {
    (1..=head_len as u8).chain(payload.iter().copied()).collect()
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|index| (index * 7) as u8).collect()
}

#[test]
fn a_frame_fills_as_many_buffers_as_it_takes_and_they_come_back_at_once() {
    let mut bench = Bench::new(MERGED);
    bench.offer(&[1500, 1000, 2000, 1500]);
    let space = bench.link.reserve_ahead(66, Ahead::Bytes(4000)).unwrap();
    assert_eq!(space.capacity, 4000);
    let payload = bytes(3000);
    bench.fill(space, 66, &payload);
    assert_eq!(bench.receive.take_used(), [], "nothing before it is published");
    assert_eq!(bench.publish(), 0);
    assert_eq!(bench.frames(), [(frame(66, &payload), 3)]);
    assert_eq!(bench.interrupts(1), 1, "for whatever happened before, and for this frame");
    assert_eq!(bench.interrupts(0), 1, "also where nothing is known to have happened");
    // The fourth buffer was put back, and is the next.
    let space = bench.link.reserve_ahead(66, Ahead::Bytes(100)).unwrap();
    bench.fill(space, 66, b"next");
    bench.publish();
    assert_eq!(bench.frames(), [(frame(66, b"next"), 1)]);
}

#[test]
fn room_that_was_taken_ahead_and_stayed_empty_is_not_waited_for() {
    let mut bench = Bench::new(MERGED);
    bench.offer(&[1500; 8]);
    let space = bench.link.reserve_ahead(66, Ahead::Bytes(64_000)).unwrap();
    assert!(bench.link.reserve_ahead(66, Ahead::Bytes(1400)).is_none());
    assert!(bench.link.wants_room());
    bench.fill(space, 66, b"few");
    bench.publish();
    assert!(
        !bench.link.wants_room(),
        "seven of eight are back, and the guest adds none while they are there"
    );
    assert!(bench.link.reserve_ahead(66, Ahead::Bytes(1400)).is_some());
}

#[test]
fn room_that_is_found_while_it_is_taken_is_not_waited_for() {
    let mut bench = Bench::new(MERGED);
    assert!(bench.link.reserve_ahead(66, Ahead::Bytes(1400)).is_none() && bench.link.wants_room());
    // Of what the guest adds meanwhile somebody else takes a part, and all of that is filled.
    bench.offer(&[1500; 8]);
    let space = bench.link.reserve_ahead(66, Ahead::Bytes(1400)).unwrap();
    assert!(!bench.link.wants_room(), "seven are left, of which the guest will not tell again");
    bench.fill(space, 66, &bytes(1400));
    bench.publish();
    assert!(!bench.link.wants_room());

    // A frame that is complete then goes at once, too.
    let complete = bench.link.reserve(0).unwrap();
    bench.commit(complete, 54, 0);
    assert!(bench.link.has_unpublished());
    bench.publish();
    assert_eq!(bench.frames(), [(frame(66, &bytes(1400)), 1), (frame(54, b""), 1)]);
}

#[test]
fn a_complete_frame_that_waits_for_room_goes_with_what_is_found_for_another() {
    let mut bench = Bench::new(MERGED);
    let complete = bench.link.reserve(0).unwrap();
    bench.commit(complete, 54, 0);
    bench.publish();
    assert!(bench.link.wants_room() && !bench.link.has_unpublished(), "the guest will tell of room");
    bench.offer(&[1500; 8]);
    let space = bench.link.reserve_ahead(66, Ahead::Bytes(100)).unwrap();
    bench.fill(space, 66, b"found");
    bench.publish();
    assert_eq!(bench.frames(), [(frame(66, b"found"), 1), (frame(54, b""), 1)]);
    assert!(!bench.link.wants_room());
}

#[test]
fn a_buffer_that_is_too_small_for_a_head_is_no_room_that_came_back() {
    let mut bench = Bench::new(MERGED);
    bench.offer(&[20]);
    for _ in 0..3 {
        assert!(bench.link.reserve_ahead(66, Ahead::Bytes(1400)).is_none());
        bench.publish();
        assert!(bench.link.wants_room(), "or the worker would try again at once, and for ever");
    }
}

#[test]
fn a_stream_takes_the_room_that_there_is_and_a_space_that_stays_empty_costs_nothing() {
    let mut bench = Bench::new(MERGED);
    bench.offer(&[1500]);
    let space = bench.link.reserve_ahead(66, Ahead::Bytes(64_000)).unwrap();
    assert_eq!(space.capacity, 1500 - HEADER_LEN - 66);
    bench.link.cancel(space);
    assert!(bench.link.has_unpublished());
    bench.publish();
    assert!(bench.link.reserve_ahead(66, Ahead::Bytes(64_000)).is_some());
    assert_eq!(bench.receive.take_used(), []);
}

#[test]
fn one_consumer_at_a_time_reserves_ahead_and_complete_frames_come_behind_it() {
    let mut bench = Bench::new(MERGED);
    bench.offer(&[1500; 8]);
    assert!(bench.link.may_reserve_ahead());
    let first = bench.link.reserve_ahead(66, Ahead::Bytes(2000)).unwrap();
    let second = bench.link.reserve_ahead(66, Ahead::Bytes(2000)).unwrap();
    assert!(!bench.link.may_reserve_ahead(), "another one waits for the next pass");
    let complete = bench.link.reserve(0).unwrap();
    bench.commit(complete, 54, 0);
    let (a, b) = (bytes(2000), bytes(500));
    bench.fill(first, 66, &a);
    bench.fill(second, 66, &b);
    bench.publish();
    assert_eq!(bench.frames(), [(frame(66, &a), 2), (frame(66, &b), 1), (frame(54, b""), 1)]);
    assert!(bench.link.may_reserve_ahead());
    assert_eq!(bench.link.take_fault(), None);
}

#[test]
fn what_is_filled_behind_an_empty_space_or_with_another_head_is_right_all_the_same() {
    let mut bench = Bench::new(MERGED);
    bench.offer(&[1500; 8]);
    let spaces: Vec<Space> =
        (0..3).map(|_| bench.link.reserve_ahead(66, Ahead::Bytes(1400)).unwrap()).collect();
    bench.link.cancel(spaces[0]);
    let (a, b) = (bytes(1400), bytes(30));
    bench.fill(spaces[1], 66, &a);
    bench.fill(spaces[2], 66, &b);
    bench.publish();
    assert_eq!(bench.frames(), [(frame(66, &a), 1), (frame(66, &b), 1)]);
    let space = bench.link.reserve_ahead(66, Ahead::Bytes(1400)).unwrap();
    bench.fill(space, HEAD_MAX - 20, &a[..1300]);
    bench.publish();
    assert_eq!(bench.frames(), [(frame(HEAD_MAX - 20, &a[..1300]), 1)]);
    // All was put in order again: eight buffers, three used.
    for _ in 0..5 {
        let space = bench.link.reserve_ahead(66, Ahead::Bytes(1)).unwrap();
        bench.fill(space, 66, b"x");
    }
    bench.publish();
    assert_eq!(bench.frames().len(), 5);
    assert!(bench.link.reserve_ahead(66, Ahead::Bytes(1)).is_none());
    assert!(bench.link.wants_room());
}

#[test]
fn a_datagram_longer_than_expected_arrives_whole() {
    let mut bench = Bench::new(MERGED);
    bench.offer(&[1526; 60]);
    for (round, len) in [(0, 60_000), (1, 60_000), (2, 100)] {
        let space = bench.link.reserve_ahead(42, Ahead::Datagram(65_527)).unwrap();
        let payload = bytes(len);
        bench.fill(space, 42, &payload);
        assert_eq!(bench.publish(), 0);
        let frames = bench.frames();
        assert_eq!(frames[0].0, frame(42, &payload), "round {round}");
        bench = Bench::new(MERGED);
        bench.offer(&[1526; 60]);
    }
}

#[test]
fn a_guest_without_offloads_gets_complete_checksums() {
    let mut bench = Bench::new(Takes { merged: true, partial_checksums: false });
    bench.offer(&[1500; 4]);
    let space = bench.link.reserve_ahead(42, Ahead::Bytes(100)).unwrap();
    bench.fill(space, 42, &bytes(100));
    bench.publish();
    let (got, _) = bench.frames().remove(0);
    let sum = crate::frame::checksum::Sum::default().with(&got[34..]);
    // What the partial sum stood for is all that is missing.
    assert_eq!(sum.finish(), u16::from_be_bytes([41, 42]));
}

#[test]
fn a_driver_of_whole_buffers_gets_a_frame_in_one() {
    let mut bench = Bench::new(Takes { merged: false, partial_checksums: true });
    bench.offer(&[1600, 1600, 100]);
    let space = bench.link.reserve_ahead(66, Ahead::Bytes(64_000)).unwrap();
    assert_eq!(space.capacity, 1600 - HEADER_LEN - 66);
    bench.fill(space, 66, b"one");
    let complete = bench.link.reserve(3).unwrap();
    bench.fill(complete, 54, b"two");
    // This one does not fit into the third buffer, and would not into any.
    let complete = bench.link.reserve(500).unwrap();
    bench.fill(complete, 54, &bytes(500));
    assert_eq!(bench.publish(), 1, "one frame is lost");
    assert_eq!(bench.frames(), [(frame(66, b"one"), 1), (frame(54, b"two"), 1)]);
}

#[test]
fn complete_frames_wait_for_room_and_are_bounded() {
    let mut bench = Bench::new(MERGED);
    let mut reserved = 0;
    while let Some(space) = bench.link.reserve(4) {
        bench.fill(space, 54, b"wait");
        reserved += 1;
    }
    assert_eq!(reserved, 64);
    assert_eq!(bench.publish(), 0);
    assert!(bench.link.wants_room() && bench.link.prepare_sleep());
    assert_eq!(bench.link.ready_fds().iter().flatten().count(), 2, "both kicks are watched");
    bench.offer(&[1500; 64]);
    assert!(bench.link.has_work());
    bench.publish();
    assert_eq!(bench.frames().len(), 64);
    assert!(!bench.link.wants_room());
}

#[test]
fn frames_from_the_guest_come_in_batches_and_their_chains_go_back_with_the_batch() {
    let mut bench = Bench::new(MERGED);
    let mut header = [0; HEADER_LEN];
    let offload = Offload { checksum_partial: true, segmentation: Segmentation::Tcp { size: 1448 } };
    offload.write(&mut header, true, 66, (34, 16), 1);
    bench.transmit.write(BUFFERS, &[&header[..], &bytes(4000)].concat());
    bench.transmit.offer(&[(BUFFERS, 12), (BUFFERS + 12, 1000), (BUFFERS + 1012, 3000)], 0);
    bench.transmit.offer(&[(BUFFERS, 60)], 0);
    bench.transmit.offer(&[(BUFFERS, 5)], 0);
    let received = bench.link.end_receive(&Operations::default());
    assert_eq!((received.frames, received.empty), (3, true));
    let whole = bench.link.frame(0).unwrap();
    assert_eq!((whole.len, whole.offload), (4000, Ok(offload)));
    assert_eq!(whole.head, &bytes(4000)[..whole.head.len()]);
    let mut payload = Vec::new();
    bench.link.payload(0, 66, 3934, &mut |piece: Piece| piece.copy_to(&mut payload));
    assert_eq!(payload, bytes(4000)[66..]);
    assert_eq!(bench.link.frame(1).unwrap().len, 48);
    assert!(bench.link.frame(2).unwrap().offload.is_err(), "shorter than its header");
    assert_eq!(bench.transmit.take_used(), []);
    bench.link.release();
    assert_eq!(bench.transmit.take_used().len(), 3);
    bench.publish();
    assert_eq!(bench.interrupts(0), 1, "one for all of them");
    assert!(!bench.link.has_unpublished());
}

#[test]
fn a_frame_longer_than_any_link_carries_is_not_believed() {
    let mut bench = Bench::new(MERGED);
    // The whole of the memory, sixty times.
    let table = BUFFERS + 0x1_0000;
    bench.transmit.describe_table(table, &[(GUEST, MEMORY as u32); 60], 0);
    bench.transmit.offer(&[(table, 60 * 16)], INDIRECT);
    bench.transmit.offer(&[(GUEST, 12 + 14 + 40 + 65_535)], 0);
    assert_eq!(bench.link.end_receive(&Operations::default()).frames, 1, "the batch has enough");
    let frame = bench.link.frame(0).unwrap();
    assert_eq!(frame.offload, Err(DropReason::FrameTooLong));
    assert!(frame.len < 70_000, "who copies it, for a capture, copies no more than of others");
    bench.link.release();
    assert_eq!(bench.link.end_receive(&Operations::default()).frames, 1);
    assert!(bench.link.frame(0).unwrap().offload.is_ok(), "IPv6's longest");
}

#[test]
fn a_wrong_driver_loses_its_queue_and_nothing_else() {
    let mut bench = Bench::new(MERGED);
    bench.offer(&[1500; 2]);
    bench.transmit.set_available_index(1000);
    assert_eq!(bench.link.end_receive(&Operations::default()).frames, 0);
    let told = bench.link.take_fault().unwrap();
    assert!(told.contains("transmit queue") && told.contains("available index"), "{told}");
    assert_eq!(bench.link.take_fault(), None);
    let space = bench.link.reserve_ahead(66, Ahead::Bytes(10)).unwrap();
    bench.fill(space, 66, b"still here");
    bench.publish();
    assert_eq!(bench.frames().len(), 1);
    // The other queue as well: nothing is touched any more, whatever was reserved.
    let complete = bench.link.reserve(4).unwrap();
    bench.receive.set_available_index(1000);
    assert!(bench.link.reserve_ahead(66, Ahead::Bytes(3000)).is_none());
    bench.fill(complete, 54, b"lost");
    bench.publish();
    assert!(bench.link.take_fault().unwrap().contains("receive queue"));
    assert!(bench.link.reserve(0).is_none() && bench.link.wants_room(), "nothing is to be sent any more");
    assert!(bench.link.prepare_sleep());
}

/// A peek without a byte of room would come back empty, which is how a stream ends.
#[test]
fn what_was_reserved_before_a_queue_fails_is_there_until_the_pass_is_over() {
    let mut bench = Bench::new(MERGED);
    bench.offer(&[1500; 1]);
    let space = bench.link.reserve_ahead(66, Ahead::Bytes(1000)).unwrap();
    bench.receive.set_available_index(1000);
    assert!(bench.link.reserve_ahead(66, Ahead::Bytes(1000)).is_none());
    bench.publish();
    bench.fill(space, 66, &bytes(1000));
    assert!(bench.link.has_unpublished());
    bench.publish();
    assert!(!bench.link.has_unpublished());
    assert_eq!(bench.frames(), [], "nothing is given back any more");
}

#[test]
fn a_pair_that_is_detached_tells_where_to_go_on() {
    let mut bench = Bench::new(MERGED);
    bench.offer(&[1500; 3]);
    bench.transmit.offer(&[(BUFFERS, 60)], 0);
    bench.link.end_receive(&Operations::default());
    bench.link.release();
    let space = bench.link.reserve_ahead(66, Ahead::Bytes(10)).unwrap();
    bench.fill(space, 66, b"last words");
    let next = bench.command(|control| control.detach(|| ()).unwrap());
    assert_eq!(next, [Some(1), Some(1)], "one chain of each was used");
    assert_eq!(bench.frames(), [(frame(66, b"last words"), 1)]);
    assert!(bench.link.reserve(0).is_none() && bench.link.wants_room(), "nothing is to be sent any more");
    assert_eq!(bench.link.end_receive(&Operations::default()).frames, 0);
    assert_eq!(bench.link.ready_fds(), [None, None]);
    assert!(bench.calls[0].write(&[0]).is_err(), "its descriptors are closed");
}

#[test]
fn a_detour_is_made_with_complete_frames_and_ends_with_the_guest() {
    let pairs = Pairs::default();
    let (mut link, control) = Queue::new(1500, 1, pairs.clone());
    let driver = Driver::new(64);
    // It may still send, and is to receive nothing.
    let ring = Ring { parts: driver.parts(), kick: event().0, call: None, error: None };
    let attachment = Attachment {
        memory: driver.memory.clone(),
        transmit: Some(ring),
        discards: false,
        receive: None,
        takes: Takes { merged: true, partial_checksums: true },
        tcp_segmentation: true,
        udp_segmentation: true,
    };
    let taken = |link: &mut Queue| {
        link.take_news();
    };
    assert!(control.attach(attachment, || taken(&mut link)).unwrap());
    assert!(link.wants_room() && link.reserve(100).is_none(), "there is no way");
    pairs.set(1);
    assert_eq!((link.stand_in(), link.wants_room()), (Some(0), false));
    assert!(!link.capabilities().tcp_segmentation);
    // The stand-in may be gone again before the frame is complete.
    for lasts in [true, false] {
        let space = link.reserve(4).unwrap();
        pairs.set(u16::from(lasts));
        let head = Head { len: 42, transport_start: 34, checksum_offset: 6 };
        let offload = Offload { checksum_partial: true, ..Offload::default() };
        link.commit(space, &InboundHead { bytes: &[0x22; 42], head, v4: true, offload }, 4);
        pairs.set(1);
        let frame = link.take_detoured().unwrap();
        assert_eq!(frame.len(), 46);
        assert_ne!(frame[40..42], [0x22; 2], "the checksum is complete");
    }
    let space = link.reserve(4).unwrap();
    let head = Head { len: 14, transport_start: 14, checksum_offset: 0 };
    link.commit(space, &InboundHead { bytes: &[0; 14], head, v4: true, offload: Offload::default() }, 4);
    control.guest_gone(|| taken(&mut link)).unwrap();
    assert_eq!(link.take_detoured(), None, "the next guest does not hear of it");
}
