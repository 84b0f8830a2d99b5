//! From the guest: each frame of a batch is parsed once and goes to its stream, its mapping, or the slow path.

use crate::exchange::mail::{OwnedFrame, ToSlow, ToWorker};
use crate::frame::checksum::{self, Sum};
use crate::frame::drop_reason::DropReason;
use crate::frame::icmp::{self, IcmpError};
use crate::frame::offload::Offload;
use crate::frame::protocol::{self, ICMP, ICMPV6, TCP, UDP};
use crate::frame::view::{Content, IpHead, Packet, Transport, UdpView, View};
use crate::host::Sockets;
use crate::host::engine::Engine;
use crate::io::Piece;
use crate::link::{Link, OutboundFrame};
use crate::observe::counters::Metric;
use crate::policy::addresses::Destination;
use crate::time::Now;

use super::Worker;
#[cfg(feature = "sim")]
use super::simulated::{Omission, omits};
use super::streams::outbound::Arrived;

/// Ports of services that hythe offers to guests by datagram.
const DNS: u16 = 53;
const DHCP_SERVER: u16 = 67;
const DHCPV6_SERVER: u16 = 547;

/// A frame of this pass: of the link's batch, or adopted from elsewhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrameRef {
    /// By its index in the link's batch.
    Link(u32),
    /// By its index among the adopted frames.
    Adopted(u32),
}

/// Bytes of a frame that are to be sent.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    pub frame: FrameRef,
    /// Where in the frame.
    pub from: u32,
    pub len: u32,
    /// The next part that goes out with it.
    pub next: Option<u32>,
}

/// Where a packet's upper layer lies, without borrowing the frame.
#[derive(Clone, Copy)]
pub(super) struct PacketSummary {
    pub ip: IpHead,
    pub transport_start: usize,
    pub transport_len: usize,
}

impl Packet<'_> {
    fn summary(&self) -> PacketSummary {
        PacketSummary {
            ip: self.ip,
            transport_start: self.transport_start,
            transport_len: self.transport_len,
        }
    }
}

/// What is not TCP, without borrowing the frame.
enum Other {
    Udp(UdpView),
    Echo(icmp::Echo),
    /// ICMPv6 type 133 to 137: neighbour discovery.
    Neighbour,
    Icmp,
    Fragment,
    Protocol(u8),
}

impl Other {
    fn of(packet: &Packet<'_>) -> Self {
        let v4 = packet.ip.source.is_v4();
        match packet.transport {
            Transport::Udp(udp) => Self::Udp(udp),
            Transport::Icmp(&[133..=137, ..]) if !v4 => Self::Neighbour,
            Transport::Icmp(message) => icmp::parse_echo_request(message, v4).map_or(Self::Icmp, Self::Echo),
            Transport::Fragment(_) => Self::Fragment,
            Transport::Other(protocol) => Self::Protocol(protocol),
            Transport::Tcp(_) => Self::Protocol(TCP),
        }
    }
}

impl<L: Link, E: Engine, S: Sockets> Worker<L, E, S> {
    /// Decides every frame of the link's batch.
    pub(super) fn decide_outbound(&mut self, now: Now) {
        let mut index = 0;
        let mut bytes = 0;
        while let Some(frame) = self.link.frame(index) {
            bytes += frame.len as u64;
            self.frame_from_guest(FrameRef::Link(index as u32), now);
            index += 1;
        }
        if index > 0 {
            self.counters.add(Metric::FramesOut, index as u64);
            self.counters.add(Metric::BytesOut, bytes);
        }
    }

    /// A frame that another worker, or the slow path, found to belong here.
    pub(super) fn adopt_frame(&mut self, frame: OwnedFrame, now: Now) {
        self.adopted.push(frame);
        self.frame_from_guest(FrameRef::Adopted(self.adopted.len() as u32 - 1), now);
    }

    /// The frames of this pass are done with.
    pub(super) fn release_frames(&mut self) {
        self.link.release();
        self.adopted.clear();
        self.parts.clear();
    }

