//! What is measured: the metrics' names, units, which way is better, and what is equally noisy.
//!
//! All of it is here: who writes figures, compares them or shows them asks [`Metric`].

use std::cmp::Ordering;
use std::fmt;

use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize, Serializer};

use crate::units::Unit;

/// A figure of a trial. In files it stands by its [name](Metric::name).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Metric {
    /// What was done per second: `requests_per_s`, `connections_per_s`, `bytes_per_s`.
    Throughput(Work),
    /// Latency, in µs. At a set rate it counts from when a request was due.
    Latency(Quantile),
    /// Latency at a set rate from when a request was sent, in µs: the median.
    ServiceP50,
    /// The 99th percentile of the same.
    ServiceP99,
    /// CPU time for each piece of work: µs per request or connection, s per GB.
    Cpu(Spender, Work),
    /// Context switches of the ztunnels for each piece of work.
    Switches(Work),
    /// Calls of `io_uring_enter` of the ztunnels for each piece of work.
    Enters(Work),
    /// Packets through the `tunnel` path's tunnels for each piece of work.
    TunnelPackets(Work),
    /// Resident memory of all ztunnels, in bytes.
    ZtunnelMemory,
    /// Requests, connections or streams that failed.
    Errors,
    /// Share of what was due at a set rate that was left out.
    SkippedShare,
    /// Busy share of the machine's CPU time.
    BusyShare,
    /// Entries of conntrack's tables on nodes and in ztunnels.
    ConntrackEntries,
}

/// What a workload does many of, by which its costs are divided.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Work {
    /// A request and its answer.
    Request,
    /// A connection with one request.
    Connection,
    /// Bytes of a stream: rates are per byte, costs per GB.
    Bytes,
}

impl Work {
    const ALL: [Self; 3] = [Self::Request, Self::Connection, Self::Bytes];

    /// What the workload of this name in reports does.
    #[must_use]
    pub fn of(workload: &str) -> Self {
        match workload {
            "stream" => Self::Bytes,
            "connect" | "redirect-connect" => Self::Connection,
            _ => Self::Request,
        }
    }

    /// In words: what costs are for each of.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::Connection => "connection",
            Self::Bytes => "GB",
        }
    }

    /// The one of the three that belongs to it.
    fn choose(self, [request, connection, bytes]: [&'static str; 3]) -> &'static str {
        match self {
            Self::Request => request,
            Self::Connection => connection,
            Self::Bytes => bytes,
        }
    }
}

/// A place in the distribution of latencies.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Quantile {
    /// The median.
    P50,
    /// 90 %.
    P90,
    /// 99 %.
    P99,
    /// 99.9 %.
    P999,
    /// The longest.
    Max,
}

impl Quantile {
    const ALL: [Self; 5] = [Self::P50, Self::P90, Self::P99, Self::P999, Self::Max];
}

/// Whose CPU time.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Spender {
    /// The load generator's client.
    Client,
    /// The proxy on node A, the client's.
    ZtunnelA,
    /// The proxy on node B.
    ZtunnelB,
    /// The load generator's server.
    Server,
    /// Soft interrupts, whoever they interrupt.
    SoftInterrupts,
    /// All ztunnels of the run.
    Ztunnels,
    /// The whole machine: the busy time of all CPUs.
    Machine,
}

impl Spender {
    const ALL: [Self; 7] = [
        Self::Client,
        Self::ZtunnelA,
        Self::ZtunnelB,
        Self::Server,
        Self::SoftInterrupts,
        Self::Ztunnels,
        Self::Machine,
    ];

    /// Everybody on the way of a request, in its order; the last is the whole machine.
    pub const ON_THE_WAY: [Self; 6] = [
        Self::Client,
        Self::ZtunnelA,
        Self::ZtunnelB,
        Self::Server,
        Self::SoftInterrupts,
        Self::Machine,
    ];

