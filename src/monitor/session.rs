//! One front-end's session: what it has said, and when a pair of queues may run.
//!
//! A ring is started by its kick descriptor and stopped by GET_VRING_BASE (vhost-user, "Ring states"); it runs when it is
//! enabled too. Every message that changes a ring, or the memory, detaches the pair first and attaches it again as it is
//! then; all of them are rare.
//!
//! How many pairs run is said by enabling rings, or by the driver itself over the control queue, which this thread
//! serves: then the first one runs alone until the driver wants more (virtio 1.3, 5.1.6.5.5).

use std::fs::{File, Metadata};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, MmapRegion};

use crate::frame::address::Mac;
use crate::link::commands::Ended;
use crate::link::vhost_user::memory::{GuestMemory, Place, Region};
use crate::link::vhost_user::pairs::Pairs;
use crate::link::vhost_user::{Attachment, Control, Ring};
use crate::link::virtqueue;

use super::Worker;
use super::config_space::{self, Features};
use super::control_queue::ControlQueue;
use super::inflight;

/// Regions of memory that a front-end may share: QEMU's own limit for virtual machines with hot-plugged memory.
const MEMORY_SLOTS: usize = 509;

/// The system calls made here, beside those of the runtime.
pub const SYSTEM_CALLS: &[libc::c_long] = &[
    libc::SYS_poll,
    libc::SYS_socketpair,
    libc::SYS_dup3,
    libc::SYS_accept4,
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_recvmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_getsockopt,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_lseek,
    libc::SYS_clock_nanosleep,
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
];

/// One virtqueue, as far as the front-end has described it.
#[derive(Default)]
struct Vring {
    size: u16,
    /// Descriptor table, available ring, used ring.
    addresses: Option<[u64; 3]>,
    next: u16,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    error: Option<OwnedFd>,
    is_enabled: bool,
}

impl Vring {
    /// Whether the ring may run.
    fn runs(&self, features: Features) -> bool {
        let is_disabled = features.has_protocol_features() && !self.is_enabled;
        !is_disabled && self.size != 0 && self.addresses.is_some() && self.kick.is_some()
    }

    /// The ring, if it may run; `goes_on` where another device has served it.
    fn ring(&self, features: Features, goes_on: bool) -> Option<Ring> {
        let [descriptors, available, used] = self.addresses.filter(|_| self.runs(features))?;
        let copy = |fd: &Option<OwnedFd>| fd.as_ref().and_then(|fd| fd.try_clone().ok());
        Some(Ring {
            parts: virtqueue::Parts {
                size: self.size,
                descriptors,
                available,
                used,
                next: (!goes_on).then_some(self.next),
                event_index: features.event_index(),
                indirect: features.indirect(),
            },
            kick: copy(&self.kick)?,
            call: copy(&self.call),
            error: copy(&self.error),
        })
    }
}

/// What the device says about itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    /// The MAC that it offers the guest.
    pub mac: Mac,
    /// The link's MTU.
    pub mtu: u16,
}

/// What a front-end's rings are served by.
pub struct Machine {
    /// The workers, one a pair of queues.
    pub workers: Vec<Worker<Control>>,
    /// How many pairs are used, for the workers to know.
    pub pairs: Pairs,
    /// What the device says about itself.
    pub identity: Identity,
}

impl Machine {
    fn pair_count(&self) -> u16 {
        self.workers.len() as u16
    }
}

struct Session {
    machine: Arc<Machine>,
    features: Features,
    /// `VHOST_USER_PROTOCOL_F_CONFIG` is acknowledged.
    reads_config: bool,
    /// Those of the pairs, and one for the control queue.
    vrings: Vec<Vring>,
    /// As often as they were added.
    regions: Vec<Arc<Region>>,
    memory: Arc<GuestMemory>,
    attached: Vec<bool>,
    control: Option<ControlQueue>,
    /// Pairs that the driver wants used, where it says so over the control queue.
    pairs_wanted: u16,
    /// Another device has served the rings, and died.
    goes_on: bool,
}

