//! DNS over a stream of the guest's (RFC 7766): queries come one behind the other, answers go back as they are ready.
//!
//! One future reads, asks and writes. At most so many queries are under way or answered but not taken; beyond that
//! nothing is read, and the guest's window closes. A stream on which nothing moves for a while is closed: progress is a
//! message that begins or is complete, an answer that is ready, bytes that the guest takes. So neither half a message
//! nor an answer that nobody reads holds a stream open.

use std::collections::VecDeque;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep_until};

use super::race::Race;
use super::{Dns, Transport};
use crate::observe::counters::Metric;

/// As many bytes are read at once.
const READ_BYTES: usize = 4096;

/// Bytes that were read and are not asked yet: less than one message, or what came behind the last that there was
/// room for. At most the longest message and one read.
#[derive(Default)]
struct Incoming(Vec<u8>);

impl Incoming {
    /// The next whole message.
    fn take_message(&mut self) -> Option<Vec<u8>> {
        let (length, rest) = self.0.split_first_chunk()?;
        let message = rest.get(..usize::from(u16::from_be_bytes(*length)))?.to_vec();
        self.0.drain(..length.len() + message.len());
        Some(message)
    }
}

/// Answers that the guest has not taken yet, the first of them perhaps in part.
#[derive(Default)]
struct Outgoing {
    answers: VecDeque<Vec<u8>>,
    written: usize,
}

impl Outgoing {
    fn push(&mut self, answer: &[u8]) {
        // RFC 7766, 8: length and message in one write. No answer is longer than its length can say.
        self.answers.push_back([&(answer.len() as u16).to_be_bytes()[..], answer].concat());
    }

    fn rest(&self) -> &[u8] {
        self.answers.front().map_or(&[], |answer| &answer[self.written..])
    }

    fn advance(&mut self, bytes: usize) {
        self.written += bytes;
        if self.rest().is_empty() {
            self.answers.pop_front();
            self.written = 0;
        }
    }
}

/// Serves a stream until the guest has closed it and taken its answers, or nothing has moved for too long.
pub(super) async fn serve(dns: &Dns, mut stream: UnixStream, limit: usize) {
    let idle = dns.0.settings.patience.stream_idle;
    let (mut reader, mut writer) = stream.split();
    let mut incoming = Incoming::default();
    let mut outgoing = Outgoing::default();
    let mut asked = Race::default();
    let mut chunk = vec![0; READ_BYTES];
    let mut ended = false;
    let mut last_progress = Instant::now();
    loop {
        let mut room = limit.saturating_sub(asked.len() + outgoing.answers.len());
        while room > 0
            && let Some(message) = incoming.take_message()
        {
            room -= 1;
            last_progress = Instant::now();
            asked.push(async move { dns.answer(&message, Transport::Tcp).await });
        }
        if ended && asked.is_empty() && outgoing.answers.is_empty() {
            return;
        }
        tokio::select! {
            read = reader.read(&mut chunk), if room > 0 && !ended => match read {
                Ok(0) => ended = true,
                Ok(len) => {
                    if incoming.0.is_empty() {
                        last_progress = Instant::now();
                    }
                    incoming.0.extend_from_slice(&chunk[..len]);
                }
                Err(_) => return,
            },
            answer = asked.next(), if !asked.is_empty() => {
                last_progress = Instant::now();
                if let Some(answer) = answer {
                    outgoing.push(&answer);
                }
            }
            written = writer.write(outgoing.rest()), if !outgoing.answers.is_empty() => match written {
                Ok(bytes) => {
                    last_progress = Instant::now();
                    outgoing.advance(bytes);
                }
                Err(_) => return,
            },
            () = sleep_until(last_progress + idle) => {
                dns.0.counters.add(Metric::DnsStreamsIdle, 1);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_taken_whole_and_in_order_from_bytes_that_respect_no_boundary() {
        let mut incoming = Incoming::default();
        let mut taken = Vec::new();
        for byte in *b"\x00\x02ab\x00\x00\x00\x01c\x00" {
            incoming.0.push(byte);
            taken.extend(incoming.take_message());
        }
        assert_eq!(taken, [b"ab".to_vec(), vec![], b"c".to_vec()]);
        assert_eq!(incoming.0, [0]);
    }

    #[test]
    fn answers_are_written_in_any_pieces_each_behind_its_length() {
        let mut outgoing = Outgoing::default();
        outgoing.push(b"abc");
        outgoing.push(b"d");
        let mut written = Vec::new();
        while !outgoing.answers.is_empty() {
            let piece = outgoing.rest()[..outgoing.rest().len().min(2)].to_vec();
            outgoing.advance(piece.len());
            written.extend(piece);
        }
        assert_eq!(written, b"\x00\x03abc\x00\x01d");
    }
}
