//! Reassembly: packets of the guest that come in fragments (RFC 791, 3.2; RFC 8200, 4.5).
//!
//! Pieces wait, in order of their offset, in the packet that they belong to; packets wait in order of their arrival,
//! which is the order of their deadlines, so that the oldest is always first. Everything is bounded: packets, bytes in
//! all, pieces of a packet. When room is needed, the oldest packet goes.
//!
//! Fragments that overlap or contradict each other are an attack (RFC 5722): the packet is given up, and what still
//! comes of it is refused until its time is over. Exact duplicates are not: networks make them (RFC 8200, 4.5).

use std::collections::VecDeque;
use std::time::Duration;

use crate::frame::address::Address;
use crate::frame::drop_reason::DropReason;
use crate::frame::view::{Fragment, IpHead};
use crate::time::Now;

/// How long the pieces of a packet wait for the rest, from the first one's arrival on. On a link of two stations what
/// has not come by then never comes.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// Packets that wait at the same time.
pub const PACKETS_MAX: usize = 64;

/// Bytes that wait in all, with what it costs to keep them.
pub const BYTES_MAX: usize = 2 << 20;

/// Pieces of one packet: enough for the largest at an MTU of 576 bytes.
pub const PIECES_MAX: usize = 128;

/// What a piece costs besides its bytes, so that many small ones are not cheap.
const PIECE_COST: usize = size_of::<Piece>() + 16;

/// Which packet a fragment belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Key {
    source: Address,
    destination: Address,
    id: u32,
    /// RFC 791: part of the key. RFC 8200, 4.5: not so, only the first fragment's counts.
    protocol: Option<u8>,
}

/// The upper layer of a packet that is complete.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Whole {
    /// The IP header of the first fragment.
    pub ip: IpHead,
    /// The protocol that the first fragment names.
    pub protocol: u8,
    /// The upper layer, its header included.
    pub payload: Vec<u8>,
}

/// A packet that will not be complete.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GivenUp {
    /// Whether its time was over; else it had to make room.
    pub late: bool,
    /// The IP header, the place and the bytes of its first fragment, if that had come.
    pub first: Option<(IpHead, Fragment, Vec<u8>)>,
}

#[derive(Debug)]
struct Piece {
    start: usize,
    bytes: Vec<u8>,
}

impl Piece {
    fn end(&self) -> usize {
        self.start + self.bytes.len()
    }
}

/// A packet whose pieces wait.
#[derive(Debug)]
struct Waiting {
    key: Key,
    deadline: Now,
    /// Sorted by `start`, without overlaps.
    pieces: Vec<Piece>,
    /// Bytes of the pieces.
    held: usize,
    /// The length of the whole, once the last piece has come.
    total: Option<usize>,
    /// What the first piece said.
    first: Option<(IpHead, Fragment)>,
    /// Pieces contradicted each other: nothing more is taken.
    refused: bool,
}

/// Packets that are being put together.
#[derive(Debug, Default)]
pub struct Reassembly {
    /// Oldest first.
    waiting: VecDeque<Waiting>,
    bytes: usize,
}

impl Reassembly {
    /// Takes a fragment in. Returns the whole when this was the last piece that lacked. Packets that this gave up, by
    /// their age or to make room, are added to `given_up`.
    pub fn add(
        &mut self,
        ip: &IpHead,
        fragment: Fragment,
        bytes: &[u8],
        now: Now,
        given_up: &mut Vec<GivenUp>,
    ) -> Result<Option<Whole>, DropReason> {
        self.expire(now, given_up);
        check(ip, fragment, bytes)?;
        let cost = bytes.len() + PIECE_COST;
        while self.bytes + cost > BYTES_MAX && self.give_up_oldest(false, given_up) {}
        let index = self.find_or_begin(ip, fragment, now, given_up);
        let waiting = &mut self.waiting[index];
        let before = waiting.cost();
        let taken = waiting.take(ip, fragment, bytes);
        self.bytes = self.bytes - before + waiting.cost();
        taken?;
        if !waiting.is_complete() {
            return Ok(None);
        }
        let complete = self.waiting.remove(index);
        self.bytes -= complete.as_ref().map_or(0, Waiting::cost);
        Ok(complete.and_then(Waiting::into_whole))
    }

    /// Gives up what has waited too long. Returns when it must be called again, if anything waits.
    pub fn expire(&mut self, now: Now, given_up: &mut Vec<GivenUp>) -> Option<Now> {
        while self.deadline().is_some_and(|deadline| deadline <= now) {
            self.give_up_oldest(true, given_up);
        }
        self.deadline()
    }

