//! What a seed chooses: the link, the wire, the host, and every conversation with what its ends do.

use crate::frame::address::{Address, Endpoint};
use crate::random::Random;

use super::application::{Close, Pace, Reset, Script};

/// One millisecond.
pub const MS: u64 = 1_000_000;
/// One second.
pub const S: u64 = 1_000_000_000;

/// Everything that a seed decides.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The seed.
    pub seed: u64,
    /// How many workers.
    pub workers: usize,
    /// How often, in a million, a frame of the guest's comes on another queue than its conversation's.
    pub wrong_queue: u64,
    /// The guest's MTU.
    pub mtu: u16,
    /// The guest takes large segments.
    pub tcp_segmentation: bool,
    /// The guest takes runs of datagrams.
    pub udp_segmentation: bool,
    /// Time of one pass, in nanoseconds.
    pub pass_ns: (u64, u64),
    /// How often, in a million, a worker does not run for some milliseconds.
    pub preempted: u64,
    /// The link.
    pub link: LinkPlan,
    /// The way between link and guest.
    pub wire: WirePlan,
    /// The host's kernel.
    pub host: HostPlan,
    /// TCP connections.
    pub connections: Vec<ConnectionPlan>,
    /// UDP and echo conversations.
    pub datagrams: Vec<DatagramPlan>,
    /// At this time the clock jumps by so much.
    pub jump: Option<(u64, u64)>,
    /// A worker deals its streams, every so often (nanoseconds).
    pub deals: Option<u64>,
    /// Virtual time by which everything must be over, in nanoseconds.
    pub horizon_ns: u64,
}

/// The model link.
#[derive(Clone, Copy, Debug)]
pub struct LinkPlan {
    /// Frames of one outbound batch at the most.
    pub batch: usize,
    /// Frames that wait to be received at the most; more are lost.
    pub queue: usize,
    /// Frames to the guest that there is room for.
    pub ring: usize,
    /// How often, in a million, a frame's bytes are scattered over many small pieces.
    pub scattered: u64,
    /// How often, in a million, a committed frame is not taken.
    pub refused: u64,
    /// Only one consumer at a time may reserve spaces for bytes that have yet to come, as in a virtio ring.
    pub one_ahead: bool,
    /// The guest offers no room for so long, about every so often (nanoseconds).
    pub stalls: Option<(u64, u64)>,
    /// Room is a ring's; without, the guest adds it at once and tells nobody.
    pub room: Option<RingPlan>,
    /// The guest uses a queue for so long, about, and then for as long not. The first one it always uses.
    pub switches: Option<u64>,
}

/// How the guest offers buffers in a ring.
#[derive(Clone, Copy, Debug)]
pub struct RingPlan {
    /// It looks for some that came back after so long, in nanoseconds.
    pub after_ns: (u64, u64),
    /// It adds no fewer than these.
    pub added_at_once: usize,
}

/// The way between link and guest, both directions alike.
#[derive(Clone, Copy, Debug)]
pub struct WirePlan {
    /// Time on the way, in nanoseconds.
    pub latency_ns: (u64, u64),
    /// How often, in a million, a frame is lost.
    pub lost: u64,
    /// How often, in a million, a frame comes twice.
    pub doubled: u64,
    /// How often, in a million, a frame comes late.
    pub late: u64,
    /// How late, in nanoseconds.
    pub late_ns: (u64, u64),
    /// Large segments to the guest are cut before they come to it, so that parts of them can be lost.
    pub cuts: bool,
}

/// The host's kernel.
#[derive(Clone, Copy, Debug)]
pub struct HostPlan {
    /// TCP sockets keep a peek offset.
    pub peek_offset: bool,
    /// Readiness reports name everything that is ready (epoll), not only what has just become so.
    pub full_reports: bool,
    /// How often, in a million, a report comes although its descriptor is watched no more.
    pub late_reports: u64,
    /// How often, in a million, the port that is asked for is taken.
    pub port_taken: u64,
    /// How often, in a million, a socket takes less than it has room for.
    pub short_sends: u64,
    /// Events reported at once at the most.
    pub events_at_once: usize,
}

/// One TCP connection.
#[derive(Clone, Debug)]
pub struct ConnectionPlan {
    /// When it begins: counted from the start, or from the end of the one that it follows.
    pub start_ns: u64,
    /// It begins when this connection is over.
    pub follows: Option<usize>,
    /// How it begins.
    pub opening: Opening,
    /// The guest's TCP.
    pub tcp: GuestTcp,
    /// What the guest's program does.
    pub guest: Script,
    /// What the peer's program does.
    pub peer: Script,
    /// What the host's socket holds of bytes to the peer.
    pub send_buffer: u64,
    /// What the host's socket holds of bytes from the peer.
    pub receive_buffer: u64,
    /// After so many bytes from the peer the guest is never heard again.
    pub guest_vanishes: Option<u64>,
}

