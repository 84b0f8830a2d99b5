//! The gateway answers ping (RFC 792; RFC 4443, 4.2), on its address of each family and its link-local one.
//!
//! Pure: an echo request in, the frames of the reply out. The worker has verified the request's checksum and its source
//! MAC.

use crate::frame::address::Mac;
use crate::frame::build::{self, Route};
use crate::frame::fragment;
use crate::frame::icmp;
use crate::frame::protocol;
use crate::frame::view::{Content, ETHERNET_LEN, IpHead, Transport, View};
use crate::policy::addresses::{Addresses, Destination};

use super::neighbours::icmp_frame;

/// Answers an echo request to the gateway: one frame, or several where the reply is larger than the link's `mtu`. None
/// for any other frame. `fragment_id` names the reply's fragments: another one for each call.
pub fn answer(
    addresses: &Addresses,
    guest_mac: Mac,
    mtu: u16,
    fragment_id: u32,
    frame: &[u8],
) -> Vec<Vec<u8>> {
    reply(addresses, guest_mac, frame)
        .map_or_else(Vec::new, |(route, message)| frames(&route, &message, usize::from(mtu), fragment_id))
}

/// The reply's message, with its checksum missing, and the way it takes.
fn reply(addresses: &Addresses, guest_mac: Mac, frame: &[u8]) -> Option<(Route, Vec<u8>)> {
    let Content::Ip(packet) = View::parse(frame, frame.len()).ok()?.content else { return None };
    let Transport::Icmp(request) = packet.transport else { return None };
    let v4 = packet.ip.source.is_v4();
    let echo = icmp::parse_echo_request(request, v4)?;
    let to_gateway = addresses.classify(packet.ip.destination) == Ok(Destination::Gateway);
    if !to_gateway || !addresses.may_send_from(packet.ip.source) {
        return None;
    }
    let ip = IpHead {
        source: packet.ip.destination,
        destination: packet.ip.source,
        hop_limit: 64,
        // RFC 1122, 3.2.2.6: the reply has the request's class.
        traffic_class: packet.ip.traffic_class,
        // RFC 6864, 4.1: a packet that cannot be fragmented needs no identification of its own.
        dont_fragment: true,
    };
    let route = Route { source_mac: addresses.gateway_mac, destination_mac: guest_mac, ip };
    Some((route, [&icmp::echo_reply(v4, echo)[..], &request[icmp::ECHO_LEN..]].concat()))
}