/// Serves one front-end until it leaves; says why when that was not of its own accord.
pub fn serve(stream: UnixStream, machine: &Arc<Machine>) -> std::result::Result<(), Error> {
    let session = Arc::new(Mutex::new(Session::new(machine.clone())));
    let mut handler = handler(&stream, session.clone())?;
    drop(stream);
    let left = loop {
        if !attend(&session, &handler) {
            continue;
        }
        match handler.handle_request() {
            Ok(()) | Err(Error::SocketRetry(_)) => {}
            Err(Error::Disconnected) => break Ok(()),
            // The answer to a message that cannot be fulfilled; the front-end decides what follows from it.
            Err(Error::ReqHandlerError(error)) => {
                tracing::warn!(%error, "a message of the front-end was refused");
            }
            Err(error) => break Err(error),
        }
    };
    if let Ok(mut session) = session.lock() {
        session.end();
    }
    left
}

/// Serves the control queue until there is a message of the front-end; whether there may be one.
fn attend(session: &Mutex<Session>, front_end: &impl AsRawFd) -> bool {
    // A session that is broken is found out by the next message.
    let Ok(mut session) = session.lock() else { return true };
    let more = session.serve_control();
    // SAFETY: the handler, and its descriptor with it, outlives this call.
    #[allow(unsafe_code)]
    let front_end = unsafe { BorrowedFd::borrow_raw(front_end.as_raw_fd()) };
    let watched = [Some(front_end), session.control.as_ref().map(ControlQueue::fd)].into_iter().flatten();
    let mut watched: Vec<PollFd<'_>> = watched.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    let timeout = if more { PollTimeout::ZERO } else { PollTimeout::NONE };
    poll(&mut watched, timeout).is_err() || watched[0].any() != Some(false)
}

/// The crate's side of the protocol. QEMU enables rings before it has acknowledged any feature, which the crate refuses.
/// So the handler first hears, from a socket of our own, that `VHOST_USER_F_PROTOCOL_FEATURES` is acknowledged: what a
/// front-end that enables rings means. Its descriptor becomes the front-end's then.
fn handler(
    stream: &UnixStream,
    session: Arc<Mutex<Session>>,
) -> std::result::Result<BackendReqHandler<Mutex<Session>>, Error> {
    let (mut ours, theirs) = UnixStream::pair().map_err(Error::SocketError)?;
    let mut handler = BackendReqHandler::from_stream(theirs, session);
    // vhost-user, "Header": request, version, length of the payload.
    let header = [2u32, 1, 8].map(u32::to_ne_bytes).concat();
    let features = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits().to_ne_bytes();
    ours.write_all(&[&header[..], &features].concat()).map_err(Error::SocketError)?;
    handler.handle_request()?;
    // SAFETY: both descriptors are open; the handler's stays the handler's, and becomes another name of the stream.
    #[allow(unsafe_code)]
    let result = unsafe { libc::dup3(stream.as_raw_fd(), handler.as_raw_fd(), libc::O_CLOEXEC) };
    if result < 0 { Err(Error::SocketError(io::Error::last_os_error())) } else { Ok(handler) }
}

impl Session {
    fn new(machine: Arc<Machine>) -> Self {
        let pairs = machine.workers.len();
        Self {
            machine,
            features: Features::default(),
            reads_config: false,
            vrings: (0..=2 * pairs).map(|_| Vring::default()).collect(),
            regions: Vec::new(),
            memory: Arc::default(),
            attached: vec![false; pairs],
            control: None,
            pairs_wanted: 1,
            goes_on: false,
        }
    }

    fn offered(&self) -> Features {
        Features::offered(self.machine.pair_count())
    }

    fn control_index(&self) -> Option<u32> {
        self.features.control_queue(self.machine.pair_count())
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        self.vrings.get_mut(index as usize).ok_or(Error::InvalidParam)
    }

    fn ring(&self, index: u32) -> Option<Ring> {
        self.vrings[index as usize].ring(self.features, self.goes_on)
    }

    /// Whether the driver wants a pair used. Where it does not say so over the control queue, it enables rings.
    fn is_wanted(&self, pair: usize) -> bool {
        self.control_index().is_none() || pair < usize::from(self.pairs_wanted)
    }

