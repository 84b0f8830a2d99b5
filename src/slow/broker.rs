//! The workers' way to sockets of the guest's namespace: the helper opens them.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;

use crate::channel::Channel;
use crate::exchange::Mailbox;
use crate::exchange::mail::ToWorker;
use crate::namespace::words::{FromHelper, ToHelper};

use super::readable::ReadableChannel;

/// The broker's customers and its channel.
pub struct Broker {
    channel: ReadableChannel,
    /// Who has asked, in the order of the answers.
    asked: RefCell<VecDeque<u8>>,
    workers: Vec<Mailbox<ToWorker<OwnedFd>>>,
}

impl Broker {
    /// A broker on a channel of its own.
    pub fn new(channel: Channel, workers: Vec<Mailbox<ToWorker<OwnedFd>>>) -> io::Result<Self> {
        channel.set_nonblocking()?;
        Ok(Self { channel: ReadableChannel::new(channel)?, asked: RefCell::new(VecDeque::new()), workers })
    }

    /// A worker wants sockets. A request that cannot be sent is as good as one that brings none.
    pub fn ask(&self, worker: u8, count: u8, v4: bool) {
        match self.channel.channel().send(&ToHelper::Sockets { count, v4 }, &[]) {
            Ok(()) => self.asked.borrow_mut().push_back(worker),
            Err(_) => self.deliver(worker, v4, Vec::new()),
        }
    }

    fn deliver(&self, worker: u8, v4: bool, sockets: Vec<OwnedFd>) {
        if let Some(mailbox) = self.workers.get(worker as usize) {
            // Sockets that do not fit are closed; the worker does without.
            let _ = mailbox.put(ToWorker::GuestSockets { v4, sockets });
        }
    }

    /// Delivers sockets as they come, until the helper is gone.
    pub async fn serve(&self) {
        loop {
            match self.channel.receive(Channel::receive::<FromHelper>).await {
                Ok(Some((FromHelper::Sockets { v4 }, sockets))) => {
                    if let Some(worker) = self.asked.borrow_mut().pop_front() {
                        self.deliver(worker, v4, sockets);
                    }
                }
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }
}
