//! Data-path threads: one per CPU, each with its own ring, listeners and counters.

use std::io;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use identity::{CertificateFeed, Manager};
use mesh::Snapshot;
use proxy::{Command, Listeners, ProxyConfig, TunnelMemory, WorkerSetup};
use rt::mailbox::{self, LatestReceiver, LatestSender, Sender};
use rt::{Backend, Runtime, RuntimeConfig, RuntimeError, SharedCounters};
use telemetry::{Logging, MetricKind, Registry};

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
    pub(crate) registry: Registry,
    pub(crate) logging: Logging,
}

/// Running workers.
#[derive(Debug)]
pub(crate) struct Workers {
    threads: Vec<JoinHandle<()>>,
    commands: Vec<Sender<Command>>,
    snapshots: Vec<LatestSender<Arc<Snapshot>>>,
}

/// Commands a worker may lag behind by. It gets one, at its end.
const MAILBOX: usize = 4;

/// Starts one worker per set of listeners and waits until each has its ring.
pub(crate) fn start(
    common: &Common,
    snapshot: &Arc<Snapshot>,
    certificates: &mut Manager,
    listeners: Vec<Listeners>,
    cpus: &[u32],
    runtime: RuntimeConfig,
) -> Result<Workers, StartError> {
    export_memory(&common.registry, &common.config.tunnel_memory);
    let mut workers = Workers {
        threads: Vec::new(),
        commands: Vec::new(),
        snapshots: Vec::new(),
    };
    for (worker, listeners) in listeners.into_iter().enumerate() {
        let (sender, commands) = mailbox::channel(MAILBOX);
        let (snapshot_sender, snapshots) = mailbox::latest();
        let (started, start) = mpsc::channel();
        let common = common.clone();
        let cpu = cpus.get(worker).copied();
        let place = Place {
            worker,
            cpu,
            runtime,
        };
        let inbox = Inbox {
            snapshot: Arc::clone(snapshot),
            snapshots,
            certificates: certificates.feed(),
            commands,
        };
        let body = move || run(&place, &common, listeners, inbox, &started);
        let thread = std::thread::Builder::new()
            .name(format!("ztunnel-{worker}"))
            .spawn(body)
            .map_err(|error| StartError::Thread { worker, error })?;
        workers.threads.push(thread);
        workers.commands.push(sender);
        workers.snapshots.push(snapshot_sender);
        match start.recv() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(StartError::Runtime { worker, error }),
            Err(_) => return Err(StartError::Ended { worker }),
        }
    }
    Ok(workers)
}

/// Which worker this is, where it runs and on what.
struct Place {
    worker: usize,
    cpu: Option<u32>,
    runtime: RuntimeConfig,
}

/// What a worker is sent.
struct Inbox {
    /// The first configuration. Nothing else may keep it: it is freed when there is another.
    snapshot: Arc<Snapshot>,
    snapshots: LatestReceiver<Arc<Snapshot>>,
    certificates: CertificateFeed,
    commands: mailbox::Receiver<Command>,
}

fn run(
    place: &Place,
    common: &Common,
    listeners: Listeners,
    inbox: Inbox,
    started: &mpsc::Sender<Result<(), RuntimeError>>,
) {
    let worker = place.worker;
    if let Some(cpu) = place.cpu
        && let Err(error) = rt::pin_current_thread(cpu)
    {
        tracing::warn!("worker {worker} is not pinned to CPU {cpu}: {error}");
    }
    let mut runtime = match Runtime::new(place.runtime) {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = started.send(Err(error)); // the receiver waits for exactly this
            return;
        }
    };
    log_backend(worker, place.runtime.backend, &runtime);
    export_counters(worker, &common.registry, &runtime.counters());
    let setup = WorkerSetup {
        config: Arc::clone(&common.config),
        listeners,
        snapshot: inbox.snapshot,
        certificates: inbox.certificates,
        telemetry: common.registry.worker(common.logging.access_log()),
        snapshots: inbox.snapshots,
        commands: inbox.commands,
        seed: seed(worker),
    };
    let _ = started.send(Ok(()));
    if let Err(error) = runtime.run(proxy::serve(setup)) {
        // Without its runtime a worker can serve nothing; the others must not hide that.
        eprintln!("ztunnel: worker {worker}: its runtime failed: {error}");
        std::process::exit(1);
    }
}

/// Different for each worker and start; nothing secret depends on it.
fn seed(worker: usize) -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(worker)
}

/// Says once what the data path runs on, and why.
fn log_backend(worker: usize, asked: Backend, runtime: &Runtime) {
    if worker != 0 {
        return;
    }
    match (runtime.backend(), asked, runtime.refusal()) {
        (_, _, Some(refusal)) => {
            tracing::warn!("data path on epoll, which costs more CPU time: {refusal}");
        }
        (Backend::Epoll, ..) => tracing::info!("data path on epoll, as asked for"),
        (_, Backend::IoUring, _) => tracing::info!("data path on io_uring, as asked for"),
        _ => tracing::info!("data path on io_uring: the kernel allows it"),
    }
}

