//! The channel between hythe and its helper: one datagram a message, descriptors beside it.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, Shutdown, SockFlag, SockType, recvmsg,
    sendmsg, shutdown, socketpair,
};

/// The longest message, in bytes.
const MESSAGE_MAX: usize = 4096;
/// The most descriptors of one message; more queues than workers are never made.
const DESCRIPTORS_MAX: usize = 64;

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

/// One end.
pub struct Channel(OwnedFd);

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

trait Message: Sized {
    fn encode(&self) -> Vec<u8>;
    fn decode(bytes: &[u8]) -> Option<Self>;
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

impl Channel {
    /// Two joined ends.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self(a), Self(b)))
    }

    fn send_message(&self, message: &impl Message, descriptors: &[RawFd]) -> io::Result<()> {
        let bytes = message.encode();
        let rights = [ControlMessage::ScmRights(descriptors)];
        let control: &[ControlMessage<'_>] = if descriptors.is_empty() { &[] } else { &rights };
        sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(&bytes)], control, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }

    /// Ends the conversation: the other end sees it, whoever else has a copy of this one.
    pub fn close(&self) {
        // It fails only where it has ended already.
        let _ = shutdown(self.0.as_raw_fd(), Shutdown::Both);
    }

    /// Has reading give an error where there is nothing to read.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        fcntl(&self.0, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(())
    }

    /// Says something to the helper.
    pub fn send(&self, message: &ToHelper) -> io::Result<()> {
        self.send_message(message, &[])
    }

    /// Says something to hythe, with descriptors.
    pub fn report(&self, message: &FromHelper, descriptors: &[RawFd]) -> io::Result<()> {
        self.send_message(message, descriptors)
    }

    fn receive<M: Message>(&self) -> io::Result<Option<(M, Vec<OwnedFd>)>> {
        let mut bytes = [0; MESSAGE_MAX];
        let mut control = nix::cmsg_space!([RawFd; DESCRIPTORS_MAX]);
        let (len, descriptors) = {
            let mut pieces = [IoSliceMut::new(&mut bytes)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let received = loop {
                match recvmsg::<()>(self.0.as_raw_fd(), &mut pieces, Some(&mut control), flags) {
                    // The other end closed with words of ours unread: told once, before what it said last (unix(7)).
                    Err(Errno::EINTR | Errno::ECONNRESET) => {}
                    other => break other?,
                }
            };
            let mut descriptors = Vec::new();
            for message in received.cmsgs()? {
                if let ControlMessageOwned::ScmRights(fds) = message {
                    descriptors.extend(fds.into_iter().map(own));
                }
            }
            (received.bytes, descriptors)
        };
        if len == 0 {
            return Ok(None);
        }
        M::decode(&bytes[..len])
            .map(|message| Some((message, descriptors)))
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
    }

    /// The next word of the helper; `None` when it is gone.
    pub fn receive_from_helper(&self) -> io::Result<Option<(FromHelper, Vec<OwnedFd>)>> {
        self.receive()
    }

    /// The next word of hythe; `None` when it is gone.
    pub fn receive_from_hythe(&self) -> io::Result<Option<ToHelper>> {
        Ok(self.receive()?.map(|(message, _)| message))
    }
}

#[allow(unsafe_code)]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just put the descriptor into this process for this message; nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_arrives_as_it_was_sent() {
        let (hythe, helper) = Channel::pair().unwrap();
        for message in [
            ToHelper::SetUp,
            ToHelper::Go,
            ToHelper::Signal { number: 15, from_terminal: true },
            ToHelper::Sockets { count: 9, v4: true },
        ] {
            hythe.send(&message).unwrap();
            assert_eq!(helper.receive_from_hythe().unwrap(), Some(message));
        }
        for message in [
            FromHelper::Tap { udp_segmentation: true },
            FromHelper::Note("note".into()),
            FromHelper::Ready,
            FromHelper::Failed("why".into()),
            FromHelper::Exited(7),
            FromHelper::Sockets { v4: false },
        ] {
            helper.report(&message, &[0, 1, 2]).unwrap();
            let (received, descriptors) = hythe.receive_from_helper().unwrap().unwrap();
            assert_eq!((received, descriptors.len()), (message, 3));
        }
        drop(helper);
        assert!(hythe.receive_from_helper().unwrap().is_none());
    }

    #[test]
    fn what_was_said_last_is_heard_although_the_other_end_closed_without_listening() {
        let (hythe, helper) = Channel::pair().unwrap();
        hythe.send(&ToHelper::Go).unwrap();
        helper.report(&FromHelper::Exited(5), &[]).unwrap();
        drop(helper);
        assert_eq!(hythe.receive_from_helper().unwrap().unwrap().0, FromHelper::Exited(5));
        assert!(hythe.receive_from_helper().unwrap().is_none());
    }
}
