//! From trials to the report's document. Pure.

use std::collections::BTreeMap;

use super::Trials;
use super::placement::Placement;
use super::plan::{Cell, Plan};
use super::stats;
use super::trial::Trial;
use report::metric::{Metric, NoiseKind, Quantile};
use report::schema::{
    self, AgainstItself, Document, Estimate, Git, Machine, Peer, Ratio, Row, SCHEMA, Settings,
    SkippedPeer, Verdict,
};

/// More CPU busy than this with nothing measured is named in the notes.
const QUIET: f64 = 0.05;
/// With fewer rounds verdicts cannot be given.
const ROUNDS_FOR_VERDICTS: u32 = 5;
/// With fewer A/A ratios of a kind of metric its noise is judged by halves of rows.
const RATIOS_FOR_NOISE: usize = 3;
/// In a closed loop without losses nothing takes as long: the first retransmission of a SYN is
/// sent after a second.
const STALL_US: f64 = 900e3;
/// Open loops that skip more of their schedule than this are saturated: the load generator's own
/// bound.
const SATURATED: f64 = 0.01;

/// What the document says beside the figures.
#[derive(Clone, Debug)]
pub(super) struct RunInfo {
    pub(super) when: String,
    pub(super) git: Git,
    pub(super) machine: Machine,
    pub(super) tunnel_driver: Option<String>,
    pub(super) command: String,
    pub(super) settings: Settings,
    pub(super) peers: Vec<Peer>,
    pub(super) skipped_peers: Vec<SkippedPeer>,
}

/// Builds the document.
pub(super) fn document(plan: &Plan, trials: &Trials, about: RunInfo) -> Document {
    let mut rows = Vec::new();
    for (cell, by_arm) in plan.cells.iter().zip(trials) {
        for (arm, trials) in plan.arms.iter().zip(by_arm) {
            // A path measured twice is so in some cells only.
            if !trials.is_empty() {
                rows.push(row(&arm.name, cell, trials));
            }
        }
    }
    let twice = plan.arms.iter().find_map(|arm| {
        let of = arm.replicate_of.clone()?;
        Some((of, arm.name.clone()))
    });
    let against_itself = twice.map(|(path, again)| AgainstItself {
        path,
        again,
        ratios: 0,
        differing: 0,
    });
    let single = plan.arms.iter().filter(|arm| arm.replicate_of.is_none());
    let mut document = Document {
        schema: SCHEMA,
        when: about.when,
        git: about.git,
        machine: about.machine,
        tunnel_driver: about.tunnel_driver,
        command: about.command,
        noise_threshold: f64::NAN,
        ratios: Vec::new(),
        rows,
        paths: single.map(|arm| arm.name.clone()).collect(),
        settings: about.settings,
        noise: BTreeMap::new(),
        noise_source: String::new(),
        against_itself,
        peers: about.peers,
        skipped_peers: about.skipped_peers,
        notes: Vec::new(),
    };
    judge(&mut document);
    document.notes = notes(&document);
    document
}

/// Sets the ratios, the noise thresholds and the verdicts.
fn judge(document: &mut Document) {
    let (mut ratios, own) = ratios(document);
    let mut from_halves: BTreeMap<NoiseKind, Vec<f64>> = BTreeMap::new();
    for row in document
        .rows
        .iter()
        .filter(|row| document.paths.contains(&row.path))
    {
        for (metric, estimate) in &row.metrics {
            if metric.better().is_none() {
                continue;
            }
            let difference = stats::halves_difference(&estimate.values);
            from_halves
                .entry(metric.noise_kind(&row.workload))
                .or_default()
                .extend(difference);
        }
    }
    let noise_of = |kind: NoiseKind, except: Option<usize>| {
        let from_ratios: Vec<f64> = own
            .iter()
            .filter(|&&at| kind_of(&ratios[at].0) == kind && Some(at) != except)
            .map(|&at| ratios[at].0.ratio.ln())
            .collect();
        if from_ratios.len() >= RATIOS_FOR_NOISE {
            return stats::noise_threshold(&from_ratios);
        }
        stats::noise_threshold(from_halves.get(&kind).map_or(&[], Vec::as_slice))
    };
    for kind in from_halves.keys() {
        if let Some(noise) = noise_of(*kind, None) {
            document.noise.insert(kind.name().to_owned(), noise);
        }
    }
    let of_throughput =
        noise_of(NoiseKind::Throughput, None).or_else(|| stats::noise_threshold(&[0.0]));
    document.noise_threshold = of_throughput.unwrap_or(0.0);
    let source = if own.is_empty() { "halves" } else { "a/a" };
    source.clone_into(&mut document.noise_source);
    let verdicts: Vec<Verdict> = ratios
        .iter()
        .enumerate()
        .map(|(at, (ratio, pairs))| {
            // A ratio of a path to itself must not be what it is judged by.
            let except = own.contains(&at).then_some(at);
            let noise = noise_of(kind_of(ratio), except).unwrap_or(document.noise_threshold);
            let better = ratio.metric.better();
            better.map_or(Verdict::NoDifference, |better| {
                stats::verdict(pairs, noise, better)
            })
        })
        .collect();
    for ((ratio, _), verdict) in ratios.iter_mut().zip(&verdicts) {
        ratio.verdict = *verdict;
    }
    if let Some(itself) = &mut document.against_itself {
        itself.ratios = own.len();
        let differs = |at: &&usize| verdicts[**at] != Verdict::NoDifference;
        itself.differing = own.iter().filter(differs).count();
    }
    document.ratios = ratios.into_iter().map(|(ratio, _)| ratio).collect();
}

