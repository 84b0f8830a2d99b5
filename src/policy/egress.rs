//! Where a guest may go: rules, of which the first that means a destination decides. What none means is allowed.
//!
//! ```text
//! deny|allow TARGET[:PORTS][/tcp|/udp|/icmp] [guest=NAME] [dns=refused|nxdomain|resolve|ADDRESS] [text=WORDS…]
//! ```
//! A connection's name is known only once its first bytes are seen, so whoever has an address alone asks
//! [`Rules::decide_by_address`] whether that is enough. A rule counts what it refuses: workers and the slow path hold the same
//! rules, and no lock.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};

use super::pattern::{Pattern, PatternError};
use super::target::{Target, TargetProtocol};

/// Rules that there can be: each new flow walks them.
pub const RULES_MAX: usize = 4096;
/// The longest text, in bytes.
const TEXT_MAX: usize = 500;
/// What is said where a rule has no text of its own. It does not tell the rule: a guest need not know the others.
const TEXT: &str = "the rules of this host do not let guests go there";

/// What a rule says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// It may be reached.
    Allow,
    /// It may not.
    Deny,
}

/// What DNS says of a name that is denied.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DnsAnswer {
    /// The code REFUSED (RFC 1035, 4.1.1: "for policy reasons").
    #[default]
    Refused,
    /// That there is no such name.
    NxDomain,
    /// What it says of all others: connections are refused, and the guest can read why.
    Resolve,
    /// This address, and none of the other family.
    Address(IpAddr),
}

/// One rule.
#[derive(Debug)]
pub struct Rule {
    action: Action,
    pattern: Pattern,
    protocol: Option<TargetProtocol>,
    guest: Option<String>,
    dns: DnsAnswer,
    text: Option<String>,
    refusals: AtomicU64,
}

/// What is no rule.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RuleError {
    /// Its first word.
    #[error("'{}': a rule begins with 'allow' or 'deny'", .0.escape_debug())]
    Action(String),
    /// It has no target.
    #[error("a rule says what it is about: TARGET[:PORTS][/tcp|/udp|/icmp], or * for everything")]
    NoTarget,
    /// Its target.
    #[error(transparent)]
    Target(#[from] PatternError),
    /// ICMP with ports.
    #[error("ICMP has no ports")]
    PortsOfIcmp,
    /// A word behind the target.
    #[error("'{}': expected guest=NAME, dns=refused|nxdomain|resolve|ADDRESS or text=WORDS", .0.escape_debug())]
    Word(String),
    /// A word that only what denies can have.
    #[error("'{0}=': a rule that allows has nothing to say about refusals")]
    OfDeny(&'static str),
    /// The text.
    #[error("a text has 1 to {TEXT_MAX} bytes, and no control characters")]
    Text,
    /// Too many of them.
    #[error("there can be {RULES_MAX} rules")]
    TooMany,
}

impl Rule {
    /// What it says.
    pub fn action(&self) -> Action {
        self.action
    }

    /// What the guest is told where words can be said.
    pub fn text(&self) -> &str {
        self.text.as_deref().unwrap_or(TEXT)
    }

    /// What DNS says.
    pub fn dns(&self) -> DnsAnswer {
        self.dns
    }

    /// The guest that it is about, where it is about one alone.
    pub fn guest(&self) -> Option<&str> {
        self.guest.as_deref()
    }

    /// Counts a refusal by this rule. Deciding does not: whoever asks may only want to know.
    pub fn count_refusal(&self) {
        self.refusals.fetch_add(1, Ordering::Relaxed);
    }

    /// What was refused by this rule.
    pub fn refusals(&self) -> u64 {
        self.refusals.load(Ordering::Relaxed)
    }

    /// Whether it is about this port of this protocol.
    fn is_about(&self, port: u16, protocol: TargetProtocol) -> bool {
        self.protocol.is_none_or(|own| own == protocol) && self.pattern.ports().contains(port)
    }

    fn verdict(&self) -> Verdict<'_> {
        match self.action {
            Action::Allow => Verdict::Allow,
            Action::Deny => Verdict::Deny(self),
        }
    }

    /// Whether it leaves out no port and no protocol.
    fn is_about_all(&self) -> bool {
        self.protocol.is_none() && self.pattern.ports().is_all()
    }
}

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let shown = |text: &str| text.chars().take(100).collect::<String>();
        let (action, rest) = next_word(text);
        let action = match action {
            "allow" => Action::Allow,
            "deny" => Action::Deny,
            other => return Err(RuleError::Action(shown(other))),
        };
        let (target, mut rest) = next_word(rest);
        if target.is_empty() {
            return Err(RuleError::NoTarget);
        }
        let (pattern, protocol) = split_protocol(target);
        let pattern: Pattern = pattern.parse()?;
        if protocol == Some(TargetProtocol::Icmp) && !pattern.ports().is_all() {
            return Err(RuleError::PortsOfIcmp);
        }
        let mut rule = Self {
            action,
            pattern,
            protocol,
            guest: None,
            dns: DnsAnswer::default(),
            text: None,
            refusals: AtomicU64::new(0),
        };
        while !rest.is_empty() {
            let (word, behind) = next_word(rest);
            let wrong = || RuleError::Word(shown(word));
            let (key, value) = word.split_once('=').ok_or_else(wrong)?;
            match (key, action) {
                ("guest", _) if rule.guest.is_none() && !value.is_empty() => {
                    rule.guest = Some(value.to_string());
                }
                ("dns", Action::Deny) => rule.dns = value.parse().map_err(|()| wrong())?,
                ("text", Action::Deny) => {
                    // The rest of the line.
                    rule.text = Some(read_text(&rest["text=".len()..])?);
                    break;
                }
                ("dns", Action::Allow) => return Err(RuleError::OfDeny("dns")),
                ("text", Action::Allow) => return Err(RuleError::OfDeny("text")),
                _ => return Err(wrong()),
            }
            rest = behind;
        }
        Ok(rule)
    }
}

