//! A front-end of another make: what the protocol says, word for word, and what hythe makes of a driver that is wrong.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;

use nix::sys::signal::Signal;
use vhost::VhostBackend;
use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserInflight, VhostUserProtocolFeatures};

use crate::peer::{
    BUFFERS, Connection, GUEST_MAC, MEMORY, MRG_RXBUF, Machine, OFFERED, QUEUE, RECEIVE, TRANSMIT, VERSION_1,
    bits, question,
};
use crate::rig::cell::{Cell, Engine};
use crate::rig::directory::Directory;
use crate::rig::wait::wait_until;
use crate::ring::Memory;

const ONE_PAIR: Cell = Cell::new(Engine::IoUring, 1);

#[test]
fn frames_go_to_and_fro_and_every_chain_comes_back_once() {
    let connection = Connection::new(ONE_PAIR);
    let mut machine = Machine::new(&connection, 2);
    machine.attach();
    machine.offer(20);
    for round in 0..10u32 {
        machine.ask(round, BUFFERS);
        machine.kick();
        machine.expect_back(round as usize + 1, round as usize + 1);
    }
    for (_, len) in &machine.queues[RECEIVE].back {
        // Virtio-net header, Ethernet, ARP.
        assert_eq!(*len, 12 + 14 + 28);
    }
    let answer = machine.memory.bytes(BUFFERS + 0x1_0000, 54);
    assert_eq!(answer[10..12], [1, 0], "one buffer");
    assert_eq!(answer[12..18], GUEST_MAC);
    assert_eq!(answer[24..34], [8, 6, 0, 1, 8, 0, 6, 4, 0, 2], "an ARP reply");
    assert!(machine.queues[RECEIVE].call.read().unwrap() > 0, "interrupts have come");
    assert_eq!(connection.hythe().counters().get("frames_out"), 10);
}

#[test]
fn what_was_not_offered_is_refused_and_the_front_end_may_go_on() {
    let connection = Connection::new(ONE_PAIR);
    let mut machine = Machine::new(&connection, 2);
    machine.negotiate(&OFFERED);
    let frontend = &mut machine.frontend;
    for wrong in [&[VERSION_1, 34][..], &[VERSION_1, 22], &[MRG_RXBUF]] {
        assert!(frontend.set_features(bits(wrong)).is_err(), "{wrong:?}");
    }
    wait_until("the user to be told", || connection.hythe().log().contains("VIRTIO_F_VERSION_1"));
    assert!(frontend.set_features(bits(&OFFERED)).is_ok());
    assert!(frontend.set_mem_table(&[machine.memory.region()]).is_ok());
    machine.start([0, 0]);
    machine.expect_answer(1);
}

#[test]
fn the_guest_reads_its_mac_status_and_mtu() {
    let connection = Connection::new(ONE_PAIR);
    let mut machine = Machine::new(&connection, 2);
    machine.negotiate(&OFFERED);
    let flags = VhostUserConfigFlags::empty();
    let (_, space) = machine.frontend.get_config(0, 12, flags, &[0; 12]).unwrap();
    assert_eq!(space[..6], GUEST_MAC);
    assert_eq!(space[6..], [1, 0, 1, 0, 0xdc, 5], "the link is up, one pair, 1500 bytes");
}

#[test]
fn memory_comes_and_goes_in_slots() {
    let connection = Connection::new(ONE_PAIR);
    let mut machine = Machine::new(&connection, 2);
    machine.negotiate(&OFFERED);
    let protocol = machine.frontend.get_protocol_features().unwrap();
    assert!(protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS));
    assert!(machine.frontend.get_max_mem_slots().unwrap() >= 8);
    machine.frontend.add_mem_region(&machine.memory.region()).unwrap();
    machine.start([0, 0]);
    machine.offer(8);
    // A hot-plugged piece of memory, from which frames come too.
    let plugged = Memory::at(0x8000_0000, MEMORY);
    machine.frontend.add_mem_region(&plugged.region()).unwrap();
    plugged.write(0x8000_0000, &question(1));
    machine.queues[TRANSMIT].offer(0x8000_0000, question(1).len() as u32, false);
    machine.kick();
    machine.expect_back(1, 1);
    // It goes away, and the driver does not know.
    machine.frontend.remove_mem_region(&plugged.region()).unwrap();
    machine.ask(2, BUFFERS);
    machine.kick();
    machine.expect_back(2, 2);
    machine.queues[TRANSMIT].offer(0x8000_0000, 60, false);
    machine.kick();
    wait_until("the fault to be counted", || connection.hythe().counters().get("dropped_queue_fault") == 1);
    wait_until("the fault to be told", || connection.hythe().log().contains("outside of the guest's memory"));
    // The other queue goes on, and a driver that starts anew is served.
    machine.frontend.get_vring_base(1).unwrap();
    machine.queues[TRANSMIT].clear();
    let next = machine.frontend.get_vring_base(0).unwrap() as u16;
    machine.start([next, 0]);
    machine.ask(3, BUFFERS);
    machine.kick();
    machine.expect_back(3, 1);
}

