//! What counting and logging a connection costs: our telemetry, and what others build it from.
//!
//! A connection is: opened, some bytes each way, closed. Ours writes the access log through its
//! queue and writer thread to nowhere. The reference counts with `prometheus-client` families the
//! way upstream does (three look-ups by all labels at the start, one at the end) and logs one
//! `tracing` event formatted to nowhere, on the spot.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mesh::{Service, ServiceConfig, Snapshot, Workload, WorkloadConfig};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use telemetry::{
    ConnectionInfo, LogFormat, LogSink, Logging, Registry, Reporter, ResponseFlags, Security,
    WorkerTelemetry,
};
use tracing_subscriber::fmt::MakeWriter;

/// Labels of a connection's series.
const LABELS: usize = 27;
/// Bytes the log's queue holds: far more than a batch of lines.
const QUEUE_BYTES: usize = 1 << 20;
const FLUSH_PATIENCE: Duration = Duration::from_secs(10);

/// Our telemetry of one worker.
pub struct Ours {
    logging: Logging,
    worker: WorkerTelemetry,
    client: Arc<Workload>,
    server: Arc<Workload>,
    service: Arc<Service>,
    addresses: [SocketAddr; 3],
}

impl std::fmt::Debug for Ours {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ours").finish_non_exhaustive()
    }
}

fn workload(name: &str, deployment: &str) -> WorkloadConfig {
    WorkloadConfig {
        uid: format!("cluster1//v1/Pod/shop/{name}").into(),
        name: name.into(),
        namespace: "shop".into(),
        service_account: deployment.into(),
        workload_name: deployment.into(),
        canonical_name: deployment.into(),
        canonical_revision: "v1".into(),
        ..WorkloadConfig::default()
    }
}

impl Ours {
    /// With the access log, or without (`RUST_LOG=off`).
    ///
    /// # Errors
    /// The writer thread cannot be started, or the model is refused.
    pub fn new(with_log: bool) -> Result<Self> {
        let sink = LogSink::new(LogFormat::Plain, QUEUE_BYTES, io::sink())?;
        let filter = if with_log { "info" } else { "off" };
        let (logging, subscriber) = Logging::new(sink, Some(filter))?;
        // The filter lives in the subscriber and has to outlive the benchmark.
        std::mem::forget(subscriber);
        let service = ServiceConfig {
            name: "pay".into(),
            namespace: "shop".into(),
            hostname: "pay.shop.svc.cluster.local".into(),
            ..ServiceConfig::default()
        };
        let workloads = vec![workload("web-1", "web"), workload("pay-1", "pay")];
        let snapshot = Snapshot::build(workloads, vec![service], Vec::new())?;
        let [client, server] = snapshot.workloads() else {
            anyhow::bail!("two workloads were put in");
        };
        let service = snapshot.service("shop", "pay.shop.svc.cluster.local");
        Ok(Self {
            worker: Registry::new("bench").worker(logging.access_log()),
            logging,
            client: Arc::clone(client),
            server: Arc::clone(server),
            service: Arc::clone(service.context("one service was put in")?),
            addresses: [
                SocketAddr::from(([10, 0, 0, 1], 40_000)),
                SocketAddr::from(([10, 0, 0, 2], 15_008)),
                SocketAddr::from(([10, 0, 0, 2], 8_080)),
            ],
        })
    }

    /// One connection.
    pub fn connection(&self) {
        let [src, dst, target] = self.addresses;
        let record = self.worker.opened(ConnectionInfo {
            reporter: Reporter::Source,
            source: Some(Arc::clone(&self.client)),
            destination: Some(Arc::clone(&self.server)),
            service: Some(Arc::clone(&self.service)),
            source_identity: Some(self.client.identity()),
            destination_identity: Some(self.server.identity()),
            security: Security::MutualTls,
            src,
            dst,
            hbone_dst: Some(target.into()),
        });
        record.received(64);
        record.sent(64);
        record.close(None, ResponseFlags::None);
    }

    /// The time of `count` connections. The log's queue is emptied between batches, off the clock,
    /// so that no line is dropped.
    ///
    /// # Errors
    /// A line was dropped all the same, which would make logging look too cheap.
    pub fn time(&self, mut count: u64) -> Result<Duration> {
        const BATCH: u64 = 256;
        let mut spent = Duration::ZERO;
        let lost_before = self.logging.sink().dropped();
        while count > 0 {
            let n = count.min(BATCH);
            let start = Instant::now();
            for _ in 0..n {
                self.connection();
            }
            spent += start.elapsed();
            let flushed = self.logging.sink().flush(FLUSH_PATIENCE);
            ensure!(flushed, "the log's writer does not keep up");
            count -= n;
        }
        let dropped = self.logging.sink().dropped() - lost_before;
        ensure!(dropped == 0, "{dropped} lines were dropped");
        Ok(spent)
    }
}

/// Labels as the reference has them: shared strings, hashed and compared as a whole.
type Labels = [Arc<str>; LABELS];

/// The reference: families of counters, and events.
#[derive(Debug)]
pub struct Reference {
    opened: Family<Labels, Counter>,
    closed: Family<Labels, Counter>,
    sent: Family<Labels, Counter>,
    received: Family<Labels, Counter>,
    labels: Labels,
}

impl Default for Reference {
    fn default() -> Self {
        let value = |index: usize| Arc::from(format!("a-label-of-usual-length-{index}"));
        Self {
            opened: Family::default(),
            closed: Family::default(),
            sent: Family::default(),
            received: Family::default(),
            labels: std::array::from_fn(value),
        }
    }
}

impl Reference {
    /// One connection, with or without its event. The caller installs the subscriber.
    pub fn connection(&self, with_log: bool) {
        let start = Instant::now();
        let labels = self.labels.clone();
        self.opened.get_or_create(&labels).inc();
        let sent = self.sent.get_or_create(&labels).clone();
        let received = self.received.get_or_create(&labels).clone();
        received.inc_by(64);
        sent.inc_by(64);
        self.closed.get_or_create(&labels).inc();
        if with_log {
            let duration = format!("{}ms", start.elapsed().as_millis());
            tracing::info!(
                target: "access",
                src_addr = "10.0.0.1:40000",
                src_workload = &*labels[0],
                src_namespace = &*labels[1],
                src_identity = &*labels[2],
                dst_addr = "10.0.0.2:15008",
                dst_hbone_addr = "10.0.0.2:8080",
                dst_service = &*labels[3],
                dst_workload = &*labels[4],
                dst_namespace = &*labels[5],
                dst_identity = &*labels[6],
                direction = "outbound",
                bytes_sent = 64,
                bytes_recv = 64,
                duration,
                "connection complete"
            );
        }
    }
}

/// A subscriber that formats events to nowhere.
#[must_use]
pub fn formatting() -> impl tracing::Subscriber + Send + Sync {
    tracing_subscriber::fmt()
        .with_writer(Nowhere)
        .with_ansi(false)
        .finish()
}

#[derive(Clone, Copy, Debug)]
struct Nowhere;

impl<'a> MakeWriter<'a> for Nowhere {
    type Writer = io::Sink;

    fn make_writer(&'a self) -> io::Sink {
        io::sink()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_counted_and_logged_without_loss() {
        for with_log in [false, true] {
            let ours = Ours::new(with_log).unwrap();
            assert!(ours.time(1_000).unwrap() > Duration::ZERO);
        }
        let reference = Reference::default();
        tracing::subscriber::with_default(formatting(), || reference.connection(true));
        let labels = reference.labels.clone();
        assert_eq!(reference.closed.get_or_create(&labels).get(), 1);
    }
}
