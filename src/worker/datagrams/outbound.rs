//! A datagram of the guest goes to its mapping's socket.

use std::io;

use crate::flow::key::{FlowKey, Protocol};
use crate::flow::slab::Slot;
use crate::frame::address::Endpoint;
use crate::frame::drop_reason::DropReason;
use crate::frame::icmp::{self, ECHO_LEN};
use crate::frame::offload::Segmentation;
use crate::frame::view::{IpHead, UdpView};
use crate::host::control::{self, SendControl};
use crate::host::engine::Engine;
use crate::host::{EchoKind, HostSocket, Sockets};
use crate::io::{Kind, OperationId, Operations};
use crate::link::Link;
use crate::observe::counters::Metric;
use crate::policy::outbound::WayOut;
use crate::time::Now;

use super::super::Worker;
use super::super::outbound::{FrameRef, PacketSummary, Part};
use super::MappingKind;
use super::errors::Drained;
use super::open::Routed;

/// The kernel's bound on datagrams of one send (`UDP_MAX_SEGMENTS`; 128 since Linux 6.9, 64 before).
const RUN_MAX: u32 = 64;
/// The guest's kernel has such a bound too: a frame of more datagrams comes from none.
const FRAME_RUN_MAX: u32 = 128;
/// The largest UDP payload in IPv4 (and close to IPv6's): 65,535 less both headers.
const PAYLOAD_MAX: u32 = 65_507;
/// The hop limit that needs no mention: the host's default.
const DEFAULT_HOP_LIMIT: u8 = 64;

/// Datagrams of one flow that go out in one send.
#[derive(Clone, Copy)]
pub(in crate::worker) struct Outgoing {
    pub flow: Slot,
    pub mapping: Slot,
    first_part: u32,
    last_part: u32,
    /// How many datagrams, of how many payload bytes each; only the last may be shorter.
    pub count: u32,
    pub size: u32,
    pub total: u32,
    pub ip: IpHead,
    echo: Option<icmp::Echo>,
    operation: Option<OperationId>,
}

impl<L: Link, E: Engine, S: Sockets> Worker<L, E, S> {
    /// Takes a UDP datagram (or a run of them) in.
    pub(in crate::worker) fn udp_from_guest(
        &mut self,
        frame: FrameRef,
        packet: &PacketSummary,
        udp: &UdpView,
        segmentation: Segmentation,
        now: Now,
    ) -> Result<(), DropReason> {
        let key = FlowKey {
            guest: Endpoint { address: packet.ip.source, port: udp.source_port },
            remote: Endpoint { address: packet.ip.destination, port: udp.destination_port },
            protocol: Protocol::Udp,
        };
        let total = udp.len as u32;
        let size = match segmentation {
            Segmentation::None => total,
            Segmentation::Udp { size } => u32::from(size).min(total),
            Segmentation::Tcp { .. } => return Err(DropReason::Offload),
        };
        if total > size.saturating_mul(FRAME_RUN_MAX) {
            return Err(DropReason::Offload);
        }
        let whole = Part { frame, from: (packet.transport_start + 8) as u32, len: total, next: None };
        let mut done = 0;
        loop {
            let len = (total - done).min(size * RUN_MAX);
            let count = if size == 0 { 1 } else { len.div_ceil(size) };
            let part = Part { from: whole.from + done, len, ..whole };
            self.datagram_from_guest(key, packet.ip, part, (count, size), None, now)?;
            done += len;
            if done >= total {
                return Ok(());
            }
        }
    }

    /// Takes an echo request in.
    pub(in crate::worker) fn echo_from_guest(
        &mut self,
        frame: FrameRef,
        packet: &PacketSummary,
        echo: icmp::Echo,
        now: Now,
    ) -> Result<(), DropReason> {
        let key = FlowKey {
            guest: Endpoint { address: packet.ip.source, port: echo.id },
            remote: Endpoint { address: packet.ip.destination, port: 0 },
            protocol: Protocol::Echo,
        };
        // The echo header is written anew; the part is what follows it.
        let from = (packet.transport_start + ECHO_LEN) as u32;
        let len = (packet.transport_len - ECHO_LEN) as u32;
        self.datagram_from_guest(
            key,
            packet.ip,
            Part { frame, from, len, next: None },
            (1, len),
            Some(echo),
            now,
        )
    }

