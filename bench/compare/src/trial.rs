//! One trial: a fresh server, a fresh client, counters sampled as the measured window begins and
//! ends.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, ChildStdout, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use report::metric::{Metric, Quantile, Spender, Work};
use serde_json::Value;

use super::kernel::Readings;
use super::placement::{Bound, Cpus, Pin};
use super::plan::{Cell, Scope, Workload};
use super::sample::{Role, Sample, Spent, Watched, resident_bytes};
use lab::Lab;
use lab::Services;

const CLIENT: &str = "client-a";
/// Server ports in turn, so that a trial does not meet the last one's `TIME_WAIT`. Below the
/// pods' source ports and away from ztunnel's own.
const FIRST_PORT: u32 = 10_000;
const PORTS: u32 = 2000;
/// A latency quantile counts only with as many samples as put a hundred above it.
const P999_SAMPLES: f64 = 100_000.0;

/// What all trials have in common.
#[derive(Clone, Debug)]
pub(super) struct Setup<'a> {
    pub(super) loadgen: &'a Path,
    pub(super) scratch: &'a Path,
    pub(super) duration: Duration,
    pub(super) warmup: Duration,
    pub(super) pin: &'a Pin,
    /// Of all paths' labs.
    pub(super) services: Services,
}

/// What a trial found.
#[derive(Clone, Debug)]
pub(super) struct Trial {
    /// What could not be measured is missing.
    pub(super) metrics: BTreeMap<Metric, f64>,
    /// Quantile and µs.
    pub(super) spectrum: Vec<(f64, f64)>,
    /// The load generator's own document.
    pub(super) loadgen: Value,
}

impl Trial {
    pub(super) fn metric(&self, metric: Metric) -> Option<f64> {
        self.metrics.get(&metric).copied()
    }
}

/// A child process that does not outlive its trial.
#[derive(Debug)]
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Fails only if it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Setup<'_> {
    /// Runs one trial. Failing requests are figures; only what keeps the trial from running at
    /// all is an error.
    pub(super) fn run(&self, lab: &Lab, cell: &Cell, number: u32) -> Result<Trial> {
        let host = cell.scope.server();
        let port = FIRST_PORT + number % PORTS;
        let to = format!("{}:{port}", Lab::address(host)?);
        let cpus = self
            .pin
            .cpus(cell.placement, cell.scope == Scope::SameNode)?;
        let pids = lab.ztunnel_pids();
        // Redirection alone: what stands in the place of the client's ztunnel answers itself.
        let answers = pids.first().filter(|_| cell.workload.redirection_only());
        let server = match answers {
            Some(_) => None,
            None => Some(self.start_server(lab, host, &to, cell, &cpus)?),
        };
        let json = self.scratch.join("trial.json");
        // Yesterday's file must not pass for today's.
        let _ = fs::remove_file(&json);
        let mut bound = Bound::default();
        for (pid, cpu) in pids.iter().zip(cpus.ztunnels.into_iter().flatten()) {
            bound.bind(*pid, cpu)?;
        }
        let mut command = lab.command(CLIENT, self.loadgen)?;
        command
            .args(self.client_arguments(cell, &to, &cpus))
            .arg("--json")
            .arg(&json);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut client = Killed(command.spawn().context("starting loadgen on client-a")?);
        let stdout = client.0.stdout.take().context("loadgen has no stdout")?;
        let ztunnels = if answers.is_some() { &[] } else { &pids[..] };
        let server = answers
            .copied()
            .or_else(|| server.as_ref().map(|server| server.0.id()));
        let spent = observe(stdout, lab, &watched(ztunnels, client.0.id(), server))?;
        let rss = resident_bytes(ztunnels);
        let mut complaint = String::new();
        if let Some(stderr) = &mut client.0.stderr {
            let _ = stderr.read_to_string(&mut complaint);
        }
        let status = client.0.wait().context("waiting for loadgen")?;
        let document = fs::read(&json)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let Some(document) = document else {
            bail!(
                "loadgen to {to} ended with {status} and no results: {}",
                complaint.trim()
            );
        };
        Ok(evaluate(
            cell.workload,
            document,
            spent.as_ref(),
            ztunnels,
            rss,
        ))
    }

    fn start_server(
        &self,
        lab: &Lab,
        host: &str,
        to: &str,
        cell: &Cell,
        cpus: &Cpus,
    ) -> Result<Killed> {
        let mut command = lab.command(host, self.loadgen)?;
        command.args([
            "serve",
            "--listen",
            to,
            "--mode",
            cell.workload.server_mode(),
        ]);
        if let Some(cpus) = &cpus.server {
            command.args(["--cpus", cpus]);
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = command
            .spawn()
            .with_context(|| format!("starting loadgen serve on {host}"))?;
        let mut server = Killed(child);
        let mut line = String::new();
        if let Some(stdout) = &mut server.0.stdout {
            // One line only: the pipe stays open, and what comes at the end is not wanted.
            BufReader::new(stdout)
                .read_line(&mut line)
                .with_context(|| format!("reading from loadgen serve on {host}"))?;
        }
        if !line.starts_with("listening on ") {
            let mut complaint = String::new();
            if let Some(stderr) = &mut server.0.stderr {
                let _ = stderr.read_to_string(&mut complaint);
            }
            bail!(
                "loadgen serve on {host} did not start: {}",
                complaint.trim()
            );
        }
        Ok(server)
    }

    fn client_arguments(&self, cell: &Cell, to: &str, cpus: &Cpus) -> Vec<String> {
        let text = |text: &str| text.to_owned();
        let connections = match cell.workload {
            Workload::Connect | Workload::RedirectConnect => "--concurrency",
            _ => "--connections",
        };
        let mut arguments = vec![
            text(cell.workload.command()),
            text("--to"),
            text(to),
            text("--markers"),
            text(connections),
            cell.connections.to_string(),
            text("--duration"),
            self.duration.as_secs_f64().to_string(),
            text("--warmup"),
            self.warmup.as_secs_f64().to_string(),
        ];
        match cell.workload {
            Workload::Stream => arguments.extend([text("--direction"), text("up")]),
            _ => arguments.extend([text("--size"), cell.size_bytes.to_string()]),
        }
        if let Some(load) = cell.load {
            arguments.extend([text("--rate"), load.per_s.to_string()]);
            // Independent clients do not take turns.
            arguments.extend([text("--arrivals"), text("poisson")]);
        }
        if let Some(cpus) = &cpus.client {
            arguments.extend([text("--cpus"), text(cpus)]);
        }
        arguments
    }
}

