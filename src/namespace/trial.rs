//! Whether a guest's namespace and its tap could be made here: tried in a process of its own, of which nothing stays.

use std::io::{self, Read, Write};

use nix::sys::wait::waitpid;

use super::enter;
use crate::fork::fork_child;
use crate::link::tap;

/// What came of trying.
#[derive(Debug)]
pub struct Trial {
    /// A network namespace with mounts of its own; else what to do.
    pub namespace: Result<(), String>,
    /// A tap, and whether it takes segmentation of UDP; else what to do.
    pub tap: Result<bool, String>,
}

/// What the child tells by its first byte; words may follow.
const WITH_SEGMENTATION: u8 = b'u';
const WITHOUT: u8 = b't';
const NO_TAP: u8 = b'n';
const NO_NAMESPACE: u8 = b'x';

/// Tries. There must be no other thread yet.
pub fn try_namespace() -> Trial {
    let told = tell_tale().unwrap_or_else(|error| [&[NO_NAMESPACE], error.to_string().as_bytes()].concat());
    let (kind, why) = told.split_first().unwrap_or((&NO_NAMESPACE, b"the process that tried has ended"));
    let why = String::from_utf8_lossy(why).into_owned();
    match *kind {
        WITH_SEGMENTATION => Trial { namespace: Ok(()), tap: Ok(true) },
        WITHOUT => Trial { namespace: Ok(()), tap: Ok(false) },
        NO_TAP => Trial { namespace: Ok(()), tap: Err(why) },
        // The device can be looked at without one.
        _ => {
            Trial { namespace: Err(why), tap: tap::probe().map(|()| true).map_err(|error| error.to_string()) }
        }
    }
}

fn tell_tale() -> io::Result<Vec<u8>> {
    let (mut hearing, telling) = io::pipe()?;
    let child = fork_child(|_| {
        let told = match enter::make(false) {
            Err(why) => [&[NO_NAMESPACE], why.as_bytes()].concat(),
            Ok(()) => match tap::create("eth0", 1) {
                Err(error) => [&[NO_TAP], error.to_string().as_bytes()].concat(),
                Ok(created) => vec![if created.udp_segmentation { WITH_SEGMENTATION } else { WITHOUT }],
            },
        };
        u8::from((&telling).write_all(&told).is_err())
    })?;
    drop(telling);
    let mut told = Vec::new();
    hearing.read_to_end(&mut told)?;
    waitpid(child, None)?;
    Ok(told)
}
