//! Reports of readiness.
//!
//! They are edge-triggered as Linux makes them: an event (bytes arrive, room that was asked for comes, an end, an error)
//! puts a watched descriptor on its engine's list; what stays as it was is not reported again. A report names what has
//! just become ready (io_uring's multishot poll) or everything that is ready by then (epoll), as the plan says. One may
//! come when its descriptor is watched no more.

use std::collections::VecDeque;
use std::os::fd::RawFd;

use crate::host::engine::{Interest, Token};

use super::super::stream_socket::Readiness;
use super::{Kernel, Object};

/// How often, in a million, a report that is late comes later still.
const LATER: u64 = 970_000;

/// A descriptor's watch.
pub(super) struct Watch {
    engine: usize,
    token: Token,
    interest: Interest,
    /// What has become ready since the last report.
    pending: Readiness,
    events: u32,
    listed: bool,
}

/// What one engine has to report.
#[derive(Default)]
pub(super) struct Reports {
    ready: VecDeque<RawFd>,
    /// Reports about descriptors that are watched no more.
    late: Vec<(Token, Readiness)>,
}

impl Kernel {
    /// Watches a descriptor; what is ready already is reported too.
    pub fn watch(&mut self, engine: usize, fd: RawFd, token: Token, interest: Interest) -> bool {
        let level = self.level(fd);
        let Some(descriptor) = self.descriptor(fd) else { return false };
        if descriptor.watch.is_some() {
            self.stage.fail(format!("descriptor {fd} is watched twice"));
            return false;
        }
        let pending = Readiness::default();
        descriptor.watch = Some(Watch { engine, token, interest, pending, events: 0, listed: false });
        self.notify(fd, level);
        true
    }

    /// Ends the watch; a report may still be on its way.
    pub fn unwatch(&mut self, fd: RawFd, token: Token) {
        let late = self.random.chance(self.plan.late_reports);
        let Some(descriptor) = self.descriptor(fd) else { return };
        if let Some(watch) = descriptor.watch.take_if(|watch| watch.token == token)
            && late
        {
            self.reports[watch.engine].late.push((token, Readiness::ALL));
        }
    }

    fn level(&mut self, fd: RawFd) -> Readiness {
        match self.descriptor(fd).map(|descriptor| descriptor.object) {
            Some(Object::Stream(id)) => self.streams[id].level(),
            Some(Object::Datagram(id)) => self.datagrams[id].level(),
            Some(Object::Listener(id)) if !self.listeners[id].clients.is_empty() => Readiness::READABLE,
            Some(Object::Listener(_)) | None => Readiness::default(),
        }
    }

    pub(super) fn notify(&mut self, fd: RawFd, event: Readiness) {
        let Some(watch) = self.descriptor(fd).and_then(|descriptor| descriptor.watch.as_mut()) else {
            return;
        };
        let event = match watch.interest {
            Interest::Both => event,
            Interest::Readable => Readiness { writable: false, ..event },
        };
        if event.is_nothing() {
            return;
        }
        watch.pending = watch.pending.or(event);
        watch.events += 1;
        if !watch.listed {
            watch.listed = true;
            let engine = watch.engine;
            self.reports[engine].ready.push_back(fd);
        }
    }

    pub(super) fn notify_stream(&mut self, id: usize, event: Readiness) {
        if let Some(fd) = self.streams[id].fd {
            self.notify(fd, event);
        }
    }

    /// Whether an engine has something to report.
    pub fn has_reports(&self, engine: usize) -> bool {
        !self.reports[engine].ready.is_empty() || !self.reports[engine].late.is_empty()
    }

    /// The next reports of an engine: what is ready, and behind that what comes late, if not later still.
    pub fn report(&mut self, engine: usize, take: &mut dyn FnMut(Token, Readiness)) {
        for _ in 0..self.plan.events_at_once {
            let Some(fd) = self.reports[engine].ready.pop_front() else { break };
            self.report_one(engine, fd, take);
        }
        for (token, readiness) in std::mem::take(&mut self.reports[engine].late) {
            if self.random.chance(LATER) {
                self.reports[engine].late.push((token, readiness));
            } else {
                take(token, readiness);
            }
        }
    }

    fn report_one(&mut self, engine: usize, fd: RawFd, take: &mut dyn FnMut(Token, Readiness)) {
        let level = self.level(fd);
        let full = self.plan.full_reports;
        let Some(watch) = self.descriptor(fd).and_then(|descriptor| descriptor.watch.as_mut()) else {
            return;
        };
        // A descriptor number may have been used again meanwhile, and be another engine's now.
        if !watch.listed || watch.engine != engine {
            return;
        }
        watch.listed = false;
        let events = std::mem::take(&mut watch.events);
        let pending = std::mem::take(&mut watch.pending);
        let readiness = if full || events > 1 { level } else { pending };
        if !readiness.is_nothing() {
            take(watch.token, readiness);
        }
    }
}
