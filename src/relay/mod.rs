//! The state machines of conversations: what a TCP connection, a datagram mapping or a reassembly does next.
//!
//! Pure: segments are heads without bytes, time is an argument, sockets are events and answers. Nothing here knows
//! of files, sockets, rings, threads or the clock, so that the simulation runs the very code that runs in production.

pub mod reassembly;
pub mod tcp;
