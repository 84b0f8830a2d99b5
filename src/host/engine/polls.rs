//! What a ring polls: by token, and by an identifier that the kernel hands back with each event.
//!
//! A token may be watched anew, with another descriptor, while events of the poll that it had before are still to come. So
//! the identifier is no token but a slot of its own, which is stale once its poll was removed. Tokens of one kind are
//! numbered densely, so that a list of slots for each kind finds a token's poll: four bytes for each socket.

use std::os::fd::RawFd;

use super::{Interest, Token};
use crate::flow::slab::{GENERATION_MASK, Slab, Slot};

/// A descriptor that is polled.
#[derive(Clone, Copy)]
pub(super) struct Poll {
    pub token: Token,
    pub fd: RawFd,
    pub interest: Interest,
    /// Ends with its first event.
    pub once: bool,
}

/// What is polled.
pub(super) struct Polls {
    polls: Slab<Poll>,
    /// By kind and index of the token: one more than the index of its poll, zero where it has none.
    by_token: Vec<Vec<u32>>,
}

/// More polls than descriptors there cannot be.
const POLLS_MAX: u32 = 1 << 24;

/// Memory for so many tokens of a kind is kept.
const KEPT: usize = 1024;

impl Polls {
    pub fn new() -> Self {
        Self { polls: Slab::new(POLLS_MAX), by_token: Vec::new() }
    }

    /// Adds a poll; returns its identifier, below 2^56.
    pub fn add(&mut self, poll: Poll) -> Option<u64> {
        self.remove(poll.token);
        let slot = self.polls.insert(poll).ok()?;
        let (kind, index) = (poll.token.kind as usize, poll.token.slot.index as usize);
        if self.by_token.len() <= kind {
            self.by_token.resize(kind + 1, Vec::new());
        }
        let of_kind = &mut self.by_token[kind];
        if of_kind.len() <= index {
            of_kind.resize(index + 1, 0);
        }
        of_kind[index] = slot.index + 1;
        Some(u64::from(slot.generation) << 32 | u64::from(slot.index))
    }

    pub fn get(&self, id: u64) -> Option<Poll> {
        let slot = Slot { index: id as u32, generation: (id >> 32) as u32 & GENERATION_MASK };
        self.polls.get(slot).copied()
    }

    pub fn has(&self, token: Token) -> bool {
        self.slot_of(token).is_some()
    }

    fn slot_of(&self, token: Token) -> Option<Slot> {
        let place = *self.by_token.get(token.kind as usize)?.get(token.slot.index as usize)?;
        let slot = self.polls.slot_at(place.checked_sub(1)?)?;
        self.polls.get(slot).filter(|poll| poll.token == token).map(|_| slot)
    }

    /// Forgets a token's poll; returns its identifier.
    pub fn remove(&mut self, token: Token) -> Option<u64> {
        let slot = self.slot_of(token)?;
        self.polls.remove(slot);
        let of_kind = &mut self.by_token[token.kind as usize];
        of_kind[token.slot.index as usize] = 0;
        while of_kind.last() == Some(&0) {
            of_kind.pop();
        }
        if of_kind.capacity() / 4 > of_kind.len().max(KEPT) {
            of_kind.shrink_to(2 * of_kind.len());
        }
        Some(u64::from(slot.generation) << 32 | u64::from(slot.index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn poll(index: u32, generation: u32, fd: RawFd) -> Poll {
        let token = Token { kind: 3, slot: Slot { index, generation } };
        Poll { token, fd, interest: Interest::Both, once: false }
    }

    #[test]
    fn an_identifier_is_stale_once_its_poll_was_removed() {
        let mut polls = Polls::new();
        let old = polls.add(poll(7, 1, 10)).unwrap();
        assert_eq!(polls.get(old).map(|poll| poll.fd), Some(10));
        assert_eq!(polls.remove(poll(7, 1, 10).token), Some(old));
        let new = polls.add(poll(7, 1, 11)).unwrap();
        assert_ne!(old, new);
        assert!(polls.get(old).is_none() && !polls.has(poll(7, 2, 11).token));
        assert_eq!(polls.get(new).map(|poll| poll.fd), Some(11));
        assert_eq!(polls.remove(poll(7, 2, 11).token), None, "another generation's");
    }

    #[test]
    fn memory_goes_back_with_the_polls() {
        let mut polls = Polls::new();
        (0..100_000).for_each(|index| _ = polls.add(poll(index, 0, 5)).unwrap());
        assert!((0..100_000).all(|index| polls.has(poll(index, 0, 5).token)));
        (1..100_000).rev().for_each(|index| _ = polls.remove(poll(index, 0, 5).token).unwrap());
        assert!(polls.has(poll(0, 0, 5).token) && polls.by_token[3].capacity() <= 4 * KEPT);
        assert!(polls.polls.index_bound() < 20_000);
    }
}
