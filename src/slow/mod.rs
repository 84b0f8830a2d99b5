//! The slow path: one thread for everything that needs names, files or patience.
//!
//! A current-thread tokio runtime. Workers mail it frames that are for hythe itself, streams to its services, and
//! refusals of published ports; it mails frames back. It never touches what a worker owns.
//!
//! * [`neighbours`]: ARP, neighbour discovery, router advertisements
//! * [`dhcp`], [`dhcpv6`]: addresses for guests that ask
//! * [`dns`]: names of the link, everything else to the host's resolvers
//! * [`echo`]: the gateway answers ping
//! * [`fragments`]: packets of the guest that came in pieces

pub mod dhcp;
pub mod dhcpv6;
pub mod dns;
pub mod echo;
pub mod fragments;
pub mod neighbours;