/// How a connection begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Opening {
    /// The guest opens it.
    Outbound {
        /// The guest's endpoint.
        guest: Endpoint,
        /// The destination as the guest knows it.
        remote: Endpoint,
        /// The destination as the host knows it.
        host: Endpoint,
        /// What comes of it.
        outcome: Outcome,
        /// When that is known, in nanoseconds from the connect.
        delay_ns: u64,
    },
    /// A client of a published port opens it.
    Inbound {
        /// The client.
        client: Endpoint,
        /// The guest's endpoint.
        guest: Endpoint,
        /// What the guest does.
        answer: Answer,
    },
    /// The guest opens it to a service of hythe's.
    Service {
        /// The guest's endpoint.
        guest: Endpoint,
        /// The service's.
        remote: Endpoint,
    },
}

/// What comes of a connect on the host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It stands.
    Connects,
    /// It is refused.
    Refused,
    /// A router says that the host cannot be reached.
    Unreachable,
    /// The call itself fails with this error.
    FailsAtOnce(i32),
    /// Nobody answers.
    Silence,
}

/// What the guest does about an inbound SYN.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// It accepts.
    Accepts,
    /// It refuses.
    Refuses,
    /// It never answers.
    Silent,
    /// It answers the gateway only.
    GatewayOnly,
}

/// The guest's TCP on one connection.
#[derive(Clone, Copy, Debug)]
pub struct GuestTcp {
    /// The largest segment that it takes.
    pub mss: u16,
    /// Its window scale.
    pub scale: Option<u8>,
    /// It offers timestamps.
    pub timestamps: bool,
    /// It offers SACK.
    pub sack: bool,
    /// Room for bytes that its program has not read.
    pub buffer: u64,
    /// Room for bytes that were not acknowledged.
    pub send_buffer: u64,
    /// How long an acknowledgement waits for company.
    pub ack_delay_ns: u64,
    /// Payload bytes of one frame at the most, where the link cuts.
    pub large_segment: u64,
    /// Its congestion window at the most.
    pub congestion_max: u64,
    /// A closed window is probed with a byte rather than with an old sequence number.
    pub probes_with_byte: bool,
    /// Idle time after which it probes for liveness.
    pub keep_alive_ns: Option<u64>,
    /// How often, in a million segments, it forgets what came out of order (RFC 2018, 8).
    pub reneges: u64,
}

/// One UDP or echo conversation.
#[derive(Clone, Copy, Debug)]
pub struct DatagramPlan {
    /// When it begins.
    pub start_ns: u64,
    /// The guest's endpoint; the port is the identifier of echo.
    pub guest: Endpoint,
    /// The destination; echo has port zero.
    pub remote: Endpoint,
    /// Echo, or UDP.
    pub echo: bool,
    /// What the other end does.
    pub server: Server,
    /// How many datagrams.
    pub count: u32,
    /// Bytes of each.
    pub size: usize,
    /// Datagrams of one frame.
    pub run: u32,
    /// Time between two frames, in nanoseconds.
    pub gap_ns: u64,
}

/// What the other end of a datagram conversation does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Server {
    /// It sends each datagram back.
    Echoes,
    /// It does nothing.
    Silent,
    /// Nobody listens there: an ICMP error comes back.
    Unreachable,
    /// It sends each back from another port of its own: this comes through (RFC 4787, REQ-8).
    OtherPort,
    /// A stranger answers: this does not come through.
    Stranger,
}

