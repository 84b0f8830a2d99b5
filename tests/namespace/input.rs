//! Bad input: one line that says what was tried, why it failed and what to do; the right exit status; nothing left.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::rig::cell::ANY;
use crate::rig::directory::Directory;
use crate::rig::hythe::{Ended, Hythe, PROGRAM, Start};
use crate::rig::mounts::Mounts;
use crate::rig::netns::Netns;
use crate::rig::site::{Family, Site};

/// hythe's own failure.
const FAILED: i32 = 125;

/// A start that fails: its one line has all of `parts`.
fn fails(site: &Site, start: Start<'_>, words: &[&str], parts: &[&str]) {
    let temporary = Directory::new();
    let bound = sockets(&site.host);
    let ended = start.temporary(temporary.path()).to_the_end("run", words);
    assert_failed(&ended, FAILED, parts);
    assert_eq!(sockets(&site.host), bound, "sockets are left");
    assert_eq!(temporary.names(), [""; 0], "files are left");
}

fn assert_failed(ended: &Ended, status: i32, parts: &[&str]) {
    ended.assert_clean(status);
    assert_eq!(ended.stdout, "");
    let line = ended.one_line();
    assert!(line.starts_with("hythe: "), "{line}");
    for part in parts {
        assert!(line.contains(part), "no '{part}' in: {line}");
    }
}

/// What is bound in a namespace.
fn sockets(netns: &Netns) -> String {
    netns.command(&["ss", "-Hltun"])
}

fn start(site: &Site) -> Start<'_> {
    Hythe::of(&site.host, ANY)
}

const TRUE: [&str; 2] = ["--", "true"];

fn with_options(site: &Site, options: &str, parts: &[&str]) {
    fails(site, start(site).options(options), &TRUE, parts);
}

#[test]
fn words_that_are_no_options_are_told_with_where_to_find_those_that_are() {
    let site = Site::new();
    with_options(&site, "--bogus", &["--bogus", "hythe run --help"]);
    with_options(&site, "--publsh 80:80", &["--publsh", "--publish"]);
    with_options(&site, "--mtu many", &["--mtu", "many"]);
    with_options(&site, "--mtu 70000", &["--mtu", "70000"]);
    let parts = ["--udp-filtering", "warp", "address-dependent", "endpoint-independent"];
    with_options(&site, "--udp-filtering warp", &parts);
    with_options(&site, "--subnet 10.0.0.0/33", &["--subnet", "10.0.0.0/33"]);
    with_options(&site, "--mac 1:2:3", &["--mac", "1:2:3"]);
    with_options(&site, "--dns nobody", &["--dns", "nobody"]);
    with_options(&site, "-4 -6", &["--ipv4-only", "--ipv6-only"]);
    fails(&site, start(&site), &[], &["COMMAND", "hythe run --help"]);
    let ended = start(&site).to_the_end("atach", &["--pid", "1"]);
    assert_failed(&ended, FAILED, &["atach", "attach"]);
    let ended = start(&site).to_the_end("attach", &[]);
    assert_failed(&ended, FAILED, &["--netns", "--pid", "hythe attach --help"]);
}

#[test]
fn values_that_cannot_be_are_told_with_those_that_can() {
    let site = Site::new();
    with_options(&site, "--mtu 500", &["--mtu 500", "from 1280 to 65520"]);
    with_options(&site, "--max-flows 1", &["--max-flows 1", "from 64"]);
    with_options(&site, "--guest-ip 10.0.0.1", &["--guest-ip 10.0.0.1", "192.168.65.0/24"]);
    with_options(&site, "--subnet 10.0.0.0/31", &["--subnet 10.0.0.0/31", "/29"]);
    with_options(&site, "--subnet6 fd00::/48", &["--subnet6 fd00::/48", "/64"]);
    with_options(&site, "--hostname a_b", &["--hostname 'a_b'", "letters, digits, hyphens"]);
    with_options(&site, "--interface a/b", &["--interface 'a/b'"]);
    with_options(&site, "--mac 5a:94:ef:e4:0c:dd", &["--mac 5a:94:ef:e4:0c:dd", "gateway"]);
    with_options(&site, "--mac 01:00:5e:00:00:01", &["--mac", "01:00:5e:00:00:01", "one station"]);
}

