//! What the commands do.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::{SigSet, Signal};
use redirect::{AddressWatch, Observation, Redirect, Redirection};

use crate::config::Config;
use crate::dropped::DroppedLog;
use crate::error::{Error, Result};
use crate::lock::{Lock, NetnsLock};
use crate::{metrics, pods, shortcut};

/// How often the configuration file, the interfaces and ztunnel's namespace are looked at.
const POLL_EVERY: Duration = Duration::from_secs(1);
/// How long the configuration file must not change before it is believed.
const SETTLE: Duration = Duration::from_millis(100);
/// Most polls between two attempts to do what failed.
const RETRY_POLLS_MAX: u32 = 32;
/// Between two attempts to hear of the node's addresses.
const WATCH_PAUSE: Duration = Duration::from_secs(1);
/// Between two looks at them, as pods that come and go change them, too.
const ADDRESSES_PAUSE: Duration = Duration::from_millis(100);
/// What is told to the main loop and not yet heard; of a change of addresses one is enough.
const EVENTS_MAX: usize = 4;
/// How long `run` waits for the lock, which `status` may hold for a moment.
const RUN_PATIENCE: Duration = Duration::from_millis(200);
/// How long `cleanup` waits for a `run` that is just ending.
const CLEANUP_PATIENCE: Duration = Duration::from_secs(5);

/// `run`: returns on SIGTERM or SIGINT, leaving redirection as it is.
pub(crate) fn run(path: &Path) -> Result<()> {
    let config = Config::load(path)?;
    redirect::check_privileges(config.redirect == Redirect::Ebpf)?;
    // Before any thread is started: all of them inherit the mask.
    let (sender, events) = mpsc::sync_channel(EVENTS_MAX);
    watch_signals(sender.clone())?;
    let _lock = Lock::take(&config.state_dir, RUN_PATIENCE)?;
    let _netns_lock = NetnsLock::take()?;
    // Before the addresses are read for the first time, so that no change goes unheard.
    watch_addresses(sender);
    let mut agent = Agent::start(path, config)?;
    let mut stdout = std::io::stdout();
    writeln!(stdout, "node-agent: ready")
        .and_then(|()| stdout.flush())
        .map_err(Error::Output)?;
    let mut next_poll = Instant::now() + POLL_EVERY;
    loop {
        let wait = next_poll.saturating_duration_since(Instant::now());
        match events.recv_timeout(wait) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(Event::Addresses) => agent.follow_node(),
            Ok(Event::Signal(signal)) => {
                tracing::info!(%signal, "ending; redirection stays installed");
                return Ok(());
            }
            Err(RecvTimeoutError::Disconnected) => return Err(Error::Signals(nix::Error::EBADF)),
        }
        // Also while addresses change without end.
        if Instant::now() >= next_poll {
            agent.poll();
            next_poll = Instant::now() + POLL_EVERY;
        }
    }
}

/// What wakes the main loop between two polls.
#[derive(Debug)]
enum Event {
    /// End.
    Signal(Signal),
    /// Addresses of the node have come or gone.
    Addresses,
}

/// Tells of signals that end the agent.
fn watch_signals(events: SyncSender<Event>) -> Result<()> {
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

/// Tells of changes of the node's addresses. Without it they are found when [`Agent::reconcile`]
/// looks.
fn watch_addresses(events: SyncSender<Event>) {
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
                // One that is full has such a message, or ends the agent.
                Ok(()) | Err(mpsc::TrySendError::Full(_)) => {}
                Err(mpsc::TrySendError::Disconnected(_)) => return,
            }
            thread::sleep(ADDRESSES_PAUSE);
        }
    });
}

#[derive(Debug)]
struct Agent {
    path: PathBuf,
    config: Config,
    redirection: Box<dyn Redirection>,
    shortcut: shortcut::Owner,
    metrics: Option<metrics::Server>,
    /// What the file held when last looked at, right or wrong.
    seen: String,
    observed: Observation,
    /// What was there after the last change; part of it missing means that someone interfered.
    expected: BTreeSet<String>,
    /// What the last repair was for.
    repaired: BTreeSet<String>,
    next_reconcile: Instant,
    /// When a pin was last made or removed, as far as that has been looked into.
    pins_seen: Option<SystemTime>,
    dropped: DroppedLog,
    /// Last failure of a poll, so that one that lasts is logged once.
    complaint: Option<String>,
    retry: Option<Retry>,
}

