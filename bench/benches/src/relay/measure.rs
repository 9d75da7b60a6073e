//! Trials in interleaved order, and rows from their medians.
//!
//! In every round each backend has one trial of the workload, with fresh processes; the order
//! turns round from one round to the next, so that a drift of the machine hits all alike. A value
//! of a row is the median over the trials of the trial's own figure. tokio's is that of whichever
//! of its flavours has the better median for that metric.

use std::collections::HashMap;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::Backend;
use super::plan::{Kind, Placement, Plan, Workload};
use super::process::Peer;
use crate::rows::{Part, Row, median};

/// Descriptors each process uses besides those of connections.
const OTHER_DESCRIPTORS: u64 = 256;
/// Time that idle connections stand before memory is read: the relay has set up all by then.
const SETTLE: Duration = Duration::from_millis(800);

/// Attempts at a trial that is not valid.
const ATTEMPTS: usize = 3;

type Figures = HashMap<&'static str, f64>;

/// Runs `plan` with the `bench-peer` binary `program` on the CPUs this process may use.
///
/// # Errors
/// The CPUs of this process cannot be listed. A workload that fails is skipped by name.
pub fn run(plan: &Plan, program: &Path) -> Result<Part> {
    let cpus = rt::available_cpus()?;
    let allowed = super::process::allow_descriptors(65_536);
    let mut part = Part::default();
    for workload in &plan.workloads {
        let workload = &fitting(*workload, allowed);
        let name = workload.name();
        if workload.placement == Placement::OtherCore && cpus.len() < 2 {
            part.skipped.push(format!("{name}: needs two CPUs"));
            continue;
        }
        // The relay has two descriptors for each connection.
        let needed = 2 * workload.connections as u64 + OTHER_DESCRIPTORS;
        if allowed < needed {
            let reason = format!("needs {needed} descriptors, {allowed} are allowed (ulimit -n)");
            part.skipped.push(format!("{name}: {reason}"));
            continue;
        }
        let trials = match Trials::run(plan, workload, program, &cpus) {
            Ok(trials) => trials,
            Err(error) => {
                // The other workloads still tell something.
                part.skipped.push(format!("{name}: {error:#}"));
                continue;
            }
        };
        for &(metric, less_is_better) in workload.kind.metrics() {
            trials.rows(workload, metric, less_is_better, &mut part);
        }
        eprintln!("{name}: done");
    }
    Ok(part)
}

/// Fewer idle connections, in thousands, where the descriptors for all are not to be had.
fn fitting(mut workload: Workload, descriptors: u64) -> Workload {
    let most = descriptors.saturating_sub(OTHER_DESCRIPTORS) as usize / 2;
    if workload.kind == Kind::Idle && workload.connections > most && most >= 1_000 {
        workload.connections = most / 1_000 * 1_000;
    }
    workload
}

/// Figures of every backend, by trial.
struct Trials(HashMap<Backend, Vec<Figures>>);

impl Trials {
    fn run(plan: &Plan, workload: &Workload, program: &Path, cpus: &[u32]) -> Result<Self> {
        let mut all: HashMap<Backend, Vec<Figures>> = HashMap::new();
        for round in 0..plan.trials {
            let mut order = Backend::ALL;
            if round % 2 == 1 {
                order.reverse();
            }
            for backend in order {
                let figures = repeated(|| trial(plan, workload, backend, program, cpus));
                let figures = figures.with_context(|| format!("on {backend:?}"))?;
                all.entry(backend).or_default().push(figures);
            }
        }
        Ok(Self(all))
    }

    fn values(&self, backend: Backend, metric: &str) -> Vec<f64> {
        let trials = self.0.get(&backend);
        let values = trials.into_iter().flatten();
        values
            .filter_map(|figures| figures.get(metric).copied())
            .collect()
    }

    fn rows(&self, workload: &Workload, metric: &str, less_is_better: bool, out: &mut Part) {
        let values = |backend| self.values(backend, metric);
        let sign = if less_is_better { 1.0 } else { -1.0 };
        let rank = |backend: &Backend| sign * median(&values(*backend));
        let tokio = [Backend::TokioCurrentThread, Backend::TokioMultiThread]
            .into_iter()
            .min_by(|a, b| rank(a).total_cmp(&rank(b)));
        let baselines = tokio
            .into_iter()
            .chain([Backend::TokioUring, Backend::Monoio]);
        let subject_values = values(Backend::Rt);
        for baseline in baselines {
            let baseline_values = values(baseline);
            let subject = ("rt", median(&subject_values));
            let other = (baseline.baseline(), median(&baseline_values));
            let flavour = match baseline.flavour() {
                "" => String::new(),
                flavour => format!("; tokio {flavour}"),
            };
            let looking = match workload.kind {
                Kind::RrBusyPoll => "; rt polls for up to 200 us before it sleeps",
                _ => "",
            };
            let note = format!("{}{flavour}{looking}", workload.placement.note());
            let mut row = Row::new(&workload.name(), metric, subject, other).with_note(&note);
            row.subject_values.clone_from(&subject_values);
            row.baseline_values = baseline_values;
            if row.ratio.is_finite() {
                out.rows.push(row);
            } else {
                // Memory that did not grow at all, for example.
                let reason = format!("{} against {}", row.subject_value, row.baseline_value);
                out.skipped
                    .push(format!("{} {metric}: {reason}", row.bench));
            }
        }
    }
}

