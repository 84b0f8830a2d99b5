//! What a guest may read about its network device, and the features that are offered (virtio 1.3, 5.1.3 and 5.1.4).

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::frame::address::Mac;
use crate::link::vhost_user::Takes;

/// Everything that is offered; each is really there.
const OFFERED: &[u32] = &[
    VIRTIO_F_VERSION_1,
    VIRTIO_RING_F_INDIRECT_DESC,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_STATUS,
];

/// What is offered besides where there is more than one pair of queues.
const OFFERED_WITH_PAIRS: &[u32] = &[VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_VQ];

/// Features of the protocol that are offered. `REPLY_ACK` the protocol's crate offers by itself.
pub fn protocol(pairs: u16) -> VhostUserProtocolFeatures {
    let offered = VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::RESET_DEVICE;
    if pairs > 1 { offered | VhostUserProtocolFeatures::MQ } else { offered }
}

/// Features that a front-end has acknowledged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Features(u64);

/// Features that a front-end cannot have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FeaturesError {
    /// Some that were not offered.
    #[error("it acknowledges features that were not offered (bits {0:#x})")]
    Unknown(u64),
    /// A device before virtio 1.0.
    #[error(
        "it does not acknowledge VIRTIO_F_VERSION_1 (bit 32): the guest's driver is older than virtio 1.0"
    )]
    Legacy,
}

impl Features {
    /// Those that are offered with so many pairs of queues.
    pub fn offered(pairs: u16) -> Self {
        let with_pairs = if pairs > 1 { OFFERED_WITH_PAIRS } else { &[] };
        let bits = OFFERED.iter().chain(with_pairs).fold(0, |bits, bit| bits | 1 << bit);
        Self(bits | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    /// Those of the offered ones that a front-end has acknowledged; none while its driver is being reset.
    pub fn acknowledged(self, bits: u64) -> Result<Self, FeaturesError> {
        let unknown = bits & !self.0;
        if unknown != 0 {
            return Err(FeaturesError::Unknown(unknown));
        }
        let features = Self(bits);
        let driver = bits & !VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if driver != 0 && !features.has(VIRTIO_F_VERSION_1) {
            Err(FeaturesError::Legacy)
        } else {
            Ok(features)
        }
    }

    /// As the protocol carries them.
    pub fn bits(self) -> u64 {
        self.0
    }

    fn has(self, bit: u32) -> bool {
        self.0 & 1 << bit != 0
    }

    /// Rings are enabled one by one (vhost-user, "Ring states"); without it they are once they are started.
    pub fn has_protocol_features(self) -> bool {
        self.0 & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0
    }

    /// `VIRTIO_F_EVENT_IDX`.
    pub fn event_index(self) -> bool {
        self.has(VIRTIO_RING_F_EVENT_IDX)
    }

    /// `VIRTIO_F_INDIRECT_DESC`.
    pub fn indirect(self) -> bool {
        self.has(VIRTIO_RING_F_INDIRECT_DESC)
    }

    /// How many of so many pairs the driver may use: one without `VIRTIO_NET_F_MQ`.
    pub fn pairs(self, offered: u16) -> u16 {
        if self.has(VIRTIO_NET_F_MQ) { offered } else { 1 }
    }

    /// The index of the control queue with so many pairs, where `VIRTIO_NET_F_CTRL_VQ` is acknowledged (virtio 1.3, 5.1.2).
    pub fn control_queue(self, offered: u16) -> Option<u32> {
        self.has(VIRTIO_NET_F_CTRL_VQ).then(|| 2 * u32::from(self.pairs(offered)))
    }

    /// What frames to the guest may be like.
    pub fn takes(self) -> Takes {
        Takes {
            merged: self.has(VIRTIO_NET_F_MRG_RXBUF),
            partial_checksums: self.has(VIRTIO_NET_F_GUEST_CSUM),
        }
    }

    /// The guest takes large TCP segments, of both families.
    pub fn tcp_segmentation(self) -> bool {
        self.has(VIRTIO_NET_F_GUEST_TSO4) && self.has(VIRTIO_NET_F_GUEST_TSO6)
    }

    /// The guest takes runs of datagrams, of both families.
    pub fn udp_segmentation(self) -> bool {
        self.has(VIRTIO_NET_F_GUEST_USO4) && self.has(VIRTIO_NET_F_GUEST_USO6)
    }
}

/// `struct virtio_net_config` up to the MTU, little-endian.
pub fn bytes(mac: Mac, pairs: u16, mtu: u16) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..6].copy_from_slice(&mac.0);
    bytes[6..8].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
    bytes[8..10].copy_from_slice(&pairs.to_le_bytes());
    bytes[10..].copy_from_slice(&mtu.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_offered_may_be_acknowledged_and_virtio_1_must() {
        let offered = Features::offered(1);
        assert_eq!(offered.acknowledged(offered.0), Ok(offered));
        assert_eq!(offered.acknowledged(offered.0 | 1 << 34), Err(FeaturesError::Unknown(1 << 34)));
        assert_eq!(offered.acknowledged(1 << VIRTIO_NET_F_MRG_RXBUF), Err(FeaturesError::Legacy));
        // A driver that is reset acknowledges nothing.
        assert!(offered.acknowledged(0).is_ok());
        assert!(offered.acknowledged(VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()).is_ok());
    }

    #[test]
    fn queues_are_controlled_where_there_are_more_than_one_pair() {
        assert_eq!(Features::offered(1).control_queue(1), None);
        assert_eq!(Features::offered(4).control_queue(4), Some(8));
        // 5.1.2: a driver that does not take several pairs finds it behind the first.
        let alone = Features(Features::offered(4).0 & !(1 << VIRTIO_NET_F_MQ));
        assert_eq!(alone.control_queue(4), Some(2));
    }

    #[test]
    fn segmentation_is_for_both_families_or_neither() {
        let one = Features(1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_USO6);
        assert!(!one.tcp_segmentation() && !one.udp_segmentation());
        assert!(Features::offered(1).tcp_segmentation() && Features::offered(1).udp_segmentation());
    }

    #[test]
    fn the_config_space_is_as_virtio_lays_it_out() {
        let mac = Mac([2, 0, 0, 0, 0, 7]);
        assert_eq!(bytes(mac, 4, 1500), [2, 0, 0, 0, 0, 7, 1, 0, 4, 0, 0xdc, 5]);
    }
}
