//! The guest's end of UDP and echo conversations.
//!
//! Each datagram names its conversation and its number, so whatever comes back can be held against what was sent.

use std::collections::BTreeSet;
use std::rc::Rc;

use crate::frame::address::{Address, Endpoint};
use crate::frame::build;
use crate::frame::icmp::{self, Echo};
use crate::frame::offload::{Offload, Segmentation};
use crate::frame::view::{IpHead, UdpView};
use crate::random::Random;
use crate::time::Now;

use super::super::link::Frame;
use super::super::plan::{DatagramPlan, Plan, Server};
use super::super::stage::Stage;
use super::route;

/// Payload of a run at the most.
const RUN_BYTES: usize = 60_000;
/// Datagrams of a run at the most.
const RUN_MAX: u32 = 60;

struct Conversation {
    plan: DatagramPlan,
    sent: u32,
    next: Now,
    /// Numbers of datagrams that came back.
    came: BTreeSet<u32>,
    errors: u32,
}

/// All conversations.
pub struct Conversations {
    stage: Rc<Stage>,
    all: Vec<Conversation>,
    random: Random,
}

/// The payload of a datagram.
pub fn payload(stage: &Stage, conversation: usize, number: u32, size: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size);
    bytes.extend((conversation as u32).to_be_bytes());
    bytes.extend(number.to_be_bytes());
    bytes.extend(stage.pattern.slice(1_000_000 + number, 0, size - 8));
    bytes
}

/// Which conversation's which datagram this is.
pub fn identify(bytes: &[u8]) -> Option<(usize, u32)> {
    let (conversation, rest) = bytes.split_first_chunk::<4>()?;
    let (number, _) = rest.split_first_chunk::<4>()?;
    Some((u32::from_be_bytes(*conversation) as usize, u32::from_be_bytes(*number)))
}

impl Conversations {
    /// The conversations of a plan.
    pub fn new(stage: Rc<Stage>, plan: &Plan, random: Random) -> Self {
        let begin = |plan: &DatagramPlan| Conversation {
            plan: *plan,
            sent: 0,
            next: Now(stage.now().0 + plan.start_ns),
            came: BTreeSet::new(),
            errors: 0,
        };
        Self { all: plan.datagrams.iter().map(begin).collect(), random, stage }
    }

    /// When the next datagram is sent.
    pub fn next(&self) -> Option<Now> {
        self.all.iter().filter(|one| one.sent < one.plan.count).map(|one| one.next).min()
    }

    /// Sends what is due.
    pub fn run(&mut self, out: &mut Vec<Frame>) {
        let now = self.stage.now();
        for (index, one) in self.all.iter_mut().enumerate() {
            if one.sent >= one.plan.count || one.next > now {
                continue;
            }
            let run = if one.plan.echo {
                1
            } else {
                one.plan.run.min(RUN_MAX).min((RUN_BYTES / one.plan.size) as u32)
            };
            let run = run.clamp(1, one.plan.count - one.sent);
            let payload: Vec<u8> = (one.sent..one.sent + run)
                .flat_map(|number| payload(&self.stage, index, number, one.plan.size))
                .collect();
            let frame = if one.plan.echo {
                echo_frame(&one.plan, one.sent, &payload)
            } else {
                udp_frame(&one.plan, run, &payload, self.random.chance(500_000))
            };
            let sent = one.sent;
            self.stage.trace(0x31 | u64::from(sent) << 8, || {
                format!("guest   datagrams {index}: {run} from {sent}")
            });
            out.push(frame);
            one.sent += run;
            one.next = Now(now.0 + one.plan.gap_ns);
        }
    }

    fn check(&mut self, bytes: &[u8], from: Endpoint, to: Endpoint) {
        let Some((index, number)) = identify(bytes) else {
            self.stage.fail(format!("a datagram of {} bytes from {from} that nobody sent", bytes.len()));
            return;
        };
        let Some(one) = self.all.get_mut(index) else {
            self.stage.fail(format!("a datagram of conversation {index}, which there is not"));
            return;
        };
        let expected = match one.plan.server {
            Server::Echoes => Some(one.plan.remote),
            Server::OtherPort => Some(Endpoint { port: one.plan.remote.port + 1, ..one.plan.remote }),
            Server::Silent | Server::Unreachable | Server::Stranger => None,
        };
        let right = number < one.sent
            && expected == Some(from)
            && to == one.plan.guest
            && bytes == payload(&self.stage, index, number, one.plan.size);
        self.stage
            .check(right, || format!("datagram {number} of conversation {index} comes from {from} for {to}"));
        self.stage.trace(0x32 | u64::from(number) << 8, || {
            format!("guest   datagrams {index}: {number} came back")
        });
        one.came.insert(number);
    }

