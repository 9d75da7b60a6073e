//! Label sets and the counters under them.
//!
//! A label set is text from the moment it is first seen, is kept once per process and is never
//! given up, as counters must not go backwards; their number is bounded, and what comes after is
//! counted under a label set whose workloads are `overflow`.
//!
//! A series is one worker's counters under one label set: written by that worker alone (a plain
//! load and store, no locked instruction), read by the scraper.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use httpd::append_label;
use mesh::{Identity, Workload};

use crate::connection::{ConnectionInfo, Reporter, ResponseFlags};

/// What a label says when its value is not known.
const UNKNOWN: &str = "unknown";
/// What the workload labels say once there are too many label sets.
const OVERFLOW: &str = "overflow";

/// One label set.
#[derive(Debug)]
pub(crate) struct LabelSet {
    /// Its place in the order of first appearance.
    pub(crate) id: usize,
    /// Its flags, which decide the families it appears in.
    pub(crate) flags: ResponseFlags,
    /// The labels, escaped, as between the braces of a sample.
    pub(crate) text: Arc<str>,
}

/// All label sets of the process.
#[derive(Debug)]
pub(crate) struct LabelSets {
    known: HashMap<Arc<str>, Arc<LabelSet>>,
    /// Sets other than those of the overflow.
    regular: usize,
    regular_max: usize,
}

impl LabelSets {
    pub(crate) fn new(regular_max: usize) -> Self {
        Self {
            known: HashMap::new(),
            regular: 0,
            regular_max,
        }
    }

    /// The label set of `info` with `flags`, and whether it is that of the overflow.
    pub(crate) fn intern(
        &mut self,
        info: &ConnectionInfo,
        flags: ResponseFlags,
    ) -> (Arc<LabelSet>, bool) {
        let text = labels(info, flags);
        if let Some(set) = self.known.get(text.as_str()) {
            return (Arc::clone(set), false);
        }
        if self.regular < self.regular_max {
            self.regular += 1;
            return (self.add(text, flags), false);
        }
        let text = overflow_labels(info, flags);
        let set = match self.known.get(text.as_str()) {
            Some(set) => Arc::clone(set),
            None => self.add(text, flags),
        };
        (set, true)
    }

    pub(crate) fn len(&self) -> usize {
        self.known.len()
    }

    fn add(&mut self, text: String, flags: ResponseFlags) -> Arc<LabelSet> {
        let text: Arc<str> = text.into();
        let set = Arc::new(LabelSet {
            id: self.known.len(),
            flags,
            text: Arc::clone(&text),
        });
        self.known.insert(text, Arc::clone(&set));
        set
    }
}

/// One worker's counters under one label set.
#[derive(Debug)]
pub(crate) struct Series {
    pub(crate) labels: Arc<LabelSet>,
    pub(crate) opened: WorkerCounter,
    pub(crate) closed: WorkerCounter,
    pub(crate) failed: WorkerCounter,
    pub(crate) received_bytes: WorkerCounter,
    pub(crate) sent_bytes: WorkerCounter,
}

impl Series {
    pub(crate) fn new(labels: Arc<LabelSet>) -> Self {
        Self {
            labels,
            opened: WorkerCounter::default(),
            closed: WorkerCounter::default(),
            failed: WorkerCounter::default(),
            received_bytes: WorkerCounter::default(),
            sent_bytes: WorkerCounter::default(),
        }
    }
}

/// A number with one writer and any readers. Two writers would lose counts, nothing worse.
#[derive(Debug, Default)]
pub(crate) struct WorkerCounter(AtomicU64);

impl WorkerCounter {
    pub(crate) fn add(&self, n: u64) {
        // Load and store instead of fetch_add: with one writer nothing can come in between.
        self.0.store(self.get().wrapping_add(n), Ordering::Relaxed);
    }

