//! What goes wrong with datagrams, told to the guest by ICMP (RFC 5508, section 7; RFC 4787, REQ-14).
//!
//! The kernel keeps the errors of a socket in a queue (`IP_RECVERR`), each with the destination it is about and the
//! datagram that caused it. The guest gets the error with its own packet quoted, as if the network had told it directly.

use crate::flow::key::{FlowKey, Protocol};
use crate::flow::slab::Slot;
use crate::frame::address::Endpoint;
use crate::frame::drop_reason::DropReason;
use crate::frame::icmp::{self, Echo, IcmpError, Quoted};
use crate::frame::protocol;
use crate::frame::view::IpHead;
use crate::host::Sockets;
use crate::host::engine::Engine;
use crate::host::errors::{Answer, IcmpReport, QueuedError, SocketError};
use crate::link::Link;

use super::super::Worker;
use super::MappingKind;
use super::outbound::Outgoing;

/// Errors told in one pass from one socket.
const ERRORS_AT_ONCE: usize = 64;

/// What an error queue said.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Drained {
    /// It said something.
    pub any: bool,
    /// The host's own kernel refused the last datagram for its length. Of an IPv4 socket that is not connected it tells
    /// neither the port nor the payload, so this is told by whoever sent the datagram.
    pub too_big: Option<IcmpReport>,
}

impl<L: Link, E: Engine, S: Sockets> Worker<L, E, S> {
    /// Tells the guest what the error queue of a mapping says.
    pub(in crate::worker) fn drain_errors(&mut self, mapping: Slot) -> Drained {
        let mut drained = Drained::default();
        for _ in 0..ERRORS_AT_ONCE {
            let Some(record) = self.mappings.get(mapping) else { break };
            let Some(queued) = self.sockets.take_error(&record.socket) else { break };
            drained.any = true;
            let IcmpReport { error, offender } = queued.report;
            if offender.is_none() && matches!(error, IcmpError::TooBig { .. }) {
                drained.too_big = Some(queued.report);
            } else {
                self.tell_queued(mapping, &queued);
            }
        }
        drained
    }

    /// The host's kernel knows of a path that is too narrow for a datagram.
    pub(super) fn datagram_too_big(&mut self, outgoing: &Outgoing, report: IcmpReport) {
        let Some(flow) = self.datagram_flows.get(outgoing.flow).copied() else { return };
        self.tell_about_datagram(&flow.key, outgoing, report);
    }

    fn tell_queued(&mut self, mapping: Slot, queued: &QueuedError) {
        let Some(record) = self.mappings.get(mapping) else { return };
        let (guest, protocol) = (record.guest, record.kind.protocol());
        let port = if protocol == Protocol::Echo { 0 } else { queued.destination.port };
        let peer = Endpoint { address: queued.destination.address, port };
        // The destination as the guest knows it.
        let translated = record.peers.translated(peer).and_then(|slot| self.datagram_flows.get(slot));
        let remote = translated.map_or(peer, |flow| flow.key.remote);
        let key = FlowKey { guest, remote, protocol };
        if let MappingKind::Echo { id, .. } = record.kind {
            // The quoted request carries the identifier of the wire. A raw socket hears of everybody's.
            let request = icmp::parse_echo_request(&queued.payload, guest.address.is_v4());
            let Some(sequence) = request.filter(|request| request.id == id) else { return };
            let header = icmp::echo_request(guest.address.is_v4(), Echo { id: guest.port, ..sequence });
            let mut bytes = header.to_vec();
            bytes.extend(&queued.payload[icmp::ECHO_LEN..]);
            self.tell_about(&key, queued.report, bytes.len(), &bytes);
        } else {
            let mut bytes = icmp::quoted_udp_header(guest, remote, queued.payload.len()).to_vec();
            bytes.extend(&queued.payload);
            self.tell_about(&key, queued.report, bytes.len(), &bytes);
        }
    }

    fn tell_about(&mut self, key: &FlowKey, report: IcmpReport, len: usize, bytes: &[u8]) {
        let ip = IpHead {
            source: key.guest.address,
            destination: key.remote.address,
            hop_limit: 1,
            traffic_class: 0,
            dont_fragment: true,
        };
        let protocol = match key.protocol {
            Protocol::Tcp => protocol::TCP,
            Protocol::Udp => protocol::UDP,
            Protocol::Echo => protocol::icmp(key.guest.address.is_v4()),
        };
        self.tell_icmp(report, &Quoted { ip, protocol, len, bytes });
    }

    /// The host refused a datagram outright.
    pub(super) fn datagram_refused(&mut self, outgoing: &Outgoing, number: i32) {
        let Some(flow) = self.datagram_flows.get(outgoing.flow).copied() else { return };
        if number == libc::EMSGSIZE && outgoing.total as usize + 8 > 65_535 - 20 {
            self.drop_frame(DropReason::TooLarge);
            return;
        }
        let refused = matches!(number, libc::ECONNREFUSED);
        let report = match SocketError::from_number(number).answer() {
            Answer::Icmp(report) => report,
            Answer::Refused if refused => IcmpReport { error: IcmpError::PortUnreachable, offender: None },
            Answer::Refused => {
                self.drop_frame(DropReason::SendFailed);
                return;
            }
        };
        self.drop_frame(DropReason::HostRefused);
        self.tell_about_datagram(&flow.key, outgoing, report);
    }

    fn tell_about_datagram(&mut self, key: &FlowKey, outgoing: &Outgoing, report: IcmpReport) {
        let payload = self.quote_of(outgoing);
        let mut bytes = Vec::new();
        if key.protocol == Protocol::Udp {
            bytes.extend(icmp::quoted_udp_header(key.guest, key.remote, outgoing.size as usize));
        }
        bytes.extend(payload);
        let len = bytes.len();
        self.tell_about(key, report, len, &bytes);
    }

    /// Refuses a packet of the guest's for a reason of hythe's own, and counts it.
    pub(in crate::worker) fn refuse_packet(
        &mut self,
        ip: IpHead,
        protocol: u8,
        len: usize,
        head: &[u8],
        error: IcmpError,
    ) {
        let report = IcmpReport { error, offender: None };
        self.tell_icmp(report, &Quoted { ip, protocol, len, bytes: head });
    }
}