#[test]
fn a_specification_that_means_nothing_is_told_with_what_is_expected() {
    let site = Site::new();
    for (spec, why) in [
        ("8000:", "no port specified"),
        ("80x", "invalid containerPort: 80x"),
        (":", "no port specified"),
        ("0-9:80", "invalid hostPort: 0-9"),
        ("8000:0", "invalid containerPort: 0"),
        ("65536:80", "invalid hostPort: 65536"),
        ("8000:80/icmp", "invalid proto: icmp"),
        ("8000:80/tcp/", "invalid proto: tcp/"),
        ("eight:80", "invalid hostPort: eight"),
        ("8000-8003:80-82", "invalid ranges"),
        ("8003-8000:80-83", "invalid hostPort: 8003-8000"),
        ("1.2.3:8000:80", "invalid IP address: 1.2.3"),
        ("[::1:8000:80", "invalid IP address"),
        ("[127.0.0.1]:8000:80", "invalid IP address: [127.0.0.1]"),
        ("+8000:80", "invalid hostPort: +8000"),
    ] {
        let quoted = format!("--publish '{spec}'");
        with_options(&site, &format!("-p {spec}"), &[&quoted, why, "like 8000:80"]);
    }
    with_options(
        &site,
        "-p ::1:8000:80",
        &["'::1:8000:80'", "invalid IP address: ::1", "like [::1]:8000:80"],
    );
    with_options(&site, "-p 8000:80/sctp", &["'8000:80/sctp'", "sctp cannot be published"]);
}

#[test]
fn a_port_that_is_taken_is_told_and_the_others_are_let_go() {
    let site = Site::new();
    let _tcp = site.host.listen(Family::V4.any(), 8000);
    let _udp = site.host.udp(Family::V6.any(), 8000);
    let holder = format!("process {}", std::process::id());
    let taken = "Bind for 0.0.0.0:8000 failed: address already in use";
    let parts = ["cannot publish", taken, &holder, "choose another"];
    with_options(&site, "-p 7999:79 -p 8000:80 -p 8001:81", &parts);
    with_options(&site, "-p 7998-8002:80-84", &parts);
    with_options(
        &site,
        "-p 8000:80/udp",
        &["cannot publish", "[::]:8000/udp", "address already in use", &holder],
    );
    with_options(
        &site,
        "-p 9000:80 -p 9000:81",
        &["cannot publish", "Bind for 0.0.0.0:9000 failed: port is already allocated"],
    );
    with_options(&site, "-p 203.0.113.9:80:80", &["203.0.113.9:80", "does not have this address"]);
}

#[test]
fn a_port_below_1024_takes_a_right() {
    let site = Site::new();
    let start = Hythe::of(&site.host, ANY.as_nobody()).options("-p 80:80");
    let parts = [
        "Bind for 0.0.0.0:80 failed: permission denied",
        "below 1024",
        "net.ipv4.ip_unprivileged_port_start=80",
    ];
    fails(&site, start, &TRUE, &parts);
}

#[test]
fn a_host_without_tun_is_told_how_to_get_it() {
    let site = Site::new();
    let parts = ["/dev/net/tun", "No such file or directory", "modprobe tun"];
    fails(&site, start(&site).mounts(Mounts::hide_tun), &TRUE, &parts);
}

