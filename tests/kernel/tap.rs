//! Tap devices with the virtio-net header: segments of many frames' worth in one read and one write.
//!
//! Two namespaces whose taps are joined by a loop that copies frames as they are, headers included: what the kernel gives
//! on one side it must take on the other.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use hythe::host::engine::Engine;
use hythe::host::engine::uring::Uring;
use hythe::io::Operations;
use hythe::link::tap::{self, Tap};
use hythe::link::{Link, Ready};
use io_uring::{opcode, types::Fd};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Socket, Type};

use crate::calls::{PATIENCE, in_new_namespace, ip, number, receive_with, send_with, set, when_ready};
use crate::ring;

const FRAME_MAX: usize = 65_535 + 14 + 12;

/// The names of the two ends.
const ENDS: [[&str; 2]; 2] = [["192.0.2.1", "192.0.2.2"], ["2001:db8::1", "2001:db8::2"]];

/// Makes a tap in the calling thread's namespace, with the addresses of one end.
fn end(number: usize) -> Vec<OwnedFd> {
    let created = tap::create("tap0", 2).unwrap();
    assert!(created.udp_segmentation, "a kernel before 6.2 has no UDP segmentation on taps");
    ip(&format!(
        "addr add {}/24 dev tap0
         addr add {}/64 dev tap0 nodad
         link set tap0 up",
        ENDS[0][number], ENDS[1][number]
    ));
    created.queues
}

/// Copies frames from each tap's first queue to the other's; dropping it ends that.
struct Joined {
    /// Bytes of the longest frame.
    longest: Arc<AtomicUsize>,
    stop: Option<UnixStream>,
    copier: Option<JoinHandle<()>>,
}

fn join(ends: [Vec<OwnedFd>; 2]) -> Joined {
    let longest: Arc<AtomicUsize> = Arc::default();
    let (stop, stopped) = UnixStream::pair().unwrap();
    let seen = longest.clone();
    let copier = std::thread::spawn(move || {
        let queues: Vec<File> = ends.into_iter().flatten().map(File::from).collect();
        let mut frame = vec![0; FRAME_MAX];
        loop {
            let fds = queues.iter().map(|queue| PollFd::new(queue.as_fd(), PollFlags::POLLIN));
            let mut fds: Vec<_> = fds.chain([PollFd::new(stopped.as_fd(), PollFlags::POLLIN)]).collect();
            poll(&mut fds, PollTimeout::NONE).unwrap();
            if fds[4].any().unwrap_or(true) {
                return;
            }
            for (index, mut queue) in queues.iter().enumerate() {
                let from = index / 2;
                while let Ok(len) = queue.read(&mut frame) {
                    seen.fetch_max(len, Ordering::Relaxed);
                    // What the other end cannot take is lost, as on any wire.
                    let _ = (&queues[2 * (1 - from)]).write(&frame[..len]);
                }
            }
        }
    });
    Joined { longest, stop: Some(stop), copier: Some(copier) }
}

impl Drop for Joined {
    fn drop(&mut self) {
        self.stop = None;
        let _ = self.copier.take().map(JoinHandle::join);
    }
}

/// Sockets of two namespaces that are joined, of one family.
struct Sides {
    joined: Joined,
    near: Socket,
    far: Socket,
    far_name: SocketAddr,
}

