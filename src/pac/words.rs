//! What the client and the evaluator say to each other: a length of four bytes, and JSON.
//!
//! Neither believes the other: lengths are bounded before anything is read, and what comes is decoded into types.

use std::io::{self, Read, Write};
use std::net::IpAddr;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::SCRIPT_MAX;

/// The longest word to an evaluator: a script whose every byte JSON writes as six.
const TO_EVALUATOR_MAX: usize = 6 * SCRIPT_MAX + 1024;
/// The longest word of an evaluator's: a result, likewise.
const FROM_EVALUATOR_MAX: usize = 128 * 1024;
/// Bytes that a length takes.
const LENGTH: usize = 4;

/// What the client says.
#[derive(Serialize, Deserialize, Debug)]
pub enum ToEvaluator {
    /// The script. The first word, and no other is.
    Load(String),
    /// Where does this go?
    Find {
        /// The URL, as far as a script may know it.
        url: String,
        /// Its host.
        host: String,
        /// The host's own addresses.
        own: Vec<IpAddr>,
    },
    /// The addresses of the name that was asked for.
    Resolved(Vec<IpAddr>),
}

/// What the evaluator says.
#[derive(Serialize, Deserialize, Debug)]
pub enum FromEvaluator {
    /// The script can be asked.
    Loaded,
    /// What the script says.
    Found(String),
    /// It says nothing that could be used.
    Failed(Failure),
    /// Which addresses has this name?
    Resolve(String),
}

/// Why a script says nothing.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub enum Failure {
    /// It threw this.
    Threw(String),
    /// It took longer than it may. What it was doing then is left undone: it is not asked again.
    TimedOut,
    /// It has no function `FindProxyForURL`.
    NoFunction,
    /// What it says is no text.
    NotText,
    /// What it says is too long.
    TooLong,
}

/// What can be sent and received, and how long it can be.
pub trait Word: Serialize + DeserializeOwned {
    /// The longest one, in bytes.
    const MAX: usize;
}

impl Word for ToEvaluator {
    const MAX: usize = TO_EVALUATOR_MAX;
}

impl Word for FromEvaluator {
    const MAX: usize = FROM_EVALUATOR_MAX;
}

fn encode<W: Word>(word: &W) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; LENGTH];
    serde_json::to_writer(&mut bytes, word)?;
    let length = bytes.len() - LENGTH;
    if length > W::MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    bytes[..LENGTH].copy_from_slice(&(length as u32).to_be_bytes());
    Ok(bytes)
}

fn length_of<W: Word>(bytes: [u8; LENGTH]) -> io::Result<usize> {
    let length = u32::from_be_bytes(bytes) as usize;
    if length <= W::MAX { Ok(length) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// Sends a word, and waits until it is taken.
pub fn send<W: Word>(stream: &mut impl Write, word: &W) -> io::Result<()> {
    stream.write_all(&encode(word)?)
}

/// Waits for the next word. The end of the conversation is an error, too.
pub fn receive<W: Word>(stream: &mut impl Read) -> io::Result<W> {
    let mut length = [0; LENGTH];
    stream.read_exact(&mut length)?;
    let mut bytes = vec![0; length_of::<W>(length)?];
    stream.read_exact(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

/// As [`send`], while others go on.
pub async fn send_async<W: Word>(stream: &mut (impl AsyncWriteExt + Unpin), word: &W) -> io::Result<()> {
    stream.write_all(&encode(word)?).await
}

/// As [`receive`], while others go on.
pub async fn receive_async<W: Word>(stream: &mut (impl AsyncReadExt + Unpin)) -> io::Result<W> {
    let mut length = [0; LENGTH];
    stream.read_exact(&mut length).await?;
    let mut bytes = vec![0; length_of::<W>(length)?];
    stream.read_exact(&mut bytes).await?;
    Ok(serde_json::from_slice(&bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_longest_script_can_be_sent() {
        let mut bytes = Vec::new();
        send(&mut bytes, &ToEvaluator::Load("\u{1}".repeat(SCRIPT_MAX))).unwrap();
        let ToEvaluator::Load(script) = receive(&mut bytes.as_slice()).unwrap() else { panic!() };
        assert_eq!(script.len(), SCRIPT_MAX);
        assert!(send(&mut bytes, &FromEvaluator::Found("x".repeat(FROM_EVALUATOR_MAX))).is_err());
    }

    #[test]
    fn a_length_that_cannot_be_is_not_waited_for() {
        let error = receive::<FromEvaluator>(&mut [0xff, 0, 0, 0].as_slice()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in any::<Vec<u8>>(), json in "[\\[{\"a-zA-Z0-9:,}\\]]{0,40}") {
            for bytes in [&bytes[..], json.as_bytes()] {
                let framed = [&(bytes.len() as u32).to_be_bytes(), bytes].concat();
                for bytes in [bytes, &framed] {
                    let _ = (receive::<FromEvaluator>(&mut &bytes[..]), receive::<ToEvaluator>(&mut &bytes[..]));
                }
            }
        }
    }
}
