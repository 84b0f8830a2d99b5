//! What a guest is given and what is left alone: addresses, routes, resolv.conf, signals; and starts that are held up.

use std::fs;
use std::io::{PipeReader, Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};

use crate::rig::cell::ANY;
use crate::rig::directory::Directory;
use crate::rig::hythe::{Hythe, PROGRAM, Start};
use crate::rig::netns::Netns;
use crate::rig::process;
use crate::rig::program::Program;
use crate::rig::site::{Family, Site};
use crate::rig::wait::{wait_for, wait_until};

const FAILED: i32 = 125;

fn start(site: &Site) -> Start<'_> {
    Hythe::of(&site.host, ANY)
}

/// What a command prints in a guest.
fn printed(start: Start<'_>, script: &str) -> String {
    let ended = start.command(&["sh", "-c", script]).end();
    ended.assert_clean(0);
    ended.stdout
}

/// hythe started by another program, which becomes it.
fn by(site: &Site, words: &[&str], change: impl FnOnce(&mut Command) + Send) -> Child {
    let child = site.host.run(|| {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).env_remove("HYTHE_LOG").current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        change(&mut command);
        command.spawn()
    });
    child.unwrap_or_else(|error| panic!("{}: {error}", words[0]))
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id() as i32), signal).unwrap();
}

/// Waits for the end; the exit status and what was printed.
fn end(mut child: Child) -> (Option<i32>, String) {
    let status = wait_for("the end", || child.try_wait().unwrap());
    let mut said = String::new();
    if let Some(mut from) = child.stdout.take() {
        from.read_to_string(&mut said).unwrap();
    }
    (status.code(), said)
}

