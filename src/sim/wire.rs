//! The way between link and guest: time, loss, doubles, lateness, and the cutting of large segments.

use crate::frame::address::Endpoint;
use crate::frame::build::{self, Route};
use crate::frame::offload::{Offload, Segmentation};
use crate::frame::tcp::Flags;
use crate::frame::view::{Content, Transport, View};
use crate::random::Random;
use crate::time::Now;

use super::check::Name;
use super::link::Frame;
use super::plan::WirePlan;

/// One direction of the wire.
pub struct Wire {
    plan: WirePlan,
    random: Random,
    /// When the last frame that was not late comes.
    last: Now,
    /// Frames that were lost.
    pub lost: u64,
}

impl Wire {
    /// A wire.
    pub fn new(plan: WirePlan, random: Random) -> Self {
        Self { plan, random, last: Now(0), lost: 0 }
    }

    /// A frame enters at `now`: `put` hears when it, or what becomes of it, comes out.
    pub fn carry(&mut self, now: Now, frame: Frame, put: &mut dyn FnMut(Now, Frame)) {
        if self.random.chance(self.plan.lost) {
            self.lost += 1;
            return;
        }
        let latency = self.random.within(self.plan.latency_ns);
        if self.random.chance(self.plan.doubled) {
            let later = latency + self.random.within(self.plan.late_ns);
            put(Now(now.0 + later), frame.clone());
        }
        if self.random.chance(self.plan.late) {
            put(Now(now.0 + latency + self.random.within(self.plan.late_ns)), frame);
        } else {
            // The others keep their order.
            self.last = self.last.max(Now(now.0 + latency));
            put(self.last, frame);
        }
    }

    /// Whether frames are cut before they enter.
    pub fn cuts(&self) -> bool {
        self.plan.cuts
    }
}

/// Source and destination of a frame's segment or datagram, if it has ports.
pub fn ends(frame: &Frame) -> Option<Name> {
    let Content::Ip(packet) = View::parse(&frame.bytes, frame.bytes.len()).ok()?.content else { return None };
    let (source, destination) = match packet.transport {
        Transport::Tcp(tcp) => (tcp.source_port, tcp.destination_port),
        Transport::Udp(udp) => (udp.source_port, udp.destination_port),
        Transport::Icmp(_) | Transport::Fragment(_) | Transport::Other(_) => return None,
    };
    let source = Endpoint { address: packet.ip.source, port: source };
    Some((source, Endpoint { address: packet.ip.destination, port: destination }))
}

/// Cuts a large TCP segment as a network card does (RFC 9293 knows nothing of it): PSH and FIN stay with the last part.
pub fn cut(frame: Frame) -> Vec<Frame> {
    let Segmentation::Tcp { size } = frame.offload.segmentation else { return vec![frame] };
    let Ok(View { content: Content::Ip(packet), source_mac, destination_mac }) =
        View::parse(&frame.bytes, frame.bytes.len())
    else {
        return vec![frame];
    };
    let Transport::Tcp(tcp) = packet.transport else { return vec![frame] };
    let payload = &frame.bytes[packet.transport_start + tcp.header_len..];
    let route = Route { source_mac, destination_mac, ip: packet.ip };
    let parts = payload.chunks(usize::from(size.max(1)));
    let last = parts.len().saturating_sub(1);
    let mut frames = Vec::new();
    for (index, part) in parts.enumerate() {
        let mut segment = tcp.segment;
        segment.seq = segment.seq + (index * usize::from(size)) as u32;
        segment.len = part.len() as u32;
        if index < last {
            segment.flags = Flags::ACK;
        }
        let mut bytes = vec![0; build::HEAD_MAX];
        let head = build::tcp(&mut bytes, &route, tcp.source_port, tcp.destination_port, &segment, false);
        build::finish_checksum(&mut bytes, head, std::iter::once(part));
        bytes.truncate(head.len);
        bytes.extend_from_slice(part);
        frames.push(Frame { bytes, offload: Offload::default() });
    }
    frames
}
