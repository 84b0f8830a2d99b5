//! `hythe doctor` on hosts that are well, and on hosts with things broken on purpose.

use std::collections::BTreeMap;
use std::process::{Command, Output};

use crate::rig::dns_server::DnsServer;
use crate::rig::hythe::PROGRAM;
use crate::rig::mounts::Mounts;
use crate::rig::netns::Netns;
use crate::rig::site::{Family, Site};

/// Runs it in a namespace, on a thread whose mounts are its own.
fn doctor(
    host: &Netns,
    mounts: impl FnOnce(&Mounts) + Send,
    command: impl FnOnce(&Mounts) -> Command + Send,
) -> Output {
    host.run(|| {
        let own = Mounts::unshare();
        let mut command = command(&own);
        mounts(&own);
        for name in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
            command.env_remove(name);
        }
        command.env_remove("HYTHE_LOG").output().unwrap()
    })
}

/// What it found, by subject: how it stands, and what is said of it.
fn findings(output: &Output) -> (bool, BTreeMap<String, (String, String)>) {
    let report: serde_json::Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_string();
    let findings = report["findings"].as_array().unwrap().iter();
    let findings = findings.map(|one| {
        let says = one["remedy"].as_str().is_some() || one["standing"] == "ok";
        assert!(says && !text(&one["means"]).is_empty(), "what to do about it? {one}");
        (text(&one["subject"]), (text(&one["standing"]), text(&one["found"])))
    });
    (report["can_run"].as_bool().unwrap(), findings.collect())
}

#[test]
fn a_host_that_is_well_is_told_so() {
    let site = Site::new();
    let far = Family::V4.far();
    let _resolver = DnsServer::start(&site.far, far, 1);
    site.host.sysctl("ipv4/ping_group_range", "0 2147483647");
    let plain = |words: &'static [&str]| {
        move |_: &Mounts| {
            let mut command = Command::new(PROGRAM);
            command.arg("doctor").args(words);
            command
        }
    };
    let resolv_conf = format!("nameserver {far}\n");
    let output = doctor(&site.host, |mounts| mounts.resolv_conf(&resolv_conf), plain(&["--json"]));
    let (can_run, findings) = findings(&output);
    assert!(can_run && output.status.success(), "{findings:?}");
    for subject in [
        "namespace",
        "tap",
        "ping",
        "ports",
        "resolv.conf",
        "resolver",
        "proxy",
        "routes",
        "subnets",
        "capabilities",
    ] {
        assert_eq!(findings[subject].0, "ok", "{subject}: {}", findings[subject].1);
    }
    assert!(findings["resolver"].1.starts_with(&format!("{far}:53 answers in ")), "{findings:?}");
    assert!(findings.contains_key("engine") && findings.contains_key("peek offset"));
    assert!(findings.contains_key("descriptors") && findings.contains_key("UDP segmentation"));

    let output = doctor(&site.host, |mounts| mounts.resolv_conf(&resolv_conf), plain(&[]));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("ok       tap: ") && text.ends_with("hythe can run here.\n"), "{text}");
    assert!(output.status.success() && output.stderr.is_empty());
    // Nothing of what was tried stays.
    assert_eq!(site.host.command(&["ip", "-o", "link"]).lines().count(), 2, "lo and up0");
}

#[test]
fn what_is_broken_is_named_with_what_to_do_and_a_problem_is_the_exit_status() {
    let site = Site::new();
    let far = Family::V4.far();
    let silent = DnsServer::silent(&site.far, far);
    site.host.ip("route add 192.168.0.0/16 via 10.77.0.1");
    let nobody = |limit: &'static str| {
        move |mounts: &Mounts| {
            let program = mounts.offer_program(PROGRAM.as_ref());
            let mut command = Command::new("sh");
            let line = format!(
                "ulimit -n {limit}; HTTPS_PROXY=http://127.0.0.1:3128 exec setpriv --reuid=65534 --regid=65534 --clear-groups \
                 -- {} doctor --json",
                program.display()
            );
            command.args(["-c", &line]).current_dir("/");
            command
        }
    };
    let resolv_conf = format!("nameserver {far}\nnameserver 10.77.0.1\n");
    let output = doctor(
        &site.host,
        |mounts| {
            mounts.resolv_conf(&resolv_conf);
            mounts.hide_tun();
        },
        nobody("300"),
    );
    let (can_run, found) = findings(&output);
    assert!(!can_run && output.status.code() == Some(1), "{found:?}");
    for (subject, standing, says) in [
        ("tap", "problem", "/dev/net/tun"),
        ("namespace", "ok", "can be made"),
        ("descriptors", "problem", "300"),
        ("ping", "warning", "ping sockets"),
        ("ports", "warning", "below 1024"),
        ("proxy", "warning", "HTTPS_PROXY=http://127.0.0.1:3128"),
        ("subnets", "warning", "a route of the host covers 192.168.65.0/24"),
        ("resolver", "warning", "does not answer"),
    ] {
        let (stands, said) = &found[subject];
        assert!(stands == standing && said.contains(says), "{subject}: {stands}: {said}");
    }
    assert!(!silent.asked().is_empty());

    // Warnings alone keep nobody from running.
    site.host.ip("route del default
                  -6 route del default");
    let output = doctor(
        &site.host,
        |mounts| {
            mounts.offer_tun();
            mounts.etc(&[("passwd", "")]);
        },
        nobody("2000"),
    );
    let (can_run, found) = findings(&output);
    assert!(can_run && output.status.success(), "{found:?}");
    for (subject, says) in [
        ("resolv.conf", "cannot be read"),
        ("resolver", "127.0.0.1:53 does not answer"),
        ("routes", "no default route"),
        ("descriptors", "2000"),
    ] {
        let (stands, said) = &found[subject];
        assert!(stands == "warning" && said.contains(says), "{subject}: {stands}: {said}");
    }
}
