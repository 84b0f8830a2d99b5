//! A worker on a thread of its own, a guest in front of it, and a peer on the host's loopback behind it.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hythe::exchange::mail::{ToSlow, ToWorker};
use hythe::exchange::{Mailbox, Waker};
use hythe::flow::admit::Limits;
use hythe::flow::key::HashSecret;
use hythe::flow::table::FlowTable;
use hythe::frame::address::Address;
use hythe::host::engine::Engine;
use hythe::host::kernel::KernelSockets;
use hythe::link::vhost_user::pairs::Pairs;
use hythe::link::vhost_user::{Attachment, Queue, Ring, Takes};
use hythe::observe::counters::{Counters, Metric};
use hythe::policy::UdpFiltering;
use hythe::policy::addresses::{Addresses, Family};
use hythe::policy::guest_mac::GuestMac;
use hythe::policy::port_set::PortSet;
use hythe::time::Now;
use hythe::worker::{Parts, Worker};

use crate::guest::{GATEWAY_MAC, GUEST, GUEST_MAC, Guest, HOST, PERIOD};

/// The guest runs so far ahead of its peer, three frames: a socket has room for them also while the peer does not read.
/// Who fills the window to its brim has what the socket does not take copied to a buffer (`tcp_bytes_buffered`).
const AHEAD: u64 = 3 * 45 * 1448;

/// Nothing moves for so long only if something is wrong.
const PATIENCE: Duration = Duration::from_secs(20);

pub struct Machine {
    guest: Guest,
    peer: TcpStream,
    pub counters: Arc<Counters>,
    mail: Mailbox<ToWorker<OwnedFd>>,
    worker: Option<JoinHandle<()>>,
}

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
        snat_from: Vec::new(),
        own: Vec::new(),
    }
}

fn parts<E>(
    link: Queue,
    engine: E,
    waker: Arc<Waker>,
    mail: Mailbox<ToWorker<OwnedFd>>,
) -> Parts<Queue, E, KernelSockets> {
    let slow: Mailbox<ToSlow> = Mailbox::new(64, Arc::new(Waker::new().unwrap()));
    Parts {
        id: 0,
        link,
        engine,
        sockets: KernelSockets::new([Vec::new(), Vec::new()], 0),
        flows: Arc::new(FlowTable::new(1024, HashSecret([1, 2]))),
        flows_max: 1024,
        limits: Limits { sockets: 256, connects_per_destination: 16, connects: 16 },
        addresses: Arc::new(addresses()),
        guest_mac: GuestMac::given(GUEST_MAC),
        udp_filtering: UdpFiltering::default(),
        counters: Arc::new(Counters::default()),
        waker,
        workers: vec![mail.clone()],
        mail,
        slow,
        guest_in_kernel: false,
        excluded_ports: PortSet::default(),
        secret: [3, 4],
        recorder: None,
        spin: Duration::ZERO,
        now: Now::read(),
    }
}

impl Machine {
    /// A guest that is connected to its peer. The engine is made on the worker's thread, which knows where the guest's
    /// memory lies.
    pub fn start<E: Engine>(takes: Takes, engine: impl FnOnce(Range<usize>) -> E + Send + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut guest = Guest::new(listener.local_addr().unwrap().port());
        let (link, control) = Queue::new(1500, 0, Pairs::default());
        let waker = Arc::new(Waker::new().unwrap());
        let mail = Mailbox::new(64, waker.clone());
        let counters = Arc::new(Counters::default());
        let worker = {
            let (waker, mail, counters) = (waker.clone(), mail.clone(), counters.clone());
            let memory = guest.memory.range();
            std::thread::spawn(move || {
                let parts = Parts { counters, ..parts(link, engine(memory), waker, mail) };
                Worker::new(parts).unwrap().run();
            })
        };
        let [transmit, receive] = [(&guest.transmit, 0), (&guest.receive, 1)].map(|(ring, which)| {
            let kick = guest.kicks[which].as_fd().try_clone_to_owned().unwrap();
            Some(Ring { parts: ring.parts(), kick, call: None, error: None })
        });
        let (memory, tcp_segmentation, udp_segmentation) = (guest.memory.map.clone(), true, true);
        let attachment = Attachment {
            memory,
            transmit,
            discards: false,
            receive,
            takes,
            tcp_segmentation,
            udp_segmentation,
        };
        assert!(control.attach(attachment, || waker.signal()).unwrap());
        guest.connect();
        let mut peer = None;
        until("the connection", || {
            peer = peer.take().or_else(|| listener.accept().ok());
            guest.turn(0);
            Some(peer.is_some() && guest.is_connected())
        });
        let (peer, _) = peer.unwrap();
        peer.set_nonblocking(false).unwrap();
        peer.set_read_timeout(Some(PATIENCE)).unwrap();
        peer.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { guest, peer, counters, mail, worker: Some(worker) }
    }

    /// So many bytes from the guest to its peer.
    pub fn send(&mut self, bytes: u64) {
        let (mut peer, guest) = (&self.peer, &mut self.guest);
        let mut position = guest.sent;
        let end = position + bytes;
        let read = AtomicU64::new(position);
        std::thread::scope(|scope| {
            let read = &read;
            let reader = scope.spawn(move || {
                let mut buffer = vec![0; 256 << 10];
                while position < end {
                    let len = peer.read(&mut buffer).unwrap();
                    assert!(len > 0, "the stream has ended");
                    for at in [0, len - 1] {
                        assert_eq!(u64::from(buffer[at]), (position + at as u64) % PERIOD);
                    }
                    position += len as u64;
                    read.store(position, Ordering::Relaxed);
                }
            });
            let mut sent = guest.sent;
            until("the stream to move", || {
                guest.turn(end.min(read.load(Ordering::Relaxed) + AHEAD));
                let moves = std::mem::replace(&mut sent, guest.sent) != guest.sent;
                if moves { None } else { Some(reader.is_finished()) }
            });
        });
    }

    /// So many bytes from the peer to the guest.
    pub fn receive(&mut self, bytes: u64) {
        let (mut peer, guest) = (&self.peer, &mut self.guest);
        let mut position = guest.received;
        let end = position + bytes;
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let pattern: Vec<u8> = (0..(256 << 10) + PERIOD).map(|at| (at % PERIOD) as u8).collect();
                while position < end {
                    let start = (position % PERIOD) as usize;
                    let len = (end - position).min(256 << 10) as usize;
                    position += peer.write(&pattern[start..start + len]).unwrap() as u64;
                }
            });
            let mut received = guest.received;
            until("the stream to move", || {
                guest.turn(guest.sent);
                let moves = std::mem::replace(&mut received, guest.received) != guest.received;
                if moves { None } else { Some(guest.received >= end) }
            });
        });
    }

    pub fn metric(&self, metric: Metric) -> u64 {
        self.counters.metric(metric)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.mail.put(ToWorker::Stop);
        let ended = self.worker.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking(), "the worker has failed");
    }
}

/// Repeats `step` until it says that it is over. Patience ends when nothing has moved (`None`) for long.
fn until(what: &str, mut step: impl FnMut() -> Option<bool>) {
    let mut since = Instant::now();
    loop {
        match step() {
            Some(true) => return,
            Some(false) => {
                assert!(since.elapsed() < PATIENCE, "waited for {what}");
                std::thread::yield_now();
            }
            None => since = Instant::now(),
        }
    }
}
