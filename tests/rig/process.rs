//! What the kernel says about processes.

use std::fs;
use std::os::unix::fs::MetadataExt;

/// All processes.
pub fn all() -> impl Iterator<Item = i32> {
    fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The network namespace of a process.
pub fn netns_inode(pid: i32) -> Option<u64> {
    fs::metadata(format!("/proc/{pid}/ns/net")).ok().map(|namespace| namespace.ino())
}

/// Processes that were started with a variable in their environment, and what came of them.
pub fn with_environment(variable: &str) -> Vec<i32> {
    let has = |pid: &i32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|entry| entry == variable.as_bytes())
    };
    all().filter(has).collect()
}

/// What the kernel calls a process: the program's name, most often.
pub fn name(pid: i32) -> Option<String> {
    Some(fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim_end().to_string())
}

/// The words that a process was started with, each with a zero byte behind it.
pub fn arguments(pid: i32) -> Vec<u8> {
    fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default()
}

/// The most memory that a process has had in use, in KiB.
pub fn peak_resident_kib(pid: i32) -> u64 {
    status_field(pid, "VmHWM")
}

/// Children of a process.
pub fn children(parent: i32) -> Vec<i32> {
    all().filter(|pid| stat_field(*pid, 4) == Some(parent as u64)).collect()
}

/// A field of /proc/PID/stat by its number in proc(5), from the third on.
fn stat_field(pid: i32, number: usize) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the name in parentheses, which may hold anything.
    stat.rsplit_once(')')?.1.split_whitespace().nth(number - 3)?.parse().ok()
}

fn status_field(pid: i32, key: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.and_then(|value| value.split_whitespace().next()?.parse().ok()).unwrap_or_else(|| panic!("no {key}"))
}

/// Threads of a process; the kernel's own threads that work for its rings count as its.
pub fn threads(pid: i32) -> u64 {
    status_field(pid, "Threads")
}

/// /proc/PID/task/TID/status of each thread.
pub fn thread_statuses(pid: i32) -> Vec<String> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    threads.map(|thread| fs::read_to_string(thread.path().join("status")).unwrap()).collect()
}

/// Memory that a process has in use, in KiB.
pub fn resident_kib(pid: i32) -> u64 {
    status_field(pid, "VmRSS")
}

/// CPU time that a process has used, in ticks of 10 ms.
pub fn cpu_ticks(pid: i32) -> u64 {
    stat_field(pid, 14).unwrap() + stat_field(pid, 15).unwrap()
}

/// What a process's descriptors are.
pub fn descriptors(pid: i32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let target = |entry: fs::DirEntry| Some(fs::read_link(entry.path()).ok()?.to_string_lossy().into_owned());
    entries.filter_map(target).collect()
}
