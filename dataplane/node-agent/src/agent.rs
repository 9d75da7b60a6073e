//! What the commands do.

use std::collections::{BTreeSet, HashMap};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::{SigSet, Signal};
use redirect::{AddressWatch, Observation, Pod, PodStatus, Redirection, Status};
use serde::Serialize;

use crate::config::{Config, Kind};
use crate::dropped::DroppedLog;
use crate::error::{Error, Result};
use crate::lock::{self, Lock, NetnsLock};
use crate::{metrics, shortcut};

/// How often the configuration file, the interfaces and ztunnel's namespace are looked at.
const POLL_EVERY: Duration = Duration::from_secs(1);
/// How long the configuration file must not change before it is believed.
const SETTLE: Duration = Duration::from_millis(100);
/// Most polls between two attempts to do what failed.
const RETRY_POLLS_MAX: u32 = 32;
/// Between two attempts to hear of the node's addresses.
const WATCH_PAUSE: Duration = Duration::from_secs(1);
/// What is told to the main loop and not yet heard; of a change of addresses one is enough.
const EVENTS_MAX: usize = 4;
/// How long `run` waits for the lock, which `status` may hold for a moment.
const RUN_PATIENCE: Duration = Duration::from_millis(200);
/// How long `cleanup` waits for a `run` that is just ending.
const CLEANUP_PATIENCE: Duration = Duration::from_secs(5);

/// `run`: returns on SIGTERM or SIGINT, leaving redirection as it is.
pub(crate) fn run(path: &Path) -> Result<()> {
    let config = Config::load(path)?;
    redirect::check_privileges(config.redirect == Kind::Ebpf)?;
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
}

impl Agent {
    /// Installs. If that fails and nothing was installed before, nothing is afterwards.
    fn start(path: &Path, config: Config) -> Result<Self> {
        let metrics = metrics::Server::start(&config)?;
        let mut redirection = config.redirection()?;
        let fresh = !redirection.status()?.installed;
        if let Err(error) = apply(redirection.as_mut(), &config) {
            if fresh && let Err(left) = redirection.cleanup() {
                tracing::error!(error = %left, "not everything could be removed");
            }
            return Err(error);
        }
        let mut shortcut = shortcut::Owner::default();
        shortcut.follow(&config);
        Ok(Self {
            path: path.to_owned(),
            observed: Observation::take(&config.settings(), &config.pods),
            seen: std::fs::read_to_string(path).unwrap_or_default(),
            expected: redirection.inventory()?,
            repaired: BTreeSet::new(),
            next_reconcile: Instant::now() + config.reconcile(),
            pins_seen: pins_changed(&config),
            dropped: DroppedLog::default(),
            config,
            redirection,
            shortcut,
            metrics,
            complaint: None,
            retry: None,
        })
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
        self.shortcut.follow(&self.config);
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
        if same_settings && self.retry.is_none() {
            self.config = next;
            self.apply_pods()?;
        } else {
            // A back end has its settings from the start; a new one adopts what is installed.
            self.redirection = next.redirection()?;
            self.config = next;
            self.apply()?;
        }
        tracing::info!(pods = self.config.pods.len(), "configuration applied");
        Ok(())
    }

    /// Whether the file still holds `text` a moment later: one that is being written may look
    /// like a whole one with fewer pods.
    fn is_settled(&self, text: &str) -> bool {
        thread::sleep(SETTLE);
        std::fs::read_to_string(&self.path).is_ok_and(|later| later == text)
    }

