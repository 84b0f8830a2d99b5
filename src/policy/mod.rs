//! Who may speak as whom, and what may be reached.

pub mod addresses;
pub mod bypass;
pub mod credentials;
pub mod destination;
pub mod egress;
pub mod guest_api;
pub mod guest_mac;
pub mod names;
pub mod outbound;
pub mod pac_result;
pub mod pattern;
pub mod port_set;
pub mod ports;
pub mod proxy;
pub mod proxy_url;
pub mod publish;
pub mod target;

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

/// Over which workers the guest's traffic goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Spread {
    /// Over one while that suffices, else over all (taps; a virtual machine spreads by itself).
    #[default]
    Auto,
    /// Over all.
    Always,
}
