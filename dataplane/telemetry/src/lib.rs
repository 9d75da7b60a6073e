//! What the proxy tells about itself: metrics, access log, process log, and the HTTP endpoints for
//! metrics, readiness and administration.
//!
//! The data path pays as little as possible. Each worker has its own counters, which a scrape
//! merges ([`Registry`], [`WorkerTelemetry`]); a connection whose ends were seen before costs one
//! hash lookup, and a chunk of bytes two plain stores. Log lines are formatted on the worker into
//! a reused buffer and handed to one writer thread through a bounded queue ([`LogSink`]); when
//! output stalls, lines are dropped and counted, and the data path never waits. Refusals, which
//! anyone can cause, have a budget of lines; what is beyond it is summed up.
//!
//! Limits: label sets of connections ([`LABEL_SETS_MAX_DEFAULT`]), bytes of queued log per worker
//! ([`QUEUE_BYTES_DEFAULT`]), connections and times of the HTTP servers ([`HttpLimits`]).
#![forbid(unsafe_code)]

mod access;
mod connection;
mod endpoints;
mod faults;
mod line;
mod logging;
mod process;
mod refusals;
mod registry;
mod series;
mod shared;
mod sink;
mod text;
mod worker;

pub use access::{AccessLevel, AccessLog};
pub use connection::{ConnectionInfo, HboneTarget, Reporter, ResponseFlags, Security};
pub use endpoints::{Admin, Shutdown, serve_admin, serve_metrics, serve_readiness};
pub use faults::{Event, Fault};
pub use httpd::{Exposition, HttpLimits, MetricKind, PendingTask, Ready};
pub use logging::{FILTER_DEFAULT, Logging, LoggingError};
pub use refusals::SUMMARY_EVERY as REFUSALS_EVERY;
pub use registry::{LABEL_SETS_MAX_DEFAULT, MetricError, Registry};
pub use sink::{LogQueue, LogSink, QUEUE_BYTES_DEFAULT};
pub use text::LogFormat;
pub use worker::{ConnectionRecord, Opening, WorkerTelemetry};
