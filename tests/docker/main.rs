//! hythe with real Docker Engines in a guest: `docker run -p` inside is a port of the host.
//!
//! They run as root, with what tests/docker/fetch has fetched. Every claim is tested with each Engine ([`world`]); what the
//! program does that dockerd starts is tested without one too ([`shim`]).
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[path = "../rig/mod.rs"]
#[allow(unused, reason = "it is the rig of tests/namespace, where none of it may be unused")]
mod rig;

mod engine;
mod world;

mod names;
mod publishing;
mod restarts;
mod shim;
