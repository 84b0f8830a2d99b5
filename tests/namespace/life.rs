//! From start to end: engines, signals, exit statuses, what is left, and who may run it.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::rig::bytes::{accept, echo, expect_echo, expect_reset, read, transfer};
use crate::rig::cell::{ANY, Cell, Engine, on_every_cell};
use crate::rig::directory::Directory;
use crate::rig::dns_server::DnsServer;
use crate::rig::hythe::Hythe;
use crate::rig::netns::Netns;
use crate::rig::process;
use crate::rig::program::Program;
use crate::rig::site::{FAMILIES, Family, Site};
use crate::rig::socket::receive;
use crate::rig::wait::wait_until;
use crate::streams::Pair;

/// A connection of the guest's works.
fn expect_service(site: &Site, guest: &Netns) {
    for family in FAMILIES {
        let listener = site.far.listen(family.far(), 0);
        let name = listener.local_addr().unwrap();
        let server = echo(listener, 1);
        let stream = guest.connect(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        expect_echo(&stream, b"hello");
        drop(stream);
        server.finish();
    }
}

/// The interface goes with hythe; the kernel may take its time to close the last descriptor.
fn expect_no_interface(guest: &Netns) {
    wait_until("the interface to go", || !guest.output(&["ip", "link", "show", "eth0"]).status.success());
}

/// Nobody listens there any more.
fn expect_refused(from: &Netns, to: impl Into<SocketAddr>) {
    let to = to.into();
    wait_until("the port to refuse", || match from.connect_within(to, Duration::from_secs(1)) {
        Ok(_) => false,
        Err(error) => error.kind() == ErrorKind::ConnectionRefused,
    });
}

on_every_cell! {
    the_engine_is_the_one_that_was_asked_for(cell) {
        let site = Site::new();
        let hythe = Hythe::of(&site.host, cell).run();
        hythe.assert_engine();
        expect_service(&site, &hythe.guest);
        hythe.stop().assert_clean(0);
    }
}

on_every_cell! {
    sigterm_resets_connections_and_leaves_nothing(cell) {
        let pair = Pair::new(cell);
        let connections = pair.every_connection();
        for (guest, far) in &connections {
            transfer(guest, far, 1, 100_000);
            transfer(far, guest, 2, 100_000);
        }
        pair.hythe.signal(Signal::SIGTERM);
        for (guest, far) in &connections {
            expect_reset(far);
            expect_reset(guest);
        }
        let Pair { site, hythe } = pair;
        let guest = hythe.guest.clone();
        // It went to the command, which has died of it.
        hythe.end().assert_clean(128 + Signal::SIGTERM as i32);
        assert_eq!(guest.processes(), [0i32; 0], "processes are left in the namespace");
        for family in FAMILIES {
            expect_refused(&site.far, (family.host(), 8000));
        }
    }
}

on_every_cell! {
    the_end_of_the_command_resets_connections(cell) {
        let pair = Pair::new(cell);
        let connections = pair.every_connection();
        let Pair { site, hythe } = pair;
        hythe.stop().assert_clean(0);
        for (guest, far) in &connections {
            expect_reset(far);
            expect_reset(guest);
        }
        for family in FAMILIES {
            expect_refused(&site.far, (family.host(), 8000));
        }
    }
}

/// The connection is over, in whatever way.
fn expect_over(stream: &TcpStream) {
    match read(stream, &mut [0]) {
        Ok(len) => assert_eq!(len, 0, "bytes where the end was expected"),
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}"),
    }
}

on_every_cell! {
    nothing_is_left_of_one_that_is_killed(cell) {
        let pair = Pair::new(cell);
        let connections = pair.every_connection();
        let Pair { site, hythe } = pair;
        let guest = hythe.guest.clone();
        hythe.signal(Signal::SIGKILL);
        // It waits until all processes that came of it have ended.
        let ended = hythe.end();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&ended.status), Some(Signal::SIGKILL as i32));
        // Nobody is left to wait until the last one has given its namespace back.
        wait_until("the namespace to be left", || guest.processes().is_empty());
        expect_no_interface(&guest);
        for (_, far) in &connections {
            expect_over(far);
        }
        for family in FAMILIES {
            expect_refused(&site.far, (family.host(), 8000));
        }
    }
}

