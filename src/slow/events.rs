//! What happens around hythe, told to the log once and to whoever listens.

use tokio::sync::broadcast::{self, Receiver, Sender};

use crate::control::shapes::Event;

/// Events that a listener may be behind.
const BACKLOG: usize = 256;

/// Where events are told.
pub struct Events(Sender<Event>);

impl Default for Events {
    fn default() -> Self {
        Self(broadcast::channel(BACKLOG).0)
    }
}

impl Events {
    /// Tells an event.
    pub fn tell(&self, event: Event) {
        // Nobody may listen.
        let _ = self.0.send(event);
    }

    /// Listens from now on.
    pub fn listen(&self) -> Receiver<Event> {
        self.0.subscribe()
    }
}
