//! A tap device in the guest's network namespace.
//!
//! Frames carry the virtio-net header both ways (`IFF_VNET_HDR`), so a TCP segment of 64 KiB is one read or one write
//! at any MTU. One queue a worker (`IFF_MULTI_QUEUE`). Each frame of a batch lies in a buffer of its own, in one
//! piece.
//!
//! A queue may be *lent*: the first one's worker reads it too then, and learns of frames in it by an epoll instance that the
//! owner puts it into. Its owner goes on writing. Whoever reads, each frame is read once; in the moment of a change both may
//! read.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use super::{
    Ahead, Capabilities, FRAME_MAX, InboundHead, Link, OutboundFrame, READY_FDS, Ready, Received, Space,
};
use crate::frame::build::HEAD_MAX;
use crate::frame::offload::{HEADER_LEN, Offload};
use crate::frame::view::HEAD_LEN;
use crate::io::{Buffers, Kind, OperationId, Operations, Piece};

/// Frames of an outbound batch at the most.
const BATCH: usize = 64;

/// Bytes of an outbound batch, about: what stays in the cache between the read and the send.
const BATCH_BYTES: usize = 256 << 10;

/// Frames of an inbound batch at the most.
const SPACES: usize = 64;
/// Of them, kept for frames that are complete.
const SPACES_KEPT: usize = 8;

/// Room before an inbound payload: the virtio-net header and the longest head, rounded up to a cache line.
const HEAD_ROOM: usize = (HEADER_LEN + HEAD_MAX).next_multiple_of(64);

/// A queue that is read.
struct Source {
    fd: OwnedFd,
    /// How many frames to ask for.
    ask: usize,
    /// There may be some.
    ready: bool,
    /// The reads of this batch.
    reads: Range<usize>,
}

impl Source {
    fn new(fd: OwnedFd) -> Self {
        Self { fd, ask: 1, ready: true, reads: 0..0 }
    }
}

/// The queues that the first one's worker reads too.
struct Lent {
    epoll: Epoll,
    /// By number.
    queues: Vec<AtomicBool>,
}

impl Lent {
    fn is_lent(&self, number: usize) -> bool {
        self.queues[number].load(Ordering::Acquire)
    }

    /// Lends a queue. Called by its owner.
    fn lend(&self, number: usize, fd: &OwnedFd) -> io::Result<()> {
        // First, so that the first one's worker reads what the event tells of.
        self.queues[number].store(true, Ordering::Release);
        let event = EpollEvent::new(EpollFlags::EPOLLIN, number as u64);
        let added = self.epoll.add(fd, event);
        added.inspect_err(|_| self.queues[number].store(false, Ordering::Release))?;
        Ok(())
    }

    /// Takes it back.
    fn take_back(&self, number: usize, fd: &OwnedFd) -> io::Result<()> {
        self.epoll.delete(fd)?;
        self.queues[number].store(false, Ordering::Release);
        Ok(())
    }
}

/// A queue of a tap device.
pub struct Tap {
    number: usize,
    capabilities: Capabilities,
    outbound: Buffers,
    /// Its own, and behind it those that may be lent to it.
    sources: Vec<Source>,
    lent: Arc<Lent>,
    /// The batch's frames: in which buffer each lies, and its length, the virtio-net header included. A read in the
    /// middle of a batch may have come too early for a frame that the next one got.
    frames: Vec<(usize, usize)>,
    reads: Vec<OperationId>,
    mean_len: usize,
    inbound: Buffers,
    /// Slots of `inbound` that are free; the one used last, whose bytes are in the cache, on top.
    free: Vec<u32>,
    /// Committed frames: their slots, and their bytes with the head.
    committed: Vec<(u32, Piece)>,
    writes: Vec<(u32, OperationId)>,
    closed: bool,
}

