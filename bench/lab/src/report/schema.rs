//! `report.json`, schema 1: what a comparison found, in a form programs can read.
//!
//! The fields up to `ratios` are fixed; those after it were added and may be missing.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Version of the layout written here.
pub const SCHEMA: u32 = 1;

/// A whole comparison.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Document {
    /// [`SCHEMA`].
    pub schema: u32,
    /// When the comparison began, RFC 3339.
    pub when: String,
    /// What was measured.
    pub git: Git,
    /// Where it was measured.
    pub machine: Machine,
    /// `geneve` or `vxlan`; absent if path `tunnel` was not measured.
    pub tunnel_driver: Option<String>,
    /// The command line.
    pub command: String,
    /// Typical relative difference between halves of the same path's trials: intervals must lie
    /// beyond it for a verdict.
    pub noise_threshold: f64,
    /// One per path, scope, workload and number of connections.
    pub rows: Vec<Row>,
    /// Paths against each other, from trials paired by round.
    pub ratios: Vec<Ratio>,
    /// The paths in the order they were given.
    #[serde(default)]
    pub paths: Vec<String>,
    /// How it was measured.
    #[serde(default)]
    pub settings: Settings,
    /// What a reader must know to judge the numbers, one sentence or two each.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// State of the sources.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Git {
    /// Abbreviated commit, `unknown` outside a repository.
    pub sha: String,
    /// Whether tracked files differed from it.
    pub dirty: bool,
}

/// The machine.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Machine {
    /// Processor model.
    pub cpu: String,
    /// Logical CPUs this process may use.
    pub cores: usize,
    /// Kernel release.
    pub kernel: String,
    /// Memory in bytes.
    pub memory_bytes: u64,
}

/// How trials were run.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Settings {
    /// Measured seconds of every trial.
    pub duration_s: f64,
    /// Seconds of load before that, not counted.
    pub warmup_s: f64,
    /// CPUs of the load generator's client and server, in words.
    pub placement: String,
    /// Rounds asked for.
    pub rounds_wanted: u32,
    /// Rounds done.
    pub rounds: u32,
    /// Share of the machine's CPU time that was busy with all labs up and nothing measured.
    pub idle_busy_share: f64,
}

/// Results of one path at one workload.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Row {
    /// `none`, `tunnel`, `ebpf` or the name of a peer.
    pub path: String,
    /// `cross-node` or `same-node`.
    pub scope: String,
    /// `rr`, `stream` or `connect`.
    pub workload: String,
    /// Connections at a time.
    pub connections: u32,
    /// Bytes per request and response; 0 for streams.
    pub size_bytes: u32,
    /// Trials with a result.
    pub trials: usize,
    /// By name.
    pub metrics: BTreeMap<String, Estimate>,
    /// Latency spectrum: quantile and µs, each the median over the trials.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub spectrum_us: Vec<(f64, f64)>,
}

/// A metric over the trials of a row.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Estimate {
    /// Median of `values`.
    pub median: f64,
    /// Bootstrap 95 % confidence interval of the median.
    pub ci95: [f64; 2],
    /// One figure per trial, in the order of the rounds.
    pub values: Vec<f64>,
}

/// One path against another.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Ratio {
    /// Metric compared.
    pub metric: String,
    /// Path in the numerator.
    pub of: String,
    /// Path in the denominator.
    pub to: String,
    /// As in [`Row`].
    pub scope: String,
    /// As in [`Row`].
    pub workload: String,
    /// As in [`Row`].
    pub connections: u32,
    /// Median of the rounds' ratios.
    pub ratio: f64,
    /// Bootstrap 95 % confidence interval of that median.
    pub ci95: [f64; 2],
    /// Whether `of` is better.
    pub verdict: Verdict,
}

/// What a ratio shows.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Verdict {
    /// The interval lies beyond the noise threshold on the good side.
    #[serde(rename = "better")]
    Better,
    /// The interval lies beyond the noise threshold on the bad side.
    #[serde(rename = "worse")]
    Worse,
    /// Anything else.
    #[serde(rename = "no difference shown")]
    NoDifference,
}

impl Verdict {
    /// As in the file.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Better => "better",
            Self::Worse => "worse",
            Self::NoDifference => "no difference shown",
        }
    }
}

impl Document {
    /// The row of a path, if it was measured.
    #[must_use]
    pub fn row(&self, path: &str, scope: &str, workload: &str, connections: u32) -> Option<&Row> {
        self.rows.iter().find(|row| {
            row.path == path
                && row.scope == scope
                && row.workload == workload
                && row.connections == connections
        })
    }

    /// The distinct scope, workload and connections of the rows, in their order.
    #[must_use]
    pub fn cells(&self) -> Vec<(&str, &str, u32)> {
        let mut cells = Vec::new();
        for row in &self.rows {
            let cell = (row.scope.as_str(), row.workload.as_str(), row.connections);
            if !cells.contains(&cell) {
                cells.push(cell);
            }
        }
        cells
    }
}

impl Row {
    /// Median of a metric.
    #[must_use]
    pub fn median(&self, metric: &str) -> Option<f64> {
        self.metrics.get(metric).map(|estimate| estimate.median)
    }
}

/// The metric that says how much a workload moves.
#[must_use]
pub fn throughput_metric(workload: &str) -> &'static str {
    match workload {
        "stream" => "bytes_per_s",
        "connect" => "connections_per_s",
        _ => "requests_per_s",
    }
}

/// The metrics of CPU time at a workload: of all ztunnels, of the whole machine.
#[must_use]
pub fn cpu_metrics(workload: &str) -> [&'static str; 2] {
    match workload {
        "stream" => ["ztunnel_cpu_s_per_gb", "total_cpu_s_per_gb"],
        "connect" => [
            "ztunnel_cpu_us_per_connection",
            "total_cpu_us_per_connection",
        ],
        _ => ["ztunnel_cpu_us_per_request", "total_cpu_us_per_request"],
    }
}