#[test]
fn a_vpn_that_takes_the_default_route_in_pieces_is_in_nobodys_way() {
    let site = Site::new();
    site.host.ip("route add 0.0.0.0/1 via 10.77.0.1
                  route add 128.0.0.0/1 via 10.77.0.1
                  route del default
                  -6 route add ::/1 via fd77::1
                  -6 route add 8000::/1 via fd77::1
                  -6 route add fc00::/7 via fd77::1
                  -6 route del default");
    for (options, v4, v6) in [
        ("", "192.168.65.3/24", "fdc4:f303:9324::3/64"),
        ("--subnet 172.29.3.0/24 --subnet6 fd00:1:2:3::/64", "172.29.3.3/24", "fd00:1:2:3::3/64"),
    ] {
        let said = printed(start(&site).options(options), "ip -o addr; ip route; ip -6 route");
        assert!(said.contains(v4) && said.contains(v6), "{said}");
        // It leads out, in one piece or in two.
        assert_eq!(said.matches("default via").count(), 2, "{said}");
    }
}

#[test]
fn a_default_subnet_of_ipv6_that_the_host_uses_gives_way() {
    let site = Site::new();
    site.host.ip("-6 route add fdc4:f303::/32 via fd77::1");
    let ended = start(&site).command(&["ip", "-o", "-6", "addr"]).end();
    ended.assert_clean(0);
    assert!(ended.stdout.contains("fd9a:6c1e:27b8::3/64"), "{}", ended.stdout);
    assert!(ended.one_line().contains("covers fdc4:f303:9324::/64"), "{}", ended.stderr);
    let chosen = start(&site).options("--subnet6 fdc4:f303:9324::/64");
    let ended = chosen.command(&["true"]).end();
    ended.assert_clean(FAILED);
    assert!(ended.one_line().contains("--subnet6 fdc4:f303:9324::/64"), "{}", ended.stderr);
}

#[test]
fn without_a_way_out_for_ipv6_the_guest_has_none() {
    let site = Site::new();
    site.host.ip("-6 route del default");
    let said = printed(start(&site), "ip -o -6 addr; ip route; ip -6 route; cat /etc/resolv.conf");
    assert!(said.contains("fdc4:f303:9324::3/64") && said.contains("nameserver fdc4:f303:9324::1"), "{said}");
    assert_eq!(said.matches("default via").count(), 1, "{said}");
}

#[test]
fn a_family_that_is_off_is_not_warned_about() {
    let site = Site::new();
    let told = |options: &str| {
        let start = Hythe::of(&site.host, ANY.as_nobody()).options(options);
        start.command(&["true"]).end().stderr
    };
    let both = told("");
    assert!(both.contains("ping over IPv6") && both.contains("guest's ping is"), "{both}");
    assert!(!told("-4").contains("IPv6"));
    assert!(!told("-6").contains("guest's ping is"));
}

#[test]
fn the_namespace_hythe_was_started_in_is_not_attached_to() {
    let site = Site::new();
    let routes = site.host.command(&["ip", "route"]);
    let resident = Program::start(&site.host, &["sleep", "1000"]);
    let (path, pid) = (site.host.path().display().to_string(), resident.pid().to_string());
    for words in [["--netns", &path], ["--pid", &pid]] {
        let ended = start(&site).to_the_end("attach", &words);
        ended.assert_clean(FAILED);
        assert!(ended.one_line().contains("hythe itself was started in"), "{}", ended.stderr);
    }
    assert!(!site.host.output(&["ip", "link", "show", "eth0"]).status.success());
    assert_eq!(site.host.command(&["ip", "route"]), routes);
}

#[test]
fn a_default_route_of_an_attached_namespace_is_kept() {
    let (site, guest) = (Site::new(), Netns::new());
    guest.ip("link add own0 type veth peer name own1
              addr add 10.5.0.2/24 dev own0
              addr add fd05::2/64 dev own0 nodad
              link set own0 up
              link set own1 up
              route add default via 10.5.0.1 metric 100
              -6 route add default via fd05::1 metric 5");
    let resident = Program::start(&guest, &["sleep", "1000"]);
    let hythe = start(&site).attach(&format!("--pid {}", resident.pid()), &guest);
    for (family, via) in [("-4", "default via 10.5.0.1"), ("-6", "default via fd05::1")] {
        let routes = guest.command(&["ip", family, "route", "show", "default"]);
        assert!(routes.starts_with(via) && routes.lines().count() == 1, "{routes}");
    }
    let log = hythe.log();
    for family in ["IPv4", "IPv6"] {
        assert!(log.contains(&format!("has a default route of {family} already")), "{log}");
    }
    hythe.signal(Signal::SIGTERM);
    hythe.end().assert_clean(0);
}

#[test]
fn the_interface_of_another_hythe_is_left_alone() {
    let (site, guest) = (Site::new(), Netns::new());
    let resident = Program::start(&guest, &["sleep", "1000"]);
    let pid = resident.pid().to_string();
    let hythe = start(&site).attach(&format!("--pid {pid}"), &guest);
    let ended = start(&site).to_the_end("attach", &["--pid", &pid]);
    ended.assert_clean(FAILED);
    assert!(ended.one_line().contains("--interface"), "{}", ended.stderr);
    hythe.signal(Signal::SIGTERM);
    hythe.end().assert_clean(0);
}

#[test]
fn a_start_that_fails_changes_nothing_of_the_namespace() {
    let (site, guest) = (Site::new(), Netns::new());
    guest.ip("link set lo down");
    let _taken = site.host.listen(std::net::Ipv4Addr::UNSPECIFIED, 8000);
    let path = guest.path().display().to_string();
    let ended = start(&site).options("-p 8000:80").to_the_end("attach", &["--netns", &path]);
    ended.assert_clean(FAILED);
    assert!(ended.one_line().contains("0.0.0.0:8000"), "{}", ended.stderr);
    assert!(guest.command(&["ip", "link", "show", "lo"]).contains("state DOWN"));
}

#[test]
fn the_helper_of_an_attached_namespace_has_no_capability_left() {
    let (site, guest) = (Site::new(), Netns::new());
    let resident = Program::start(&guest, &["sleep", "1000"]);
    let hythe = start(&site).attach(&format!("--pid {}", resident.pid()), &guest);
    // The other children bind ports, and start evaluators of PAC scripts, in the host's namespace.
    let children = process::children(hythe.pid());
    assert_eq!(children.len(), 3);
    let is_inside = |pid: &i32| process::netns_inode(*pid) == Some(guest.inode());
    let helpers: Vec<i32> = children.into_iter().filter(is_inside).collect();
    assert_eq!(helpers.len(), 1);
    let status = fs::read_to_string(format!("/proc/{}/status", helpers[0])).unwrap();
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert!(status.contains(&format!("{set}:\t0000000000000000")), "{status}");
    }
    // It still opens sockets inside, for clients of the host's loopback.
    hythe.signal(Signal::SIGTERM);
    hythe.end().assert_clean(0);
}

#[test]
fn a_fifo_holds_nobody_up() {
    let (site, directory) = (Site::new(), Directory::new());
    let fifo = directory.path().join("fifo");
    mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    let path = fifo.display().to_string();
    let ended = start(&site).to_the_end("attach", &["--netns", &path]);
    ended.assert_clean(FAILED);
    assert!(ended.one_line().contains("is it a namespace?"), "{}", ended.stderr);
    let ended = start(&site).to_the_end("run", &["--capture", &path, "--", "true"]);
    ended.assert_clean(FAILED);
    assert!(ended.one_line().contains("nobody reads"), "{}", ended.stderr);
}

#[test]
fn a_signal_ends_a_set_up_that_is_held_up() {
    let (site, directory) = (Site::new(), Directory::new());
    // A kernel parameter that keeps who sets it waiting.
    let parameters = directory.path().join("net/ipv4");
    fs::create_dir_all(&parameters).unwrap();
    mkfifo(&parameters.join("ping_group_range"), Mode::S_IRWXU).unwrap();
    let from = directory.path().to_path_buf();
    let running = start(&site).mounts(move |_| bind(&from, Path::new("/proc/sys"))).command(&["true"]);
    let own = process::netns_inode(running.pid());
    wait_until("the helper to be in the guest's namespace", || {
        let inside = |pid: &i32| process::netns_inode(*pid).is_some_and(|inode| Some(inode) != own);
        process::children(running.pid()).iter().any(inside)
    });
    running.signal(Signal::SIGWINCH);
    running.signal(Signal::SIGTERM);
    running.end().assert_clean(128 + Signal::SIGTERM as i32);
}

fn bind(from: &Path, to: &Path) {
    let none: Option<&str> = None;
    mount(Some(from), to, none, MsFlags::MS_BIND, none).unwrap();
}

/// A hythe whose host has another /etc; mounts spread from it as on a host that systemd runs.
fn with_etc<'s>(site: &'s Site, etc: &Directory) -> Start<'s> {
    let from = etc.path().to_path_buf();
    start(site).mounts(move |_| {
        bind(&from, Path::new("/etc"));
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SHARED, none).unwrap();
    })
}