    /// The receive and the transmit queue of a pair, as far as they may run.
    fn rings(&self, pair: usize) -> [Option<Ring>; 2] {
        let rings = [2 * pair, 2 * pair + 1];
        if self.is_wanted(pair) { rings.map(|index| self.ring(index as u32)) } else { [None, None] }
    }

    /// Lets go of a pair; its rings go on from where they stopped.
    fn detach(&mut self, pair: usize) -> Result<()> {
        if !std::mem::take(&mut self.attached[pair]) {
            return Ok(());
        }
        let worker = &self.machine.workers[pair];
        let [transmit, receive] = worker.control.detach(|| (worker.wake)()).map_err(ended)?;
        for (index, next) in [(2 * pair, receive), (2 * pair + 1, transmit)] {
            self.vrings[index].next = next.unwrap_or(self.vrings[index].next);
        }
        Ok(())
    }

    /// Has a pair run, as far as it may.
    fn attach(&mut self, pair: usize) -> Result<()> {
        self.tell_pairs();
        let worker = &self.machine.workers[pair];
        let [receive, transmit] = self.rings(pair);
        if receive.is_none() && transmit.is_none() {
            return Ok(());
        }
        let attachment = Attachment {
            memory: self.memory.clone(),
            transmit,
            receive,
            takes: self.features.takes(),
            tcp_segmentation: self.features.tcp_segmentation(),
            udp_segmentation: self.features.udp_segmentation(),
        };
        self.attached[pair] = true;
        if worker.control.attach(attachment, || (worker.wake)()).map_err(ended)? {
            return Ok(());
        }
        Err(refuse("a virtqueue does not lie in the guest's memory, or not as virtio 1.3, 2.7 wants it"))
    }

    /// Tells the workers how many pairs the guest uses: the first ones that can receive.
    fn tell_pairs(&self) {
        let receives = |pair: &usize| self.is_wanted(*pair) && self.vrings[2 * *pair].runs(self.features);
        let used = (0..self.machine.workers.len()).take_while(receives).count() as u16;
        if self.machine.pairs.set(used) != used {
            if self.machine.pair_count() > 1 && used > 0 {
                tracing::info!(
                    "the guest uses {used} {} of queues",
                    if used == 1 { "pair" } else { "pairs" }
                );
            }
            // What waits for the guest may have to make a detour from now on.
            self.machine.workers.iter().for_each(|worker| (worker.wake)());
        }
    }

    fn detach_control(&mut self) {
        if let (Some(control), Some(index)) = (self.control.take(), self.control_index()) {
            self.vrings[index as usize].next = control.next_available();
        }
    }

    fn attach_control(&mut self) -> Result<()> {
        let Some(ring) = self.control_index().and_then(|index| self.ring(index)) else { return Ok(()) };
        self.control = ControlQueue::new(&self.memory, ring);
        if self.control.is_some() {
            return Ok(());
        }
        Err(refuse(
            "the control queue does not lie in the guest's memory, or not as virtio 1.3, 2.7 wants it",
        ))
    }

    /// Answers the driver's requests; whether there may be more.
    fn serve_control(&mut self) -> bool {
        let Some(mut control) = self.control.take() else { return false };
        match control.serve(|pairs| self.use_pairs(pairs)) {
            Ok(more) => {
                self.control = Some(control);
                more
            }
            Err(fault) => {
                tracing::error!(
                    "the driver of the guest's control queue is wrong, {fault}: the queue has stopped"
                );
                false
            }
        }
    }

    /// The driver wants so many pairs used. Whether it can have them.
    fn use_pairs(&mut self, pairs: u16) -> bool {
        if pairs == 0 || pairs > self.machine.pair_count() {
            return false;
        }
        let before = std::mem::replace(&mut self.pairs_wanted, pairs);
        let changed = before.min(pairs)..before.max(pairs);
        changed
            .into_iter()
            .all(|pair| self.detach(pair.into()).and_then(|()| self.attach(pair.into())).is_ok())
    }