/// The first word, and what follows it.
fn next_word(text: &str) -> (&str, &str) {
    let text = text.trim_start();
    let (word, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    (word, rest.trim_start())
}

fn split_protocol(target: &str) -> (&str, Option<TargetProtocol>) {
    let named = target.rsplit_once('/').and_then(|(pattern, name)| {
        let protocol = match name {
            "tcp" => TargetProtocol::Tcp,
            "udp" => TargetProtocol::Udp,
            "icmp" => TargetProtocol::Icmp,
            _ => return None,
        };
        Some((pattern, Some(protocol)))
    });
    named.unwrap_or((target, None))
}

fn read_text(text: &str) -> Result<String, RuleError> {
    let text = text.trim();
    let is_fit = (1..=TEXT_MAX).contains(&text.len()) && !text.contains(char::is_control);
    if is_fit { Ok(text.to_string()) } else { Err(RuleError::Text) }
}

impl FromStr for DnsAnswer {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "refused" => Ok(Self::Refused),
            "nxdomain" => Ok(Self::NxDomain),
            "resolve" => Ok(Self::Resolve),
            address => address.parse().map(Self::Address).map_err(drop),
        }
    }
}

/// As it is written.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", if self.action == Action::Allow { "allow" } else { "deny" }, self.pattern)?;
        f.write_str(match self.protocol {
            None => "",
            Some(TargetProtocol::Tcp) => "/tcp",
            Some(TargetProtocol::Udp) => "/udp",
            Some(TargetProtocol::Icmp) => "/icmp",
        })?;
        if let Some(guest) = &self.guest {
            write!(f, " guest={guest}")?;
        }
        match self.dns {
            DnsAnswer::Refused => {}
            DnsAnswer::NxDomain => f.write_str(" dns=nxdomain")?,
            DnsAnswer::Resolve => f.write_str(" dns=resolve")?,
            DnsAnswer::Address(address) => write!(f, " dns={address}")?,
        }
        self.text.as_ref().map_or(Ok(()), |text| write!(f, " text={text}"))
    }
}

impl<'de> serde::Deserialize<'de> for Rule {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A copy counts for itself.
impl Clone for Rule {
    fn clone(&self) -> Self {
        Self {
            action: self.action,
            pattern: self.pattern.clone(),
            protocol: self.protocol,
            guest: self.guest.clone(),
            dns: self.dns,
            text: self.text.clone(),
            refusals: AtomicU64::new(self.refusals()),
        }
    }
}

/// The rules of one guest, in their order.
#[derive(Debug, Default)]
pub struct Rules(Vec<Rule>);

/// What rules say about a destination.
#[derive(Clone, Copy, Debug)]
pub enum Verdict<'r> {
    /// It may be reached.
    Allow,
    /// This rule denies it.
    Deny(&'r Rule),
}

impl Verdict<'_> {
    /// Whether it is a denial.
    pub fn is_deny(&self) -> bool {
        matches!(self, Self::Deny(_))
    }
}