/// /etc/resolv.conf as the guest's processes see it.
fn seen(hythe: &Hythe) -> String {
    let pid = hythe.guest.processes()[0];
    fs::read_to_string(format!("/proc/{pid}/root/etc/resolv.conf")).unwrap_or_default()
}

fn is_hythes(text: &str) -> bool {
    text.contains("nameserver 192.168.65.1\n")
}

#[test]
fn the_guests_resolv_conf_stays_whatever_becomes_of_the_hosts() {
    let (site, etc) = (Site::new(), Directory::new());
    let file = etc.file("resolv.conf", "nameserver 192.0.2.1\n");
    let hythe = with_etc(&site, &etc).run();
    assert!(is_hythes(&seen(&hythe)));
    let replace = |what: &str, change: &dyn Fn()| {
        change();
        wait_until(what, || is_hythes(&seen(&hythe)));
    };
    replace("a rename over it", &|| {
        fs::rename(etc.file("new", "nameserver 192.0.2.2\n"), &file).unwrap();
    });
    assert_eq!(fs::read_to_string(&file).unwrap(), "nameserver 192.0.2.2\n");
    for _ in 0..20 {
        // File systems give the number of an inode that has gone to the next one.
        replace("its removal and return", &|| {
            fs::remove_file(&file).unwrap();
            fs::write(&file, "nameserver 192.0.2.3\n").unwrap();
        });
    }
    replace("a link in its place", &|| {
        symlink("/run/elsewhere/resolv.conf", etc.path().join("link")).unwrap();
        fs::rename(etc.path().join("link"), &file).unwrap();
    });
    assert!(file.is_symlink(), "the host keeps its own");
    replace("a file again", &|| {
        fs::rename(etc.file("new", "nameserver 192.0.2.4\n"), &file).unwrap();
    });
    // What was mounted for the guest is seen by the guest alone.
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", hythe.pid())).unwrap();
    assert!(!mounts.contains("resolv.conf"), "{mounts}");
    hythe.stop().assert_clean(0);
    assert_eq!(etc.names(), ["resolv.conf"]);
}

