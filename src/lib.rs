//! hythe: the network data plane for containers and their VMs.
pub mod flow;
pub mod frame;
pub mod relay;
pub mod time;