/// What rules say about an address whose name may be known later.
#[derive(Clone, Copy, Debug)]
pub enum ByAddress<'r> {
    /// It may be reached under any name.
    Allow,
    /// It may be reached under no name. This rule says so, perhaps after others that would say the same.
    Deny(&'r Rule),
    /// It depends on the name.
    AskName,
}

impl Rules {
    /// Rules, less those that are about other guests than `name`.
    pub fn of_guest(rules: Vec<Rule>, name: Option<&str>) -> Result<Self, RuleError> {
        let is_ours = |rule: &Rule| rule.guest().is_none_or(|guest| name == Some(guest));
        let rules: Vec<Rule> = rules.into_iter().filter(is_ours).collect();
        if rules.len() > RULES_MAX { Err(RuleError::TooMany) } else { Ok(Self(rules)) }
    }

    /// Whether everything is allowed.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether any of them asks for a name.
    pub fn asks_names(&self) -> bool {
        self.0.iter().any(|rule| rule.pattern.asks_name())
    }

    /// The rules.
    pub fn iter(&self) -> std::slice::Iter<'_, Rule> {
        self.0.iter()
    }

    /// What is said about a destination. What it lacks, name or address, no rule can mean.
    pub fn decide(&self, target: &Target<'_>) -> Verdict<'_> {
        let means =
            |rule: &&Rule| rule.is_about(target.port, target.protocol) && rule.pattern.matches(target);
        self.0.iter().find(means).map_or(Verdict::Allow, Rule::verdict)
    }

    /// What is said about an address, where its name can still be found out.
    pub fn decide_by_address(&self, address: IpAddr, port: u16, protocol: TargetProtocol) -> ByAddress<'_> {
        let target = Target { name: None, address: Some(address), port, protocol };
        // What rules about names say that come first: where all of them and the first other one say the same, no name matters.
        let mut of_names = None;
        for rule in self.0.iter().filter(|rule| rule.is_about(port, protocol)) {
            if rule.pattern.asks_name() {
                if *of_names.get_or_insert(rule.action) != rule.action {
                    return ByAddress::AskName;
                }
            } else if rule.pattern.matches(&target) {
                return match (rule.action, of_names) {
                    (action, Some(other)) if other != action => ByAddress::AskName,
                    (Action::Allow, _) => ByAddress::Allow,
                    (Action::Deny, _) => ByAddress::Deny(rule),
                };
            }
        }
        if of_names == Some(Action::Deny) { ByAddress::AskName } else { ByAddress::Allow }
    }

    /// What DNS is to say about a name: whether it is denied whatever address and port it leads to. A rule that denies the name
    /// counts if no other has allowed it before, for any port; one that denies everything, if none has allowed any network
    /// before, where the name may lead.
    pub fn for_name(&self, name: &str) -> Verdict<'_> {
        let mut may_lead = false;
        for rule in &self.0 {
            let is_meant = rule.pattern.is_about_name(name);
            match rule.action {
                Action::Allow if is_meant => return Verdict::Allow,
                Action::Allow => may_lead |= rule.pattern.asks_address(),
                Action::Deny
                    if is_meant && rule.is_about_all() && (rule.pattern.asks_name() || !may_lead) =>
                {
                    return if rule.dns == DnsAnswer::Resolve { Verdict::Allow } else { Verdict::Deny(rule) };
                }
                Action::Deny => {}
            }
        }
        Verdict::Allow
    }
}

impl<'r> IntoIterator for &'r Rules {
    type Item = &'r Rule;
    type IntoIter = std::slice::Iter<'r, Rule>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::super::pattern::tests::any_pattern;
    use super::*;
    use TargetProtocol::{Icmp, Tcp, Udp};
    use proptest::prelude::*;

    fn rules(texts: &[&str]) -> Rules {
        let rule = |text: &&str| text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
        Rules::of_guest(texts.iter().map(rule).collect(), Some("web")).unwrap()
    }

    fn denied(rules: &Rules, name: Option<&str>, address: &str, port: u16, protocol: TargetProtocol) -> bool {
        let target = Target { name, address: Some(address.parse().unwrap()), port, protocol };
        rules.decide(&target).is_deny()
    }

