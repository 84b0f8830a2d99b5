//! When the other side wants to be told (virtio 1.3, 2.7.7 and 2.7.10).

/// Whether an index that goes from `old` to `new` passes the point at which the other side asked to be told.
pub fn passes(wanted: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(wanted).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_step_over_the_wanted_index_tells() {
        // The entry at index 5 is the one that is waited for: it is there once the index is 6.
        assert!(!passes(5, 5, 3));
        assert!(passes(5, 6, 5));
        assert!(passes(5, 9, 3));
        assert!(!passes(5, 9, 6));
        assert!(!passes(5, 7, 7), "nothing happened");
    }

    #[test]
    fn indices_wrap() {
        assert!(passes(65_535, 2, 65_530));
        assert!(passes(0, 1, 65_535));
        assert!(!passes(3, 2, 65_530));
    }

    #[test]
    fn every_index_is_told_exactly_once_when_each_step_asks_for_the_next() {
        let mut told = 0;
        for step in 0..70_000u32 {
            let (old, new) = (step as u16, (step + 1) as u16);
            told += u32::from(passes(old, new, old));
        }
        assert_eq!(told, 70_000);
    }
}
