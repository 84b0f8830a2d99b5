//! The model guest: a TCP/IP stack of its own with programs on it.
//!
//! ```text
//!  program ── connection ── sender, receiver ──┐
//!  conversation (UDP, echo) ───────────────────┴── frames ── wire ── link
//! ```
//!
//! * [`connection`]: one TCP connection, with [`sender`] and [`receiver`] as its halves
//! * [`datagrams`]: UDP and echo
//!
//! The guest says what it does in the books ([`super::check`]).

pub mod connection;
pub mod datagrams;
pub mod receiver;
pub mod sender;

use std::collections::BTreeMap;
use std::rc::Rc;

use crate::frame::address::{Address, Endpoint, Mac};
use crate::frame::build::{self, Route};
use crate::frame::checksum::{self, Sum};
use crate::frame::offload::{Offload, Segmentation};
use crate::frame::tcp::{Flags, SegmentHead, TcpView};
use crate::frame::view::{Content, IpHead, Packet, Transport, View};
use crate::random::Random;
use crate::time::Now;

use super::application::Application;
use super::check::{Name, from_guest};
use super::link::Frame;
use super::plan::{Answer, ConnectionPlan, Opening, Plan, gateway_address};
use super::stage::Stage;

use connection::{Connection, Outgoing, State, reset_for};
use datagrams::Conversations;

/// The guest's MAC.
pub const MAC: Mac = Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
/// The gateway's.
pub const GATEWAY_MAC: Mac = Mac([0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd]);

/// The guest.
pub struct Guest {
    stage: Rc<Stage>,
    plans: Vec<ConnectionPlan>,
    mtu: u16,
    offloads: bool,
    random: Random,
    connections: Vec<Connection>,
    by_name: BTreeMap<Name, usize>,
    /// Connections of the plan by the guest's listening port.
    listening: BTreeMap<u16, usize>,
    /// Connections of the plan whose program has begun.
    begun: Vec<bool>,
    /// UDP and echo.
    pub conversations: Conversations,
    /// Frames that were sent.
    pub sent: Vec<Frame>,
}

/// The way of a packet from the guest.
fn route(source: Address, destination: Address) -> Route {
    let ip = IpHead { source, destination, hop_limit: 64, traffic_class: 0, dont_fragment: true };
    Route { source_mac: MAC, destination_mac: GATEWAY_MAC, ip }
}

impl Guest {
    /// The guest of a plan.
    pub fn new(stage: Rc<Stage>, plan: &Plan, mut random: Random) -> Self {
        let mut listening = BTreeMap::new();
        for (number, connection) in plan.connections.iter().enumerate() {
            if let Opening::Inbound { guest, .. } = connection.opening {
                listening.insert(guest.port, number);
                stage.books.borrow_mut().guest_listens(guest.port, number);
            }
        }
        let conversations = Conversations::new(stage.clone(), plan, random.fork());
        Self {
            plans: plan.connections.clone(),
            mtu: plan.mtu,
            offloads: plan.tcp_segmentation,
            random,
            connections: Vec::new(),
            by_name: BTreeMap::new(),
            listening,
            begun: vec![false; plan.connections.len()],
            conversations,
            sent: Vec::new(),
            stage,
        }
    }

    /// The guest opens a connection of the plan.
    pub fn open(&mut self, number: usize) {
        let (Opening::Outbound { guest, remote, .. } | Opening::Service { guest, remote }) =
            self.plans[number].opening
        else {
            return;
        };
        self.begun[number] = true;
        let index = self.add((guest, remote), number, State::Opening);
        self.act(index);
    }

    fn add(&mut self, name: Name, number: usize, state: State) -> usize {
        let plan = &self.plans[number];
        let program = Application::new(plan.guest.clone(), self.random.fork(), self.stage.now());
        let (tcp, vanishes) = (plan.tcp, plan.guest_vanishes);
        let who = (name, number, state);
        let connection = Connection::new(self.stage.clone(), who, tcp, program, vanishes, self.random.fork());
        self.connections.push(connection);
        let index = self.connections.len() - 1;
        self.by_name.insert(name, index);
        index
    }

    /// When the guest has something to do by itself.
    pub fn next(&self) -> Option<Now> {
        let connections = self.connections.iter().filter_map(Connection::next).min();
        [connections, self.conversations.next()].into_iter().flatten().min()
    }

    /// Does what is due.
    pub fn run(&mut self) {
        let now = self.stage.now();
        for index in 0..self.connections.len() {
            if self.connections[index].next().is_some_and(|at| at <= now) {
                self.act(index);
            }
        }
        self.conversations.run(&mut self.sent);
    }

    /// Whether a connection of the plan has begun at the guest and nothing is to be expected of it any more.
    pub fn is_over(&self, number: usize) -> bool {
        let mut all = self.connections.iter().filter(|connection| connection.number == number);
        self.begun[number] && all.all(Connection::is_over)
    }

