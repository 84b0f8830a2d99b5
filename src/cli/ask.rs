//! `hythe publish`, `unpublish`, `ports` and `explain`: what is asked of a running hythe; and `hythe doctor`, of the host.

use std::io::Write;
use std::path::Path;

use anyhow::Context;
use hyper::Method;

use crate::control::client::{AskError, ask};
use crate::control::explanation::Explanation;
use crate::control::place::Wanted;
use crate::control::shapes::{Code, Port, Ports, Publish, Status};
use crate::host::occupant::{self, Occupant};
use crate::policy::destination::Asked;
use crate::policy::publish::{self, HostPort};

/// Publishes ports, and says where each is found.
pub fn publish(wanted: &Wanted, specs: Vec<String>) -> anyhow::Result<u8> {
    let parsed = parse(&specs)?;
    let body = serde_json::to_vec(&Publish { publish: specs, while_connected: false })?;
    let path = wanted.find()?;
    let answer = ask(&path, Method::POST, "/v1/ports", Some(body))
        .map_err(|error| with_occupant(error, |occupant| is_asked(&path, occupant)))?;
    // What the user has named need not be told.
    let chosen = parsed.iter().any(|request| !matches!(request.host_port, HostPort::One(_)));
    if chosen {
        print(&lines(&serde_json::from_slice::<Ports>(&answer)?.ports))?;
    }
    Ok(0)
}

/// Unpublishes ports.
pub fn unpublish(wanted: &Wanted, specs: &[String]) -> anyhow::Result<u8> {
    parse(specs)?;
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.extend_pairs(specs.iter().map(|spec| ("spec", spec)));
    let target = format!("/v1/ports?{}", query.finish());
    ask(&wanted.find()?, Method::DELETE, &target, None)?;
    Ok(0)
}

/// Prints what is published.
pub fn ports(wanted: &Wanted, as_json: bool) -> anyhow::Result<u8> {
    let answer = ask(&wanted.find()?, Method::GET, "/v1/ports", None)?;
    let ports: Ports = serde_json::from_slice(&answer).context("the list of ports is not understood")?;
    if as_json {
        print(&format!("{}\n", serde_json::to_string_pretty(&ports)?))?;
    } else {
        print(&lines(&ports.ports))?;
    }
    Ok(0)
}

/// Looks at the host.
pub fn doctor(as_json: bool) -> anyhow::Result<u8> {
    let report = crate::doctor::examine();
    if as_json {
        print(&format!("{}\n", serde_json::to_string_pretty(&report)?))?;
    } else {
        print(&report.to_string())?;
    }
    Ok(u8::from(!report.can_run))
}

/// Tells what becomes of traffic to a destination.
pub fn explain(wanted: &Wanted, destination: &str, as_json: bool) -> anyhow::Result<u8> {
    // What means nothing is told without asking anybody.
    let asked: Asked = destination.parse()?;
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.append_pair("destination", &asked.to_string());
    let target = format!("/v1/explain?{}", query.finish());
    let answer = ask(&wanted.find()?, Method::GET, &target, None)?;
    let explanation: Explanation =
        serde_json::from_slice(&answer).context("the explanation is not understood")?;
    if as_json {
        print(&format!("{}\n", serde_json::to_string_pretty(&explanation)?))?;
    } else {
        print(&explanation.to_string())?;
    }
    Ok(0)
}

/// What means nothing is told without asking anybody.
fn parse(specs: &[String]) -> anyhow::Result<Vec<publish::PublishRequest>> {
    let requests: Result<Vec<_>, _> = specs.iter().map(|spec| publish::parse(spec)).collect();
    Ok(requests?.into_iter().flatten().collect())
}

/// As `docker port` prints them: by the guest's port.
fn lines(ports: &[Port]) -> String {
    let mut bindings: Vec<_> = ports.iter().map(|port| port.binding).collect();
    bindings.sort_by_key(|binding| (binding.guest_port, binding.protocol, binding.endpoint()));
    let lines: Vec<String> = bindings.iter().map(ToString::to_string).collect();
    lines.iter().flat_map(|line| [line.as_str(), "\n"]).collect()
}

/// The running hythe cannot see who has a port; who asks can. Where it is the one that was asked itself, the port is
/// not published (that is told otherwise): it stands for the guest's in a conversation.
fn with_occupant(error: AskError, is_asked: impl FnOnce(&Occupant) -> bool) -> anyhow::Error {
    let binding = match &error {
        AskError::Problem(problem) if problem.code == Code::AddressInUse => problem.port,
        _ => None,
    };
    let Some((binding, occupant)) = binding.and_then(|binding| Some((binding, occupant::of(&binding)?)))
    else {
        return error.into();
    };
    if is_asked(&occupant) {
        return anyhow::anyhow!(
            "Bind for {} failed: a conversation of the guest has this port; it can be published when that is over, \
             or at the start (-p)",
            binding.place()
        );
    }
    anyhow::anyhow!("{error} (it is {occupant})")
}

/// Whether a process is the hythe that is asked.
fn is_asked(path: &Path, process: &Occupant) -> bool {
    let answer = ask(path, Method::GET, "/v1/status", None).ok();
    let status = answer.and_then(|answer| serde_json::from_slice::<Status>(&answer).ok());
    status.is_some_and(|status| status.pid == Some(process.pid))
}

/// Prints a text.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        // Whoever closed it does not want to know more.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("standard output"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_told_as_docker_port_tells_them() {
        let text = r#"{"ports": [
            {"id": 1, "address": "::", "host_port": 8000, "guest_port": 80, "protocol": "tcp"},
            {"id": 2, "address": "0.0.0.0", "host_port": 8000, "guest_port": 80, "protocol": "tcp"},
            {"id": 3, "address": "127.0.0.1", "host_port": 5353, "guest_port": 53, "protocol": "udp"}
        ]}"#;
        let ports: Ports = serde_json::from_str(text).unwrap();
        let expected = "53/udp -> 127.0.0.1:5353\n80/tcp -> 0.0.0.0:8000\n80/tcp -> [::]:8000\n";
        assert_eq!(lines(&ports.ports), expected);
    }
}
