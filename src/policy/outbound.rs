//! The way by which what the guest sends leaves the host, where the user has chosen one.
//!
//! Without a choice nothing is bound and the host's routes decide, packet by packet. A choice is for what goes out: the host's
//! loopback and its own addresses are reached as ever.

use crate::frame::address::Address;

/// What the user has chosen.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Outbound {
    /// The interface.
    pub interface: Option<Interface>,
    /// The source address of IPv4.
    pub v4: Option<Address>,
    /// The source address of IPv6.
    pub v6: Option<Address>,
}

/// An interface of the host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Interface {
    /// Its name, by which the user knows it.
    pub name: String,
    /// Its number, by which the kernel does. One that comes again has another; while it is away this is the last one, which
    /// nobody gets again, so that what is sent by it fails.
    pub index: u32,
}

/// What a socket, or a datagram, is told about its way.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct WayOut {
    /// The number of the interface.
    pub interface: Option<u32>,
    /// The source address.
    pub source: Option<Address>,
}

impl Outbound {
    /// The way of what goes to a destination outside.
    pub fn way(&self, destination: Address) -> WayOut {
        WayOut {
            interface: self.interface.as_ref().map(|interface| interface.index),
            source: if destination.is_v4() { self.v4 } else { self.v6 },
        }
    }
}
