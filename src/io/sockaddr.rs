//! Addresses in the kernel's form.
#![allow(unsafe_code)]

use std::os::fd::RawFd;

use crate::frame::address::{Address, Endpoint};

/// Writes an endpoint into a socket address; returns the length that counts.
pub fn store(endpoint: Endpoint, out: &mut libc::sockaddr_storage) -> libc::socklen_t {
    let out = std::ptr::from_mut(out);
    if endpoint.address.is_v4() {
        let v4 = libc::sockaddr_in {
            sin_family: libc::AF_INET as libc::sa_family_t,
            sin_port: endpoint.port.to_be(),
            sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(endpoint.address.v4_octets()) },
            sin_zero: [0; 8],
        };
        // SAFETY: sockaddr_storage is at least as large and as aligned as any socket address.
        unsafe { out.cast::<libc::sockaddr_in>().write(v4) };
        return size_of::<libc::sockaddr_in>() as libc::socklen_t;
    }
    let v6 = libc::sockaddr_in6 {
        sin6_family: libc::AF_INET6 as libc::sa_family_t,
        sin6_port: endpoint.port.to_be(),
        sin6_flowinfo: 0,
        sin6_addr: libc::in6_addr { s6_addr: endpoint.address.octets() },
        sin6_scope_id: 0,
    };
    // SAFETY: as above.
    unsafe { out.cast::<libc::sockaddr_in6>().write(v6) };
    size_of::<libc::sockaddr_in6>() as libc::socklen_t
}

/// Reads an endpoint from a socket address that the kernel wrote; `None` for another family.
pub fn load(from: &libc::sockaddr_storage) -> Option<Endpoint> {
    let pointer = std::ptr::from_ref(from);
    match i32::from(from.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says which address it is; the storage is large and aligned enough for it.
            let v4 = unsafe { pointer.cast::<libc::sockaddr_in>().read() };
            Some(Endpoint::new(Address::v4(v4.sin_addr.s_addr.to_ne_bytes()), u16::from_be(v4.sin_port)))
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let v6 = unsafe { pointer.cast::<libc::sockaddr_in6>().read() };
            Some(Endpoint::new(Address::v6(v6.sin6_addr.s6_addr), u16::from_be(v6.sin6_port)))
        }
        _ => None,
    }
}

/// `AF_INET` or `AF_INET6`.
pub fn family(v4: bool) -> i32 {
    if v4 { libc::AF_INET } else { libc::AF_INET6 }
}

/// The endpoint that a socket is bound to.
pub fn local(fd: RawFd) -> Option<Endpoint> {
    // SAFETY: zero is a valid socket address.
    let mut name: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let mut len = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    // SAFETY: `name` and `len` are valid for the call and `len` says how large `name` is.
    let result = unsafe { libc::getsockname(fd, (&raw mut name).cast(), &raw mut len) };
    if result == 0 { load(&name) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_families_survive_the_round_trip() {
        for text in ["192.0.2.1:80", "[2001:db8::1]:443"] {
            let endpoint: Endpoint = text.parse::<std::net::SocketAddr>().unwrap().into();
            // SAFETY: zero is a valid socket address.
            let mut storage = unsafe { std::mem::zeroed() };
            store(endpoint, &mut storage);
            assert_eq!(load(&storage), Some(endpoint));
        }
    }
}
