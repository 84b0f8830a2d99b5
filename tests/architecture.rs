//! The house stays a house: what may use what, and what no file may contain.
//!
//! Reads the sources as text. docs/ARCHITECTURE.md tells the same in words.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Which rooms a room of `src/` may use, besides itself. The order is from the ground up: nobody uses a later one.
const MAY_USE: &[(&str, &[&str])] = &[
    ("random", &[]),
    ("time", &[]),
    ("channel", &[]),
    ("fork", &[]),
    ("frame", &[]),
    ("flow", &["frame", "time"]),
    ("relay", &["frame", "time"]),
    ("io", &["frame"]),
    ("policy", &["frame"]),
    ("link", &["frame", "io"]),
    ("exchange", &["frame", "flow", "io", "link", "policy"]),
    ("observe", &["exchange", "frame", "time"]),
    ("host", &["frame", "flow", "io", "policy"]),
    ("worker", &["exchange", "flow", "frame", "host", "io", "link", "observe", "policy", "relay", "time"]),
    ("port_broker", &["channel", "fork", "host", "policy"]),
    ("pac", &["channel", "fork", "policy"]),
    ("netlink", &["frame"]),
    ("monitor", &["frame", "link"]),
    ("control", &["monitor", "policy"]),
    ("shim", &["control", "policy"]),
    ("config", &["control", "frame", "host", "netlink", "policy"]),
    ("namespace", &["channel", "config", "fork", "frame", "host", "link", "netlink"]),
    (
        "slow",
        &[
            "channel",
            "control",
            "exchange",
            "flow",
            "frame",
            "host",
            "namespace",
            "netlink",
            "observe",
            "pac",
            "policy",
            "port_broker",
            "relay",
            "time",
        ],
    ),
    ("doctor", &["config", "host", "namespace", "netlink", "policy", "slow"]),
    ("sandbox", &["exchange", "host", "link", "monitor", "observe", "pac", "port_broker", "slow"]),
    (
        "node",
        &[
            "channel",
            "config",
            "control",
            "exchange",
            "flow",
            "fork",
            "host",
            "io",
            "link",
            "monitor",
            "namespace",
            "netlink",
            "observe",
            "pac",
            "policy",
            "port_broker",
            "sandbox",
            "slow",
            "time",
            "worker",
        ],
    ),
    (
        "cli",
        &[
            "config",
            "control",
            "doctor",
            "host",
            "link",
            "monitor",
            "namespace",
            "netlink",
            "node",
            "policy",
            "slow",
        ],
    ),
];

/// The simulation takes the place of everything at the edges, so it may see everything below the worker, and it.
const SIMULATION: &str = "sim";

/// Rooms without files, sockets, rings, threads or a clock: time and randomness are arguments.
const PURE: &[&str] = &["frame", "flow", "relay", "policy"];
const IMPURE: &[&str] = &[
    "libc::",
    "nix::",
    "std::fs",
    "std::thread",
    "std::process",
    "Instant::now",
    "SystemTime",
    "TcpStream",
    "UdpSocket",
    "rand::",
];

/// Lines that a file may have, its tests left out.
const LINES_MAX: usize = 660;

struct Source {
    path: PathBuf,
    room: String,
    text: String,
    /// The text without its tests.
    code: String,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                let inside = path.strip_prefix(&root).unwrap().to_path_buf();
                let room =
                    inside.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_string();
                let code = without_tests(&text, &inside);
                found.push(Source { path: inside, room, text, code });
            }
        }
    }
    assert!(found.len() > 50, "the sources were not found");
    found
}

/// What stands before the tests; nothing of a file that is tests as a whole.
fn without_tests(text: &str, path: &Path) -> String {
    let name = path.file_stem().unwrap().to_str().unwrap();
    let is_in_tests = path.components().any(|folder| folder.as_os_str() == "hostile");
    if is_in_tests || ["tests", "script", "fake_server"].contains(&name) {
        return String::new();
    }
    let tests = ["\n#[cfg(test)]\nmod ", "\n#[cfg(test)]\npub(super) mod ", "\n#[cfg(all(test"]
        .iter()
        .filter_map(|mark| text.find(mark))
        .min();
    text[..tests.unwrap_or(text.len())].to_string()
}

/// Lines of code: comments and documentation left out.
fn statements(code: &str) -> impl Iterator<Item = (usize, &str)> {
    code.lines()
        .enumerate()
        .map(|(index, line)| (index + 1, line))
        .filter(|(_, line)| !line.trim_start().starts_with("//"))
}

/// Rooms that a line names: `crate::room`, and each of `crate::{room, …}`.
fn rooms_named(line: &str) -> Vec<&str> {
    let mut rooms = Vec::new();
    for (at, word) in line.match_indices("crate::") {
        let rest = &line[at + word.len()..];
        let list = rest.strip_prefix('{').map_or(rest, |list| list.split('}').next().unwrap());
        let parts: Vec<&str> = if rest.starts_with('{') { list.split(", ").collect() } else { vec![list] };
        rooms.extend(
            parts
                .into_iter()
                .map(|part| part.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap()),
        );
    }
    rooms
}

