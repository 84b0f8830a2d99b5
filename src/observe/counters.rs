//! Counters by cause. Each worker has its own set and is the only one to write it; anybody may read.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::frame::drop_reason::DropReason;

macro_rules! metrics {
    ($($(#[doc = $doc:literal])* $name:ident => $text:literal,)*) => {
        /// Things that are counted, besides drops.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u8)]
        pub enum Metric { $($(#[doc = $doc])* $name,)* }

        impl Metric {
            /// Every metric, in the order of the counters.
            pub const ALL: &'static [Metric] = &[$(Metric::$name,)*];

            /// The counter's name in print.
            pub fn name(self) -> &'static str {
                match self { $(Metric::$name => $text,)* }
            }
        }
    };
}

metrics! {
    /// Frames from the guest.
    FramesOut => "frames_out",
    /// Bytes of frames from the guest.
    BytesOut => "bytes_out",
    /// Frames to the guest.
    FramesIn => "frames_in",
    /// Bytes of frames to the guest.
    BytesIn => "bytes_in",
    /// TCP connections that the guest opened.
    StreamsOut => "tcp_opened_out",
    /// TCP connections that were opened to the guest.
    StreamsIn => "tcp_opened_in",
    /// TCP connections from the host's loopback that were joined to a socket of the guest.
    StreamsJoined => "tcp_joined",
    /// Bytes of such connections, both ways. No frame carried them.
    BytesJoined => "tcp_bytes_joined",
    /// TCP connections that were reset because the host's address was gone.
    StreamsDeparted => "tcp_departed",
    /// TCP connections that moved to the worker on whose queue the guest sends.
    StreamsMoved => "tcp_moved",
    /// TCP connections that are over.
    StreamsOver => "tcp_over",
    /// TCP segments sent to the guest again after a time-out.
    Timeouts => "tcp_timeouts",
    /// Bytes that a host socket would not take at once and that were buffered.
    BytesBuffered => "tcp_bytes_buffered",
    /// TCP segments held out of order.
    SegmentsHeld => "tcp_segments_held",
    /// Datagram mappings opened.
    MappingsOpened => "mappings_opened",
    /// Datagrams to the host.
    DatagramsOut => "datagrams_out",
    /// Datagrams to the guest.
    DatagramsIn => "datagrams_in",
    /// ICMP errors told to the guest.
    IcmpErrors => "icmp_errors",
    /// Frames handed to another worker because the flow is there.
    FramesHandedOver => "frames_handed_over",
    /// Messages of DNS from the guest.
    DnsQueries => "dns_queries",
    /// Messages of DNS without an answer: too short, or no query.
    DnsGarbage => "dns_garbage",
    /// Queries answered with a code alone: malformed, another opcode, a transfer.
    DnsUnfit => "dns_unfit",
    /// Queries for names that hythe knows itself: of the link, of the hosts file, of the user's records.
    DnsOwnNames => "dns_own_names",
    /// Queries for addresses of a kind that the guest is not told.
    DnsFiltered => "dns_filtered",
    /// Queries for names that a rule of egress denies.
    DnsDenied => "dns_denied",
    /// Queries answered by what a resolver said before.
    DnsCacheHits => "dns_cache_hits",
    /// Queries handed to the host's resolvers.
    DnsForwarded => "dns_forwarded",
    /// Queries that were still under way when they came again.
    DnsRetransmissions => "dns_retransmissions",
    /// Queries refused because too many were under way.
    DnsOverBudget => "dns_over_budget",
    /// Forwarded queries that nobody answered.
    DnsUnanswered => "dns_unanswered",
    /// Times that a resolver let its time pass.
    DnsServerTimeouts => "dns_server_timeouts",
    /// Times that a resolver could not be reached, or refused the port.
    DnsServerUnreachable => "dns_server_unreachable",
    /// Answers of a resolver that count only when no other does better: SERVFAIL, NOTIMP, REFUSED.
    DnsServerFailures => "dns_server_failures",
    /// Replies from a resolver's address that do not answer what was asked.
    DnsMismatched => "dns_mismatched",
    /// Streams of DNS served.
    DnsStreams => "dns_streams",
    /// Streams of DNS closed at once because there were too many.
    DnsStreamsRefused => "dns_streams_refused",
    /// Streams of DNS closed because nothing moved on them.
    DnsStreamsIdle => "dns_streams_idle",
    /// Streams of the guest's that were looked into, or came to the proxy's port.
    ProxyStreams => "proxy_streams",
    /// Streams of the guest's that were reset because too many were looked into.
    ProxyOverBudget => "proxy_over_budget",
    /// Times that the proxy's configuration script failed.
    ProxyScriptFailed => "proxy_script_failed",
    /// Streams and requests of the guest's that a rule refused.
    EgressRefused => "egress_refused",
    /// Passes of the worker's loop.
    Passes => "passes",
    /// Times the worker went to sleep.
    Sleeps => "sleeps",
    /// Times the worker went to another processor because others kept taking its own.
    ProcessorsChanged => "processors_changed",
    /// System calls made for input and output.
    SystemCalls => "system_calls",
    /// Operations carried out by the engine.
    Operations => "operations",
    /// Chains of buffers given back to the driver of a virtual machine's queues.
    VirtqueueChains => "virtqueue_chains",
    /// Times a worker was woken by the driver's kick.
    VirtqueueKicks => "virtqueue_kicks",
    /// Interrupts that the driver was given.
    VirtqueueInterrupts => "virtqueue_interrupts",
}

/// One worker's counters.
#[repr(align(128))]
pub struct Counters {
    drops: [AtomicU64; DropReason::ALL.len()],
    metrics: [AtomicU64; Metric::ALL.len()],
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            drops: std::array::from_fn(|_| AtomicU64::new(0)),
            metrics: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}

/// There is one writer, so a load and a store do; no locked instruction on the path of a frame.
fn bump(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
}

impl Counters {
    /// Counts a drop. The owning thread only.
    pub fn count_drop(&self, reason: DropReason) {
        bump(&self.drops[reason as usize], 1);
    }

    /// Adds to a metric. The owning thread only.
    pub fn add(&self, metric: Metric, by: u64) {
        bump(&self.metrics[metric as usize], by);
    }

    /// Sets a metric that is counted elsewhere. The owning thread only.
    pub fn set(&self, metric: Metric, value: u64) {
        self.metrics[metric as usize].store(value, Ordering::Relaxed);
    }

    /// How often something was dropped for a reason.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.drops[reason as usize].load(Ordering::Relaxed)
    }

    /// A metric's value.
    pub fn metric(&self, metric: Metric) -> u64 {
        self.metrics[metric as usize].load(Ordering::Relaxed)
    }
}

/// The sums over several sets, as lines `name value`, zeroes left out.
pub fn report<'c>(sets: &(impl Iterator<Item = &'c Counters> + Clone)) -> String {
    let mut lines = String::new();
    let mut line = |prefix, name, value| {
        if value > 0 {
            // Writing to a string cannot fail.
            let _ = writeln!(lines, "{prefix}{name} {value}");
        }
    };
    for metric in Metric::ALL {
        line("", metric.name(), sets.clone().map(|set| set.metric(*metric)).sum::<u64>());
    }
    for reason in DropReason::ALL {
        line("dropped_", reason.name(), sets.clone().map(|set| set.dropped(*reason)).sum::<u64>());
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_sums_the_sets_and_names_causes() {
        let sets = [Counters::default(), Counters::default()];
        sets[0].count_drop(DropReason::Martian);
        sets[1].count_drop(DropReason::Martian);
        sets[1].add(Metric::FramesIn, 5);
        assert_eq!(report(&sets.iter()), "frames_in 5\ndropped_martian 2\n");
    }
}
