//! Why a frame, a datagram or a connection went no further. Each reason has a counter of its own.

/// The reasons, named after their cause. `ALL` and [`DropReason::name`] are made from one list.
macro_rules! drop_reasons {
    ($($(#[doc = $doc:literal])* $name:ident => $text:literal,)*) => {
        /// Why something from a guest or from the network went no further.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
        #[repr(u8)]
        pub enum DropReason { $($(#[doc = $doc])* $name,)* }

        impl DropReason {
            /// Every reason, in the order of the counters.
            pub const ALL: &'static [DropReason] = &[$(DropReason::$name,)*];

            /// The counter's name in print: lower case with underscores.
            pub fn name(self) -> &'static str {
                match self { $(DropReason::$name => $text,)* }
            }
        }
    };
}

drop_reasons! {
    /// Shorter than its headers say.
    Truncated => "truncated",
    /// Longer than any link carries, or behind a length that is.
    FrameTooLong => "frame_too_long",
    /// A header field that no sender may produce.
    Malformed => "malformed",
    /// An EtherType that is neither IPv4, IPv6 nor ARP.
    EtherType => "ether_type",
    /// Not addressed to the gateway's MAC, a group or broadcast.
    DestinationMac => "destination_mac",
    /// The source MAC is not the guest's.
    SourceMac => "source_mac",
    /// The source address is none that the guest was given.
    SourceAddress => "source_address",
    /// A destination that may not appear on a wire: loopback, "this network", mapped addresses.
    Martian => "martian",
    /// Broadcast or multicast, which is not relayed.
    Multicast => "multicast",
    /// A link-local destination outside the link.
    LinkLocal => "link_local",
    /// A checksum that is wrong.
    Checksum => "checksum",
    /// A virtio-net header that contradicts the frame.
    Offload => "offload",
    /// An IP protocol that is not relayed.
    Protocol => "protocol",
    /// IPv6 extension headers beyond what is followed.
    ExtensionHeaders => "extension_headers",
    /// Policy refuses this destination.
    Policy => "policy",
    /// A port of the gateway where nothing listens.
    GatewayPort => "gateway_port",
    /// A TCP segment that belongs to no flow.
    NoFlow => "no_flow",
    /// A TCP segment outside the window, answered with an acknowledgement.
    OutOfWindow => "out_of_window",
    /// The flow table or this guest's flow budget is full.
    FlowBudget => "flow_budget",
    /// Too many unanswered connects to one destination.
    ConnectBudget => "connect_budget",
    /// No file descriptor is left within the limit.
    DescriptorBudget => "descriptor_budget",
    /// The mailbox of the slow path is full.
    SlowPathFull => "slow_path_full",
    /// The mailbox of another worker is full.
    WorkerFull => "worker_full",
    /// The guest offers no buffer for inbound frames.
    LinkFull => "link_full",
    /// The guest's driver broke the rules of its ring: the queue was given up.
    QueueFault => "queue_fault",
    /// The host socket's send buffer is full (datagrams only; streams never drop).
    SocketFull => "socket_full",
    /// The host refused a datagram for a reason that has no ICMP form.
    SendFailed => "send_failed",
    /// A datagram from a peer that the guest never spoke to.
    Filtered => "filtered",
    /// A datagram that came back from one of hythe's own sockets.
    OwnSocket => "own_socket",
    /// A datagram larger than any frame to the guest can carry.
    TooLarge => "too_large",
    /// Fragments that overlap, contradict each other or exceed the bounds of reassembly.
    FragmentInvalid => "fragment_invalid",
    /// Fragments given up because the rest did not come, or to make room.
    FragmentTimeout => "fragment_timeout",
    /// No echo socket can be had on this host.
    EchoUnavailable => "echo_unavailable",
    /// An ICMP message that is not relayed.
    IcmpType => "icmp_type",
    /// The hop limit ended here.
    HopLimit => "hop_limit",
    /// Memory for bytes in flight is spent.
    BufferBudget => "buffer_budget",
    /// The guest refused a published connection.
    GuestRefused => "guest_refused",
    /// The guest did not answer a published connection.
    GuestSilent => "guest_silent",
    /// The host refused or could not reach the destination.
    HostRefused => "host_refused",
    /// The peer on one side reset the connection.
    Reset => "reset",
    /// The guest stopped answering.
    GuestTimeout => "guest_timeout",
    /// A frame copied for capture that the writer could not take in time (the frame itself went on).
    CaptureFull => "capture_full",
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_the_list_is_in_counter_order() {
        for (index, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
            assert_eq!(DropReason::ALL.iter().filter(|other| other.name() == reason.name()).count(), 1);
        }
    }
}