    /// Changes a ring while its pair, or the control queue, is detached.
    fn change(&mut self, index: u32, change: impl FnOnce(&mut Vring)) -> Result<()> {
        self.vring(index)?;
        if self.control_index() == Some(index) {
            self.detach_control();
            change(self.vring(index)?);
            return self.attach_control();
        }
        let pair = index as usize / 2;
        if pair == self.machine.workers.len() {
            // The control queue's, of which nothing was negotiated.
            change(self.vring(index)?);
            return Ok(());
        }
        self.detach(pair)?;
        change(self.vring(index)?);
        self.attach(pair)
    }

    /// Changes what all rings depend on while all of them are detached.
    fn change_all(&mut self, change: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let pairs = 0..self.machine.workers.len();
        pairs.clone().try_for_each(|pair| self.detach(pair))?;
        self.detach_control();
        let changed = change(self);
        for pair in pairs {
            self.attach(pair)?;
        }
        self.attach_control()?;
        changed
    }

    fn set_regions(&mut self, regions: Vec<Arc<Region>>) -> Result<()> {
        let mut distinct: Vec<Arc<Region>> = Vec::with_capacity(regions.len());
        for region in &regions {
            if !distinct.iter().any(|other| Arc::ptr_eq(other, region)) {
                distinct.push(region.clone());
            }
        }
        self.memory = Arc::new(GuestMemory::new(distinct).map_err(refuse)?);
        self.regions = regions;
        Ok(())
    }

    /// The driver starts anew: all that it has negotiated is void.
    fn reset(&mut self) -> Result<()> {
        self.change_all(|session| {
            session.features = Features::default();
            session.pairs_wanted = 1;
            session.goes_on = false;
            for vring in &mut session.vrings {
                *vring = Vring::default();
            }
            Ok(())
        })
    }

    /// The front-end has left, and the guest with it.
    fn end(&mut self) {
        // A worker that has ended holds nothing any more.
        for pair in 0..self.machine.workers.len() {
            let _ = self.detach(pair);
        }
        self.machine.pairs.set(0);
        for worker in &self.machine.workers {
            let _ = worker.control.guest_gone(|| (worker.wake)());
        }
    }
}

fn ended(_: Ended) -> Error {
    Error::BackendInternalError
}

fn refuse(error: impl std::fmt::Display) -> Error {
    Error::ReqHandlerError(io::Error::other(error.to_string()))
}