fn frames(route: &Route, message: &[u8], mtu: usize, fragment_id: u32) -> Vec<Vec<u8>> {
    let whole = icmp_frame(route, message);
    if whole.len() <= ETHERNET_LEN + mtu {
        return vec![whole];
    }
    // The checksum is of the whole message: it was filled in before this cut.
    let message = &whole[whole.len() - message.len()..];
    let v4 = route.ip.source.is_v4();
    fragment::cut(message.len(), mtu, v4, fragment_id, protocol::icmp(v4))
        .map(|(piece, range)| {
            let mut frame = vec![0; ETHERNET_LEN + 48];
            let head = build::fragment(&mut frame, route, piece, range.len());
            frame.truncate(head);
            frame.extend_from_slice(&message[range]);
            frame
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::neighbours::tests::{GUEST_MAC, address, addresses, checksum_is_right};
    use super::*;
    use crate::frame::icmp::Echo;
    use crate::relay::reassembly::Reassembly;
    use crate::time::Now;
    use proptest::prelude::*;

    fn request(source: &str, destination: &str, data: &[u8]) -> Vec<u8> {
        let (source, destination) = (address(source), address(destination));
        let ip = IpHead { source, destination, hop_limit: 9, traffic_class: 0x20, dont_fragment: true };
        let route = Route { source_mac: GUEST_MAC, destination_mac: addresses().gateway_mac, ip };
        let header = icmp::echo_request(source.is_v4(), Echo { id: 77, sequence: 3 });
        icmp_frame(&route, &[&header[..], data].concat())
    }

    fn ask(frame: &[u8], mtu: u16) -> Vec<Vec<u8>> {
        answer(&addresses(), GUEST_MAC, mtu, 0x0001_0002, frame)
    }

    #[test]
    fn the_gateway_answers_ping_on_each_of_its_addresses() {
        let link_local = addresses().gateway_link_local().to_string();
        for (guest, gateway) in [
            ("192.168.65.3", "192.168.65.1"),
            ("fdc4:f303:9324::3", "fdc4:f303:9324::1"),
            ("fe80::3", link_local.as_str()),
        ] {
            let [frame] = &ask(&request(guest, gateway, b"some data"), 1500)[..] else { panic!() };
            let view = View::parse(frame, frame.len()).unwrap();
            assert_eq!((view.source_mac, view.destination_mac), (addresses().gateway_mac, GUEST_MAC));
            let Content::Ip(packet) = view.content else { panic!() };
            assert_eq!((packet.ip.source, packet.ip.destination), (address(gateway), address(guest)));
            assert_eq!((packet.ip.hop_limit, packet.ip.traffic_class), (64, 0x20));
            assert!(checksum_is_right(&packet));
            let Transport::Icmp(message) = packet.transport else { panic!() };
            let echo = icmp::parse_echo_reply(message, packet.ip.source.is_v4());
            assert_eq!(echo, Some(Echo { id: 77, sequence: 3 }));
            assert_eq!(message[8..], *b"some data");
        }
    }

    #[test]
    fn what_is_no_ping_to_the_gateway_is_not_answered() {
        for (source, destination) in [
            ("192.168.65.3", "192.168.65.254"),
            ("192.168.65.3", "192.168.65.255"),
            ("192.168.65.3", "8.8.8.8"),
            ("192.168.65.4", "192.168.65.1"),
            ("192.168.65.1", "192.168.65.1"),
            ("fdc4:f303:9324::3", "ff02::1"),
            ("2001:db8::1", "fdc4:f303:9324::1"),
        ] {
            let frames = ask(&request(source, destination, b""), 1500);
            assert_eq!(frames, Vec::<Vec<u8>>::new(), "{source} {destination}");
        }
        let mut reply = request("192.168.65.3", "192.168.65.1", b"");
        reply[ETHERNET_LEN + 20] = 0;
        assert!(ask(&reply, 1500).is_empty(), "a reply is not replied to");
    }

    #[test]
    fn a_reply_that_just_fits_is_not_cut() {
        for (guest, gateway, header) in
            [("192.168.65.3", "192.168.65.1", 20), ("fdc4:f303:9324::3", "fdc4:f303:9324::1", 40)]
        {
            let fits = vec![1; 1500 - header - 8];
            assert_eq!(ask(&request(guest, gateway, &fits), 1500).len(), 1);
            let over = vec![1; 1500 - header - 7];
            assert_eq!(ask(&request(guest, gateway, &over), 1500).len(), 2);
        }
    }

    #[test]
    fn the_largest_ping_comes_back_in_fragments_that_make_it_whole() {
        for (guest, gateway, len) in [
            ("192.168.65.3", "192.168.65.1", 65_515 - 8),
            ("fdc4:f303:9324::3", "fdc4:f303:9324::1", 65_535 - 8),
        ] {
            let data: Vec<u8> = (0..len).map(|at| (at % 253) as u8).collect();
            let frames = ask(&request(guest, gateway, &data), 1280);
            let mut reassembly = Reassembly::default();
            let mut whole = None;
            for frame in &frames {
                assert!(frame.len() <= ETHERNET_LEN + 1280);
                let view = View::parse(frame, frame.len()).unwrap();
                let Content::Ip(packet) = view.content else { panic!() };
                assert_eq!((packet.ip.source, packet.ip.destination), (address(gateway), address(guest)));
                let Transport::Fragment(piece) = packet.transport else { panic!() };
                let bytes = &frame[packet.transport_start..];
                whole = reassembly.add(&packet.ip, piece, bytes, Now(0), &mut vec![]).unwrap();
            }
            let whole = whole.unwrap();
            assert!(whole.payload[8..] == data);
            let packet = crate::frame::view::Packet {
                ip: whole.ip,
                transport_start: 0,
                transport_len: whole.payload.len(),
                transport: Transport::Icmp(&whole.payload),
            };
            assert!(checksum_is_right(&packet));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            mtu: u16,
            v4: bool,
        ) {
            ask(&bytes, mtu);
            let (guest, gateway) = if v4 {
                ("192.168.65.3", "192.168.65.1")
            } else {
                ("fdc4:f303:9324::3", "fdc4:f303:9324::1")
            };
            let mut frame = request(guest, gateway, &bytes);
            ask(&frame, mtu);
            let at = bytes.len() % 64;
            frame[at] ^= bytes.first().copied().unwrap_or(1);
            ask(&frame, mtu);
        }
    }
}
