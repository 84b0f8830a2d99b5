//! How programs on the host reach a running hythe: HTTP/1.1 and JSON on a unix socket.
//!
//! * [`place`]: where the socket lies, who may make it, and which one is meant
//! * [`shapes`]: what is said there, in JSON; `docs/openapi.json` tells the same in words that programs read
//! * [`explanation`]: what would become of traffic, in JSON and in words
//! * [`client`]: asks a running hythe
//!
//! The other end is in the slow path (`slow::api`).

pub mod client;
pub mod explanation;
pub mod place;
pub mod shapes;
