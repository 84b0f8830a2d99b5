//! Which conversation a frame belongs to, and when each one's time is up.
//!
//! * [`key`] names a conversation; [`table`] finds it from any thread without waiting; [`slab`] holds the records of
//!   one worker; [`timer`] holds their deadlines; [`admit`] decides whether one more may begin.
//!
//! Pure but for atomics: no files, no sockets, no rings, no clock.

pub mod admit;
pub mod key;
pub mod slab;
pub mod table;
pub mod timer;