    /// When the oldest packet's time is over.
    pub fn deadline(&self) -> Option<Now> {
        self.waiting.front().map(|waiting| waiting.deadline)
    }

    /// Bytes that wait, with what it costs to keep them.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns whether there was one.
    fn give_up_oldest(&mut self, late: bool, given_up: &mut Vec<GivenUp>) -> bool {
        let Some(oldest) = self.waiting.pop_front() else { return false };
        self.bytes -= oldest.cost();
        // One that contradicted itself was counted when it did.
        if !oldest.refused {
            given_up.push(oldest.into_given_up(late));
        }
        true
    }

    fn find_or_begin(
        &mut self,
        ip: &IpHead,
        fragment: Fragment,
        now: Now,
        given_up: &mut Vec<GivenUp>,
    ) -> usize {
        let key = Key {
            source: ip.source,
            destination: ip.destination,
            id: fragment.id,
            protocol: ip.source.is_v4().then_some(fragment.protocol),
        };
        if let Some(index) = self.waiting.iter().position(|waiting| waiting.key == key) {
            return index;
        }
        if self.waiting.len() >= PACKETS_MAX {
            self.give_up_oldest(false, given_up);
        }
        self.waiting.push_back(Waiting {
            key,
            deadline: now + TIMEOUT,
            pieces: Vec::new(),
            held: 0,
            total: None,
            first: None,
            refused: false,
        });
        self.waiting.len() - 1
    }
}

/// What a fragment must be like by itself.
fn check(ip: &IpHead, fragment: Fragment, bytes: &[u8]) -> Result<(), DropReason> {
    // The length fields of both headers have 16 bits; that of IPv4 counts its header too (RFC 791, 3.1).
    let max = if ip.source.is_v4() { 65_535 - 20 } else { 65_535 };
    let in_units = !fragment.more || bytes.len().is_multiple_of(8);
    let sound = !bytes.is_empty() && in_units && fragment.offset + bytes.len() <= max;
    if sound { Ok(()) } else { Err(DropReason::FragmentInvalid) }
}

impl Waiting {
    fn cost(&self) -> usize {
        self.held + self.pieces.len() * PIECE_COST
    }

    /// Takes a piece in, or refuses the packet from now on.
    fn take(&mut self, ip: &IpHead, fragment: Fragment, bytes: &[u8]) -> Result<(), DropReason> {
        if self.refused {
            return Err(DropReason::FragmentInvalid);
        }
        let (start, end) = (fragment.offset, fragment.offset + bytes.len());
        let at = self.pieces.partition_point(|piece| piece.start < start);
        if self.pieces.get(at).is_some_and(|piece| self.is_duplicate(piece, fragment, bytes)) {
            return Ok(());
        }
        let overlaps = at.checked_sub(1).is_some_and(|before| self.pieces[before].end() > start)
            || self.pieces.get(at).is_some_and(|after| after.start < end);
        let contradicts = match self.total {
            // Something after the end, or a second end.
            Some(total) => end > total || !fragment.more,
            // The end before something that has come.
            None => !fragment.more && self.pieces.last().is_some_and(|last| last.end() > end),
        };
        if overlaps || contradicts || self.pieces.len() >= PIECES_MAX {
            self.refused = true;
            self.held = 0;
            self.pieces = Vec::new();
            return Err(DropReason::FragmentInvalid);
        }
        if !fragment.more {
            self.total = Some(end);
        }
        if start == 0 {
            self.first = Some((*ip, fragment));
        }
        self.held += bytes.len();
        self.pieces.insert(at, Piece { start, bytes: bytes.to_vec() });
        Ok(())
    }

    fn is_duplicate(&self, piece: &Piece, fragment: Fragment, bytes: &[u8]) -> bool {
        let is_last = self.total == Some(piece.end());
        piece.start == fragment.offset && piece.bytes == bytes && is_last != fragment.more
    }

    /// Pieces do not overlap and none is beyond the end: as many bytes as the whole has are the whole.
    fn is_complete(&self) -> bool {
        self.total == Some(self.held)
    }

    fn into_whole(self) -> Option<Whole> {
        let (ip, fragment) = self.first?;
        let mut payload = Vec::with_capacity(self.held);
        self.pieces.iter().for_each(|piece| payload.extend_from_slice(&piece.bytes));
        Some(Whole { ip, protocol: fragment.protocol, payload })
    }

