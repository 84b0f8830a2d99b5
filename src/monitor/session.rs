//! One front-end's session: what it has said, and when a pair of queues may run.
//!
//! A ring is started by its kick descriptor and stopped by GET_VRING_BASE (vhost-user, "Ring states"); it runs when it is
//! enabled too. Every message that changes a ring, or the memory, detaches the pair first and attaches it again as it is
//! then; all of them are rare.

use std::fs::{File, Metadata};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
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
use crate::link::vhost_user::{Attachment, Control, Ring};
use crate::link::virtqueue;

use super::Worker;
use super::config_space::{self, Features, PROTOCOL};

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
    /// The ring, if it may run.
    fn ring(&self, features: Features) -> Option<Ring> {
        let [descriptors, available, used] = self.addresses?;
        let is_disabled = features.has_protocol_features() && !self.is_enabled;
        if is_disabled || self.size == 0 {
            return None;
        }
        let copy = |fd: &Option<OwnedFd>| fd.as_ref().and_then(|fd| fd.try_clone().ok());
        Some(Ring {
            parts: virtqueue::Parts {
                size: self.size,
                descriptors,
                available,
                used,
                next: self.next,
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

struct Session {
    workers: Arc<Vec<Worker<Control>>>,
    identity: Identity,
    features: Features,
    vrings: Vec<Vring>,
    regions: Vec<Arc<Region>>,
    memory: Arc<GuestMemory>,
    attached: Vec<bool>,
}

/// Serves one front-end until it leaves; says why when that was not of its own accord.
pub fn serve(
    stream: UnixStream,
    workers: &Arc<Vec<Worker<Control>>>,
    identity: Identity,
) -> std::result::Result<(), Error> {
    let session = Arc::new(Mutex::new(Session::new(workers.clone(), identity)));
    let mut handler = handler(&stream, session.clone())?;
    drop(stream);
    let left = loop {
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
    fn new(workers: Arc<Vec<Worker<Control>>>, identity: Identity) -> Self {
        let pairs = workers.len();
        Self {
            workers,
            identity,
            features: Features::default(),
            vrings: (0..2 * pairs).map(|_| Vring::default()).collect(),
            regions: Vec::new(),
            memory: Arc::default(),
            attached: vec![false; pairs],
        }
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        self.vrings.get_mut(index as usize).ok_or(Error::InvalidParam)
    }

    /// Lets go of a pair; its rings go on from where they stopped.
    fn detach(&mut self, pair: usize) -> Result<()> {
        if !std::mem::take(&mut self.attached[pair]) {
            return Ok(());
        }
        let worker = &self.workers[pair];
        let [transmit, receive] = worker.control.detach(|| (worker.wake)()).map_err(ended)?;
        for (index, next) in [(2 * pair, receive), (2 * pair + 1, transmit)] {
            self.vrings[index].next = next.unwrap_or(self.vrings[index].next);
        }
        Ok(())
    }

    /// Has a pair run, as far as it may.
    fn attach(&mut self, pair: usize) -> Result<()> {
        let [receive, transmit] =
            [2 * pair, 2 * pair + 1].map(|index| self.vrings[index].ring(self.features));
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
        let worker = &self.workers[pair];
        self.attached[pair] = true;
        if worker.control.attach(attachment, || (worker.wake)()).map_err(ended)? {
            return Ok(());
        }
        Err(refuse("a virtqueue does not lie in the guest's memory, or not as virtio 1.3, 2.7 wants it"))
    }

    /// Changes a ring while its pair is detached.
    fn change(&mut self, index: u32, change: impl FnOnce(&mut Vring)) -> Result<()> {
        self.vring(index)?;
        let pair = index as usize / 2;
        self.detach(pair)?;
        change(self.vring(index)?);
        self.attach(pair)
    }

    /// Changes what all rings depend on while all pairs are detached.
    fn change_all(&mut self, change: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let pairs = 0..self.workers.len();
        pairs.clone().try_for_each(|pair| self.detach(pair))?;
        let changed = change(self);
        for pair in pairs {
            self.attach(pair)?;
        }
        changed
    }

    fn set_regions(&mut self, regions: Vec<Arc<Region>>) -> Result<()> {
        self.memory = Arc::new(GuestMemory::new(regions.clone()).map_err(refuse)?);
        self.regions = regions;
        Ok(())
    }

    /// The driver starts anew: all that it has negotiated is void.
    fn reset(&mut self) -> Result<()> {
        self.change_all(|session| {
            session.features = Features::default();
            for vring in &mut session.vrings {
                *vring = Vring::default();
            }
            Ok(())
        })
    }

    /// The front-end has left, and the guest with it.
    fn end(&mut self) {
        // A worker that has ended holds nothing any more.
        for pair in 0..self.workers.len() {
            let _ = self.detach(pair);
        }
        for worker in self.workers.iter() {
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
        Ok(Features::offered().bits())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let features = Features::acknowledged(features).map_err(|error| {
            tracing::error!("the front-end cannot be served: {error}");
            refuse(error)
        })?;
        self.change_all(|session| {
            session.features = features;
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
        Ok(PROTOCOL)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        if features & !PROTOCOL.bits() == 0 { Ok(()) } else { Err(Error::InvalidParam) }
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.workers.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.change(index, |vring| vring.is_enabled = enable)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let space = config_space::bytes(self.identity.mac, self.workers.len() as u16, self.identity.mtu);
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

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidMessage)
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        Err(Error::InvalidMessage)
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
        let region = map(place, file).map_err(|error| {
            tracing::error!("{error}");
            refuse(error)
        })?;
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
        if !self.regions.iter().any(|region| named(region.place())) {
            return Err(refuse("there is no such region of memory"));
        }
        self.change_all(|session| {
            let regions = session.regions.iter().filter(|region| !named(region.place())).cloned().collect();
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
