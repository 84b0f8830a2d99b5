//! The other ends of the host's sockets: the programs of the world's peers, and hythe's own services.
//!
//! A service (the far end of a socketpair) may hand its stream over to another socket half-way, as a proxy does after
//! its handshake: from then on it writes nothing, reads to the end of file, and closes; the program goes on at the new
//! socket ([`crate::exchange::mail::ToWorker::Rehome`]).

use std::cell::RefCell;
use std::rc::Rc;

use crate::exchange::mail::ToWorker;
use crate::flow::slab::Slot;
use crate::random::Random;
use crate::time::Now;

use super::application::Application;
use super::check::Ending;
use super::kernel::{Kernel, own_address};
use super::plan::{ConnectionPlan, Opening};
use super::sockets::ModelSocket;
use super::stage::Stage;
use super::stream_socket::{Standing, StreamSocket};

/// What a stream will be handed over to, and when.
#[derive(Clone, Copy)]
struct Move {
    /// After so many bytes were read or written.
    after: u64,
    worker: u8,
    slot: Slot,
    /// The new socket, once it is mailed.
    to: Option<usize>,
}

struct Peer {
    program: Application,
    stream: Option<usize>,
    moves: Option<Move>,
    over: bool,
}

/// All peers, by connection.
pub struct Peers {
    stage: Rc<Stage>,
    kernel: Rc<RefCell<Kernel>>,
    plans: Vec<ConnectionPlan>,
    all: Vec<Peer>,
    random: Random,
}

impl Peers {
    /// The peers of a plan.
    pub fn new(
        stage: Rc<Stage>,
        kernel: Rc<RefCell<Kernel>>,
        plans: &[ConnectionPlan],
        mut random: Random,
    ) -> Self {
        let begin = |plan: &ConnectionPlan| Peer {
            program: Application::new(plan.peer.clone(), random.fork(), Now(0)),
            stream: None,
            moves: None,
            over: false,
        };
        let all = plans.iter().map(begin).collect();
        Self { stage, kernel, plans: plans.to_vec(), all, random }
    }

    /// The connection of a socket at which a peer may have something to do. A new one gets its program.
    pub fn look(&mut self, id: usize) -> Option<usize> {
        let kernel = self.kernel.borrow();
        let socket = &kernel.streams[id];
        let connection = socket.connection;
        let peer = self.all.get_mut(connection)?;
        if peer.stream.is_none() && socket.standing == Standing::Open && !socket.pair {
            peer.stream = Some(id);
            peer.program =
                Application::new(self.plans[connection].peer.clone(), self.random.fork(), self.stage.now());
        }
        Some(connection)
    }

    /// A service has got a stream: its end is socket `id`, whose other end worker `worker` has at `slot`.
    pub fn serve(&mut self, connection: usize, id: usize, worker: u8, slot: Slot) {
        let peer = &mut self.all[connection];
        if peer.stream.is_some() {
            // Of a SYN that came late, or came again when the clock had jumped: its program has been.
            self.kernel.borrow_mut().peer_resets(id);
            return;
        }
        self.kernel.borrow_mut().streams[id].connection = connection;
        peer.stream = Some(id);
        peer.program =
            Application::new(self.plans[connection].peer.clone(), self.random.fork(), self.stage.now());
        let plan = &self.plans[connection];
        let bytes = plan.peer.total + plan.guest.total;
        let after = self.random.below(bytes + 1);
        peer.moves = self.random.chance(600_000).then_some(Move { after, worker, slot, to: None });
    }

    /// Whether the peer of a connection has nothing more to do.
    pub fn is_over(&self, connection: usize) -> bool {
        self.all[connection].over
    }

    /// Whether a connection has come as far as its peer.
    pub fn has_begun(&self, connection: usize) -> bool {
        self.all[connection].stream.is_some()
    }

    /// When the peer of a connection has something to do next.
    pub fn next(&self, connection: usize) -> Option<Now> {
        let peer = &self.all[connection];
        let id = peer.stream.filter(|_| !peer.over)?;
        let kernel = self.kernel.borrow();
        let socket = &kernel.streams[id];
        let room = if is_moving(peer) { 0 } else { socket.peer_room() };
        peer.program.next(room, socket.peer_available())
    }

    fn finish(&mut self, connection: usize, ending: Ending) {
        self.all[connection].over = true;
        let mut books = self.stage.books.borrow_mut();
        books.progress[connection].peer_over.get_or_insert(ending);
        drop(books);
        self.stage.trace(40, || format!("peer    {connection:>3} is over: {ending:?}"));
    }