/// The first of at most [`ATTEMPTS`] trials that is valid, or why the last was not. Those that were
/// not are named: on a machine that is busy otherwise a short trial may see no request at all.
fn repeated(trial: impl Fn() -> Result<Figures>) -> Result<Figures> {
    for _ in 1..ATTEMPTS {
        match trial() {
            Ok(figures) => return Ok(figures),
            Err(error) => eprintln!("trial repeated: {error:#}"),
        }
    }
    trial()
}

/// CPUs of the relay, and of client and server.
fn placed(placement: Placement, cpus: &[u32]) -> (&[u32], &[u32]) {
    match placement {
        Placement::OneCore => (&cpus[..1], &cpus[..1]),
        Placement::OtherCore => (&cpus[1..2], &cpus[..1]),
        Placement::Unpinned => (&[], &[]),
    }
}

fn trial(
    plan: &Plan,
    workload: &Workload,
    backend: Backend,
    program: &Path,
    cpus: &[u32],
) -> Result<Figures> {
    let (relay_cpus, other_cpus) = placed(workload.placement, cpus);
    let mode = match workload.kind {
        Kind::Stream | Kind::StreamSplice => "sink",
        _ => "echo",
    };
    let texts = |texts: &[&str]| {
        texts
            .iter()
            .map(|&text| text.to_owned())
            .collect::<Vec<_>>()
    };
    let mut server = Peer::start(program, other_cpus, &texts(&["serve", mode]))?;
    let server_address = server.address()?.to_string();
    let runs = match (workload.kind, backend) {
        (Kind::StreamSplice, Backend::Rt) => Backend::RtSplice,
        (Kind::RrBusyPoll, Backend::Rt) => Backend::RtBusyPoll,
        _ => backend,
    };
    let backend_name = clap::ValueEnum::to_possible_value(&runs)
        .context("every backend has a name")?
        .get_name()
        .to_owned();
    let arguments = texts(&["relay", &backend_name, &server_address]);
    let mut relay = Peer::start(program, relay_cpus, &arguments)?;
    let relay_address = relay.address()?.to_string();
    let arguments = texts(&[
        "load",
        workload.kind.load(),
        &relay_address,
        &workload.connections.to_string(),
        &plan.warmup.as_secs_f64().to_string(),
        &plan.duration.as_secs_f64().to_string(),
    ]);
    let memory_before = relay.anonymous_bytes()?;
    let mut load = Peer::start(program, other_cpus, &arguments)?;
    load.wait_for("measuring")?;
    if workload.kind == Kind::Idle {
        return idle(workload, &relay, memory_before);
    }
    let before = relay.cpu_ns()?;
    load.wait_for("measured")?;
    let cpu_ns = relay.cpu_ns()? - before;
    let report: Value = serde_json::from_str(&load.line()?)?;
    figures(workload.kind, &report, cpu_ns as f64)
}

fn idle(workload: &Workload, relay: &Peer, memory_before: u64) -> Result<Figures> {
    thread::sleep(SETTLE);
    let used = relay.anonymous_bytes()?.saturating_sub(memory_before);
    let (open, wanted) = (relay.descriptors()?, 2 * workload.connections);
    ensure!(
        open >= wanted,
        "the relay has {open} descriptors open, {wanted} are expected: not all connections stand"
    );
    let bytes = used as f64 / workload.connections as f64;
    Ok(Figures::from([("bytes_per_idle_connection", bytes)]))
}

fn figures(kind: Kind, report: &Value, cpu_ns: f64) -> Result<Figures> {
    let metric = |name: &str| {
        let value = report["metrics"][name].as_f64().filter(|&v| v > 0.0);
        value.with_context(|| format!("the load generator saw no {name}"))
    };
    let errors = &report["outcomes"]["errors"];
    ensure!(
        errors.as_u64() == Some(0),
        "{errors} requests failed: {}",
        report["outcomes"]
    );
    let seconds = report["measured_s"].as_f64().unwrap_or_default();
    let per = |rate: f64, scale: f64| cpu_ns / scale / (rate * seconds);
    Ok(match kind {
        Kind::Rr | Kind::RrBusyPoll => {
            let rate = metric("requests_per_s")?;
            Figures::from([
                ("cpu_us_per_request", per(rate, 1e3)),
                ("p50_us", metric("p50_us")?),
                ("requests_per_s", rate),
            ])
        }
        Kind::Stream | Kind::StreamSplice => {
            let rate = metric("bytes_per_s")?;
            Figures::from([
                ("cpu_s_per_gb", per(rate / 1e9, 1e9)),
                ("bytes_per_s", rate),
            ])
        }
        Kind::Connect => {
            let rate = metric("connections_per_s")?;
            Figures::from([
                ("connections_per_s", rate),
                ("cpu_us_per_connection", per(rate, 1e3)),
            ])
        }
        Kind::Idle => Figures::new(),
    })
}
