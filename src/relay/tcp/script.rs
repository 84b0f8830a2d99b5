//! Scripted exchanges of segments, for tests that read like a trace.
//!
//! A segment is a line: flags (`S F R P U .`), sequence number relative to its sender's first, then
//! `ack N`, `len N`, `win N` (scaled), `mss N`, `ts V/E`, `sack A-B`. What a line of an expected segment does not
//! name is not compared.

use std::time::Duration;

use super::receive::Payload;
use super::{Config, Disposition, TcpRelay, Wanted};
use crate::frame::tcp::{Flags, Options, Range, SegmentHead, Seq};
use crate::time::Now;

pub const GUEST_ISN: u32 = 0xffff_ff00;
pub const ISN: u32 = 0xffff_fff0;
const SCALE: u8 = 7;

pub struct Script {
    pub relay: TcpRelay,
    pub config: Config,
    pub now: Now,
    /// Bytes of the host's stream that were sent so far, for relative numbers beyond 2^32 none are needed.
    guest_scale: u8,
}

fn config() -> Config {
    Config::for_mtu(1500, true)
}

/// `SYN` of a Linux guest.
pub const LINUX_SYN: &str = "S 0 win 64240 mss 1460 wscale 7 sackok ts 1/0";

fn number(token: Option<&str>) -> u32 {
    token.unwrap().parse().unwrap()
}

impl Script {
    /// The guest has sent `syn`; nothing is answered yet.
    pub fn outbound(syn: &str) -> Self {
        let now = Now(1_000_000_000);
        let head = parse(syn, GUEST_ISN, ISN, 0);
        let guest_scale = head.options.window_scale.unwrap_or(0);
        let config = config();
        Self { relay: TcpRelay::outbound(&head, Seq(ISN), &config, now), config, now, guest_scale }
    }

    /// The host has accepted a client; SYN is due.
    pub fn inbound() -> Self {
        let now = Now(1_000_000_000);
        let config = config();
        Self { relay: TcpRelay::inbound(Seq(ISN), &config, now), config, now, guest_scale: SCALE }
    }

    /// An open connection of a Linux guest.
    pub fn open() -> Self {
        let mut script = Self::outbound(LINUX_SYN);
        script.relay.connected(script.now);
        script.expect("S. 0 ack 1");
        script.guest(". 1 ack 1 win 64256");
        script.quiet();
        script
    }

    pub fn wait(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(at) = self.relay.next_deadline(&self.config).filter(|at| *at <= end) {
            self.now = self.now.max(at);
            self.relay.expired(&self.config, self.now);
            if self.relay.next_deadline(&self.config).is_some_and(|next| next <= at) {
                break;
            }
        }
        self.now = end;
        self.relay.expired(&self.config, self.now);
    }

    /// The clock goes on, and nobody is there to do what is due; then somebody is.
    pub fn sleep(&mut self, time: Duration) {
        self.now = self.now + time;
        self.relay.expired(&self.config, self.now);
    }

    /// The guest sends a segment.
    pub fn guest_gives(&mut self, line: &str) -> Disposition {
        let head = parse(line, GUEST_ISN, ISN, if line.contains('S') { 0 } else { self.guest_scale });
        self.relay.segment(&head, &self.config, self.now)
    }

    /// The guest sends a segment without payload that counts.
    pub fn guest(&mut self, line: &str) {
        let got = self.guest_gives(line);
        assert_eq!(got, Disposition::Payload(Payload::Nothing), "{line}");
    }

    /// The guest sends payload of which `taken` bytes are in order now; the socket takes them all.
    pub fn guest_data(&mut self, line: &str, taken: u32) {
        match self.guest_gives(line) {
            Disposition::Payload(Payload::Take { len, held, .. }) => {
                assert_eq!(len + held, taken, "{line}");
                self.relay.taken(taken);
            }
            other => panic!("{line}: {other:?}"),
        }
    }

    /// The next segment without payload is this one.
    pub fn expect(&mut self, line: &str) {
        let got = self.relay.poll_segment(&self.config, self.now);
        let Some(got) = got else { panic!("expected {line}, got nothing") };
        compare(&got, line);
    }