impl Plan {
    /// The plan of a seed.
    pub fn of_seed(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let lossy = random.chance(600_000);
        let rate = |random: &mut Random, most: u64| if lossy { random.below(most + 1) } else { 0 };
        let workers = if random.chance(300_000) { random.within((2, 4)) as usize } else { 1 };
        let mtu = match random.below(8) {
            0 => 1280,
            1 | 2 => random.within((1280, 65_520)) as u16,
            3 => 9000,
            4 => 65_520,
            _ => 1500,
        };
        let calm = random.chance(400_000);
        let loss = if calm { 5_000 } else { 100_000 };
        let mut plan = Self {
            seed,
            workers,
            wrong_queue: if workers > 1 { random.pick(&[0, 10_000, 200_000, 500_000]) } else { 0 },
            mtu,
            tcp_segmentation: random.chance(750_000),
            udp_segmentation: random.chance(500_000),
            pass_ns: (random.within((500, 3_000)), random.within((3_000, 60_000))),
            preempted: random.pick(&[0, 0, 300, 3_000]),
            link: LinkPlan {
                batch: random.spread(64) as usize,
                queue: random.within((32, 512)) as usize,
                ring: random.pick(&[2, 4, 16, 64, 64]),
                scattered: random.pick(&[0, 50_000, 500_000]),
                refused: if lossy { random.pick(&[0, 0, 10_000]) } else { 0 },
                one_ahead: random.chance(300_000),
                stalls: random.chance(200_000).then(|| {
                    let every_ns = random.within((5, 100)) * MS;
                    (every_ns, random.spread(30 * MS).min(every_ns / 3))
                }),
                room: None,
                switches: None,
            },
            wire: WirePlan {
                latency_ns: (random.within((1_000, 50_000)), random.within((50_000, 400_000))),
                lost: rate(&mut random, loss),
                doubled: rate(&mut random, loss / 3),
                late: rate(&mut random, loss),
                late_ns: (10_000, random.pick(&[300_000, 3 * MS, 50 * MS])),
                cuts: random.chance(400_000),
            },
            host: HostPlan {
                peek_offset: random.chance(700_000),
                full_reports: random.chance(500_000),
                late_reports: random.pick(&[0, 600_000, 1_000_000]),
                port_taken: random.pick(&[0, 0, 200_000]),
                short_sends: random.pick(&[0, 20_000, 300_000]),
                events_at_once: random.pick(&[1, 4, 256, 256]),
            },
            connections: Vec::new(),
            datagrams: Vec::new(),
            jump: random
                .chance(30_000)
                .then(|| (random.within((1, 3_000)) * MS, random.within((1, 9)) * 3600 * S)),
            deals: None,
            horizon_ns: 3 * 3600 * S,
        };
        plan.horizon_ns += plan.jump.map_or(0, |(_, by)| by);
        plan.add_connections(&mut random);
        plan.add_datagrams(&mut random);
        plan.link.switches = random.chance(600_000).then(|| random.within((1, 200)) * MS);
        plan.link.room = random.chance(700_000).then(|| RingPlan {
            after_ns: (1_000, random.spread(10 * MS)),
            added_at_once: random.within((1, (plan.link.ring as u64 / 4).max(1))) as usize,
        });
        plan.deals = random.chance(300_000).then(|| random.within((1, 100)) * MS);
        plan
    }

    fn add_connections(&mut self, random: &mut Random) {
        let most = if random.chance(100_000) { 20 } else { 6 };
        let count = random.spread(most);
        // What one seed moves is bounded, so that ten thousand of them take minutes.
        let losses = self.wire.lost + self.wire.late / 4;
        let budget = if losses > 20_000 { 600_000 } else { 2_500_000 };
        let share = budget / count;
        for index in 0..count {
            let connection = self.connection(index as usize, share, random);
            self.connections.push(connection);
        }
        if random.chance(400_000) {
            self.add_successors(share / 10, random);
        }
        if random.chance(200_000) {
            self.add_namesake(share / 4, random);
        }
    }

    /// Short connections, each as soon as the one before is over: what that one had, this one gets.
    fn add_successors(&mut self, share: u64, random: &mut Random) {
        for _ in 0..random.within((2, 6)) {
            let index = self.connections.len();
            let mut next = self.connection(index, share.max(1), random);
            next.guest_vanishes = None;
            next.follows = Some(index - 1);
            next.start_ns = random.below(MS / 10);
            if let Opening::Outbound { delay_ns, .. } = &mut next.opening {
                // Long enough for late news of the one before to fall into it.
                *delay_ns = (*delay_ns).max(2 * MS);
            }
            self.connections.push(next);
        }
    }

    /// The same name once more, when the first conversation may be hardly over.
    fn add_namesake(&mut self, share: u64, random: &mut Random) {
        let found = self.connections.iter().position(|one| {
            matches!(one.opening, Opening::Outbound { outcome: Outcome::Connects, .. })
                && one.guest_vanishes.is_none()
        });
        let Some(first) = found else { return };
        let mut second = self.connection(self.connections.len(), share, random);
        second.opening = self.connections[first].opening;
        second.tcp.mss = self.connections[first].tcp.mss;
        second.guest_vanishes = None;
        second.follows = Some(first);
        let least = self.wire.late_ns.1 + 100 * MS;
        second.start_ns = random.within((least, least + 4 * S));
        self.connections.push(second);
    }

