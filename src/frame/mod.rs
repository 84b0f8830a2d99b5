//! Ethernet frames as types: one parse, one way to build, checksums, offloads.
//!
//! Bytes become a [`view::View`] once, at the edge; what cannot become one is a
//! [`drop_reason::DropReason`]. This folder knows nothing of files, sockets, rings, threads or the clock.

pub mod address;
pub mod build;
pub mod checksum;
pub mod datagram;
pub mod drop_reason;
pub mod fragment;
pub mod icmp;
pub mod offload;
pub mod protocol;
pub mod tcp;
pub mod view;