    fn into_given_up(self, late: bool) -> GivenUp {
        let first_piece = self.pieces.into_iter().next();
        let first = self.first.zip(first_piece).map(|((ip, fragment), piece)| (ip, fragment, piece.bytes));
        GivenUp { late, first }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::fragment::cut;
    use proptest::prelude::*;

    const START: Now = Now(1_000_000_000_000);

    fn head(v4: bool) -> IpHead {
        let (source, destination) = if v4 {
            (Address::v4([192, 168, 65, 3]), Address::v4([198, 51, 100, 1]))
        } else {
            (Address::v6([0xfd; 16]), Address::v6([0x20; 16]))
        };
        IpHead { source, destination, hop_limit: 64, traffic_class: 0, dont_fragment: !v4 }
    }

    /// A guest that sends fragments, and the reassembly that it meets.
    #[derive(Default)]
    struct Bench {
        reassembly: Reassembly,
        given_up: Vec<GivenUp>,
        now: u64,
    }

    impl Bench {
        fn now(&self) -> Now {
            START + Duration::from_millis(self.now)
        }

        /// Sends `len` bytes at `offset` of packet `id`; byte `n` of a packet is `n / 8`.
        fn send(
            &mut self,
            id: u32,
            offset: usize,
            len: usize,
            more: bool,
        ) -> Result<Option<Whole>, DropReason> {
            let bytes: Vec<u8> = (offset..offset + len).map(|at| (at / 8) as u8).collect();
            self.send_bytes(id, offset, &bytes, more)
        }

        fn send_bytes(
            &mut self,
            id: u32,
            offset: usize,
            bytes: &[u8],
            more: bool,
        ) -> Result<Option<Whole>, DropReason> {
            let fragment = Fragment { id, offset, more, protocol: 17 };
            let now = self.now();
            let result = self.reassembly.add(&head(true), fragment, bytes, now, &mut self.given_up);
            self.check();
            result
        }

        fn check(&self) {
            let costs: usize = self.reassembly.waiting.iter().map(Waiting::cost).sum();
            assert_eq!(self.reassembly.bytes, costs);
            assert!(self.reassembly.bytes <= BYTES_MAX);
            assert!(self.reassembly.waiting.len() <= PACKETS_MAX);
            let deadlines: Vec<Now> = self.reassembly.waiting.iter().map(|w| w.deadline).collect();
            assert!(deadlines.is_sorted());
            for waiting in &self.reassembly.waiting {
                assert!(waiting.pieces.len() <= PIECES_MAX);
                assert!(waiting.pieces.windows(2).all(|pair| pair[0].end() <= pair[1].start));
            }
        }
    }

    const INVALID: Result<Option<Whole>, DropReason> = Err(DropReason::FragmentInvalid);

    #[test]
    fn pieces_in_any_order_make_the_whole() {
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let mut bench = Bench::default();
            let pieces = [(0, 16, true), (16, 24, true), (40, 5, false)];
            let [a, b, last] = order.map(|index| {
                let (offset, len, more) = pieces[index];
                bench.send(7, offset, len, more)
            });
            assert_eq!((a, b), (Ok(None), Ok(None)));
            let whole = last.unwrap().unwrap();
            assert_eq!((whole.ip, whole.protocol), (head(true), 17));
            assert_eq!(whole.payload, (0..45).map(|at| at / 8).collect::<Vec<u8>>());
            assert_eq!((bench.reassembly.bytes(), bench.reassembly.deadline()), (0, None));
            assert_eq!(bench.given_up, []);
        }
    }

    #[test]
    fn the_largest_packet_of_each_family_is_put_together() {
        for (v4, len) in [(true, 65_515), (false, 65_535)] {
            let payload: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
            let mut reassembly = Reassembly::default();
            let mut whole = None;
            for (fragment, range) in cut(len, 576, v4, 9, 17) {
                whole = reassembly.add(&head(v4), fragment, &payload[range], START, &mut vec![]).unwrap();
            }
            assert!(whole.unwrap().payload == payload);
        }
    }

    #[test]
    fn packets_with_different_keys_do_not_mix() {
        let mut reassembly = Reassembly::default();
        let mut add = |ip: &IpHead, id, protocol, offset, more| {
            let fragment = Fragment { id, offset, more, protocol };
            reassembly.add(ip, fragment, &[0; 8], START, &mut vec![]).unwrap().is_some()
        };
        let here = head(true);
        let there = IpHead { destination: Address::v4([198, 51, 100, 2]), ..here };
        assert!(!add(&here, 1, 17, 0, true));
        assert!(!add(&there, 1, 17, 8, false));
        assert!(!add(&here, 2, 17, 8, false));
        assert!(!add(&here, 1, 6, 8, false));
        assert!(add(&here, 1, 17, 8, false));
    }

