//! Packets of the guest that came in pieces: fragments in, whole frames out.
//!
//! A whole frame goes back to the worker and takes the way of any other from there. Everything about it that the guest
//! could have said in two ways (MACs, options of the IP header) is written anew. What does not become whole in time is
//! told to the guest, if the piece with the ports was there (RFC 792; RFC 4443, 3.3).

use etherparse::{IpNumber, Ipv6FlowLabel, Ipv6Header};

use crate::exchange::mail::OwnedFrame;
use crate::frame::address::Mac;
use crate::frame::build::{self, Route};
use crate::frame::drop_reason::DropReason;
use crate::frame::icmp::{self, IcmpError, Quoted};
use crate::frame::offload::Offload;
use crate::frame::protocol::{ICMP, ICMPV6, IPV6_FRAGMENT};
use crate::frame::view::{Content, ETHERNET_LEN, Fragment, IpHead, Transport, View};
use crate::policy::addresses::Addresses;
use crate::relay::reassembly::{GivenUp, Reassembly, Whole};
use crate::time::Now;

use super::neighbours::icmp_frame;

/// What came of a fragment, or of time passing.
#[derive(Default)]
pub struct Outcome {
    /// A frame that is complete, for the worker to treat as one from the guest.
    pub whole: Option<OwnedFrame>,
    /// Errors for the guest, as whole frames.
    pub to_guest: Vec<Vec<u8>>,
    /// What to count: one for each packet that was given up, or fragment that was refused.
    pub drops: Vec<DropReason>,
}

/// The packets that the guest's fragments are being put together to.
#[derive(Default)]
pub struct Fragments {
    reassembly: Reassembly,
}

impl Fragments {
    /// Takes a frame that holds a fragment. Its source MAC and address have been checked.
    pub fn frame(&mut self, addresses: &Addresses, guest_mac: Mac, frame: &[u8], now: Now) -> Outcome {
        let mut outcome = Outcome::default();
        let mut given_up = Vec::new();
        match self.whole(addresses, guest_mac, frame, now, &mut given_up) {
            Ok(whole) => outcome.whole = whole,
            Err(reason) => outcome.drops.push(reason),
        }
        outcome.tell(addresses, guest_mac, given_up);
        outcome
    }

    /// Gives up what has waited too long: to be called at [`Self::deadline`].
    pub fn expire(&mut self, addresses: &Addresses, guest_mac: Mac, now: Now) -> Outcome {
        let mut outcome = Outcome::default();
        let mut given_up = Vec::new();
        self.reassembly.expire(now, &mut given_up);
        outcome.tell(addresses, guest_mac, given_up);
        outcome
    }

    /// When [`Self::expire`] has something to do, if anything waits.
    pub fn deadline(&self) -> Option<Now> {
        self.reassembly.deadline()
    }

    fn whole(
        &mut self,
        addresses: &Addresses,
        guest_mac: Mac,
        frame: &[u8],
        now: Now,
        given_up: &mut Vec<GivenUp>,
    ) -> Result<Option<OwnedFrame>, DropReason> {
        let Content::Ip(packet) = View::parse(frame, frame.len())?.content else {
            return Err(DropReason::Malformed);
        };
        let Transport::Fragment(fragment) = packet.transport else { return Err(DropReason::Malformed) };
        let bytes = &frame[packet.transport_start..packet.transport_start + packet.transport_len];
        let Some(whole) = self.reassembly.add(&packet.ip, fragment, bytes, now, given_up)? else {
            return Ok(None);
        };
        let v4 = whole.ip.source.is_v4();
        // RFC 8200, 4.1: a fragment header comes once. Another inside would come here again.
        let nested = !v4 && whole.protocol == IPV6_FRAGMENT;
        // RFC 6980, 5: neighbour discovery in fragments could get past those who look at its first bytes.
        let discovery = !v4 && whole.protocol == ICMPV6 && matches!(whole.payload[..], [133..=137, ..]);
        if nested || discovery {
            return Err(DropReason::FragmentInvalid);
        }
        let bytes = whole_frame(guest_mac, addresses.gateway_mac, &whole);
        Ok(Some(OwnedFrame::copy_of(&bytes, Offload::default())))
    }
}

