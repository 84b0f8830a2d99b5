//! PAC scripts: what a company says in JavaScript about which proxy leads where.
//!
//! ```text
//!  hythe, slow path            starter                     evaluator
//!  ┌───────────────┐  Start   ┌─────────────────────┐     ┌──────────────────────────┐
//!  │ Pac (client)  │─────────▶│ forked at the start │─────▶ forked for one script    │
//!  │               │◀─────────│ ends the old one    │     │ engine: QuickJS, and the │
//!  │               │ a socket └─────────────────────┘     │ functions of PAC         │
//!  │   find(url, host) ═══════════════════════════════════▶                          │
//!  │   names ◀════════════════════════════════════════════ dnsResolve(…)             │
//!  └───────────────┘                                      └──────────────────────────┘
//! ```
//! A script is hostile: it may come over plain HTTP, from whoever is on the way. So it lives in a process that has one descriptor, no
//! files, no network, no capability, and the system calls that reading, writing and memory take. There its memory, its stack and its
//! time are bounded: by the engine for what is JavaScript, by the kernel for whatever else may be. A script that takes too much, or
//! brings its process to an end, costs an error and the next question a fresh process. What comes back is text of bounded length
//! that [`parse_pac_result`](crate::policy::proxy::parse_pac_result) reads.
//!
//! The starter is forked before there are threads and sees nothing of a script. Without it there could be no second evaluator: a
//! process that has threads, and has given up the right to fork, makes none.
//!
//! Names are resolved by whoever asks ([`Resolve`]), some for each question.

mod client;
mod engine;
mod process;
mod words;

pub use client::{Pac, PacError, Resolve};
pub use process::{EVALUATOR_SYSTEM_CALLS, Limit, STARTER_SYSTEM_CALLS, Starter, start};

/// The system calls of the client, besides those of the runtime's own loop.
pub const SYSTEM_CALLS: &[libc::c_long] = &[
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_shutdown,
    libc::SYS_ioctl,
    libc::SYS_fcntl,
    libc::SYS_epoll_ctl,
    libc::SYS_close,
    libc::SYS_socket,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_getsockname,
];

/// The longest script, in bytes. Chromium takes as much.
pub const SCRIPT_MAX: usize = 1 << 20;
