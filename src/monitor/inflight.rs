//! What a device keeps for the one after it, in memory that the front-end holds (vhost-user, "Inflight I/O tracking").
//!
//! It is for devices that give chains back in any order. Ours go back in the order in which they came, so the used ring
//! says all there is to say: what was in flight when a device died is what stands behind the used index, and a ring goes on
//! there ([`crate::link::virtqueue`]). The area is made, as the protocol wants it, and stays without a mark; one that
//! another kind of device has left marks in is refused, because what those say cannot be done in order.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::VhostUserInflight;

/// `struct QueueRegionSplit` in front of its descriptors: features, version, descriptors, last batch, used index.
const HEADER_LEN: u64 = 16;
/// `struct DescStateSplit`: a mark, padding, the next of a batch, a counter.
const MARK_LEN: u64 = 16;
const VERSION: u16 = 1;

/// Why an area cannot be gone on from.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It describes more queues or descriptors than there are, or lies outside of its file.
    #[error("the area for buffers in flight is not as it was made")]
    Malformed,
    /// It is not ours.
    #[error(
        "buffers are marked as in flight by a device that gives them back out of order: its guest has to restart"
    )]
    OutOfOrder,
    /// It cannot be made, or read.
    #[error("the area for buffers in flight: {0}")]
    Io(#[from] io::Error),
}

fn queue_len(size: u16) -> u64 {
    HEADER_LEN + MARK_LEN * u64::from(size)
}

/// Whether there are so many queues, and may be so many descriptors (virtio 1.3, 2.7: a power of two up to 32768).
fn fits(area: &VhostUserInflight, queues: usize) -> bool {
    usize::from(area.num_queues) <= queues && area.queue_size.is_power_of_two()
}

/// An area for so many queues of so many descriptors.
pub fn create(wanted: &VhostUserInflight, queues: usize) -> Result<(VhostUserInflight, File), Error> {
    let (count, size) = (wanted.num_queues, wanted.queue_size);
    if !fits(wanted, queues) {
        return Err(Error::Malformed);
    }
    let (nothing, file) = nothing()?;
    let len = queue_len(size) * u64::from(count);
    file.set_len(len)?;
    for queue in 0..u64::from(count) {
        let words = [VERSION.to_ne_bytes(), size.to_ne_bytes()].concat();
        file.write_all_at(&words, queue * queue_len(size) + 8)?;
    }
    Ok((VhostUserInflight { mmap_size: len, num_queues: count, queue_size: size, ..nothing }, file))
}

/// An area of no bytes.
pub fn nothing() -> Result<(VhostUserInflight, File), Error> {
    let file = File::from(memfd_create("hythe-inflight", MFdFlags::MFD_CLOEXEC).map_err(io::Error::from)?);
    Ok((VhostUserInflight::default(), file))
}

/// Looks at an area from which queues are to go on.
pub fn check(area: &VhostUserInflight, file: &File, queues: usize) -> Result<(), Error> {
    let (count, size) = (area.num_queues, area.queue_size);
    if !fits(area, queues) || area.mmap_size < queue_len(size) * u64::from(count) {
        return Err(Error::Malformed);
    }
    let mut bytes = vec![0; queue_len(size) as usize];
    for queue in 0..u64::from(count) {
        let at = area.mmap_offset.checked_add(queue * queue_len(size)).ok_or(Error::Malformed)?;
        file.read_exact_at(&mut bytes, at)?;
        let (header, marks) = bytes.split_at(HEADER_LEN as usize);
        let word = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
        if (word(8), word(10)) != (VERSION, size) {
            return Err(Error::Malformed);
        }
        if marks.chunks(MARK_LEN as usize).any(|mark| mark[0] != 0) {
            return Err(Error::OutOfOrder);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(num_queues: u16, queue_size: u16) -> VhostUserInflight {
        VhostUserInflight { num_queues, queue_size, ..VhostUserInflight::default() }
    }

    #[test]
    fn an_area_is_gone_on_from_as_it_was_made() {
        let (area, file) = create(&wanted(2, 256), 2).unwrap();
        assert_eq!(area.mmap_size, 2 * (16 + 16 * 256));
        assert!(check(&area, &file, 2).is_ok());
    }

    #[test]
    fn marks_of_another_device_are_refused() {
        let (area, file) = create(&wanted(2, 256), 2).unwrap();
        file.write_all_at(&[1], 16 + 16 * 256 + 16 + 3 * 16).unwrap();
        assert!(matches!(check(&area, &file, 2), Err(Error::OutOfOrder)));
    }

    #[test]
    fn an_area_of_another_shape_is_refused() {
        assert!(matches!(create(&wanted(3, 256), 2), Err(Error::Malformed)));
        assert!(matches!(create(&wanted(2, 100), 2), Err(Error::Malformed)));
        let (area, file) = create(&wanted(2, 256), 2).unwrap();
        for wrong in [
            VhostUserInflight { num_queues: 3, ..area },
            VhostUserInflight { queue_size: 128, ..area },
            VhostUserInflight { mmap_size: area.mmap_size - 1, ..area },
        ] {
            assert!(matches!(check(&wrong, &file, 2), Err(Error::Malformed)));
        }
        for mmap_offset in [16, u64::MAX] {
            assert!(check(&VhostUserInflight { mmap_offset, ..area }, &file, 2).is_err());
        }
    }
}
