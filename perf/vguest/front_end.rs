//! The vhost-user side: which features both have, the memory, and where the rings lie.

use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;

use anyhow::{Context, ensure};
use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net as net;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::control::Control;
use crate::driver_ring::Memory;
use crate::pair::Pair;
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
    /// What several pairs of queues take.
    const OF_PAIRS: [u32; 2] = [net::VIRTIO_NET_F_MQ, net::VIRTIO_NET_F_CTRL_VQ];

    /// What is taken of what a back-end offers.
    fn wanted(udp_segmentation: bool, pairs: u16) -> u64 {
        let of_pairs = if pairs > 1 { &Self::OF_PAIRS[..] } else { &[] };
        Self::WANTED
            .iter()
            .filter(|feature| udp_segmentation || !Self::OF_UDP_SEGMENTATION.contains(feature))
            .chain(of_pairs)
            .fold(VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(), |bits, feature| bits | 1 << feature)
    }

    /// Whether a feature is among them.
    pub fn has(self, feature: u32) -> bool {
        self.0 & 1 << feature != 0
    }
}

/// Queues of a back-end at the most.
const QUEUES_MAX: u64 = 256;

/// Where the configuration says how many pairs the device has (`max_virtqueue_pairs`), behind the MAC and the status.
const PAIRS_AT: usize = 8;
const CONFIG_LEN: usize = 12;

/// A connection to a back-end.
pub struct Connection {
    frontend: Frontend,
    features: Features,
}

impl Connection {
    /// Agrees with the back-end on the features.
    pub fn open(socket: &Path, udp_segmentation: bool, pairs: u16) -> anyhow::Result<Self> {
        let mut frontend = Frontend::connect(socket, QUEUES_MAX)?;
        frontend.set_owner()?;
        let offered = frontend.get_features()?;
        let features = Features(offered & Features::wanted(udp_segmentation, pairs));
        let modern = features.has(VIRTIO_F_VERSION_1) && features.has(net::VIRTIO_NET_F_MRG_RXBUF);
        ensure!(modern, "it offers {offered:#x}: virtio 1 and merged receive buffers are needed");
        let has_pairs = pairs == 1 || Features::OF_PAIRS.iter().all(|feature| features.has(*feature));
        ensure!(has_pairs, "it offers {offered:#x}: it has one pair of queues");
        // Where the driver reads the configuration, the control queue is the back-end's.
        let of_pairs = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIG;
        let wanted = if pairs > 1 { of_pairs } else { VhostUserProtocolFeatures::empty() };
        let protocol = frontend.get_protocol_features()? & (VhostUserProtocolFeatures::REPLY_ACK | wanted);
        ensure!(protocol.contains(wanted), "it has no configuration to be read");
        frontend.set_protocol_features(protocol)?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
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

    /// Hands memory and queues over. With a control queue, the device is asked to use all of them.
    pub fn start(
        &mut self,
        memory: &Memory,
        pairs: &[Pair],
        control: Option<&mut Control>,
    ) -> anyhow::Result<()> {
        let offered = if control.is_some() { self.pairs_offered()? } else { 1 };
        ensure!(pairs.len() <= offered, "it has {offered} pairs of queues");
        self.frontend.set_mem_table(&[memory.region()]).context("the memory")?;
        let queues = pairs.iter().flat_map(|pair| [&pair.receive.queue, &pair.transmit.queue]);
        for (index, queue) in queues.enumerate() {
            self.start_queue(index, queue).with_context(|| format!("queue {index}"))?;
        }
        if let Some(control) = control {
            self.start_queue(2 * offered, &control.queue).context("the control queue")?;
            control.use_pairs(pairs.len() as u16)?;
        }
        Ok(())
    }

    /// How many pairs the device has; the control queue lies behind them (virtio 1.3, 5.1.2).
    fn pairs_offered(&mut self) -> anyhow::Result<usize> {
        let no_flags = VhostUserConfigFlags::empty();
        let (_, space) = self.frontend.get_config(0, CONFIG_LEN as u32, no_flags, &[0; CONFIG_LEN])?;
        let pairs = space.get(PAIRS_AT..PAIRS_AT + 2).context("a configuration that is too short")?;
        Ok(usize::from(u16::from_le_bytes([pairs[0], pairs[1]])))
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