#[test]
fn memory_that_cannot_be_mapped_is_refused_and_told() {
    let connection = Connection::new(ONE_PAIR);
    let mut machine = Machine::new(&connection, 2);
    machine.negotiate(&OFFERED);
    let mut short = tempfile();
    short.write_all(&[0; 4096]).unwrap();
    let region = VhostUserMemoryRegionInfo { mmap_handle: short.as_raw_fd(), ..machine.memory.region() };
    assert!(machine.frontend.set_mem_table(&[region]).is_err());
    wait_until("the user to be told", || connection.hythe().log().contains("cannot be mapped"));
}

fn tempfile() -> File {
    let directory = Directory::new();
    File::options().read(true).write(true).create_new(true).open(directory.path().join("memory")).unwrap()
}

#[test]
fn a_ring_that_is_stopped_tells_where_and_goes_on_from_there() {
    let connection = Connection::new(ONE_PAIR);
    let mut machine = Machine::new(&connection, 2);
    machine.attach();
    machine.offer(60);
    for round in 1..=25u32 {
        machine.ask(round, BUFFERS);
        machine.kick();
        if round % 5 == 0 {
            // In the middle of traffic: whatever was taken has come back, and the rest comes after the restart.
            let next = [0, 1].map(|index| machine.frontend.get_vring_base(index).unwrap() as u16);
            let back = [machine.back(RECEIVE), machine.back(TRANSMIT)].map(|len| len as u16);
            assert_eq!(next, back);
            machine.start(next);
        }
    }
    machine.kick();
    wait_until("every question to come back", || machine.back(TRANSMIT) == 25);
    machine.assert_in_order();
}

#[test]
fn a_hythe_that_is_killed_leaves_nothing_that_another_could_not_go_on_from() {
    let mut connection = Connection::new(ONE_PAIR);
    let mut machine = Machine::new(&connection, 2);
    machine.attach();
    for round in 0..50u32 {
        machine.offer(1);
        machine.ask(round, BUFFERS);
        machine.kick();
        if round % 2 == 0 {
            let before = machine.queues[RECEIVE].back.len();
            wait_until("an answer", || machine.back(RECEIVE) > before);
        }
        connection.restart(Cell::new(if round % 4 < 2 { Engine::Epoll } else { Engine::IoUring }, 1));
        machine.frontend = connection.connect();
        machine.negotiate(&OFFERED);
        machine.share_memory();
        // As QEMU does: what was not given back is taken again.
        let back = [machine.back(RECEIVE), machine.back(TRANSMIT)].map(|len| len as u16);
        machine.start(back);
        machine.expect_questions(round as usize + 1);
    }
    machine.assert_in_order();
}

/// What a hythe that is killed had in hand comes back once, whatever the front-end believes of the rings: it holds the area
/// for buffers in flight, and says where they began (vhost-user, "Inflight I/O tracking").
#[test]
fn buffers_in_flight_when_hythe_is_killed_come_back_once() {
    let mut connection = Connection::new(ONE_PAIR);
    let mut machine = Machine::new(&connection, 2);
    let wanted = VhostUserInflight { num_queues: 2, queue_size: QUEUE, ..VhostUserInflight::default() };
    let mut area = None;
    machine.offer(60);
    for round in 1..=50 {
        machine.negotiate(&OFFERED);
        let frontend = &mut machine.frontend;
        let (shape, file) = area.get_or_insert_with(|| frontend.get_inflight_fd(&wanted).unwrap());
        frontend.set_inflight_fd(shape, file.as_raw_fd()).unwrap();
        machine.share_memory();
        machine.start([0, 0]);
        machine.expect_questions(round - 1);
        machine.ask(round as u32, BUFFERS);
        machine.kick();
        connection.restart(Cell::new(if round % 2 == 0 { Engine::IoUring } else { Engine::Epoll }, 1));
        machine.frontend = connection.connect();
    }
    machine.assert_in_order();
}

#[test]
fn front_ends_may_come_and_go_and_say_anything() {
    let connection = Connection::new(ONE_PAIR);
    drop(Machine::new(&connection, 2));
    for words in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 200], &[1, 0, 0, 0], &[5, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0]]
    {
        let mut stream = std::os::unix::net::UnixStream::connect(connection.socket()).unwrap();
        // hythe may have hung up before the end.
        let _ = stream.write_all(words);
    }
    let mut machine = Machine::new(&connection, 2);
    machine.attach();
    machine.expect_answer(1);
    let hythe = connection.hythe.unwrap();
    hythe.signal(Signal::SIGTERM);
    hythe.end().assert_clean(0);
    assert_eq!(connection.directory.names(), [""; 0], "the socket is gone");
}