#[test]
fn a_user_who_may_not_make_namespaces_is_told_what_would_allow_it() {
    let site = Site::new();
    // In a user namespace of its own, so that the limit is nobody else's. It lasts as long as somebody is in it.
    let mut keeper = Command::new("unshare")
        .args(["--user", "sh", "-c", "echo; exec cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    BufReader::new(keeper.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
    let pid = keeper.id().to_string();
    for map in ["uid_map", "gid_map"] {
        fs::write(format!("/proc/{pid}/{map}"), "0 0 65536").unwrap();
    }
    let script = "echo 0 > /proc/sys/user/max_user_namespaces
                  exec setpriv --reuid=65534 --regid=65534 --clear-groups \"$0\" run -- true";
    let output = site.host.run(|| {
        let mounts = Mounts::unshare();
        mounts.offer_tun();
        let program = mounts.offer_program(Path::new(PROGRAM));
        let mut command = Command::new("nsenter");
        command
            .args(["--user", "--setuid=0", "--setgid=0", "--target", &pid, "sh", "-c", script])
            .arg(program);
        command.current_dir("/").output().unwrap()
    });
    drop(keeper.stdin.take());
    keeper.wait().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(FAILED), "{said}");
    let lines: Vec<&str> = said.lines().collect();
    let [line] = lines[..] else { panic!("one line was expected:\n{said}") };
    for part in ["hythe: ", "user namespace cannot be made", "user.max_user_namespaces"] {
        assert!(line.contains(part), "{line}");
    }
    assert_eq!(sockets(&site.host), "");
}

#[test]
fn a_chosen_subnet_that_covers_a_network_of_the_host_is_refused() {
    let site = Site::new();
    with_options(&site, "--subnet 10.77.0.0/16", &["--subnet 10.77.0.0/16", "10.77.0.0/24", "choose"]);
    with_options(&site, "--subnet6 fd77::/64", &["--subnet6 fd77::/64", "choose"]);
}

#[test]
fn a_configuration_that_cannot_be_read_is_told_with_where_and_why() {
    let (site, directory) = (Site::new(), Directory::new());
    let there = directory.path();
    with_options(
        &site,
        &format!("--config {}/none.toml", there.display()),
        &["--config", "none.toml", "No such file"],
    );
    with_options(&site, &format!("--config {}", there.display()), &["--config", "Is a directory"]);
    for (content, why) in [
        ("mtu = 1500\nmtoo = 1500\n", "line 2: unknown field `mtoo`"),
        ("mtu = 1500\npublish = [\n", "line 2"),
        ("mtu = 'many'\n", "line 1: invalid type"),
        ("\n\nmac = 'mine'\n", "line 3"),
        ("engine = 'warp'\n", "line 1: unknown variant `warp`"),
        ("config = 'other.toml'\n", "line 1: unknown field `config`"),
    ] {
        let file = directory.file("bad.toml", content);
        with_options(&site, &format!("--config {}", file.display()), &["--config", "bad.toml", why]);
    }
    // What the file says is checked as what the command line says.
    let file = directory.file("bad.toml", "publish = ['80:x']\n");
    with_options(&site, &format!("--config {}", file.display()), &["invalid containerPort: x"]);

    let file = directory.file("secret.toml", "mtu = 1500\n");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    let start = Hythe::of(&site.host, ANY.as_nobody()).options(&format!("--config {}", file.display()));
    fails(&site, start, &TRUE, &["--config", "secret.toml", "Permission denied"]);
}

#[test]
fn a_capture_that_cannot_be_written_is_told() {
    let (site, directory) = (Site::new(), Directory::new());
    let path = format!("{}/none/file.pcapng", directory.path().display());
    with_options(&site, &format!("--capture {path}"), &["--capture", &path, "No such file"]);
}

#[test]
fn a_command_that_cannot_be_run_has_the_exit_statuses_of_env() {
    let (site, directory) = (Site::new(), Directory::new());
    let plain = directory.file("plain", "no program\n").to_string_lossy().into_owned();
    let missing = format!("{}/missing", directory.path().display());
    let odd = directory.script("odd", "").to_string_lossy().into_owned();
    fs::write(&odd, "#!/no/such/interpreter\n").unwrap();
    let run =
        |command: &str| start(&site).options("-p 8000:80").to_the_end("run", &["--", command, "argument"]);
    for (command, status, parts) in [
        ("no-such-command", 127, ["no-such-command: not found", "PATH"]),
        (&missing, 127, ["missing: not found", "No such file"]),
        (&odd, 127, ["odd: ", "interpreter"]),
        (&plain, 126, ["plain: cannot be executed", "Permission denied"]),
        ("/", 126, ["/: cannot be executed", "Permission denied"]),
    ] {
        assert_failed(&run(command), status, &parts);
        assert_eq!(sockets(&site.host), "");
    }
}

#[test]
fn a_namespace_that_is_not_there_cannot_be_joined() {
    let (site, directory) = (Site::new(), Directory::new());
    let attach = |words: &[&str], parts: &[&str]| {
        let ended = start(&site).options("-p 8000:80").to_the_end("attach", words);
        assert_failed(&ended, FAILED, parts);
        assert_eq!(sockets(&site.host), "");
    };
    attach(&["--netns", "/run/netns/none"], &["/run/netns/none", "No such file or directory"]);
    let file = directory.file("plain", "").to_string_lossy().into_owned();
    attach(&["--netns", &file], &[&file, "is it a namespace?"]);
    // Above the kernel's limit of process numbers.
    attach(&["--pid", "4194305"], &["process 4194305", "No such process"]);
    attach(&["--pid", "0"], &["process 0", "Invalid argument"]);
    let guest = Netns::new();
    guest.ip("link add eth0 type veth peer name eth1");
    let path = guest.path().to_string_lossy().into_owned();
    attach(&["--netns", &path], &["eth0", "--interface"]);
}

#[test]
fn the_exit_status_is_the_commands() {
    let site = Site::new();
    for (script, status) in
        [("exit 0", 0), ("exit 7", 7), ("exit 125", 125), ("kill -9 $$", 137), ("kill $$", 143)]
    {
        let ended = start(&site).command(&["sh", "-c", script]).end();
        ended.assert_clean(status);
        assert_eq!(ended.stderr, "");
    }
}
