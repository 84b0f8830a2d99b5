//! The matrix: every claim is tested on both engines, with one worker and with more than there are cores.

/// How hythe does input and output.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Engine {
    IoUring,
    Epoll,
}

/// Who runs hythe.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum User {
    Root,
    /// Without any right: hythe makes a user namespace.
    Nobody,
}

/// A cell of the matrix.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cell {
    pub engine: Engine,
    pub workers: u8,
    pub user: User,
}

impl Cell {
    pub const fn new(engine: Engine, workers: u8) -> Self {
        Self { engine, workers, user: User::Root }
    }

    /// The same, by a plain user.
    pub const fn as_nobody(self) -> Self {
        Self { user: User::Nobody, ..self }
    }

    /// The engine's name on the command line.
    pub fn engine_name(self) -> &'static str {
        match self.engine {
            Engine::IoUring => "io-uring",
            Engine::Epoll => "epoll",
        }
    }
}

/// One cell, for what does not depend on it: one worker takes part while it suffices.
pub const ANY: Cell = Cell::new(Engine::IoUring, 2);

/// Makes a test of each cell from a claim: `on_every_cell! { a_claim(cell) { … } }`.
macro_rules! on_every_cell {
    ($($(#[$attribute:meta])* $name:ident($cell:ident) $body:block)*) => {$(
        $(#[$attribute])*
        mod $name {
            use super::*;
            use $crate::rig::cell::{Cell, Engine};

            fn claim($cell: Cell) $body

            #[test]
            fn io_uring_1_worker() {
                claim(Cell::new(Engine::IoUring, 1));
            }

            #[test]
            fn io_uring_4_workers() {
                claim(Cell::new(Engine::IoUring, 4));
            }

            #[test]
            fn epoll_1_worker() {
                claim(Cell::new(Engine::Epoll, 1));
            }

            #[test]
            fn epoll_4_workers() {
                claim(Cell::new(Engine::Epoll, 4));
            }
        }
    )*};
}

pub(crate) use on_every_cell;
