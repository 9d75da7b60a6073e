//! `report.json`, schema 1: what a comparison found, in a form programs can read.
//!
//! The fields up to `ratios` are fixed; those after it were added and may be missing.

use std::collections::BTreeMap;

use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::metric::Metric;

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
    /// What throughput may differ by from itself: intervals must lie beyond it for a verdict.
    pub noise_threshold: f64,
    /// One per path, scope, workload and number of connections.
    pub rows: Vec<Row>,
    /// Paths against each other, from trials paired by round.
    #[serde(deserialize_with = "known_ratios")]
    pub ratios: Vec<Ratio>,
    /// The paths in the order they were given.
    #[serde(default)]
    pub paths: Vec<String>,
    /// How it was measured.
    #[serde(default)]
    pub settings: Settings,
    /// Noise thresholds by kind of metric, see [`Metric::noise_kind`]; `noise_threshold` is the
    /// one of `throughput`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub noise: BTreeMap<String, f64>,
    /// Where they are from: `a/a` (a path against itself in this session) or `halves` (even
    /// against odd rounds of the same path).
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub noise_source: String,
    /// A path measured a second time in a lab of its own. Its rows and ratios are among the
    /// others; `paths` does not name it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub against_itself: Option<AgainstItself>,
    /// Other ztunnels that were measured.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<Peer>,
    /// Other ztunnels that were asked for and not measured.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped_peers: Vec<SkippedPeer>,
    /// What a reader must know to judge the numbers, one sentence or two each.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// What a path measured against itself showed.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct AgainstItself {
    /// The path.
    pub path: String,
    /// Its second name.
    pub again: String,
    /// Ratios of the one to the other.
    pub ratios: usize,
    /// How many of them a verdict was given on, each judged by the noise of the others.
    pub differing: usize,
}

/// Another ztunnel.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Peer {
    /// Its name as a path.
    pub name: String,
    /// File name of its binary.
    pub binary: String,
    /// The redirection it ran on.
    pub redirect: String,
    /// How it was run: `shared`, `dedicated`, `envoy-tcp`, `envoy-hbone` or `haproxy`.
    pub mode: String,
    /// What a reader must know to judge it, in sentences; may be empty.
    #[serde(default)]
    pub about: String,
}

/// Another ztunnel that was not measured.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct SkippedPeer {
    /// Its name.
    pub name: String,
    /// Why not.
    pub reason: String,
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
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Settings {
    /// Measured seconds of every trial.
    pub duration_s: f64,
    /// Seconds of load before that, not counted.
    pub warmup_s: f64,
    /// CPUs of the load generator's client and server, in words.
    pub placement: String,
    /// Whose rules for services the nodes had: `none`, `iptables` or `nftables`; reports from
    /// before there were any do not say, and had none.
    #[serde(default = "no_services")]
    pub services: String,
    /// Rounds asked for.
    pub rounds_wanted: u32,
    /// Rounds done.
    pub rounds: u32,
    /// Share of the machine's CPU time that was busy with all labs up and nothing measured.
    pub idle_busy_share: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            duration_s: 0.0,
            warmup_s: 0.0,
            placement: String::new(),
            services: no_services(),
            rounds_wanted: 0,
            rounds: 0,
            idle_busy_share: 0.0,
        }
    }
}

fn no_services() -> String {
    "none".to_owned()
}

/// Results of one path at one workload.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Row {
    /// `none`, `tunnel`, `ebpf` or the name of a peer.
    pub path: String,
    /// `cross-node` or `same-node`.
    pub scope: String,
    /// `rr`, `rr-open`, `stream` or `connect`; `redirect-rr` or `redirect-connect` with a plain
    /// listener in ztunnel's place.
    pub workload: String,
    /// Connections at a time.
    pub connections: u32,
    /// Bytes per request and response; 0 for streams.
    pub size_bytes: u32,
    /// Where it ran, if not where the whole comparison did: `one-cpu` or `cpu-per-node`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<String>,
    /// Of `rr-open`: requests due per second, over all connections.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offered_per_s: Option<f64>,
    /// Trials with a result.
    pub trials: usize,
    /// Those that were measured in every trial.
    #[serde(deserialize_with = "known_figures")]
    pub metrics: BTreeMap<Metric, Estimate>,
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
    pub metric: Metric,
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
    /// As in [`Row`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<String>,
    /// As in [`Row`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offered_per_s: Option<f64>,
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