    /// Names of the metrics by [`Work`], in its order.
    fn cpu_names(self) -> [&'static str; 3] {
        match self {
            Self::Client => [
                "client_cpu_us_per_request",
                "client_cpu_us_per_connection",
                "client_cpu_s_per_gb",
            ],
            Self::ZtunnelA => [
                "ztunnel_a_cpu_us_per_request",
                "ztunnel_a_cpu_us_per_connection",
                "ztunnel_a_cpu_s_per_gb",
            ],
            Self::ZtunnelB => [
                "ztunnel_b_cpu_us_per_request",
                "ztunnel_b_cpu_us_per_connection",
                "ztunnel_b_cpu_s_per_gb",
            ],
            Self::Server => [
                "server_cpu_us_per_request",
                "server_cpu_us_per_connection",
                "server_cpu_s_per_gb",
            ],
            Self::SoftInterrupts => [
                "softirq_cpu_us_per_request",
                "softirq_cpu_us_per_connection",
                "softirq_cpu_s_per_gb",
            ],
            Self::Ztunnels => [
                "ztunnel_cpu_us_per_request",
                "ztunnel_cpu_us_per_connection",
                "ztunnel_cpu_s_per_gb",
            ],
            Self::Machine => [
                "total_cpu_us_per_request",
                "total_cpu_us_per_connection",
                "total_cpu_s_per_gb",
            ],
        }
    }
}

/// Which way a figure gets better.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Better {
    /// More is better.
    More,
    /// Less is better.
    Less,
}

/// Metrics that are equally noisy and share a threshold.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum NoiseKind {
    /// Rates.
    Throughput,
    /// Latencies that most requests have.
    Median,
    /// Those that few have.
    Tail,
    /// Latencies of an open loop. Near the knee they hang on every burst and would drown those of
    /// closed loops.
    OpenLoop,
    /// Of all ztunnels.
    ZtunnelCpu,
    /// Of one of them, or of an end.
    ProcessCpu,
    /// Of everything.
    MachineCpu,
    /// Of soft interrupts.
    SoftInterrupts,
    /// Of the ztunnels.
    Memory,
    /// Whatever is counted.
    Counts,
}

impl NoiseKind {
    /// As in the file.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Throughput => "throughput",
            Self::Median => "p50 and p90",
            Self::Tail => "p99 and above",
            Self::OpenLoop => "open-loop latency",
            Self::ZtunnelCpu => "ztunnel CPU",
            Self::ProcessCpu => "CPU of one process",
            Self::MachineCpu => "machine CPU",
            Self::SoftInterrupts => "softirq CPU",
            Self::Memory => "memory",
            Self::Counts => "counts",
        }
    }
}

impl Metric {
    /// The median latency.
    pub const P50: Self = Self::Latency(Quantile::P50);
    /// The 99th percentile of latency.
    pub const P99: Self = Self::Latency(Quantile::P99);

    /// The metric that says how much a workload moves.
    #[must_use]
    pub fn throughput(workload: &str) -> Self {
        Self::Throughput(Work::of(workload))
    }

    /// CPU time at a workload.
    #[must_use]
    pub fn cpu(of: Spender, workload: &str) -> Self {
        Self::Cpu(of, Work::of(workload))
    }

    /// What a table shows of a workload: throughput, p50, p99, CPU time of all ztunnels and of the
    /// whole machine.
    #[must_use]
    pub fn headlines(workload: &str) -> [Self; 5] {
        [
            Self::throughput(workload),
            Self::P50,
            Self::P99,
            Self::cpu(Spender::Ztunnels, workload),
            Self::cpu(Spender::Machine, workload),
        ]
    }

