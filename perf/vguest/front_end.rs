//! The vhost-user side: which features both have, the memory, and where the rings lie.

use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;

use anyhow::{Context, ensure};
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net as net;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::driver_ring::Memory;
use crate::queue::Queue;

/// Features that driver and device have in common (virtio 1.3, 5.1.3 and 6).
#[derive(Clone, Copy)]
pub struct Features(u64);

impl Features {
    /// Either side says at which index it wants to be told.
    pub const EVENT_INDEX: u32 = VIRTIO_RING_F_EVENT_IDX;
    /// A descriptor may be a table of them.
    pub const INDIRECT: u32 = VIRTIO_RING_F_INDIRECT_DESC;
    /// The device completes checksums.
    pub const CHECKSUM: u32 = net::VIRTIO_NET_F_CSUM;
    /// The device cuts TCP segments over IPv4.
    pub const TCP_SEGMENTATION_V4: u32 = net::VIRTIO_NET_F_HOST_TSO4;
    /// The same over IPv6.
    pub const TCP_SEGMENTATION_V6: u32 = net::VIRTIO_NET_F_HOST_TSO6;
    /// The device cuts runs of datagrams.
    pub const UDP_SEGMENTATION: u32 = net::VIRTIO_NET_F_HOST_USO;

    /// What a tap can do is taken where it is offered.
    const WANTED: [u32; 13] = [
        VIRTIO_F_VERSION_1,
        Self::EVENT_INDEX,
        Self::INDIRECT,
        net::VIRTIO_NET_F_MRG_RXBUF,
        Self::CHECKSUM,
        net::VIRTIO_NET_F_GUEST_CSUM,
        Self::TCP_SEGMENTATION_V4,
        Self::TCP_SEGMENTATION_V6,
        net::VIRTIO_NET_F_GUEST_TSO4,
        net::VIRTIO_NET_F_GUEST_TSO6,
        Self::UDP_SEGMENTATION,
        net::VIRTIO_NET_F_GUEST_USO4,
        net::VIRTIO_NET_F_GUEST_USO6,
    ];
    const OF_UDP_SEGMENTATION: [u32; 3] =
        [Self::UDP_SEGMENTATION, net::VIRTIO_NET_F_GUEST_USO4, net::VIRTIO_NET_F_GUEST_USO6];

    /// Whether a feature is among them.
    pub fn has(self, feature: u32) -> bool {
        self.0 & 1 << feature != 0
    }
}

/// A connection to a back-end.
pub struct Connection {
    frontend: Frontend,
    features: Features,
}

impl Connection {
    /// Agrees with the back-end on the features.
    pub fn open(socket: &Path, udp_segmentation: bool) -> anyhow::Result<Self> {
        let mut frontend = Frontend::connect(socket, 2)?;
        frontend.set_owner()?;
        let offered = frontend.get_features()?;
        let wanted = Features::WANTED
            .iter()
            .filter(|feature| udp_segmentation || !Features::OF_UDP_SEGMENTATION.contains(feature))
            .fold(VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(), |bits, feature| bits | 1 << feature);
        let features = Features(offered & wanted);
        let modern = features.has(VIRTIO_F_VERSION_1) && features.has(net::VIRTIO_NET_F_MRG_RXBUF);
        ensure!(modern, "it offers {offered:#x}: virtio 1 and merged receive buffers are needed");
        let protocol = frontend.get_protocol_features()? & VhostUserProtocolFeatures::REPLY_ACK;
        frontend.set_protocol_features(protocol)?;
        if !protocol.is_empty() {
            // Each message is answered once it is done.
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        frontend.set_features(features.0)?;
        Ok(Self { frontend, features })
    }

    /// What was agreed on.
    pub fn features(&self) -> Features {
        self.features
    }

    /// Hands memory and queues over.
    pub fn start(&mut self, memory: &Memory, receive: &Queue, transmit: &Queue) -> anyhow::Result<()> {
        self.frontend.set_mem_table(&[memory.region()]).context("the memory")?;
        for (index, queue) in [receive, transmit].into_iter().enumerate() {
            self.start_queue(index, queue).with_context(|| format!("queue {index}"))?;
        }
        Ok(())
    }

    fn start_queue(&mut self, index: usize, queue: &Queue) -> anyhow::Result<()> {
        let addresses = queue.ring.addresses();
        self.frontend.set_vring_num(index, addresses.queue_size)?;
        self.frontend.set_vring_base(index, 0)?;
        self.frontend.set_vring_addr(index, &addresses)?;
        self.frontend.set_vring_call(index, &queue.interrupts)?;
        self.frontend.set_vring_kick(index, &queue.kicks)?;
        self.frontend.set_vring_enable(index, true)?;
        Ok(())
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.frontend.as_raw_fd()
    }
}