/// What a path is measured at: a row without its path.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cell<'a> {
    /// As in [`Row`].
    pub scope: &'a str,
    /// As in [`Row`].
    pub workload: &'a str,
    /// As in [`Row`].
    pub connections: u32,
    /// As in [`Row`].
    pub placement: Option<&'a str>,
    /// As in [`Row`].
    pub offered_per_s: Option<f64>,
}

impl Cell<'_> {
    /// The cell within its scope, for people: `rr x32`.
    #[must_use]
    pub fn label(&self) -> String {
        let mut label = format!("{} x{}", self.workload, self.connections);
        if let Some(rate) = self.offered_per_s {
            label = format!("{} {}/s", self.workload, super::units::scaled(rate));
        }
        match self.placement {
            Some(placement) => format!("{label} {placement}"),
            None => label,
        }
    }
}

impl Document {
    /// The row of a path, if it was measured.
    #[must_use]
    pub fn row(&self, path: &str, cell: &Cell<'_>) -> Option<&Row> {
        self.rows
            .iter()
            .find(|row| row.path == path && row.cell() == *cell)
    }

    /// One path against another at one metric, if both were measured.
    #[must_use]
    pub fn ratio(&self, cell: &Cell<'_>, metric: Metric, (of, to): (&str, &str)) -> Option<&Ratio> {
        self.ratios.iter().find(|r| {
            r.cell() == *cell && r.metric == metric && (r.of.as_str(), r.to.as_str()) == (of, to)
        })
    }

    /// The distinct cells of the rows, in their order.
    #[must_use]
    pub fn cells(&self) -> Vec<Cell<'_>> {
        let mut cells = Vec::new();
        for cell in self.rows.iter().map(Row::cell) {
            if !cells.contains(&cell) {
                cells.push(cell);
            }
        }
        cells
    }

    /// Whether a ratio is one of a path against itself.
    #[must_use]
    pub fn is_against_itself(&self, ratio: &Ratio) -> bool {
        self.against_itself
            .as_ref()
            .is_some_and(|twice| twice.again == ratio.of)
    }
}

impl Row {
    /// Median of a metric.
    #[must_use]
    pub fn median(&self, metric: Metric) -> Option<f64> {
        self.metrics.get(&metric).map(|estimate| estimate.median)
    }

    /// How much failed in all trials together.
    #[must_use]
    pub fn errors(&self) -> f64 {
        let errors = self.metrics.get(&Metric::Errors);
        errors.map_or(0.0, |errors| errors.values.iter().sum())
    }

    /// What was measured.
    #[must_use]
    pub fn cell(&self) -> Cell<'_> {
        Cell {
            scope: &self.scope,
            workload: &self.workload,
            connections: self.connections,
            placement: self.placement.as_deref(),
            offered_per_s: self.offered_per_s,
        }
    }
}

impl Ratio {
    /// Whether it is of two ways to do the same. `none` is no mesh, so no rival of one; without
    /// ztunnels it is what redirection alone is held against.
    #[must_use]
    pub fn is_of_rivals(&self) -> bool {
        self.to != "none" || is_redirection_only(&self.workload)
    }

    /// What was measured.
    #[must_use]
    pub fn cell(&self) -> Cell<'_> {
        Cell {
            scope: &self.scope,
            workload: &self.workload,
            connections: self.connections,
            placement: self.placement.as_deref(),
            offered_per_s: self.offered_per_s,
        }
    }
}

/// Whether a workload is measured without ztunnels: the price of redirection alone.
#[must_use]
pub fn is_redirection_only(workload: &str) -> bool {
    workload.starts_with("redirect-")
}

/// What of a row this version knows: metrics may be added to the file freely.
fn known_figures<'de, D>(deserializer: D) -> Result<BTreeMap<Metric, Estimate>, D::Error>
where
    D: Deserializer<'de>,
{
    let all = BTreeMap::<String, Estimate>::deserialize(deserializer)?;
    let known = |(name, estimate): (String, _)| Some((Metric::from_name(&name)?, estimate));
    Ok(all.into_iter().filter_map(known).collect())
}

/// The ratios of metrics that this version knows.
fn known_ratios<'de, D>(deserializer: D) -> Result<Vec<Ratio>, D::Error>
where
    D: Deserializer<'de>,
{
    let unknown = |ratio: &Value| {
        let name = ratio["metric"].as_str();
        name.is_some_and(|name| Metric::from_name(name).is_none())
    };
    let mut all = Vec::<Value>::deserialize(deserializer)?;
    all.retain(|ratio| !unknown(ratio));
    all.into_iter()
        .map(|ratio| serde_json::from_value(ratio).map_err(de::Error::custom))
        .collect()
}