impl Tap {
    /// Wraps the queues of a device that [`create`] made.
    pub fn all(created: Created, mtu: u16) -> io::Result<Vec<Self>> {
        let Created { queues, udp_segmentation } = created;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let lent = Arc::new(Lent { epoll, queues: queues.iter().map(|_| AtomicBool::default()).collect() });
        let others: Vec<OwnedFd> =
            queues.iter().skip(1).map(OwnedFd::try_clone).collect::<io::Result<_>>()?;
        let mut others = Some(others);
        let wrap = |(number, fd)| {
            // The first one's alone.
            let borrowed = others.take().unwrap_or_default();
            let sources = std::iter::once(fd).chain(borrowed).map(Source::new).collect();
            Self::new(number, sources, lent.clone(), mtu, udp_segmentation)
        };
        Ok(queues.into_iter().enumerate().map(wrap).collect())
    }

    fn new(number: usize, sources: Vec<Source>, lent: Arc<Lent>, mtu: u16, udp_segmentation: bool) -> Self {
        Self {
            number,
            capabilities: Capabilities { mtu, tcp_segmentation: true, udp_segmentation },
            outbound: Buffers::new(BATCH, HEADER_LEN + FRAME_MAX),
            sources,
            lent,
            frames: Vec::with_capacity(BATCH),
            reads: Vec::with_capacity(BATCH),
            mean_len: 1500,
            inbound: Buffers::new(SPACES, HEAD_ROOM + FRAME_MAX),
            free: (0..SPACES as u32).rev().collect(),
            committed: Vec::with_capacity(SPACES),
            writes: Vec::with_capacity(SPACES),
            closed: false,
        }
    }

    fn fd(&self) -> RawFd {
        self.sources[0].fd.as_raw_fd()
    }

    /// Reads of a batch at the most.
    fn reads_max(&self) -> usize {
        (BATCH_BYTES / self.mean_len.max(1)).clamp(4, BATCH)
    }
}

impl Link for Tap {
    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn ready_fds(&self) -> [Option<Ready>; READY_FDS] {
        let own = (!self.lent.is_lent(self.number)).then(|| Ready::readable(self.fd()));
        let borrows = self.sources.len() > 1;
        [own, borrows.then(|| Ready::readable(self.lent.epoll.0.as_raw_fd()))]
    }

    fn woken(&mut self, which: usize) {
        let sources = if which == 0 { &mut self.sources[..1] } else { &mut self.sources[1..] };
        for source in sources {
            source.ready = true;
        }
    }

    fn begin_receive(&mut self, operations: &mut Operations) {
        self.reads.clear();
        let mut room = self.reads_max();
        let nothing_known = self.sources.iter().all(|source| !source.ready);
        // Its own comes last: a flow that begins in the queue of its hash goes on in this one, by which it is answered. Each leaves
        // room for those behind it.
        for index in (0..self.sources.len()).rev() {
            let source = &mut self.sources[index];
            source.ready |= nothing_known;
            // Its own while that is not lent, and those of others while they are.
            let reads_it = self.lent.is_lent(self.number + index) == (index > 0);
            let asked = if reads_it && source.ready { source.ask.min(room.div_ceil(index + 1)) } else { 0 };
            source.ready &= reads_it;
            room -= asked;
            let first = self.reads.len();
            for slot in first..first + asked {
                let piece = self.outbound.piece(slot);
                self.reads.push(operations.push(source.fd.as_raw_fd(), Kind::Read, [piece]));
            }
            source.reads = first..first + asked;
        }
    }

    fn end_receive(&mut self, operations: &Operations) -> Received {
        self.frames.clear();
        let mut bytes = 0;
        for (buffer, id) in self.reads.iter().enumerate() {
            match operations.result(*id) {
                Ok(len) if len > HEADER_LEN => {
                    self.frames.push((buffer, len));
                    bytes += len;
                }
                Ok(_) => {}
                Err(error) => self.closed |= is_gone(&error),
            }
        }
        let frames = self.frames.len();
        if let Some(mean) = bytes.checked_div(frames) {
            self.mean_len = self.mean_len - self.mean_len / 4 + mean / 4;
        }
        let most = self.reads_max();
        let mut empty = true;
        for source in &mut self.sources {
            let found = |read: &OperationId| operations.result(*read).is_ok();
            let reads = &self.reads[source.reads.clone()];
            // Only a last read that found nothing shows that there is nothing: what came since has the queue say so. One that was
            // not read, since there was no room, has its turn next.
            if let Some(last) = reads.last() {
                source.ready = found(last);
                let count = reads.iter().filter(|read| found(read)).count();
                let ask = if source.ready { source.ask.max(reads.len() * 2) } else { count + 1 };
                source.ask = ask.min(most);
            }
            empty &= !source.ready;
        }
        Received { frames, empty }
    }

