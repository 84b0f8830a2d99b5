//! Published ports while hythe runs: the table, and how a change of it reaches the workers.
//!
//! ```text
//! -p, file ──▶ Opening ──▶ Table ──▶ workers' seeds            before the threads exist, while rights are had
//! API      ──▶ Opening ──▶ Table ──▶ mail to the workers       later
//! ```
//! A change is a task of its own that nobody can break off in the middle: who has asked may go, the change is made all the same, or
//! not at all. One is made at a time; reading the table waits for none. A port is first shut to the guest's own flows
//! ([`ToWorker::Exclude`]) and then served; a removal is over when all workers have closed its sockets ([`Receipt`]).
//!
//! * [`table`]: the rows, and what is in the way of a new one
//! * [`opening`]: from requests to rows, all or nothing
//! * [`ephemeral`]: random ports
//! * [`held`]: ports that are published as long as somebody listens to the answer
//! * [`refusal`]: ports that show what the guest shows

pub mod ephemeral;
pub mod held;
pub mod opening;
pub mod refusal;
pub mod table;
#[cfg(test)]
pub(super) mod tests;

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::{spawn_local, yield_now};

use super::mailing;
use crate::exchange::Mailbox;
use crate::exchange::mail::{Receipt, ToWorker};
use crate::policy::publish::{Binding, PublishRequest};
use held::Held;
use opening::{Delivery, Opening};
use table::{Place, PortError, Publisher, Table};

/// So many who let go at the same time are served together.
const UNHELD: usize = 64;

/// Changes that are understood, wait for the one before, or are made, at a time.
const CHANGES: usize = 2;

/// The right to one change. It belongs to the change and not to who has asked: that one may go, and the change is still
/// there. Only a closed semaphore gives none, and this one is never closed.
pub type Turn = Option<OwnedSemaphorePermit>;

/// Publishes everything at once, before there is anybody to wait for.
pub fn publish_at_start(
    table: &mut Table,
    requests: Vec<PublishRequest>,
) -> Result<Vec<Delivery>, PortError> {
    let mut opening = Opening::begin(requests, Publisher::Host, table)?;
    while opening.step(table)? {}
    Ok(opening.commit(table))
}

/// A published port, as those who ask are told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Published {
    /// Its number, which no other port of this process ever has.
    pub id: u32,
    /// What it binds.
    pub binding: Binding,
}

/// What is to be removed.
#[derive(Clone, Debug)]
pub enum Removal {
    /// Ports by their words; each has to mean at least one.
    Meant(Vec<(String, PublishRequest)>),
    /// One port by its number.
    Numbered(u32),
    /// Whatever a place of the host leads to.
    Place(Place),
}

/// The published ports and the way to the workers.
pub struct Publishing {
    table: RefCell<Table>,
    workers: Vec<Mailbox<ToWorker<OwnedFd>>>,
    changing: tokio::sync::Mutex<()>,
    /// What many specifications mean takes memory: who wants a change waits for a turn before it is understood.
    turns: Arc<Semaphore>,
    /// The guest's turns: however many changes it wants, one of the host's waits for one of them at the most.
    guest_turns: Arc<Semaphore>,
    /// Numbers of ports that nobody holds any more.
    let_go: UnboundedSender<Vec<u32>>,
    unheld: RefCell<Option<UnboundedReceiver<Vec<u32>>>>,
}

impl Publishing {
    /// Goes on from the start's table.
    pub fn new(table: Table, workers: Vec<Mailbox<ToWorker<OwnedFd>>>) -> Rc<Self> {
        let (let_go, unheld) = unbounded_channel();
        Rc::new(Self {
            table: RefCell::new(table),
            workers,
            changing: tokio::sync::Mutex::default(),
            turns: Arc::new(Semaphore::new(CHANGES)),
            guest_turns: Arc::new(Semaphore::new(1)),
            let_go,
            unheld: RefCell::new(Some(unheld)),
        })
    }