    /// Runs the peer of a connection. Returns mail for a worker, if it has some.
    pub fn act(&mut self, connection: usize) -> Option<(u8, ToWorker<ModelSocket>)> {
        if self.all[connection].over {
            return None;
        }
        let id = self.all[connection].stream?;
        if self.kernel.borrow().streams[id].reset_by_host {
            self.finish(connection, Ending::Reset);
            return None;
        }
        self.read_and_write(connection, id);
        self.arrive_at_new_home(connection);
        let id = self.all[connection].stream?;
        let mut kernel = self.kernel.borrow_mut();
        let peer = &mut self.all[connection];
        let moving = is_moving(peer);
        if peer.program.resets() && !moving {
            self.stage.books.borrow_mut().progress[connection].disturbed = true;
            kernel.peer_resets(id);
            drop(kernel);
            self.stage.trace(41, || format!("peer    {connection:>3} resets"));
            self.finish(connection, Ending::GaveReset);
            return None;
        }
        if !moving && kernel.streams[id].peer_sees_end() && !peer.program.has_seen_end() {
            peer.program.end();
            let books = self.stage.books.borrow();
            let progress = &books.progress[connection];
            let right = progress.guest_end == Some(progress.peer_read);
            self.stage.check(right, || {
                format!("connection {connection}: the peer sees the end at {}", progress.peer_read)
            });
        }
        if !moving && peer.program.closes() {
            self.stage.books.borrow_mut().progress[connection].peer_end = Some(peer.program.written());
            kernel.peer_ends(id);
            self.stage.trace(42, || format!("peer    {connection:>3} closes"));
        }
        let closed = kernel.streams[id].closed_by_host;
        let done = peer.program.has_closed() && peer.program.has_seen_end();
        drop(kernel);
        if done {
            self.finish(connection, Ending::Closed);
        } else if closed && !moving && !self.all[connection].program.has_closed() {
            // Whatever it writes now is answered by a reset.
            self.finish(connection, Ending::Reset);
        }
        self.hand_over(connection)
    }

    fn read_and_write(&mut self, connection: usize, id: usize) {
        let now = self.stage.now();
        let mut kernel = self.kernel.borrow_mut();
        let peer = &mut self.all[connection];
        loop {
            let read = peer.program.read_some(now, kernel.streams[id].peer_available());
            if read > 0 {
                kernel.peer_reads(id, read);
                self.stage.books.borrow_mut().progress[connection].peer_read = peer.program.read();
            }
            let room = if is_moving(peer) { 0 } else { kernel.streams[id].peer_room() };
            let wrote = peer.program.write(now, room);
            if wrote > 0 {
                self.stage.books.borrow_mut().progress[connection].peer_wrote = peer.program.written();
                kernel.peer_writes(id, wrote);
                self.stage.trace(0x43 | wrote << 8, || format!("peer    {connection:>3} writes {wrote}"));
            }
            if read == 0 && wrote == 0 {
                return;
            }
        }
    }

    /// The time may have come to hand the stream over to another socket.
    fn hand_over(&mut self, connection: usize) -> Option<(u8, ToWorker<ModelSocket>)> {
        let peer = &mut self.all[connection];
        let done = peer.program.read() + peer.program.written();
        let ended = peer.program.has_closed() || peer.program.has_seen_end() || peer.over;
        let planned =
            peer.moves.as_mut().filter(|planned| planned.to.is_none() && done >= planned.after && !ended)?;
        let Opening::Service { remote, .. } = self.plans[connection].opening else { return None };
        let local = crate::frame::address::Endpoint { address: own_address(true), port: 50_001 };
        let plan = &self.plans[connection];
        let buffers = (plan.send_buffer, plan.receive_buffer);
        let socket = StreamSocket::new(connection, local, remote, Standing::Open, buffers);
        let (id, fd) = self.kernel.borrow_mut().add_stream(socket);
        planned.to = Some(id);
        let (worker, slot) = (planned.worker, planned.slot);
        self.stage.books.borrow_mut().progress[connection].moving = true;
        self.stage.trace(44, || format!("peer    {connection:>3} moves to another socket"));
        let socket = ModelSocket::new(fd, &self.kernel);
        Some((worker, ToWorker::Rehome { stream: slot, socket, peer: remote }))
    }

    /// The old end has come to its end of file: the program goes on at the new socket.
    fn arrive_at_new_home(&mut self, connection: usize) {
        let peer = &mut self.all[connection];
        let (Some(old), Some(Move { to: Some(new), .. })) = (peer.stream, peer.moves) else { return };
        let mut kernel = self.kernel.borrow_mut();
        if old == new || !kernel.streams[old].peer_sees_end() {
            return;
        }
        let (taken, arrived) = (kernel.streams[old].taken, kernel.streams[old].arrived);
        let socket = &mut kernel.streams[new];
        (socket.taken, socket.delivered) = (taken, taken);
        (socket.arrived, socket.consumed) = (arrived, arrived);
        kernel.peer_ends(old);
        drop(kernel);
        peer.stream = Some(new);
        self.stage.books.borrow_mut().progress[connection].moving = false;
        self.stage.trace(45, || format!("peer    {connection:>3} has moved"));
    }
}

fn is_moving(peer: &Peer) -> bool {
    peer.moves.is_some_and(|planned| planned.to.is_some() && planned.to != peer.stream)
}
