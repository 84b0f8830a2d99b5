//! The relay's behaviour as exchanges of segments. Numbers are relative to each side's first.

use std::time::Duration;

use super::receive::Payload;
use super::script::{LINUX_SYN, Script};
use super::{Disposition, Over, State, TcpRelay};
use crate::frame::drop_reason::DropReason;

const MS: Duration = Duration::from_millis(1);
const S: Duration = Duration::from_secs(1);

fn refused(reason: DropReason) -> Disposition {
    Disposition::Payload(Payload::Refuse(reason))
}

#[test]
fn the_record_of_an_idle_connection_is_small() {
    let size = size_of::<TcpRelay>();
    println!("TcpRelay: {size} bytes");
    assert!(size <= 240, "{size}");
}

// Opening.

#[test]
fn syn_ack_waits_for_the_host_to_be_connected() {
    let mut s = Script::outbound(LINUX_SYN);
    s.quiet();
    s.guest(LINUX_SYN);
    s.wait(3 * S);
    s.quiet();
    s.relay.connected(s.now);
    s.expect("S. 0 ack 1 mss 1460");
    s.guest(". 1 ack 1 win 64256");
    assert_eq!(s.relay.state(), State::Open);
    s.quiet();
}

#[test]
fn a_refused_connect_is_a_reset_that_acknowledges_the_syn() {
    let mut s = Script::outbound(LINUX_SYN);
    s.relay.host_failed();
    let reset = s.relay.poll_segment(&s.config, s.now).unwrap();
    assert_eq!(reset.seq.0, 0, "RFC 9293, 3.10.7.1: there is no acknowledgement to take the number from");
    assert_eq!(s.relay.over(), Some(Over::HostFailed));
}

#[test]
fn a_lost_syn_ack_is_sent_again_when_the_guest_asks_and_when_time_is_up() {
    let mut s = Script::outbound(LINUX_SYN);
    s.relay.connected(s.now);
    s.expect("S. 0 ack 1");
    s.quiet();
    s.guest(LINUX_SYN);
    s.expect("S. 0 ack 1");
    s.wait(3 * S);
    s.expect("S. 0 ack 1");
}

#[test]
fn an_inbound_connection_opens_with_syn_from_hythe() {
    let mut s = Script::inbound();
    s.expect("S 0 mss 1460");
    s.quiet();
    s.guest("S. 0 ack 1 win 65160 mss 1460 wscale 7 sackok ts 1/0");
    s.expect(". 1 ack 1");
    assert_eq!(s.relay.state(), State::Open);
    s.host_data(10, "P. 1 ack 1 len 10");
}

#[test]
fn a_guest_that_refuses_or_is_silent_ends_an_inbound_connection() {
    let mut s = Script::inbound();
    s.expect("S 0");
    s.guest("R. 0 ack 1");
    assert_eq!(s.relay.over(), Some(Over::GuestRefused));

    let mut s = Script::inbound();
    s.expect("S 0");
    for wait in [1, 2, 4, 8] {
        s.wait(wait * S);
        s.expect("S 0");
    }
    s.wait(16 * S);
    assert_eq!(s.relay.over(), Some(Over::GuestSilent));
    s.expect("R 1");
}

#[test]
fn both_sides_may_open_at_once() {
    let mut s = Script::inbound();
    s.expect("S 0");
    s.guest("S 0 win 65160 mss 1460 wscale 7 sackok ts 1/0");
    s.expect("S. 0 ack 1");
    s.guest(". 1 ack 1 win 64256");
    assert_eq!(s.relay.state(), State::Open);
}

#[test]
fn an_acknowledgement_of_something_else_is_reset_while_opening() {
    let mut s = Script::inbound();
    s.expect("S 0");
    assert_eq!(s.guest_gives(". 5 ack 77"), refused(DropReason::OutOfWindow));
    s.expect("R 77");
    assert_eq!(s.relay.state(), State::Offering);
}

#[test]
fn a_new_syn_on_the_port_of_a_pending_connect_opens_anew() {
    let mut s = Script::outbound(LINUX_SYN);
    assert_eq!(s.guest_gives("S 5000 win 64240"), Disposition::Reopen);
}

// Guest to host.

