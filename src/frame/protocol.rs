//! Numbers of the protocols inside IP (IANA, "Protocol Numbers"), as headers carry them.

/// ICMP, of IPv4.
pub const ICMP: u8 = 1;
/// TCP.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;
/// A fragment of IPv6, as an extension header.
pub const IPV6_FRAGMENT: u8 = 44;
/// ICMPv6.
pub const ICMPV6: u8 = 58;

/// ICMP of a family.
pub const fn icmp(v4: bool) -> u8 {
    if v4 { ICMP } else { ICMPV6 }
}
