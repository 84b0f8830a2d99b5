//! hythe with real guests: the built program, and machines with a Linux of their own that attach to it over vhost-user,
//! or over sockets.
//!
//! They run as root, and boot what tests/guest/build has made. Most claims are tested with User-Mode Linux, a new kernel at
//! the speed of the host, on both engines, and with QEMU, an older kernel on a processor in software ([`world`]).
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[path = "../rig/mod.rs"]
#[allow(unused, reason = "it is the rig of tests/namespace, where none of it may be unused")]
mod rig;

#[path = "../rig/driver_ring.rs"]
mod ring;

mod machine;
mod peer;
mod world;

mod addresses;
mod datagrams;
mod dpdk;
mod driver;
mod front_end;
mod memory;
mod moving;
mod mtu;
mod names;
mod pauses;
mod queues;
mod reconnection;
mod sockets;
mod streams;