    /// The name in files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Throughput(Work::Request) => "requests_per_s",
            Self::Throughput(Work::Connection) => "connections_per_s",
            Self::Throughput(Work::Bytes) => "bytes_per_s",
            Self::Latency(Quantile::P50) => "p50_us",
            Self::Latency(Quantile::P90) => "p90_us",
            Self::Latency(Quantile::P99) => "p99_us",
            Self::Latency(Quantile::P999) => "p999_us",
            Self::Latency(Quantile::Max) => "max_us",
            Self::ServiceP50 => "service_p50_us",
            Self::ServiceP99 => "service_p99_us",
            Self::Cpu(of, work) => work.choose(of.cpu_names()),
            Self::Switches(work) => work.choose([
                "ztunnel_switches_per_request",
                "ztunnel_switches_per_connection",
                "ztunnel_switches_per_gb",
            ]),
            Self::Enters(work) => work.choose([
                "ztunnel_enters_per_request",
                "ztunnel_enters_per_connection",
                "ztunnel_enters_per_gb",
            ]),
            Self::TunnelPackets(work) => work.choose([
                "tunnel_packets_per_request",
                "tunnel_packets_per_connection",
                "tunnel_packets_per_gb",
            ]),
            Self::ZtunnelMemory => "ztunnel_rss_bytes",
            Self::Errors => "errors",
            Self::SkippedShare => "skipped_share",
            Self::BusyShare => "machine_busy_share",
            Self::ConntrackEntries => "conntrack_entries",
        }
    }

    /// The metric of this name, if it is one.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::all().find(|metric| metric.name() == name)
    }

    /// What its figures are in.
    #[must_use]
    pub fn unit(self) -> Unit {
        match self {
            Self::Throughput(Work::Request) => Unit::RequestsPerS,
            Self::Throughput(Work::Connection) => Unit::ConnectionsPerS,
            Self::Throughput(Work::Bytes) => Unit::BytesPerS,
            Self::Latency(_) | Self::ServiceP50 | Self::ServiceP99 => Unit::Latency,
            Self::Cpu(_, Work::Request | Work::Connection) => Unit::CpuUs,
            Self::Cpu(_, Work::Bytes) => Unit::CpuSPerGb,
            Self::ZtunnelMemory => Unit::Bytes,
            Self::SkippedShare | Self::BusyShare => Unit::Share,
            Self::Switches(_) | Self::Enters(_) | Self::TunnelPackets(_) => Unit::Count,
            Self::Errors | Self::ConntrackEntries => Unit::Count,
        }
    }

    /// A figure of it with its unit, three significant digits; `n/a` if there is none.
    #[must_use]
    pub fn show(self, value: Option<f64>) -> String {
        let value = value.filter(|value| value.is_finite());
        value.map_or_else(|| "n/a".to_owned(), |value| self.unit().show(value))
    }

    /// Which way it gets better; `None` if ratios of it mean nothing: shares and levels of the
    /// machine, counts of errors and the one longest request have no better half.
    #[must_use]
    pub fn better(self) -> Option<Better> {
        match self {
            Self::Throughput(_) => Some(Better::More),
            Self::Latency(Quantile::Max)
            | Self::Errors
            | Self::SkippedShare
            | Self::BusyShare
            | Self::ConntrackEntries => None,
            Self::Latency(_) | Self::ServiceP50 | Self::ServiceP99 => Some(Better::Less),
            Self::Cpu(..) | Self::Switches(_) | Self::Enters(_) => Some(Better::Less),
            Self::TunnelPackets(_) | Self::ZtunnelMemory => Some(Better::Less),
        }
    }

    /// What it is as noisy as, at a workload.
    #[must_use]
    pub fn noise_kind(self, workload: &str) -> NoiseKind {
        match self {
            Self::Throughput(_) => NoiseKind::Throughput,
            Self::Latency(_) | Self::ServiceP50 | Self::ServiceP99 if workload == "rr-open" => {
                NoiseKind::OpenLoop
            }
            Self::Latency(Quantile::P50 | Quantile::P90) => NoiseKind::Median,
            Self::Latency(Quantile::P99 | Quantile::P999) => NoiseKind::Tail,
            Self::Cpu(Spender::Ztunnels, _) => NoiseKind::ZtunnelCpu,
            Self::Cpu(Spender::Machine, _) => NoiseKind::MachineCpu,
            Self::Cpu(Spender::SoftInterrupts, _) => NoiseKind::SoftInterrupts,
            Self::Cpu(_, _) => NoiseKind::ProcessCpu,
            Self::ZtunnelMemory => NoiseKind::Memory,
            _ => NoiseKind::Counts,
        }
    }

    /// All there are.
    fn all() -> impl Iterator<Item = Self> {
        let of_work = Work::ALL.into_iter().flat_map(|work| {
            let cpu = Spender::ALL.into_iter().map(move |of| Self::Cpu(of, work));
            cpu.chain([
                Self::Throughput(work),
                Self::Switches(work),
                Self::Enters(work),
                Self::TunnelPackets(work),
            ])
        });
        let latencies = Quantile::ALL.into_iter().map(Self::Latency);
        let others = [
            Self::ServiceP50,
            Self::ServiceP99,
            Self::ZtunnelMemory,
            Self::Errors,
            Self::SkippedShare,
            Self::BusyShare,
            Self::ConntrackEntries,
        ];
        of_work.chain(latencies).chain(others)
    }
}