/// Why memory cannot be mapped.
#[derive(Debug, thiserror::Error)]
enum MapError {
    /// To touch it would end hythe.
    #[error("the guest's memory cannot be mapped: its file is shorter than the front-end says")]
    Short,
    #[error("the guest's memory cannot be mapped ({0}); is it shared (memory-backend-memfd,share=on)?")]
    Refused(#[from] MmapRegionError),
}

/// Maps a region of the guest's memory.
fn map(place: Place, file: File) -> std::result::Result<Arc<Region>, MapError> {
    let is_short = |metadata: &Metadata| {
        metadata.is_file() && place.offset.checked_add(place.len).is_none_or(|end| end > metadata.len())
    };
    if file.metadata().as_ref().is_ok_and(is_short) {
        return Err(MapError::Short);
    }
    let len = usize::try_from(place.len).unwrap_or(usize::MAX);
    let mapping = MmapRegion::from_file(FileOffset::new(file, place.offset), len)?;
    Ok(Arc::new(Region::new(place, mapping)))
}

/// A descriptor that a worker reads or writes: nothing that is done to it may wait.
fn nonblocking(file: Option<File>) -> Option<OwnedFd> {
    let fd = OwnedFd::from(file?);
    let flags = fcntl(fd.as_fd(), FcntlArg::F_GETFL).ok()?;
    fcntl(fd.as_fd(), FcntlArg::F_SETFL(OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK)).ok()?;
    Some(fd)
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset()
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered().bits())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let features = self.offered().acknowledged(features).map_err(|error| {
            tracing::error!("the front-end cannot be served: {error}");
            refuse(error)
        })?;
        self.change_all(|session| {
            session.features = features;
            session.pairs_wanted = 1;
            Ok(())
        })
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let places = regions.iter().map(|region| Place {
            guest: region.guest_phys_addr,
            front_end: region.user_addr,
            offset: region.mmap_offset,
            len: region.memory_size,
        });
        let mapped: std::result::Result<Vec<_>, _> =
            places.zip(files).map(|(place, file)| map(place, file)).collect();
        let mapped = mapped.map_err(|error| {
            tracing::error!("{error}");
            refuse(error)
        })?;
        self.change_all(|session| session.set_regions(mapped))?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).ok().filter(|size| size.is_power_of_two() && *size <= 1 << 15);
        let size = size.ok_or(Error::InvalidParam)?;
        self.change(index, |vring| vring.size = size)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        self.change(index, |vring| vring.addresses = Some([descriptor, available, used]))
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let next = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.change(index, |vring| vring.next = next)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let mut next = 0;
        self.change(index, |vring| {
            // Stopped, until there is another kick descriptor.
            vring.kick = None;
            next = vring.next;
        })?;
        Ok(VhostUserVringState::new(index, u32::from(next)))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        if file.is_none() {
            return Err(refuse("a front-end without kick descriptors would have to be polled for ever"));
        }
        let fd = nonblocking(file);
        self.change(u32::from(index), |vring| vring.kick = fd)
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let fd = nonblocking(file);
        self.change(u32::from(index), |vring| vring.call = fd)
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let fd = nonblocking(file);
        self.change(u32::from(index), |vring| vring.error = fd)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(config_space::protocol(self.machine.pair_count()))
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let offered = config_space::protocol(self.machine.pair_count());
        let features = VhostUserProtocolFeatures::from_bits_retain(features);
        if !offered.contains(features) {
            return Err(Error::InvalidParam);
        }
        self.reads_config = features.contains(VhostUserProtocolFeatures::CONFIG);
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        // A guest whose front-end reads the config space here (User-Mode Linux) sees this device, with all its queues. QEMU
        // and DPDK show the guest one of their own, and count pairs.
        Ok(if self.reads_config { self.vrings.len() as u64 } else { self.machine.pair_count().into() })
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.change(index, |vring| vring.is_enabled = enable)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let Identity { mac, mtu } = self.machine.identity;
        let space = config_space::bytes(mac, self.machine.pair_count(), mtu);
        // Behind what there is a guest reads zeros.
        let byte = |at: u64| space.get(at as usize).copied().unwrap_or(0);
        Ok((0..u64::from(size)).map(|at| byte(u64::from(offset) + at)).collect())
    }

    fn set_config(&mut self, _offset: u32, _bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        Err(refuse("nothing about the device can be set"))
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        Err(Error::InvalidMessage)
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidMessage)
    }

    fn get_inflight_fd(&mut self, inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        inflight::create(inflight, self.vrings.len()).map_err(refuse)
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        inflight::check(inflight, &file, self.vrings.len()).map_err(|error| {
            tracing::error!("{error}");
            refuse(error)
        })?;
        self.change_all(|session| {
            session.goes_on = true;
            Ok(())
        })
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MEMORY_SLOTS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        if self.regions.len() == MEMORY_SLOTS {
            return Err(refuse("the front-end shares more regions of memory than it may"));
        }
        let place = Place {
            guest: region.guest_phys_addr,
            front_end: region.user_addr,
            offset: region.mmap_offset,
            len: region.memory_size,
        };
        // QEMU 7.2 adds, and removes, each region once for every pair of queues.
        let region = match self.regions.iter().find(|region| region.place() == place) {
            Some(known) => known.clone(),
            None => map(place, file).map_err(|error| {
                tracing::error!("{error}");
                refuse(error)
            })?,
        };
        self.change_all(|session| {
            let regions = session.regions.iter().cloned().chain([region]).collect();
            session.set_regions(regions)
        })?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let named = |place: Place| {
            (place.guest, place.front_end, place.len)
                == (region.guest_phys_addr, region.user_addr, region.memory_size)
        };
        let Some(at) = self.regions.iter().position(|region| named(region.place())) else {
            return Err(refuse("there is no such region of memory"));
        };
        self.change_all(|session| {
            let mut regions = session.regions.clone();
            regions.remove(at);
            session.set_regions(regions)
        })
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidMessage)
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidMessage)
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidMessage)
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Error::InvalidMessage)
    }
}