    pub(crate) fn subtract(&self, n: u64) {
        self.0
            .store(self.get().saturating_sub(n), Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The 27 labels in Istio's order.
fn labels(info: &ConnectionInfo, flags: ResponseFlags) -> String {
    let mut text = LabelText(String::with_capacity(1024));
    text.add("reporter", Some(info.reporter.label()));
    source_labels(&mut text, info);
    destination_labels(&mut text, info);
    text.add("request_protocol", Some("tcp"));
    text.add("response_flags", Some(flags.label()));
    text.add("connection_security_policy", Some(info.security.label()));
    let source = info.source.as_deref().map(|w| &w.locality);
    let destination = info.destination.as_deref().map(|w| &w.locality);
    text.add("source_region", source.map(|l| &*l.region));
    text.add("source_zone", source.map(|l| &*l.zone));
    text.add("destination_region", destination.map(|l| &*l.region));
    text.add("destination_zone", destination.map(|l| &*l.zone));
    text.0
}

fn source_labels(text: &mut LabelText, info: &ConnectionInfo) {
    let source = info.source.as_deref();
    let name = source.map(|w| &*w.canonical_name);
    let revision = source.map(|w| &*w.canonical_revision);
    text.add("source_workload", source.map(|w| &*w.workload_name));
    text.add("source_canonical_service", name);
    text.add("source_canonical_revision", revision);
    text.add("source_workload_namespace", source.map(|w| &*w.namespace));
    // Only what was proved: the identity that the address stands for is not taken for it.
    text.add(
        "source_principal",
        info.source_identity.as_ref().map(Identity::uri),
    );
    text.add("source_app", name);
    text.add("source_version", revision);
    text.add("source_cluster", source.map(|w| &*w.cluster_id));
}

fn destination_labels(text: &mut LabelText, info: &ConnectionInfo) {
    let service = info.service.as_deref();
    text.add("destination_service", service.map(|s| &*s.hostname));
    text.add(
        "destination_service_namespace",
        service.map(|s| &*s.namespace),
    );
    text.add("destination_service_name", service.map(|s| &*s.name));
    let destination = info.destination.as_deref();
    let name = destination.map(|w| &*w.canonical_name);
    let revision = destination.map(|w| &*w.canonical_revision);
    let identity = info.destination_identity.as_ref();
    let identity = identity.or_else(|| destination.map(Workload::identity_ref));
    text.add(
        "destination_workload",
        destination.map(|w| &*w.workload_name),
    );
    text.add("destination_canonical_service", name);
    text.add("destination_canonical_revision", revision);
    text.add(
        "destination_workload_namespace",
        destination.map(|w| &*w.namespace),
    );
    text.add("destination_principal", identity.map(Identity::uri));
    text.add("destination_app", name);
    text.add("destination_version", revision);
    text.add("destination_cluster", destination.map(|w| &*w.cluster_id));
}

/// Labels as text; what is not known or empty says so.
struct LabelText(String);

impl LabelText {
    fn add(&mut self, name: &str, value: Option<&str>) {
        let value = value.filter(|value| !value.is_empty()).unwrap_or(UNKNOWN);
        append_label(&mut self.0, name, value);
    }
}

/// The same labels with nothing in them that can vary without bound.
fn overflow_labels(info: &ConnectionInfo, flags: ResponseFlags) -> String {
    let nowhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    let mut bare = ConnectionInfo::new(info.reporter, nowhere, nowhere);
    bare.security = info.security;
    let mut text = labels(&bare, flags);
    for name in ["source_workload", "destination_workload"] {
        text = text.replace(
            &format!("{name}=\"{UNKNOWN}\""),
            &format!("{name}=\"{OVERFLOW}\""),
        );
    }
    text
}

/// The index of a reporter in per-worker arrays.
pub(crate) fn reporter_index(reporter: Reporter) -> usize {
    match reporter {
        Reporter::Source => 0,
        Reporter::Destination => 1,
    }
}