#[test]
fn data_in_order_is_taken_and_acknowledged() {
    let mut s = Script::open();
    s.guest_data("P. 1 ack 1 len 100 win 64256", 100);
    s.expect(". 1 ack 101");
    s.guest_data("P. 101 ack 1 len 60000 win 64256", 60000);
    s.expect(". 1 ack 60101");
    s.quiet();
}

#[test]
fn a_retransmission_is_trimmed_to_what_is_new() {
    let mut s = Script::open();
    s.guest_data(". 1 ack 1 len 100 win 64256", 100);
    s.expect(". 1 ack 101");
    let got = s.guest_gives(". 51 ack 1 len 100 win 64256");
    assert_eq!(got, Disposition::Payload(Payload::Take { skip: 50, len: 50, held: 0 }));
    s.expect(". 1 ack 151");
    assert_eq!(s.guest_gives(". 1 ack 1 len 100 win 64256"), refused(DropReason::OutOfWindow));
    s.expect(". 1 ack 151");
}

#[test]
fn out_of_order_segments_are_held_and_reported() {
    let mut s = Script::open();
    assert!(matches!(
        s.guest_gives(". 101 ack 1 len 100 win 64256"),
        Disposition::Payload(Payload::Hold { len: 100, .. })
    ));
    s.expect(". 1 ack 1 sack 101-201");
    assert!(matches!(
        s.guest_gives(". 301 ack 1 len 100 win 64256"),
        Disposition::Payload(Payload::Hold { .. })
    ));
    s.expect(". 1 ack 1 sack 301-401 sack 101-201");
    s.guest_data(". 1 ack 1 len 100 win 64256", 200);
    s.expect(". 1 ack 201 sack 301-401");
    s.guest_data(". 201 ack 1 len 150 win 64256", 200);
    s.expect(". 1 ack 401");
    assert_eq!(s.relay.receive().buffered(), 0);
}

#[test]
fn holding_is_bounded_in_ranges_and_bytes() {
    let mut s = Script::open();
    s.relay.offer(1 << 20, &s.config);
    for n in 0..4u32 {
        let line = format!(". {} ack 1 len 10 win 64256", 101 + n * 100);
        assert!(matches!(s.guest_gives(&line), Disposition::Payload(Payload::Hold { .. })), "{line}");
    }
    assert_eq!(s.guest_gives(". 901 ack 1 len 10 win 64256"), refused(DropReason::OutOfWindow));

    let mut s = Script::open();
    s.relay.offer(1 << 20, &s.config);
    for n in 0..4u32 {
        let line = format!(". {} ack 1 len 65535 win 64256", 101 + n * 65_535);
        assert!(matches!(s.guest_gives(&line), Disposition::Payload(Payload::Hold { .. })), "{line}");
    }
    assert_eq!(s.guest_gives(". 262241 ack 1 len 100 win 64256"), refused(DropReason::OutOfWindow));
}

#[test]
fn a_byte_is_held_once_however_often_it_comes() {
    let mut s = Script::open();
    let held = |s: &mut Script, line: &str| match s.guest_gives(line) {
        Disposition::Payload(Payload::Hold { len, .. }) => len,
        other => panic!("{line}: {other:?}"),
    };
    assert_eq!(held(&mut s, ". 101 ack 1 len 1000 win 64256"), 1000);
    assert_eq!(held(&mut s, ". 102 ack 1 len 1000 win 64256"), 1);
    assert_eq!(held(&mut s, ". 2001 ack 1 len 100 win 64256"), 100);
    assert_eq!(held(&mut s, ". 51 ack 1 len 5000 win 64256"), 50, "the first stretch that is new");
    assert_eq!(held(&mut s, ". 51 ack 1 len 5000 win 64256"), 899, "and the next one when it comes again");
    s.expect(". 1 ack 1 sack 51-2101");
}

#[test]
fn the_window_is_what_the_socket_and_the_buffer_take_and_its_edge_never_retreats() {
    let mut s = Script::open();
    s.relay.offer(100_000, &s.config);
    s.guest_data(". 1 ack 1 len 60000 win 64256", 60_000);
    // The socket is full all at once, and nothing of the next segment fits: it is buffered, and the edge stays.
    s.relay.offer(0, &s.config);
    s.expect(&format!(". 1 ack 60001 win {}", 100_000 + 65_536 - 60_000));
    match s.guest_gives(". 60001 ack 1 len 65000 win 64256") {
        Disposition::Payload(Payload::Take { len: 65_000, .. }) => {}
        other => panic!("{other:?}"),
    }
    s.relay.offer(0, &s.config);
    s.expect(&format!(". 1 ack 125001 win {}", 165_536 - 125_000));
    assert_eq!(s.relay.receive().buffered(), 65_000);
    // Room again: the guest hears of it without asking.
    s.relay.taken(65_000);
    s.relay.offer(50_000, &s.config);
    s.expect(&format!(". 1 ack 125001 win {}", 50_000 + 65_536));
    s.quiet();
}