/// Of what could not be applied: an interface may yet come, a lock may yet be free.
#[derive(Debug)]
struct Retry {
    /// Polls from the last attempt to the next.
    pause: u32,
    /// Polls left.
    left: u32,
    /// Whether it concerns more than single pods.
    whole: bool,
}

impl Agent {
    /// Installs. If that fails and nothing was installed before, nothing is afterwards.
    fn start(path: &Path, config: Config) -> Result<Self> {
        let metrics = metrics::Server::start(&config)?;
        let mut redirection = config.redirection()?;
        let fresh = !redirection.status()?.installed;
        let observed = config.observe();
        if let Err(error) = redirection.install() {
            if fresh && let Err(left) = redirection.cleanup() {
                tracing::error!(error = %left, "not everything could be removed");
            }
            return Err(error.into());
        }
        let mut agent = Self {
            path: path.to_owned(),
            observed,
            seen: std::fs::read_to_string(path).unwrap_or_default(),
            expected: BTreeSet::new(),
            repaired: BTreeSet::new(),
            next_reconcile: Instant::now() + config.reconcile(),
            pins_seen: pins_changed(&config),
            dropped: DroppedLog::default(),
            config,
            redirection,
            shortcut: shortcut::Owner::default(),
            metrics,
            complaint: None,
            retry: None,
        };
        // From here on the agent is needed, whatever becomes of pods: what fails is tried again.
        let result = agent.apply_pods(true);
        agent.complain(&result);
        agent.follow_shortcut();
        Ok(agent)
    }

    fn follow_shortcut(&mut self) {
        let pods = self.redirection.enrolled();
        self.shortcut.follow(&self.config, &pods);
    }

    /// Addresses of the node have come or gone: nothing else is touched.
    fn follow_node(&mut self) {
        if let Err(error) = self.redirection.follow_node() {
            tracing::error!(%error, "the node's addresses are those known before");
        }
    }

    /// Follows changes of the file, of interfaces and of ztunnel's network namespace.
    fn poll(&mut self) {
        let result = self
            .follow_file()
            .and_then(|()| self.follow_system())
            .and_then(|()| self.try_again())
            .and_then(|()| self.reconcile())
            .and_then(|()| metrics::Server::follow(&mut self.metrics, &self.config));
        self.dropped.log(self.redirection.as_mut());
        self.follow_shortcut();
        self.complain(&result);
    }

