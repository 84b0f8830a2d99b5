//! The tap at which the guest's kernel sends and receives.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use anyhow::Context;
use hythe::link::tap::{self, Created};
use nix::sched::{CloneFlags, setns};

use crate::front_end::Features;

mod ioctl {
    nix::ioctl_write_int!(set_offload, b'T', 208);
}

/// Makes a tap with so many queues in a network namespace. The kernel sends what belongs to a flow to the queue over which
/// the flow's last frame came.
pub fn create(namespace: &Path, name: &str, queues: u16) -> anyhow::Result<Created> {
    let file = File::open(namespace).with_context(|| namespace.display().to_string())?;
    let name = name.to_string();
    // Only this thread changes its namespace; the tap stays in the one where it was made.
    let inside = std::thread::spawn(move || {
        setns(&file, CloneFlags::CLONE_NEWNET)?;
        anyhow::Ok(tap::create(&name, usize::from(queues))?)
    });
    inside.join().map_err(|_| anyhow::anyhow!("the thread in the guest's namespace has failed"))?
}

/// The guest's kernel leaves to the device what that has offered, and does the rest itself.
pub fn set_offloads(tap: &OwnedFd, features: Features) -> anyhow::Result<()> {
    let offloads = [
        (Features::CHECKSUM, libc::TUN_F_CSUM),
        (Features::TCP_SEGMENTATION_V4, libc::TUN_F_TSO4),
        (Features::TCP_SEGMENTATION_V6, libc::TUN_F_TSO6),
        (Features::UDP_SEGMENTATION, libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ];
    let flags = offloads
        .iter()
        .filter(|(feature, _)| features.has(*feature))
        .fold(0, |flags, (_, flag)| flags | flag);
    // SAFETY: the request takes a number and no memory.
    unsafe { ioctl::set_offload(tap.as_raw_fd(), libc::c_ulong::from(flags)) }
        .context("the offloads of the tap")?;
    Ok(())
}
