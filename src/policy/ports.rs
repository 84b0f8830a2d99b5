//! Ports as rules name them: `80`, `8000-8999`, `80,443,8000-8999`.

use std::fmt;
use std::str::FromStr;

/// Ranges that one list can have.
const RANGES_MAX: usize = 64;

/// Some ports, or all of them where none is named.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ports(Box<[(u16, u16)]>);

/// What is no list of ports.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("'{}' is no list of ports (like 80, 8000-8999 or 80,443; from 1 to 65535)", .0.escape_debug())]
pub struct PortsError(String);

impl Ports {
    /// These ports.
    pub fn of(ports: &[u16]) -> Self {
        Self(ports.iter().map(|port| (*port, *port)).collect())
    }

    /// Whether all ports are meant, and what has none as well.
    pub fn is_all(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a port is meant.
    pub fn contains(&self, port: u16) -> bool {
        self.is_all() || self.0.iter().any(|(first, last)| (*first..=*last).contains(&port))
    }
}

impl FromStr for Ports {
    type Err = PortsError;

    fn from_str(text: &str) -> Result<Self, PortsError> {
        let wrong = || PortsError(text.chars().take(64).collect());
        let port = |text: &str| {
            let digits = text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse::<u16>().ok().filter(|port| digits && *port > 0).ok_or_else(wrong)
        };
        let range = |text: &str| {
            let (first, last) = text.split_once('-').unwrap_or((text, text));
            let (first, last) = (port(first)?, port(last)?);
            if first <= last { Ok((first, last)) } else { Err(wrong()) }
        };
        if text.split(',').count() > RANGES_MAX {
            return Err(wrong());
        }
        text.split(',').map(|part| range(part.trim())).collect::<Result<_, _>>().map(Self)
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (first, last)) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            if first == last { write!(f, "{comma}{first}") } else { write!(f, "{comma}{first}-{last}") }?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ports_are_ranges_and_lists_of_them() {
        let ports: Ports = "80, 443,8000-8002".parse().unwrap();
        for (port, is_in) in [(80, true), (443, true), (8000, true), (8002, true), (8003, false), (0, false)]
        {
            assert_eq!(ports.contains(port), is_in, "{port}");
        }
        assert!(Ports::default().contains(7) && Ports::of(&[7]).contains(7) && !Ports::of(&[7]).contains(8));
        let long = "1,".repeat(64) + "1";
        for text in ["", ",", "80,", "0", "65536", "+80", "80-", "90-80", "http", "٨٠", &long] {
            assert!(text.parse::<Ports>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_as_it_was(ranges in proptest::collection::vec((1u16.., 0u16..), 1..8)) {
            let ranges = ranges.into_iter().map(|(first, more)| (first, first.saturating_add(more))).collect();
            let ports = Ports(ranges);
            prop_assert_eq!(ports.to_string().parse(), Ok(ports));
        }

        #[test]
        fn no_text_makes_it_panic(text in any::<String>(), near in "[0-9,-]{0,20}") {
            let _ = (text.parse::<Ports>(), near.parse::<Ports>());
        }
    }
}