    /// Logs a failure that lasts once.
    fn complain(&mut self, result: &Result<()>) {
        match result {
            Ok(()) if self.retry.is_some() => {}
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

    fn follow_file(&mut self) -> Result<()> {
        let text = std::fs::read_to_string(&self.path).map_err(|source| Error::ReadConfig {
            path: self.path.clone(),
            source,
        })?;
        if text == self.seen || !self.is_settled(&text) {
            return Ok(());
        }
        self.seen.clone_from(&text);
        let next = match Config::parse(&self.path, &text) {
            Ok(next) => next,
            Err(error) => {
                tracing::error!("{error}; the old configuration stays in force");
                return Ok(());
            }
        };
        if !self.config.can_become(&next) {
            tracing::error!(
                "redirect, attach, state_dir and bpffs need cleanup and a restart; \
                 the old configuration stays in force"
            );
            return Ok(());
        }
        let same_settings = next.settings() == self.config.settings();
        if same_settings && self.retry.as_ref().is_none_or(|retry| !retry.whole) {
            self.config = next;
            self.apply_pods(false)?;
        } else {
            // A back end has its settings from the start; a new one adopts what is installed.
            self.redirection = next.redirection()?;
            self.config = next;
            self.apply()?;
        }
        let captured = self.redirection.enrolled().len();
        let listed = self.config.pods.len();
        tracing::info!(listed, captured, "configuration applied");
        Ok(())
    }

    /// Whether the file still holds `text` a moment later: one that is being written may look
    /// like a whole one with fewer pods.
    fn is_settled(&self, text: &str) -> bool {
        thread::sleep(SETTLE);
        std::fs::read_to_string(&self.path).is_ok_and(|later| later == text)
    }

    fn follow_system(&mut self) -> Result<()> {
        let now = self.config.observe();
        if now == self.observed {
            return Ok(());
        }
        if now.node == self.observed.node {
            tracing::info!("interfaces or network namespaces of pods changed");
            return self.apply_pods(true);
        }
        tracing::info!("interfaces or ztunnel's network namespace changed, installing anew");
        self.apply()
    }

    fn try_again(&mut self) -> Result<()> {
        let Some(retry) = &mut self.retry else {
            return Ok(());
        };
        retry.left -= 1;
        if retry.left > 0 {
            return Ok(());
        }
        if retry.whole {
            // What is removed meanwhile is to be missed, too.
            let whole = self.expected.clone();
            let result = self.apply();
            self.expected.extend(whole);
            result?;
        } else {
            self.apply_pods(false)?;
        }
        if self.retry.is_none() {
            tracing::info!("what had failed is applied now");
        }
        Ok(())
    }

    /// Puts back what someone else has removed, and forgets what has ended. Pins do not wait for
    /// their turn: without the programs they kept attached, packets go past ztunnel.
    fn reconcile(&mut self) -> Result<()> {
        let pins = pins_changed(&self.config);
        if Instant::now() < self.next_reconcile && pins == self.pins_seen {
            return Ok(());
        }
        self.pins_seen = pins;
        self.next_reconcile = Instant::now() + self.config.reconcile();
        self.follow_node();
        let now = self.redirection.inventory()?;
        let missing: BTreeSet<_> = self.expected.difference(&now).cloned().collect();
        let Some(example) = missing.first() else {
            self.repaired.clear();
            return self.redirection.tidy().map_err(Error::from);
        };
        tracing::warn!(
            missing = example,
            others = missing.len() - 1,
            "removed by someone else, installing again"
        );
        let whole = self.expected.clone();
        let result = self.apply();
        // What is removed while the repair is under way is missing from the new inventory, too, and
        // would never be put back. What a repair does not bring back is given up.
        if missing == self.repaired {
            self.repaired.clear();
        } else {
            self.expected.extend(whole);
            self.repaired = missing;
        }
        result
    }

    /// Installs everything again, in place.
    fn apply(&mut self) -> Result<()> {
        let last = self.retry.take();
        let result = self.redirection.install();
        // Where the node's side cannot be brought up to date, pods are to be captured all the
        // same, as far as that goes.
        let pods = self.apply_pods(true);
        let result = result.map_err(Error::from).and(pods);
        let failed = result.is_err() || self.retry.is_some();
        self.retry = failed.then(|| Retry::after(last.as_ref(), result.is_err()));
        result
    }

    /// Brings the node to the pods of the list; with `all`, those that are captured already, too.
    fn apply_pods(&mut self, all: bool) -> Result<()> {
        self.observed = self.config.observe();
        let last = self.retry.take();
        // What someone removes from pods that are not touched here is to be missed afterwards.
        let mut missed = BTreeSet::new();
        if !all {
            let now = self.redirection.inventory()?;
            missed = self.expected.difference(&now).cloned().collect();
        }
        let result = pods::apply(self.redirection.as_mut(), &self.config, all);
        let failed = !matches!(result, Ok(false));
        self.retry = failed.then(|| Retry::after(last.as_ref(), result.is_err()));
        self.expected = self.redirection.inventory()?;
        self.expected.extend(missed);
        result.map(drop)
    }
}

impl Retry {
    fn after(last: Option<&Self>, whole: bool) -> Self {
        let pause = last.map_or(1, |last| (last.pause * 2).min(RETRY_POLLS_MAX));
        Self {
            pause,
            left: pause,
            whole,
        }
    }
}

/// When a pin was last made or removed, by anyone: the kernel notes it for their directory.
fn pins_changed(config: &Config) -> Option<SystemTime> {
    let directory = std::fs::metadata(config.pins()?).ok()?;
    directory.modified().ok()
}

/// `cleanup`.
pub(crate) fn cleanup(config: &Config) -> Result<()> {
    redirect::check_privileges(config.redirect == Redirect::Ebpf)?;
    let lock = Lock::take(&config.state_dir, CLEANUP_PATIENCE)?;
    shortcut::remove(config)?;
    config.redirection()?.cleanup()?;
    lock.remove()
}
