//! The control thread: start-up in order, then endpoints, configuration, signals and draining.

use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use control::{SnapshotPublisher, Watcher};
use identity::LocalIssuer;
use mesh::{NodeContext, Protocol, Snapshot};
use proxy::{Command, Listeners, RedirectMode};
use telemetry::{Admin, HttpLimits, Logging, LoggingError, MetricKind, Ready, Registry, Shutdown};
use tls::{Authority, AuthorityError};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;

use crate::config::{self, AuthoritySource, ConfigError, Settings};
use crate::environment::Environment;
use crate::handover::{self, Neighbours};
use crate::key_file::{self, KeyFileError};
use crate::limits;
use crate::listeners::{self, Endpoint, Endpoints, ListenError};
use crate::steering::Steering;
use crate::workers::{self, Common, StartError, Workers};

/// Why the process cannot run. `Display` is one line.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Load(#[from] control::LoadError),
    #[error(transparent)]
    Logging(#[from] LoggingError),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(transparent)]
    KeyFile(#[from] KeyFileError),
    #[error(transparent)]
    Uring(#[from] rt::probe::Refusal),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error(transparent)]
    Workers(#[from] StartError),
    #[error("{0}: {1}")]
    Io(&'static str, io::Error),
}

/// How long log lines may take to be written at the end.
const LAST_LOG: Duration = Duration::from_secs(1);

/// Runs the proxy until it is asked to end.
pub(crate) fn run() -> Result<(), RunError> {
    let environment = Environment::of_process();
    limits::raise_open_files();
    let settings = config::read(&environment)?;
    let (publisher, watcher) = control::watch::open(&settings.source)?;
    let mut certificates = certificates(&settings)?;
    if settings.backend == rt::Backend::IoUring {
        rt::probe::check()?;
    }
    let cpus = rt::available_cpus().map_err(|error| RunError::Io("cannot read CPUs", error))?;
    let sockets =
        listeners::data_path(settings.workers, &cpus, settings.transparent, settings.ipv6)?;
    let neighbours = neighbours(&sockets);
    let succeeds = neighbours.are_there();
    let endpoints = listeners::endpoints(settings.ipv6, succeeds)?;
    let logging = Logging::install(
        environment.text("RUST_LOG").as_deref(),
        environment.text("LOG_FORMAT").as_deref(),
    )?;
    let steering = match &settings.listener_map {
        Some(path) => {
            let sockmap = settings.sockmap.clone();
            let steering = Steering::new(path, &sockets, &cpus, sockmap, &neighbours);
            Some(steering.map_err(|error| RunError::Io("cannot duplicate listeners", error))?)
        }
        None => None,
    };
    let registry = Registry::new(env!("CARGO_PKG_VERSION"));
    export_dropped_lines(&registry, &logging);
    let common = Common {
        config: Arc::clone(&settings.proxy),
        registry: registry.clone(),
        logging: logging.clone(),
    };
    if succeeds {
        tracing::info!("another ztunnel is there: taking over from it");
    }
    if settings.proxy.mode == RedirectMode::Node {
        handover::let_connections_move();
    }
    listeners::listen(&sockets)?;
    let (first, runtime) = (publisher.snapshot(), settings.runtime());
    let workers = workers::start(&common, &first, &mut certificates, sockets, &cpus, runtime)?;
    drop(first); // nothing but the workers and its publisher keeps it
    tracing::info!(
        "version {}, {} workers on CPUs {:?}, {:?} mode",
        env!("CARGO_PKG_VERSION"),
        settings.workers,
        &cpus[..settings.workers.min(cpus.len())],
        settings.proxy.mode,
    );
    warn_of_clients(&settings, &publisher);
    let control = Control {
        settings,
        publisher,
        watcher,
        certificates,
        registry,
        logging: logging.clone(),
        endpoints,
        steering,
        workers,
        neighbours,
    };
    let result = control.run();
    logging.sink().flush(LAST_LOG);
    result
}

/// Certificates of this node's workloads, issued in process.
fn certificates(settings: &Settings) -> Result<identity::Manager, RunError> {
    let issuer = LocalIssuer::new(authority(&settings.authority)?, settings.certificate_ttl);
    Ok(identity::Manager::new(Arc::new(issuer)).with_records(settings.tls_records))
}

/// The identities of this node's workloads. Certificates of those that speak HBONE are fetched
/// before the first connection; what else there is may be asked for.
fn identities(snapshot: &Snapshot, node: &NodeContext) -> identity::Wanted {
    let mut wanted = identity::Wanted::new();
    let local = snapshot.workloads().iter();
    for workload in local.filter(|workload| node.is_local(workload)) {
        let ahead = workload.protocol == Protocol::Hbone || workload.native_tunnel;
        *wanted.entry(workload.identity()).or_default() |= ahead;
    }
    wanted
}

/// Who listens where these sockets will, and is not this process.
fn neighbours(sockets: &[Listeners]) -> Neighbours {
    let mut neighbours = Neighbours::of(mesh::ports::OUTBOUND);
    for set in sockets {
        neighbours.add_own(&set.outbound);
    }
    neighbours
}

fn export_dropped_lines(registry: &Registry, logging: &Logging) {
    let sink = logging.sink().clone();
    let dropped = registry.register(
        "ztunnel_log_lines_dropped_total",
        "log lines dropped because output was too slow",
        MetricKind::Counter,
        &[],
        move || sink.dropped(),
    );
    if let Err(error) = dropped {
        tracing::warn!("dropped log lines are not exported: {error}");
    }
}

/// The CA that workload certificates are issued from.
fn authority(source: &AuthoritySource) -> Result<Authority, RunError> {
    Ok(match source {
        AuthoritySource::Files(certificate, key) => {
            key_file::check(key)?;
            Authority::from_pem_files(certificate, key)?
        }
        AuthoritySource::Fake => Authority::from_pem(
            include_bytes!("../fake-ca/certificate.pem"),
            include_bytes!("../fake-ca/key.pem"),
        )?,
    })
}

/// Says what an operator must know of whom is served.
fn warn_of_clients(settings: &Settings, publisher: &SnapshotPublisher) {
    if let AuthoritySource::Files(_, key) = &settings.authority
        && let Ok(Some(warning)) = key_file::check(key)
    {
        tracing::warn!("{warning}");
    }
    warn_of_missing_table(settings);
    if settings.authority == AuthoritySource::Fake {
        tracing::warn!("FAKE_CA: certificates prove nothing, the CA's key is public; tests only");
    }
    let Some(name) = &settings.proxy.node.dedicated_to else {
        return;
    };
    let (namespace, account) = (&name.namespace, &name.service_account);
    tracing::info!("dedicated to {namespace}/{}/{account}", name.name);
    let node = &settings.proxy.node;
    if !publisher
        .snapshot()
        .workloads()
        .iter()
        .any(|workload| node.is_local(workload))
    {
        tracing::warn!(
            "no workload {namespace}/{} of service account {account} in the configuration: \
             nothing is served until there is; check PROXY_WORKLOAD_INFO and TRUST_DOMAIN",
            name.name
        );
    }
}

/// Says what it means that redirection does not tell whose an address is.
fn warn_of_missing_table(settings: &Settings) {
    if settings.proxy.mode == RedirectMode::Node && settings.proxy.pods.is_none() {
        tracing::warn!(
            "ZTUNNEL_POD_TABLE is not set: whose an address of this node is comes from the \
             configuration alone, which may be late, and the policies of this node's workloads \
             bind other pods of the node also where they are not captured"
        );
    }
}

struct Control {
    settings: Settings,
    publisher: SnapshotPublisher,
    watcher: Option<Watcher>,
    certificates: identity::Manager,
    registry: Registry,
    logging: Logging,
    endpoints: Endpoints,
    steering: Option<Steering>,
    workers: Workers,
    neighbours: Neighbours,
}

/// What goes on while it serves, to be ended in order.
struct Serving {
    workers: Workers,
    endpoints: Vec<JoinHandle<()>>,
    steering: Option<JoinHandle<()>>,
    neighbours: Neighbours,
}

impl Serving {
    /// Lets connections finish. The endpoints go on answering, unless there is a successor that
    /// wants their ports.
    async fn end(self, patience: Duration) {
        // It has a second descriptor of each listener.
        if let Some(steering) = self.steering {
            steering.abort();
            let _ = steering.await; // "aborted" is what it says
        }
        let accept_for = handover::ACCEPT_FOR;
        let command = match self.neighbours.are_there() {
            true => Command::Drain {
                patience,
                accept_for,
            },
            false => Command::drain(patience),
        };
        let workers = self.workers;
        let mut drained = tokio::task::spawn_blocking(move || workers.drain(&command));
        let mut endpoints = self.endpoints;
        loop {
            if !endpoints.is_empty() && self.neighbours.are_there() {
                tracing::info!("there is a successor: the endpoints are its");
                endpoints.drain(..).for_each(|endpoint| endpoint.abort());
            }
            // A panic aborts the process, so it can only have drained.
            if tokio::time::timeout(handover::INTERVAL, &mut drained)
                .await
                .is_ok()
            {
                return;
            }
        }
    }
}

impl Control {
    fn run(self) -> Result<(), RunError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| RunError::Io("cannot start the control thread's runtime", error))?;
        let patience = self.settings.drain;
        let serving = runtime.block_on(self.serve())?;
        tracing::info!("draining for at most {} s", patience.as_secs());
        runtime.block_on(serving.end(patience));
        tracing::info!("drained");
        Ok(())
    }

    /// Serves until a signal or `/quitquitquit`; hands over what is to be ended then.
    async fn serve(self) -> Result<Serving, RunError> {
        let ready = Ready::new();
        let shutdown = Shutdown::new();
        self.publish_to_workers();
        let limits = HttpLimits::default();
        let Endpoints {
            admin,
            metrics,
            readiness,
        } = self.endpoints;
        let registry = self.registry;
        let metrics = spawn_endpoint("metrics", metrics, move |listener| {
            telemetry::serve_metrics(listener, registry, limits)
        });
        let answer = ready.clone();
        let readiness = spawn_endpoint("readiness", readiness, move |listener| {
            telemetry::serve_readiness(listener, answer, limits)
        });
        let (publisher, certificates) = (self.publisher, self.certificates.handle());
        tokio::spawn(self.certificates.run());
        let proxy = Arc::clone(&self.settings.proxy);
        let descriptors_max = proxy.descriptors_max;
        let dump = move || crate::admin::config_dump(&publisher, &certificates, &proxy);
        let admin_state = Admin {
            config_dump: Box::new(dump),
            limits: Box::new(move || {
                format!(
                    "open files: {} at most; new connections are reset from {descriptors_max} of \
                     the data path on, which has {} now",
                    limits::open_files(),
                    rt::descriptors::open()
                )
            }),
            logging: self.logging,
            shutdown: shutdown.clone(),
        };
        let admin = spawn_endpoint("admin", admin, move |listener| {
            telemetry::serve_admin(listener, admin_state, limits)
        });
        let steer = |steering: Steering| tokio::spawn(steering.run(ready.task("listener map")));
        let steering = self.steering.map(steer);
        if let Some(watcher) = self.watcher {
            tokio::spawn(watcher.run());
        }
        tokio::spawn(give_memory_back());
        let failed = |error| RunError::Io("cannot handle signals", error);
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let reason = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
            () = shutdown.triggered() => "/quitquitquit",
        };
        tracing::info!("{reason}: stop accepting");
        Ok(Serving {
            workers: self.workers,
            endpoints: vec![metrics, readiness, admin],
            steering,
            neighbours: self.neighbours,
        })
    }

    fn publish_to_workers(&self) {
        let workers = self.workers.snapshots();
        let (certificates, proxy) = (self.certificates.handle(), Arc::clone(&self.settings.proxy));
        let publish = move |snapshot: Arc<Snapshot>| {
            certificates.want(identities(&snapshot, &proxy.node));
            for worker in &workers {
                let _ = worker.send(Arc::clone(&snapshot)); // fails for one that has drained
            }
        };
        let first = self.publisher.on_change(Box::new(publish));
        let handle = self.certificates.handle();
        handle.want(identities(&first, &self.settings.proxy.node));
    }
}

/// How often this thread's freed memory goes back to the system: that of replaced configurations,
/// above all.
const COLLECT: Duration = Duration::from_secs(10);

async fn give_memory_back() {
    loop {
        tokio::time::sleep(COLLECT).await;
        rt::memory::collect();
    }
}

/// Runs the server that `serve` makes of the endpoint's socket, once its port is to be had.
fn spawn_endpoint<S>(
    name: &'static str,
    endpoint: Endpoint,
    serve: impl FnOnce(TcpListener) -> S + Send + 'static,
) -> JoinHandle<()>
where
    S: Future<Output = io::Result<()>> + Send + 'static,
{
    tokio::spawn(async move {
        let listener = match endpoint.listener().await {
            Ok(listener) => listener,
            Err(error) => return tracing::error!("no {name} endpoint: {error}"),
        };
        if let Err(error) = serve(listener).await {
            tracing::error!("{name} endpoint ended: {error}");
        }
    })
}
