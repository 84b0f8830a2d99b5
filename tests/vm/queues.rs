//! Several pairs of queues: one worker each, of which the guest uses as many as it likes.

use std::net::TcpStream;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};

use crate::machine::Machine as Guest;
use crate::peer::{CTRL_VQ, Connection, MQ, Machine, OFFERED};
use crate::rig::bytes::expect_echo;
use crate::rig::cell::{Cell, Engine};
use crate::rig::site::FAMILIES;
use crate::rig::wait::wait_until;
use crate::ring::BUFFERS;
use crate::streams::while_conversing;
use crate::world::{GUEST_PORT, PORT, World, expect_service};

const TWO_PAIRS: Cell = Cell::new(Engine::IoUring, 2);

/// The pairs of queues by their numbers, and the control queue behind them.
const PAIRS: [[usize; 2]; 2] = [[0, 1], [2, 3]];
const CONTROL: usize = 4;

fn offered() -> Vec<u32> {
    [&OFFERED[..], &[CTRL_VQ, MQ]].concat()
}

/// A machine with two pairs and a control queue.
fn machine_of_two(connection: &Connection) -> Machine {
    let mut machine = Machine::new(connection, 5);
    machine.negotiate(&offered());
    machine.frontend.set_mem_table(&[machine.memory.region()]).unwrap();
    machine
}

/// Asks on each pair, in turn; the answers come back on the pairs in `expected`.
fn expect_answers(machine: &mut Machine, number: u32, expected: [usize; 2]) {
    for (pair, answered) in expected.into_iter().enumerate() {
        let [_, transmit] = PAIRS[pair];
        let [receive, _] = PAIRS[answered];
        let before = [machine.back(receive), machine.back(transmit)];
        machine.offer_on(receive, 1);
        machine.ask_on(transmit, number, BUFFERS + 0x1000 * pair as u64);
        machine.kick();
        machine.expect_back_on([receive, transmit], before[0] + 1, before[1] + 1);
    }
}

#[test]
fn each_pair_is_served_and_says_so() {
    let connection = Connection::new(TWO_PAIRS);
    let mut machine = machine_of_two(&connection);
    let protocol = machine.frontend.get_protocol_features().unwrap();
    assert!(protocol.contains(VhostUserProtocolFeatures::MQ));
    let (_, space) = machine.frontend.get_config(0, 12, VhostUserConfigFlags::empty(), &[0; 12]).unwrap();
    assert_eq!(space[8..10], [2, 0], "max_virtqueue_pairs");
    for index in 0..5 {
        machine.set_up(index, 0);
        machine.frontend.set_vring_enable(index, true).unwrap();
    }
    machine.set_pairs(2, 0);
    expect_answers(&mut machine, 1, [0, 1]);
    // One that reads the config space has the control queue to count; others have one of their own.
    assert_eq!(machine.frontend.get_queue_num().unwrap(), 5);
    machine.frontend.set_protocol_features(protocol - VhostUserProtocolFeatures::CONFIG).unwrap();
    assert_eq!(machine.frontend.get_queue_num().unwrap(), 2);
}

impl Machine {
    /// Asks over the control queue for so many pairs, and expects an answer (virtio 1.3, 5.1.6.5.5).
    fn set_pairs(&mut self, pairs: u16, expected: u8) {
        let request = [&[4, 0][..], &pairs.to_le_bytes()].concat();
        self.control(&request, expected);
    }

    fn control(&mut self, request: &[u8], expected: u8) {
        let (question, answer) = (BUFFERS + 0x2_0000, BUFFERS + 0x2_1000);
        self.memory.write(question, request);
        self.memory.write(answer, &[0xff]);
        let before = self.back(CONTROL);
        self.queues[CONTROL].ring.offer_request(&self.memory, (question, request.len() as u32), (answer, 1));
        self.kick();
        wait_until("the answer", || self.back(CONTROL) == before + 1);
        assert_eq!(self.memory.read(answer, 1), [expected], "{request:?}");
        assert!(self.queues[CONTROL].call.read().is_ok(), "the driver was told");
    }
}