#[test]
fn a_guest_has_a_resolv_conf_where_the_hosts_leads_nowhere() {
    let (site, etc) = (Site::new(), Directory::new());
    symlink("/run/elsewhere/resolv.conf", etc.path().join("resolv.conf")).unwrap();
    let said = printed(with_etc(&site, &etc), "cat /etc/resolv.conf");
    assert!(is_hythes(&said), "{said}");
    assert!(etc.path().join("resolv.conf").is_symlink());
}

#[test]
fn where_the_host_has_no_resolv_conf_none_is_made_and_one_that_comes_is_covered() {
    let (site, etc) = (Site::new(), Directory::new());
    let hythe = with_etc(&site, &etc).run();
    assert!(hythe.log().contains("no /etc/resolv.conf"), "{}", hythe.log());
    assert_eq!(etc.names(), [""; 0]);
    etc.file("resolv.conf", "nameserver 192.0.2.1\n");
    wait_until("it to be covered", || is_hythes(&seen(&hythe)));
    hythe.stop().assert_clean(0);

    fs::remove_file(etc.path().join("resolv.conf")).unwrap();
    let script = "mount -t tmpfs none /media && echo mounted; read line";
    let mut running = with_etc(&site, &etc).command(&["sh", "-c", script]);
    assert_eq!(running.line(), "mounted");
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", running.pid())).unwrap();
    assert!(!mounts.contains(" /media "), "the command's mounts are its own:\n{mounts}");
    running.signal(Signal::SIGTERM);
    running.end().assert_clean(128 + Signal::SIGTERM as i32);
}

#[test]
fn the_guests_resolv_conf_can_be_read_by_all_whatever_the_umask() {
    let site = Site::new();
    let script = format!(
        "umask 077; exec {PROGRAM} run -- setpriv --reuid=65534 --regid=65534 --clear-groups cat /etc/resolv.conf"
    );
    let (status, said) = end(by(&site, &["sh", "-c", &script], |_| {}));
    assert_eq!(status, Some(0), "{said}");
    assert!(is_hythes(&said), "{said}");
}

#[test]
fn a_command_begins_with_the_signals_that_hythe_was_started_with() {
    let site = Site::new();
    let status = ["grep", "-E", "SigBlk|SigIgn", "/proc/self/status"];
    for environment in [&["env"][..], &["env", "--block-signal=USR2,TERM", "--ignore-signal=HUP,USR1"]] {
        let directly = end(by(&site, &[environment, &status].concat(), |_| {}));
        let behind = end(by(&site, &[environment, &[PROGRAM, "run", "--"], &status].concat(), |_| {}));
        assert_eq!(directly, behind, "{environment:?}");
    }
}

#[test]
fn a_signal_that_is_ignored_at_the_start_stays_so() {
    let (site, guest) = (Site::new(), Netns::new());
    let path = guest.path().display().to_string();
    let ignoring = ["env", "--ignore-signal=HUP", PROGRAM, "attach", "--netns", &path];
    let mut hythe = by(&site, &ignoring, |_| {});
    let gateway: SocketAddr = (Family::V4.gateway(), 53).into();
    wait_until("hythe to serve the guest", || guest.connect_within(gateway, Duration::from_secs(1)).is_ok());
    signal(&hythe, Signal::SIGHUP);
    // The later one is taken although the earlier one came first.
    signal(&hythe, Signal::SIGUSR1);
    let mut said = hythe.stderr.take().unwrap();
    let mut byte = [0];
    said.read_exact(&mut byte).unwrap();
    signal(&hythe, Signal::SIGTERM);
    assert_eq!(end(hythe).0, Some(0));
}

