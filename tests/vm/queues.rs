//! Several pairs of queues: one worker each, of which the guest uses as many as it likes.

use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VringConfigData};

use crate::machine::Machine as Guest;
use crate::peer::{BUFFERS, CTRL_VQ, Connection, MQ, Machine, OFFERED, QUEUE, RECEIVE, bits};
use crate::rig::bytes::expect_echo;
use crate::rig::cell::{Cell, Engine};
use crate::rig::site::FAMILIES;
use crate::rig::wait::wait_until;
use crate::streams::{End, converse};
use crate::world::{GUEST_PORT, PORT, World, expect_service};

const TWO_PAIRS: Cell = Cell::new(Engine::IoUring, 2);

/// The pairs of queues by their numbers, and the control queue behind them.
pub const PAIRS: [[usize; 2]; 2] = [[0, 1], [2, 3]];
const CONTROL: usize = 4;

fn offered() -> Vec<u32> {
    [&OFFERED[..], &[CTRL_VQ, MQ]].concat()
}

/// A machine with two pairs and a control queue.
pub fn machine_of_two(connection: &Connection) -> Machine {
    let mut machine = Machine::new(connection, 5);
    machine.negotiate(&offered());
    machine.share_memory();
    machine
}

#[test]
fn each_pair_is_served_and_says_so() {
    let connection = Connection::new(TWO_PAIRS);
    let mut machine = machine_of_two(&connection);
    let protocol = machine.frontend.get_protocol_features().unwrap();
    assert!(protocol.contains(VhostUserProtocolFeatures::MQ));
    let (_, space) = machine.frontend.get_config(0, 12, VhostUserConfigFlags::empty(), &[0; 12]).unwrap();
    assert_eq!(space[8..10], [2, 0], "max_virtqueue_pairs");
    machine.start([0; 5]);
    machine.set_pairs(2, 0);
    for pair in PAIRS {
        machine.expect_answer_on(pair, 1);
    }
    // One that reads the config space has the control queue to count; others have one of their own.
    assert_eq!(machine.frontend.get_queue_num().unwrap(), 5);
    machine.frontend.set_protocol_features(protocol - VhostUserProtocolFeatures::CONFIG).unwrap();
    assert_eq!(machine.frontend.get_queue_num().unwrap(), 2);
}

impl Machine {
    /// Asks over the control queue for so many pairs, and expects an answer (virtio 1.3, 5.1.6.5.5).
    pub fn set_pairs(&mut self, pairs: u16, expected: u8) {
        let request = [&[4, 0][..], &pairs.to_le_bytes()].concat();
        self.control(&request, expected);
    }

    fn control(&mut self, request: &[u8], expected: u8) {
        let (question, answer) = (BUFFERS + 0x2_0000, BUFFERS + 0x2_1000);
        self.memory.write(question, request);
        self.memory.write(answer, &[0xff]);
        let before = self.back(CONTROL);
        self.queues[CONTROL].offer_request((question, request.len() as u32), (answer, 1));
        self.kick();
        wait_until("the answer", || self.back(CONTROL) == before + 1);
        assert_eq!(self.memory.bytes(answer, 1), [expected], "{request:?}");
        wait_until("the driver to be told", || self.queues[CONTROL].call.read().is_ok());
    }
}

#[test]
fn the_driver_switches_pairs_over_the_control_queue() {
    let connection = Connection::new(TWO_PAIRS);
    let mut machine = machine_of_two(&connection);
    machine.start([0; 5]);
    machine.set_pairs(2, 0);
    for pair in PAIRS {
        machine.expect_answer_on(pair, 1);
    }
    for round in 2..20 {
        machine.set_pairs(1, 0);
        let [receive, transmit] = PAIRS[1];
        let before = [machine.back(receive), machine.back(transmit)];
        // The driver may have put it there before it heard that it was not to: it comes back, and is answered elsewhere.
        machine.offer_on(receive, 1);
        machine.offer(1);
        let answers = machine.back(RECEIVE);
        machine.ask_on(transmit, round, BUFFERS);
        machine.kick();
        wait_until("the question to come back", || machine.back(transmit) == before[1] + 1);
        wait_until("the answer", || machine.back(RECEIVE) == answers + 1);
        assert_eq!(machine.back(receive), before[0], "a receive queue that is off is left alone");
        machine.expect_answer(round);
        machine.set_pairs(2, 0);
        for pair in PAIRS {
            machine.expect_answer_on(pair, round);
        }
    }
    for wrong in
        [&[4, 0, 3, 0][..], &[4, 0, 0, 0], &[4, 1, 1, 0], &[0, 0, 1], &[4, 0, 1], &[4], &[4, 0, 1, 0, 0]]
    {
        // More than four bytes is a longer request, of which the first four count.
        machine.control(wrong, u8::from(wrong.len() <= 4));
    }
    machine.assert_in_order();
}

#[test]
fn a_driver_that_takes_no_pairs_has_one_and_finds_the_control_queue_behind_it() {
    let connection = Connection::new(TWO_PAIRS);
    let mut machine = machine_of_two(&connection);
    let features: Vec<u32> = offered().into_iter().filter(|bit| *bit != MQ).collect();
    machine.frontend.set_features(bits(&features)).unwrap();
    machine.queues.swap(2, CONTROL);
    machine.start([0; 3]);
    machine.queues.swap(2, CONTROL);
    machine.set_pairs(2, 1);
    machine.set_pairs(1, 0);
    machine.expect_answer(1);
}

