//! What a worker is made of whose guest is in the same process, on an engine and sockets of the caller's choice.

use std::os::fd::AsFd;
use std::sync::Arc;

use hythe::exchange::mail::{ToSlow, ToWorker};
use hythe::exchange::{Mailbox, Waker};
use hythe::flow::admit::{Descriptors, Limits};
use hythe::flow::key::HashSecret;
use hythe::flow::table::FlowTable;
use hythe::frame::address::Address;
use hythe::host::Sockets;
use hythe::link::vhost_user::{Attachment, Queue, Ring, Takes};
use hythe::observe::counters::Counters;
use hythe::policy::UdpFiltering;
use hythe::policy::addresses::{Addresses, Family};
use hythe::policy::guest_mac::GuestMac;
use hythe::policy::port_set::PortSet;
use hythe::time::Now;
use hythe::worker::Parts;
use hythe::worker::idle::Seat;

use crate::guest::{GATEWAY_MAC, GUEST, GUEST_MAC, Guest, HOST};

/// IPv4 alone.
fn addresses() -> Addresses {
    let v4 = Family {
        subnet: "192.168.65.0/24".parse().unwrap(),
        gateway: Address::v4([192, 168, 65, 1]),
        host: Address::of_v4(HOST),
        guest: Address::of_v4(GUEST),
    };
    Addresses {
        gateway_mac: GATEWAY_MAC,
        v4: Some(v4),
        v6: None,
        global_prefix: None,
        host_loopback: true,
        host_addresses: true,
        metadata: false,
        guest_api: false,
        egress: std::sync::Arc::default(),
        proxy: None,
        transparent: hythe::policy::proxy::TransparentPorts::default(),
        snat_from: Vec::new(),
        own: Vec::new(),
        outbound: hythe::policy::outbound::Outbound::default(),
    }
}

/// The only worker, and nobody on the slow path.
pub fn parts<E, S: Sockets>(
    link: Queue,
    engine: E,
    sockets: S,
    waker: Arc<Waker>,
    mail: Mailbox<ToWorker<S::Socket>>,
) -> Parts<Queue, E, S> {
    let slow: Mailbox<ToSlow> = Mailbox::new(64, Arc::new(Waker::new().unwrap()));
    Parts {
        id: 0,
        link,
        engine,
        sockets,
        flows: Arc::new(FlowTable::new(1024, HashSecret([1, 2]))),
        flows_max: 1024,
        limits: Limits { descriptors: Descriptors::new(256), connects_per_destination: 16, connects: 16 },
        addresses: Arc::new(addresses()),
        guest_mac: GuestMac::given(GUEST_MAC),
        udp_filtering: UdpFiltering::default(),
        counters: Arc::new(Counters::default()),
        waker,
        workers: vec![mail.clone()],
        moves: Vec::new(),
        mail,
        slow,
        guest_in_kernel: false,
        excluded_ports: PortSet::default(),
        secret: [3, 4],
        recorder: None,
        spin: std::time::Duration::ZERO,
        loads: hythe::worker::load::Loads::new(1),
        spread: hythe::policy::Spread::Always,
        seat: Seat::default(),
        pinning: hythe::host::processors::Pinning::default(),
        now: Now::read(),
    }
}

/// The guest's memory and its two rings.
pub fn attachment(guest: &Guest, takes: Takes) -> Attachment {
    let [transmit, receive] = [(&guest.transmit, 0), (&guest.receive, 1)].map(|(ring, which)| {
        let kick = guest.kicks[which].as_fd().try_clone_to_owned().unwrap();
        Some(Ring { parts: ring.parts(), kick, call: None, error: None })
    });
    Attachment {
        memory: guest.memory.map.clone(),
        transmit,
        discards: false,
        receive,
        takes,
        tcp_segmentation: true,
        udp_segmentation: true,
    }
}