#[test]
fn no_arrow_points_up() {
    let order: Vec<&str> = MAY_USE.iter().map(|(room, _)| *room).collect();
    for (index, (room, uses)) in MAY_USE.iter().enumerate() {
        for used in *uses {
            assert!(order[..index].contains(used), "{room} stands before {used}, which it may use");
        }
    }
    let may_use: BTreeMap<&str, &[&str]> = MAY_USE.iter().copied().collect();
    let mut arrows = 0;
    for source in sources() {
        if matches!(source.room.as_str(), "main" | "bin" | "lib" | SIMULATION) {
            continue;
        }
        let allowed =
            may_use.get(source.room.as_str()).unwrap_or_else(|| panic!("{} is no known room", source.room));
        for (number, line) in statements(&source.code) {
            if line.contains("cfg(feature = \"sim\")") || line.contains("crate::sim::") {
                continue;
            }
            for room in rooms_named(line) {
                arrows += 1;
                assert!(
                    room == source.room || allowed.contains(&room),
                    "src/{}:{number}: {} may not use {room}: {line}",
                    source.path.display(),
                    source.room,
                );
            }
        }
    }
    assert!(arrows > 100, "only {arrows} imports were seen");
}

#[test]
fn the_simulation_is_seen_only_where_bugs_are_planted() {
    for source in sources().iter().filter(|source| source.room != SIMULATION) {
        let mut previous = "";
        for (number, line) in statements(&source.code) {
            if line.contains("crate::sim") {
                assert!(
                    line.contains("planted(")
                        && (previous.contains("cfg(feature = \"sim\")") || line.contains("cfg!(feature")),
                    "src/{}:{number}: {line}",
                    source.path.display()
                );
            }
            previous = line;
        }
    }
}

#[test]
fn pure_rooms_do_no_input_and_output() {
    for source in sources().iter().filter(|source| PURE.contains(&source.room.as_str())) {
        for (number, line) in statements(&source.code) {
            for word in IMPURE {
                assert!(
                    !line.contains(word),
                    "src/{}:{number}: {word} in a pure room",
                    source.path.display()
                );
            }
        }
    }
}

#[test]
fn a_worker_has_no_lock_and_waits_for_nothing() {
    let forbidden = [
        "Mutex",
        "RwLock",
        "Condvar",
        "std::fs",
        "std::thread::sleep",
        "println!",
        "to_socket_addrs",
        "block_on",
        "tokio",
    ];
    for source in sources()
        .iter()
        .filter(|source| ["worker", "relay", "flow", "frame", "link"].contains(&source.room.as_str()))
    {
        for (number, line) in statements(&source.code) {
            for word in forbidden {
                assert!(
                    !line.contains(word),
                    "src/{}:{number}: {word} on the path of a frame",
                    source.path.display()
                );
            }
        }
    }
}

#[test]
fn every_file_says_what_it_is_for_and_has_one_idea() {
    for source in sources() {
        let path = source.path.display();
        assert!(source.text.starts_with("//!"), "src/{path} does not begin by saying what it is for");
        let lines = source.code.lines().count();
        assert!(lines <= LINES_MAX, "src/{path} has {lines} lines without its tests: split it by idea");
    }
}

#[test]
fn nothing_is_left_to_do() {
    for source in sources() {
        for (number, line) in source.text.lines().enumerate() {
            for word in ["todo!", "unimplemented!", "TODO", "FIXME", "XXX", "#[ignore"] {
                assert!(!line.contains(word), "src/{}:{}: {word}", source.path.display(), number + 1);
            }
        }
    }
}

#[test]
fn unsafe_code_is_in_few_files_and_argued() {
    let mut files = BTreeSet::new();
    for source in sources() {
        let lines: Vec<&str> = source.code.lines().collect();
        for (index, line) in lines.iter().enumerate() {
            let is_block = line.contains("unsafe {") || line.contains("unsafe impl");
            if !is_block || line.trim_start().starts_with("//") {
                continue;
            }
            files.insert(source.path.display().to_string());
            let from = index.saturating_sub(8);
            let argued = lines[from..=index].iter().any(|line| line.contains("SAFETY:"));
            assert!(argued, "src/{}:{}: unsafe without an argument", source.path.display(), index + 1);
        }
    }
    // Each is a place where the kernel is given memory or descriptors; a new one has to be wanted.
    assert!(files.len() <= 24, "{files:?}");
}

#[test]
fn the_map_shows_every_room() {
    let map = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/ARCHITECTURE.md")).unwrap();
    let rooms: BTreeSet<String> = sources().into_iter().map(|source| source.room).collect();
    for room in rooms.iter().filter(|room| *room != "lib") {
        assert!(
            map.contains(&format!("`{room}/`")) || map.contains(&format!("`{room}.rs`")),
            "docs/ARCHITECTURE.md does not show src/{room}"
        );
    }
}
