//! The simulation (feature `sim`): the very workers, on models of everything around them, in virtual time.
//!
//! ```text
//!  model guest ── wire ── model link ── worker ── model engine, model sockets ── peers and servers
//!   guest/        wire     link, memory  (real)    engine, sockets, kernel          peers, servers
//! ```
//!
//! A *seed* decides everything ([`plan`]); [`world`] joins the models and runs it. Nothing waits and nothing is left to
//! chance, so a seed does the same each time. The checkers look on: the books ([`check`]) hold what every party has said
//! and done, the link and the kernel look at each operation, the world sees that everything comes to rest. Bugs can be
//! planted ([`faults`]) to see that they are caught.

pub mod application;
pub mod check;
pub mod clock;
pub mod datagram_socket;
pub mod engine;
pub mod faults;
pub mod guest;
pub mod kernel;
pub mod link;
pub mod memory;
pub mod pattern;
pub mod peers;
pub mod plan;
pub mod room;
pub mod servers;
pub mod sockets;
pub mod stage;
pub mod station;
pub mod stream_socket;
pub mod wire;
pub mod world;

pub use faults::Fault;
pub use plan::Plan;
pub use stage::Tracing;
pub use world::{Outcome, run};
