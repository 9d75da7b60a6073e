//! Data-path threads: one per CPU, each with its own ring, listeners and counters.

use std::io;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use mesh::Snapshot;
use proxy::{Command, Listeners, ProxyConfig, WorkerSetup};
use rt::mailbox::{self, Sender};
use rt::{Runtime, RuntimeConfig, RuntimeError, SharedCounters};
use telemetry::{Logging, MetricKind, Registry};
use tls::CertificateStore;

/// Why the workers could not start. `Display` is one line.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("cannot start worker thread {worker}: {error}")]
    Thread { worker: usize, error: io::Error },
    #[error("cannot start worker {worker}: {error}")]
    Runtime { worker: usize, error: RuntimeError },
    #[error("worker {worker} ended while it started")]
    Ended { worker: usize },
}

/// What all workers are started with.
#[derive(Debug, Clone)]
pub(crate) struct Common {
    pub(crate) config: Arc<ProxyConfig>,
    pub(crate) snapshot: Arc<Snapshot>,
    pub(crate) certificates: Arc<CertificateStore>,
    pub(crate) registry: Registry,
    pub(crate) logging: Logging,
}

/// Running workers.
#[derive(Debug)]
pub(crate) struct Workers {
    threads: Vec<JoinHandle<()>>,
    commands: Vec<Sender<Command>>,
}

/// Commands a worker may lag behind by.
const MAILBOX: usize = 256;

/// Starts one worker per set of listeners and waits until each has its ring.
pub(crate) fn start(
    common: &Common,
    listeners: Vec<Listeners>,
    cpus: &[u32],
) -> Result<Workers, StartError> {
    let mut workers = Workers {
        threads: Vec::new(),
        commands: Vec::new(),
    };
    for (worker, listeners) in listeners.into_iter().enumerate() {
        let (sender, commands) = mailbox::channel(MAILBOX);
        let (started, start) = mpsc::channel();
        let common = common.clone();
        let cpu = cpus.get(worker).copied();
        let body = move || run(worker, cpu, &common, listeners, commands, &started);
        let thread = std::thread::Builder::new()
            .name(format!("ztunnel-{worker}"))
            .spawn(body)
            .map_err(|error| StartError::Thread { worker, error })?;
        workers.threads.push(thread);
        workers.commands.push(sender);
        match start.recv() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(StartError::Runtime { worker, error }),
            Err(_) => return Err(StartError::Ended { worker }),
        }
    }
    Ok(workers)
}

fn run(
    worker: usize,
    cpu: Option<u32>,
    common: &Common,
    listeners: Listeners,
    commands: mailbox::Receiver<Command>,
    started: &mpsc::Sender<Result<(), RuntimeError>>,
) {
    if let Some(cpu) = cpu
        && let Err(error) = rt::pin_current_thread(cpu)
    {
        tracing::warn!("worker {worker} is not pinned to CPU {cpu}: {error}");
    }
    let mut runtime = match Runtime::new(RuntimeConfig::default()) {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = started.send(Err(error)); // the receiver waits for exactly this
            return;
        }
    };
    export_counters(worker, &common.registry, &runtime.counters());
    let setup = WorkerSetup {
        config: Arc::clone(&common.config),
        listeners,
        snapshot: Arc::clone(&common.snapshot),
        certificates: Arc::clone(&common.certificates),
        telemetry: common.registry.worker(common.logging.access_log()),
        commands,
        seed: seed(worker),
    };
    let _ = started.send(Ok(()));
    if let Err(error) = runtime.run(proxy::serve(setup)) {
        // Without its ring a worker can serve nothing; the others must not hide that.
        eprintln!("ztunnel: worker {worker}: io_uring failed: {error}");
        std::process::exit(1);
    }
}

/// Different for each worker and start; nothing secret depends on it.
fn seed(worker: usize) -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(worker)
}

fn export_counters(worker: usize, registry: &Registry, counters: &Arc<SharedCounters>) {
    type Read = fn(&SharedCounters) -> u64;
    let exported: [(&str, &str, MetricKind, Read); 7] = [
        (
            "enters_total",
            "io_uring_enter calls",
            MetricKind::Counter,
            |c| c.ring().enters,
        ),
        (
            "completions",
            "io_uring completions",
            MetricKind::Counter,
            |c| c.ring().completions,
        ),
        (
            "submissions",
            "io_uring submissions",
            MetricKind::Counter,
            |c| c.ring().submissions,
        ),
        (
            "cq_overflows",
            "completion queue overflows",
            MetricKind::Counter,
            |c| c.ring().overflows,
        ),
        (
            "buffer_starvations",
            "receives without a free buffer",
            MetricKind::Counter,
            |c| c.ring().starved,
        ),
        (
            "wakes",
            "wake-ups by other threads",
            MetricKind::Counter,
            |c| c.ring().wakes,
        ),
        (
            "tasks",
            "live tasks",
            MetricKind::Gauge,
            SharedCounters::tasks,
        ),
    ];
    for (name, help, kind, read) in exported {
        let counters = Arc::clone(counters);
        let name = format!("ztunnel_worker_{name}");
        let registered =
            registry.register_worker(worker, &name, help, kind, move || read(&counters));
        if let Err(error) = registered {
            tracing::warn!("metric {name} of worker {worker} is not exported: {error}");
        }
    }
}

impl Workers {
    /// Senders of the workers' mailboxes.
    pub(crate) fn commands(&self) -> Vec<Sender<Command>> {
        self.commands.clone()
    }

    /// Lets connections finish for `patience`, then ends all workers.
    pub(crate) fn drain(self, patience: Duration) {
        for (worker, sender) in self.commands.iter().enumerate() {
            if let Err(error) = sender.send(Command::Drain(patience)) {
                tracing::warn!("cannot drain worker {worker}: {error}");
            }
        }
        for thread in self.threads {
            let _ = thread.join(); // a panic aborts the process; nothing to learn here
        }
    }
}