/// By name, as they stand in files.
impl Ord for Metric {
    fn cmp(&self, other: &Self) -> Ordering {
        self.name().cmp(other.name())
    }
}

impl PartialOrd for Metric {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for Metric {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Metric {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Self::from_name(&name)
            .ok_or_else(|| de::Error::custom(format!("`{name}` is no metric of this version")))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_metric_is_found_by_its_name_and_no_other() {
        let names: BTreeSet<&str> = Metric::all().map(Metric::name).collect();
        assert_eq!(names.len(), Metric::all().count());
        for metric in Metric::all() {
            assert_eq!(Metric::from_name(metric.name()), Some(metric));
            let text = serde_json::to_string(&metric).unwrap();
            assert_eq!(serde_json::from_str::<Metric>(&text).unwrap(), metric);
        }
        assert_eq!(Metric::from_name("no_such_metric"), None);
    }

    /// Names end in the unit that figures are in: so can readers of the file tell.
    #[test]
    fn names_end_in_their_units() {
        for metric in Metric::all() {
            let ends: &[&str] = match metric.unit() {
                Unit::RequestsPerS | Unit::ConnectionsPerS | Unit::BytesPerS => &["_per_s"],
                Unit::Latency => &["_us"],
                Unit::CpuUs => &["_cpu_us_per_request", "_cpu_us_per_connection"],
                Unit::CpuSPerGb => &["_cpu_s_per_gb"],
                Unit::Bytes => &["_bytes"],
                Unit::Share => &["_share"],
                Unit::Count => &["_per_request", "_per_connection", "_per_gb", "s"],
            };
            let name = metric.name();
            assert!(ends.iter().any(|end| name.ends_with(end)), "{name}");
            let more = metric.better() == Some(Better::More);
            assert_eq!(more, name.ends_with("_per_s"), "{name}");
        }
    }

    #[test]
    fn a_latency_is_as_noisy_as_its_kind_and_its_loop() {
        let kind = |metric: Metric, workload| metric.noise_kind(workload).name();
        assert_eq!(kind(Metric::P50, "rr"), "p50 and p90");
        assert_eq!(kind(Metric::P99, "connect"), "p99 and above");
        assert_eq!(kind(Metric::P99, "rr-open"), "open-loop latency");
        let spent = |of| Metric::cpu(of, "rr");
        assert_eq!(kind(spent(Spender::Ztunnels), "rr"), "ztunnel CPU");
        assert_eq!(kind(spent(Spender::ZtunnelA), "rr"), "CPU of one process");
        assert_eq!(kind(spent(Spender::Machine), "rr-open"), "machine CPU");
    }

    #[test]
    fn every_kind_of_metric_reads_well() {
        let cases = [
            ("requests_per_s", 12_345.0, "12.3k req/s"),
            ("bytes_per_s", 1.214e9, "1.21 GB/s"),
            ("p50_us", 85.21, "85.2 us"),
            ("p99_us", 12_345.0, "12.3 ms"),
            ("ztunnel_cpu_us_per_request", 9.876, "9.88 us"),
            ("ztunnel_cpu_s_per_gb", 0.4123, "0.41 s/GB"),
            ("ztunnel_rss_bytes", 45.6e6, "45.6 MB"),
            ("machine_busy_share", 0.934, "93 %"),
            ("errors", 0.0, "0"),
        ];
        for (name, value, text) in cases {
            let metric = Metric::from_name(name).unwrap();
            assert_eq!(metric.show(Some(value)), text);
        }
        assert_eq!(Metric::P99.show(None), "n/a");
        assert_eq!(Metric::P50.show(Some(f64::NAN)), "n/a");
    }
}
