//! A channel between two processes of hythe's: one datagram a message, descriptors beside it.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, Shutdown, SockFlag, SockType, recvmsg,
    sendmsg, shutdown, socketpair,
};

/// The longest message, in bytes.
pub const MESSAGE_MAX: usize = 4096;
/// The most descriptors of one message; more queues than workers are never made.
const DESCRIPTORS_MAX: usize = 64;

/// What goes over a channel.
pub trait Message: Sized {
    /// As bytes, [`MESSAGE_MAX`] at the most.
    fn encode(&self) -> Vec<u8>;
    /// From bytes, if they mean anything.
    fn decode(bytes: &[u8]) -> Option<Self>;
}

/// One end.
pub struct Channel(OwnedFd);

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Channel {
    /// Two joined ends.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self(a), Self(b)))
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

    /// Sends a message, with descriptors.
    pub fn send(&self, message: &impl Message, descriptors: &[RawFd]) -> io::Result<()> {
        let bytes = message.encode();
        let rights = [ControlMessage::ScmRights(descriptors)];
        let control: &[ControlMessage<'_>] = if descriptors.is_empty() { &[] } else { &rights };
        sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(&bytes)], control, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }

    /// The next message; `None` when the other end is gone.
    pub fn receive<M: Message>(&self) -> io::Result<Option<(M, Vec<OwnedFd>)>> {
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
}

#[allow(unsafe_code)]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just put the descriptor into this process for this message; nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