/// The frame that the guest would have sent, had the link been wide enough. It still says that it may be cut again: an
/// IPv6 packet by the header of an atomic fragment (RFC 6946), where there is room for one.
fn whole_frame(guest_mac: Mac, gateway_mac: Mac, whole: &Whole) -> Vec<u8> {
    let len = whole.payload.len();
    let ip = whole.ip;
    let mut frame = if ip.source.is_v4() {
        let route = Route { source_mac: guest_mac, destination_mac: gateway_mac, ip };
        let mut head = vec![0; ETHERNET_LEN + 20];
        // At offset zero with nothing behind it: no fragment, and one that might be fragmented again.
        let whole_of = Fragment { id: 0, offset: 0, more: false, protocol: whole.protocol };
        build::fragment(&mut head, &route, whole_of, len);
        head
    } else {
        let atomic = [whole.protocol, 0, 0, 0, 0, 0, 0, 0];
        let (next_header, atomic) = match u16::try_from(len + atomic.len()) {
            Ok(_) => (IPV6_FRAGMENT, &atomic[..]),
            Err(_) => (whole.protocol, &[][..]),
        };
        let header = Ipv6Header {
            traffic_class: ip.traffic_class,
            flow_label: Ipv6FlowLabel::ZERO,
            payload_length: (len + atomic.len()) as u16,
            next_header: IpNumber(next_header),
            hop_limit: ip.hop_limit,
            source: ip.source.octets(),
            destination: ip.destination.octets(),
        };
        [&gateway_mac.0[..], &guest_mac.0, &[0x86, 0xdd], &header.to_bytes(), atomic].concat()
    };
    frame.extend_from_slice(&whole.payload);
    frame
}

impl Outcome {
    fn tell(&mut self, addresses: &Addresses, guest_mac: Mac, given_up: Vec<GivenUp>) {
        for packet in given_up {
            self.drops.push(DropReason::FragmentTimeout);
            self.to_guest.extend(too_late(addresses, guest_mac, &packet));
        }
    }
}

/// The error about a packet whose rest did not come in time.
fn too_late(addresses: &Addresses, guest_mac: Mac, packet: &GivenUp) -> Option<Vec<u8>> {
    let (ip, fragment, bytes) = packet.first.as_ref().filter(|_| packet.late)?;
    let v4 = ip.source.is_v4();
    if ip.destination.is_multicast() || is_icmp_error(v4, fragment.protocol, bytes) {
        return None;
    }
    let source = addresses.family(v4)?.gateway;
    // The quoted header of IPv4 says nothing of fragments; IPv6 tells of them behind it.
    let header = fragment_header(*fragment);
    let (protocol, bytes) =
        if v4 { (fragment.protocol, bytes.clone()) } else { (IPV6_FRAGMENT, [&header, &bytes[..]].concat()) };
    let mut message = [0; icmp::ERROR_MAX];
    let quoted = Quoted { ip: *ip, protocol, len: bytes.len(), bytes: &bytes };
    let len = icmp::write_error(&mut message, IcmpError::ReassemblyTime, &quoted);
    let to_guest =
        IpHead { source, destination: ip.source, hop_limit: 64, traffic_class: 0, dont_fragment: true };
    let route = Route { source_mac: addresses.gateway_mac, destination_mac: guest_mac, ip: to_guest };
    Some(icmp_frame(&route, &message[..len]))
}

/// RFC 8200, 4.5: the header of a first fragment that more follow.
fn fragment_header(fragment: Fragment) -> [u8; 8] {
    let [a, b, c, d] = fragment.id.to_be_bytes();
    [fragment.protocol, 0, 0, 1, a, b, c, d]
}