/// The processes of a trial by what they do. Of several proxies the first half is node A's.
fn watched(ztunnels: &[u32], client: u32, server: Option<u32>) -> Vec<Watched> {
    let of = |role| move |&pid: &u32| Watched { role, pid };
    let (a, b) = ztunnels.split_at(ztunnels.len() / 2);
    let ztunnels = a
        .iter()
        .map(of(Role::ZtunnelA))
        .chain(b.iter().map(of(Role::ZtunnelB)));
    let ends = [(Role::Client, Some(client)), (Role::Server, server)];
    let ends = ends
        .into_iter()
        .filter_map(|(role, pid)| Some(Watched { role, pid: pid? }));
    ztunnels.chain(ends).collect()
}

/// What passed in a trial's measured window.
#[derive(Clone, Debug)]
struct Window {
    spent: Spent,
    readings: Readings,
}

/// Samples as the client marks its window; `None` if there was none. CPU time is read first at
/// both ends: the other readings take a millisecond or two themselves.
fn observe(stdout: ChildStdout, lab: &Lab, watched: &[Watched]) -> Result<Option<Window>> {
    let (mut begin, mut window) = (None, None);
    for line in BufReader::new(stdout).lines() {
        match line.context("reading from loadgen")?.as_str() {
            "measuring" => begin = Some((Sample::take(watched)?, Readings::take(lab))),
            "measured" => {
                if let Some((sample, readings)) = &begin {
                    let spent = Sample::take(watched)?.since(sample);
                    let readings = Readings::take(lab).since(readings);
                    window = Some(Window { spent, readings });
                }
            }
            _ => {}
        }
    }
    Ok(window)
}