#[test]
fn the_exit_status_is_the_command_s() {
    let site = Site::new();
    let directory = Directory::new();
    let not_executable = directory.file("notes.txt", "no program").display().to_string();
    for (words, status) in [
        (&["true"][..], 0),
        (&["sh", "-c", "exit 7"], 7),
        (&["sh", "-c", "exit 255"], 255),
        (&["sh", "-c", "kill -TERM $$"], 128 + 15),
        (&["sh", "-c", "kill -KILL $$"], 128 + 9),
        (&[&not_executable], 126),
        (&["/"], 126),
        (&["no-such-program"], 127),
        (&["/no/such/program"], 127),
    ] {
        for engine in [Engine::IoUring, Engine::Epoll] {
            let words: Vec<&str> = ["--"].iter().chain(words).copied().collect();
            let ended = Hythe::of(&site.host, Cell::new(engine, 1)).to_the_end("run", &words);
            assert_eq!(ended.status.code(), Some(status), "{words:?}: {}", ended.stderr);
            assert_eq!(ended.left, [0i32; 0], "{words:?}");
            // What the user has to know is one line; of what the command does itself hythe says nothing.
            assert_eq!(
                ended.stderr.lines().count(),
                usize::from([126, 127].contains(&status)),
                "{}",
                ended.stderr
            );
        }
    }
}

#[test]
fn a_failure_of_hythe_s_own_is_125() {
    let site = Site::new();
    let ended = Hythe::of(&site.host, ANY).options("--mtu 100").to_the_end("run", &["--", "true"]);
    ended.assert_clean(125);
    assert!(ended.one_line().contains("--mtu 100"), "{}", ended.stderr);
}

#[test]
fn what_the_command_says_and_hears_passes_through() {
    let site = Site::new();
    let mut running = Hythe::of(&site.host, ANY).command(&["sh", "-c", "echo out; echo err >&2; exit 3"]);
    assert_eq!(running.line(), "out");
    let ended = running.end();
    ended.assert_clean(3);
    assert_eq!(ended.one_line(), "err");
}

on_every_cell! {
    signals_are_passed_on_to_the_command(cell) {
        // The shell runs a trap once `wait` is interrupted; its children are ended with it.
        const SCRIPT: &str = "for name in TERM INT HUP QUIT WINCH; do trap \"echo $name\" $name; done
             trap 'echo USR2; exit 5' USR2
             echo ready
             while :; do sleep 1000 & wait $!; done";
        let site = Site::new();
        let mut running = Hythe::of(&site.host, cell).command(&["sh", "-c", SCRIPT]);
        assert_eq!(running.line(), "ready");
        for (signal, name) in [
            (Signal::SIGTERM, "TERM"),
            (Signal::SIGINT, "INT"),
            (Signal::SIGHUP, "HUP"),
            (Signal::SIGQUIT, "QUIT"),
            (Signal::SIGWINCH, "WINCH"),
            (Signal::SIGUSR2, "USR2"),
        ] {
            running.signal(signal);
            assert_eq!(running.line(), name);
        }
        running.end().assert_clean(5);
    }
}

on_every_cell! {
    one_that_is_attached_to_a_process_leaves_with_it(cell) {
        let site = Site::new();
        let guest = Netns::new();
        let resident = Program::start(&guest, &["sleep", "1000"]);
        let target = format!("--pid {}", resident.pid());
        let hythe = Hythe::of(&site.host, cell).options("-p 8000:80").attach(&target, &guest);
        hythe.assert_engine();
        expect_service(&site, &guest);
        kill(Pid::from_raw(resident.pid()), Signal::SIGKILL).unwrap();
        hythe.end().assert_clean(0);
        resident.end();
        expect_no_interface(&guest);
        for family in FAMILIES {
            expect_refused(&site.far, (family.host(), 8000));
        }
    }
}

