//! What a worker holds: the way from a connection to its counters, and its part of the access log.
//!
//! A connection whose ends were seen before costs a hash lookup by the addresses of its model
//! objects: no allocation, no lock, no label text. The table holds on to those objects, so an
//! address cannot come to mean another one. When the model changes, its objects change too;
//! [`WorkerTelemetry::model_changed`] lets go of the old ones, and the size of the table is
//! bounded in any case.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use hashbrown::HashTable;
use mesh::{Identity, Service, Workload};
use tracing::Level;

use crate::access::{self, AccessLog, Outcome};
use crate::connection::{ConnectionInfo, Reporter, ResponseFlags, Security};
use crate::faults::{Event, Fault};
use crate::line::LineBuffer;
use crate::refusals::Refusals;
use crate::series::{Series, reporter_index};
use crate::shared::{SharedLabels, WorkerShared};

/// Entries of the table before it starts afresh. Counters are not lost by that.
const TABLE_MAX: usize = 1 << 16;

/// What is logged for a connection that was dropped without being closed.
const DRAINED: &str = "connection closed due to connection drain";

/// One worker's telemetry. Lives on that worker's thread; clones share it.
#[derive(Clone, Debug)]
pub struct WorkerTelemetry {
    inner: Rc<Inner>,
}

#[derive(Debug)]
struct Inner {
    labels: SharedLabels,
    shared: Arc<WorkerShared>,
    access: AccessLog,
    hasher: RandomState,
    table: RefCell<HashTable<Entry>>,
    /// This worker's series by label set.
    series: RefCell<HashMap<usize, Arc<Series>>>,
    line: RefCell<LineBuffer>,
    refusals: RefCell<Refusals>,
}

/// What decides a connection's label set, and the counters found for it.
#[derive(Debug)]
struct Entry {
    hash: u64,
    source: Option<Arc<Workload>>,
    destination: Option<Arc<Workload>>,
    service: Option<Arc<Service>>,
    source_identity: Option<Identity>,
    destination_identity: Option<Identity>,
    reporter: Reporter,
    security: Security,
    flags: ResponseFlags,
    series: Arc<Series>,
}

impl Entry {
    fn matches(&self, info: &ConnectionInfo, flags: ResponseFlags) -> bool {
        self.flags == flags
            && self.reporter == info.reporter
            && self.security == info.security
            && same(&self.source, &info.source)
            && same(&self.destination, &info.destination)
            && same(&self.service, &info.service)
            && self.source_identity == info.source_identity
            && self.destination_identity == info.destination_identity
    }
}

fn same<T>(a: &Option<Arc<T>>, b: &Option<Arc<T>>) -> bool {
    address(a) == address(b)
}

/// The address of what is referred to, 0 for nothing.
fn address<T>(object: &Option<Arc<T>>) -> usize {
    object
        .as_ref()
        .map_or(0, |object| Arc::as_ptr(object).addr())
}

impl WorkerTelemetry {
    pub(crate) fn new(labels: SharedLabels, shared: Arc<WorkerShared>, access: AccessLog) -> Self {
        let inner = Inner {
            labels,
            shared,
            access,
            hasher: RandomState::new(),
            table: RefCell::default(),
            series: RefCell::default(),
            line: RefCell::default(),
            refusals: RefCell::default(),
        };
        Self {
            inner: Rc::new(inner),
        }
    }

    /// Counts a connection as opened. What happens to it is told to the record.
    pub fn opened(&self, info: ConnectionInfo) -> ConnectionRecord {
        self.opening(info).record()
    }

    /// As [`Self::opened`], for a connection whose server has yet to prove who it is. Labels name
    /// the server that answers, so it is counted as opened when that is known, or at its end.
    pub fn opening(&self, info: ConnectionInfo) -> Opening {
        let inner = &self.inner;
        inner.shared.open[reporter_index(info.reporter)].add(1);
        if inner.access.enables(Level::DEBUG) {
            let mut buffer = inner.line.borrow_mut();
            let mut line = inner
                .access
                .start(&mut buffer, Level::DEBUG, "connection opened");
            access::ends(&mut line, &info);
            inner.access.write(line.finish());
        }
        Opening {
            worker: Rc::clone(inner),
            info: Some(info),
            started: Instant::now(),
        }
    }