    fn datagram_from_guest(
        &mut self,
        key: FlowKey,
        ip: IpHead,
        part: Part,
        (count, size): (u32, u32),
        echo: Option<icmp::Echo>,
        now: Now,
    ) -> Result<(), DropReason> {
        let flow = match self.route_datagram(key, now)? {
            Routed::Elsewhere(owner) if owner != self.id => return self.hand_over(part.frame, owner),
            Routed::Elsewhere(_) => return Err(DropReason::FlowBudget),
            Routed::Here(flow) => flow,
        };
        let expires = now + Self::idle_time(&key);
        let Some(record) = self.datagram_flows.get_mut(flow) else { return Err(DropReason::NoFlow) };
        record.expires = expires;
        record.answered = true;
        let mapping = record.mapping;
        if let Some(mapping) = self.mappings.get_mut(mapping) {
            mapping.last_used = now;
        }
        self.counters.add(Metric::DatagramsOut, u64::from(count));
        let index = self.parts.len() as u32;
        self.parts.push(part);
        if let Some(last) = self.outgoing.last_mut()
            && last.flow == flow
            && echo.is_none()
            && last.ip == ip
            && last.size > 0
            && size <= last.size
            && last.total == last.count * last.size
            && last.count + count <= RUN_MAX
            && last.total + part.len <= PAYLOAD_MAX
            && (count == 1 || size == last.size)
        {
            self.parts[last.last_part as usize].next = Some(index);
            last.last_part = index;
            last.count += count;
            last.total += part.len;
            return Ok(());
        }
        if echo.is_some() && self.outgoing.len() >= self.echo_requests.slots() {
            return Err(DropReason::SocketFull);
        }
        let total = part.len;
        self.outgoing.push(Outgoing {
            flow,
            mapping,
            first_part: index,
            last_part: index,
            count,
            size,
            total,
            ip,
            echo,
            operation: None,
        });
        Ok(())
    }

    /// Adds the sends of this pass to the batch, but for those that need their socket set in another way than one before
    /// them in it: whether packets may be cut is said by socket, not by datagram, and the batch runs later. These go
    /// behind it.
    pub(in crate::worker) fn submit_datagrams(&mut self) {
        for index in 0..self.outgoing.len() {
            if self.contradicts_batch(index) {
                continue;
            }
            let mut operations = std::mem::take(&mut self.operations);
            self.outgoing[index].operation = self.submit_run(&mut operations, index, None);
            self.operations = operations;
        }
    }

    /// Whether a send would set a socket in another way than the batch needs it.
    fn contradicts_batch(&self, index: usize) -> bool {
        let Outgoing { mapping, ip, .. } = self.outgoing[index];
        let is_set = self.mappings.get(mapping).and_then(|mapping| mapping.dont_fragment);
        is_set != Some(ip.dont_fragment)
            && self.outgoing[..index]
                .iter()
                .any(|other| other.mapping == mapping && other.operation.is_some())
    }

    /// Adds the send of a run, or of one datagram of it.
    fn submit_run(
        &mut self,
        operations: &mut Operations,
        index: usize,
        only: Option<u32>,
    ) -> Option<OperationId> {
        let outgoing = self.outgoing[index];
        let flow = *self.datagram_flows.get(outgoing.flow)?;
        let mapping = self.mappings.get_mut(outgoing.mapping)?;
        let v4 = mapping.guest.address.is_v4();
        if mapping.dont_fragment != Some(outgoing.ip.dont_fragment) {
            mapping.dont_fragment = Some(outgoing.ip.dont_fragment);
            self.sockets.set_dont_fragment(&mapping.socket, v4, outgoing.ip.dont_fragment);
        }
        let (from, len) = match only {
            Some(datagram) => (datagram * outgoing.size, outgoing.size),
            None => (0, outgoing.total),
        };
        let fd = mapping.socket.fd();
        let mut send = operations.begin(fd, Kind::SendDatagram);
        if let (Some(echo), MappingKind::Echo { id, kind }) = (outgoing.echo, mapping.kind) {
            let mut header = icmp::echo_request(v4, icmp::Echo { id, ..echo });
            if kind == EchoKind::Raw && v4 {
                // The kernel sums ICMPv6 and what goes through ping sockets, not raw ICMP.
                let mut payload = Vec::new();
                let part = self.parts[outgoing.first_part as usize];
                Self::pieces_of(&self.link, &self.adopted, &part, &mut |piece| piece.copy_to(&mut payload));
                let sum = crate::frame::checksum::Sum::default().with(&header).with(&payload).finish();
                header[2..4].copy_from_slice(&sum.to_be_bytes());
            }
            self.echo_requests.bytes_mut(index, ECHO_LEN).copy_from_slice(&header);
            send.piece(self.echo_requests.piece(index).part(0, ECHO_LEN));
        }
        let (mut skip, mut rest) = (from, len);
        let mut next = Some(outgoing.first_part);
        while let Some(at) = next
            && rest > 0
        {
            let part = self.parts[at as usize];
            next = part.next;
            let skipped = skip.min(part.len);
            skip -= skipped;
            let len = (part.len - skipped).min(rest);
            rest -= len;
            let part = Part { from: part.from + skipped, len, ..part };
            Self::pieces_of(&self.link, &self.adopted, &part, &mut |piece| send.piece(piece));
        }
        let (id, message) = send.finish_datagram();
        message.set_destination(Some(flow.peer));
        let segment = (only.is_none() && outgoing.count > 1).then_some(outgoing.size as u16);
        let hop_limit = Some(outgoing.ip.hop_limit).filter(|limit| *limit != DEFAULT_HOP_LIMIT);
        // The socket itself is bound to no way: it serves all destinations, the host's loopback among them. An answer leaves
        // from where it was asked.
        let way = match flow.local {
            Some(local) => WayOut { source: Some(local), interface: None },
            None => self.addresses.way_out(flow.peer.address),
        };
        let traffic_class = outgoing.ip.traffic_class;
        let WayOut { interface, source: local } = way;
        let asked = SendControl { hop_limit, traffic_class, segment, local, interface };
        control::write(message, v4, &asked);
        Some(id)
    }