#[test]
fn the_driver_switches_pairs_over_the_control_queue() {
    let connection = Connection::new(TWO_PAIRS);
    let mut machine = machine_of_two(&connection);
    for index in 0..5 {
        machine.set_up(index, 0);
        machine.frontend.set_vring_enable(index, true).unwrap();
    }
    machine.set_pairs(2, 0);
    expect_answers(&mut machine, 1, [0, 1]);
    for round in 2..20 {
        machine.set_pairs(1, 0);
        let [_, transmit] = PAIRS[1];
        let before = machine.back(transmit);
        machine.ask_on(transmit, round, BUFFERS);
        expect_answers_on_first(&mut machine, round);
        assert_eq!(machine.back(transmit), before, "a queue that is off is left alone");
        machine.offer_on(PAIRS[1][0], 1);
        machine.set_pairs(2, 0);
        // What lay there is taken now.
        machine.kick();
        wait_until("the question to be taken", || machine.back(transmit) == before + 1);
        expect_answers(&mut machine, round, [0, 1]);
    }
    for wrong in
        [&[4, 0, 3, 0][..], &[4, 0, 0, 0], &[4, 1, 1, 0], &[0, 0, 1], &[4, 0, 1], &[4], &[4, 0, 1, 0, 0]]
    {
        // More than four bytes is a longer request, of which the first four count.
        machine.control(wrong, u8::from(wrong.len() <= 4));
    }
    machine.assert_in_order();
}

fn expect_answers_on_first(machine: &mut Machine, number: u32) {
    let [receive, transmit] = PAIRS[0];
    let before = [machine.back(receive), machine.back(transmit)];
    machine.offer_on(receive, 1);
    machine.ask_on(transmit, number, BUFFERS + 0x3000);
    machine.kick();
    machine.expect_back_on([receive, transmit], before[0] + 1, before[1] + 1);
}

#[test]
fn a_control_queue_that_is_wrong_stops_and_nothing_else_does() {
    let connection = Connection::new(TWO_PAIRS);
    let mut machine = machine_of_two(&connection);
    for index in 0..5 {
        machine.set_up(index, 0);
        machine.frontend.set_vring_enable(index, true).unwrap();
    }
    machine.queues[CONTROL].ring.offer(&machine.memory, 0x10, 4, false);
    machine.kick();
    wait_until("the user to be told", || connection.hythe().log().contains("outside of the guest's memory"));
    expect_answers_on_first(&mut machine, 1);
}

/// Conversations with the guest go on while its queues are switched.
fn outlasts_switching(world: &World, switch: impl Fn(u32)) {
    world.vm.serve(GUEST_PORT);
    while_conversing(world, &[FAMILIES, FAMILIES].concat(), || {
        for round in 0..10 {
            switch(1 + round % 2);
            expect_service(&world.vm, &world.site);
        }
    });
}

fn switch_guest(world: &World, pairs: u32) {
    world.vm.command(&format!("talker queues eth0 {pairs}"));
    let wanted = if pairs == 1 { "1 pair of queues" } else { "2 pairs of queues" };
    wait_until("the switch", || {
        world
            .hythe
            .log()
            .lines()
            .rfind(|line| line.contains("of queues"))
            .is_some_and(|line| line.contains(wanted))
    });
}

#[test]
fn conversations_outlast_a_switch_that_the_guests_driver_makes() {
    let world = World::new(Guest::UserModeLinux, TWO_PAIRS);
    outlasts_switching(&world, |pairs| switch_guest(&world, pairs));
    // What makes a detour, and finds the stand-in's queue full, is sent again.
    world.finish_with(|cause| cause == "link_full");
}

#[test]
fn conversations_outlast_a_switch_that_the_front_end_makes() {
    let world = World::new(Guest::QemuOfTwo, Cell::new(Engine::Epoll, 2));
    outlasts_switching(&world, |pairs| switch_guest(&world, pairs));
    // What makes a detour, and finds the stand-in's queue full, is sent again.
    world.finish_with(|cause| cause == "link_full");
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