    fn follow_system(&mut self) -> Result<()> {
        let now = Observation::take(&self.config.settings(), &self.config.pods);
        if now == self.observed {
            return Ok(());
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
        // What is removed meanwhile is to be missed, too.
        let whole = self.expected.clone();
        let result = self.apply();
        self.expected.extend(whole);
        result?;
        tracing::info!("what had failed is applied now");
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
        self.observed = Observation::take(&self.config.settings(), &self.config.pods);
        let result = apply(self.redirection.as_mut(), &self.config);
        self.applied(result)
    }

    /// Adds and removes pods; the others are not touched.
    fn apply_pods(&mut self) -> Result<()> {
        self.observed = Observation::take(&self.config.settings(), &self.config.pods);
        let result = apply_pods(self.redirection.as_mut(), &self.config.pods, false);
        self.applied(result)
    }

    fn applied(&mut self, result: Result<()>) -> Result<()> {
        self.retry = result.is_err().then(|| {
            let pause = self
                .retry
                .as_ref()
                .map_or(1, |last| (last.pause * 2).min(RETRY_POLLS_MAX));
            Retry { pause, left: pause }
        });
        self.expected = self.redirection.inventory()?;
        result
    }
}

/// When a pin was last made or removed, by anyone: the kernel notes it for their directory.
fn pins_changed(config: &Config) -> Option<SystemTime> {
    let directory = std::fs::metadata(config.settings().bpffs).ok()?;
    directory.modified().ok()
}

/// Brings the node to what the configuration says: every pod is tried, the first failure told.
fn apply(redirection: &mut dyn Redirection, config: &Config) -> Result<()> {
    redirection.install()?;
    apply_pods(redirection, &config.pods, true)
}

/// With `all`, pods that are captured already are brought up to date, too.
fn apply_pods(redirection: &mut dyn Redirection, pods: &[Pod], all: bool) -> Result<()> {
    let enrolled = redirection.enrolled();
    let wanted: BTreeSet<_> = pods.iter().map(|pod| pod.uid.as_str()).collect();
    let gone: Vec<_> = enrolled
        .iter()
        .map(|pod| pod.uid.as_str())
        .filter(|uid| !wanted.contains(uid))
        .collect();
    let known: HashMap<_, _> = enrolled.iter().map(|pod| (&pod.uid, pod)).collect();
    let is_new = |pod: &Pod| known.get(&pod.uid).is_none_or(|known| *known != pod);
    let changed: Vec<Pod> = pods
        .iter()
        .filter(|pod| all || is_new(pod))
        .cloned()
        .collect();
    let removed = redirection.remove_pods(&gone);
    let added = redirection.add_pods(&changed);
    removed.and(added).map_err(Error::from)
}

/// What `status --json` prints: the redirection's status and the agent's process id.
#[derive(Debug, Serialize)]
struct Report {
    /// Process id of `node-agent run`, if it runs.
    agent_pid: Option<u32>,
    #[serde(flatten)]
    status: Status,
    /// Of the sockmap short-cut, if it is installed.
    sockmap: Option<redirect::sockmap::Status>,
}

/// `status`.
pub(crate) fn status(config: &Config, json: bool) -> Result<()> {
    let report = Report {
        agent_pid: lock::running(&config.state_dir),
        status: config.redirection()?.status()?,
        sockmap: shortcut::status(config)?,
    };
    let text = if json {
        serde_json::to_string_pretty(&report).map_err(|e| Error::Output(e.into()))?
    } else {
        describe(&report)
    };
    writeln!(std::io::stdout(), "{}", text.trim_end()).map_err(Error::Output)
}

fn describe(report: &Report) -> String {
    let status = &report.status;
    let yes = |is: bool| if is { "yes" } else { "no" };
    let agent = report.agent_pid.map(|pid| pid.to_string());
    let mut lines = vec![
        format!("redirection: {}", status.redirect),
        format!("installed:   {}", yes(status.installed)),
        format!("agent:       {}", agent.as_deref().unwrap_or("not running")),
    ];
    let variant = status.variant.iter();
    lines.extend(variant.map(|variant| format!("variant:     {variant:?}")));
    let driver = status.tunnel_driver.iter();
    lines.extend(driver.map(|driver| format!("tunnels:     {driver}")));
    let attach = status.attach.iter();
    lines.extend(attach.map(|attach| format!("attached by: {attach}")));
    lines.extend(status.pods.iter().map(describe_pod));
    lines.push(format!("dns capture: {}", yes(status.dns)));
    if status.older_connections > 0 {
        let count = status.older_connections;
        lines.push(format!("older:       {count} connections left alone"));
    }
    for (program, reasons) in &status.counters {
        for (reason, count) in reasons {
            lines.push(format!("packets:     {program} {reason} {count}"));
        }
    }
    let owned = status.owned.iter();
    lines.extend(owned.map(|owned| format!("owns:        {owned}")));
    if let Some(sockmap) = &report.sockmap {
        describe_sockmap(sockmap, &mut lines);
    }
    lines.join("\n")
}

fn describe_pod(pod: &PodStatus) -> String {
    let addresses: Vec<_> = pod.addresses.iter().map(ToString::to_string).collect();
    let missing = if pod.present {
        ""
    } else {
        " (interface missing)"
    };
    let (uid, interface) = (&pod.uid, &pod.host_interface);
    let addresses = addresses.join(",");
    format!("pod:         {uid} {addresses} {interface}{missing}")
}

fn describe_sockmap(sockmap: &redirect::sockmap::Status, lines: &mut Vec<String>) {
    let state = match (sockmap.enabled, sockmap.forced) {
        (false, _) => "off",
        (true, false) => "on",
        (true, true) => "on by force: this kernel's FIONREAD is wrong",
    };
    lines.push(format!("sockmap:     {state}"));
    let bound = sockmap.memory_max.iter();
    lines.extend(bound.map(|max| format!("sockmap:     below {} MiB of TCP memory", max >> 20)));
    for (counter, count) in &sockmap.counters {
        lines.push(format!("sockmap:     {counter} {count}"));
    }
}

/// `cleanup`.
pub(crate) fn cleanup(config: &Config) -> Result<()> {
    redirect::check_privileges(config.redirect == Kind::Ebpf)?;
    let lock = Lock::take(&config.state_dir, CLEANUP_PATIENCE)?;
    shortcut::remove(config)?;
    config.redirection()?.cleanup()?;
    lock.remove()
}