    /// Counts a connection that was refused before its source or destination was known, and logs
    /// it unless too many are; `reason` is the kind of `error`. What is left out is told by
    /// [`Self::tell_left_out`].
    pub fn failed_early(
        &self,
        reporter: Reporter,
        src: SocketAddr,
        dst: SocketAddr,
        (reason, error): (&'static str, &dyn fmt::Display),
    ) {
        let inner = &self.inner;
        inner.shared.failed_early[reporter_index(reporter)].add(1);
        if inner.access.enables(Level::WARN) {
            if !inner.tells(src.ip(), reporter, reason) {
                return;
            }
            let mut buffer = inner.line.borrow_mut();
            let mut line = inner
                .access
                .start(&mut buffer, Level::WARN, "connection failed");
            line.bare("src.addr", &src);
            line.bare("dst.addr", &dst);
            line.string("direction", reporter.direction());
            line.quoted("error", error);
            inner.access.write(line.finish());
        }
    }

    /// Sums up the lines of refusals that were left out. To be called every
    /// [`crate::REFUSALS_EVERY`].
    pub fn tell_left_out(&self) {
        let inner = &self.inner;
        let left_out = inner.refusals.borrow_mut().take_left_out(Instant::now());
        for one in left_out {
            let mut buffer = inner.line.borrow_mut();
            let message = "connections failed, not told one by one";
            let mut line = inner.access.start(&mut buffer, Level::WARN, message);
            match &one.source {
                Some(source) => line.bare("src.ip", source),
                None => line.string("src.ip", "several"),
            }
            line.string("direction", one.reporter.direction());
            line.string("reason", one.reason.unwrap_or("several"));
            line.literal("count", format_args!("{}", one.count));
            inner.access.write(line.finish());
        }
    }

    /// Counts a tunnel given up, or a stream reset for breaking HTTP/2.
    pub fn hbone_error(&self, fault: Fault) {
        self.inner.shared.faults[fault as usize].add(1);
    }

    /// How often [`Self::hbone_error`] was told `fault` on this worker.
    pub fn hbone_errors(&self, fault: Fault) -> u64 {
        self.inner.shared.faults[fault as usize].get()
    }

    /// Counts something that is no error of one connection.
    pub fn count_event(&self, what: Event) {
        self.inner.shared.events[what as usize].add(1);
    }

    /// How often [`Self::happened`] was told `what` on this worker.
    pub fn events(&self, what: Event) -> u64 {
        self.inner.shared.events[what as usize].get()
    }

    /// Lets go of the workloads and services of an older model. Counters stay.
    pub fn model_changed(&self) {
        self.inner.table.borrow_mut().clear();
    }
}

impl Inner {
    /// Whether one more refusal is told; if not, that is counted.
    fn tells(&self, src: IpAddr, reporter: Reporter, reason: &'static str) -> bool {
        let mut refusals = self.refusals.borrow_mut();
        let tells = refusals.tell(src, reporter, reason, Instant::now());
        if !tells {
            self.shared.refusals_left_out.add(1);
        }
        tells
    }

    fn series(&self, info: &ConnectionInfo, flags: ResponseFlags) -> Arc<Series> {
        let hash = self.hash(info, flags);
        let found = self
            .table
            .borrow()
            .find(hash, |e| e.matches(info, flags))
            .map(|e| {
                let series = &e.series;
                Arc::clone(series)
            });
        found.unwrap_or_else(|| self.first_seen(hash, info, flags))
    }

    #[cold]
    fn first_seen(&self, hash: u64, info: &ConnectionInfo, flags: ResponseFlags) -> Arc<Series> {
        let (labels, overflow) = self.labels.intern(info, flags);
        if overflow {
            self.shared.overflows.add(1);
        }
        let series = self
            .series
            .borrow_mut()
            .entry(labels.id)
            .or_insert_with(|| {
                let series = Arc::new(Series::new(labels));
                self.shared.publish(Arc::clone(&series));
                series
            })
            .clone();
        let mut table = self.table.borrow_mut();
        if table.len() >= TABLE_MAX {
            table.clear();
        }
        let entry = Entry {
            hash,
            source: info.source.clone(),
            destination: info.destination.clone(),
            service: info.service.clone(),
            source_identity: info.source_identity.clone(),
            destination_identity: info.destination_identity.clone(),
            reporter: info.reporter,
            security: info.security,
            flags,
            series: Arc::clone(&series),
        };
        table.insert_unique(hash, entry, |entry| entry.hash);
        series
    }

