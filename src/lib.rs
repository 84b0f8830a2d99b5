//! hythe: the network data plane for containers and their VMs.
pub mod exchange;
pub mod flow;
pub mod frame;
pub mod host;
pub mod io;
pub mod link;
pub mod observe;
pub mod policy;
pub mod relay;
pub mod time;
pub mod worker;
pub mod slow;