#[test]
fn a_window_that_closed_opens_again_once_the_buffer_is_empty() {
    let mut s = Script::open();
    s.relay.offer(0, &s.config);
    assert!(matches!(
        s.guest_gives(". 1 ack 1 len 65535 win 64256"),
        Disposition::Payload(Payload::Take { .. })
    ));
    s.relay.offer(0, &s.config);
    s.expect(". 1 ack 65536 win 0");
    s.relay.taken(65_535);
    assert!(s.relay.wants_room(), "whatever was offered last");
    s.relay.offer(0, &s.config);
    s.expect(". 1 ack 65536 win 65536");
}

#[test]
fn bytes_beyond_the_window_are_not_taken() {
    let mut s = Script::open();
    let edge = 65_535;
    s.guest_data(&format!(". 1 ack 1 len {} win 64256", edge + 1000), edge);
    s.expect(&format!(". 1 ack {} win 65535", 1 + edge).replace("win 65535", "win 0"));
    assert_eq!(
        s.guest_gives(&format!(". {} ack 1 len 1 win 64256", 1 + edge)),
        refused(DropReason::OutOfWindow)
    );
    s.expect(&format!(". 1 ack {} win 0", 1 + edge));
}

#[test]
fn the_answer_carries_the_acknowledgement_once_a_conversation_goes_back_and_forth() {
    let mut s = Script::open();
    for turn in 0..3 {
        s.guest_data(&format!("P. {} ack {} len 1 win 64256", 1 + turn, 1 + turn), 1);
        // Not yet: the guest may be waiting for it.
        s.expect(&format!(". {} ack {}", 1 + turn, 2 + turn));
        s.host_data(1, &format!("P. {} ack {} len 1", 1 + turn, 2 + turn));
    }
    s.guest_data("P. 4 ack 4 len 1 win 64256", 1);
    s.quiet();
    s.host_data(1, "P. 4 ack 5 len 1");
    // No answer this time: the delay is short, and the next request is acknowledged at once.
    s.guest_data("P. 5 ack 5 len 1 win 64256", 1);
    s.quiet();
    s.wait(2 * MS);
    s.expect(". 5 ack 6");
    s.guest_data("P. 6 ack 5 len 1 win 64256", 1);
    s.expect(". 5 ack 7");
}

// Host to guest.

#[test]
fn data_goes_out_within_the_window_and_is_discarded_when_acknowledged() {
    let mut s = Script::open();
    s.host_data(100_000, ". 1 ack 1 len 64256");
    s.quiet();
    assert_eq!(s.relay.take_discard(), 0);
    s.guest(". 1 ack 64257 win 128000");
    assert_eq!(s.relay.take_discard(), 64_256);
    s.host_data(35_744, ". 64257 len 35744");
    s.guest(". 1 ack 100001 win 128000");
    assert_eq!(s.relay.take_discard(), 35_744);
    s.quiet();
}

#[test]
fn an_idle_connection_keeps_no_bytes_that_the_guest_has() {
    let mut s = Script::open();
    s.host_data(100, "P. 1 len 100");
    s.guest(". 1 ack 101 win 64256");
    assert!(!s.relay.wants_discard(), "a hundred bytes are not worth a system call");
    s.wait(2 * S);
    assert!(s.relay.wants_discard());
    assert_eq!(s.relay.take_discard(), 100);
    assert!(!s.relay.wants_discard());
    s.wait(60 * S);
    s.quiet();
}

#[test]
fn what_lies_unacknowledged_is_bounded() {
    let mut s = Script::open();
    s.guest(". 1 ack 1 win 8000000");
    s.host_data(u32::MAX, ". 1 len 1048576");
    s.quiet();
}

