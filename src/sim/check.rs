//! The checkers' books: what every party has said and done, and what must hold between them.
//!
//! The models write their own progress down ([`Progress`]); the link shows every segment to the guest at the moment it is
//! committed ([`Books::segment_to_guest`]). From both follows, at any time:
//!
//! * *No acknowledged byte is lost*: what hythe acknowledges to the guest was taken by the host's socket by then, or
//!   waits in the flow's buffer.
//! * *The right edge never retreats* by more than the rounding of the window scale (RFC 7323, 2.4).
//! * *Bytes are the right ones*, at the right place, inside the guest's window; FIN stands where the stream ends.
//! * *SYN-ACK* says that the host is connected.

use std::collections::BTreeMap;

use crate::flow::key::{FlowKey, Protocol};
use crate::frame::address::Endpoint;
use crate::frame::tcp::{Flags, SegmentHead};

use super::pattern::Pattern;

/// A connection as the guest sees it: its endpoint and the remote one.
pub type Name = (Endpoint, Endpoint);

/// The key of a connection in hythe's table.
pub fn flow_key((guest, remote): Name) -> FlowKey {
    FlowKey { guest, remote, protocol: Protocol::Tcp }
}

/// The stream of a connection's bytes from the guest.
pub fn from_guest(connection: usize) -> u32 {
    2 * connection as u32
}

/// The stream of a connection's bytes to the guest.
pub fn to_guest(connection: usize) -> u32 {
    2 * connection as u32 + 1
}

/// How far a connection has come, as the models know.
#[derive(Clone, Default, Debug)]
pub struct Progress {
    /// The host's connect stands, or its client was accepted.
    pub host_connected: bool,
    /// Bytes that the guest's program has written.
    pub guest_wrote: u64,
    /// Where the guest's stream ends, once its program has closed.
    pub guest_end: Option<u64>,
    /// Bytes that the host's socket took from hythe.
    pub taken: u64,
    /// The stream is on its way to another socket: the old one is shut down before its end.
    pub moving: bool,
    /// hythe has shut the sending direction of the socket down.
    pub shut_down: bool,
    /// Bytes that the peer's program has written.
    pub peer_wrote: u64,
    /// Where the peer's stream ends, once its program has closed.
    pub peer_end: Option<u64>,
    /// Bytes of the peer's that the guest has got in order.
    pub guest_got: u64,
    /// Bytes of the peer's that hythe has dropped from the socket's receive queue.
    pub discarded: u64,
    /// Bytes of the guest's that the peer's program has read.
    pub peer_read: u64,
    /// Bytes of the peer's that the guest's program has read.
    pub guest_read: u64,
    /// Somebody's script had the connection reset, refused or forgotten: it need not end well.
    pub disturbed: bool,
    /// The guest's side of it is over.
    pub guest_over: Option<Ending>,
    /// The peer's side of it is over.
    pub peer_over: Option<Ending>,
    /// hythe has asked for keep-alive probes on the host's side.
    pub keep_alive: bool,
}

/// How one side's connection ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ending {
    /// Both directions were closed in order.
    Closed,
    /// It was reset from the other side, or refused.
    Reset,
    /// This side reset it.
    GaveReset,
    /// An ICMP error ended it.
    Unreachable,
    /// It was never answered.
    Silence,
}

/// A segment's acknowledgement, to be held against what was taken.
#[derive(Clone, Copy, Debug)]
pub struct SeenAcknowledgement {
    /// The connection's name.
    pub name: Name,
    /// The connection.
    pub connection: usize,
    /// Bytes acknowledged.
    pub bytes: u64,
    /// Bytes that the socket had taken at that moment.
    pub taken: u64,
}

/// What is known about the sequence numbers of a connection.
#[derive(Clone, Debug)]
struct Numbers {
    connection: usize,
    guest_isn: u32,
    guest_scale: Option<u8>,
    own_isn: u32,
    own_scale: Option<u8>,
    /// The furthest right edge that hythe has offered, as an offset from the guest's SYN.
    edge: Option<u64>,
    /// The furthest right edge that the guest has offered, as an offset from hythe's SYN.
    guest_edge: u64,
}

/// The books of a world.
#[derive(Default)]
pub struct Books {
    /// By connection.
    pub progress: Vec<Progress>,
    /// Connections whose guest has sent SYN, but not seen hythe's yet.
    opening: BTreeMap<Name, Numbers>,
    open: BTreeMap<Name, Numbers>,
    /// Connections by the guest's listening port.
    listening: BTreeMap<u16, usize>,
    /// Acknowledgements of this pass.
    pub acknowledgements: Vec<SeenAcknowledgement>,
    mtu: u16,
}