    /// Whether both sides take a connection of the plan for open.
    pub fn is_settled(&self, number: usize) -> bool {
        self.connections.iter().any(|connection| connection.number == number && connection.is_settled())
    }

    /// Whether a connection of the plan is still being opened.
    pub fn is_opening(&self, number: usize) -> bool {
        self.connections
            .iter()
            .any(|connection| connection.number == number && connection.state == State::Opening)
    }

    /// Whether the program of a connection of the plan has begun.
    pub fn has_begun(&self, number: usize) -> bool {
        self.begun[number]
    }

    fn act(&mut self, index: usize) {
        let mut out: Vec<Outgoing> = Vec::new();
        let connection = &mut self.connections[index];
        connection.act(&mut |outgoing| out.push(outgoing));
        let (name, number) = (connection.name, connection.number);
        for outgoing in out {
            self.send(name, number, &outgoing);
        }
    }

    fn send(&mut self, (guest, remote): Name, number: usize, outgoing: &Outgoing) {
        let Outgoing { segment, offset } = outgoing;
        let mss = self.plans[number].tcp.mss;
        let stage = self.stage.clone();
        let payload = stage.pattern.slice(from_guest(number), *offset, segment.len as usize);
        let large = segment.len > u32::from(mss);
        let partial = large || (self.offloads && self.random.chance(700_000));
        let route = route(guest.address, remote.address);
        let mut bytes = vec![0; build::HEAD_MAX];
        let head = build::tcp(&mut bytes, &route, guest.port, remote.port, segment, partial);
        if !partial {
            build::finish_checksum(&mut bytes, head, std::iter::once(payload));
        }
        bytes.truncate(head.len);
        bytes.extend_from_slice(payload);
        let segmentation = if large { Segmentation::Tcp { size: mss } } else { Segmentation::None };
        let SegmentHead { flags, seq, ack, window, len, .. } = *segment;
        stage.trace(u64::from(seq.0) << 32 | u64::from(ack.0), || {
            format!(
                "guest   {number:>3} {guest} > {remote} {flags:?} {seq:?}+{len} ack {ack:?} window {window}"
            )
        });
        self.sent.push(Frame { bytes, offload: Offload { checksum_partial: partial, segmentation } });
    }

    fn send_reset(&mut self, (guest, remote): Name, reset: &SegmentHead) {
        let mut bytes = vec![0; build::HEAD_MAX];
        let route = route(guest.address, remote.address);
        let head = build::tcp(&mut bytes, &route, guest.port, remote.port, reset, false);
        build::finish_checksum(&mut bytes, head, std::iter::empty());
        bytes.truncate(head.len);
        self.stage
            .trace(u64::from(reset.seq.0), || format!("guest       {guest} > {remote} R {:?}", reset.seq));
        self.sent.push(Frame { bytes, offload: Offload::default() });
    }

    /// A frame comes.
    pub fn receive(&mut self, frame: &Frame) {
        match View::parse(&frame.bytes, frame.bytes.len()) {
            Ok(View { content: Content::Ip(packet), source_mac, destination_mac }) => {
                let macs = source_mac == GATEWAY_MAC && destination_mac == MAC;
                self.stage.check(macs, || format!("a frame from {source_mac} to {destination_mac}"));
                self.inspect(frame, &packet);
                match packet.transport {
                    Transport::Tcp(tcp) => self.receive_segment(&packet, &tcp),
                    Transport::Udp(udp) => {
                        let payload = &frame.bytes[packet.transport_start + 8..][..udp.len];
                        self.conversations.receive(&packet.ip, &udp, payload, frame.offload.segmentation);
                    }
                    Transport::Icmp(message) => self.receive_icmp(&packet.ip, message),
                    Transport::Fragment(_) | Transport::Other(_) => {}
                }
            }
            Ok(_) => {}
            Err(reason) => self.stage.fail(format!("hythe sends a frame that is no frame: {reason:?}")),
        }
    }

    /// Length and checksum are as the virtio-net header says.
    fn inspect(&self, frame: &Frame, packet: &Packet<'_>) {
        let transport = &frame.bytes[packet.transport_start..][..packet.transport_len];
        let (protocol, v4) = match packet.transport {
            Transport::Tcp(_) => (6, packet.ip.source.is_v4()),
            Transport::Udp(_) => (17, packet.ip.source.is_v4()),
            Transport::Icmp(_) if !packet.ip.source.is_v4() => (58, false),
            Transport::Icmp(_) => (1, true),
            Transport::Fragment(_) | Transport::Other(_) => return,
        };
        let pseudo =
            checksum::pseudo_header(packet.ip.source, packet.ip.destination, protocol, transport.len());
        let right = if frame.offload.checksum_partial {
            let at = if protocol == 6 { 16 } else { 6 };
            transport[at..at + 2] == pseudo.partial().to_be_bytes()
        } else if protocol == 1 {
            Sum::default().with(transport).partial() == 0xffff
        } else {
            pseudo.with(transport).partial() == 0xffff
        };
        self.stage.check(right, || format!("a wrong checksum in a frame of protocol {protocol}"));
        let ip_header = if v4 { 20 } else { 40 };
        let packet_len = match (frame.offload.segmentation, packet.transport) {
            (Segmentation::Tcp { size }, Transport::Tcp(tcp)) => {
                ip_header + tcp.header_len + usize::from(size)
            }
            (Segmentation::Udp { size }, _) => ip_header + 8 + usize::from(size),
            _ => ip_header + transport.len(),
        };
        let fits = packet_len <= usize::from(self.mtu);
        self.stage.check(fits, || format!("a packet of {packet_len} bytes for an MTU of {}", self.mtu));
    }

