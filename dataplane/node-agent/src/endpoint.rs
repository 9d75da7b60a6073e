//! The endpoint on `stats_address`, if the configuration has one: `/metrics` for Prometheus, and
//! `/readyz` and `/healthz` for probes.
//!
//! The server is that of all programs ([`httpd`]), with its bounds, on a thread of its own: nothing
//! else waits for a client. What the main loop knows it leaves here when it changes; a scrape reads
//! counters from the kernel, and no file.

use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use httpd::{Answer, Exposition, HttpLimits, PendingTask, Query, Ready, StatusCode};
use redirect::{Redirection, Uncaptured};
use tokio::sync::oneshot;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::metrics::{self, Measured};
use crate::sockmap;

/// The endpoint. Ends when dropped.
#[derive(Debug)]
pub(crate) struct Endpoint {
    address: SocketAddr,
    shown: Arc<Mutex<Option<Shown>>>,
    /// Until something is installed.
    pending: Option<PendingTask>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// What is shown, beside counters.
#[derive(Clone, Debug)]
struct Shown {
    config: Arc<Config>,
    /// Opened once for each configuration, and only asked for counters.
    reader: Arc<Mutex<Box<dyn Redirection + Send>>>,
    /// Captured pods.
    pods: usize,
    uncaptured: Vec<Uncaptured>,
    older_broken: u64,
}

impl Endpoint {
    /// Starts it if the configuration asks for it. Until [`Self::follow`] is called there is
    /// nothing to show.
    pub(crate) fn start(config: &Config) -> Result<Option<Self>> {
        let Some(address) = config.stats_address else {
            return Ok(None);
        };
        let failed = |source| Error::Stats { address, source };
        let listener = TcpListener::bind(address).map_err(failed)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(failed)?;
        let shown = Arc::<Mutex<Option<Shown>>>::default();
        let ready = Ready::new();
        let pending = Some(ready.task("redirection"));
        let (stop, stopped) = oneshot::channel();
        let serves = serve(listener, Arc::clone(&shown), ready);
        let thread = thread::Builder::new()
            .name("endpoint".to_owned())
            .spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        () = serves => {}
                        _ = stopped => {}
                    }
                });
            })
            .map_err(failed)?;
        Ok(Some(Self {
            address,
            shown,
            pending,
            stop: Some(stop),
            thread: Some(thread),
        }))
    }

    /// Brings it to what the configuration and the redirection are now.
    pub(crate) fn follow(
        endpoint: &mut Option<Self>,
        config: &Arc<Config>,
        redirection: &dyn Redirection,
    ) -> Result<()> {
        if endpoint.as_ref().map(|current| current.address) != config.stats_address {
            *endpoint = None; // another may have the same port
            *endpoint = Self::start(config)?;
        }
        match endpoint {
            Some(current) => current.show(config, redirection),
            None => Ok(()),
        }
    }

    fn show(&mut self, config: &Arc<Config>, redirection: &dyn Redirection) -> Result<()> {
        let known = lock(&self.shown).as_ref().and_then(|shown| {
            let same = shown.config == *config;
            same.then(|| Arc::clone(&shown.reader))
        });
        let reader = match known {
            Some(reader) => reader,
            None => Arc::new(Mutex::new(config.redirection()?)),
        };
        *lock(&self.shown) = Some(Shown {
            config: Arc::clone(config),
            reader,
            pods: redirection.enrolled().len(),
            uncaptured: redirection.uncaptured().to_vec(),
            older_broken: redirection.older_broken(),
        });
        self.pending = None;
        Ok(())
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // a panic in it was reported by its hook
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn serve(listener: TcpListener, shown: Arc<Mutex<Option<Shown>>>, ready: Ready) {
    let limits = HttpLimits::default();
    let served = httpd::serve("stats", listener, limits, move |query| {
        answer(query, &shown, &ready)
    });
    if let Err(error) = served.await {
        tracing::error!(%error, "stats_address is not served");
    }
}

fn answer(query: &Query<'_>, shown: &Mutex<Option<Shown>>, ready: &Ready) -> Answer {
    match query.path {
        "/metrics" | "/healthz" if !query.is_read() => Answer::method_not_allowed("GET"),
        "/metrics" => {
            // Not held while the kernel is asked, which the main loop would have to wait for.
            let shown = lock(shown).clone();
            shown.map_or_else(
                || unavailable("nothing is installed yet"),
                |shown| {
                    let exposition = Exposition::from_accept(query.accept);
                    let page = render(&shown, exposition);
                    page.map_or_else(
                        |error| unavailable(&error.to_string()),
                        |page| Answer::ok(exposition.content_type(), page),
                    )
                },
            )
        }
        "/readyz" => ready.answer(query),
        "/healthz" => Answer::text(StatusCode::OK, "ok\n"),
        _ => Answer::not_found(),
    }
}

fn unavailable(reason: &str) -> Answer {
    Answer::text(StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n"))
}

fn render(shown: &Shown, exposition: Exposition) -> Result<String> {
    let counters = lock(&shown.reader).counters()?;
    let sockmap = sockmap::status(&shown.config)?;
    let measured = Measured {
        redirect: shown.config.redirect,
        pods: shown.pods,
        uncaptured: &shown.uncaptured,
        older_broken: shown.older_broken,
        counters: &counters,
        sockmap: sockmap.as_ref(),
    };
    Ok(metrics::page(&measured, exposition))
}