#[test]
fn three_duplicates_send_the_first_hole_again() {
    let mut s = Script::open();
    s.guest(". 1 ack 1 win 128000");
    s.host_data(14_480, ". 1 len 14480");
    for _ in 0..3 {
        s.guest(". 1 ack 1 win 128000");
    }
    s.send_wanted(u32::MAX, ". 1 len 1448");
    assert_eq!(s.relay.wanted(&s.config), None);
    s.guest(". 1 ack 2921 win 128000");
    // RFC 6582: a partial acknowledgement shows the next hole.
    s.send_wanted(u32::MAX, ". 2921 len 1448");
    s.guest(". 1 ack 14481 win 128000");
    s.quiet();
}

#[test]
fn sack_blocks_show_the_holes() {
    let mut s = Script::open();
    s.guest(". 1 ack 1 win 128000");
    s.host_data(60_000, ". 1 len 60000");
    s.guest(". 1 ack 1001 win 128000 sack 3001-40001 sack 50001-55001");
    s.send_wanted(u32::MAX, ". 1001 len 2000");
    s.send_wanted(u32::MAX, ". 40001 len 10000");
    assert_eq!(s.relay.wanted(&s.config), None);
    s.guest(". 1 ack 60001 win 128000");
    s.quiet();
}

#[test]
fn a_time_out_sends_again_from_the_start_and_backs_off() {
    let mut s = Script::open();
    s.host_data(1000, "P. 1 len 1000");
    s.wait(200 * MS);
    s.send_wanted(u32::MAX, "P. 1 len 1000");
    // The handshake's sample makes the first time-out short; they double from there.
    let mut sent = 0;
    for _ in 0..30 {
        s.wait(100 * MS);
        if s.relay.wanted(&s.config).is_some() {
            s.send_wanted(u32::MAX, "P. 1 len 1000");
            sent += 1;
        }
    }
    assert_eq!(sent, 3, "after 0.4, 1.2 and 2.8 s more");
    s.guest(". 1 ack 1001 win 64256");
    s.quiet();
    assert_eq!(s.relay.take_discard(), 1000);
}

#[test]
fn a_guest_that_never_answers_is_given_up_after_the_time_of_the_rfc() {
    let mut s = Script::open();
    s.host_data(1000, "P. 1 len 1000");
    for _ in 0..99 {
        s.wait(S);
    }
    assert_eq!(s.relay.over(), None);
    for _ in 0..61 {
        s.wait(S);
    }
    assert_eq!(s.relay.over(), Some(Over::GuestGone));
    s.expect("R. 1001 ack 1");
}

#[test]
fn a_closed_window_is_probed_as_long_as_the_guest_answers() {
    let mut s = Script::open();
    s.guest(". 1 ack 1 win 0");
    s.relay.readable(s.now);
    assert_eq!(s.relay.wanted(&s.config), None);
    let mut probes = 0;
    for _ in 0..3600 {
        s.wait(S);
        if let Some(probe) = s.relay.poll_segment(&s.config, s.now) {
            assert_eq!((probe.seq, probe.len), (s.relay.send().una() - 1, 0));
            s.guest(". 1 ack 1 win 0");
            probes += 1;
        }
    }
    assert!(probes > 50, "{probes}");
    assert_eq!(s.relay.over(), None);
    s.guest(". 1 ack 1 win 64256");
    s.send_wanted(500, "P. 1 len 500");
}

#[test]
fn no_small_segment_goes_out_because_the_window_is_small() {
    let mut s = Script::open();
    s.guest(". 1 ack 1 win 10240");
    s.host_data(u32::MAX, ". 1 len 10240");
    s.relay.readable(s.now);
    s.guest(". 1 ack 5001 win 5376");
    assert_eq!(s.relay.wanted(&s.config), None, "137 bytes of window are not worth a segment");
    s.guest(". 1 ack 10241 win 10240");
    s.send_wanted(u32::MAX, ". 10241 len 10240");
}

#[test]
fn a_small_window_holds_new_bytes_back_but_not_those_that_were_lost() {
    let mut s = Script::open();
    s.guest(". 1 ack 1 win 10240");
    s.host_data(u32::MAX, ". 1 len 10240");
    s.relay.readable(s.now);
    s.guest(". 1 ack 10001 win 256");
    assert_eq!(s.relay.wanted(&s.config), None, "sixteen bytes of window are not worth a segment");
    s.wait(S);
    s.send_wanted(u32::MAX, ". 10001 len 256");
}