    fn receive_segment(&mut self, packet: &Packet<'_>, tcp: &TcpView) {
        let guest = Endpoint { address: packet.ip.destination, port: tcp.destination_port };
        let remote = Endpoint { address: packet.ip.source, port: tcp.source_port };
        let (name, segment) = ((guest, remote), &tcp.segment);
        let SegmentHead { flags, seq, ack, window, len, .. } = *segment;
        self.stage.trace(u64::from(ack.0) << 32 | u64::from(seq.0), || {
            format!("guest       {guest} < {remote} {flags:?} {seq:?}+{len} ack {ack:?} window {window}")
        });
        let known = self.by_name.get(&name).copied();
        let opens = segment.flags.has(Flags::SYN) && !segment.flags.has(Flags::ACK);
        if opens && known.is_none_or(|index| self.connections[index].is_over()) {
            self.asked(name, segment);
            return;
        }
        let answer = match known {
            Some(index) => {
                let was_open = self.connections[index].state == State::Open;
                let answer = self.connections[index].segment(segment);
                if !was_open && self.connections[index].state == State::Open {
                    self.begin(index);
                }
                self.act(index);
                answer
            }
            None => reset_for(segment),
        };
        if let Some(reset) = answer {
            self.send_reset(name, &reset);
        }
    }

    /// A connection stands: its program begins.
    fn begin(&mut self, index: usize) {
        let number = self.connections[index].number;
        if let Opening::Inbound { .. } = self.plans[number].opening {
            let twice = std::mem::replace(&mut self.begun[number], true);
            self.stage.check(!twice, || format!("connection {number} is opened to the guest twice"));
        }
    }

    /// Somebody asks for a connection.
    fn asked(&mut self, name: Name, syn: &SegmentHead) {
        let (guest, remote) = name;
        let number = self.listening.get(&guest.port).copied();
        let answer = number.map(|number| match self.plans[number].opening {
            Opening::Inbound { answer, .. } => answer,
            Opening::Outbound { .. } | Opening::Service { .. } => Answer::Refuses,
        });
        match (answer, number) {
            (Some(Answer::Silent), _) => {}
            (Some(Answer::GatewayOnly), _) if remote.address != gateway_address(remote.address.is_v4()) => {}
            (Some(Answer::Accepts | Answer::GatewayOnly), Some(number)) => {
                let index = self.add(name, number, State::Answering);
                self.connections[index].asked(syn);
                self.act(index);
            }
            _ => {
                if let Some(reset) = reset_for(syn) {
                    self.send_reset(name, &reset);
                }
            }
        }
    }

    fn receive_icmp(&mut self, ip: &IpHead, message: &[u8]) {
        let v4 = ip.source.is_v4();
        let inner = if v4 { 20 } else { 40 };
        let error = matches!((v4, message.first()), (true, Some(3 | 11 | 12)) | (false, Some(1..=4)));
        if !error {
            self.conversations.receive_echo(ip, message);
            return;
        }
        let Some((quoted, rest)) = message.get(8..).and_then(|quote| quote.split_at_checked(inner)) else {
            return;
        };
        let (protocol, remote) = if v4 {
            (quoted[9], Address::v4([quoted[16], quoted[17], quoted[18], quoted[19]]))
        } else {
            let mut octets = [0; 16];
            octets.copy_from_slice(&quoted[24..40]);
            (quoted[6], Address::v6(octets))
        };
        let [source_high, source_low, high, low, ..] = *rest else { return };
        let guest = Endpoint { address: ip.destination, port: u16::from_be_bytes([source_high, source_low]) };
        let remote = Endpoint { address: remote, port: u16::from_be_bytes([high, low]) };
        self.stage.trace(30, || format!("guest       {guest} > {remote}: an ICMP error of {}", ip.source));
        if protocol == 6 {
            if let Some(index) = self.by_name.get(&(guest, remote)) {
                self.connections[*index].unreachable();
            }
        } else {
            self.conversations.receive_error(remote.address);
        }
    }
}