    fn frame_from_guest(&mut self, reference: FrameRef, now: Now) {
        if self.recorder.is_some() && matches!(reference, FrameRef::Link(_)) {
            let len = self.frame(reference).map_or(0, |frame| frame.len);
            self.capture_bytes(true, self.copy_of(reference, 0, len));
        }
        if let Err(reason) = self.route_frame(reference, now) {
            self.drop_frame(reason);
        }
    }

    fn route_frame(&mut self, reference: FrameRef, now: Now) -> Result<(), DropReason> {
        let Some(frame) = self.frame(reference) else { return Ok(()) };
        let (offload, len) = (frame.offload?, frame.len);
        let view = View::parse(frame.head, len)?;
        if view.destination_mac != self.addresses.gateway_mac && !view.destination_mac.is_group() {
            return Err(DropReason::DestinationMac);
        }
        if !self.guest_mac.accepts(view.source_mac) {
            return Err(DropReason::SourceMac);
        }
        let packet = match view.content {
            Content::Arp(_) => return self.give_to_slow_path(reference, len),
            Content::Ip(packet) => packet,
        };
        if packet.ip.hop_limit == 0 {
            return Err(DropReason::HopLimit);
        }
        let summary = packet.summary();
        if let Transport::Tcp(tcp) = packet.transport {
            self.verify_checksum(reference, &summary, TCP, offload)?;
            let payload_start = summary.transport_start + tcp.header_len;
            return self
                .segment_from_guest(&Arrived { frame: reference, ip: summary.ip, tcp, payload_start }, now);
        }
        let other = Other::of(&packet);
        self.route_other(reference, &summary, &other, offload, now)
    }

    fn route_other(
        &mut self,
        reference: FrameRef,
        packet: &PacketSummary,
        other: &Other,
        offload: Offload,
        now: Now,
    ) -> Result<(), DropReason> {
        let v4 = packet.ip.source.is_v4();
        let destination = packet.ip.destination;
        let end = packet.transport_start + packet.transport_len;
        match other {
            Other::Udp(udp) => {
                if udp.checksum != 0 || !v4 {
                    self.verify_checksum(reference, packet, UDP, offload)?;
                }
                if matches!((udp.destination_port, v4), (DHCP_SERVER, true) | (DHCPV6_SERVER, false)) {
                    return self.give_to_slow_path(reference, end);
                }
                if udp.destination_port == DNS && self.is_gateway(destination) {
                    self.check_source(packet)?;
                    return self.give_to_slow_path(reference, end);
                }
                self.load.carries_datagrams(reference);
                let result = self.udp_from_guest(reference, packet, udp, offload.segmentation, now);
                self.answer_refusal(reference, packet, UDP, result)
            }
            Other::Echo(echo) => {
                self.verify_checksum(reference, packet, protocol::icmp(v4), offload)?;
                if self.is_gateway(destination) {
                    self.check_source(packet)?;
                    return self.give_to_slow_path(reference, end);
                }
                let result = self.echo_from_guest(reference, packet, *echo, now);
                self.answer_refusal(reference, packet, protocol::icmp(v4), result)
            }
            Other::Neighbour => {
                self.verify_checksum(reference, packet, ICMPV6, offload)?;
                self.give_to_slow_path(reference, end)
            }
            Other::Fragment => {
                self.check_source(packet)?;
                self.give_to_slow_path(reference, end)
            }
            Other::Icmp => Err(DropReason::IcmpType),
            Other::Protocol(protocol) => {
                self.check_source(packet)?;
                self.addresses.classify(destination)?;
                self.answer_refusal(reference, packet, *protocol, Err(DropReason::Protocol))
            }
        }
    }

    fn check_source(&self, packet: &PacketSummary) -> Result<(), DropReason> {
        let allowed = self.addresses.may_send_from(packet.ip.source);
        if allowed { Ok(()) } else { Err(DropReason::SourceAddress) }
    }

    fn is_gateway(&self, destination: crate::frame::address::Address) -> bool {
        self.addresses.classify(destination) == Ok(Destination::Gateway)
    }