#[test]
fn a_window_that_opens_ends_the_patience_of_the_probes() {
    let mut s = Script::open();
    s.guest(". 1 ack 1 win 64000");
    s.host_data(u32::MAX, ". 1 len 64000");
    s.relay.readable(s.now);
    s.guest(". 1 ack 64001 win 0");
    for wait in [1, 2, 4, 8, 16] {
        s.wait(wait * 200 * MS);
        s.expect(". 64000");
        s.guest(". 1 ack 64001 win 0");
    }
    s.guest(". 1 ack 64001 win 4096");
    s.send_wanted(u32::MAX, ". 64001 len 4096");
    assert_eq!(s.relay.send().deadline(), Some(s.now + 200 * MS));
}

#[test]
fn a_window_that_opens_and_closes_puts_no_retransmission_off() {
    let mut s = Script::open();
    s.guest(". 1 ack 1 win 64000");
    s.host_data(u32::MAX, ". 1 len 64000");
    let due = s.relay.send().deadline();
    for window in [0, 1280, 0, 1280] {
        s.wait(20 * MS);
        s.guest(&format!(". 1 ack 1 win {window}"));
        assert_eq!(s.relay.send().deadline(), due);
    }
}

#[test]
fn what_backed_off_at_a_closed_window_is_sent_again_soon_after_it_opens() {
    let mut s = Script::open();
    s.guest(". 1 ack 1 win 64000");
    s.host_data(u32::MAX, ". 1 len 64000");
    s.guest(". 1 ack 1 win 0");
    s.wait(20 * S);
    s.guest(". 1 ack 1 win 64000");
    assert_eq!(s.relay.send().deadline(), Some(s.now + 200 * MS));
    s.send_wanted(u32::MAX, ". 1 len 64000");
}

#[test]
fn a_socket_that_has_ended_has_no_more_to_say() {
    let mut s = Script::open();
    s.relay.readable(s.now);
    s.relay.end_of_stream();
    s.expect("F. 1");
    s.guest(". 1 ack 2 win 0");
    // It reports room for what the guest sends, and its end beside.
    s.relay.readable(s.now);
    assert_eq!(s.relay.send().deadline(), None, "nothing waits for the window");
}

#[test]
fn an_acknowledgement_that_advances_brings_its_window_whatever_its_sequence_number() {
    let mut s = Script::open();
    s.guest(". 1 ack 1 win 1024");
    s.host_data(u32::MAX, ". 1 len 1024");
    assert!(matches!(
        s.guest_gives(". 101 ack 1 len 100 win 1024"),
        Disposition::Payload(Payload::Hold { .. })
    ));
    s.expect(". 1025 ack 1 sack 101-201");
    // What was lost comes again, with news that is younger than what came before it.
    s.guest_data(". 1 ack 1025 len 100 win 64256", 200);
    s.expect(". 1025 ack 201");
    s.host_data(u32::MAX, ". 1025 len 64256");
}

// Closing.

#[test]
fn the_guest_closes_first() {
    let mut s = Script::open();
    s.guest_data("F. 1 ack 1 len 10 win 64256", 10);
    assert!(s.relay.wants_shutdown(&s.config, s.now));
    assert!(!s.relay.wants_shutdown(&s.config, s.now), "once");
    s.expect(". 1 ack 12");
    // Half closed: the host's direction goes on.
    s.wait(60 * S);
    s.host_data(1000, "P. 1 len 1000");
    s.guest(". 12 ack 1001 win 64256");
    s.relay.end_of_stream();
    s.expect("F. 1001 ack 12");
    s.guest(". 12 ack 1002 win 64256");
    assert_eq!(s.relay.over(), Some(Over::Done));
    assert_eq!(s.relay.take_discard(), 1000);
}

#[test]
fn the_host_closes_first_and_time_wait_answers_late_segments() {
    let mut s = Script::open();
    s.relay.end_of_stream();
    s.expect("F. 1 ack 1");
    s.guest(". 1 ack 2 win 64256");
    s.guest_data("P. 1 ack 2 len 5 win 64256", 5);
    s.guest("F. 6 ack 2 win 64256");
    assert!(s.relay.wants_shutdown(&s.config, s.now));
    s.expect(". 2 ack 7");
    assert!(matches!(s.relay.state(), State::TimeWait { .. }));
    assert!(s.relay.is_host_done());
    assert_eq!(s.guest_gives("F. 6 ack 2 win 64256"), refused(DropReason::OutOfWindow));
    s.expect(". 2 ack 7");
    s.wait(3 * S);
    assert_eq!(s.relay.over(), Some(Over::Done));
}

