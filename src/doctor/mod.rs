//! What hythe finds on a host before it runs there: what works, what does not, what that means, and what to do about it.
//!
//! Everything is tried as hythe itself will use it, and nothing of it stays: a ring, sockets, a namespace with a tap (in a process of
//! its own). What is found is looked at by functions without effects, which the tests call with hosts of their own making.

mod kernel;
mod network;
mod rights;

use std::fmt;

use serde::Serialize;

/// How something stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// As it should be.
    Ok,
    /// hythe runs, and does less or more slowly.
    Warning,
    /// hythe does not run.
    Problem,
}

/// One thing that was looked at.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Finding {
    /// What.
    pub subject: &'static str,
    /// How it stands.
    pub standing: Standing,
    /// What is there.
    pub found: String,
    /// What follows from it for the guest.
    pub means: &'static str,
    /// What to do, where something can be done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Finding {
    fn ok(subject: &'static str, found: impl Into<String>, means: &'static str) -> Self {
        Self { subject, standing: Standing::Ok, found: found.into(), means, remedy: None }
    }

    fn warning(
        subject: &'static str,
        found: impl Into<String>,
        means: &'static str,
        remedy: impl Into<String>,
    ) -> Self {
        let remedy = Some(remedy.into());
        Self { subject, standing: Standing::Warning, found: found.into(), means, remedy }
    }

    fn problem(
        subject: &'static str,
        found: impl Into<String>,
        means: &'static str,
        remedy: impl Into<String>,
    ) -> Self {
        Self { standing: Standing::Problem, ..Self::warning(subject, found, means, remedy) }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let standing = match self.standing {
            Standing::Ok => "ok",
            Standing::Warning => "warning",
            Standing::Problem => "problem",
        };
        writeln!(f, "{standing:8} {}: {}", self.subject, self.found)?;
        writeln!(f, "         {}", self.means)?;
        self.remedy.iter().try_for_each(|remedy| writeln!(f, "         → {remedy}"))
    }
}

/// All that was looked at.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Report {
    /// Nothing keeps hythe from running.
    pub can_run: bool,
    /// What was found, in the order in which it is looked at.
    pub findings: Vec<Finding>,
}

impl Report {
    fn new(findings: Vec<Finding>) -> Self {
        let can_run = findings.iter().all(|finding| finding.standing != Standing::Problem);
        Self { can_run, findings }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.findings.iter().try_for_each(|finding| finding.fmt(f))?;
        f.write_str(if self.can_run { "hythe can run here.\n" } else { "hythe cannot run here.\n" })
    }
}

/// Looks at the host. There must be no other thread yet: a process is forked.
pub fn examine() -> Report {
    // First what forks; the rest starts threads.
    let mut findings = rights::examine();
    let at = findings.len();
    findings.extend(kernel::examine());
    findings.rotate_left(at);
    findings.extend(network::examine());
    Report::new(findings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_problem_is_enough_and_warnings_are_not() {
        let ok = Finding::ok("a", "b", "c");
        let warning = Finding::warning("a", "b", "c", "d");
        let problem = Finding::problem("a", "b", "c", "d");
        assert!(Report::new(vec![ok.clone(), warning.clone()]).can_run);
        let report = Report::new(vec![ok, warning, problem]);
        assert!(!report.can_run);
        let text = report.to_string();
        let expected = "ok       a: b\n         c\nwarning  a: b\n         c\n         → d\nproblem  a: b\n";
        assert!(text.starts_with(expected) && text.ends_with("hythe cannot run here.\n"), "{text}");
    }
}
