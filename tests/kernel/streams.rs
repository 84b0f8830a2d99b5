//! TCP: the receive queue as the retransmit buffer, the send queue with a low mark of unsent bytes.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;

use crate::calls::{
    LOOPBACKS, SO_MEMINFO, SO_PEEK_OFF, await_events, await_queue, discard, get, number, peek, receive, send,
    set, tcp_pair, unsent, when_ready,
};

fn seek(socket: &TcpStream, offset: i32) {
    set(socket, libc::SOL_SOCKET, SO_PEEK_OFF, offset).unwrap();
}

#[test]
fn a_peek_goes_on_where_the_last_one_ended_and_can_be_rewound() {
    for address in LOOPBACKS {
        let (mut from, to) = tcp_pair(address);
        seek(&to, 0);
        from.write_all(b"abcdefgh").unwrap();
        await_queue(&to, 8);
        assert_eq!(peek(&to, 3).unwrap(), b"abc");
        assert_eq!(peek(&to, 3).unwrap(), b"def");
        assert_eq!(peek(&to, 3).unwrap(), b"gh");
        assert_eq!(number(peek(&to, 3)), libc::EAGAIN, "no more, and no end either");
        seek(&to, 1);
        assert_eq!(peek(&to, 20).unwrap(), b"bcdefgh");
        seek(&to, 0);
        assert_eq!(peek(&to, 20).unwrap(), b"abcdefgh");
    }
}

#[test]
fn a_discard_copies_nothing_and_moves_the_peek_offset_with_the_bytes() {
    for address in LOOPBACKS {
        let (mut from, to) = tcp_pair(address);
        seek(&to, 0);
        from.write_all(b"abcdefgh").unwrap();
        await_queue(&to, 8);
        assert_eq!(peek(&to, 5).unwrap(), b"abcde");
        assert_eq!(discard(&to, 2).unwrap(), 2);
        assert_eq!(peek(&to, 2).unwrap(), b"fg", "the same place of the stream as before");
        assert_eq!(get::<1>(&to, libc::SOL_SOCKET, SO_PEEK_OFF).unwrap(), [5]);
        seek(&to, 0);
        assert_eq!(peek(&to, 20).unwrap(), b"cdefgh");
        assert_eq!(discard(&to, 20).unwrap(), 6, "never more than there is");
        assert_eq!(number(discard(&to, 1)), libc::EAGAIN);
    }
}

#[test]
fn a_discard_behind_the_peek_offset_puts_it_at_the_start() {
    for address in LOOPBACKS {
        let (mut from, to) = tcp_pair(address);
        seek(&to, 0);
        from.write_all(b"abcdefgh").unwrap();
        await_queue(&to, 8);
        assert_eq!(peek(&to, 2).unwrap(), b"ab");
        assert_eq!(discard(&to, 4).unwrap(), 4);
        assert_eq!(peek(&to, 20).unwrap(), b"efgh");
    }
}

#[test]
fn a_peek_at_the_end_says_end_although_peeked_bytes_remain() {
    for address in LOOPBACKS {
        let (mut from, to) = tcp_pair(address);
        seek(&to, 0);
        from.write_all(b"abcd").unwrap();
        from.shutdown(Shutdown::Write).unwrap();
        await_events(&to, libc::POLLRDHUP);
        assert_eq!(peek(&to, 20).unwrap(), b"abcd");
        assert_eq!(peek(&to, 20).unwrap(), b"", "the end");
        seek(&to, 2);
        assert_eq!(peek(&to, 20).unwrap(), b"cd");
        assert_eq!(discard(&to, 20).unwrap(), 4);
        assert_eq!(discard(&to, 20).unwrap(), 0);
    }
}

#[test]
fn a_kernel_that_keeps_no_offset_would_peek_from_the_start_each_time() {
    // What the fallback for old kernels rests on.
    for address in LOOPBACKS {
        let (mut from, to) = tcp_pair(address);
        from.write_all(b"abcdefgh").unwrap();
        await_queue(&to, 8);
        assert_eq!(peek(&to, 4).unwrap(), b"abcd");
        assert_eq!(peek(&to, 6).unwrap(), b"abcdef");
    }
}

