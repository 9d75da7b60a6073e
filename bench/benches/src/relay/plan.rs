//! What is measured of the relays, where the processes run, and how often.

use std::time::Duration;

/// CPUs of the three processes of a trial.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Placement {
    /// Client, relay and server share one CPU: no wake-up crosses CPUs.
    OneCore,
    /// The relay has a CPU of its own, client and server share another.
    OtherCore,
    /// The scheduler decides; the relay may use every CPU.
    Unpinned,
}

impl Placement {
    /// What rows say of it.
    #[must_use]
    pub fn note(self) -> &'static str {
        match self {
            Self::OneCore => "client, relay and server on one CPU",
            Self::OtherCore => "relay on one CPU, client and server on another",
            Self::Unpinned => "unpinned, relay on all CPUs",
        }
    }

    fn suffix(self) -> &'static str {
        match self {
            Self::OneCore => "",
            Self::OtherCore => "/other-core",
            Self::Unpinned => "/unpinned",
        }
    }
}

/// What the client does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// 64-byte requests, closed loop.
    Rr,
    /// The same, with `rt` looking for news before it sleeps: what its CPU buys.
    RrBusyPoll,
    /// Bytes from the client to the server.
    Stream,
    /// The same, with `rt` splicing.
    StreamSplice,
    /// Connect, one request, close.
    Connect,
    /// Connections that are held.
    Idle,
}

impl Kind {
    /// As the names of rows have it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Rr => "rr",
            Self::RrBusyPoll => "rr-busy-poll",
            Self::Stream => "stream",
            Self::StreamSplice => "stream-splice",
            Self::Connect => "connect",
            Self::Idle => "idle",
        }
    }

    /// As the command line of `bench-peer load` has it.
    #[must_use]
    pub fn load(self) -> &'static str {
        match self {
            Self::RrBusyPoll => Self::Rr.name(),
            Self::StreamSplice => Self::Stream.name(),
            kind => kind.name(),
        }
    }

    /// The metrics of its rows, and of each whether less is better.
    #[must_use]
    pub fn metrics(self) -> &'static [(&'static str, bool)] {
        match self {
            Self::Rr | Self::RrBusyPoll => &[
                ("cpu_us_per_request", true),
                ("p50_us", true),
                ("requests_per_s", false),
            ],
            Self::Stream | Self::StreamSplice => &[("cpu_s_per_gb", true), ("bytes_per_s", false)],
            Self::Connect => &[
                ("connections_per_s", false),
                ("cpu_us_per_connection", true),
            ],
            Self::Idle => &[("bytes_per_idle_connection", true)],
        }
    }
}

/// One workload of the plan.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Workload {
    /// What the client does.
    pub kind: Kind,
    /// Connections; for [`Kind::Connect`] at a time.
    pub connections: usize,
    /// Where the processes run.
    pub placement: Placement,
}

impl Workload {
    /// Name of its rows.
    #[must_use]
    pub fn name(&self) -> String {
        let (kind, suffix) = (self.kind.name(), self.placement.suffix());
        format!("relay/{kind}/{}{suffix}", self.connections)
    }
}

/// Everything that is measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Trials of every backend in every workload.
    pub trials: usize,
    /// Load before the measured time.
    pub warmup: Duration,
    /// The measured time.
    pub duration: Duration,
    /// The workloads in order.
    pub workloads: Vec<Workload>,
}

/// Workloads as they are measured; those of [`Placement::OtherCore`] need two CPUs.
const WORKLOADS: [(Kind, usize, Placement); 14] = [
    (Kind::Rr, 1, Placement::OneCore),
    (Kind::Rr, 32, Placement::OneCore),
    (Kind::Rr, 256, Placement::OneCore),
    (Kind::Rr, 32, Placement::OtherCore),
    (Kind::Rr, 256, Placement::OtherCore),
    (Kind::Rr, 1, Placement::Unpinned),
    (Kind::RrBusyPoll, 1, Placement::Unpinned),
    (Kind::RrBusyPoll, 32, Placement::OtherCore),
    (Kind::Stream, 1, Placement::OneCore),
    (Kind::Stream, 8, Placement::OneCore),
    (Kind::StreamSplice, 1, Placement::OneCore),
    (Kind::StreamSplice, 8, Placement::OneCore),
    (Kind::Connect, 16, Placement::OneCore),
    (Kind::Idle, 10_000, Placement::OneCore),
];

impl Plan {
    /// The plan for comparisons, or with `quick` for a first look.
    #[must_use]
    pub fn new(quick: bool) -> Self {
        let workload = |&(kind, connections, placement): &_| Workload {
            kind,
            connections: match (kind, quick) {
                (Kind::Idle, true) => 1_000,
                _ => connections,
            },
            placement,
        };
        Self {
            trials: if quick { 1 } else { 7 },
            warmup: Duration::from_millis(if quick { 100 } else { 300 }),
            duration: Duration::from_millis(if quick { 400 } else { 1500 }),
            workloads: WORKLOADS.iter().map(workload).collect(),
        }
    }
}
