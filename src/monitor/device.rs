//! The device that a front-end is shown: what it has said about rings and memory, and which queues run.
//!
//! A ring is started by its kick descriptor and stopped by GET_VRING_BASE (vhost-user, "Ring states"); it runs when it is
//! enabled too. Every change to a ring, or to the memory, detaches the pair first and attaches it again as it is then; all of
//! them are rare.
//!
//! How many pairs run is said by enabling rings, or by the driver itself over the control queue: then the first one runs
//! alone until the driver wants more (virtio 1.3, 5.1.6.5.5).

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::vhost_user::{Error, Result};

use crate::frame::address::Mac;
use crate::link::commands::Ended;
use crate::link::vhost_user::control_queue::ControlQueue;
use crate::link::vhost_user::memory::{GuestMemory, Region};
use crate::link::vhost_user::pairs::Pairs;
use crate::link::vhost_user::{Attachment, Control, Ring};
use crate::link::virtqueue;

use super::Worker;
use super::config_space::Features;

/// One virtqueue, as far as the front-end has described it.
#[derive(Default)]
pub(super) struct Vring {
    pub size: u16,
    /// Descriptor table, available ring, used ring.
    pub addresses: Option<[u64; 3]>,
    pub next: u16,
    pub kick: Option<OwnedFd>,
    pub call: Option<OwnedFd>,
    pub error: Option<OwnedFd>,
    pub is_enabled: bool,
}

impl Vring {
    /// Whether the ring is started.
    fn is_started(&self) -> bool {
        self.size != 0 && self.addresses.is_some() && self.kick.is_some()
    }

    /// Whether it is enabled, which each is where that is not negotiated.
    fn is_enabled(&self, features: Features) -> bool {
        self.is_enabled || !features.has_protocol_features()
    }

    /// The ring, if it is started; `goes_on` behind what was given back last, whatever the front-end says.
    fn ring(&self, features: Features, goes_on: bool) -> Option<Ring> {
        let [descriptors, available, used] = self.addresses.filter(|_| self.is_started())?;
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
    pub(super) fn pair_count(&self) -> u16 {
        self.workers.len() as u16
    }
}

/// The device.
pub(super) struct Device {
    pub machine: Arc<Machine>,
    pub features: Features,
    /// `VHOST_USER_PROTOCOL_F_CONFIG` is acknowledged: the guest is shown this very device.
    pub reads_config: bool,
    /// Those of the pairs, and one for the control queue.
    pub vrings: Vec<Vring>,
    /// As often as they were added.
    pub regions: Vec<Arc<Region>>,
    memory: Arc<GuestMemory>,
    attached: Vec<bool>,
    pub control: Option<ControlQueue>,
    /// Pairs that the driver wants used, where it says so over the control queue.
    pub pairs_wanted: u16,
    /// The front-end holds an area for buffers in flight: rings go on behind what was given back last.
    pub goes_on: bool,
}

impl Device {
    pub fn new(machine: Arc<Machine>) -> Self {
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

    pub fn offered(&self) -> Features {
        Features::offered(self.machine.pair_count())
    }

    /// The control queue's index, where the guest is shown this very device. Other front-ends serve one of their own, and
    /// some acknowledge the feature all the same.
    fn control_index(&self) -> Option<u32> {
        self.features.control_queue(self.machine.pair_count()).filter(|_| self.reads_config)
    }

    pub fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        self.vrings.get_mut(index as usize).ok_or(Error::InvalidParam)
    }

    fn ring(&self, index: u32) -> Option<Ring> {
        self.vrings[index as usize].ring(self.features, self.goes_on)
    }

    /// Whether the driver wants a pair used. Where it does not say so over the control queue, it enables rings.
    fn is_wanted(&self, pair: usize) -> bool {
        self.control_index().is_none() || pair < usize::from(self.pairs_wanted)
    }

    /// Whether the guest may be sent frames over a pair.
    fn receives(&self, pair: usize) -> bool {
        let vring = &self.vrings[2 * pair];
        self.is_wanted(pair) && vring.is_started() && vring.is_enabled(self.features)
    }

