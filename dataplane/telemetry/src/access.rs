//! The access log: one line per connection, in Istio's field order.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, SystemTime};

use mesh::{Identity, Workload};
use tracing::Level;
use tracing::level_filters::LevelFilter;

use crate::connection::{ConnectionInfo, HboneTarget, Reporter};
use crate::line::{Line, LineBuffer};
use crate::sink::{LogQueue, LogSink};
use crate::text::LogFormat;

/// The target of access log lines, as named in `RUST_LOG`.
pub(crate) const TARGET: &str = "access";

/// The level of the access log, which may change at any time.
#[derive(Clone, Debug)]
pub struct AccessLevel(Arc<AtomicU8>);

impl AccessLevel {
    /// Starts at `level`.
    pub fn new(level: LevelFilter) -> Self {
        Self(Arc::new(AtomicU8::new(verbosity(level))))
    }

    /// Changes it, for all holders.
    pub fn set(&self, level: LevelFilter) {
        self.0.store(verbosity(level), Ordering::Relaxed);
    }

    fn enables(&self, level: Level) -> bool {
        self.0.load(Ordering::Relaxed) >= verbosity(LevelFilter::from_level(level))
    }
}

fn verbosity(level: LevelFilter) -> u8 {
    match level {
        LevelFilter::OFF => 0,
        LevelFilter::ERROR => 1,
        LevelFilter::WARN => 2,
        LevelFilter::INFO => 3,
        LevelFilter::DEBUG => 4,
        LevelFilter::TRACE => 5,
    }
}

/// Where one worker's access log goes.
#[derive(Clone, Debug)]
pub struct AccessLog {
    queue: Arc<LogQueue>,
    format: LogFormat,
    level: AccessLevel,
}

impl AccessLog {
    /// An access log with a queue of its own in `sink`. One per worker.
    pub fn new(sink: &LogSink, level: AccessLevel) -> Self {
        Self {
            queue: sink.queue(),
            format: sink.format(),
            level,
        }
    }

    pub(crate) fn enables(&self, level: Level) -> bool {
        self.level.enables(level)
    }

    /// Starts a line; what [`Self::write`] takes is the finished one.
    pub(crate) fn start<'a>(
        &self,
        buffer: &'a mut LineBuffer,
        level: Level,
        message: &'static str,
    ) -> Line<'a> {
        let now = SystemTime::now();
        buffer.start(
            self.format,
            now,
            level,
            format_args!("{TARGET}"),
            format_args!("{message}"),
        )
    }

    pub(crate) fn write(&self, line: &[u8]) {
        // A full queue has counted it; the data path goes on.
        let _queued = self.queue.push(line);
    }
}

/// How a connection went.
pub(crate) struct Outcome<'a> {
    /// Bytes from the client.
    pub(crate) received: u64,
    /// Bytes to the client.
    pub(crate) sent: u64,
    pub(crate) duration: Duration,
    pub(crate) error: Option<&'a dyn fmt::Display>,
}

/// The fields that name the two ends, and the direction.
pub(crate) fn ends(line: &mut Line<'_>, info: &ConnectionInfo) {
    line.address("src.addr", info.src);
    let source = info.source.as_deref();
    let keys = [
        "src.workload",
        "src.namespace",
        "src.identity",
        "src.cluster",
    ];
    workload(line, keys, source, info.source_identity.as_ref());
    line.address("dst.addr", info.dst);
    match &info.hbone_dst {
        Some(HboneTarget::Address(target)) => line.address("dst.hbone_addr", *target),
        Some(target) => line.bare("dst.hbone_addr", target),
        None => {}
    }
    if let Some(service) = &info.service {
        line.string("dst.service", &service.hostname);
    }
    let destination = info.destination.as_deref();
    let keys = [
        "dst.workload",
        "dst.namespace",
        "dst.identity",
        "dst.cluster",
    ];
    let identity = info.destination_identity.as_ref();
    workload(line, keys, destination, identity);
    line.string("direction", info.reporter.direction());
}

/// One end's workload: name, namespace, identity and cluster, as far as they are known.
fn workload(
    line: &mut Line<'_>,
    [name_key, namespace_key, identity_key, cluster_key]: [&str; 4],
    workload: Option<&Workload>,
    identity: Option<&Identity>,
) {
    let mut known = |key, value: Option<&str>| {
        if let Some(value) = value.filter(|v| !v.is_empty()) {
            line.string(key, value);
        }
    };
    // The pod's name; what has none goes by its canonical service.
    let name = workload.map(|w| {
        if w.name.is_empty() {
            &*w.canonical_name
        } else {
            &*w.name
        }
    });
    known(name_key, name);
    known(namespace_key, workload.map(|w| &*w.namespace));
    known(identity_key, identity.map(Identity::uri));
    known(cluster_key, workload.map(|w| &*w.cluster_id));
}

/// The fields that come with the end.
pub(crate) fn outcome(line: &mut Line<'_>, reporter: Reporter, outcome: &Outcome<'_>) {
    // The log speaks from the reporting workload's side: what a client's proxy calls sent is what
    // came from the client.
    let (sent, received) = match reporter {
        Reporter::Source => (outcome.received, outcome.sent),
        Reporter::Destination => (outcome.sent, outcome.received),
    };
    line.number("bytes_sent", sent);
    line.number("bytes_recv", received);
    line.milliseconds("duration", outcome.duration);
    if let Some(error) = outcome.error {
        line.quoted("error", error);
    }
}
