//! The registry: what all workers counted, put together when somebody asks.
//!
//! Workers share nothing with each other. A scrape reads their counters while they run; no worker
//! ever waits for it. The one lock a worker takes is for a label set it has not seen before.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use httpd::{Exposition, MetricKind, Page, append_label, is_label_name, is_metric_name};

use crate::access::AccessLog;
use crate::connection::{Reporter, ResponseFlags};
use crate::faults::{Event, Fault};
use crate::process;
use crate::series::{LabelSet, Series, reporter_index};
use crate::shared::{SharedLabels, WorkerShared, lock};
use crate::worker::WorkerTelemetry;

/// Label sets kept apart before the rest is counted as overflow.
pub const LABEL_SETS_MAX_DEFAULT: usize = 16_384;

/// The family that names the build.
const BUILD: &str = "istio_build";

/// Prefix of the metrics that each worker has one of.
const WORKER_PREFIX: &str = "ztunnel_worker_";

/// Why a metric was not registered.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum MetricError {
    /// The name does not fit its use.
    #[error(
        "metric name `{0}` must match [a-zA-Z_:][a-zA-Z0-9_:]*, end in `_total` if and only if it \
         is a counter, and begin with `ztunnel_worker_` if it belongs to a worker"
    )]
    Name(String),
    /// A label's name is not valid.
    #[error("label name `{label}` of metric `{metric}` must match [a-zA-Z_][a-zA-Z0-9_]*")]
    Label {
        /// The metric.
        metric: String,
        /// The label.
        label: String,
    },
    /// The name is in use, with these labels, or as another kind of metric.
    #[error("metric `{name}{{{labels}}}` is registered already, or as another kind")]
    Duplicate {
        /// The metric.
        name: String,
        /// The labels, as they would be written.
        labels: String,
    },
}

/// All metrics of the process. Clones share it.
#[derive(Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

struct Inner {
    labels: SharedLabels,
    workers: Mutex<Vec<WorkerSeries>>,
    extra: Mutex<BTreeMap<String, ExtraFamily>>,
    build: String,
}

/// A worker's series as the scraper knows them.
struct WorkerSeries {
    shared: Arc<WorkerShared>,
    /// Those taken over from `WorkerShared::fresh` in earlier scrapes.
    series: Vec<Arc<Series>>,
}

type Read = Box<dyn Fn() -> u64 + Send + Sync>;

struct ExtraFamily {
    help: String,
    kind: MetricKind,
    samples: Vec<(String, Read)>,
}

impl Registry {
    /// A registry of the build with version `tag`, with the default bound on label sets.
    pub fn new(tag: &str) -> Self {
        Self::with_label_sets_max(tag, LABEL_SETS_MAX_DEFAULT)
    }