    /// RFC 8200, 4.5: "Only those Next Header values from the Offset zero fragment packet [are] used".
    #[test]
    fn in_ipv6_the_first_fragment_alone_names_the_protocol() {
        let mut reassembly = Reassembly::default();
        let last = Fragment { id: 1, offset: 8, more: false, protocol: 99 };
        let first = Fragment { id: 1, offset: 0, more: true, protocol: 17 };
        assert_eq!(reassembly.add(&head(false), last, &[2; 3], START, &mut vec![]), Ok(None));
        let whole = reassembly.add(&head(false), first, &[1; 8], START, &mut vec![]).unwrap().unwrap();
        assert_eq!(whole.protocol, 17);
    }

    /// RFC 5722, 4: the packet goes, and with it what still comes of it.
    #[test]
    fn an_overlap_ends_the_whole_packet() {
        for (offset, len, more) in [
            (8, 16, true),
            (0, 8, true),
            (0, 64, true),
            (16, 8, true),
            (24, 8, true),
            (8, 16, false),
            (24, 20, false),
        ] {
            let mut bench = Bench::default();
            assert_eq!(bench.send(1, 0, 16, true), Ok(None));
            assert_eq!(bench.send(1, 16, 16, true), Ok(None));
            assert_eq!(bench.send(1, offset, len, more), INVALID, "{offset} {len}");
            assert_eq!(bench.reassembly.bytes(), 0);
            assert_eq!(bench.send(1, 32, 8, false), INVALID);
            assert_eq!(bench.send(2, 0, 16, true), Ok(None), "another packet goes on");
            bench.now = 30_000;
            assert_eq!(bench.send(1, 0, 16, true), Ok(None), "the identification may be used again");
            assert_eq!(bench.given_up.len(), 1, "only the packet that had done nothing wrong");
        }
    }

    #[test]
    fn an_exact_duplicate_changes_nothing() {
        let mut bench = Bench::default();
        assert_eq!(bench.send(1, 8, 8, false), Ok(None));
        assert_eq!(bench.send(1, 8, 8, false), Ok(None));
        assert_eq!(bench.send(1, 0, 8, true).unwrap().unwrap().payload.len(), 16);
    }

    #[test]
    fn the_same_place_with_other_bytes_is_an_overlap() {
        let mut bench = Bench::default();
        assert_eq!(bench.send_bytes(1, 0, &[1; 8], true), Ok(None));
        assert_eq!(bench.send_bytes(1, 0, &[2; 8], true), INVALID);
    }

    #[test]
    fn two_ends_are_a_contradiction() {
        for second in [(8, 8, true), (16, 8, false), (16, 8, true), (0, 8, false)] {
            let mut bench = Bench::default();
            assert_eq!(bench.send(1, 8, 8, false), Ok(None));
            assert_eq!(bench.send(1, second.0, second.1, second.2), INVALID, "{second:?}");
        }
        let mut bench = Bench::default();
        assert_eq!(bench.send(1, 32, 8, true), Ok(None));
        assert_eq!(bench.send(1, 8, 8, false), INVALID, "an end before what has come");
    }

    #[test]
    fn a_fragment_that_no_sender_makes_is_refused_and_costs_nothing() {
        let mut bench = Bench::default();
        for (offset, len, more) in
            [(0, 0, true), (8, 0, false), (0, 12, true), (65_512, 4, false), (65_528, 8, true)]
        {
            assert_eq!(bench.send(1, offset, len, more), INVALID, "{offset} {len}");
        }
        assert_eq!(bench.reassembly.waiting.len(), 0);
        assert_eq!(bench.send(1, 65_512, 3, false), Ok(None));
    }

    #[test]
    fn a_packet_is_given_up_thirty_seconds_after_its_first_piece() {
        let mut bench = Bench::default();
        bench.send(1, 0, 8, true).unwrap();
        bench.now = 10_000;
        bench.send(2, 8, 8, true).unwrap();
        bench.now = 29_999;
        bench.send(1, 8, 8, true).unwrap();
        let deadline = bench.reassembly.expire(bench.now(), &mut bench.given_up);
        assert_eq!((deadline, bench.given_up.len()), (Some(START + TIMEOUT), 0));
        bench.now = 30_000;
        let deadline = bench.reassembly.expire(bench.now(), &mut bench.given_up);
        assert_eq!(deadline, Some(START + Duration::from_secs(40)));
        let first = Fragment { id: 1, offset: 0, more: true, protocol: 17 };
        let given_up = GivenUp { late: true, first: Some((head(true), first, vec![0; 8])) };
        assert_eq!(bench.given_up, [given_up]);
        bench.now = 40_000;
        assert_eq!(bench.reassembly.expire(bench.now(), &mut bench.given_up), None);
        assert_eq!(bench.given_up[1], GivenUp { late: true, first: None });
        assert_eq!(bench.reassembly.bytes(), 0);
    }

