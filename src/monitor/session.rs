//! One front-end's session: its messages, each of which changes the [`Device`] and is answered once that is done.
//!
//! In between, the control queue is served here, where the guest has one of hythe's.

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

use crate::link::vhost_user::control_queue::ControlQueue;
use crate::link::vhost_user::memory::{Place, Region};

use super::config_space;
use super::device::{Device, Identity, Machine, refuse};
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

/// Serves one front-end until it leaves; says why when that was not of its own accord.
pub fn serve(stream: UnixStream, machine: &Arc<Machine>) -> std::result::Result<(), Error> {
    let device = Arc::new(Mutex::new(Device::new(machine.clone())));
    let mut handler = handler(&stream, device.clone())?;
    drop(stream);
    let left = loop {
        if !attend(&device, &handler) {
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
    if let Ok(mut device) = device.lock() {
        device.end();
    }
    left
}

/// Serves the control queue, and waits for more of it or for a message of the front-end; whether there may be a message.
fn attend(device: &Mutex<Device>, front_end: &impl AsRawFd) -> bool {
    // A device that is broken is found out by the next message.
    let Ok(mut device) = device.lock() else { return true };
    let more = device.serve_control();
    // SAFETY: the handler, and its descriptor with it, outlives this call.
    #[allow(unsafe_code)]
    let front_end = unsafe { BorrowedFd::borrow_raw(front_end.as_raw_fd()) };
    let watched = [Some(front_end), device.control.as_ref().map(ControlQueue::fd)].into_iter().flatten();
    let mut watched: Vec<PollFd<'_>> = watched.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    let timeout = if more { PollTimeout::ZERO } else { PollTimeout::NONE };
    match poll(&mut watched, timeout) {
        Ok(_) => watched[0].any() != Some(false),
        Err(error) => error != nix::errno::Errno::EINTR,
    }
}

/// The crate's side of the protocol. QEMU enables rings before it has acknowledged any feature, which the crate refuses.
/// So the handler first hears, from a socket of our own, that `VHOST_USER_F_PROTOCOL_FEATURES` is acknowledged: what a
/// front-end that enables rings means. Its descriptor becomes the front-end's then.
fn handler(
    stream: &UnixStream,
    device: Arc<Mutex<Device>>,
) -> std::result::Result<BackendReqHandler<Mutex<Device>>, Error> {
    let (mut ours, theirs) = UnixStream::pair().map_err(Error::SocketError)?;
    let mut handler = BackendReqHandler::from_stream(theirs, device);
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

impl VhostUserBackendReqHandlerMut for Device {
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
        self.change_all(|device| {
            device.features = features;
            device.pairs_wanted = 1;
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
        self.change_all(|device| device.set_regions(mapped))?;
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
        self.vring(index)?;
        let mut next = 0;
        let changed = self.change(index, |vring| {
            // Stopped, until there is another kick descriptor.
            vring.kick = None;
            next = vring.next;
        });
        if let Err(error) = changed {
            // About the pair's other ring; the front-end waits for an answer about this one.
            tracing::warn!("{error}");
        }
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
        // A front-end that is refused gets an area of no bytes: it waits for an answer.
        inflight::create(inflight, self.vrings.len()).or_else(|error| {
            tracing::warn!("{error}");
            inflight::nothing().map_err(refuse)
        })
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        inflight::check(inflight, &file, self.vrings.len()).map_err(|error| {
            tracing::error!("{error}");
            refuse(error)
        })?;
        self.change_all(|device| {
            device.goes_on = true;
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
        self.change_all(|device| {
            let regions = device.regions.iter().cloned().chain([region]).collect();
            device.set_regions(regions)
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
        self.change_all(|device| {
            let mut regions = device.regions.clone();
            regions.remove(at);
            device.set_regions(regions)
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