fn row(path: &str, cell: &Cell, trials: &[Trial]) -> Row {
    let mut values: BTreeMap<Metric, Vec<f64>> = BTreeMap::new();
    for trial in trials {
        for (metric, value) in &trial.metrics {
            values.entry(*metric).or_default().push(*value);
        }
    }
    // A metric some trials lack cannot be paired by round, and its median would flatter.
    values.retain(|_, values| values.len() == trials.len());
    let metrics = values
        .iter()
        .map(|(metric, v)| (*metric, stats::estimate(v)))
        .collect();
    Row {
        path: path.to_owned(),
        scope: cell.scope.name().to_owned(),
        workload: cell.workload.name().to_owned(),
        connections: cell.connections,
        size_bytes: cell.size_bytes,
        placement: (cell.placement != Placement::Free).then(|| cell.placement.name().to_owned()),
        offered_per_s: cell.load.map(|load| load.per_s),
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

fn kind_of(ratio: &Ratio) -> NoiseKind {
    ratio.metric.noise_kind(&ratio.workload)
}

/// Every later path against every earlier one, at every metric both have, with the pairs it is
/// from; and which of them are of a path against itself. Verdicts are still to come.
fn ratios(document: &Document) -> (Vec<(Ratio, Estimate)>, Vec<usize>) {
    let mut ratios = Vec::new();
    let mut own = Vec::new();
    for cell in document.cells() {
        for (i, to) in document.paths.iter().enumerate() {
            for of in &document.paths[i + 1..] {
                add_ratios(&mut ratios, document, (of, to), &cell);
            }
        }
        if let Some(itself) = &document.against_itself {
            let before = ratios.len();
            add_ratios(&mut ratios, document, (&itself.again, &itself.path), &cell);
            own.extend(before..ratios.len());
        }
    }
    (ratios, own)
}

fn add_ratios(
    ratios: &mut Vec<(Ratio, Estimate)>,
    document: &Document,
    (of, to): (&str, &str),
    cell: &schema::Cell<'_>,
) {
    let (Some(of), Some(to)) = (document.row(of, cell), document.row(to, cell)) else {
        return;
    };
    let compared = |(metric, _): &(&Metric, _)| metric.better().is_some();
    for (metric, values) in of.metrics.iter().filter(compared) {
        let Some(other) = to.metrics.get(metric) else {
            continue;
        };
        let Some(pairs) = stats::paired_ratio(&values.values, &other.values) else {
            continue;
        };
        // Nothing against something is no ratio to tell noise from.
        if pairs.median <= 0.0 {
            continue;
        }
        let ratio = Ratio {
            metric: *metric,
            of: of.path.clone(),
            to: to.path.clone(),
            scope: of.scope.clone(),
            workload: of.workload.clone(),
            connections: of.connections,
            placement: of.placement.clone(),
            offered_per_s: of.offered_per_s,
            ratio: pairs.median,
            ci95: pairs.ci95,
            verdict: Verdict::NoDifference,
        };
        ratios.push((ratio, pairs));
    }
}

fn notes(document: &Document) -> Vec<String> {
    let mut notes = vec![
        "cross-node is client-a on node A to server-b on node B; same-node is client-a to \
         server-a, both on node A. rr: requests and responses of 64 bytes on kept connections; \
         stream: bulk bytes from client to server; connect: connect, one request of 64 bytes, \
         close."
            .to_owned(),
    ];
    notes.push(about_noise(document));
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
    let mut rows = document.rows.iter();
    if rows.any(|row| schema::is_redirection_only(&row.workload)) {
        notes.push(ALONE.to_owned());
    }
    let settings = &document.settings;
    notes.extend(about_peers(document));
    notes.push(about_services(&settings.services));
    notes.push(format!("CPU placement: {}. {PLACED}", settings.placement));
    notes.push(LOOPS.to_owned());
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

const PLACED: &str = "Rows marked one-cpu have client, server and all ztunnel threads on one \
    CPU; cpu-per-node gives node A's client and ztunnel one and node B's server and ztunnel \
    another. Latency of a lone connection depends on it more than on anything else.";
/// What the nodes' rules for services mean for the figures.
fn about_services(services: &str) -> String {
    match services {
        "none" => "Services: none. The nodes only forward: no rules of kube-proxy, and on \
                           paths none and ebpf no conntrack."
            .to_owned(),
        kube_proxy => format!(
            "Services: {kube_proxy}, as in a cluster: the nodes have kube-proxy's rules and \
             conntrack on what goes through their stack. Compare with earlier reports, which had \
             none, by --services none."
        ),
    }
}

const ALONE: &str = "redirect-rr and redirect-connect are rr and connect without ztunnels: what \
    is redirected is answered by the load generator's echo server, on a transparent listener for \
    each CPU in ztunnel's place, in labs of their own; in path none the same server runs in the \
    pod that is dialled. They show what redirection alone costs. No path is measured against \
    itself at them.";
const LOOPS: &str = "rr, stream and connect are closed loops: a connection sends its next request \
    when the last response is there, so tail latencies are those at full load and do not count \
    requests a stall kept from being sent. rr-open sends at a set rate, with Poisson arrivals on \
    32 connections, the same rate for every path; its latencies count from when a request was \
    due.";

fn about_noise(document: &Document) -> String {
    let kinds: Vec<String> = document
        .noise
        .iter()
        .map(|(kind, noise)| format!("{kind} {:.1} %", noise * 100.0))
        .collect();
    let kinds = kinds.join(", ");
    match &document.against_itself {
        Some(itself) => format!(
            "A/A: path {} was measured against itself ({}: a second lab, its trials among the \
             others). {} of {} such ratios show a difference, each judged by the noise of the \
             others; one in twenty would do so by chance. Noise thresholds, which nine in ten \
             A/A ratios stay below: {kinds}.",
            itself.path, itself.again, itself.differing, itself.ratios
        ),
        None => format!(
            "No path was measured against itself (--aa off), so the noise thresholds are from \
             even against odd rounds of the same path, which cannot see what one lab differs by \
             from another: {kinds}."
        ),
    }
}

fn about_peers(document: &Document) -> Vec<String> {
    let measured = document.peers.iter().map(|peer| {
        let is = format!(
            "Peer {} is {}, in {} mode on redirection {}.",
            peer.name, peer.binary, peer.mode, peer.redirect
        );
        format!("{is} {}", peer.about).trim_end().to_owned()
    });
    let skipped = document
        .skipped_peers
        .iter()
        .map(|peer| format!("Peer {} was skipped: {}.", peer.name, peer.reason));
    measured.chain(skipped).collect()
}

/// The rows with errors or beyond what they can serve, so that nobody has to look for them.
fn losses(document: &Document) -> Vec<String> {
    let with_errors = document.rows.iter().filter_map(|row| {
        let errors = row.errors();
        (errors > 0.0).then(|| {
            format!(
                "Errors: {errors:.0} on path {}, {} {}, in {} trials.",
                row.path,
                row.scope,
                row.cell().label(),
                row.trials
            )
        })
    });
    let mut lines: Vec<String> = with_errors.collect();
    if lines.is_empty() {
        lines.push("No request, connection or stream failed in any trial.".to_owned());
    }
    lines.extend(document.rows.iter().filter_map(stalls));
    lines.extend(document.rows.iter().filter_map(|row| {
        let skipped = row
            .median(Metric::SkippedShare)
            .filter(|&share| share > SATURATED)?;
        Some(format!(
            "Saturated: path {} skipped {:.0} % of what was due at {} {}; its latencies there grow \
             with the length of the trial.",
            row.path,
            skipped * 100.0,
            row.scope,
            row.cell().label()
        ))
    }));
    lines
}

/// What a closed loop hides: connections that waited for a retransmission sent nothing meanwhile.
fn stalls(row: &Row) -> Option<String> {
    let longest = &row.metrics.get(&Metric::Latency(Quantile::Max))?.values;
    let stalled = longest.iter().filter(|&&us| us >= STALL_US).count();
    let closed = row.offered_per_s.is_none();
    (stalled > 0 && closed).then(|| {
        format!(
            "Stalls: path {}, {} {}: the longest request took {:.1} s or more in {stalled} of {} \
             trials, as a lost SYN or segment makes it. Connections that wait send nothing, so \
             its percentiles are those of the others; its rate is what counts.",
            row.path,
            row.scope,
            row.cell().label(),
            STALL_US / 1e6,
            row.trials
        )
    })
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use report::schema::Verdict;

    fn trial(rate: f64, errors: f64) -> Trial {
        let metrics = [
            (Metric::throughput("rr"), rate),
            (Metric::P50, 1e6 / rate),
            (Metric::Errors, errors),
        ];
        Trial {
            metrics: metrics.into(),
            spectrum: vec![(0.0, 10.0), (0.5, 1e6 / rate)],
            loadgen: Value::Null,
        }
    }

    fn compared(rates: [f64; 2], errors: f64) -> Document {
        of_paths(&["tunnel", "ebpf"], rates, errors)
    }

    fn of_paths(paths: &[&str], rates: [f64; 2], errors: f64) -> Document {
        let names = |names: &[&str]| names.iter().map(|&n| n.to_owned()).collect::<Vec<_>>();
        let plan = Plan::new(&names(paths), &names(&["rr"]), true).unwrap();
        let jitter = [1.0, 1.01, 0.99, 1.0, 1.005, 0.995];
        let row = |rate: f64| jitter.map(|j| trial(rate * j, errors)).to_vec();
        let trials = plan.cells.iter().map(|_| rates.map(row).to_vec()).collect();
        let about = RunInfo {
            when: "2026-01-01T00:00:00Z".to_owned(),
            git: Git {
                sha: "0".to_owned(),
                dirty: false,
            },
            machine: crate::machine::machine(),
            tunnel_driver: Some("vxlan".to_owned()),
            command: "lab compare".to_owned(),
            settings: Settings {
                rounds: 6,
                rounds_wanted: 6,
                ..Settings::default()
            },
            peers: Vec::new(),
            skipped_peers: vec![SkippedPeer {
                name: "other".to_owned(),
                reason: "it is not there".to_owned(),
            }],
        };
        document(&plan, &trials, about)
    }

    #[test]
    fn rows_and_ratios_of_every_cell_are_there_and_read_back() {
        let document = compared([1000.0, 1300.0], 0.0);
        assert_eq!(document.rows.len(), 10);
        assert_eq!(document.ratios.len(), 5 * 2);
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
    fn a_path_against_itself_sets_the_noise_and_is_counted() {
        let document = of_paths(&["ebpf", "ebpf"], [1000.0, 1000.0], 0.0);
        let itself = document.against_itself.as_ref().unwrap();
        assert_eq!(
            (itself.path.as_str(), itself.again.as_str()),
            ("ebpf", "ebpf#2")
        );
        assert_eq!((itself.ratios, itself.differing), (5 * 2, 0));
        assert_eq!(document.paths, ["ebpf"]);
        assert_eq!(document.noise_source, "a/a");
        assert!((document.noise_threshold - 0.02).abs() < 1e-9);
        assert!(
            document
                .ratios
                .iter()
                .all(|ratio| document.is_against_itself(ratio))
        );
        // Labs that differ by a tenth throughout raise the threshold to that.
        let uneven = of_paths(&["ebpf", "ebpf"], [1000.0, 900.0], 0.0);
        assert!(
            (uneven.noise_threshold - 1.0 / 9.0).abs() < 0.01,
            "{}",
            uneven.noise_threshold
        );
        assert_eq!(uneven.against_itself.unwrap().differing, 0);
        let halves = compared([1000.0, 1000.0], 0.0);
        assert_eq!(halves.noise_source, "halves");
    }

    #[test]
    fn peers_left_out_are_named() {
        let notes = compared([1000.0, 1000.0], 0.0).notes.join("\n");
        assert!(
            notes.contains("Peer other was skipped: it is not there."),
            "{notes}"
        );
    }

    #[test]
    fn what_a_closed_loop_hides_is_said() {
        let mut document = compared([1000.0, 1000.0], 0.0);
        let row = &mut document.rows[1];
        assert_eq!(stalls(row), None);
        let longest = stats::estimate(&[2e3, 1.01e6, 3e3]);
        row.metrics.insert(Metric::Latency(Quantile::Max), longest);
        let text = stalls(row).unwrap();
        assert!(
            text.contains("path ebpf, cross-node rr x1: the longest"),
            "{text}"
        );
        assert!(text.contains("in 1 of 6 trials"), "{text}");
        row.offered_per_s = Some(100.0);
        assert_eq!(stalls(row), None);
    }

    #[test]
    fn errors_and_the_tunnel_driver_are_said() {
        let document = compared([1000.0, 1000.0], 2.0);
        let text = document.notes.join("\n");
        assert!(
            text.contains("Errors: 12 on path ebpf, same-node rr x32"),
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
