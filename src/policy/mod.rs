//! Who may speak as whom, and what may be reached.

pub mod addresses;
pub mod guest_api;
pub mod guest_mac;
pub mod port_set;
pub mod publish;

/// Who may answer a guest's datagram.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UdpFiltering {
    /// Whoever has an address that the guest has spoken to (RFC 4787, REQ-8).
    #[default]
    AddressDependent,
    /// Anybody: opens the guest's port to the network.
    EndpointIndependent,
}