    fn frame(&self, index: usize) -> Option<OutboundFrame<'_>> {
        let (buffer, len) = *self.frames.get(index)?;
        let bytes = self.outbound.bytes(buffer, len.min(HEADER_LEN + HEAD_LEN));
        Some(OutboundFrame {
            head: &bytes[HEADER_LEN..],
            len: len - HEADER_LEN,
            offload: Offload::parse(bytes),
        })
    }

    fn payload(&self, index: usize, from: usize, len: usize, take: &mut dyn FnMut(Piece)) {
        let Some((buffer, whole)) = self.frames.get(index).copied() else { return };
        let frame = self.outbound.piece(buffer).part(0, whole);
        take(frame.part(HEADER_LEN + from, len));
    }

    fn release(&mut self) {
        self.frames.clear();
    }

    fn has_unpublished(&self) -> bool {
        !self.committed.is_empty()
    }

    fn reserve(&mut self, payload_len: usize) -> Option<Space> {
        let capacity = payload_len.min(FRAME_MAX);
        self.free.pop().map(|index| Space { index, capacity })
    }

    fn may_reserve_ahead(&self) -> bool {
        self.free.len() > SPACES_KEPT
    }

    fn reserve_ahead(&mut self, _head_len: usize, payload: Ahead) -> Option<Space> {
        if self.may_reserve_ahead() { self.reserve(payload.bytes_max()) } else { None }
    }

    fn space(&self, space: Space, take: &mut dyn FnMut(Piece)) {
        take(self.inbound.piece(space.index as usize).part(HEAD_ROOM, space.capacity));
    }

    fn commit(&mut self, space: Space, head: &InboundHead<'_>, payload_len: usize) {
        let slot = space.index as usize;
        let start = HEAD_ROOM - HEADER_LEN - head.bytes.len();
        let room = &mut self.inbound.bytes_mut(slot, HEAD_ROOM)[start..];
        let checksum = (head.head.transport_start as u16, head.head.checksum_offset as u16);
        head.offload.write(&mut room[..HEADER_LEN], head.v4, head.head.len as u16, checksum, 1);
        room[HEADER_LEN..].copy_from_slice(head.bytes);
        let frame = self.inbound.piece(slot).part(start, HEAD_ROOM - start + payload_len);
        self.committed.push((space.index, frame));
    }

    fn cancel(&mut self, space: Space) {
        self.free.push(space.index);
    }

    fn begin_publish(&mut self, operations: &mut Operations) {
        self.writes.clear();
        for (slot, frame) in self.committed.drain(..) {
            let fd = self.sources[0].fd.as_raw_fd();
            self.writes.push((slot, operations.push(fd, Kind::Write, [frame])));
        }
    }

    fn end_publish(&mut self, operations: &Operations) -> usize {
        let mut lost = 0;
        for (slot, id) in self.writes.drain(..).rev() {
            self.free.push(slot);
            if let Err(error) = operations.result(id) {
                lost += 1;
                self.closed |= is_gone(&error);
            }
        }
        lost
    }

    /// The kernel remembers by which queue a flow's last frame came (`tun_flow_update`), and sends it there.
    fn steers(&self) -> bool {
        true
    }

    fn rest(&mut self, rests: bool) -> io::Result<()> {
        let fd = &self.sources[0].fd;
        if rests {
            self.lent.lend(self.number, fd)?;
        } else {
            self.lent.take_back(self.number, fd)?;
        }
        self.sources[0].ready = true;
        Ok(())
    }

    fn is_closed(&self) -> bool {
        self.closed
    }
}

/// The device was deleted, or its namespace ended.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADFD | libc::ENODEV | libc::ENXIO))
}

