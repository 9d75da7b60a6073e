//! Counters and the access log.

use std::fmt::Display;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use mesh::{Identity, Workload};
use telemetry::{MetricError, MetricKind, Registry};

/// The process's counters, one of each per reporter: source, then destination.
#[derive(Debug, Default)]
pub struct Stats {
    opened: [AtomicU64; 2],
    closed: [AtomicU64; 2],
    failed: [AtomicU64; 2],
    sent: [AtomicU64; 2],
    received: [AtomicU64; 2],
}

impl Stats {
    /// Exports the counters.
    ///
    /// # Errors
    /// A counter of that name is registered already.
    pub fn register(self: &Arc<Self>, registry: &Registry) -> Result<(), MetricError> {
        type Field = fn(&Stats) -> &[AtomicU64; 2];
        let families: [(&str, &str, Field); 5] = [
            ("opened", "connections opened", |stats| &stats.opened),
            ("closed", "connections closed", |stats| &stats.closed),
            ("failed", "connections refused or broken", |stats| {
                &stats.failed
            }),
            ("sent_bytes", "bytes of responses", |stats| &stats.sent),
            ("received_bytes", "bytes of requests", |stats| {
                &stats.received
            }),
        ];
        for (name, help, field) in families {
            for (index, reporter) in ["source", "destination"].into_iter().enumerate() {
                let stats = Arc::clone(self);
                registry.register(
                    &format!("conventional_tcp_{name}_total"),
                    help,
                    MetricKind::Counter,
                    &[("reporter", reporter)],
                    move || field(&stats)[index].load(Relaxed),
                )?;
            }
        }
        Ok(())
    }
}

/// Which end of the mesh reports.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reporter {
    /// The client's.
    Source,
    /// The server's.
    Destination,
}

impl Reporter {
    const fn direction(self) -> &'static str {
        match self {
            Self::Source => "outbound",
            Self::Destination => "inbound",
        }
    }
}

/// Which way bytes move.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Way {
    /// From the client to the server.
    Request,
    /// From the server to the client.
    Response,
}

impl Way {
    pub(crate) const fn opposite(self) -> Self {
        match self {
            Self::Request => Self::Response,
            Self::Response => Self::Request,
        }
    }
}

/// Who talks to whom.
#[derive(Debug)]
pub(crate) struct Parties {
    pub(crate) reporter: Reporter,
    pub(crate) src: SocketAddr,
    pub(crate) dst: SocketAddr,
    pub(crate) source: Option<Arc<Workload>>,
    pub(crate) destination: Option<Arc<Workload>>,
    /// What was asked for in a tunnel.
    pub(crate) hbone: Option<String>,
    /// The client's identity, where TLS has shown it.
    pub(crate) identity: Option<Identity>,
}

/// One connection's books: counted while it runs, logged at its end.
#[derive(Debug)]
pub(crate) struct Record {
    stats: Arc<Stats>,
    parties: Parties,
    start: Instant,
    sent: AtomicU64,
    received: AtomicU64,
}

impl Record {
    pub(crate) fn open(stats: &Arc<Stats>, parties: Parties) -> Self {
        stats.opened[parties.reporter as usize].fetch_add(1, Relaxed);
        Self {
            stats: Arc::clone(stats),
            parties,
            start: Instant::now(),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
        }
    }

    pub(crate) fn count(&self, way: Way, bytes: usize) {
        let reporter = self.parties.reporter as usize;
        let (own, all) = match way {
            Way::Request => (&self.received, &self.stats.received[reporter]),
            Way::Response => (&self.sent, &self.stats.sent[reporter]),
        };
        own.fetch_add(bytes as u64, Relaxed);
        all.fetch_add(bytes as u64, Relaxed);
    }

    pub(crate) fn close<E: Display>(self, result: &Result<(), E>) {
        let Parties {
            reporter,
            src,
            dst,
            source,
            destination,
            hbone,
            identity,
        } = &self.parties;
        self.stats.closed[*reporter as usize].fetch_add(1, Relaxed);
        if result.is_err() {
            self.stats.failed[*reporter as usize].fetch_add(1, Relaxed);
        }
        let name = |workload: &Option<Arc<Workload>>| workload.as_ref().map(|w| w.name.to_string());
        let error = result.as_ref().err().map(ToString::to_string);
        tracing::info!(
            target: "access",
            {
                src.addr = %src,
                src.workload = name(source),
                src.identity = identity.as_ref().map(Identity::uri),
                dst.addr = %dst,
                dst.hbone_addr = hbone.as_deref(),
                dst.workload = name(destination),
                direction = reporter.direction(),
                bytes_sent = self.sent.load(Relaxed),
                bytes_recv = self.received.load(Relaxed),
                duration = %format_args!("{}ms", self.start.elapsed().as_millis()),
                error,
            },
            "connection complete"
        );
    }
}

/// A connection that did not even get as far as a record.
pub(crate) fn failed_early(
    stats: &Stats,
    reporter: Reporter,
    (src, dst): (SocketAddr, SocketAddr),
    error: &dyn Display,
) {
    stats.failed[reporter as usize].fetch_add(1, Relaxed);
    tracing::warn!(
        target: "access",
        {
            src.addr = %src,
            dst.addr = %dst,
            direction = reporter.direction(),
            %error,
        },
        "connection failed"
    );
}