#[test]
fn timers_and_continuation_are_passed_on_too() {
    const SCRIPT: &str = "for name in ALRM CONT; do trap \"echo $name\" $name; done
         echo ready
         while :; do sleep 1000 & wait $!; done";
    let site = Site::new();
    let mut running = start(&site).command(&["sh", "-c", SCRIPT]);
    assert_eq!(running.line(), "ready");
    for (signal, name) in [(Signal::SIGALRM, "ALRM"), (Signal::SIGCONT, "CONT")] {
        running.signal(signal);
        assert_eq!(running.line(), name);
    }
    running.signal(Signal::SIGTERM);
    running.end().assert_clean(128 + Signal::SIGTERM as i32);
}

/// What a command behind hythe says at a terminal at which ^C and then ^\ twice are typed.
fn at_a_terminal(site: &Site, session: &str) -> String {
    // What is written just before the last process of a terminal ends may be lost with the terminal: the command ends
    // with a key of its own, after everything it said has been seen.
    const SCRIPT: &str = "last() { exit 5; }; quit() { trap last QUIT; echo QUIT; }; trap quit QUIT; \
         trap \"echo INT\" INT; echo ready; while :; do sleep 1000 & wait $!; done";
    const CTRL_C: &[u8] = b"\x03";
    const CTRL_BACKSLASH: &[u8] = b"\x1c";
    // `exec`, as `script` uses whatever SHELL names: one that stays in front of hythe would die of the keys itself.
    let line = format!("exec {PROGRAM} run -- {session} sh -c '{SCRIPT}'");
    let words = ["timeout", "60", "script", "-qec", &line, "/dev/null"];
    let mut terminal = by(site, &words, |command| {
        command.stdin(Stdio::piped());
    });
    let (mut keys, mut screen) = (terminal.stdin.take().unwrap(), terminal.stdout.take().unwrap());
    let mut shown = String::new();
    let mut show_until = |word: &str| {
        while !shown.contains(word) {
            let mut bytes = [0; 256];
            let len = screen.read(&mut bytes).unwrap();
            assert!(len > 0, "no {word}: {shown}");
            shown.push_str(&String::from_utf8_lossy(&bytes[..len]));
        }
    };
    show_until("ready");
    keys.write_all(CTRL_C).unwrap();
    show_until("INT");
    keys.write_all(CTRL_BACKSLASH).unwrap();
    show_until("QUIT");
    keys.write_all(CTRL_BACKSLASH).unwrap();
    let (status, _) = end(terminal);
    assert_eq!(status, Some(5), "{session}: {shown}");
    shown
}

#[test]
fn keys_of_a_terminal_reach_the_command_once_wherever_it_went() {
    let site = Site::new();
    for session in ["", "setsid"] {
        let shown = at_a_terminal(&site, session);
        for word in ["INT", "QUIT"] {
            assert_eq!(shown.matches(word).count(), 1, "{session}: {shown}");
        }
    }
}

/// Standard error that nobody reads any more.
fn closed() -> Stdio {
    let (reader, writer): (PipeReader, _) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

#[test]
fn the_exit_status_is_kept_when_nobody_reads_standard_error() {
    let site = Site::new();
    for (words, expected) in [
        (&["run", "-vv", "--", "sh", "-c", "exit 7"][..], 7),
        (&["run", "--", "no-such-command"], 127),
        (&["run", "--bogus"], FAILED),
        (&["run", "--mtu", "1", "--", "true"], FAILED),
    ] {
        let words: Vec<&str> = [PROGRAM].iter().chain(words).copied().collect();
        let child = by(&site, &words, |command| {
            command.stderr(closed());
        });
        assert_eq!(end(child).0, Some(expected), "{words:?}");
    }
}

#[test]
fn a_cause_is_told_once() {
    let site = Site::new();
    for (mode, words, cause) in [
        ("run", &["--config", "/none.toml", "--", "true"][..], "No such file"),
        ("run", &["--capture", "/none/file", "--", "true"], "No such file"),
        ("attach", &["--netns", "/none/x"], "does not exist"),
        ("attach", &["--pid", "1", "--hostname", "web"], "--hostname web"),
    ] {
        let ended = start(&site).to_the_end(mode, words);
        ended.assert_clean(FAILED);
        assert_eq!(ended.one_line().matches(cause).count(), 1, "{}", ended.stderr);
    }
}
