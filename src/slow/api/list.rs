//! Answers: a piece of JSON, or a list of ports that is written as it is read.
//!
//! A list may be long, and many may ask for it: it is made in pieces, each when the one before has gone. What changes in between
//! is there or is not; a port is never told twice, since the table is walked by its numbers.

use std::convert::Infallible;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use hyper::body::{Body, Bytes, Frame};

use crate::control::shapes::Port;
use crate::slow::ports::table::Publisher;
use crate::slow::ports::{Published, Publishing};

/// Ports of one piece.
const PIECE: usize = 64;

const HEAD: &str = "{\"ports\":[";
const TAIL: &str = "]}";

/// The body of an answer.
pub enum Answer {
    /// All of it.
    Whole(Option<Bytes>),
    /// Ports, in pieces.
    Ports(List),
}

/// A list of ports on its way.
pub struct List {
    source: Source,
    begun: bool,
    ended: bool,
    first: bool,
}

/// Where the ports come from.
enum Source {
    Table { publishing: Rc<Publishing>, publisher: Publisher, after: u32 },
    These(std::vec::IntoIter<Published>),
}

impl List {
    /// All ports of the table that somebody may see.
    pub fn of_table(publishing: Rc<Publishing>, publisher: Publisher) -> Self {
        Self::new(Source::Table { publishing, publisher, after: 0 })
    }

    /// These ports.
    pub fn of(ports: Vec<Published>) -> Self {
        Self::new(Source::These(ports.into_iter()))
    }

    fn new(source: Source) -> Self {
        Self { source, begun: false, ended: false, first: true }
    }

    fn next_ports(&mut self) -> Vec<Published> {
        match &mut self.source {
            Source::These(ports) => ports.take(PIECE).collect(),
            Source::Table { publishing, publisher, after } => {
                let ports: Vec<Published> = publishing.look(|table| {
                    let own = table.after(*after).filter(|row| row.publisher == *publisher).take(PIECE);
                    own.map(|row| Published { id: row.publication.id, binding: row.binding }).collect()
                });
                *after = ports.last().map_or(*after, |port| port.id);
                ports
            }
        }
    }

    fn piece(&mut self) -> Option<Bytes> {
        if self.ended {
            return None;
        }
        let mut text = Vec::with_capacity(PIECE * 96);
        if !std::mem::replace(&mut self.begun, true) {
            text.extend_from_slice(HEAD.as_bytes());
        }
        let ports = self.next_ports();
        for Published { id, binding } in &ports {
            if !std::mem::replace(&mut self.first, false) {
                text.push(b',');
            }
            // A number and a binding have no map whose keys are no strings, which is what could fail.
            let _ = serde_json::to_writer(&mut text, &Port { id: *id, binding: *binding });
        }
        if ports.len() < PIECE {
            self.ended = true;
            text.extend_from_slice(TAIL.as_bytes());
        }
        Some(text.into())
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let piece = match &mut *self {
            Self::Whole(bytes) => bytes.take(),
            Self::Ports(list) => list.piece(),
        };
        Poll::Ready(piece.map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_none(),
            Self::Ports(list) => list.ended,
        }
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        match self {
            Self::Whole(bytes) => {
                hyper::body::SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Self::Ports(_) => hyper::body::SizeHint::default(),
        }
    }
}
