//! Answers: all at once, a list of ports that is written as it is read, or one that lasts as long as what it tells.
//!
//! A list may be long, and many may ask for it: it is made in pieces, each when the one before has gone. What changes in between
//! is there or is not; a port is never told twice, since the table is walked by its numbers.

use std::convert::Infallible;
use std::net::IpAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use hyper::body::{Body, Bytes, Frame};

use super::forwarder::Forward;
use super::held::Lasting;
use crate::control::shapes::Port;
use crate::slow::ports::table::Publisher;
use crate::slow::ports::{Published, Publishing};

/// Ports of one piece.
const PIECE: usize = 64;

/// In whose words ports are told.
enum Words {
    /// Ours.
    Own,
    /// gvproxy's, of a guest with these addresses.
    Forwards(Vec<IpAddr>),
}

impl Words {
    /// What stands before and behind the ports.
    fn ends(&self) -> [&'static str; 2] {
        match self {
            Self::Own => ["{\"ports\":[", "]}"],
            Self::Forwards(_) => ["[", "]"],
        }
    }

    fn write(&self, text: &mut Vec<u8>, Published { id, binding }: Published) {
        // A number and a binding have no map whose keys are no strings, which is what could fail.
        let _ = match self {
            Self::Own => serde_json::to_writer(text, &Port { id, binding }),
            Self::Forwards(guest) => serde_json::to_writer(text, &Forward::of(&binding, guest)),
        };
    }
}

/// The body of an answer.
pub enum Answer {
    /// All of it.
    Whole(Option<Bytes>),
    /// Ports, in pieces.
    Ports(List),
    /// Ports that are held.
    Lasting(Lasting),
}

/// A list of ports on its way.
pub struct List {
    source: Source,
    words: Words,
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
        Self::new(Source::Table { publishing, publisher, after: 0 }, Words::Own)
    }

    /// The same, in gvproxy's words.
    pub fn of_forwards(publishing: Rc<Publishing>, publisher: Publisher, guest: Vec<IpAddr>) -> Self {
        Self::new(Source::Table { publishing, publisher, after: 0 }, Words::Forwards(guest))
    }

    /// These ports.
    pub fn of(ports: Vec<Published>) -> Self {
        Self::new(Source::These(ports.into_iter()), Words::Own)
    }

    fn new(source: Source, words: Words) -> Self {
        Self { source, words, begun: false, ended: false, first: true }
    }

    fn next_ports(&mut self) -> Vec<Published> {
        match &mut self.source {
            Source::These(ports) => ports.take(PIECE).collect(),
            Source::Table { publishing, publisher, after } => {
                let ports: Vec<Published> = publishing.look(|table| {
                    let own = table.after(*after, *publisher).take(PIECE);
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
        let [head, tail] = self.words.ends();
        if !std::mem::replace(&mut self.begun, true) {
            text.extend_from_slice(head.as_bytes());
        }
        let ports = self.next_ports();
        let count = ports.len();
        for port in ports {
            if !std::mem::replace(&mut self.first, false) {
                text.push(b',');
            }
            self.words.write(&mut text, port);
        }
        if count < PIECE {
            self.ended = true;
            text.extend_from_slice(tail.as_bytes());
        }
        Some(text.into())
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let piece = match &mut *self {
            Self::Whole(bytes) => bytes.take(),
            Self::Ports(list) => list.piece(),
            Self::Lasting(lasting) => ready!(lasting.poll_piece(cx)),
        };
        Poll::Ready(piece.map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_none(),
            Self::Ports(list) => list.ended,
            Self::Lasting(_) => false,
        }
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        match self {
            Self::Whole(bytes) => {
                hyper::body::SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Self::Ports(_) | Self::Lasting(_) => hyper::body::SizeHint::default(),
        }
    }
}
