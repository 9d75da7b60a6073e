//! From trials to the report's document. Pure.

use std::collections::BTreeMap;

use super::Trials;
use super::plan::{Cell, Plan};
use super::stats;
use super::trial::Trial;
use crate::report::schema::{
    Document, Git, Machine, Ratio, Row, SCHEMA, Settings, cpu_metrics, throughput_metric,
};

/// More CPU busy than this with nothing measured is named in the notes.
const QUIET: f64 = 0.05;
/// With fewer rounds verdicts cannot be given.
const ROUNDS_FOR_VERDICTS: u32 = 5;

/// What the document says beside the figures.
#[derive(Clone, Debug)]
pub(super) struct Circumstances {
    pub(super) when: String,
    pub(super) git: Git,
    pub(super) machine: Machine,
    pub(super) tunnel_driver: Option<String>,
    pub(super) command: String,
    pub(super) settings: Settings,
}

/// Builds the document.
pub(super) fn document(plan: &Plan, trials: &Trials, about: Circumstances) -> Document {
    let mut rows = Vec::new();
    for (cell, by_path) in plan.cells.iter().zip(trials) {
        for (path, trials) in plan.paths.iter().zip(by_path) {
            rows.push(row(path.name(), cell, trials));
        }
    }
    let noise_threshold = stats::noise_threshold(rows.iter().flat_map(headline));
    let paths: Vec<String> = plan
        .paths
        .iter()
        .map(|path| path.name().to_owned())
        .collect();
    let mut document = Document {
        schema: SCHEMA,
        when: about.when,
        git: about.git,
        machine: about.machine,
        tunnel_driver: about.tunnel_driver,
        command: about.command,
        noise_threshold,
        ratios: Vec::new(),
        rows,
        paths,
        settings: about.settings,
        notes: Vec::new(),
    };
    document.ratios = ratios(&document);
    document.notes = notes(&document);
    document
}

fn row(path: &str, cell: &Cell, trials: &[Trial]) -> Row {
    let mut values: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for trial in trials {
        for (name, value) in &trial.metrics {
            values.entry(name.clone()).or_default().push(*value);
        }
    }
    // A metric some trials lack cannot be paired by round, and its median would flatter.
    values.retain(|_, values| values.len() == trials.len());
    let metrics = values
        .iter()
        .map(|(name, v)| (name.clone(), stats::estimate(v)))
        .collect();
    Row {
        path: path.to_owned(),
        scope: cell.scope.name().to_owned(),
        workload: cell.workload.name().to_owned(),
        connections: cell.connections,
        size_bytes: cell.size_bytes,
        trials: trials.len(),
        metrics,
        spectrum_us: spectrum(trials),
    }
}

/// The trials' spectra as one: at every quantile the median, as far as all trials reach.
fn spectrum(trials: &[Trial]) -> Vec<(f64, f64)> {
    let Some(shortest) = trials.iter().map(|trial| trial.spectrum.len()).min() else {
        return Vec::new();
    };
    (0..shortest)
        .map(|i| {
            let at: Vec<f64> = trials.iter().map(|trial| trial.spectrum[i].1).collect();
            (trials[0].spectrum[i].0, stats::median(&at))
        })
        .collect()
}

/// The figures noise is judged by: throughput, median latency and CPU cost. Tails vary more, but
/// their own intervals show that.
fn headline(row: &Row) -> impl Iterator<Item = &[f64]> {
    let [_, total] = cpu_metrics(&row.workload);
    [throughput_metric(&row.workload), "p50_us", total]
        .into_iter()
        .filter_map(|name| row.metrics.get(name))
        .map(|estimate| estimate.values.as_slice())
}

/// Every later path against every earlier one, at every metric both have.
fn ratios(document: &Document) -> Vec<Ratio> {
    let mut ratios = Vec::new();
    for (scope, workload, connections) in document.cells() {
        let row = |path: &str| document.row(path, scope, workload, connections);
        for (i, to) in document.paths.iter().enumerate() {
            for of in &document.paths[i + 1..] {
                let (Some(of), Some(to)) = (row(of), row(to)) else {
                    continue;
                };
                for (metric, values) in &of.metrics {
                    let Some(other) = to.metrics.get(metric) else {
                        continue;
                    };
                    // Counts of errors and the share of a busy machine have no better half.
                    if metric == "errors" || metric == "machine_busy_share" {
                        continue;
                    }
                    let pairs = stats::paired_ratio(&values.values, &other.values);
                    let Some(ratio) = pairs else { continue };
                    let more_is_better = metric.ends_with("_per_s");
                    ratios.push(Ratio {
                        metric: metric.clone(),
                        of: of.path.clone(),
                        to: to.path.clone(),
                        scope: scope.to_owned(),
                        workload: workload.to_owned(),
                        connections,
                        ratio: ratio.median,
                        ci95: ratio.ci95,
                        verdict: stats::verdict(&ratio, document.noise_threshold, more_is_better),
                    });
                }
            }
        }
    }
    ratios
}