/// The system calls of a tap that is in use, beside reads and writes.
pub const SYSTEM_CALLS: &[libc::c_long] = &[libc::SYS_epoll_ctl];

mod ioctl {
    nix::ioctl_write_int!(set_interface, b'T', 202);
    nix::ioctl_write_int!(set_offload, b'T', 208);
    nix::ioctl_write_ptr!(set_header_len, b'T', 216, libc::c_int);
    nix::ioctl_write_ptr!(set_little_endian, b'T', 220, libc::c_int);
}

/// Why a tap device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No /dev/net/tun.
    #[error("cannot open /dev/net/tun ({0}): {hint}", hint = tun_hint(.0))]
    NoDevice(#[source] io::Error),
    /// The device could not be set up.
    #[error("cannot make the tap device '{name}' ({error}): {hint}", hint = setup_hint(.error))]
    Setup {
        /// Its name.
        name: String,
        /// What failed.
        #[source]
        error: io::Error,
    },
}

fn tun_hint(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::PermissionDenied {
        "everybody may open it where udev makes it; else chmod 0666 /dev/net/tun, or run as root"
    } else {
        "load the module (modprobe tun), or give the container the device"
    }
}

fn setup_hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EBUSY | libc::EINVAL) => {
            "is there an interface of that name in the namespace? choose another one by --interface"
        }
        Some(libc::EPERM) => "it takes CAP_NET_ADMIN in the namespace",
        _ => "does the kernel have multi-queue taps (Linux 3.8)?",
    }
}

/// A tap device's queues, and whether it takes UDP segmentation.
pub struct Created {
    /// One descriptor a queue, non-blocking.
    pub queues: Vec<OwnedFd>,
    /// `TUN_F_USO4` and `TUN_F_USO6` work (Linux 6.2).
    pub udp_segmentation: bool,
}

/// Makes a tap device with `queues` queues in the calling thread's network namespace. It vanishes with the last of its
/// descriptors. Takes `CAP_NET_ADMIN` there.
pub fn create(name: &str, queues: usize) -> Result<Created, TapError> {
    let failed = |error: io::Error| TapError::Setup { name: name.to_string(), error };
    let mut created = Created { queues: Vec::new(), udp_segmentation: true };
    for _ in 0..queues {
        let fd = open_tun().map_err(TapError::NoDevice)?;
        // SAFETY: zero is a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if name.len() >= request.ifr_name.len() {
            return Err(failed(io::Error::from_raw_os_error(libc::ENAMETOOLONG)));
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
        if created.queues.is_empty() {
            // A device that is there already would be given another queue: frames for somebody else's guest.
            flags |= libc::IFF_TUN_EXCL;
        }
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        let raw = fd.as_raw_fd();
        let header_len = HEADER_LEN as libc::c_int;
        // SAFETY: each request gets what it reads: an ifreq (by address), a pointer to an int, a number.
        let udp_segmentation = unsafe {
            ioctl::set_interface(raw, (&raw mut request) as libc::c_ulong).map_err(|e| failed(e.into()))?;
            ioctl::set_header_len(raw, &raw const header_len).map_err(|e| failed(e.into()))?;
            ioctl::set_little_endian(raw, &raw const header_len).map_err(|e| failed(e.into()))?;
            let tcp = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
            let all = tcp | libc::TUN_F_USO4 | libc::TUN_F_USO6;
            let with_udp = ioctl::set_offload(raw, libc::c_ulong::from(all)).is_ok();
            if !with_udp {
                ioctl::set_offload(raw, libc::c_ulong::from(tcp)).map_err(|e| failed(e.into()))?;
            }
            with_udp
        };
        created.udp_segmentation &= udp_segmentation;
        created.queues.push(fd);
    }
    Ok(created)
}

/// Whether the device can be opened by which taps are made.
pub fn probe() -> Result<(), TapError> {
    open_tun().map(drop).map_err(TapError::NoDevice)
}

fn open_tun() -> io::Result<OwnedFd> {
    const PATH: &CStr = c"/dev/net/tun";
    // SAFETY: the path is a C string; no other memory is passed.
    let fd = unsafe { libc::open(PATH.as_ptr(), libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