on_every_cell! {
    one_that_is_attached_to_a_named_namespace_leaves_with_the_name(cell) {
        let site = Site::new();
        let guest = Netns::new();
        let directory = Directory::new();
        let name = directory.file("guest", "");
        let target = format!("--netns {}", name.display());
        let (named, namespace) = (name.clone(), guest.clone());
        let hythe = Hythe::of(&site.host, cell)
            .mounts(move |mounts| mounts.name(&namespace, &named))
            .attach(&target, &guest);
        expect_service(&site, &guest);
        // As `ip netns del` does.
        std::fs::remove_file(&name).unwrap();
        hythe.end().assert_clean(0);
        expect_no_interface(&guest);
    }
}

on_every_cell! {
    sigterm_detaches_and_resets_connections(cell) {
        let site = Site::new();
        let guest = Netns::new();
        let resident = Program::start(&guest, &["sleep", "1000"]);
        let hythe = Hythe::of(&site.host, cell).attach(&format!("--pid {}", resident.pid()), &guest);
        let listener = site.far.listen(Family::V4.far(), 0);
        let stream = guest.connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = accept(&listener);
        transfer(&stream, &far, 1, 100_000);
        hythe.signal(Signal::SIGTERM);
        expect_reset(&far);
        expect_reset(&stream);
        hythe.end().assert_clean(0);
        assert_eq!(guest.processes(), [resident.pid()], "the guest's own process lives on");
    }
}

on_every_cell! {
    a_user_without_rights_gets_the_same(cell) {
        let site = Site::new();
        let dns = DnsServer::start(&site.far, Family::V4.far(), 42);
        let limit = std::fs::read_to_string("/proc/sys/user/max_user_namespaces").unwrap();
        assert_ne!(limit.trim(), "0", "user namespaces are forbidden here (sysctl user.max_user_namespaces)");
        let hythe = Hythe::of(&site.host, cell.as_nobody())
            .mounts(|mounts| mounts.resolv_conf("nameserver 198.51.100.1\n"))
            .options("-p 8000:80 -p 8000:80/udp")
            .run();
        hythe.assert_engine();
        for id in ["Uid", "Gid"] {
            let status = std::fs::read_to_string(format!("/proc/{}/status", hythe.pid())).unwrap();
            assert!(status.contains(&format!("{id}:\t65534\t65534\t65534\t65534")), "{status}");
        }
        expect_service(&site, &hythe.guest);
        for family in FAMILIES {
            // UDP, and a published port of each protocol.
            let far = site.far.udp(family.far(), 7000);
            let guest = hythe.guest.udp(family.any(), 0);
            guest.send_to(b"question", far.local_addr().unwrap()).unwrap();
            let mut bytes = [0; 20];
            let (len, from) = receive(&far, &mut bytes).unwrap();
            assert_eq!(&bytes[..len], b"question");
            far.send_to(b"answer", from).unwrap();
            let (len, _) = receive(&guest, &mut bytes).unwrap();
            assert_eq!(&bytes[..len], b"answer");

            let server = hythe.guest.udp(family.any(), 80);
            let client = site.far.udp(family.next_hop(), 0);
            client.send_to(b"published", (family.host(), 8000)).unwrap();
            let (len, from) = receive(&server, &mut bytes).unwrap();
            assert_eq!((&bytes[..len], from), (&b"published"[..], client.local_addr().unwrap()));

            let listener = hythe.guest.listen(family.any(), 80);
            let client = site.far.connect((family.host(), 8000)).unwrap();
            let (accepted, peer) = accept(&listener);
            assert_eq!(peer, client.local_addr().unwrap());
            transfer(&client, &accepted, 1, 1 << 20);
        }
        let said = hythe.guest.command(&["dig", "+short", "@192.168.65.1", "whoami.test", "A"]);
        assert_eq!(said.trim(), "203.0.113.42");
        drop(dns);
        hythe.stop().assert_clean(0);
    }
}