    /// The receive queue of a pair if it is used, and the transmit queue even if it is not: a driver may have put frames
    /// into it before it was told not to, and waits for them to come back. Not where a ring is disabled by who has another
    /// way to switch pairs off, the control queue: User-Mode Linux stops rings so, and gives their memory to others.
    fn rings(&self, pair: usize) -> [Option<Ring>; 2] {
        let [receive, transmit] = [2 * pair as u32, 2 * pair as u32 + 1];
        let is_control = self.control_index().is_some_and(|control| control <= transmit);
        let receive = if self.receives(pair) { self.ring(receive) } else { None };
        let vring = &self.vrings[transmit as usize];
        let is_served = !is_control && (vring.is_enabled(self.features) || !self.reads_config);
        [receive, if is_served { self.ring(transmit) } else { None }]
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
        let discards = !self.vrings[2 * pair + 1].is_enabled(self.features);
        let attachment = Attachment {
            memory: self.memory.clone(),
            transmit,
            discards,
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
        let used = (0..self.machine.workers.len()).take_while(|pair| self.receives(*pair)).count() as u16;
        if self.machine.pairs.set(used) != used {
            // Not for every ear: the guest may change it as often as it likes.
            tracing::debug!(used, "the guest uses as many pairs of queues");
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
        let Some(index) = self.control_index() else { return Ok(()) };
        let is_enabled = self.vrings[index as usize].is_enabled(self.features);
        let Some(ring) = self.ring(index).filter(|_| is_enabled) else { return Ok(()) };
        self.control = ControlQueue::new(&self.memory, ring);
        if self.control.is_some() {
            return Ok(());
        }
        Err(refuse(
            "the control queue does not lie in the guest's memory, or not as virtio 1.3, 2.7 wants it",
        ))
    }

    /// Answers the driver's requests; whether there may be more.
    pub fn serve_control(&mut self) -> bool {
        let Some(mut control) = self.control.take() else { return false };
        match control.serve(|pairs| self.use_pairs(pairs)) {
            Ok(more) => {
                self.control = Some(control);
                more
            }
            Err(fault) => {
                // Where it goes on should it be started anew.
                if let Some(index) = self.control_index() {
                    self.vrings[index as usize].next = control.next_available();
                }
                tracing::error!(
                    "the driver of the guest's control queue is wrong, {fault}: the queue has stopped"
                );
                false
            }
        }
    }

    /// The driver wants so many pairs used. Whether it can have them.
    fn use_pairs(&mut self, pairs: u16) -> bool {
        if pairs == 0 || pairs > self.features.pairs(self.machine.pair_count()) {
            return false;
        }
        let before = std::mem::replace(&mut self.pairs_wanted, pairs);
        let changed = usize::from(before.min(pairs))..usize::from(before.max(pairs));
        let again = |device: &mut Self| {
            changed.clone().all(|pair| device.detach(pair).and_then(|()| device.attach(pair)).is_ok())
        };
        if again(self) {
            return true;
        }
        self.pairs_wanted = before;
        again(self);
        false
    }

    /// Changes a ring while its pair, or the control queue, is detached.
    pub fn change(&mut self, index: u32, change: impl FnOnce(&mut Vring)) -> Result<()> {
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
    pub fn change_all(&mut self, change: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
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

    pub fn set_regions(&mut self, regions: Vec<Arc<Region>>) -> Result<()> {
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
    pub fn reset(&mut self) -> Result<()> {
        self.change_all(|device| {
            device.features = Features::default();
            device.pairs_wanted = 1;
            device.goes_on = false;
            for vring in &mut device.vrings {
                *vring = Vring::default();
            }
            Ok(())
        })
    }

    /// The front-end has left, and the guest with it.
    pub fn end(&mut self) {
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

pub(super) fn refuse(error: impl std::fmt::Display) -> Error {
    Error::ReqHandlerError(io::Error::other(error.to_string()))
}
