//! What wakes the main loop between two polls.

use std::sync::mpsc::{self, SyncSender};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use redirect::AddressWatch;

use crate::error::{Error, Result};

/// Most events not yet heard; of a change of addresses, or of what is wanted, one is enough.
pub(crate) const EVENTS_MAX: usize = 4;
/// Between two attempts to hear of the node's addresses.
const WATCH_PAUSE: Duration = Duration::from_secs(1);
/// Between two looks at them, as pods that come and go change them, too.
const ADDRESSES_PAUSE: Duration = Duration::from_millis(100);

/// Something has happened.
#[derive(Debug)]
pub(crate) enum Event {
    /// The agent is to end.
    Signal(Signal),
    /// Addresses of the node have come or gone.
    Addresses,
    /// A source has published something.
    Wanted,
}

/// Tells of signals that end the agent. To be called before any thread is started: all of them
/// inherit the mask.
pub(crate) fn watch_signals(events: SyncSender<Event>) -> Result<()> {
    let set = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    set.thread_block().map_err(Error::Signals)?;
    thread::spawn(move || {
        if let Ok(signal) = set.wait() {
            // The receiver is gone only when the process is ending anyway.
            let _ = events.send(Event::Signal(signal));
        }
    });
    Ok(())
}

/// Tells of changes of the node's addresses. Without it they are found when everything is looked
/// at, every `reconcile_s`.
pub(crate) fn watch_addresses(events: SyncSender<Event>) {
    let mut watch = AddressWatch::new();
    thread::spawn(move || {
        loop {
            let heard = match &watch {
                Ok(watch) => watch.wait(),
                Err(error) => Err(std::io::Error::from(error.kind())),
            };
            if let Err(error) = heard {
                tracing::warn!(%error, "cannot hear of the node's addresses, trying again");
                thread::sleep(WATCH_PAUSE);
                watch = AddressWatch::new();
            }
            match events.try_send(Event::Addresses) {
                // A full queue has one, or wakes the main loop for another reason, and addresses
                // are looked at every `reconcile_s` all the same.
                Ok(()) | Err(mpsc::TrySendError::Full(_)) => {}
                Err(mpsc::TrySendError::Disconnected(_)) => return,
            }
            thread::sleep(ADDRESSES_PAUSE);
        }
    });
}