impl Books {
    /// Empty books for a number of connections.
    pub fn new(connections: usize, mtu: u16) -> Self {
        Self { progress: vec![Progress::default(); connections], mtu, ..Self::default() }
    }

    /// The guest listens for a connection.
    pub fn guest_listens(&mut self, port: u16, connection: usize) {
        self.listening.insert(port, connection);
    }

    /// The guest sends SYN, or SYN-ACK.
    pub fn guest_synchronizes(
        &mut self,
        name: Name,
        connection: usize,
        isn: u32,
        scale: Option<u8>,
        window: u64,
    ) {
        if let Some(numbers) = self.open.get_mut(&name).filter(|numbers| numbers.connection == connection) {
            // Once hythe has acknowledged anything, its numbers stand: another SYN-ACK answers a SYN that came late.
            if numbers.edge.is_none() {
                numbers.guest_isn = isn;
                numbers.guest_scale = scale;
            }
            numbers.guest_edge = numbers.guest_edge.max(1 + window);
            return;
        }
        let numbers = Numbers {
            connection,
            guest_isn: isn,
            guest_scale: scale,
            own_isn: 0,
            own_scale: None,
            edge: None,
            guest_edge: 1 + window,
        };
        self.opening.insert(name, numbers);
    }

    /// The guest offers a window up to `edge`, an offset from hythe's SYN.
    pub fn guest_offers(&mut self, name: Name, edge: u64) {
        if let Some(numbers) = self.open.get_mut(&name) {
            numbers.guest_edge = numbers.guest_edge.max(edge);
        }
    }

    /// hythe has committed a segment to the guest.
    pub fn segment_to_guest(
        &mut self,
        name: Name,
        segment: &SegmentHead,
        payload: &[u8],
        pattern: &Pattern,
    ) -> Result<(), String> {
        let flags = segment.flags;
        if flags.has(Flags::RST) {
            return Ok(());
        }
        if flags.has(Flags::SYN) {
            self.synchronized(name, segment)?;
        }
        let mtu = self.mtu;
        let Some(numbers) = self.open.get_mut(&name) else { return Ok(()) };
        let Some(progress) = self.progress.get(numbers.connection) else { return Ok(()) };
        let fail = |what: String| {
            Err(format!("connection {} ({} - {}): {what}", numbers.connection, name.0, name.1))
        };
        if flags.has(Flags::ACK) {
            let scale = match (numbers.guest_scale, numbers.own_scale) {
                (Some(_), Some(own)) if !flags.has(Flags::SYN) => own,
                _ => 0,
            };
            let acknowledged = u64::from(segment.ack.0.wrapping_sub(numbers.guest_isn));
            let edge = acknowledged + (u64::from(segment.window) << scale);
            let slack = (1u64 << scale) - 1;
            if let Some(before) = numbers.edge
                && edge + slack < before
            {
                return fail(format!("the right edge went back from {before} to {edge}"));
            }
            numbers.edge = Some(numbers.edge.map_or(edge, |before| before.max(edge)));
            let bytes = acknowledged.saturating_sub(1).min(progress.guest_end.unwrap_or(u64::MAX));
            if bytes > progress.guest_wrote {
                return fail(format!(
                    "{bytes} bytes are acknowledged, {} were written",
                    progress.guest_wrote
                ));
            }
            self.acknowledgements.push(SeenAcknowledgement {
                name,
                connection: numbers.connection,
                bytes,
                taken: progress.taken,
            });
        }
        let position = u64::from(segment.seq.0.wrapping_sub(numbers.own_isn));
        if segment.len > 0 {
            let end = position + u64::from(segment.len);
            if end > numbers.guest_edge {
                return fail(format!(
                    "bytes up to {end} are sent, the guest has room up to {}",
                    numbers.guest_edge
                ));
            }
            if position == 0 {
                return fail("payload lies before the first byte".into());
            }
            if let Err(at) = pattern.compare(to_guest(numbers.connection), position - 1, payload) {
                return fail(format!("byte {at} of the segment {}..{end} is wrong", position - 1));
            }
            if usize::from(mtu) > 0 && end - 1 > progress.peer_wrote {
                return fail(format!(
                    "bytes up to {} are sent, the peer wrote {}",
                    end - 1,
                    progress.peer_wrote
                ));
            }
        }
        if flags.has(Flags::FIN) {
            let end = position + u64::from(segment.len);
            if progress.peer_end != Some(end - 1) {
                return fail(format!(
                    "FIN at {}, the peer's stream ends at {:?}",
                    end - 1,
                    progress.peer_end
                ));
            }
        }
        Ok(())
    }