#[test]
fn a_fin_that_comes_again_starts_time_wait_anew() {
    let mut s = Script::open();
    s.relay.end_of_stream();
    s.expect("F. 1 ack 1");
    s.guest("F. 1 ack 2 win 64256");
    assert!(s.relay.wants_shutdown(&s.config, s.now));
    s.expect(". 2 ack 2");
    s.wait(S * 3 / 2);
    // Its acknowledgement was lost, and the guest's time-outs double.
    assert_eq!(s.guest_gives("F. 1 ack 2 win 64256"), refused(DropReason::OutOfWindow));
    s.expect(". 2 ack 2");
    s.wait(S * 3 / 2);
    assert_eq!(s.guest_gives("F. 1 ack 2 win 64256"), refused(DropReason::OutOfWindow));
    s.expect(". 2 ack 2");
    s.wait(3 * S);
    assert_eq!(s.relay.over(), Some(Over::Done));
}

#[test]
fn a_port_in_time_wait_may_be_used_again() {
    let mut s = Script::open();
    s.relay.end_of_stream();
    s.expect("F. 1 ack 1");
    s.guest("F. 1 ack 2 win 64256");
    assert!(s.relay.wants_shutdown(&s.config, s.now));
    assert_eq!(s.guest_gives("S 70000 win 64240 mss 1460"), Disposition::Reopen);
}

#[test]
fn fin_is_not_passed_on_before_the_bytes_in_front_of_it() {
    let mut s = Script::open();
    assert!(matches!(
        s.guest_gives("F. 1 ack 1 len 10 win 64256"),
        Disposition::Payload(Payload::Take { .. })
    ));
    assert!(!s.relay.wants_shutdown(&s.config, s.now));
    s.relay.taken(4);
    assert!(!s.relay.wants_shutdown(&s.config, s.now));
    s.relay.taken(6);
    assert!(s.relay.wants_shutdown(&s.config, s.now));
}

#[test]
fn a_lost_fin_is_sent_again() {
    let mut s = Script::open();
    s.host_data(100, "P. 1 len 100");
    s.relay.end_of_stream();
    s.expect("F. 101");
    s.guest(". 1 ack 101 win 64256");
    s.wait(S);
    s.expect("F. 101");
    s.guest(". 1 ack 102 win 64256");
    s.quiet();
}

#[test]
fn lost_data_goes_out_before_the_fin_behind_it() {
    let mut s = Script::open();
    s.host_data(100, "P. 1 len 100");
    s.relay.end_of_stream();
    s.expect("F. 101");
    s.wait(S);
    assert_eq!(s.relay.poll_segment(&s.config, s.now), None);
    s.send_wanted(100, "P. 1 len 100");
    s.expect("F. 101");
}

#[test]
fn a_reset_of_a_guest_that_has_closed_takes_nothing_from_the_host() {
    let mut s = Script::open();
    assert!(matches!(
        s.guest_gives("F. 1 ack 1 len 10 win 64256"),
        Disposition::Payload(Payload::Take { .. })
    ));
    s.expect(". 1 ack 12");
    s.relay.end_of_stream();
    s.expect("F. 1 ack 12");
    // LAST-ACK is over for the guest: it knows nothing of the connection any more.
    s.guest(". 12 ack 2 win 64256");
    s.guest("R 12 win 0");
    assert_eq!(s.relay.over(), None, "ten bytes that the guest was told are kept wait for the socket");
    s.relay.taken(10);
    assert!(s.relay.wants_shutdown(&s.config, s.now));
    assert_eq!(s.relay.over(), Some(Over::Done));
}

// Resets, RFC 5961.

#[test]
fn a_reset_counts_only_at_the_next_byte() {
    let mut s = Script::open();
    s.guest("R 100 win 0");
    s.expect(". 1 ack 1");
    assert_eq!(s.guest_gives("R 900000 win 0"), refused(DropReason::OutOfWindow));
    s.quiet();
    assert_eq!(s.relay.over(), None);
    s.guest("R 1 win 0");
    assert_eq!(s.relay.over(), Some(Over::GuestReset));
}