on_every_cell! {
    counters_are_told_when_asked_and_at_the_end(cell) {
        let site = Site::new();
        let hythe = Hythe::of(&site.host, cell).run();
        let before = hythe.counters();
        assert_eq!(before.get("tcp_opened_out"), 0);
        expect_service(&site, &hythe.guest);
        let after = hythe.counters();
        assert_eq!(after.get("tcp_opened_out"), 2);
        assert!(after.get("frames_out") >= before.get("frames_out") + 8, "{after:?}");
        assert_eq!(hythe.guest.connect((Family::V4.far(), 7999)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        let log = hythe.log().len();
        let ended = hythe.stop();
        ended.assert_clean(0);
        let report = &ended.stderr[log..];
        for line in ["tcp_opened_out 3", "dropped_host_refused 1"] {
            assert!(report.lines().any(|told| told == line), "no '{line}' at the end:\n{report}");
        }
    }
}

on_every_cell! {
    what_hythe_adds_to_the_way_is_told_of_all_workers(cell) {
        let site = Site::new();
        let hythe = Hythe::of(&site.host, cell).run();
        expect_service(&site, &hythe.guest);
        let told = hythe.counters();
        for direction in ["frame_to_socket", "socket_to_frame"] {
            let quantiles = ["p50", "p99", "p999", "max"].map(|name| told.get(&format!("{direction}_{name}_ns")));
            assert!(quantiles[0] > 0 && quantiles.is_sorted(), "{told:?}");
        }
        hythe.stop().assert_clean(0);
    }
}

#[test]
fn without_v_hythe_says_nothing_until_it_is_asked() {
    let site = Site::new();
    let mut running = Hythe::of(&site.host, ANY).command(&["sh", "-c", "echo ready; read line"]);
    assert_eq!(running.line(), "ready");
    running.signal(Signal::SIGUSR1);
    wait_until("a report", || running.log().contains("passes "));
    let reported = running.log().len();
    running.signal(Signal::SIGTERM);
    let ended = running.end();
    ended.assert_clean(128 + Signal::SIGTERM as i32);
    assert_eq!(&ended.stderr[reported..], "", "it says nothing at its end");
}

on_every_cell! {
    a_capture_can_be_read_by_others(cell) {
        let site = Site::new();
        let directory = Directory::new();
        let file = directory.path().join("frames.pcapng");
        let hythe = Hythe::of(&site.host, cell).options(&format!("--capture {}", file.display())).run();
        expect_service(&site, &hythe.guest);
        let far = site.far.udp(Family::V4.far(), 7777);
        hythe.guest.udp(Family::V4.any(), 0).send_to(&[7; 100], far.local_addr().unwrap()).unwrap();
        receive(&far, &mut [0; 200]).unwrap();
        hythe.stop().assert_clean(0);
        let read = |filter: &str| {
            let said = site.host.command(&["tcpdump", "-nn", "-r", &file.display().to_string(), filter]);
            said.lines().map(str::to_string).collect::<Vec<_>>()
        };
        assert!(!read("arp").is_empty());
        // SYN and SYN-ACK of one connection a family.
        let [v4, v6] = ["ip and tcp[tcpflags] & tcp-syn != 0", "ip6 and ip6[6] == 6 and ip6[53] & 2 != 0"].map(read);
        assert!(v4.len() == 2 && v4[0].contains("192.168.65.3.") && v4[1].contains("> 192.168.65.3."), "{v4:?}");
        assert!(v6.len() == 2 && v6[0].contains("fdc4:f303:9324::3."), "{v6:?}");
        assert!(read("udp port 7777").iter().any(|line| line.contains("length 100")));
    }
}

#[test]
fn no_thread_of_hythe_s_has_a_capability_left() {
    let site = Site::new();
    let hythe = Hythe::of(&site.host, ANY).run();
    let statuses = process::thread_statuses(hythe.pid());
    assert!(statuses.len() > 2, "main thread, workers, slow path");
    for status in statuses {
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert!(status.contains(&format!("{set}:\t0000000000000000")), "{status}");
        }
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    }
    hythe.stop().assert_clean(0);
}
