//! How many pairs of queues an interface uses: what `ethtool --set-channels` does (linux/ethtool.h).
#![allow(unsafe_code)]

use std::ffi::{c_int, c_ulong};
use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

const SIOCETHTOOL: c_ulong = 0x8946;
const ETHTOOL_GCHANNELS: u32 = 0x3c;
const ETHTOOL_SCHANNELS: u32 = 0x3d;

/// `struct ethtool_channels`.
#[repr(C)]
#[derive(Default)]
struct Channels {
    command: u32,
    max: [u32; 4],
    rx: u32,
    tx: u32,
    other: u32,
    combined: u32,
}

/// `struct ifreq`.
#[repr(C)]
struct Request {
    name: [u8; 16],
    data: *mut Channels,
    rest: [u8; 16],
}

unsafe extern "C" {
    fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
}

/// Has an interface use so many pairs.
pub fn set(interface: &str, pairs: u32) -> io::Result<()> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    let mut name = [0; 16];
    name[..interface.len()].copy_from_slice(interface.as_bytes());
    let mut channels = Channels { command: ETHTOOL_GCHANNELS, ..Channels::default() };
    let call = |channels: &mut Channels| {
        let mut request = Request { name, data: channels, rest: [0; 16] };
        // SAFETY: both structures are as the kernel wants them, and outlive the call.
        let result = unsafe { ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    call(&mut channels)?;
    channels.command = ETHTOOL_SCHANNELS;
    channels.combined = pairs;
    call(&mut channels)
}