fn sides(family: [&'static str; 2], kind: Type) -> Sides {
    let make = move |number: usize| {
        in_new_namespace(move || {
            let queues = end(number);
            let name = SocketAddr::new(family[number].parse().unwrap(), 0);
            let socket = Socket::new(Domain::for_address(name), kind, None).unwrap();
            socket.bind(&name.into()).unwrap();
            (queues, socket)
        })
    };
    let ((near_queues, near), (far_queues, far)) = (make(0), make(1));
    let far_name = far.local_addr().unwrap().as_socket().unwrap();
    Sides { joined: join([near_queues, far_queues]), near, far, far_name }
}

#[test]
fn a_stream_passes_in_segments_of_64_kib_at_an_mtu_of_1500() {
    for family in ENDS {
        let Sides { joined, near, far, far_name } = sides(family, Type::STREAM);
        far.listen(1).unwrap();
        near.connect(&far_name.into()).unwrap();
        let mut accepted = std::net::TcpStream::from(far.accept().unwrap().0);
        let bytes = vec![7; 8 << 20];
        let sent = bytes.clone();
        let sender = std::thread::spawn(move || {
            std::net::TcpStream::from(near).write_all(&sent).unwrap();
        });
        let mut got = vec![0; bytes.len()];
        accepted.read_exact(&mut got).unwrap();
        assert!(got == bytes);
        sender.join().unwrap();
        let longest = joined.longest.load(Ordering::Relaxed);
        assert!(longest > 60_000, "the longest frame had {longest} bytes");
    }
}

#[test]
fn a_run_of_datagrams_passes_in_one_frame() {
    for family in ENDS {
        let Sides { joined, near, far, far_name } = sides(family, Type::DGRAM);
        set(&far, libc::SOL_UDP, libc::UDP_GRO, 1).unwrap();
        let bytes: Vec<u8> = (0..40 * 1400u32).map(|n| (n / 7) as u8).collect();
        // The first finds the neighbour out.
        near.send_to(b"first", &far_name.into()).unwrap();
        let receive = || receive_with(&far, 65_535, libc::SOL_UDP, libc::UDP_GRO);
        assert_eq!(when_ready(receive).unwrap().0, b"first");
        let size = (libc::SOL_UDP, libc::UDP_SEGMENT, &1400u16.to_ne_bytes()[..]);
        assert_eq!(send_with(&near, far_name, &bytes, size).unwrap(), bytes.len());
        let (got, size) = when_ready(receive).unwrap();
        assert!(got == bytes, "{} bytes", got.len());
        assert_eq!(size, Some(1400));
        let longest = joined.longest.load(Ordering::Relaxed);
        assert!(longest > bytes.len(), "the longest frame had {longest} bytes");
    }
}

#[test]
fn an_empty_queue_is_told_at_once_also_through_a_ring() {
    let queues = in_new_namespace(|| tap::create("tap0", 2).unwrap().queues);
    let mut ring = ring::restricted();
    for queue in &queues {
        assert_eq!(number(File::from(queue.try_clone().unwrap()).read(&mut [0; 100])), libc::EAGAIN);
        let mut bytes = [0u8; 100];
        let piece = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        let entry = opcode::Readv::new(Fd(queue.as_raw_fd()), (&raw const piece).cast(), 1);
        ring::push(&mut ring, &entry.rw_flags(libc::RWF_NOWAIT).build());
        assert_eq!(ring::complete(&mut ring, 1)[0].1, -libc::EAGAIN);
    }
    assert_eq!(ring::kernel_workers(), 0);
}

#[test]
fn a_tap_lives_as_long_as_its_last_queue() {
    let queues = in_new_namespace(|| {
        let mut queues = tap::create("tap0", 2).unwrap().queues;
        let there = || std::fs::read_to_string("/proc/thread-self/net/dev").unwrap().contains("tap0");
        assert!(there());
        queues.pop();
        assert!(there());
        queues.pop();
        // A process that another test is just starting has a copy of the queue until it executes its program.
        let deadline = Instant::now() + PATIENCE;
        while there() {
            assert!(Instant::now() < deadline, "the tap outlives its queues");
            std::thread::yield_now();
        }
        queues
    });
    assert!(queues.is_empty());
}

/// Receives from a link what there is; how many frames that was.
fn received(link: &mut Tap, engine: &mut Uring) -> usize {
    let mut operations = Operations::default();
    let mut frames = 0;
    loop {
        operations.clear();
        link.begin_receive(&mut operations);
        engine.run(&mut operations);
        let received = link.end_receive(&operations);
        frames += received.frames;
        link.release();
        if received.empty {
            return frames;
        }
    }
}

fn is_ready(ready: Option<Ready>) -> bool {
    let Some(ready) = ready else { return false };
    // SAFETY: the descriptor is open for as long as its link.
    let fd = unsafe { BorrowedFd::borrow_raw(ready.fd) };
    poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::ZERO).unwrap() == 1
}

#[test]
fn a_queue_that_is_lent_is_read_by_the_first_ones_owner() {
    let [own, other] = ENDS[0];
    let (created, socket) = in_new_namespace(move || {
        let created = tap::create("tap0", 3).unwrap();
        ip(&format!(
            "link set tap0 addrgenmode none
             addr add {own}/24 dev tap0
             link set tap0 up
             neigh add {other} lladdr 02:00:00:00:00:02 dev tap0 nud permanent"
        ));
        (created, UdpSocket::bind((own, 7)).unwrap())
    });
    let mut links = Tap::all(created, 1500).unwrap();
    let send = || {
        // Enough flows for each queue to get some.
        for port in 1000..1064 {
            socket.send_to(&[1; 8], (other, port)).unwrap();
        }
    };
    let receive = |links: &mut [Tap]| {
        let mut engine = Uring::new().unwrap();
        let ready = links[0].ready_fds().map(is_ready);
        let frames: Vec<usize> = links.iter_mut().map(|link| received(link, &mut engine)).collect();
        assert_eq!(links[0].ready_fds().map(is_ready), [false; 2], "all was read");
        (ready, frames)
    };
    let exchange = |links: &mut [Tap]| {
        send();
        receive(links)
    };
    // What the kernel itself sends first.
    exchange(&mut links);
    for _ in 0..3 {
        let (ready, spread) = exchange(&mut links);
        assert_eq!((ready, spread.iter().sum::<usize>()), ([true, false], 64));
        assert!(spread.iter().all(|frames| *frames > 0), "{spread:?}");
        // What lies in a queue already is found by the first one, too.
        send();
        links[2].rest(true).unwrap();
        assert_eq!(links[2].ready_fds(), [None; 2]);
        let lent = ([true; 2], vec![spread[0] + spread[2], spread[1], 0]);
        assert_eq!(receive(&mut links), lent);
        assert_eq!(exchange(&mut links), lent);
        links[1].rest(true).unwrap();
        assert_eq!(exchange(&mut links), ([true; 2], vec![64, 0, 0]));
        links[1].rest(false).unwrap();
        links[2].rest(false).unwrap();
    }
    assert_eq!(exchange(&mut links).0, [true, false]);
}