    #[test]
    fn the_first_rule_that_means_a_destination_decides() {
        let rules = rules(&[
            "allow git.corp.example:443/tcp",
            "deny *.corp.example",
            "allow 10.1.0.0/16:53/udp",
            "deny 10.0.0.0/8",
            "deny *:25,465/tcp",
            "deny 192.0.2.0/24/icmp",
        ]);
        for (name, address, port, protocol, expected) in [
            (None, "198.51.100.1", 443, Tcp, false),
            (Some("git.corp.example"), "10.2.0.1", 443, Tcp, false),
            (Some("git.corp.example"), "10.2.0.1", 80, Tcp, true),
            (Some("wiki.corp.example"), "198.51.100.1", 443, Tcp, true),
            (Some("corp.example"), "198.51.100.1", 443, Tcp, false),
            (None, "10.1.0.1", 53, Udp, false),
            (None, "10.1.0.1", 53, Tcp, true),
            (None, "::ffff:10.2.0.1", 53, Udp, true),
            (None, "198.51.100.1", 25, Tcp, true),
            (None, "2001:db8::1", 465, Tcp, true),
            (None, "198.51.100.1", 25, Udp, false),
            (None, "192.0.2.1", 0, Icmp, true),
            (None, "192.0.2.1", 80, Tcp, false),
            (None, "10.2.0.1", 0, Icmp, true),
        ] {
            assert_eq!(denied(&rules, name, address, port, protocol), expected, "{name:?} {address} {port}");
        }
    }

    #[test]
    fn a_name_is_asked_for_only_where_it_matters() {
        let said = |texts: &[&str], address: &str| {
            let rules = rules(texts);
            match rules.decide_by_address(address.parse().unwrap(), 443, Tcp) {
                ByAddress::Allow => "allow",
                ByAddress::Deny(_) => "deny",
                ByAddress::AskName => "ask",
            }
        };
        for (texts, address, expected) in [
            (&[][..], "192.0.2.1", "allow"),
            (&["deny ads.test"], "192.0.2.1", "ask"),
            (&["deny ads.test", "deny *"], "192.0.2.1", "deny"),
            (&["allow ok.test", "deny *"], "192.0.2.1", "ask"),
            (&["allow ok.test"], "192.0.2.1", "allow"),
            (&["allow 192.0.2.0/24", "allow ok.test", "deny *"], "192.0.2.1", "allow"),
            (&["allow 192.0.2.0/24", "allow ok.test", "deny *"], "192.0.3.1", "ask"),
            (&["deny 192.0.2.0/24", "deny ads.test"], "192.0.2.1", "deny"),
            (&["deny ads.test", "allow ok.ads.test"], "192.0.2.1", "ask"),
            (&["allow ok.ads.test", "deny ads.test"], "192.0.2.1", "ask"),
            // Of other ports and protocols.
            (&["deny ads.test:80"], "192.0.2.1", "allow"),
            (&["deny ads.test/udp", "deny *"], "192.0.2.1", "deny"),
            (&["allow ok.test/udp", "deny *"], "192.0.2.1", "deny"),
        ] {
            assert_eq!(said(texts, address), expected, "{texts:?}");
        }
    }

    #[test]
    fn dns_denies_what_can_be_reached_nowhere() {
        let said = |texts: &[&str]| rules(texts).for_name("x.ads.test").is_deny();
        for (texts, expected) in [
            (&[][..], false),
            (&["deny ads.test"], true),
            (&["deny *.ads.test"], true),
            (&["deny *.x.ads.test"], false),
            (&["deny ads.test:443"], false),
            (&["deny ads.test/tcp"], false),
            (&["deny ads.test dns=resolve"], false),
            (&["deny ads.test dns=resolve", "deny *"], false),
            (&["allow x.ads.test:443", "deny ads.test"], false),
            (&["deny 192.0.2.0/24"], false),
            (&["deny *"], true),
            (&["deny *:80"], false),
            (&["allow ok.test", "deny *"], true),
            (&["allow 10.0.0.0/8", "deny *"], false),
            (&["allow 10.0.0.0/8", "deny ads.test"], true),
            (&["allow *:53/udp", "deny ads.test"], false),
        ] {
            assert_eq!(said(texts), expected, "{texts:?}");
        }
    }

    #[test]
    fn rules_of_other_guests_do_not_count() {
        let rules = rules(&["deny a.test guest=web", "deny b.test guest=db", "deny c.test"]);
        assert_eq!(
            rules.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["deny a.test guest=web", "deny c.test"]
        );
        let rule = || "deny a.test guest=web".parse().unwrap();
        assert!(Rules::of_guest(vec![rule()], None).unwrap().is_empty());
        let many = (0..=RULES_MAX).map(|_| rule()).collect();
        assert_eq!(Rules::of_guest(many, Some("web")).unwrap_err(), RuleError::TooMany);
    }