    fn hash(&self, info: &ConnectionInfo, flags: ResponseFlags) -> u64 {
        // Keyed, as peers choose some of what goes in.
        let mut hasher = self.hasher.build_hasher();
        address(&info.source).hash(&mut hasher);
        address(&info.destination).hash(&mut hasher);
        address(&info.service).hash(&mut hasher);
        for identity in [&info.source_identity, &info.destination_identity] {
            identity
                .as_ref()
                .map_or("", Identity::uri)
                .hash(&mut hasher);
        }
        (info.reporter, info.security, flags).hash(&mut hasher);
        hasher.finish()
    }
}

/// A connection being set up. Dropped, it counts as ended by a drain.
#[derive(Debug)]
pub struct Opening {
    worker: Rc<Inner>,
    /// Taken when it becomes a record.
    info: Option<ConnectionInfo>,
    started: Instant,
}

impl Opening {
    /// The server has proved to be `server`; `None` if it was accepted by a name that is no
    /// identity.
    pub fn proved(mut self, server: Option<&Identity>) -> ConnectionRecord {
        if let Some(info) = &mut self.info
            && info.destination_identity.as_ref() != server
        {
            info.destination_identity = server.cloned();
        }
        self.record()
    }

    /// Counts and logs a connection that did not come to be.
    pub fn close(self, error: Option<&dyn fmt::Display>, flags: ResponseFlags) {
        self.record().close(error, flags);
    }

    fn record(mut self) -> ConnectionRecord {
        self.take().expect("only taken here and by drop")
    }

    fn take(&mut self) -> Option<ConnectionRecord> {
        let info = self.info.take()?;
        let series = self.worker.series(&info, ResponseFlags::None);
        series.opened.add(1);
        Some(ConnectionRecord {
            worker: Rc::clone(&self.worker),
            info,
            series,
            started: self.started,
            sent: Cell::new(0),
            received: Cell::new(0),
            over: false,
        })
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        drop(self.take());
    }
}

/// One connection's counters and its line in the access log. Dropped without [`Self::close`], it
/// counts as ended by a drain.
///
/// "Sent" and "received" are the metrics' words, whoever reports: *received* from the client that
/// began the connection, *sent* to it. The access log turns them round for the client's proxy.
#[derive(Debug)]
pub struct ConnectionRecord {
    worker: Rc<Inner>,
    info: ConnectionInfo,
    series: Arc<Series>,
    started: Instant,
    sent: Cell<u64>,
    received: Cell<u64>,
    over: bool,
}

impl ConnectionRecord {
    /// `bytes` more went to the client (downstream), the direction of a response.
    pub fn sent(&self, bytes: u64) {
        self.sent.set(self.sent.get().wrapping_add(bytes));
        self.series.sent_bytes.add(bytes);
    }

    /// `bytes` more came from the client (downstream), the direction of a request.
    pub fn received(&self, bytes: u64) {
        self.received.set(self.received.get().wrapping_add(bytes));
        self.series.received_bytes.add(bytes);
    }

    /// What was given to [`WorkerTelemetry::opened`].
    pub fn info(&self) -> &ConnectionInfo {
        &self.info
    }

    /// Learns where the connection really goes, for the log: known only once it is set up.
    pub fn set_destination(&mut self, dst: SocketAddr) {
        self.info.dst = dst;
    }

    /// Counts the end and writes the access log line; with an error as an error. `flags` other
    /// than none say that the connection never came to be, and count it as failed too.
    pub fn close(mut self, error: Option<&dyn fmt::Display>, flags: ResponseFlags) {
        self.end(error, flags);
    }

    fn end(&mut self, error: Option<&dyn fmt::Display>, flags: ResponseFlags) {
        self.over = true;
        let worker = &self.worker;
        let reporter = self.info.reporter;
        worker.shared.open[reporter_index(reporter)].subtract(1);
        if flags == ResponseFlags::None {
            self.series.closed.add(1);
        } else {
            let series = worker.series(&self.info, flags);
            series.closed.add(1);
            series.failed.add(1);
        }
        let level = if error.is_some() {
            Level::ERROR
        } else {
            Level::INFO
        };
        if worker.access.enables(level) {
            // What never came to be is a refusal, and anyone may have those without end.
            let src = self.info.src.ip();
            if flags != ResponseFlags::None && !worker.tells(src, reporter, flags.label()) {
                return;
            }
            let mut buffer = worker.line.borrow_mut();
            let mut line = worker
                .access
                .start(&mut buffer, level, "connection complete");
            access::ends(&mut line, &self.info);
            let outcome = Outcome {
                received: self.received.get(),
                sent: self.sent.get(),
                duration: self.started.elapsed(),
                error,
            };
            access::outcome(&mut line, reporter, &outcome);
            worker.access.write(line.finish());
        }
    }
}

impl Drop for ConnectionRecord {
    fn drop(&mut self) {
        if !self.over {
            self.end(Some(&DRAINED), ResponseFlags::None);
        }
    }
}