/// RFC 1122, 3.2.2 and RFC 4443, 2.4 (e): no error is answered by an error.
fn is_icmp_error(v4: bool, protocol: u8, message: &[u8]) -> bool {
    match (v4, protocol, message.first()) {
        (true, ICMP, Some(kind)) => !matches!(kind, 0 | 8),
        (false, ICMPV6, Some(kind)) => *kind < 128,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::neighbours::tests::{GUEST_MAC, address, addresses, checksum_is_right};
    use super::*;
    use crate::frame::checksum::{Sum, pseudo_header};
    use crate::frame::fragment::cut;
    use crate::frame::protocol::UDP;
    use crate::relay::reassembly::TIMEOUT;
    use proptest::prelude::*;

    const PATHS: [(&str, &str); 2] = [("192.168.65.3", "198.51.100.1"), ("fdc4:f303:9324::3", "2001:db8::1")];

    fn route((source, destination): (&str, &str)) -> Route {
        let (source, destination) = (address(source), address(destination));
        let v4 = source.is_v4();
        let ip = IpHead { source, destination, hop_limit: 9, traffic_class: 0x20, dont_fragment: !v4 };
        Route { source_mac: GUEST_MAC, destination_mac: addresses().gateway_mac, ip }
    }

    /// A UDP datagram in fragments of `mtu` bytes.
    fn datagram(path: (&str, &str), len: usize, mtu: usize) -> Vec<Vec<u8>> {
        let route = route(path);
        let payload: Vec<u8> = (0..len).map(|at| (at % 249) as u8).collect();
        let mut head = [0; build::HEAD_MAX];
        let written = build::udp(&mut head, &route, 1000, 2000, len, false);
        build::finish_checksum(&mut head, written, std::iter::once(&payload[..]));
        let packet = [&head[written.transport_start..written.len], &payload].concat();
        fragments(&route, UDP, &packet, mtu)
    }

    fn fragments(route: &Route, protocol: u8, packet: &[u8], mtu: usize) -> Vec<Vec<u8>> {
        cut(packet.len(), mtu, route.ip.source.is_v4(), 99, protocol)
            .map(|(piece, range)| {
                let mut frame = vec![0; ETHERNET_LEN + 48];
                let len = build::fragment(&mut frame, route, piece, range.len());
                frame.truncate(len);
                frame.extend_from_slice(&packet[range]);
                frame
            })
            .collect()
    }

    fn take(fragments: &mut Fragments, frame: &[u8], now: Now) -> Outcome {
        fragments.frame(&addresses(), GUEST_MAC, frame, now)
    }

    fn bytes_of(frame: &OwnedFrame) -> Vec<u8> {
        frame.bytes.bytes(0, frame.len).to_vec()
    }

    #[test]
    fn fragments_become_the_frame_that_a_wider_link_would_have_carried() {
        for path in PATHS {
            let mut fragments = Fragments::default();
            let mut frames = datagram(path, 5000, 1500);
            frames.reverse();
            let last = frames.pop().unwrap();
            for frame in &frames {
                let outcome = take(&mut fragments, frame, Now(0));
                assert!(outcome.whole.is_none() && outcome.drops.is_empty());
            }
            let whole = take(&mut fragments, &last, Now(0)).whole.unwrap();
            assert_eq!(whole.offload, Ok(Offload::default()));
            let bytes = bytes_of(&whole);
            let view = View::parse(&bytes, bytes.len()).unwrap();
            assert_eq!((view.source_mac, view.destination_mac), (GUEST_MAC, addresses().gateway_mac));
            let Content::Ip(packet) = view.content else { panic!() };
            assert_eq!(packet.ip, IpHead { dont_fragment: false, ..route(path).ip }, "it may be cut again");
            assert_eq!(packet.transport_start + packet.transport_len, bytes.len());
            let Transport::Udp(udp) = packet.transport else { panic!("{packet:?}") };
            assert_eq!((udp.source_port, udp.destination_port, udp.len), (1000, 2000, 5000));
            let pseudo = pseudo_header(packet.ip.source, packet.ip.destination, UDP, packet.transport_len);
            assert_eq!(pseudo.with(&bytes[packet.transport_start..]).partial(), 0xffff);
            assert_eq!(fragments.deadline(), None);
        }
    }

    #[test]
    fn the_largest_datagram_of_each_family_becomes_whole() {
        for (path, len, frame_len) in [
            (PATHS[0], 65_515 - 8, ETHERNET_LEN + 65_535),
            (PATHS[1], 65_535 - 8, ETHERNET_LEN + 40 + 65_535),
        ] {
            let mut fragments = Fragments::default();
            let wholes = datagram(path, len, 1500)
                .iter()
                .filter_map(|frame| take(&mut fragments, frame, Now(0)).whole)
                .collect::<Vec<_>>();
            let [whole] = &wholes[..] else { panic!("{}", wholes.len()) };
            assert_eq!(whole.len, frame_len);
            let bytes = bytes_of(whole);
            let Content::Ip(packet) = View::parse(&bytes, bytes.len()).unwrap().content else { panic!() };
            assert!(matches!(packet.transport, Transport::Udp(udp) if udp.len == len));
            assert!(!packet.ip.dont_fragment, "it may be cut again");
        }
    }

    #[test]
    fn a_packet_whose_rest_does_not_come_is_told_to_the_guest() {
        for path in PATHS {
            let v4 = address(path.0).is_v4();
            let mut fragments = Fragments::default();
            let frames = datagram(path, 3000, 1500);
            take(&mut fragments, &frames[0], Now(0));
            assert_eq!(fragments.deadline(), Some(Now(0) + TIMEOUT));
            let outcome = fragments.expire(&addresses(), GUEST_MAC, Now(0) + TIMEOUT);
            assert_eq!(outcome.drops, [DropReason::FragmentTimeout]);
            let [error] = &outcome.to_guest[..] else { panic!() };
            let Content::Ip(packet) = View::parse(error, error.len()).unwrap().content else { panic!() };
            assert_eq!(packet.ip.source, addresses().family(v4).unwrap().gateway);
            assert_eq!(packet.ip.destination, address(path.0));
            assert!(checksum_is_right(&packet));
            let Transport::Icmp(message) = packet.transport else { panic!() };
            assert_eq!(message[..2], if v4 { [11, 1] } else { [3, 1] });
            let quoted = if v4 { &message[8 + 20..] } else { &message[8 + 40 + 8..] };
            assert_eq!(quoted[..4], [3, 232, 7, 208], "the ports of the datagram");
            if !v4 {
                // All of the packet is quoted as it was sent, its fragment header too.
                let start = ETHERNET_LEN + 4;
                let len = message.len() - 12;
                assert_eq!(message[12..], frames[0][start..start + len]);
            }
            assert_eq!(fragments.deadline(), None);
        }
    }

    #[test]
    fn time_also_passes_when_another_fragment_comes() {
        let mut fragments = Fragments::default();
        take(&mut fragments, &datagram(PATHS[0], 3000, 1500)[0], Now(0));
        let outcome = take(&mut fragments, &datagram(PATHS[1], 3000, 1500)[1], Now(0) + TIMEOUT);
        assert_eq!((outcome.drops, outcome.to_guest.len()), (vec![DropReason::FragmentTimeout], 1));
    }

    #[test]
    fn nothing_is_told_of_a_packet_without_its_first_piece_or_that_made_room() {
        let mut fragments = Fragments::default();
        take(&mut fragments, &datagram(PATHS[0], 3000, 1500)[1], Now(0));
        let outcome = fragments.expire(&addresses(), GUEST_MAC, Now(0) + TIMEOUT);
        assert_eq!((outcome.drops, outcome.to_guest.len()), (vec![DropReason::FragmentTimeout], 0));
        let first = datagram(PATHS[0], 3000, 1500).swap_remove(0);
        let mut told = 0;
        for id in 0..200u16 {
            let mut frame = first.clone();
            frame[ETHERNET_LEN + 4..ETHERNET_LEN + 6].copy_from_slice(&id.to_be_bytes());
            frame[ETHERNET_LEN + 10..ETHERNET_LEN + 12].fill(0);
            let sum = Sum::default().with(&frame[ETHERNET_LEN..ETHERNET_LEN + 20]).finish();
            frame[ETHERNET_LEN + 10..ETHERNET_LEN + 12].copy_from_slice(&sum.to_be_bytes());
            told += take(&mut fragments, &frame, Now(0)).to_guest.len();
        }
        assert_eq!(told, 0);
    }

    #[test]
    fn no_error_is_told_about_an_error_nor_about_a_multicast() {
        let unreachable = [&[3, 3, 0, 0][..], &[0; 3000]].concat();
        let group = ("192.168.65.3", "239.1.2.3");
        for frame in [
            &fragments(&route(PATHS[0]), ICMP, &unreachable, 1500)[0],
            &fragments(&route(PATHS[1]), ICMPV6, &unreachable, 1500)[0],
            &datagram(group, 3000, 1500)[0],
        ] {
            let mut fragments = Fragments::default();
            take(&mut fragments, frame, Now(0));
            let outcome = fragments.expire(&addresses(), GUEST_MAC, Now(0) + TIMEOUT);
            assert_eq!((outcome.drops.len(), outcome.to_guest.len()), (1, 0));
        }
    }

    /// RFC 6980, 5; RFC 8200, 4.1.
    #[test]
    fn neighbour_discovery_and_fragments_in_fragments_do_not_become_whole() {
        let solicitation = [&[135, 0, 0, 0][..], &[0; 3000]].concat();
        let nested = [&[UDP, 0, 0, 1, 0, 0, 0, 1][..], &[0; 3000]].concat();
        for (protocol, packet) in [(ICMPV6, solicitation), (IPV6_FRAGMENT, nested)] {
            let mut reassembly = Fragments::default();
            let mut drops = Vec::new();
            for frame in fragments(&route(PATHS[1]), protocol, &packet, 1500) {
                let outcome = take(&mut reassembly, &frame, Now(0));
                assert!(outcome.whole.is_none());
                drops.extend(outcome.drops);
            }
            assert_eq!(drops, [DropReason::FragmentInvalid]);
        }
    }

    #[test]
    fn a_frame_that_holds_no_fragment_is_refused() {
        let mut fragments = Fragments::default();
        let frame = icmp_frame(&route(PATHS[0]), &[8, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(take(&mut fragments, &frame, Now(0)).drops, [DropReason::Malformed]);
        assert_eq!(take(&mut fragments, &frame[..20], Now(0)).drops, [DropReason::Truncated]);
    }

    proptest! {
        #[test]
        fn no_sequence_of_frames_panics_or_makes_one_that_cannot_be_parsed(
            steps in proptest::collection::vec(
                (any::<bool>(), 0usize..30, 0usize..80, any::<bool>(), 0u8..3, any::<u8>(), any::<bool>()),
                1..60,
            ),
        ) {
            let mut fragments = Fragments::default();
            let mut now = Now(0);
            for (v4, unit, len, more, id, protocol, late) in steps {
                let route = route(PATHS[usize::from(!v4)]);
                let piece = Fragment { id: u32::from(id), offset: unit * 8, more, protocol };
                let mut frame = vec![0; ETHERNET_LEN + 48];
                let head = build::fragment(&mut frame, &route, piece, len);
                frame.resize(head + len, protocol);
                frame.truncate(head + len);
                if late {
                    now = now + TIMEOUT / 4;
                }
                if let Some(whole) = take(&mut fragments, &frame, now).whole {
                    let bytes = bytes_of(&whole);
                    let parsed = View::parse(&bytes, bytes.len());
                    prop_assert!(!matches!(parsed, Err(DropReason::Checksum | DropReason::EtherType)));
                    let fragment = matches!(
                        parsed,
                        Ok(View { content: Content::Ip(packet), .. })
                            if matches!(packet.transport, Transport::Fragment(_))
                    );
                    prop_assert!(!fragment);
                }
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            take(&mut Fragments::default(), &bytes, Now(0));
        }
    }
}