    fn connection(&self, index: usize, share: u64, random: &mut Random) -> ConnectionPlan {
        let v4 = random.chance(600_000);
        let opening = Self::opening(index, v4, random);
        let headers = if v4 { 40 } else { 60 };
        let mss = (self.mtu - headers).min(if random.chance(150_000) {
            random.within((400, 1400)) as u16
        } else {
            65_535
        });
        let (guest, peer) = scripts(share, random);
        let vanishes = random.chance(10_000) && peer.total > 20_000 && peer.pace == Pace::Stream;
        ConnectionPlan {
            start_ns: if random.chance(500_000) { 0 } else { random.spread(3_000) * MS },
            follows: None,
            opening,
            tcp: GuestTcp {
                mss,
                scale: random.chance(850_000).then(|| random.within((0, 14)) as u8),
                timestamps: random.chance(750_000),
                sack: random.chance(800_000),
                buffer: random.within((4, 512)) << 10,
                send_buffer: random.within((8, 512)) << 10,
                ack_delay_ns: random.pick(&[0, MS, 40 * MS, 200 * MS]),
                large_segment: if random.chance(700_000) {
                    random.pick(&[65_535, 65_535, 20_000])
                } else {
                    u64::from(mss)
                },
                congestion_max: random.pick(&[20_000, 100_000, 1 << 20]),
                probes_with_byte: random.chance(500_000),
                keep_alive_ns: random.chance(50_000).then(|| random.within((1, 75)) * S),
                reneges: random.pick(&[0, 0, 0, 3_000]),
            },
            guest,
            peer,
            send_buffer: random.within((4, 256)) << 10,
            receive_buffer: random.within((4, 512)) << 10,
            guest_vanishes: vanishes.then(|| random.within((0, 10_000))),
        }
    }

    fn opening(index: usize, v4: bool, random: &mut Random) -> Opening {
        let number = index as u16;
        let outside = outside(v4, number);
        let guest = guest_address(v4);
        match random.below(100) {
            0..=59 => {
                let outcome = match random.below(24) {
                    0 => Outcome::Refused,
                    1 => Outcome::Unreachable,
                    2 => Outcome::FailsAtOnce(random.pick(&[
                        libc::ENETUNREACH,
                        libc::EACCES,
                        libc::ECONNREFUSED,
                    ])),
                    3 => Outcome::Silence,
                    _ => Outcome::Connects,
                };
                let to_host = random.chance(100_000);
                // A port below 1024 is never kept, so a stand-in is found for it.
                let port = if random.chance(100_000) { 100 + number } else { 40_000 + number };
                let remote_port = 1_000 + number;
                let remote = if to_host { host_address(v4) } else { outside };
                let loopback = if random.chance(500_000) { Address::v4([127, 0, 0, 1]) } else { LOOPBACK_V6 };
                let host = if to_host { loopback } else { outside };
                Opening::Outbound {
                    guest: Endpoint { address: guest, port },
                    remote: Endpoint { address: remote, port: remote_port },
                    host: Endpoint { address: host, port: remote_port },
                    outcome,
                    delay_ns: if random.chance(900_000) {
                        random.spread(100 * MS)
                    } else {
                        random.spread(3 * S)
                    },
                }
            }
            60..=92 => {
                let address = if random.chance(300_000) { Address::v4([127, 0, 0, 1]) } else { outside };
                let answer = match random.below(16) {
                    0 => Answer::Refuses,
                    1 => Answer::Silent,
                    2 => Answer::GatewayOnly,
                    _ => Answer::Accepts,
                };
                let guest = guest_address(address.is_v4());
                Opening::Inbound {
                    client: Endpoint { address, port: 50_000 + number },
                    guest: Endpoint { address: guest, port: 8_000 + number },
                    answer,
                }
            }
            _ => Opening::Service {
                guest: Endpoint { address: guest, port: 30_000 + number },
                remote: Endpoint { address: gateway_address(v4), port: 53 },
            },
        }
    }