/// The report's metrics from the load generator's and the kernel's.
fn evaluate(
    workload: Workload,
    document: Value,
    window: Option<&Window>,
    pids: &[u32],
    rss: u64,
) -> Trial {
    let figure = |name: &str| document["metrics"][name].as_f64();
    let mut metrics = BTreeMap::new();
    let errors = document["outcomes"]["errors"].as_u64().unwrap_or(0);
    metrics.insert(Metric::Errors, errors as f64);
    let besides: &[Metric] = match workload {
        Workload::Rr | Workload::RedirectRr => &[Metric::Throughput(Work::Bytes)],
        Workload::RrOpen => &[Metric::ServiceP50, Metric::ServiceP99],
        Workload::Connect | Workload::RedirectConnect | Workload::Stream => &[],
    };
    let p999 = (figure("count") >= Some(P999_SAMPLES)).then_some(Quantile::P999);
    let latencies = [Quantile::P50, Quantile::P90, Quantile::P99, Quantile::Max]
        .into_iter()
        .chain(p999)
        .map(Metric::Latency);
    let wanted = [Metric::throughput(workload.name())];
    for metric in wanted.iter().chain(besides).copied().chain(latencies) {
        // The load generator has the same names.
        if let Some(value) = figure(metric.name()) {
            metrics.insert(metric, value);
        }
    }
    if let Some(scheduled) = figure("scheduled").filter(|&scheduled| scheduled > 0.0) {
        let skipped = document["skipped"].as_f64().unwrap_or(0.0);
        metrics.insert(Metric::SkippedShare, skipped / scheduled);
    }
    if let Some(window) = window {
        costs(&mut metrics, workload, &document, window);
    }
    if !pids.is_empty() {
        metrics.insert(Metric::ZtunnelMemory, rss as f64);
    }
    let spectrum = serde_json::from_value(document["spectrum_us"].clone()).unwrap_or_default();
    Trial {
        metrics,
        spectrum,
        loadgen: document,
    }
}