    /// A registry that keeps `label_sets_max` label sets apart.
    pub fn with_label_sets_max(tag: &str, label_sets_max: usize) -> Self {
        let mut build = String::new();
        append_label(&mut build, "component", "ztunnel");
        append_label(&mut build, "tag", tag);
        let inner = Inner {
            labels: SharedLabels::new(label_sets_max),
            workers: Mutex::default(),
            extra: Mutex::default(),
            build,
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// The telemetry of one more worker. To be called on the worker's own thread.
    pub fn worker(&self, access: AccessLog) -> WorkerTelemetry {
        let shared = Arc::new(WorkerShared::default());
        lock(&self.inner.workers).push(WorkerSeries {
            shared: Arc::clone(&shared),
            series: Vec::new(),
        });
        WorkerTelemetry::new(self.inner.labels.clone(), shared, access)
    }

    /// Adds a metric whose value `read` tells at each scrape; several with one name and different
    /// labels make a family. `read` must be quick, and must not use this registry.
    ///
    /// # Errors
    /// The name or a label is not valid, or the sample exists.
    pub fn register(
        &self,
        name: &str,
        help: &str,
        kind: MetricKind,
        labels: &[(&str, &str)],
        read: impl Fn() -> u64 + Send + Sync + 'static,
    ) -> Result<(), MetricError> {
        let counter = kind == MetricKind::Counter;
        if !is_metric_name(name) || name.ends_with("_total") != counter {
            return Err(MetricError::Name(name.to_owned()));
        }
        let mut text = String::new();
        for (label, value) in labels {
            if !is_label_name(label) {
                let (metric, label) = (name.to_owned(), (*label).to_owned());
                return Err(MetricError::Label { metric, label });
            }
            append_label(&mut text, label, value);
        }
        let mut extra = lock(&self.inner.extra);
        let known = extra.get(name);
        let own = OWN.iter().any(|own| own.name == name) || name == BUILD;
        let other_kind = known.is_some_and(|family| family.kind != kind);
        let sample = |family: &ExtraFamily| family.samples.iter().any(|(known, _)| *known == text);
        if own || other_kind || known.is_some_and(sample) {
            return Err(MetricError::Duplicate {
                name: name.to_owned(),
                labels: text,
            });
        }
        let family = extra.entry(name.to_owned()).or_insert_with(|| ExtraFamily {
            help: help.to_owned(),
            kind,
            samples: Vec::new(),
        });
        family.samples.push((text, Box::new(read)));
        Ok(())
    }

    /// Adds a metric that every worker has one of, with the label `worker`.
    ///
    /// # Errors
    /// As for [`Self::register`], or the name does not begin with `ztunnel_worker_`.
    pub fn register_worker(
        &self,
        worker: usize,
        name: &str,
        help: &str,
        kind: MetricKind,
        read: impl Fn() -> u64 + Send + Sync + 'static,
    ) -> Result<(), MetricError> {
        if !name.starts_with(WORKER_PREFIX) {
            return Err(MetricError::Name(name.to_owned()));
        }
        self.register(name, help, kind, &[("worker", &worker.to_string())], read)
    }

    /// All metrics as text.
    pub fn encode(&self, exposition: Exposition) -> String {
        let totals = self.merge();
        let mut page = Page::new(exposition);
        for own in &OWN {
            page.family(own.name, own.help, own.kind);
            totals.samples(own, &mut page);
        }
        page.family(
            "istio_build",
            "Istio component build info",
            MetricKind::Gauge,
        );
        page.sample("istio_build", &self.inner.build, 1);
        for (name, help, value) in process::metrics() {
            page.family(name, help, MetricKind::Gauge);
            page.sample(name, "", value);
        }
        for (name, family) in lock(&self.inner.extra).iter() {
            page.family(name, &family.help, family.kind);
            for (labels, read) in &family.samples {
                page.sample(name, labels, read());
            }
        }
        page.finish()
    }

    fn merge(&self) -> Totals {
        let mut totals = Totals::default();
        for worker in lock(&self.inner.workers).iter_mut() {
            worker.series.append(&mut worker.shared.take_fresh());
            for series in &worker.series {
                totals.add(series);
            }
            for reporter in Reporter::ALL {
                let i = reporter_index(reporter);
                totals.open[i] += worker.shared.open[i].get();
                totals.failed_early[i] += worker.shared.failed_early[i].get();
            }
            totals.refusals_left_out += worker.shared.refusals_left_out.get();
            totals.overflows += worker.shared.overflows.get();
            for (total, fault) in totals.faults.iter_mut().zip(&worker.shared.faults) {
                *total += fault.get();
            }
            let events = totals.events.iter_mut();
            for (total, event) in events.zip(&worker.shared.events) {
                *total += event.get();
            }
        }
        totals.label_sets = self.inner.labels.len() as u64;
        totals
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry")
            .field("workers", &lock(&self.inner.workers).len())
            .field("label_sets", &self.inner.labels.len())
            .finish_non_exhaustive()
    }
}

/// Where the samples of one of our own families come from.
enum Source {
    /// One per label set without flags.
    Established(fn(&Sums) -> u64),
    /// One per label set that was counted there.
    Counted(fn(&Sums) -> u64),
    /// One per reporter.
    PerReporter(fn(&Totals) -> [u64; 2]),
    /// One per reason for which a tunnel, or a stream in it, was given up.
    PerFault,
    /// A single one.
    Single(fn(&Totals) -> u64),
}

struct OwnFamily {
    name: &'static str,
    help: &'static str,
    kind: MetricKind,
    source: Source,
}

/// The families of connections. Bytes are named from the server's point of view whoever reports:
/// `received` came from the client, `sent` went to it (istio/istio issue 32399).
const OWN: [OwnFamily; 14] = [
    OwnFamily {
        name: "istio_tcp_connections_opened_total",
        help: "The total number of TCP connections opened",
        kind: MetricKind::Counter,
        source: Source::Established(|s| s.opened),
    },
    OwnFamily {
        name: "istio_tcp_connections_closed_total",
        help: "The total number of TCP connections closed",
        kind: MetricKind::Counter,
        source: Source::Counted(|s| s.closed),
    },
    OwnFamily {
        name: "istio_tcp_received_bytes_total",
        help: "Bytes received from the client, the request's direction, during TCP connections",
        kind: MetricKind::Counter,
        source: Source::Established(|s| s.received_bytes),
    },
    OwnFamily {
        name: "istio_tcp_sent_bytes_total",
        help: "Bytes sent to the client, the response's direction, during TCP connections",
        kind: MetricKind::Counter,
        source: Source::Established(|s| s.sent_bytes),
    },
    OwnFamily {
        name: "istio_tcp_connections_failed_total",
        help: "The total number of TCP connections that could not be established (unstable)",
        kind: MetricKind::Counter,
        source: Source::Counted(|s| s.failed),
    },
    OwnFamily {
        name: "istio_tcp_sockets_open",
        help: "TCP connections being proxied now",
        kind: MetricKind::Gauge,
        source: Source::PerReporter(|t| t.open),
    },
    OwnFamily {
        name: "ztunnel_connections_refused_early_total",
        help: "Connections refused before their source or destination was known",
        kind: MetricKind::Counter,
        source: Source::PerReporter(|t| t.failed_early),
    },
    OwnFamily {
        name: "ztunnel_refusal_lines_left_out_total",
        help: "Of those, how many the log sums up instead of telling them one by one",
        kind: MetricKind::Counter,
        source: Source::Single(|t| t.refusals_left_out),
    },
    OwnFamily {
        name: "ztunnel_metric_label_sets",
        help: "Label sets of connections in use",
        kind: MetricKind::Gauge,
        source: Source::Single(|t| t.label_sets),
    },
    OwnFamily {
        name: "ztunnel_metric_label_sets_overflowed_total",
        help: "Times a connection was counted under `overflow` because of too many label sets",
        kind: MetricKind::Counter,
        source: Source::Single(|t| t.overflows),
    },
    OwnFamily {
        name: "ztunnel_hbone_errors_total",
        help: "Tunnels given up before or after their handshake, and streams reset for breaking \
               HTTP/2, by reason",
        kind: MetricKind::Counter,
        source: Source::PerFault,
    },
    OwnFamily {
        name: "ztunnel_hbone_retries_total",
        help: "CONNECT requests sent again because the peer had not processed them",
        kind: MetricKind::Counter,
        source: Source::Single(|t| t.events_of(Event::Retry)),
    },
    OwnFamily {
        name: "ztunnel_hbone_window_stalls_total",
        help: "Times a stream had data to send and waited for the peer to open a window",
        kind: MetricKind::Counter,
        source: Source::Single(|t| t.events_of(Event::WindowStall)),
    },
    OwnFamily {
        name: "ztunnel_policy_revocations_total",
        help: "Connections closed because a later configuration does not allow them",
        kind: MetricKind::Counter,
        source: Source::Single(|t| t.events_of(Event::Revoked)),
    },
];

/// What all workers together counted.
#[derive(Default)]
struct Totals {
    /// By label set id.
    sums: Vec<Option<Sums>>,
    open: [u64; 2],
    failed_early: [u64; 2],
    refusals_left_out: u64,
    overflows: u64,
    label_sets: u64,
    faults: [u64; Fault::COUNT],
    events: [u64; Event::COUNT],
}

struct Sums {
    labels: Arc<LabelSet>,
    opened: u64,
    closed: u64,
    failed: u64,
    received_bytes: u64,
    sent_bytes: u64,
}

impl Totals {
    fn events_of(&self, what: Event) -> u64 {
        self.events[what as usize]
    }

    fn add(&mut self, series: &Series) {
        let id = series.labels.id;
        if self.sums.len() <= id {
            self.sums.resize_with(id + 1, || None);
        }
        let sums = self.sums[id].get_or_insert_with(|| Sums {
            labels: Arc::clone(&series.labels),
            opened: 0,
            closed: 0,
            failed: 0,
            received_bytes: 0,
            sent_bytes: 0,
        });
        sums.opened += series.opened.get();
        sums.closed += series.closed.get();
        sums.failed += series.failed.get();
        sums.received_bytes += series.received_bytes.get();
        sums.sent_bytes += series.sent_bytes.get();
    }

    fn samples(&self, own: &OwnFamily, page: &mut Page) {
        match own.source {
            Source::Established(value) => {
                let plain = |s: &&Sums| s.labels.flags == ResponseFlags::None;
                for sums in self.sums.iter().flatten().filter(plain) {
                    page.sample(own.name, &sums.labels.text, value(sums));
                }
            }
            Source::Counted(value) => {
                for sums in self.sums.iter().flatten().filter(|s| value(s) > 0) {
                    page.sample(own.name, &sums.labels.text, value(sums));
                }
            }
            Source::PerReporter(value) => {
                for (reporter, value) in Reporter::ALL.iter().zip(value(self)) {
                    let label = format!("reporter=\"{}\"", reporter.label());
                    page.sample(own.name, &label, value);
                }
            }
            Source::PerFault => {
                for (fault, value) in Fault::ALL.iter().zip(self.faults) {
                    let label = format!("reason=\"{}\"", fault.label());
                    page.sample(own.name, &label, value);
                }
            }
            Source::Single(value) => page.sample(own.name, "", value(self)),
        }
    }
}
