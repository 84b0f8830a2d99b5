//! What hythe may do: make a namespace with a tap, bind ports, open descriptors.

use std::fs;

use caps::{CapSet, Capability};
use nix::sys::resource::{Resource, getrlimit};

use super::Finding;
use crate::namespace::{Trial, try_namespace};

/// Below this many descriptors little is left for the guest's conversations.
const DESCRIPTORS_FEW: u64 = 4096;
/// What a start takes, and a little more.
const DESCRIPTORS_LEAST: u64 = 512;

/// Capabilities that make a difference.
const CAPABILITIES: [(Capability, &str); 3] = [
    (Capability::CAP_NET_ADMIN, "CAP_NET_ADMIN"),
    (Capability::CAP_NET_BIND_SERVICE, "CAP_NET_BIND_SERVICE"),
    (Capability::CAP_NET_RAW, "CAP_NET_RAW"),
];

pub(super) fn examine() -> Vec<Finding> {
    let has = |capability| caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false);
    let owned = CAPABILITIES.iter().filter(|(capability, _)| has(*capability)).map(|(_, name)| *name);
    let trial = try_namespace();
    let start = fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
    let start = start.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(1024);
    let mut findings = tap(trial);
    findings.push(capabilities(&owned.collect::<Vec<_>>()));
    findings.push(ports(start, has(Capability::CAP_NET_BIND_SERVICE)));
    findings.push(descriptors(getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard)));
    findings
}

fn tap(trial: Trial) -> Vec<Finding> {
    const GUESTS: &str = "hythe run and hythe attach have a link; hythe vm needs none";
    const NO_GUESTS: &str = "hythe run and hythe attach have no link to their guest; hythe vm works";
    const RUNS: &str = "hythe run makes a network of its own for a command";
    const RUNS_NOT: &str = "hythe run cannot make a network for a command";
    let namespace = match trial.namespace {
        Ok(()) => Finding::ok("namespace", "can be made", RUNS),
        Err(why) => Finding::problem(
            "namespace",
            why,
            RUNS_NOT,
            "run as root, or allow user namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, \
             kernel.apparmor_restrict_unprivileged_userns)",
        ),
    };
    let tap = match trial.tap {
        Ok(true) => Finding::ok("tap", "/dev/net/tun makes taps, with segmentation of UDP", GUESTS),
        Ok(false) => Finding::warning(
            "tap",
            "/dev/net/tun makes taps, without segmentation of UDP",
            "the guest sends its datagrams one by one",
            "Linux 6.2 or later",
        ),
        Err(why) => Finding::problem(
            "tap",
            why,
            NO_GUESTS,
            "modprobe tun; chmod 0666 /dev/net/tun; in a container: --device /dev/net/tun",
        ),
    };
    vec![namespace, tap]
}

fn capabilities(owned: &[&str]) -> Finding {
    let found = if owned.is_empty() { "none that matter".to_string() } else { owned.join(", ") };
    Finding::ok("capabilities", found, "none is needed, and none is kept by who reads the guest's frames")
}

fn ports(start: u16, may_bind: bool) -> Finding {
    const ALL: &str = "every port can be published";
    if may_bind || start <= 1 {
        let why = if may_bind { "CAP_NET_BIND_SERVICE is there" } else { "no port needs a right" };
        return Finding::ok("ports", why, ALL);
    }
    Finding::warning(
        "ports",
        format!("those below {start} take a right that is not there"),
        "they cannot be published",
        "sysctl net.ipv4.ip_unprivileged_port_start=80, or start hythe as root: it gives up all rights but this one",
    )
}

fn descriptors(hard: u64) -> Finding {
    const SUBJECT: &str = "descriptors";
    const REMEDY: &str =
        "ulimit -Hn 1048576, LimitNOFILE= of the service, or --ulimit nofile= of the container";
    let found = format!("{hard} (the hard limit of RLIMIT_NOFILE)");
    match hard {
        0..DESCRIPTORS_LEAST => Finding::problem(SUBJECT, found, "too few for a start", REMEDY),
        DESCRIPTORS_LEAST..DESCRIPTORS_FEW => {
            Finding::warning(SUBJECT, found, "each conversation of the guest takes one: few are left", REMEDY)
        }
        _ => Finding::ok(SUBJECT, found, "each conversation of the guest takes one"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Standing;
    use super::*;

    #[test]
    fn a_guest_takes_a_namespace_and_a_tap() {
        let standings = |trial| tap(trial).iter().map(|finding| finding.standing).collect::<Vec<_>>();
        let no = || "it may not".to_string();
        assert_eq!(standings(Trial { namespace: Ok(()), tap: Ok(true) }), [Standing::Ok; 2]);
        assert_eq!(standings(Trial { namespace: Ok(()), tap: Ok(false) }), [Standing::Ok, Standing::Warning]);
        assert_eq!(standings(Trial { namespace: Err(no()), tap: Err(no()) }), [Standing::Problem; 2]);
    }

    #[test]
    fn limits_have_their_grades() {
        for (hard, standing) in [
            (100, Standing::Problem),
            (1024, Standing::Warning),
            (4096, Standing::Ok),
            (1 << 20, Standing::Ok),
        ] {
            assert_eq!(descriptors(hard).standing, standing, "{hard}");
        }
        assert_eq!(ports(1024, false).standing, Standing::Warning);
        assert_eq!(ports(1024, true).standing, Standing::Ok);
        assert_eq!(ports(0, false).standing, Standing::Ok);
        assert_eq!(capabilities(&[]).found, "none that matter");
    }
}
