//! hythe as a whole: the built program between a guest, a host and a far server, each a namespace of the test's own.
//!
//! They run as root. Most claims are tested in every cell of a matrix of engines and numbers of workers ([`rig::cell`]).
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[path = "../rig/mod.rs"]
mod rig;

mod budgets;
mod configuration;
mod costs;
mod datagrams;
mod dns;
mod doctor;
mod egress;
mod explain;
mod guest_api;
mod guests;
mod icmp;
mod inbound;
mod input;
mod life;
mod names;
mod network;
mod outbound;
mod proxy;
mod proxy_clients;
mod proxy_failures;
mod proxy_http;
mod proxy_pac;
mod proxy_tls;
mod publishing;
mod scale;
mod spread;
mod stalls;
mod streams;
mod vpn;