    fn add_datagrams(&mut self, random: &mut Random) {
        let count = if random.chance(400_000) { random.spread(6) } else { 0 };
        for index in 0..count {
            let v4 = random.chance(600_000);
            let echo = random.chance(300_000);
            let number = 200 + index as u16;
            let server = match random.below(10) {
                0 => Server::Silent,
                1 | 2 => Server::Unreachable,
                3 if !echo => Server::OtherPort,
                4 if !echo => Server::Stranger,
                _ => Server::Echoes,
            };
            let headers = if v4 { 28 } else { 48 };
            let size = if random.chance(50_000) { random.spread(20_000) } else { random.spread(1400) }
                .min(u64::from(self.mtu - headers)) as usize;
            // Two of them share the guest's port, so that one mapping has several flows.
            let port = if random.chance(300_000) { 45_000 } else { 45_000 + number };
            self.datagrams.push(DatagramPlan {
                start_ns: random.spread(2_000) * MS,
                guest: Endpoint { address: guest_address(v4), port },
                remote: Endpoint { address: outside(v4, number), port: if echo { 0 } else { 7 } },
                echo,
                server,
                count: random.spread(60) as u32,
                size: size.max(16),
                run: if echo || random.chance(500_000) { 1 } else { random.within((1, 20)) as u32 },
                gap_ns: random.spread(200 * MS),
            });
        }
    }
}

const LOOPBACK_V6: Address = Address::of_v6(std::net::Ipv6Addr::LOCALHOST);

/// An address of the world.
fn outside(v4: bool, number: u16) -> Address {
    let [high, low] = number.to_be_bytes();
    if v4 {
        Address::v4([198, 51, 100 + high, low.max(1)])
    } else {
        Address::v6([0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, high, low])
    }
}

/// An address of the link's subnet.
fn local(v4: bool, last: u16) -> Address {
    let [high, low] = last.to_be_bytes();
    if v4 {
        Address::v4([192, 168, 65, low])
    } else {
        Address::v6([0xfd, 0xc4, 0xf3, 3, 0x93, 0x24, 0, 0, 0, 0, 0, 0, 0, 0, high, low])
    }
}

/// The gateway's address.
pub fn gateway_address(v4: bool) -> Address {
    local(v4, 1)
}

/// The guest's address.
pub fn guest_address(v4: bool) -> Address {
    local(v4, 3)
}

/// The host's address.
pub fn host_address(v4: bool) -> Address {
    local(v4, if v4 { 254 } else { 0x254 })
}

/// What the two programs of a connection do.
fn scripts(share: u64, random: &mut Random) -> (Script, Script) {
    let mut totals = [0, 0].map(|_| if random.chance(150_000) { 0 } else { random.spread(share) });
    let mut paces = [Pace::Stream, Pace::Stream];
    let asks = random.chance(250_000);
    if asks {
        let rounds = random.spread(60);
        let own = random.spread(share.min(20_000));
        let other = random.spread(share.min(20_000));
        let guest_asks = random.chance(500_000);
        let pair = [Pace::Ask { own, other }, Pace::Answer { own: other, other: own }];
        paces = if guest_asks { pair } else { [pair[1], pair[0]] };
        totals = if guest_asks { [own, other] } else { [other, own] }.map(|bytes| bytes * rounds);
    }
    // Not both may wait for the other one's end.
    let waits = random.below(3);
    let closes =
        [waits == 1, waits == 2].map(|waits| if waits { Close::AfterEnd } else { Close::AfterWriting });
    let resets = random.chance(120_000).then(|| random.below(2) as usize);
    let mut make = |side: usize| {
        let total = totals[side];
        let other = totals[1 - side];
        let reset = match resets {
            Some(who) if who == side && random.chance(500_000) => {
                Reset::AfterWriting(random.below(total + 1))
            }
            Some(who) if who == side => Reset::AfterReading(random.below(other + 1)),
            _ => Reset::No,
        };
        let slow = random.chance(150_000);
        // Not so small that a stream takes for ever.
        let chunk = random.spread(100_000).max(total / 2_000);
        Script {
            total,
            pace: paces[side],
            write_bytes: (1 + chunk / 4, chunk.max(2)),
            write_gap_ns: gap(total / chunk.max(1), random),
            read_bytes: if slow { (1_000, 20_000) } else { (1, 1 << 20) },
            read_gap_ns: if slow { gap(other / 10_000, random) } else { (0, random.pick(&[0, 100_000])) },
            pause: random.chance(150_000).then(|| (random.below(other + 1), random.spread(8_000) * MS)),
            close: closes[side],
            reset,
        }
    };
    (make(0), make(1))
}

/// A gap between actions of which there will be about `actions`: in all no more than about a minute.
fn gap(actions: u64, random: &mut Random) -> (u64, u64) {
    let most = (60 * S / (actions + 1)).min(2 * S);
    match random.below(4) {
        0 => (0, random.spread(most.max(1))),
        1 => (0, random.spread(MS).min(most)),
        _ => (0, 0),
    }
}