    fn synchronized(&mut self, name: Name, segment: &SegmentHead) -> Result<(), String> {
        let offered = segment.options.window_scale;
        if !segment.flags.has(Flags::ACK) {
            // An inbound connection: the guest is asked. A probe has no connection.
            let Some(connection) = self.listening.get(&name.0.port) else { return Ok(()) };
            if self.open.get(&name).is_some_and(|known| known.own_isn == segment.seq.0) {
                return Ok(());
            }
            let numbers = Numbers {
                connection: *connection,
                guest_isn: 0,
                guest_scale: None,
                own_isn: segment.seq.0,
                own_scale: offered,
                edge: None,
                guest_edge: 0,
            };
            self.open.insert(name, numbers);
            return Ok(());
        }
        if let Some(known) = self.open.get_mut(&name).filter(|known| known.own_isn != segment.seq.0) {
            // A SYN that came late has opened another one, which the guest will refuse.
            (known.own_isn, known.own_scale, known.edge) = (segment.seq.0, offered, None);
        }
        let answers = |numbers: &Numbers| segment.ack.0 == numbers.guest_isn.wrapping_add(1);
        if let Some(mut numbers) = self.opening.get(&name).filter(|numbers| answers(numbers)).cloned() {
            numbers.own_isn = segment.seq.0;
            numbers.own_scale = offered;
            let connected =
                self.progress.get(numbers.connection).is_some_and(|progress| progress.host_connected);
            if !connected {
                return Err(format!(
                    "connection {}: SYN-ACK before the host is connected",
                    numbers.connection
                ));
            }
            self.opening.remove(&name);
            self.open.insert(name, numbers);
        }
        Ok(())
    }

    /// Holds the acknowledgements of a pass against what was taken: `waiting` says how many bytes of a flow wait in
    /// its buffer.
    pub fn settle_acknowledgements(&mut self, waiting: impl Fn(&FlowKey) -> usize) -> Result<(), String> {
        for seen in std::mem::take(&mut self.acknowledgements) {
            let progress = &self.progress[seen.connection];
            if seen.bytes <= seen.taken || progress.disturbed {
                continue;
            }
            let kept = seen.taken + waiting(&flow_key(seen.name)) as u64;
            if seen.bytes > kept {
                return Err(format!(
                    "connection {}: {} bytes are acknowledged, {} taken, {} wait",
                    seen.connection,
                    seen.bytes,
                    seen.taken,
                    kept - seen.taken
                ));
            }
        }
        Ok(())
    }

    /// A socket's receive queue lost bytes: the guest must have them.
    pub fn discarded(&mut self, connection: usize, bytes: u64) -> Result<(), String> {
        let progress = &mut self.progress[connection];
        progress.discarded += bytes;
        if progress.discarded > progress.guest_got && !progress.disturbed {
            return Err(format!(
                "connection {connection}: {} bytes are discarded, the guest has {}",
                progress.discarded, progress.guest_got
            ));
        }
        Ok(())
    }

    /// hythe shuts a socket's sending direction down: everything of the guest's must be in it.
    pub fn shut_down(&mut self, connection: usize) -> Result<(), String> {
        let progress = &mut self.progress[connection];
        progress.shut_down = true;
        if progress.guest_end == Some(progress.taken) || progress.disturbed || progress.moving {
            return Ok(());
        }
        Err(format!(
            "connection {connection}: the peer is told the end at {}, the guest's stream ends at {:?}",
            progress.taken, progress.guest_end
        ))
    }

    /// What must hold when everything is over. On a wire that lost frames (`lossy`) the guest's last FIN may be lost, or its
    /// acknowledgement, for longer than hythe's TIME-WAIT of two seconds: a reset answers it then, which is an end as good
    /// as any when every byte has come to where it belongs. The links in use lose nothing, and a longer TIME-WAIT would cost
    /// memory for each connection that ends.
    pub fn conclude(&self, lossy: bool) -> Result<(), String> {
        for (connection, progress) in self.progress.iter().enumerate() {
            let fail = |what: &str| Err(format!("connection {connection}: {what}: {progress:?}"));
            if progress.disturbed {
                if progress.peer_over.is_none() && progress.host_connected {
                    return fail("the peer never learned that it is over");
                }
                if progress.guest_over.is_none() {
                    return fail("the guest never learned that it is over");
                }
                continue;
            }
            let last_fin_late = lossy
                && progress.guest_over == Some(Ending::Reset)
                && progress.shut_down
                && progress.guest_end == Some(progress.peer_read)
                && progress.peer_end == Some(progress.guest_read);
            let guest_is_well = progress.guest_over == Some(Ending::Closed) || last_fin_late;
            if !guest_is_well || progress.peer_over != Some(Ending::Closed) {
                return fail("it did not end well");
            }
            if progress.peer_read != progress.guest_wrote || progress.guest_read != progress.peer_wrote {
                return fail("bytes are missing");
            }
        }
        Ok(())
    }
}