/// What the window cost, per request, connection or GB.
fn costs(
    metrics: &mut BTreeMap<Metric, f64>,
    workload: Workload,
    document: &Value,
    window: &Window,
) {
    let Window { spent, readings } = window;
    if let Some(entries) = readings.conntrack_entries {
        metrics.insert(Metric::ConntrackEntries, entries as f64);
    }
    let work = Work::of(workload.name());
    let rate = document["metrics"][Metric::Throughput(work).name()].as_f64();
    let measured_s = document["measured_s"].as_f64().unwrap_or(0.0);
    let amount = rate.unwrap_or(0.0) * measured_s;
    if amount <= 0.0 {
        return;
    }
    // CPU time is in µs per request or connection and in s per GB, other costs per GB likewise.
    let (cpu_scale, scale) = match work {
        Work::Request | Work::Connection => (1e6, 1.0),
        Work::Bytes => (1e9, 1e9),
    };
    let mut set = |metric, value: f64| {
        metrics.insert(metric, value / amount);
    };
    let mut cpu = |of, seconds: f64| set(Metric::Cpu(of, work), seconds * cpu_scale);
    cpu(Spender::Machine, spent.machine_s);
    cpu(Spender::SoftInterrupts, spent.softirq_s);
    for role in Role::ALL {
        if let Some(seconds) = spent.of(role) {
            cpu(role.spender(), seconds);
        }
    }
    if let Some(seconds) = spent.ztunnels_s() {
        cpu(Spender::Ztunnels, seconds);
        set(Metric::Switches(work), spent.switches as f64 * scale);
    }
    if let Some(enters) = readings.enters {
        set(Metric::Enters(work), enters as f64 * scale);
    }
    if let Some(packets) = readings.tunnel_packets {
        set(Metric::TunnelPackets(work), packets as f64 * scale);
    }
    metrics.insert(Metric::BusyShare, spent.busy_share);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn window(with_ztunnels: bool) -> Window {
        let mut processes = vec![(Role::Client, 0.3), (Role::Server, 0.1)];
        if with_ztunnels {
            processes.extend([(Role::ZtunnelA, 0.2), (Role::ZtunnelB, 0.3)]);
        }
        Window {
            spent: Spent {
                processes,
                switches: 20_000,
                machine_s: 2.0,
                softirq_s: 0.25,
                busy_share: 0.8,
            },
            readings: Readings {
                enters: Some(5000),
                tunnel_packets: None,
                conntrack_entries: Some(12),
            },
        }
    }

    /// By its name in the report.
    fn figure(trial: &Trial, name: &str) -> Option<f64> {
        trial.metric(Metric::from_name(name).unwrap())
    }

    #[test]
    fn cpu_time_is_divided_by_what_was_done_in_the_window() {
        let document = json!({
            "measured_s": 2.0,
            "metrics": {
                "requests_per_s": 5000.0, "p50_us": 90.0, "p999_us": 400.0, "count": 10000.0,
            },
            "outcomes": {"ok": 10000, "errors": 3},
            "spectrum_us": [[0.0, 50.0], [0.5, 90.0]],
        });
        let trial = evaluate(Workload::Rr, document, Some(&window(true)), &[1, 2], 1000);
        assert_eq!(figure(&trial, "ztunnel_cpu_us_per_request"), Some(50.0));
        assert_eq!(figure(&trial, "ztunnel_a_cpu_us_per_request"), Some(20.0));
        assert_eq!(figure(&trial, "ztunnel_b_cpu_us_per_request"), Some(30.0));
        assert_eq!(figure(&trial, "client_cpu_us_per_request"), Some(30.0));
        assert_eq!(figure(&trial, "server_cpu_us_per_request"), Some(10.0));
        assert_eq!(figure(&trial, "total_cpu_us_per_request"), Some(200.0));
        assert_eq!(figure(&trial, "softirq_cpu_us_per_request"), Some(25.0));
        assert_eq!(figure(&trial, "ztunnel_switches_per_request"), Some(2.0));
        assert_eq!(figure(&trial, "ztunnel_enters_per_request"), Some(0.5));
        assert_eq!(figure(&trial, "conntrack_entries"), Some(12.0));
        assert_eq!(figure(&trial, "tunnel_packets_per_request"), None);
        assert_eq!(figure(&trial, "ztunnel_rss_bytes"), Some(1000.0));
        assert_eq!(figure(&trial, "errors"), Some(3.0));
        assert_eq!(figure(&trial, "p50_us"), Some(90.0));
        // Ten samples lie above it: too few.
        assert_eq!(figure(&trial, "p999_us"), None);
        assert_eq!(trial.spectrum, [(0.0, 50.0), (0.5, 90.0)]);
    }

    #[test]
    fn an_open_loop_says_what_it_skipped() {
        let document = json!({
            "measured_s": 1.0,
            "skipped": 50,
            "metrics": {"requests_per_s": 950.0, "scheduled": 1000.0, "service_p99_us": 7.0},
            "outcomes": {"ok": 950, "errors": 0},
        });
        let trial = evaluate(Workload::RrOpen, document, None, &[], 0);
        assert_eq!(figure(&trial, "skipped_share"), Some(0.05));
        assert_eq!(figure(&trial, "service_p99_us"), Some(7.0));
    }

    #[test]
    fn streams_count_by_the_gigabyte_and_without_ztunnels_there_is_no_ztunnel_cost() {
        let document = json!({"measured_s": 1.0, "metrics": {"bytes_per_s": 4e9}, "outcomes": {}});
        let trial = evaluate(Workload::Stream, document, Some(&window(false)), &[], 0);
        assert_eq!(figure(&trial, "total_cpu_s_per_gb"), Some(0.5));
        assert_eq!(figure(&trial, "client_cpu_s_per_gb"), Some(0.075));
        assert_eq!(figure(&trial, "ztunnel_cpu_s_per_gb"), None);
        assert_eq!(figure(&trial, "ztunnel_a_cpu_s_per_gb"), None);
        assert_eq!(figure(&trial, "ztunnel_rss_bytes"), None);
    }

    #[test]
    fn a_trial_without_a_single_success_has_errors_and_no_cost_per_request() {
        let document = json!({
            "measured_s": 2.0,
            "metrics": {"requests_per_s": 0.0},
            "outcomes": {"ok": 0, "errors": 32},
        });
        let trial = evaluate(Workload::Rr, document, None, &[1], 0);
        assert_eq!(figure(&trial, "requests_per_s"), Some(0.0));
        assert_eq!(figure(&trial, "errors"), Some(32.0));
        assert_eq!(figure(&trial, "total_cpu_us_per_request"), None);
    }
}