    /// Waits for the right to one change.
    pub async fn turn(&self, publisher: Publisher) -> Turn {
        let turns = match publisher {
            Publisher::Host => &self.turns,
            Publisher::Guest => &self.guest_turns,
        };
        turns.clone().acquire_owned().await.ok()
    }

    /// Looks at the table.
    pub fn look<T>(&self, at: impl FnOnce(&Table) -> T) -> T {
        at(&self.table.borrow())
    }

    /// Publishes all of these, or none.
    pub async fn publish(
        self: &Rc<Self>,
        requests: Vec<PublishRequest>,
        publisher: Publisher,
        turn: Turn,
    ) -> Result<Vec<Published>, PortError> {
        self.change(turn, async move |publishing| publishing.add(requests, publisher).await).await
    }

    /// Publishes all of these, or none, for as long as what is returned lives. If nobody takes it, they are taken back at once.
    pub async fn publish_held(
        self: &Rc<Self>,
        requests: Vec<PublishRequest>,
        publisher: Publisher,
        turn: Turn,
    ) -> Result<(Vec<Published>, Held), PortError> {
        let change = async move |publishing: &Self| {
            let published = publishing.add(requests, publisher).await?;
            let ids: Vec<u32> = published.iter().map(|one| one.id).collect();
            let removed = publishing.table.borrow_mut().tell_removal(&ids);
            Ok((published, Held::new(ids, removed, publishing.let_go.clone())))
        };
        self.change(turn, change).await
    }

    /// Takes back what nobody holds any more, for ever.
    pub async fn take_back_unheld(self: Rc<Self>) {
        let Some(mut unheld) = self.unheld.take() else { return };
        let mut ids = Vec::new();
        while unheld.recv_many(&mut ids, UNHELD).await > 0 {
            let _alone = self.changing.lock().await;
            self.take_back(ids.drain(..).flatten().collect()).await;
        }
    }

    /// Unpublishes all of these, or none. Their ports are free when it is done.
    pub async fn unpublish(
        self: &Rc<Self>,
        removal: Removal,
        publisher: Publisher,
        turn: Turn,
    ) -> Result<Vec<Published>, PortError> {
        self.change(turn, async move |publishing| publishing.remove(&removal, publisher).await).await
    }

