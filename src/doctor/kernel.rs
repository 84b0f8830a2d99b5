//! What of the kernel makes hythe fast.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use super::Finding;
use crate::host::engine::uring;
use crate::host::{datagram, options, tcp};

/// What was tried, in the two families where there are two: IPv4, IPv6.
pub(super) fn examine() -> Vec<Finding> {
    vec![
        engine(uring::probe()),
        peek_offset([true, false].map(|v4| tcp::new_stream(v4).map(|socket| keeps_offset(&socket)))),
        segmentation(datagram::open_udp(true, None).and_then(|socket| {
            options::set_number(socket.as_raw_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, 1400)
        })),
        echo(
            [true, false].map(|v4| datagram::open_ping(v4, None).map(drop)),
            [true, false].map(|v4| datagram::open_raw(v4).is_ok()),
        ),
    ]
}

fn keeps_offset(socket: &OwnedFd) -> bool {
    tcp::seek(socket.as_raw_fd(), 0).is_ok()
}

fn engine(ring: io::Result<()>) -> Finding {
    match ring {
        Ok(()) => Finding::ok("engine", "io_uring", "all sockets and frames of a pass take one system call"),
        Err(error) => Finding::warning(
            "engine",
            format!("epoll, since io_uring cannot be had ({error})"),
            "each read and write takes a system call of its own",
            "Linux 6.1 or later, sysctl kernel.io_uring_disabled=0, and a container that allows io_uring_setup",
        ),
    }
}

fn peek_offset([v4, v6]: [io::Result<bool>; 2]) -> Finding {
    const SUBJECT: &str = "peek offset";
    const FAST: &str = "what is sent again to the guest is read again from where it lies";
    const SLOW: &str = "what the guest has not acknowledged is read over, again and again";
    match (v4.unwrap_or(false), v6) {
        (true, Ok(true)) => Finding::ok(SUBJECT, "TCP sockets keep one (SO_PEEK_OFF)", FAST),
        (true, Err(_)) => Finding::ok(SUBJECT, "TCP sockets keep one (SO_PEEK_OFF); there is no IPv6", FAST),
        (true, Ok(false)) => Finding::warning(
            SUBJECT,
            "TCP sockets of IPv6 keep none (SO_PEEK_OFF)",
            SLOW,
            "Linux 6.11 or later",
        ),
        (false, _) => {
            Finding::warning(SUBJECT, "TCP sockets keep none (SO_PEEK_OFF)", SLOW, "Linux 6.11 or later")
        }
    }
}

fn segmentation(set: io::Result<()>) -> Finding {
    match set {
        Ok(()) => {
            Finding::ok("UDP segmentation", "there is (UDP_SEGMENT)", "runs of datagrams go out in one send")
        }
        Err(error) => Finding::warning(
            "UDP segmentation",
            format!("cannot be had ({error})"),
            "each datagram takes a send of its own",
            "Linux 4.18 or later",
        ),
    }
}

fn echo(ping: [io::Result<()>; 2], raw: [bool; 2]) -> Finding {
    const SUBJECT: &str = "ping";
    const ANSWERED: &str = "the guest's ping and traceroute -I work";
    let [v4, v6] = ping;
    match (v4, v6, raw) {
        (Ok(()), Ok(()), _) => Finding::ok(SUBJECT, "by ping sockets", ANSWERED),
        (_, _, [true, true]) => Finding::ok(SUBJECT, "by raw sockets", ANSWERED),
        (Ok(()), Err(_), _) => Finding::ok(SUBJECT, "by ping sockets; there is no IPv6", ANSWERED),
        (Err(error), ..) => Finding::warning(
            SUBJECT,
            format!("neither ping sockets ({error}) nor raw ones may be opened"),
            "the guest's ping is answered by the gateway alone",
            "sysctl net.ipv4.ping_group_range='0 2147483647', or run as root",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Standing;
    use super::*;

    fn refused() -> io::Error {
        io::Error::from_raw_os_error(libc::EACCES)
    }

    #[test]
    fn what_is_missing_is_a_warning_that_says_what_to_do() {
        assert_eq!(engine(Ok(())).standing, Standing::Ok);
        let found = engine(Err(refused()));
        assert_eq!(found.standing, Standing::Warning);
        assert!(found.found.starts_with("epoll") && found.remedy.unwrap().contains("io_uring_disabled"));
        for (offsets, standing) in [
            ([Ok(true), Ok(true)], Standing::Ok),
            ([Ok(true), Err(refused())], Standing::Ok),
            ([Ok(true), Ok(false)], Standing::Warning),
            ([Ok(false), Ok(false)], Standing::Warning),
        ] {
            assert_eq!(peek_offset(offsets).standing, standing);
        }
        assert_eq!(segmentation(Err(refused())).standing, Standing::Warning);
        for (ping, raw, standing) in [
            ([Ok(()), Ok(())], [false; 2], Standing::Ok),
            ([Err(refused()), Err(refused())], [true; 2], Standing::Ok),
            ([Ok(()), Err(refused())], [false; 2], Standing::Ok),
            ([Err(refused()), Err(refused())], [false; 2], Standing::Warning),
        ] {
            assert_eq!(echo(ping, raw).standing, standing);
        }
    }

    #[test]
    fn this_kernel_is_looked_at() {
        let subjects: Vec<&str> = examine().iter().map(|finding| finding.subject).collect();
        assert_eq!(subjects, ["engine", "peek offset", "UDP segmentation", "ping"]);
    }
}