    /// A UDP datagram, or a run of them, comes.
    pub fn receive(&mut self, ip: &IpHead, udp: &UdpView, payload: &[u8], segmentation: Segmentation) {
        let from = Endpoint { address: ip.source, port: udp.source_port };
        let to = Endpoint { address: ip.destination, port: udp.destination_port };
        let size = match segmentation {
            Segmentation::Udp { size } => usize::from(size),
            _ => payload.len(),
        };
        for datagram in payload.chunks(size.max(1)) {
            self.check(datagram, from, to);
        }
    }

    /// An ICMP message that is no error comes.
    pub fn receive_echo(&mut self, ip: &IpHead, message: &[u8]) {
        let Some(reply) = icmp::parse_echo_reply(message, ip.source.is_v4()) else { return };
        let from = Endpoint { address: ip.source, port: 0 };
        let to = Endpoint { address: ip.destination, port: reply.id };
        if let Some(payload) = message.get(icmp::ECHO_LEN..) {
            let number = identify(payload).map(|(_, number)| number as u16);
            self.stage
                .check(number == Some(reply.sequence), || format!("echo reply {reply:?} holds {number:?}"));
            self.check(payload, from, to);
        }
    }

    /// An ICMP error about a datagram to `remote` comes.
    pub fn receive_error(&mut self, remote: Address) {
        for one in self.all.iter_mut().filter(|one| one.plan.remote.address == remote) {
            one.errors += 1;
            let expected = one.plan.server == Server::Unreachable;
            self.stage.check(expected, || format!("an error about {remote}, which there is not"));
        }
    }

    /// Datagrams that came back.
    pub fn came(&self) -> usize {
        self.all.iter().map(|one| one.came.len()).sum()
    }

    /// What must hold in the end; `lossless` says that nothing was lost on the way.
    pub fn conclude(&self, lossless: bool) -> Result<(), String> {
        for (index, one) in self.all.iter().enumerate() {
            let answers = matches!(one.plan.server, Server::Echoes | Server::OtherPort);
            if lossless && answers && one.came.len() != one.sent as usize {
                return Err(format!("conversation {index}: {} of {} came back", one.came.len(), one.sent));
            }
            if lossless && one.plan.server == Server::Unreachable && one.errors == 0 {
                return Err(format!("conversation {index}: nobody said that nobody is there"));
            }
        }
        Ok(())
    }
}

fn udp_frame(plan: &DatagramPlan, run: u32, payload: &[u8], partial: bool) -> Frame {
    let partial = partial || run > 1;
    let route = route(plan.guest.address, plan.remote.address);
    let mut bytes = vec![0; build::HEAD_MAX];
    let head = build::udp(&mut bytes, &route, plan.guest.port, plan.remote.port, payload.len(), partial);
    if !partial {
        build::finish_checksum(&mut bytes, head, std::iter::once(payload));
    }
    bytes.truncate(head.len);
    bytes.extend_from_slice(payload);
    let segmentation =
        if run > 1 { Segmentation::Udp { size: plan.size as u16 } } else { Segmentation::None };
    Frame { bytes, offload: Offload { checksum_partial: partial, segmentation } }
}

fn echo_frame(plan: &DatagramPlan, number: u32, payload: &[u8]) -> Frame {
    let route = route(plan.guest.address, plan.remote.address);
    let echo = Echo { id: plan.guest.port, sequence: number as u16 };
    let mut message = icmp::echo_request(plan.guest.address.is_v4(), echo).to_vec();
    message.extend_from_slice(payload);
    let mut bytes = vec![0; build::HEAD_MAX + message.len()];
    let len = build::icmp(&mut bytes, &route, &message);
    bytes.truncate(len);
    Frame { bytes, offload: Offload::default() }
}