    /// Makes a change when those before it are made, whatever becomes of who has asked.
    async fn change<T: 'static>(
        self: &Rc<Self>,
        turn: Turn,
        change: impl AsyncFnOnce(&Self) -> Result<T, PortError> + 'static,
    ) -> Result<T, PortError> {
        let publishing = self.clone();
        let made = spawn_local(async move {
            let _turn = turn;
            let _alone = publishing.changing.lock().await;
            change(&publishing).await
        });
        made.await.unwrap_or(Err(PortError::Busy))
    }

    async fn add(
        &self,
        requests: Vec<PublishRequest>,
        publisher: Publisher,
    ) -> Result<Vec<Published>, PortError> {
        let mut opening = Opening::begin(requests, publisher, &self.table.borrow())?;
        loop {
            let stepped = opening.step(&mut self.table.borrow_mut());
            match stepped {
                Ok(true) => yield_now().await,
                Ok(false) => break,
                Err(error) => {
                    // Closing thousands of sockets takes a while, too.
                    while opening.close_one() {
                        yield_now().await;
                    }
                    return Err(error);
                }
            }
        }
        let deliveries = opening.commit(&mut self.table.borrow_mut());
        let published: Vec<Published> =
            deliveries.iter().map(|one| Published { id: one.publication.id, binding: one.binding }).collect();
        let mut deliveries = deliveries.into_iter();
        while let Some(delivery) = deliveries.next() {
            if self.deliver(delivery).await.is_err() {
                while deliveries.next().is_some() {
                    yield_now().await;
                }
                let ids = published.iter().map(|one| one.id).collect();
                self.take_back(ids).await;
                return Err(PortError::Busy);
            }
        }
        Ok(published)
    }

    async fn deliver(&self, delivery: Delivery) -> Result<(), PortError> {
        for worker in 0..self.workers.len() {
            self.mail(worker, ToWorker::Exclude { port: delivery.binding.host_port, excluded: true }).await?;
        }
        for (worker, socket) in delivery.sockets {
            self.mail(worker, ToWorker::Publish(delivery.publication, socket)).await?;
        }
        Ok(())
    }

    /// Puts mail into a worker's box, as soon as there is room.
    async fn mail(&self, worker: usize, mail: ToWorker<OwnedFd>) -> Result<(), PortError> {
        let Some(mailbox) = self.workers.get(worker) else { return Ok(()) };
        mailing::deliver(mailbox, mail).await.map_err(|_| PortError::Busy)
    }

    async fn remove(&self, removal: &Removal, publisher: Publisher) -> Result<Vec<Published>, PortError> {
        let mut ids = match removal {
            Removal::Numbered(id) => {
                let known = self.look(|table| table.seen_by(*id, publisher).is_some());
                vec![known.then_some(*id).ok_or_else(|| PortError::NotPublished(format!("port {id}")))?]
            }
            Removal::Place(place) => {
                let found = self.look(|table| table.at(place, publisher));
                if found.is_empty() {
                    return Err(PortError::NotPublished(place.to_string()));
                }
                found
            }
            Removal::Meant(requests) => {
                let mut ids = Vec::new();
                for (words, request) in requests {
                    let matching = self.look(|table| table.matching(request, publisher));
                    if matching.is_empty() {
                        return Err(PortError::NotPublished(words.clone()));
                    }
                    ids.extend(matching);
                    yield_now().await;
                }
                ids
            }
        };
        ids.sort_unstable();
        ids.dedup();
        Ok(self.take_back(ids).await)
    }

    /// Takes rows out, and waits until their ports are free.
    async fn take_back(&self, ids: Vec<u32>) -> Vec<Published> {
        let receipt = Receipt::default();
        let mut removed = Vec::new();
        // Those that take no mail for seconds have ended, or will never.
        let mut silent = vec![false; self.workers.len()];
        for id in ids {
            let Some(row) = self.table.borrow_mut().remove(id) else { continue };
            let port = row.binding.host_port;
            let excluded = self.look(|table| table.excludes(port));
            removed.push(Published { id, binding: row.binding });
            for (worker, silent) in silent.iter_mut().enumerate().filter(|(_, silent)| !**silent) {
                let unpublish = ToWorker::Unpublish { id, receipt: receipt.clone() };
                *silent = self.mail(worker, unpublish).await.is_err();
                if !excluded && !*silent {
                    *silent = self.mail(worker, ToWorker::Exclude { port, excluded }).await.is_err();
                }
            }
            // Handles of its sockets are closed here.
            drop(row);
            yield_now().await;
        }
        // One that does not give it back has ended, and its sockets with it.
        let _ = mailing::wait_for(&receipt).await;
        removed
    }

    /// A worker cannot serve a port: it is published no more.
    pub fn worker_refuses(self: &Rc<Self>, id: u32) {
        let publishing = self.clone();
        spawn_local(async move {
            let _alone = publishing.changing.lock().await;
            for Published { binding, .. } in publishing.take_back(vec![id]).await {
                tracing::error!("{} cannot be served: it is not published any more", binding.place());
            }
        });
    }

    /// What the guest answers at a published TCP port.
    pub fn guest_answers(self: &Rc<Self>, id: u32, listens: bool) {
        if listens {
            return self.table.borrow_mut().guest_listens(id);
        }
        let Some((publication, refusal)) = self.table.borrow_mut().guest_refuses(id) else { return };
        let Some(worker) = self.workers.first().cloned() else { return };
        let publishing = self.clone();
        spawn_local(async move {
            for pause in refusal::Pauses::default() {
                tokio::time::sleep(pause).await;
                if !publishing.look(|table| table.lasts(id, refusal)) {
                    return;
                }
                // One that does not fit is made up for by the next.
                let _ = worker.put(ToWorker::Probe(publication));
            }
        });
    }
}
