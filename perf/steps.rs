//! steps: one step of the path of a frame, over and over, for a simulated processor that counts its instructions.
//!
//! `steps STEP TIMES`. What counts is what runs inside of [`measured`]; everything else prepares it. The steps are those
//! that `benches/` times. perf/instructions has the counting done.
#![allow(clippy::unwrap_used)]

#[path = "../benches/steps/chains.rs"]
mod chains;
#[path = "../benches/steps/connection.rs"]
mod connection;
#[path = "../benches/steps/flows.rs"]
mod flows;
#[path = "../benches/steps/frames.rs"]
mod frames;
#[path = "../tests/bulk/guest.rs"]
mod guest;
#[path = "../benches/steps/host.rs"]
mod host;
#[path = "../benches/steps/machine.rs"]
mod machine;
#[path = "../tests/bulk/parts.rs"]
mod parts;
#[path = "../tests/rig/driver_ring.rs"]
mod ring;

use std::hint::black_box;

use clap::{Parser, ValueEnum};
use hythe::frame::build::HEAD_MAX;

use chains::{Chains, Form};
use connection::{Connection, SEGMENT};
use flows::{CAPACITY, Flows};
use machine::{Machine, Work};

/// Repeats a step.
#[derive(Parser)]
struct Cli {
    step: Step,
    times: u32,
}

#[derive(Clone, Copy, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Step {
    /// Read the headers of a TCP segment
    ParseTcpV4,
    ParseTcpV6,
    /// And of a datagram
    ParseUdpV4,
    /// Write the headers of a TCP segment
    BuildTcpV4,
    BuildTcpV6,
    BuildUdpV4,
    /// Find a flow in a table that is full
    FlowHit,
    /// Find that there is none
    FlowMiss,
    /// Take sixteen chains of two buffers and give them back
    RingIndirect,
    /// Sixteen of one buffer to be written
    RingWritable,
    /// The relay takes a segment of the guest's
    RelaySegmentOut,
    /// It has one sent to the guest, and takes its acknowledgement
    RelaySegmentBack,
    /// The worker moves four segments of 64 KiB out
    WorkerSegmentsOut,
    /// Four to the guest
    WorkerSegmentsBack,
    /// A byte there and one back
    WorkerRoundTrip,
}

/// What is counted: everything between its entry and its return.
#[inline(never)]
fn measured<R>(step: impl FnOnce() -> R) -> R {
    black_box(step())
}

fn main() {
    let Cli { step, times } = Cli::parse();
    let repeat = |mut task: Box<dyn FnMut()>| (0..times).for_each(|_| task());
    repeat(match step {
        Step::ParseTcpV4 => parse(frames::build_tcp, 0),
        Step::ParseTcpV6 => parse(frames::build_tcp, 1),
        Step::ParseUdpV4 => parse(frames::build_udp, 0),
        Step::BuildTcpV4 => build(frames::build_tcp, 0),
        Step::BuildTcpV6 => build(frames::build_tcp, 1),
        Step::BuildUdpV4 => build(frames::build_udp, 0),
        Step::FlowHit => {
            let mut flows = Flows::new(CAPACITY);
            Box::new(move || assert!(measured(|| flows.hit())))
        }
        Step::FlowMiss => {
            let mut flows = Flows::new(CAPACITY);
            Box::new(move || assert!(measured(|| flows.miss())))
        }
        Step::RingIndirect => ring(Form::Indirect),
        Step::RingWritable => ring(Form::Writable),
        Step::RelaySegmentOut => {
            let mut connection = Connection::open();
            Box::new(move || measured(|| connection.give(SEGMENT)))
        }
        Step::RelaySegmentBack => {
            let mut connection = Connection::open();
            Box::new(move || assert_eq!(measured(|| connection.take(SEGMENT)), SEGMENT))
        }
        Step::WorkerSegmentsOut => worker(Work::Out(4)),
        Step::WorkerSegmentsBack => worker(Work::Back(4)),
        Step::WorkerRoundTrip => worker(Work::RoundTrip),
    });
}

type Build = fn(&mut [u8; HEAD_MAX], &hythe::frame::build::Route) -> hythe::frame::build::Head;

fn parse(build: Build, family: usize) -> Box<dyn FnMut()> {
    let head = frames::head(build, &frames::routes()[family].1);
    Box::new(move || assert!(measured(|| frames::parse(&head))))
}

fn build(build: Build, family: usize) -> Box<dyn FnMut()> {
    let route = frames::routes()[family].1;
    let mut out = [0; HEAD_MAX];
    Box::new(move || {
        measured(|| build(&mut out, &route));
    })
}

fn ring(form: Form) -> Box<dyn FnMut()> {
    let mut chains = Chains::new(form);
    Box::new(move || measured(|| chains.step(16)))
}

fn worker(work: Work) -> Box<dyn FnMut()> {
    let mut machine = Machine::new();
    Box::new(move || machine.round(work, |steps| measured(|| steps.step())))
}