    #[test]
    fn a_rule_is_shown_as_it_is_written() {
        for text in [
            "allow *",
            "deny ads.test",
            "deny *.ads.test:80,443/tcp",
            "deny 10.0.0.0/8/icmp",
            "deny [2001:db8::]/32:53/udp guest=web",
            "deny ads.test dns=nxdomain text=no advertisements, please",
            "deny ads.test dns=192.168.65.254",
            "deny ads.test dns=::1",
            "deny ads.test dns=resolve text=ask it@corp.example = us",
        ] {
            let rule: Rule = text.parse().unwrap();
            assert_eq!(rule.to_string(), text);
        }
        let rule: Rule = "  deny\tAds.test.   dns=refused  guest=a  text=  two  words ".parse().unwrap();
        assert_eq!(rule.to_string(), "deny ads.test guest=a text=two  words");
        assert_eq!((rule.text(), rule.dns()), ("two  words", DnsAnswer::Refused));
    }

    #[test]
    fn what_is_no_rule_is_refused_with_the_reason() {
        for (text, said) in [
            ("", "'': a rule begins with"),
            ("reject *", "'reject': a rule begins with"),
            ("deny", "says what it is about"),
            ("deny a b", "'b': expected guest="),
            ("deny a..b", "'a..b' is neither a name"),
            ("deny a:0", "'0' is no list of ports"),
            ("deny a:80/icmp", "ICMP has no ports"),
            ("deny a/sctp", "'a/sctp' is neither a name"),
            ("deny a dns=maybe", "'dns=maybe': expected"),
            ("deny a guest=", "'guest=': expected"),
            ("deny a guest=x guest=y", "'guest=y': expected"),
            ("deny a text=", "a text has 1 to"),
            ("deny a text=x\u{7}", "no control characters"),
            ("allow a text=x", "'text=': a rule that allows"),
            ("allow a dns=refused", "'dns=': a rule that allows"),
        ] {
            let error = text.parse::<Rule>().unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn refusals_are_counted_by_rule_and_not_by_asking() {
        let rules = rules(&["deny ads.test text=no"]);
        let Verdict::Deny(rule) = rules.decide(&Target::tcp("ads.test", 80)) else { panic!() };
        assert_eq!((rule.refusals(), rule.text()), (0, "no"));
        rule.count_refusal();
        assert_eq!(rules.iter().next().unwrap().refusals(), 1);
        assert_eq!("deny a".parse::<Rule>().unwrap().text(), TEXT);
    }

    fn any_rule() -> impl Strategy<Value = Rule> {
        let protocol = prop_oneof![Just(None), Just(Some(Tcp)), Just(Some(Udp))];
        (any::<bool>(), any_pattern(), protocol).prop_map(|(deny, pattern, protocol)| Rule {
            action: if deny { Action::Deny } else { Action::Allow },
            pattern,
            protocol,
            guest: None,
            dns: DnsAnswer::default(),
            text: None,
            refusals: AtomicU64::new(0),
        })
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_as_it_was(rule in any_rule()) {
            let again: Rule = rule.to_string().parse().unwrap();
            prop_assert_eq!(again.to_string(), rule.to_string());
            prop_assert_eq!((again.pattern, again.protocol), (rule.pattern, rule.protocol));
        }

        /// What is decided by an address alone holds for every name.
        #[test]
        fn no_name_changes_what_an_address_decided(
            rules in proptest::collection::vec(any_rule(), 0..6),
            names in proptest::collection::vec("[a-c](\\.[a-c]){0,2}", 1..8),
            octets: [u8; 4],
            port: u16,
        ) {
            let rules = Rules(rules);
            let expected = match rules.decide_by_address(octets.into(), port, Tcp) {
                ByAddress::AskName => return Ok(()),
                ByAddress::Allow => false,
                ByAddress::Deny(_) => true,
            };
            for name in names.iter().map(|name| Some(name.as_str())).chain([None]) {
                let target = Target { name, address: Some(octets.into()), port, protocol: Tcp };
                prop_assert_eq!(rules.decide(&target).is_deny(), expected);
            }
        }

        #[test]
        fn no_text_makes_it_panic(text in any::<String>(), near in "(deny|allow) [a-c0-9.:/*\\[\\]]{0,12}(/tcp)?( [a-z]{1,5}=?[^=]{0,9}){0,3}") {
            for text in [text, near] {
                match text.parse::<Rule>() {
                    Ok(rule) => prop_assert!(rule.to_string().parse::<Rule>().is_ok()),
                    Err(error) => prop_assert!(!error.to_string().contains(char::is_control)),
                }
            }
        }
    }
}
