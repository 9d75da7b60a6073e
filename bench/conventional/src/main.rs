//! The binary: settings, endpoints, signals.

#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use conventional::{Certificates, Listeners, Proxy, Settings, register};
use mesh::ports;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use telemetry::{HttpLimits, Logging, PendingTask, Ready, Registry};
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How often registering the listeners is tried, and the map looked at.
const REGISTER_INTERVAL: Duration = Duration::from_millis(500);
/// How long log lines may take to be written at the end.
const LAST_LOG: Duration = Duration::from_secs(1);

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("conventional: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let variable = |name: &str| std::env::var(name).ok();
    let settings = Settings::read(variable)?;
    let (publisher, watcher) = control::watch::open(&settings.source)?;
    let read = |path: &Path| {
        fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
    };
    let certificate = read(&settings.ca_certificate)?;
    let certificates = Certificates::from_pem(&certificate, &read(&settings.ca_key)?)?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let metrics = endpoint(ports::METRICS)?;
    let readiness = endpoint(ports::READINESS)?;
    let sets = (0..settings.workers)
        .map(|_| Listeners::bind(settings.ipv6))
        .collect::<io::Result<Vec<_>>>()?;
    let text = |name| variable(name).filter(|value| !value.is_empty());
    let logging = Logging::install(text("RUST_LOG").as_deref(), text("LOG_FORMAT").as_deref())?;
    let proxy = Proxy::new(settings.proxy, publisher, certificates);
    let registry = Registry::new(env!("CARGO_PKG_VERSION"));
    proxy.stats().register(&registry)?;
    let data_path = data_path(settings.workers, &proxy, &sets)?;

    // As upstream: what is not traffic has a thread of its own.
    let runtime = Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let ready = Ready::new();
        let limits = HttpLimits::default();
        tokio::spawn(telemetry::serve_metrics(metrics, registry, limits));
        tokio::spawn(telemetry::serve_readiness(readiness, ready.clone(), limits));
        if let Some(map) = settings.listener_map {
            tokio::spawn(keep_registered(map, sets, ready.task("listener map")));
        }
        if let Some(watcher) = watcher {
            tokio::spawn(watcher.run());
        }
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("draining for at most {} s", settings.drain.as_secs());
        proxy.drain(settings.drain).await;
        Ok::<_, io::Error>(())
    })?;
    data_path.shutdown_background();
    logging.sink().flush(LAST_LOG);
    Ok(())
}

/// The runtime of the data path, already accepting.
fn data_path(workers: usize, proxy: &Arc<Proxy>, sets: &[Listeners]) -> Result<Runtime> {
    let runtime = Builder::new_multi_thread()
        .worker_threads(workers)
        .thread_name("conventional")
        .enable_all()
        .build()?;
    let entered = runtime.enter();
    for set in sets {
        proxy.serve(Listeners {
            outbound: set.outbound.try_clone()?,
            plaintext: set.plaintext.try_clone()?,
            hbone: set.hbone.try_clone()?,
        })?;
    }
    tracing::info!("{workers} worker threads");
    drop(entered);
    Ok(runtime)
}

fn endpoint(port: u16) -> Result<TcpListener> {
    let addr = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    TcpListener::bind(addr).map_err(|error| format!("cannot listen on {addr}: {error}").into())
}

/// Registers the listeners in the redirection's map, again whenever there is a new one.
async fn keep_registered(map: PathBuf, sets: Vec<Listeners>, pending: PendingTask) {
    use std::os::unix::fs::MetadataExt;
    let mut pending = Some(pending);
    let mut registered = None;
    loop {
        let current = fs::metadata(&map).map(|pin| (pin.dev(), pin.ino())).ok();
        if current != registered {
            match register(&map, &sets) {
                Ok(()) => {
                    registered = current;
                    if let Some(pending) = pending.take() {
                        pending.ready();
                    }
                }
                Err(error) => tracing::warn!("listeners not registered: {error}; trying again"),
            }
        }
        tokio::time::sleep(REGISTER_INTERVAL).await;
    }
}