fn notes(document: &Document) -> Vec<String> {
    let mut notes = vec![
        "cross-node is client-a on node A to server-b on node B; same-node is client-a to server-a, \
         both on node A. rr: requests and responses of 64 bytes on kept connections; stream: bulk \
         bytes from client to server; connect: connect, one request of 64 bytes, close."
            .to_owned(),
    ];
    let has = |path: &str| document.paths.iter().any(|p| p == path);
    if has("none") {
        notes.push(
            "Path none is plain forwarding between the pods: no ztunnel, no mesh, no encryption. \
             It bounds what a mesh can reach; it is no alternative to one."
                .to_owned(),
        );
    }
    if has("tunnel") {
        let driver = document
            .tunnel_driver
            .as_deref()
            .unwrap_or("an unknown driver");
        let mut note = format!(
            "Path tunnel (rule set: hardened) used {driver} tunnels between node and ztunnel."
        );
        if driver == "vxlan" {
            note.push_str(" Upstream used geneve, which this kernel lacks; both wrap in UDP.");
        }
        notes.push(note);
    }
    let settings = &document.settings;
    notes.push(format!("CPU placement: {}.", settings.placement));
    notes.push(
        "All loops are closed: a connection sends its next request when the last response is \
         there, so tail latencies are those at full load and do not count requests a stall kept \
         from being sent."
            .to_owned(),
    );
    if settings.idle_busy_share > QUIET {
        notes.push(format!(
            "The machine was not quiet: {:.0} % of its CPU time was busy with all labs up and \
             nothing measured, which whole-machine figures include.",
            settings.idle_busy_share * 100.0
        ));
    }
    if settings.rounds < settings.rounds_wanted {
        notes.push(format!(
            "Only {} of {} rounds were measured.",
            settings.rounds, settings.rounds_wanted
        ));
    }
    if settings.rounds < ROUNDS_FOR_VERDICTS {
        notes.push(format!(
            "{} rounds are too few for verdicts: all read \"no difference shown\".",
            settings.rounds
        ));
    }
    notes.extend(losses(document));
    notes
}

/// The rows with errors, so that nobody has to look for them.
fn losses(document: &Document) -> Vec<String> {
    let with_errors = document.rows.iter().filter_map(|row| {
        let errors: f64 = row.metrics.get("errors")?.values.iter().sum();
        (errors > 0.0).then(|| {
            format!(
                "Errors: {errors:.0} on path {}, {} {} x{}, in {} trials.",
                row.path, row.scope, row.workload, row.connections, row.trials
            )
        })
    });
    let lines: Vec<String> = with_errors.collect();
    if lines.is_empty() {
        return vec!["No request, connection or stream failed in any trial.".to_owned()];
    }
    lines
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::report::schema::Verdict;

    fn trial(rate: f64, errors: f64) -> Trial {
        let metrics = [
            ("requests_per_s", rate),
            ("p50_us", 1e6 / rate),
            ("errors", errors),
        ];
        Trial {
            metrics: metrics.map(|(name, value)| (name.to_owned(), value)).into(),
            spectrum: vec![(0.0, 10.0), (0.5, 1e6 / rate)],
            loadgen: Value::Null,
        }
    }

    fn compared(rates: [f64; 2], errors: f64) -> Document {
        let names = |names: &[&str]| names.iter().map(|&n| n.to_owned()).collect::<Vec<_>>();
        let plan = Plan::new(&names(&["tunnel", "ebpf"]), &names(&["rr"]), true).unwrap();
        let jitter = [1.0, 1.01, 0.99, 1.0, 1.005, 0.995];
        let row = |rate: f64| jitter.map(|j| trial(rate * j, errors)).to_vec();
        let trials = plan.cells.iter().map(|_| rates.map(row).to_vec()).collect();
        let about = Circumstances {
            when: "2026-01-01T00:00:00Z".to_owned(),
            git: Git {
                sha: "0".to_owned(),
                dirty: false,
            },
            machine: super::super::machine::machine(),
            tunnel_driver: Some("vxlan".to_owned()),
            command: "lab compare".to_owned(),
            settings: Settings {
                rounds: 6,
                rounds_wanted: 6,
                ..Settings::default()
            },
        };
        document(&plan, &trials, about)
    }

    #[test]
    fn rows_and_ratios_of_every_cell_are_there_and_read_back() {
        let document = compared([1000.0, 1300.0], 0.0);
        assert_eq!(document.rows.len(), 12);
        assert_eq!(document.ratios.len(), 6 * 2);
        let json = serde_json::to_string(&document).unwrap();
        let back: Document = serde_json::from_str(&json).unwrap();
        assert_eq!(back.ratios.len(), document.ratios.len());
        assert!(json.contains(r#""verdict":"better""#), "{json}");
    }

    #[test]
    fn a_faster_path_is_better_at_rate_and_at_latency() {
        let document = compared([1000.0, 1300.0], 0.0);
        for ratio in &document.ratios {
            assert_eq!((ratio.of.as_str(), ratio.to.as_str()), ("ebpf", "tunnel"));
            assert_eq!(ratio.verdict, Verdict::Better, "{ratio:?}");
        }
        let slower = compared([1000.0, 800.0], 0.0);
        assert!(
            slower
                .ratios
                .iter()
                .all(|ratio| ratio.verdict == Verdict::Worse)
        );
        let same = compared([1000.0, 1000.0], 0.0);
        assert!(
            same.ratios
                .iter()
                .all(|ratio| ratio.verdict == Verdict::NoDifference)
        );
    }

    #[test]
    fn errors_and_the_tunnel_driver_are_said() {
        let document = compared([1000.0, 1000.0], 2.0);
        let text = document.notes.join("\n");
        assert!(
            text.contains("Errors: 12 on path ebpf, same-node rr x256"),
            "{text}"
        );
        assert!(text.contains("vxlan"), "{text}");
        let clean = compared([1000.0, 1000.0], 0.0).notes.join("\n");
        assert!(
            clean.contains("No request, connection or stream failed"),
            "{clean}"
        );
    }
}