    /// Nothing is due to the guest.
    pub fn quiet(&mut self) {
        assert_eq!(self.relay.poll_segment(&self.config, self.now), None);
        assert_eq!(self.relay.wanted(&self.config), None);
    }

    /// The socket has `available` more bytes; what of them goes out now is one segment, as given.
    pub fn host_data(&mut self, available: u32, line: &str) {
        self.relay.readable(self.now);
        self.send_wanted(available, line);
        if let Some(Wanted { .. }) = self.relay.wanted(&self.config) {
            self.relay.drained();
        }
    }

    /// What is wanted now goes out as one segment, as given; the socket has `available` bytes of it.
    pub fn send_wanted(&mut self, available: u32, line: &str) {
        let Some(wanted) = self.relay.wanted(&self.config) else {
            panic!("expected {line}, nothing is wanted")
        };
        let len = wanted.len.min(available);
        let head = self.relay.data_segment(wanted.seq, len, true, self.now);
        compare(&head, line);
    }
}

fn parse(line: &str, from: u32, to: u32, scale: u8) -> SegmentHead {
    let mut tokens = line.split_whitespace();
    let mut head = SegmentHead { flags: flags(tokens.next().unwrap()), ..SegmentHead::default() };
    head.seq = Seq(from) + number(tokens.next());
    while let Some(token) = tokens.next() {
        match token {
            "ack" => head.ack = Seq(to) + number(tokens.next()),
            "len" => head.len = number(tokens.next()),
            "win" => head.window = (number(tokens.next()) >> scale) as u16,
            "mss" => head.options.mss = Some(number(tokens.next()) as u16),
            "wscale" => head.options.window_scale = Some(number(tokens.next()) as u8),
            "sackok" => head.options.sack_permitted = true,
            "ts" => {
                head.options.timestamps =
                    tokens.next().unwrap().split_once('/').map(|(v, e)| (number(Some(v)), number(Some(e))));
            }
            "sack" => {
                let (start, end) = tokens.next().unwrap().split_once('-').unwrap();
                let range = Range { start: Seq(to) + number(Some(start)), end: Seq(to) + number(Some(end)) };
                assert!(head.options.sack.push(range));
            }
            other => panic!("{other} in {line}"),
        }
    }
    if head.options.timestamps.is_none() && !head.flags.has(Flags::SYN) {
        head.options.timestamps = Some((2, 0));
    }
    head
}

fn flags(text: &str) -> Flags {
    text.chars().fold(Flags::default(), |flags, letter| {
        flags
            | match letter {
                'S' => Flags::SYN,
                'F' => Flags::FIN,
                'R' => Flags::RST,
                'P' => Flags::PSH,
                'U' => Flags::URG,
                '.' => Flags::ACK,
                other => panic!("flag {other}"),
            }
    })
}

fn compare(got: &SegmentHead, line: &str) {
    let wanted = parse(line, ISN, GUEST_ISN, if line.contains('S') { 0 } else { SCALE });
    let said = |word: &str| line.split_whitespace().any(|token| token == word);
    let push = |flags: Flags| if flags.has(Flags::PSH) { flags } else { flags | Flags::PSH };
    assert_eq!(push(got.flags), push(wanted.flags), "flags of {got:?}, expected {line}");
    assert_eq!(got.seq.0.wrapping_sub(ISN), wanted.seq.0.wrapping_sub(ISN), "seq, expected {line}");
    assert_eq!(got.len, wanted.len, "len, expected {line}");
    if said("ack") {
        assert_eq!(
            got.ack.0.wrapping_sub(GUEST_ISN),
            wanted.ack.0.wrapping_sub(GUEST_ISN),
            "ack, expected {line}"
        );
    }
    if said("win") {
        assert_eq!(got.window, wanted.window, "window, expected {line}");
    }
    if said("mss") {
        assert_eq!(got.options.mss, wanted.options.mss, "mss, expected {line}");
    }
    let blocks = |options: &Options| options.sack.as_slice().to_vec();
    assert_eq!(blocks(&got.options), blocks(&wanted.options), "SACK, expected {line}");
}