#[test]
fn frames_in_a_queue_that_is_disabled_come_back_unsent() {
    let connection = Connection::new(TWO_PAIRS);
    let mut machine = machine_of_two(&connection);
    // One that has its own control queue switches pairs by enabling rings.
    let protocol = machine.frontend.get_protocol_features().unwrap();
    machine.frontend.set_protocol_features(protocol - VhostUserProtocolFeatures::CONFIG).unwrap();
    let [receive, transmit] = PAIRS[0];
    for index in [receive, transmit] {
        machine.set_up(index, 0);
    }
    machine.offer(2);
    machine.ask(1, BUFFERS);
    machine.kick();
    machine.expect_back(0, 1);
    for index in [receive, transmit] {
        machine.frontend.set_vring_enable(index, true).unwrap();
    }
    machine.ask(2, BUFFERS);
    machine.kick();
    machine.expect_back(1, 2);
}

/// User-Mode Linux stops a ring by disabling it; what lay there is somebody else's from then on.
#[test]
fn a_ring_is_left_alone_once_it_is_disabled_by_who_reads_the_config_space() {
    const FOREIGN: u8 = 0xa5;
    let connection = Connection::new(TWO_PAIRS);
    let mut machine = machine_of_two(&connection);
    let [receive, _] = PAIRS[0];
    for round in 0..5 {
        machine.start([0, 0]);
        machine.offer(2);
        machine.ask(round, BUFFERS);
        machine.kick();
        machine.expect_back(1, 1);
        for index in PAIRS[0] {
            machine.frontend.set_vring_enable(index, false).unwrap();
        }
        for index in PAIRS[0] {
            machine.queues[index].overwrite_used(&machine.memory, FOREIGN);
        }
        // The worker hears of each: it has passed in between.
        for _ in 0..4 {
            machine.kick();
            machine.frontend.set_vring_call(receive, &machine.queues[receive].call).unwrap();
        }
        for index in PAIRS[0] {
            machine.queues[index].assert_used_is(&machine.memory, FOREIGN);
            machine.queues[index].clear();
        }
    }
}

#[test]
fn a_control_queue_that_is_wrong_stops_and_nothing_else_does() {
    let connection = Connection::new(TWO_PAIRS);
    let mut machine = machine_of_two(&connection);
    machine.start([0; 5]);
    machine.queues[CONTROL].offer(0x10, 4, false);
    machine.kick();
    wait_until("the user to be told", || connection.hythe().log().contains("outside of the guest's memory"));
    machine.expect_answer(1);
}

#[test]
fn a_pair_that_cannot_run_keeps_no_other_from_running() {
    let connection = Connection::new(TWO_PAIRS);
    let mut machine = machine_of_two(&connection);
    machine.start([0; 5]);
    machine.set_pairs(2, 0);
    let nowhere = VringConfigData {
        queue_max_size: QUEUE,
        queue_size: QUEUE,
        flags: 0,
        desc_table_addr: 0x1000,
        used_ring_addr: 0x2000,
        avail_ring_addr: 0x3000,
        log_addr: None,
    };
    assert!(machine.frontend.set_vring_addr(RECEIVE, &nowhere).is_err());
    // All pairs are attached anew with the memory.
    assert!(machine.frontend.set_mem_table(&[machine.memory.region()]).is_err());
    machine.expect_answer_on(PAIRS[1], 1);
}

/// Conversations with the guest go on while its queues are switched, all of them with each number of queues.
fn conversations_outlast_switches(world: World) {
    const BYTES: u64 = 2 << 20;
    world.vm.serve(GUEST_PORT);
    let streams: Vec<TcpStream> = FAMILIES
        .into_iter()
        .cycle()
        .take(8)
        .map(|family| world.site.far.connect((family.host(), PORT)).unwrap())
        .collect();
    let moved: Vec<AtomicU64> = streams.iter().map(|_| AtomicU64::new(0)).collect();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let end = End(&is_over);
        for (stream, moved) in streams.iter().zip(&moved) {
            scope.spawn(|| converse(stream, &is_over, moved));
        }
        for round in 0..10 {
            world.vm.command(&format!("talker queues eth0 {}", 1 + round % 2));
            let before: Vec<u64> = moved.iter().map(|moved| moved.load(Ordering::Acquire)).collect();
            let goes_on =
                |(moved, before): (&AtomicU64, &u64)| moved.load(Ordering::Acquire) >= before + BYTES;
            wait_until("every conversation to go on", || moved.iter().zip(&before).all(goes_on));
        }
        drop(end);
    });
    expect_service(&world.vm, &world.site);
    // What makes a detour, and finds the stand-in's queue or its mailbox full, is sent again; a guest that has missed an
    // acknowledgement goes on by an old window, and one that has missed the last one answers when the connection is over.
    let expected = ["link_full", "worker_full", "out_of_window", "no_flow"];
    world.finish_with(|cause| expected.contains(&cause));
}

#[test]
fn conversations_outlast_switches_that_the_guests_driver_makes() {
    conversations_outlast_switches(World::new(Guest::UserModeLinux, TWO_PAIRS));
}

#[test]
fn conversations_outlast_switches_that_the_front_end_makes() {
    conversations_outlast_switches(World::new(Guest::QemuOfTwo, Cell::new(Engine::Epoll, 2)));
}

/// More pairs than the guest has processors: clients that come to a worker whose queues are off are served all the same.
#[test]
fn every_client_is_served_whichever_worker_accepts_it() {
    for guest in [Guest::UserModeLinux, Guest::QemuOfTwo] {
        let world = World::new(guest, Cell::new(Engine::IoUring, 4));
        world.vm.serve(GUEST_PORT);
        for family in FAMILIES {
            let clients: Vec<TcpStream> =
                (0..24).map(|_| world.site.far.connect((family.host(), PORT)).unwrap()).collect();
            for (number, client) in clients.iter().enumerate() {
                expect_echo(client, format!("client {number}").as_bytes());
            }
        }
        expect_service(&world.vm, &world.site);
        world.finish();
    }
}
