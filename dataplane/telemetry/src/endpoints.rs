//! The HTTP endpoints: metrics, readiness, and administration.
//!
//! Their listeners are bound by the caller, so that an occupied port is an error at start-up.

use std::fmt;
use std::io;
use std::net::TcpListener;
use std::sync::Arc;

use httpd::{Answer, Exposition, HttpLimits, Method, Query, Ready, StatusCode, query_value, serve};
use tokio::sync::Notify;

use crate::logging::{Logging, LoggingError};
use crate::registry::Registry;

const LOGGING_HELP: &str = "\
usage: POST /logging                         show the log level
usage: POST /logging?level=<level>           for all targets; off, error, warn, info, debug, trace
usage: POST /logging?level=<target>=<level>  for one target; several separated by commas
usage: POST /logging?reset                   back to the level at the start
";

const DASHBOARD: &str = "<!DOCTYPE html>
<html lang=\"en\"><head><meta charset=\"utf-8\"><title>ztunnel</title></head><body>
<h1>ztunnel</h1>
<ul>
<li><a href=\"config_dump\">config_dump</a>: workloads, services, policies, certificates</li>
<li><code>POST /logging</code>: show or change the log level</li>
<li><code>POST /quitquitquit</code>: drain and end</li>
</ul>
<p>LIMITS</p>
</body></html>
";

/// Asks the process to drain and end. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    notify: Arc<Notify>,
}

impl Shutdown {
    /// Nobody has asked yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks. What is asked before anybody waits is kept.
    pub fn trigger(&self) {
        self.notify.notify_one();
    }

    /// Waits until somebody asks. For one waiter.
    pub async fn triggered(&self) {
        self.notify.notified().await;
    }
}

/// What the administration endpoint works on.
pub struct Admin {
    /// Makes the value of `/config_dump`.
    pub config_dump: Box<dyn Fn() -> serde_json::Value + Send + Sync>,
    /// Says what is limited and how much of it is used, for the page at `/`. Plain text.
    pub limits: Box<dyn Fn() -> String + Send + Sync>,
    /// Whose filter `/logging` changes.
    pub logging: Logging,
    /// What `/quitquitquit` triggers.
    pub shutdown: Shutdown,
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admin")
            .field("logging", &self.logging)
            .finish_non_exhaustive()
    }
}

/// Serves `GET /metrics` and `GET /stats/prometheus`.
///
/// # Errors
/// The listener cannot be used. Otherwise it does not return.
pub async fn serve_metrics(
    listener: TcpListener,
    registry: Registry,
    limits: HttpLimits,
) -> io::Result<()> {
    serve("metrics", listener, limits, move |query| {
        metrics(&registry, query)
    })
    .await
}

/// Serves `GET /healthz/ready`: 200 `ready`, or 500 and the tasks that are not.
///
/// # Errors
/// The listener cannot be used. Otherwise it does not return.
pub async fn serve_readiness(
    listener: TcpListener,
    ready: Ready,
    limits: HttpLimits,
) -> io::Result<()> {
    serve("readiness", listener, limits, move |query| {
        readiness(&ready, query)
    })
    .await
}

/// Serves `/`, `/config_dump`, `/logging` and `/quitquitquit`.
///
/// # Errors
/// The listener cannot be used. Otherwise it does not return.
pub async fn serve_admin(
    listener: TcpListener,
    admin: Admin,
    limits: HttpLimits,
) -> io::Result<()> {
    serve("admin", listener, limits, move |query| {
        administration(&admin, query)
    })
    .await
}

fn metrics(registry: &Registry, query: &Query<'_>) -> Answer {
    match query.path {
        "/metrics" | "/stats/prometheus" if query.is_read() => {
            let exposition = Exposition::from_accept(query.accept);
            Answer::ok(exposition.content_type(), registry.encode(exposition))
        }
        "/metrics" | "/stats/prometheus" => Answer::method_not_allowed("GET"),
        _ => Answer::not_found(),
    }
}

fn readiness(ready: &Ready, query: &Query<'_>) -> Answer {
    match query.path {
        "/healthz/ready" => ready.answer(query),
        _ => Answer::not_found(),
    }
}

fn administration(admin: &Admin, query: &Query<'_>) -> Answer {
    let post = *query.method == Method::POST;
    match query.path {
        "/" if query.is_read() => {
            let page = DASHBOARD.replace("LIMITS", &(admin.limits)());
            Answer::ok("text/html; charset=utf-8", page)
        }
        "/config_dump" if query.is_read() => config_dump(admin),
        "/" | "/config_dump" => Answer::method_not_allowed("GET"),
        "/logging" if post => logging(&admin.logging, query.query),
        "/quitquitquit" if post => {
            tracing::info!("shutdown asked for by POST /quitquitquit");
            admin.shutdown.trigger();
            Answer::text(StatusCode::OK, "shutdown now\n")
        }
        "/logging" => Answer::text(StatusCode::METHOD_NOT_ALLOWED, LOGGING_HELP),
        "/quitquitquit" => Answer::method_not_allowed("POST"),
        _ => Answer::not_found(),
    }
}

fn config_dump(admin: &Admin) -> Answer {
    match serde_json::to_string_pretty(&(admin.config_dump)()) {
        Ok(mut text) => {
            text.push('\n');
            Answer::ok("application/json", text)
        }
        Err(error) => {
            let body = format!("configuration not dumped: {error}\n");
            Answer::text(StatusCode::INTERNAL_SERVER_ERROR, body)
        }
    }
}

fn logging(logging: &Logging, query: &str) -> Answer {
    let level = query_value(query, "level").unwrap_or_default();
    let reset = query_value(query, "reset").is_some();
    let unknown = query
        .split('&')
        .map(|pair| pair.split_once('=').map_or(pair, |(name, _)| name));
    if unknown
        .clone()
        .any(|name| !matches!(name, "" | "level" | "reset"))
    {
        return Answer::text(StatusCode::BAD_REQUEST, LOGGING_HELP);
    }
    let current = if reset || !level.is_empty() {
        logging.change(reset, &level)
    } else {
        Ok(logging.current())
    };
    match current {
        Ok(current) => Answer::text(StatusCode::OK, format!("current log level is {current}\n")),
        Err(error @ LoggingError::Gone) => {
            Answer::text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n"))
        }
        Err(error) => Answer::text(StatusCode::BAD_REQUEST, format!("{error}\n{LOGGING_HELP}")),
    }
}
