//! What the tests are made with. A test reads like this:
//!
//! ```ignore
//! on_every_cell! {
//!     a_guest_reaches_the_far_server(cell) {
//!         let site = Site::new();                                    // host ── far
//!         let hythe = Hythe::of(&site.host, cell).run();             // a guest behind the host
//!         let listener = site.far.listen(Family::V4.far(), 0);       // sockets belong to where they were opened
//!         let stream = hythe.guest.connect(listener.local_addr().unwrap()).unwrap();
//!         …
//!         assert_eq!(hythe.counters().get("tcp_timeouts"), 0);       // hythe's own, by SIGUSR1
//!     }
//! }
//! ```
//! Everything ends with its handle, whichever way the test ends. Nothing sleeps to wait: [`wait`] polls with a deadline.

pub mod bytes;
pub mod cell;
pub mod company;
pub mod directory;
pub mod dns_server;
pub mod http;
pub mod hythe;
pub mod mounts;
pub mod netns;
pub mod nsd;
pub mod pattern;
pub mod process;
pub mod program;
pub mod quiet;
pub mod site;
pub mod socket;
pub mod vpn;
pub mod wait;
