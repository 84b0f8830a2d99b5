//! What hythe and its helper tell each other.

use crate::channel::{MESSAGE_MAX, Message};

/// What hythe says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ToHelper {
    /// Make or enter the namespace, and set it up.
    SetUp,
    /// Start the command.
    Go,
    /// Pass a signal on to the command.
    Signal {
        /// Which.
        number: i32,
        /// It came from the terminal, which sends it to a whole process group.
        from_terminal: bool,
    },
    /// Open so many TCP sockets in the guest's namespace.
    Sockets {
        /// How many.
        count: u8,
        /// IPv4 or IPv6.
        v4: bool,
    },
}

/// What the helper says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FromHelper {
    /// The tap device's queues come with this.
    Tap {
        /// Whether it takes UDP segmentation.
        udp_segmentation: bool,
    },
    /// Something the user should know.
    Note(String),
    /// The interface stands.
    Ready,
    /// It cannot be done, and why; the helper ends.
    Failed(String),
    /// The command has ended; the exit status to pass on.
    Exited(u8),
    /// Sockets of the guest's namespace come with this.
    Sockets {
        /// IPv4 or IPv6.
        v4: bool,
    },
}

impl Message for ToHelper {
    fn encode(&self) -> Vec<u8> {
        match self {
            Self::Go => vec![0],
            Self::Signal { number, from_terminal } => vec![1, *number as u8, u8::from(*from_terminal)],
            Self::Sockets { count, v4 } => vec![2, *count, u8::from(*v4)],
            Self::SetUp => vec![3],
        }
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        match *bytes {
            [0] => Some(Self::Go),
            [1, number, terminal] => {
                Some(Self::Signal { number: i32::from(number), from_terminal: terminal != 0 })
            }
            [2, count, v4] => Some(Self::Sockets { count, v4: v4 != 0 }),
            [3] => Some(Self::SetUp),
            _ => None,
        }
    }
}

impl Message for FromHelper {
    fn encode(&self) -> Vec<u8> {
        let text = |tag: u8, text: &str| {
            let mut bytes = vec![tag];
            bytes.extend(text.bytes().take(MESSAGE_MAX - 1));
            bytes
        };
        match self {
            Self::Tap { udp_segmentation } => vec![0, u8::from(*udp_segmentation)],
            Self::Note(note) => text(1, note),
            Self::Ready => vec![2],
            Self::Failed(message) => text(3, message),
            Self::Exited(status) => vec![4, *status],
            Self::Sockets { v4 } => vec![5, u8::from(*v4)],
        }
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        match *bytes {
            [0, udp] => Some(Self::Tap { udp_segmentation: udp != 0 }),
            [1, ref text @ ..] => Some(Self::Note(String::from_utf8_lossy(text).into_owned())),
            [2] => Some(Self::Ready),
            [3, ref text @ ..] => Some(Self::Failed(String::from_utf8_lossy(text).into_owned())),
            [4, status] => Some(Self::Exited(status)),
            [5, v4] => Some(Self::Sockets { v4: v4 != 0 }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::Channel;

    #[test]
    fn every_message_arrives_as_it_was_sent() {
        let (hythe, helper) = Channel::pair().unwrap();
        for message in [
            ToHelper::SetUp,
            ToHelper::Go,
            ToHelper::Signal { number: 15, from_terminal: true },
            ToHelper::Sockets { count: 9, v4: true },
        ] {
            hythe.send(&message, &[]).unwrap();
            assert_eq!(helper.receive::<ToHelper>().unwrap().unwrap().0, message);
        }
        for message in [
            FromHelper::Tap { udp_segmentation: true },
            FromHelper::Note("note".into()),
            FromHelper::Ready,
            FromHelper::Failed("why".into()),
            FromHelper::Exited(7),
            FromHelper::Sockets { v4: false },
        ] {
            helper.send(&message, &[0, 1, 2]).unwrap();
            let (received, descriptors) = hythe.receive::<FromHelper>().unwrap().unwrap();
            assert_eq!((received, descriptors.len()), (message, 3));
        }
        drop(helper);
        assert!(hythe.receive::<FromHelper>().unwrap().is_none());
    }

    #[test]
    fn what_was_said_last_is_heard_although_the_other_end_closed_without_listening() {
        let (hythe, helper) = Channel::pair().unwrap();
        hythe.send(&ToHelper::Go, &[]).unwrap();
        helper.send(&FromHelper::Exited(5), &[]).unwrap();
        drop(helper);
        assert_eq!(hythe.receive::<FromHelper>().unwrap().unwrap().0, FromHelper::Exited(5));
        assert!(hythe.receive::<FromHelper>().unwrap().is_none());
    }
}