#[test]
fn peeked_bytes_that_nobody_takes_close_the_window_and_discarding_opens_it() {
    for address in LOOPBACKS {
        let (from, to) = tcp_pair(address);
        from.set_nonblocking(true).unwrap();
        seek(&to, 0);
        let block = vec![7; 64 << 10];
        let mut taken = 0;
        let mut peeked = 0;
        // The sender writes, and the receiver peeks, until nothing moves.
        loop {
            let sent = send(&from, &block).unwrap_or(0);
            taken += sent;
            peeked += peek(&to, 1 << 20).map_or(0, |bytes| bytes.len());
            if sent == 0 && unsent(&from) > 0 && peek(&to, 1).is_err() {
                break;
            }
        }
        assert!(taken < 64 << 20, "a sender that nobody reads from stops");
        let mut dropped = 0;
        while dropped < peeked {
            dropped += when_ready(|| discard(&to, peeked - dropped)).unwrap();
        }
        // Bytes that waited for the window come.
        assert!(!when_ready(|| peek(&to, 1 << 20)).unwrap().is_empty());
    }
}

#[test]
fn a_unix_stream_keeps_a_peek_offset_and_discards_by_reading_only() {
    let (mut from, to) = UnixStream::pair().unwrap();
    set(&to, libc::SOL_SOCKET, SO_PEEK_OFF, 0).unwrap();
    from.write_all(b"abcdefgh").unwrap();
    assert_eq!(peek(&to, 3).unwrap(), b"abc");
    assert_eq!(peek(&to, 3).unwrap(), b"def");
    assert_eq!(number(discard(&to, 2)), libc::EFAULT, "MSG_TRUNC means nothing here: it wants to copy");
    assert_eq!(receive(&to, 2, 0).unwrap(), b"ab");
    assert_eq!(peek(&to, 3).unwrap(), b"gh", "reading moves the offset with the bytes");
    set(&to, libc::SOL_SOCKET, SO_PEEK_OFF, 0).unwrap();
    assert_eq!(peek(&to, 20).unwrap(), b"cdefgh");
}

#[test]
fn a_low_mark_of_unsent_bytes_bounds_what_a_socket_takes() {
    const UNSENT_MAX: i32 = 256 << 10;
    for address in LOOPBACKS {
        let (from, _to) = tcp_pair(address);
        set(&from, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, UNSENT_MAX).unwrap();
        let block = vec![7; 64 << 10];
        // The peer's window fills first; then the rest is unsent.
        while send(&from, &block).is_ok() {}
        let unsent = unsent(&from);
        assert!(unsent >= UNSENT_MAX, "{unsent}");
        assert!(unsent < 2 * UNSENT_MAX, "{unsent}");
        assert_eq!(number(send(&from, &block)), libc::EAGAIN);
        // Zero is the system's own, which is none unless somebody has set one.
        set(&from, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, 0).unwrap();
        assert!(send(&from, &block).unwrap() > 0);
    }
}

#[test]
fn a_sockets_memory_tells_what_it_will_take() {
    const SEND_BUFFER: usize = 3;
    const SEND_QUEUED: usize = 5;
    for address in LOOPBACKS {
        let (from, _to) = tcp_pair(address);
        let memory = get::<9>(&from, libc::SOL_SOCKET, SO_MEMINFO).unwrap();
        assert!(memory[SEND_BUFFER] > 0);
        let room = (memory[SEND_BUFFER] - memory[SEND_QUEUED]) as usize;
        // Bookkeeping takes some of it, so a send may be short of it; but not by half.
        let taken = send(&from, &vec![7; room]).unwrap();
        assert!(taken >= room / 2, "{taken} of {room}");
    }
}

#[test]
fn lingering_for_no_time_closes_by_a_reset() {
    for address in LOOPBACKS {
        let (from, to) = tcp_pair(address);
        socket2::SockRef::from(&from).set_linger(Some(std::time::Duration::ZERO)).unwrap();
        drop(from);
        let events = await_events(&to, libc::POLLIN);
        assert!(events & libc::POLLERR != 0);
        assert_eq!(number(receive(&to, 1, 0)), libc::ECONNRESET);
    }
}

#[test]
fn an_urgent_byte_comes_in_line_where_that_is_asked_for() {
    for address in LOOPBACKS {
        let (from, to) = tcp_pair(address);
        set(&to, libc::SOL_SOCKET, libc::SO_OOBINLINE, 1).unwrap();
        socket2::SockRef::from(&from).send_out_of_band(b"abc").unwrap();
        await_queue(&to, 3);
        // tcp(7): a read ends before the urgent mark, and the next one goes over it.
        assert_eq!(peek(&to, 20).unwrap(), b"ab");
        assert_eq!(receive(&to, 20, 0).unwrap(), b"ab");
        assert_eq!(receive(&to, 20, 0).unwrap(), b"c");
    }
}