#[test]
fn a_syn_inside_a_connection_is_asked_about() {
    let mut s = Script::open();
    assert_eq!(s.guest_gives("S 50 win 64240"), refused(DropReason::OutOfWindow));
    s.expect(". 1 ack 1");
}

#[test]
fn a_reset_on_the_host_is_a_reset_to_the_guest_behind_what_was_sent() {
    let mut s = Script::open();
    s.host_data(100, "P. 1 len 100");
    s.relay.host_failed();
    s.expect("R. 101 ack 1");
    assert_eq!(s.relay.over(), Some(Over::HostFailed));
}

#[test]
fn an_old_timestamp_is_an_old_duplicate() {
    let mut s = Script::open();
    s.guest_data("P. 1 ack 1 len 10 win 64256 ts 500/0", 10);
    s.expect(". 1 ack 11");
    assert_eq!(s.guest_gives("P. 11 ack 1 len 10 win 64256 ts 400/0"), refused(DropReason::OutOfWindow));
    s.expect(". 1 ack 11");
}

// Keep-alive.

#[test]
fn a_keep_alive_probe_is_answered_and_passed_on() {
    let mut s = Script::open();
    s.wait(60 * S);
    s.guest(". 0 ack 1 win 64256");
    s.expect(". 1 ack 1");
    assert_eq!(s.relay.take_keep_alive(), Some(Duration::from_secs(60)));
    assert_eq!(s.relay.take_keep_alive(), None);
}

#[test]
fn an_idle_connection_lives_until_the_guest_leaves_probes_unanswered() {
    let mut s = Script::open();
    for _ in 0..(2 * 60) {
        s.wait(60 * S);
        s.quiet();
    }
    s.wait(300 * S);
    s.expect(". 0 ack 1");
    s.guest(". 1 ack 1 win 64256");
    s.wait(7200 * S);
    s.quiet();
    s.wait(1000 * S);
    assert_eq!(s.relay.over(), Some(Over::GuestGone));
}

// Sleep and wake: nobody ran for hours, and the clock went on.

#[test]
fn a_night_brings_one_probe_and_then_the_guest_has_its_time() {
    let mut s = Script::open();
    s.sleep(9 * 3600 * S);
    s.expect(". 0 ack 1");
    s.quiet();
    // Much later than a link takes, and much earlier than the guest counts as gone.
    s.wait(5 * S);
    s.quiet();
    s.guest(". 1 ack 1 win 64256");
    s.host_data(1000, "P. 1 len 1000");
    assert_eq!(s.relay.over(), None);
}

#[test]
fn a_guest_that_is_not_there_after_a_night_is_given_up_as_ever() {
    let mut s = Script::open();
    s.sleep(9 * 3600 * S);
    for _ in 0..8 {
        s.expect(". 0 ack 1");
        s.quiet();
        s.wait(75 * S);
    }
    assert_eq!(s.relay.over(), None);
    s.expect(". 0 ack 1");
    s.wait(76 * S);
    assert_eq!(s.relay.over(), Some(Over::GuestGone));
}

#[test]
fn bytes_that_slept_on_their_way_are_sent_again_once_at_a_time() {
    let mut s = Script::open();
    s.host_data(1000, "P. 1 len 1000");
    // It was lost a few times before the night already.
    for _ in 0..5 {
        s.wait(7 * S);
        if s.relay.wanted(&s.config).is_some() {
            s.send_wanted(1000, "P. 1 len 1000");
        }
    }
    let before = s.relay.over();
    s.sleep(9 * 3600 * S);
    assert_eq!((before, s.relay.over()), (None, None), "its silence in the night does not count");
    s.send_wanted(1000, "P. 1 len 1000");
    s.quiet();
    s.guest(". 1 ack 1001 win 64256");
    s.quiet();
}

#[test]
fn a_client_that_waits_for_the_guest_waits_on_after_a_night() {
    let mut s = Script::inbound();
    s.expect("S 0");
    s.sleep(9 * 3600 * S);
    assert_eq!(s.relay.over(), None);
    s.expect("S 0");
    for _ in 0..40 {
        s.wait(S);
    }
    assert_eq!(s.relay.over(), Some(Over::GuestSilent));
}
