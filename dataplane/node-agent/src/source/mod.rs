//! Where configuration and desired state come from: sources, which publish what is wanted into one
//! cell, of which the newest counts.
//!
//! A source has a thread of its own and may take its time; the main loop is woken and looks at the
//! cell when it is ready to. Several sources may share the cell: each replaces its part, and parts
//! that belong together are replaced in one step.

mod entries;
pub(crate) mod file;

use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::thread;

use tokio::sync::watch;

use crate::config::Config;
use crate::desired::Desired;
use crate::error::{Error, Result};
use crate::events::Event;

/// What is wanted of this node.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    /// How it is done.
    pub(crate) config: Arc<Config>,
    /// What: the pods.
    pub(crate) desired: Arc<Desired>,
}

/// A source of it. What cannot be read is logged, and what was published before stays wanted: an
/// error, or a list that is not complete, must never look like a node without pods.
pub(crate) trait Source: Send + 'static {
    /// Publishes changes until nobody listens any more.
    fn follow(self, publisher: &Publisher);
}

/// The cell, as sources see it.
#[derive(Debug)]
pub(crate) struct Publisher {
    cell: watch::Sender<Wanted>,
    events: SyncSender<Event>,
}

impl Publisher {
    /// A cell that holds `wanted`; of changes `events` is told.
    pub(crate) fn new(
        wanted: Wanted,
        events: SyncSender<Event>,
    ) -> (Self, watch::Receiver<Wanted>) {
        let (cell, receiver) = watch::channel(wanted);
        (Self { cell, events }, receiver)
    }

    /// Replaces part of what is wanted.
    pub(crate) fn publish(&self, change: impl FnOnce(&mut Wanted)) {
        self.cell.send_modify(change);
        // A full queue has something that wakes the main loop, which looks here each time.
        let _ = self.events.try_send(Event::Wanted);
    }

    /// Whether nobody listens any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.cell.is_closed()
    }
}

/// Starts a source on a thread of its own.
pub(crate) fn start(source: impl Source, publisher: Publisher) -> Result<()> {
    thread::Builder::new()
        .name("source".to_owned())
        .spawn(move || source.follow(&publisher))
        .map(drop)
        .map_err(Error::Thread)
}
