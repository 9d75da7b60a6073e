//! `run`: keeps the node at what is wanted, until it is told to end.

use std::io::Write as _;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use redirect::Redirect;
use tokio::sync::watch;

use crate::dropped::DroppedLog;
use crate::endpoint::Endpoint;
use crate::error::{Error, Result};
use crate::events::{self, Event};
use crate::lock::{Lock, NetnsLock};
use crate::node::ThisNode;
use crate::reconciler::Reconciler;
use crate::sockmap;
use crate::source::file::File;
use crate::source::{self, Publisher, Wanted};

/// How often the interfaces, ztunnel's namespace and the pins are looked at.
const POLL_EVERY: Duration = Duration::from_secs(1);
/// How long to wait for the lock, which `status` may hold for a moment.
const LOCK_PATIENCE: Duration = Duration::from_millis(200);

/// Returns on SIGTERM or SIGINT, leaving redirection as it is.
pub(crate) fn run(path: &Path) -> Result<()> {
    let (file, wanted) = File::open(path)?;
    redirect::check_privileges(wanted.config.redirect == Redirect::Ebpf)?;
    // Before any thread is started: all of them inherit the mask.
    let (sender, events) = mpsc::sync_channel(events::EVENTS_MAX);
    events::watch_signals(sender.clone())?;
    let _lock = Lock::take(&wanted.config.state_dir, LOCK_PATIENCE)?;
    let _netns_lock = NetnsLock::take()?;
    // Before the addresses are read for the first time, so that no change goes unheard.
    events::watch_addresses(sender.clone());
    let (publisher, cell) = Publisher::new(wanted, sender);
    let mut agent = Agent::start(cell)?;
    source::start(file, publisher)?;
    let mut stdout = std::io::stdout();
    writeln!(stdout, "node-agent: ready")
        .and_then(|()| stdout.flush())
        .map_err(Error::Output)?;
    let mut next_poll = Instant::now() + POLL_EVERY;
    loop {
        let wait = next_poll.saturating_duration_since(Instant::now());
        match events.recv_timeout(wait) {
            Err(RecvTimeoutError::Timeout) | Ok(Event::Wanted) => {}
            Ok(Event::Addresses) => agent.reconciler.follow_node(),
            Ok(Event::Signal(signal)) => {
                tracing::info!(%signal, "ending; redirection stays installed");
                return Ok(());
            }
            Err(RecvTimeoutError::Disconnected) => return Err(Error::Signals(nix::Error::EBADF)),
        }
        agent.follow();
        // Also while addresses change without end.
        if Instant::now() >= next_poll {
            agent.poll();
            next_poll = Instant::now() + POLL_EVERY;
        }
    }
}

#[derive(Debug)]
struct Agent {
    cell: watch::Receiver<Wanted>,
    reconciler: Reconciler<ThisNode>,
    sockmap: sockmap::Owner,
    endpoint: Option<Endpoint>,
    dropped: DroppedLog,
    /// Last failure, so that one that lasts is logged once.
    complaint: Option<String>,
}

impl Agent {
    fn start(mut cell: watch::Receiver<Wanted>) -> Result<Self> {
        let wanted = cell.borrow_and_update().clone();
        let endpoint = Endpoint::start(&wanted.config)?;
        let mut agent = Self {
            cell,
            reconciler: Reconciler::install(ThisNode::default(), wanted)?,
            sockmap: sockmap::Owner::default(),
            endpoint,
            dropped: DroppedLog::default(),
            complaint: None,
        };
        // From here on the agent is needed, whatever becomes of pods: what fails is tried again.
        let result = agent.reconciler.change_pods(true);
        agent.after(&result);
        Ok(agent)
    }

    /// Follows what is wanted, if that has changed.
    fn follow(&mut self) {
        // Sources do not end before this process does.
        if !self.cell.has_changed().unwrap_or(false) {
            return;
        }
        let wanted = self.cell.borrow_and_update().clone();
        let result = self.reconciler.follow(wanted);
        self.after(&result);
    }

    /// Follows changes of interfaces and of ztunnel's network namespace.
    fn poll(&mut self) {
        let result = self.reconciler.poll(Instant::now());
        self.dropped.log(self.reconciler.redirection());
        self.after(&result);
    }

    /// What else depends on what is captured, and on the configuration.
    fn after(&mut self, result: &Result<()>) {
        let config = &self.reconciler.wanted().config.clone();
        let shown = Endpoint::follow(&mut self.endpoint, config, self.reconciler.redirection());
        let pods = self.reconciler.redirection().enrolled();
        self.sockmap.follow(config, &pods);
        self.complain(if result.is_err() { result } else { &shown });
    }

    fn complain(&mut self, result: &Result<()>) {
        match result {
            Ok(()) if self.reconciler.is_behind() => {}
            Ok(()) => self.complaint = None,
            Err(error) => {
                let text = error.to_string();
                if self.complaint.as_ref() != Some(&text) {
                    tracing::error!("{text}");
                }
                self.complaint = Some(text);
            }
        }
    }
}