type Read = fn(&SharedCounters) -> u64;

/// Exports what tunnels of all workers hold.
fn export_memory(registry: &Registry, memory: &Arc<TunnelMemory>) {
    type Read = fn(&TunnelMemory) -> u64;
    let metrics: [(&str, &str, MetricKind, Read); 3] = [
        (
            "ztunnel_tunnel_memory_bytes",
            "Memory pinned by payload that has arrived in tunnels and not reached its receiver",
            MetricKind::Gauge,
            |memory| memory.held() as u64,
        ),
        (
            "ztunnel_tunnel_memory_limit_bytes",
            "Bound on that memory",
            MetricKind::Gauge,
            |memory| memory.limit() as u64,
        ),
        (
            "ztunnel_tunnel_streams_given_up_total",
            "Streams reset at that bound because their receivers took nothing or held most",
            MetricKind::Counter,
            TunnelMemory::streams_given_up,
        ),
    ];
    for (name, help, kind, read) in metrics {
        let memory = Arc::clone(memory);
        if let Err(error) = registry.register(name, help, kind, &[], move || read(&memory)) {
            tracing::warn!("{name} is not exported: {error}");
        }
    }
}

/// Metrics of a worker: `ztunnel_worker_` and name, help, kind, value.
const EXPORTED: [(&str, &str, MetricKind, Read); 11] = [
    (
        "enters_total",
        "io_uring_enter or epoll_wait calls",
        MetricKind::Counter,
        |c| c.ring().enters,
    ),
    (
        "completions_total",
        "completed operations; by enters_total it tells how well system calls are batched",
        MetricKind::Counter,
        |c| c.ring().completions,
    ),
    (
        "submissions_total",
        "submitted operations",
        MetricKind::Counter,
        |c| c.ring().submissions,
    ),
    (
        "cq_overflows_total",
        "completion queue overflows",
        MetricKind::Counter,
        |c| c.ring().overflows,
    ),
    (
        "buffer_starvations_total",
        "receives without a free buffer",
        MetricKind::Counter,
        |c| c.ring().starved,
    ),
    (
        "wakes_total",
        "wake-ups by other threads",
        MetricKind::Counter,
        |c| c.ring().wakes,
    ),
    (
        "spliced_bytes_total",
        "bytes moved between two sockets without copying them through user space",
        MetricKind::Counter,
        |c| c.ring().spliced,
    ),
    (
        "kernel_ms_total",
        "CPU time in the kernel, milliseconds",
        MetricKind::Counter,
        |c| milliseconds(c.cpu_time().map(|time| time.kernel)),
    ),
    (
        "user_ms_total",
        "CPU time outside the kernel, milliseconds",
        MetricKind::Counter,
        |c| milliseconds(c.cpu_time().map(|time| time.user)),
    ),
    (
        "tasks",
        "live tasks",
        MetricKind::Gauge,
        SharedCounters::tasks,
    ),
    (
        "operations",
        "operations under way",
        MetricKind::Gauge,
        SharedCounters::operations,
    ),
];

fn milliseconds(time: Option<Duration>) -> u64 {
    time.map_or(0, |time| time.as_millis() as u64)
}

fn export_counters(worker: usize, registry: &Registry, counters: &Arc<SharedCounters>) {
    for (name, help, kind, read) in EXPORTED {
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
    /// Where each worker's newest configuration is put.
    pub(crate) fn snapshots(&self) -> Vec<LatestSender<Arc<Snapshot>>> {
        self.snapshots.clone()
    }

    /// Has workers end as `command` says, and waits for it.
    pub(crate) fn drain(self, command: &Command) {
        for (worker, sender) in self.commands.iter().enumerate() {
            if let Err(error) = sender.send(command.clone()) {
                tracing::warn!("cannot drain worker {worker}: {error}");
            }
        }
        for thread in self.threads {
            let _ = thread.join(); // a panic aborts the process; nothing to learn here
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_is_exported() {
        let registry = Registry::new("test");
        let config = RuntimeConfig {
            backend: Backend::Epoll,
            ..RuntimeConfig::default()
        };
        let mut runtime = Runtime::new(config).unwrap();
        runtime.run(async { rt::yield_now().await }).unwrap();
        export_counters(7, &registry, &runtime.counters());
        let text = registry.encode(telemetry::Exposition::Text);
        for (name, ..) in EXPORTED {
            let sample = format!("ztunnel_worker_{name}{{worker=\"7\"}} ");
            assert!(text.contains(&sample), "{name} is missing in\n{text}");
        }
    }
}