    /// Looks at what came of the sends.
    pub(in crate::worker) fn conclude_datagrams(&mut self) {
        for index in 0..self.outgoing.len() {
            let result = match self.outgoing[index].operation {
                Some(operation) => self.operations.result(operation).map(drop),
                None => self.send_apart(index),
            };
            if let Err(error) = result {
                self.send_failed(index, error.raw_os_error().unwrap_or(libc::EIO));
            }
        }
        self.outgoing.clear();
    }

    /// Sends what could not be part of the batch.
    fn send_apart(&mut self, index: usize) -> io::Result<()> {
        let mut apart = Operations::default();
        let Some(operation) = self.submit_run(&mut apart, index, None) else {
            self.drop_frame(DropReason::NoFlow);
            return Ok(());
        };
        self.engine.run(&mut apart);
        apart.result(operation).map(drop)
    }

    /// A send failed: perhaps because of another destination, perhaps because the run cannot stay together.
    fn send_failed(&mut self, index: usize, number: i32) {
        let outgoing = self.outgoing[index];
        if number == libc::EAGAIN || number == libc::ENOBUFS {
            (0..outgoing.count).for_each(|_| self.drop_frame(DropReason::SocketFull));
            return;
        }
        // An error of one destination fails the next send to any (udp(7)): it is told, and the send made again. A run
        // larger than a path's MTU fails as a whole, without an entry in the queue: it is sent one by one.
        let drained = self.drain_errors(outgoing.mapping);
        let whole = outgoing.count == 1;
        if let Some(report) = drained.too_big.filter(|_| whole && number == libc::EMSGSIZE) {
            self.datagram_too_big(&outgoing, report);
            return;
        }
        let mut again = Operations::default();
        let sends: Vec<OperationId> = (0..outgoing.count)
            .filter_map(|datagram| self.submit_run(&mut again, index, (!whole).then_some(datagram)))
            .collect();
        self.engine.run(&mut again);
        for send in sends {
            let Err(error) = again.result(send) else { continue };
            match self.drain_errors(outgoing.mapping) {
                Drained { too_big: Some(report), .. } => self.datagram_too_big(&outgoing, report),
                Drained { any: true, .. } => {}
                Drained { any: false, .. } => {
                    self.datagram_refused(&outgoing, error.raw_os_error().unwrap_or(libc::EIO));
                }
            }
        }
    }

    /// The beginning of a datagram's payload, for quoting.
    pub(super) fn quote_of(&self, outgoing: &Outgoing) -> Vec<u8> {
        const QUOTED: u32 = 512;
        let part = self.parts[outgoing.first_part as usize];
        let mut bytes = Vec::new();
        if let (Some(echo), v4) = (outgoing.echo, outgoing.ip.source.is_v4()) {
            bytes.extend(icmp::echo_request(v4, echo));
        }
        let part = Part { len: part.len.min(QUOTED), ..part };
        Self::pieces_of(&self.link, &self.adopted, &part, &mut |piece| piece.copy_to(&mut bytes));
        bytes
    }
}
