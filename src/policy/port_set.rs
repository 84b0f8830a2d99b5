//! A set of ports.

/// A set of ports.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortSet(Box<[u64; 1024]>);

impl Default for PortSet {
    fn default() -> Self {
        Self(Box::new([0; 1024]))
    }
}

impl PortSet {
    /// Puts a port in.
    pub fn insert(&mut self, port: u16) {
        self.0[port as usize / 64] |= 1 << (port % 64);
    }

    /// Takes a port out.
    pub fn remove(&mut self, port: u16) {
        self.0[port as usize / 64] &= !(1 << (port % 64));
    }

    /// Whether a port is in.
    pub fn contains(&self, port: u16) -> bool {
        self.0[port as usize / 64] & (1 << (port % 64)) != 0
    }

    /// Reads the kernel's notation: `8080,9000-9010`. What cannot be read is left out.
    pub fn parse(text: &str) -> Self {
        let mut set = Self::default();
        for part in text.trim().split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            if let (Ok(first), Ok(last)) = (first.parse::<u16>(), last.parse::<u16>()) {
                (first..=last).for_each(|port| set.insert(port));
            }
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_notation_is_read() {
        let set = PortSet::parse("8080,9000-9010\n");
        for (port, expected) in [(8080, true), (8081, false), (9000, true), (9010, true), (9011, false)] {
            assert_eq!(set.contains(port), expected, "{port}");
        }
        assert!(!PortSet::parse("").contains(0));
    }
}
