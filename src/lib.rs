//! hythe: the network data plane for containers and their VMs on Linux.
//!
//! A guest hands it Ethernet frames; hythe ends the guest's TCP, UDP and ICMP and speaks them again through ordinary
//! host sockets. `docs/ARCHITECTURE.md` is the map; the folders are the path of a frame.

pub mod channel;
pub mod cli;
pub mod config;
pub mod control;
pub mod doctor;
pub mod exchange;
pub mod flow;
pub mod fork;
pub mod frame;
pub mod host;
pub mod io;
pub mod link;
pub mod monitor;
pub mod namespace;
pub mod netlink;
pub mod node;
pub mod observe;
pub mod pac;
pub mod policy;
pub mod port_broker;
#[cfg(any(test, feature = "sim"))]
pub mod random;
pub mod relay;
pub mod sandbox;
pub mod shim;
#[cfg(feature = "sim")]
pub mod sim;
pub mod slow;
pub mod time;
pub mod worker;
