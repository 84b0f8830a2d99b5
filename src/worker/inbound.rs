//! To the guest: heads, space, and what hythe itself has to say.

use crate::exchange::mail::ToRecorder;
use crate::frame::address::Address;
use crate::frame::build::{self, Head, Route};
use crate::frame::drop_reason::DropReason;
use crate::frame::icmp::{self, Quoted};
use crate::frame::offload::Offload;
use crate::frame::view::{ETHERNET_LEN, IpHead};
use crate::host::Sockets;
use crate::host::engine::Engine;
use crate::host::errors::IcmpReport;
use crate::link::{InboundHead, Link, Space};
use crate::observe::counters::Metric;

use super::Worker;

/// The hop limit of packets that hythe makes (RFC 1700).
const HOP_LIMIT: u8 = 64;

impl<L: Link, E: Engine, S: Sockets> Worker<L, E, S> {
    /// The addresses of a packet to the guest.
    pub(super) fn route_to_guest(&self, source: Address, destination: Address) -> Route {
        Route {
            source_mac: self.addresses.gateway_mac,
            destination_mac: self.guest_mac.get(),
            ip: IpHead { source, destination, hop_limit: HOP_LIMIT, traffic_class: 0, dont_fragment: true },
        }
    }

    /// Room for a frame; makes some by publishing when the link has none. `None`, counted, when that does not help.
    pub(super) fn reserve(&mut self, payload_len: usize) -> Option<Space> {
        if let Some(space) = self.link.reserve(payload_len) {
            return Some(space);
        }
        self.publish_now();
        let space = self.link.reserve(payload_len);
        if space.is_none() {
            self.drop_frame(DropReason::LinkFull);
        }
        space
    }

    /// A frame is complete.
    pub(super) fn commit(&mut self, space: Space, head: &InboundHead<'_>, payload_len: usize) {
        if self.link.stand_in().is_some() {
            // The stand-in counts it, and captures it.
            return self.link.commit(space, head, payload_len);
        }
        if self.recorder.is_some() {
            self.capture_inbound(space, head, payload_len);
        }
        self.link.commit(space, head, payload_len);
        self.stopwatch.committed();
        self.counters.add(Metric::FramesIn, 1);
        self.counters.add(Metric::BytesIn, (head.bytes.len() + payload_len) as u64);
    }

    /// Sends a whole frame whose checksums are complete.
    pub(super) fn frame_to_guest(&mut self, frame: &[u8]) {
        let (bytes, payload) = frame.split_at(frame.len().min(ETHERNET_LEN));
        let Some(space) = self.reserve(payload.len()) else { return };
        let mut at = 0;
        self.link.space(space, &mut |piece| at += piece.copy_from(&payload[at..]));
        let head = Head { len: bytes.len(), transport_start: bytes.len(), checksum_offset: 0 };
        self.commit(space, &InboundHead { bytes, head, v4: true, offload: Offload::default() }, at);
    }

    /// Tells the guest by an ICMP error what became of a packet of its own.
    pub(super) fn tell_icmp(&mut self, report: IcmpReport, quoted: &Quoted<'_>) {
        let guest = quoted.ip.source;
        let Some(family) = self.addresses.family(guest.is_v4()) else { return };
        // A router of the other family (or none) cannot be named: the gateway speaks for it.
        let source =
            report.offender.filter(|offender| offender.is_v4() == guest.is_v4()).unwrap_or(family.gateway);
        let mut message = [0; icmp::ERROR_MAX];
        let len = icmp::write_error(&mut message, report.error, quoted);
        let mut frame = [0; ETHERNET_LEN + 40 + icmp::ERROR_MAX];
        let len = build::icmp(&mut frame, &self.route_to_guest(source, guest), &message[..len]);
        self.frame_to_guest(&frame[..len]);
        self.counters.add(Metric::IcmpErrors, 1);
    }

    fn capture_inbound(&mut self, space: Space, head: &InboundHead<'_>, payload_len: usize) {
        let mut bytes = head.bytes.to_vec();
        let mut rest = payload_len;
        self.link.space(space, &mut |piece| {
            let piece = piece.part(0, rest);
            rest -= piece.len();
            piece.copy_to(&mut bytes);
        });
        self.capture_bytes(false, bytes);
    }

    /// Mails a copy of a frame to the recorder.
    pub(super) fn capture_bytes(&self, outbound: bool, bytes: Vec<u8>) {
        let Some(recorder) = &self.recorder else { return };
        let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let time_ns = time.map_or(0, |time| time.as_nanos() as u64);
        if recorder.put(ToRecorder::Frame { time_ns, outbound, bytes }).is_err() {
            self.drop_frame(DropReason::CaptureFull);
        }
    }
}