    #[test]
    fn the_oldest_packet_makes_room_for_a_new_one() {
        let mut bench = Bench::default();
        for id in 0..PACKETS_MAX as u32 {
            bench.send(id, 0, 8, true).unwrap();
        }
        assert_eq!(bench.given_up, []);
        bench.send(1000, 0, 8, true).unwrap();
        assert_eq!(bench.given_up.len(), 1);
        assert!(!bench.given_up[0].late);
        assert!(bench.send(1, 8, 8, false).unwrap().is_some(), "the second oldest is still there");
        assert_eq!(bench.send(0, 8, 8, false), Ok(None), "the oldest is not");
    }

    #[test]
    fn bytes_are_bounded_in_all() {
        let mut bench = Bench::default();
        for id in 0..PACKETS_MAX as u32 {
            bench.send(id, 0, 65_000, true).unwrap();
        }
        assert!(bench.given_up.len() > 30);
        assert!(bench.reassembly.bytes() <= BYTES_MAX);
    }

    #[test]
    fn pieces_are_bounded_by_packet() {
        let mut bench = Bench::default();
        for piece in 0..PIECES_MAX {
            assert_eq!(bench.send(1, piece * 16, 8, true), Ok(None));
        }
        assert_eq!(bench.send(1, PIECES_MAX * 16, 8, true), INVALID);
        assert_eq!(bench.reassembly.bytes(), 0);
    }

    proptest! {
        #[test]
        fn shuffled_and_doubled_pieces_of_many_packets_come_out_whole(
            packets in proptest::collection::vec((1usize..5000, 100usize..1500, any::<u8>(), any::<bool>()), 1..12),
            seed: u64,
        ) {
            let payload = |len: usize, salt: u8| -> Vec<u8> {
                (0..len).map(|at| (at as u8).wrapping_mul(31) ^ (at >> 8) as u8 ^ salt).collect()
            };
            let mut pieces = Vec::new();
            for (id, (len, mtu, salt, doubled)) in packets.iter().enumerate() {
                let v4 = id % 2 == 0;
                for (fragment, range) in cut(*len, *mtu, v4, id as u32, 17) {
                    let piece = (v4, fragment, payload(*len, *salt)[range].to_vec());
                    if *doubled {
                        pieces.push(piece.clone());
                    }
                    pieces.push(piece);
                }
            }
            let mut state = seed | 1;
            for index in (1..pieces.len()).rev() {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                pieces.swap(index, (state >> 33) as usize % (index + 1));
            }
            let mut reassembly = Reassembly::default();
            let mut whole = std::collections::HashMap::new();
            for (v4, fragment, bytes) in &pieces {
                let result = reassembly.add(&head(*v4), *fragment, bytes, START, &mut vec![]);
                if let Some(done) = result.unwrap() {
                    whole.insert(fragment.id, done.payload);
                }
            }
            for (id, (len, _, salt, _)) in packets.iter().enumerate() {
                prop_assert_eq!(whole.get(&(id as u32)), Some(&payload(*len, *salt)));
            }
        }

        #[test]
        fn no_sequence_of_fragments_panics_or_breaks_the_bounds(
            steps in proptest::collection::vec(
                (0u32..6, 0usize..40, 0usize..70, any::<bool>(), any::<u8>(), 0u64..9_000),
                1..200,
            ),
        ) {
            let mut bench = Bench::default();
            for (id, unit, len, more, salt, wait) in steps {
                bench.now += wait * u64::from(wait > 8_900);
                let bytes = vec![salt & 1; len & if more { !7 } else { !0 }];
                if let Ok(Some(whole)) = bench.send_bytes(id, unit * 8, &bytes, more) {
                    prop_assert!(!whole.payload.is_empty());
                }
            }
        }

        #[test]
        fn any_offset_and_length_is_survived(
            offset in 0usize..66_000,
            len in 0usize..66_000,
            more: bool,
            v4: bool,
            id: u32,
            protocol: u8,
        ) {
            let fragment = Fragment { id, offset, more, protocol };
            let mut reassembly = Reassembly::default();
            let _ = reassembly.add(&head(v4), fragment, &vec![0; len], START, &mut vec![]);
        }
    }
}
