//! A guest's stream as its worker knows it: how it is broken off, and how it is given back.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{sleep, timeout};

use super::dial::Wire;
use crate::exchange::Mailbox;
use crate::exchange::mail::ToWorker;
use crate::flow::slab::Slot;
use crate::frame::address::Endpoint;
use crate::slow::shared_stream::SharedStream;

/// How long a full mailbox is given.
const RETRY: Duration = Duration::from_millis(5);

/// How long the far side may take nothing of what the guest had said before its stream was handed over.
const STUCK: Duration = Duration::from_secs(120);

/// Which stream of which worker it is.
#[derive(Clone)]
pub struct GuestStream {
    /// The worker's mail.
    mail: Mailbox<ToWorker<OwnedFd>>,
    /// The stream's slot there.
    slot: Slot,
    /// Its place among those that are led out at a time, given back with the last clone.
    _seat: Option<Arc<OwnedSemaphorePermit>>,
}

impl GuestStream {
    /// A stream of the worker with this mail.
    pub fn new(mail: Mailbox<ToWorker<OwnedFd>>, slot: Slot, seat: Option<OwnedSemaphorePermit>) -> Self {
        Self { mail, slot, _seat: seat.map(Arc::new) }
    }

    async fn tell(&self, mut mail: ToWorker<OwnedFd>) {
        // Handles are few, and the worker takes some with each pass.
        while let Err(back) = self.mail.put(mail) {
            mail = back;
            sleep(RETRY).await;
        }
    }

    /// Ends the stream with a reset.
    pub async fn reset(&self) {
        self.tell(ToWorker::Break { stream: self.slot }).await;
    }

    /// Joins the stream to a connection: what each side has said that nobody has passed on yet goes first.
    ///
    /// A worker takes the connection over where it can; whatever the guest says meanwhile waits there. Only what this end
    /// still holds is passed on here.
    pub async fn hand_over(
        &self,
        mut end: SharedStream,
        from_guest: &[u8],
        mut wire: Wire,
        to_guest: &[u8],
    ) -> io::Result<()> {
        end.write_all(to_guest).await?;
        wire.write_all(from_guest).await?;
        wire.flush().await?;
        match wire {
            Wire::Plain(line) => self.rehome(end, line.into_stream()).await,
            secured @ Wire::Secured(_) => {
                let (mut secured, watched) = (secured, end.clone());
                tokio::select! {
                    copied = copy_bidirectional(&mut end, &mut secured) => copied.map(drop),
                    // Nobody is left to say or hear anything.
                    () = watched.gone() => Ok(()),
                }
            }
        }
    }

    async fn rehome(&self, mut end: SharedStream, stream: TcpStream) -> io::Result<()> {
        let peer = stream.peer_addr()?;
        let peer = Endpoint { address: peer.ip().into(), port: peer.port() };
        let given = stream.into_std()?;
        let mut kept = TcpStream::from_std(given.try_clone()?)?;
        self.tell(ToWorker::Rehome { stream: self.slot, socket: given.into(), peer }).await;
        // The worker shuts its end down: what comes up to there was said before.
        let mut bytes = vec![0; 16 << 10];
        loop {
            match end.read(&mut bytes).await? {
                0 => {
                    // Others may have the stream in their hands for a while.
                    end.shut_down();
                    return Ok(());
                }
                len => timeout(STUCK, kept.write_all(&bytes[..len])).await??,
            }
        }
    }
}
