//! A TCP relay with an open connection, and no bytes: a guest that sends numbers, a socket that takes everything.
#![allow(dead_code)]

use std::time::Duration;

use hythe::frame::tcp::{Flags, Options, SegmentHead, Seq};
use hythe::relay::tcp::receive::Payload;
use hythe::relay::tcp::{Config, Disposition, TcpRelay};
use hythe::time::Now;

const GUEST_ISN: Seq = Seq(1_000);
const ISN: Seq = Seq(2_000);

/// The largest payload that comes in one frame: what an IP packet holds, less its headers.
pub const SEGMENT: u32 = 65_160;

/// The socket takes whatever it is given.
const ROOM: u32 = 4 << 20;

/// A guest's end of an open connection, and the relay at the other.
pub struct Connection {
    pub relay: TcpRelay,
    config: Config,
    now: Now,
    pub guest: SegmentHead,
}

impl Connection {
    pub fn open() -> Self {
        let (config, now) = (Config::for_mtu(1500, true), Now(1_000_000_000));
        let syn = SegmentHead {
            seq: GUEST_ISN,
            flags: Flags::SYN,
            window: 64_240,
            options: Options {
                mss: Some(1460),
                window_scale: Some(7),
                sack_permitted: true,
                timestamps: Some((1, 0)),
                ..Options::default()
            },
            ..SegmentHead::default()
        };
        let mut relay = TcpRelay::outbound(&syn, ISN, &config, now);
        relay.connected(now);
        assert!(relay.poll_segment(&config, now).is_some(), "SYN-ACK");
        let guest = SegmentHead {
            seq: GUEST_ISN + 1,
            ack: ISN + 1,
            flags: Flags::ACK,
            window: 65_535,
            options: Options { timestamps: Some((2, 0)), ..Options::default() },
            len: 0,
        };
        let mut connection = Self { relay, config, now, guest };
        connection.give(0);
        connection
    }

    /// The guest sends a segment; the socket takes its payload, and what is due to the guest is asked for.
    pub fn give(&mut self, len: u32) {
        self.now = self.now + Duration::from_micros(10);
        let segment = SegmentHead { len, ..self.guest };
        self.guest.seq = self.guest.seq + len;
        if let Disposition::Payload(Payload::Take { len, held, .. }) =
            self.relay.segment(&segment, &self.config, self.now)
        {
            self.relay.taken(len + held);
        }
        if self.relay.wants_room() {
            self.relay.offer(ROOM, &self.config);
        }
        while self.relay.poll_segment(&self.config, self.now).is_some() {}
    }

    /// The socket has bytes; they go to the guest as one segment, which acknowledges them.
    pub fn take(&mut self, available: u32) -> u32 {
        self.relay.readable(self.now);
        let Some(wanted) = self.relay.wanted(&self.config) else { return 0 };
        let len = wanted.len.min(available);
        self.relay.data_segment(wanted.seq, len, true, self.now);
        self.guest.ack = wanted.seq + len;
        self.give(0);
        if self.relay.wants_discard() {
            self.relay.take_discard();
        }
        len
    }
}