    /// Tells the guest about a packet that was refused, where the reason has an ICMP form, and passes the reason on.
    fn answer_refusal(
        &mut self,
        reference: FrameRef,
        packet: &PacketSummary,
        protocol: u8,
        result: Result<(), DropReason>,
    ) -> Result<(), DropReason> {
        let error = match result {
            Err(DropReason::Policy) => IcmpError::Prohibited,
            Err(DropReason::GatewayPort) => IcmpError::PortUnreachable,
            Err(DropReason::Protocol) => IcmpError::ProtocolUnreachable,
            other => return other,
        };
        let head = self.copy_of(reference, packet.transport_start, packet.transport_len.min(512));
        self.refuse_packet(packet.ip, protocol, packet.transport_len, &head, error);
        result
    }

    /// Checks a checksum that the guest has completed (RFC 9293, 3.1; RFC 768; RFC 792). One that it left to be
    /// completed says nothing: the bytes never were on a wire.
    fn verify_checksum(
        &self,
        reference: FrameRef,
        packet: &PacketSummary,
        protocol: u8,
        offload: Offload,
    ) -> Result<(), DropReason> {
        if offload.checksum_partial {
            return Ok(());
        }
        let bytes = self.copy_of(reference, packet.transport_start, packet.transport_len);
        let pseudo = match protocol {
            ICMP => Sum::default(),
            _ => checksum::pseudo_header(packet.ip.source, packet.ip.destination, protocol, bytes.len()),
        };
        if pseudo.with(&bytes).partial() == 0xffff { Ok(()) } else { Err(DropReason::Checksum) }
    }

    fn frame(&self, frame: FrameRef) -> Option<OutboundFrame<'_>> {
        match frame {
            FrameRef::Link(index) => self.link.frame(index as usize),
            FrameRef::Adopted(index) => self.adopted.get(index as usize).map(OwnedFrame::as_outbound),
        }
    }

    /// Hands the pieces of a part to `take`.
    pub(super) fn pieces_of(link: &L, adopted: &[OwnedFrame], part: &Part, take: &mut dyn FnMut(Piece)) {
        let (from, len) = (part.from as usize, part.len as usize);
        match part.frame {
            FrameRef::Link(index) => link.payload(index as usize, from, len, take),
            FrameRef::Adopted(index) => {
                if let Some(frame) = adopted.get(index as usize) {
                    take(frame.bytes.piece(0).part(0, frame.len).part(from, len));
                }
            }
        }
    }

    /// Copies bytes of a frame out: for the exceptional paths.
    pub(super) fn copy_of(&self, frame: FrameRef, from: usize, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len);
        let part = Part { frame, from: from as u32, len: len as u32, next: None };
        Self::pieces_of(&self.link, &self.adopted, &part, &mut |piece| piece.copy_to(&mut bytes));
        bytes
    }

    /// Copies a frame to the slow path.
    fn give_to_slow_path(&mut self, reference: FrameRef, len: usize) -> Result<(), DropReason> {
        let mail = ToSlow::Frame { worker: self.id, frame: self.copy_of(reference, 0, len) };
        self.slow.put(mail).map_err(|_| DropReason::SlowPathFull)
    }

    /// The worker on whose queue a frame came, if it came on one.
    pub(super) fn queue_of(&self, reference: FrameRef) -> Option<u8> {
        match reference {
            FrameRef::Link(_) => Some(self.id),
            FrameRef::Adopted(index) => self.adopted.get(index as usize)?.queue,
        }
    }

    /// Copies a frame to the worker that owns its flow.
    pub(super) fn hand_over(&mut self, reference: FrameRef, owner: u8) -> Result<(), DropReason> {
        let Some(frame) = self.frame(reference) else { return Ok(()) };
        let (offload, len) = (frame.offload?, frame.len);
        #[cfg(feature = "sim")]
        let owner = owner + u8::from(omits(Omission::FindOwner));
        let mut copy = OwnedFrame::with_capacity(len, offload);
        copy.queue = self.queue_of(reference);
        let whole = Part { frame: reference, from: 0, len: len as u32, next: None };
        Self::pieces_of(&self.link, &self.adopted, &whole, &mut |piece| copy.append(&piece));
        let Some(mailbox) = self.workers.get(owner as usize) else { return Err(DropReason::NoFlow) };
        mailbox.put(ToWorker::FrameFromGuest(copy)).map_err(|_| DropReason::WorkerFull)?;
        self.counters.add(Metric::FramesHandedOver, 1);
        Ok(())
    }
}
