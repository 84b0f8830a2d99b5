//! When a world is over, and whether it ended well.

use crate::exchange::mail::ToWorker;

use super::super::check::Ending;
use super::super::plan::{Answer, ConnectionPlan, Opening, Outcome as ConnectOutcome};
use super::super::stage::Stage;
use super::super::station::Station;
use super::{Happening, START, World};

/// What came of a seed.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// What was not as it must be.
    pub failure: Option<String>,
    /// Two runs of a seed have the same.
    pub fingerprint: u64,
    /// The last lines of the trace, where they were kept.
    pub trace: Vec<String>,
    /// Virtual time that passed, in nanoseconds.
    pub time_ns: u64,
    /// Passes of all workers.
    pub passes: u64,
    /// Passes that came out of a sleep.
    pub wakes: u64,
    /// Payload bytes that reached the programs.
    pub bytes: u64,
    /// Bytes of streams that went to sockets straight from frames, and from hythe's own memory.
    pub sent_bytes: (u64, u64),
    /// Connections on whose host side hythe has asked for keep-alive probes.
    pub keep_alives: usize,
    /// Times that a connection moved to another worker.
    pub moves: u64,
    /// Frames that hythe has sent to the guest.
    pub frames_to_guest: u64,
    /// Datagrams of the guest's that came back.
    pub datagrams_back: usize,
    /// Mappings that were opened for it.
    pub mappings_opened: u64,
}

impl Outcome {
    /// What came of a seed whose run has panicked.
    pub(super) fn of_panic(seed: u64, panic: &str, stage: &Stage) -> Self {
        Self {
            seed,
            failure: Some(format!("panic: {panic}")),
            fingerprint: stage.fingerprint(),
            trace: stage.last_lines(),
            time_ns: stage.now().since(START),
            passes: 0,
            wakes: 0,
            bytes: 0,
            sent_bytes: (0, 0),
            keep_alives: 0,
            moves: 0,
            frames_to_guest: 0,
            datagrams_back: 0,
            mappings_opened: 0,
        }
    }
}

impl World {
    /// Whether the programs at both ends of a connection have done what they were to do.
    pub(super) fn connection_is_over(&self, number: usize) -> bool {
        let inbound = matches!(self.plan.connections[number].opening, Opening::Inbound { .. });
        let guest = self.guest.is_over(number) || (inbound && !self.guest.has_begun(number));
        let peer = self.peers.is_over(number) || (!inbound && !self.peers.has_begun(number));
        self.started[number] && guest && peer
    }

    /// Whether every program has done what it was to do.
    pub(super) fn is_over(&self) -> bool {
        (0..self.started.len()).all(|number| self.connection_is_over(number))
            && self.guest.conversations.next().is_none()
    }

    /// Whether nothing is on its way and no worker holds on to anything.
    pub(super) fn is_at_rest(&self) -> bool {
        let idle = |happening: &Happening| {
            matches!(
                happening,
                Happening::Pass(_)
                    | Happening::Stall(..)
                    | Happening::Switch(..)
                    | Happening::Deal
                    | Happening::Guest
                    | Happening::Outcomes
            )
        };
        self.stations.iter().all(Station::is_at_rest) && !self.agenda.any(|happening| !idle(happening))
    }

    pub(super) fn conclude(&mut self) {
        let lossless = self.is_lossless();
        if !self.stage.has_failed() {
            for number in 0..self.started.len() {
                if !self.guest.has_begun(number) {
                    let mut books = self.stage.books.borrow_mut();
                    let progress = &mut books.progress[number];
                    progress.guest_over.get_or_insert(Ending::Silence);
                    // Every attempt may have been lost, or found no room.
                    progress.disturbed |= !lossless;
                }
            }
            let right = self.stage.books.borrow().conclude(self.lost_frames() > 0);
            self.stage.expect(right);
            let over = self.is_over();
            self.stage.check(over, || "not every program came to its end".into());
            for station in &self.stations {
                let holdings = station.worker.holdings();
                self.stage
                    .check(station.is_at_rest(), || format!("a worker does not come to rest: {holdings:?}"));
            }
            let descriptors = self.office.limits.descriptors.used();
            self.stage.check(descriptors == 0, || format!("{descriptors} descriptors stay counted"));
            let flows = self.office.flows.len();
            self.stage.check(flows == 0, || format!("{flows} flows stay in the table"));
            self.stage.expect(self.guest.conversations.conclude(lossless));
        }
        if !self.stage.has_failed() {
            self.stop();
        }
    }

    /// Frames that were lost on their way between guest and link.
    fn lost_frames(&self) -> u64 {
        self.to_link.lost + self.to_guest.lost + self.overflowed
    }

    /// Whether no datagram can have been lost.
    fn is_lossless(&self) -> bool {
        self.lost_frames() == 0
            && self.plan.jump.is_none()
            && self.stations.iter().all(|station| !station.has_dropped_for_want())
    }

    /// Ends the workers: nothing is left.
    fn stop(&mut self) {
        for index in 0..self.stations.len() {
            self.mail(index, ToWorker::Stop);
            for _ in 0..4 {
                self.stations[index].pass(&self.stage);
            }
            let stopped = self.stations[index].worker.is_stopped();
            self.stage.check(stopped, || format!("worker {index} does not stop"));
        }
        let open = self.kernel.borrow().open_descriptors();
        self.stage.check(open == 0, || format!("{open} descriptors stay open"));
        let lent = self.stage.memory.borrow().lent();
        self.stage.check(lent == 0, || format!("{lent} pieces of the link's memory do not come back"));
    }

    pub(super) fn outcome(&self) -> Outcome {
        let books = self.stage.books.borrow();
        let bytes = books.progress.iter().map(|progress| progress.guest_read + progress.peer_read).sum();
        Outcome {
            seed: self.plan.seed,
            failure: self.stage.failure(),
            fingerprint: self.stage.fingerprint(),
            trace: self.stage.last_lines(),
            time_ns: self.stage.now().since(START),
            passes: self.stations.iter().map(|station| station.passes).sum(),
            wakes: self.stations.iter().map(|station| station.wakes).sum(),
            bytes,
            sent_bytes: self.kernel.borrow().sent_bytes,
            keep_alives: books.progress.iter().filter(|progress| progress.keep_alive).count(),
            moves: self.stations.iter().map(Station::moves).sum(),
            frames_to_guest: self.frames_to_guest,
            datagrams_back: self.guest.conversations.came(),
            mappings_opened: self.stations.iter().map(Station::mappings_opened).sum(),
        }
    }
}

impl ConnectionPlan {
    /// How the plan itself has the connection end, scripts of resets aside.
    pub(super) fn outcome(&self) -> Ending {
        match self.opening {
            Opening::Outbound { outcome: ConnectOutcome::Connects, .. } | Opening::Service { .. } => {
                Ending::Closed
            }
            Opening::Outbound { outcome: ConnectOutcome::Silence, .. } => Ending::Silence,
            Opening::Outbound { .. } => Ending::Reset,
            Opening::Inbound { answer: Answer::Accepts | Answer::GatewayOnly, .. } => Ending::Closed,
            Opening::Inbound { .. } => Ending::Reset,
        }
    }
}
