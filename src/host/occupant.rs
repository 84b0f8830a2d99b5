//! Who has a port of the host: what the kernel tells of it in /proc.
//!
//! /proc/net lists sockets with their inodes, /proc/PID/fd the inodes of a process's descriptors. Of other users' processes only
//! root sees these, so that the answer may be that nobody knows. It takes the whole of /proc, which a running hythe cannot see: the
//! start asks, and the command line.

use std::fmt;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use crate::policy::publish::{Binding, PublishedProtocol};

/// TCP_LISTEN of the kernel, and what it gives a UDP socket that is bound.
const LISTENING: &str = "0A";

/// A process that has a socket.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Occupant {
    /// Its number.
    pub pid: u32,
    /// Its name, as the kernel has it.
    pub name: String,
}

impl fmt::Display for Occupant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, process {}", self.name, self.pid)
    }
}

/// Who has the port that a binding wants, if that can be seen.
pub fn of(binding: &Binding) -> Option<Occupant> {
    let v4 = binding.address.is_ipv4();
    let table = match (binding.protocol, v4) {
        (PublishedProtocol::Tcp, true) => "tcp",
        (PublishedProtocol::Tcp, false) => "tcp6",
        (PublishedProtocol::Udp, true) => "udp",
        (PublishedProtocol::Udp, false) => "udp6",
    };
    // An IPv6 socket may have the port of IPv4 too.
    let tables = [table, if v4 { if table == "tcp" { "tcp6" } else { "udp6" } } else { table }];
    tables.iter().find_map(|table| {
        let text = fs::read_to_string(Path::new("/proc/net").join(table)).ok()?;
        let inode = text.lines().skip(1).find_map(|line| inode_at(line, binding))?;
        holder(&inode)
    })
}

/// The socket's inode, if the line of a table tells of one that is in the way.
fn inode_at(line: &str, binding: &Binding) -> Option<String> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let (address, port) = fields.get(1)?.split_once(':')?;
    if u16::from_str_radix(port, 16).ok()? != binding.host_port {
        return None;
    }
    let address = host_address(address)?;
    // An unspecified IPv6 address stands for those of IPv4 too, unless its socket says otherwise, which is not told here.
    let same_family = address.is_ipv4() == binding.address.is_ipv4() || address.is_unspecified();
    let meets = address == binding.address || address.is_unspecified() || binding.address.is_unspecified();
    let listens = binding.protocol == PublishedProtocol::Udp || *fields.get(3)? == LISTENING;
    (same_family && meets && listens).then(|| fields.get(9).map(|inode| (*inode).to_string()))?
}

/// An address as the kernel prints it: words of 32 bits, each in the processor's order of bytes.
fn host_address(hex: &str) -> Option<IpAddr> {
    let words: Vec<u32> = (0..hex.len() / 8)
        .map(|word| u32::from_str_radix(hex.get(word * 8..word * 8 + 8)?, 16).ok())
        .collect::<Option<_>>()?;
    let octets: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    match *octets.as_slice() {
        [a, b, c, d] => Some(Ipv4Addr::new(a, b, c, d).into()),
        _ => <[u8; 16]>::try_from(octets).ok().map(|octets| Ipv6Addr::from(octets).to_canonical()),
    }
}

/// The process that has a descriptor of a socket.
fn holder(inode: &str) -> Option<Occupant> {
    let wanted = format!("socket:[{inode}]");
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let has = |pid: &u32| {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        descriptors
            .filter_map(|entry| fs::read_link(entry.path()).ok())
            .any(|target| target.as_os_str() == wanted.as_str())
    };
    let pid = pids.into_iter().find(has)?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some(Occupant { pid, name: name.trim_end().escape_debug().to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, UdpSocket};

    #[test]
    fn this_process_has_its_own_sockets() {
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let udp = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).unwrap();
        for (name, protocol) in [
            (tcp.local_addr().unwrap(), PublishedProtocol::Tcp),
            (udp.local_addr().unwrap(), PublishedProtocol::Udp),
        ] {
            for address in [name.ip(), if name.is_ipv4() { "0.0.0.0" } else { "::" }.parse().unwrap()] {
                let binding = Binding { address, host_port: name.port(), guest_port: 80, protocol };
                assert_eq!(of(&binding).unwrap().pid, std::process::id(), "{binding}");
            }
        }
        let port = tcp.local_addr().unwrap().port();
        let address = Ipv4Addr::new(127, 0, 0, 2).into();
        let elsewhere =
            Binding { address, host_port: port, guest_port: 80, protocol: PublishedProtocol::Tcp };
        assert_eq!(of(&elsewhere), None);
    }

    #[test]
    fn the_kernels_addresses_are_read() {
        for (hex, address) in
            [("0100007F", "127.0.0.1"), ("00000000000000000000000001000000", "::1"), ("00000000", "0.0.0.0")]
        {
            // As little-endian processors print them.
            if cfg!(target_endian = "little") {
                assert_eq!(host_address(hex).unwrap(), address.parse::<IpAddr>().unwrap());
            }
        }
        assert_eq!(host_address("0100"), None);
        assert_eq!(host_address("é100007"), None);
    }
}
