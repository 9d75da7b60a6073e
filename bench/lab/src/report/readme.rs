//! The README's results: what is between two markers, made from a directory of results.
//!
//! Nothing there is written by hand. A test renders the section again and compares it with what
//! the README has, so that neither can change without the other.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use super::alone::{self, ratio};
use super::schema::{
    Cell, Document, Peer, Row, cpu_metrics, is_redirection_only, throughput_metric,
};
use super::units::with_unit;
use super::{OVERVIEW, read, tally};

const BEGIN: &str = "<!-- results:begin -->";
const END: &str = "<!-- results:end -->";
/// The paths whose ratio is shown.
const OF: &str = "ebpf";
const TO: &str = "tunnel";
/// What of the micro-benchmarks is shown, by the beginnings of names.
const BENCHES: [&str; 3] = ["relay/", "hbone/", "tls/"];
/// Latencies and rates of the relay are in `bench.json`; these say what it costs.
const COSTS: [&str; 6] = [
    "cpu_us_per_request",
    "cpu_s_per_gb",
    "cpu_us_per_connection",
    "bytes_per_idle_connection",
    "instructions",
    "ns_per_record",
];

/// Writes the results in `directory` between the markers of `readme`.
///
/// # Errors
/// Results that cannot be read, or a README without the markers.
pub fn update(directory: &Path, readme: &Path) -> Result<()> {
    let text =
        fs::read_to_string(readme).with_context(|| format!("reading {}", readme.display()))?;
    let link = link(directory, readme)?;
    let section = section(directory, &link)?;
    let text = replaced(&text, &section).with_context(|| format!("{}", readme.display()))?;
    fs::write(readme, text).with_context(|| format!("writing {}", readme.display()))
}

/// The newest of the comparisons in the directories given that has both paths of the ratio, full
/// ones before quick ones.
///
/// # Errors
/// None of them is such a comparison.
pub fn newest(directories: impl IntoIterator<Item = PathBuf>) -> Result<PathBuf> {
    let measured = |document: &Document, path: &str| document.paths.iter().any(|p| p == path);
    let found = directories.into_iter().filter_map(|directory| {
        let document = read(&directory).ok()?;
        let both = measured(&document, OF) && measured(&document, TO);
        let full = !document.command.contains("--quick");
        both.then_some((full, document.when, directory))
    });
    let newest = found.max();
    newest
        .map(|(_, _, directory)| directory)
        .with_context(|| format!("no results of {OF} and {TO}: run `make compare` first"))
}

/// The directories directly in `results`.
///
/// # Errors
/// `results` cannot be read.
pub fn directories(results: &Path) -> Result<Vec<PathBuf>> {
    let entries =
        fs::read_dir(results).with_context(|| format!("reading {}", results.display()))?;
    let paths = entries.map(|entry| entry.map(|entry| entry.path()));
    paths
        .collect::<Result<_, _>>()
        .with_context(|| format!("reading {}", results.display()))
}

/// How a file beside `readme` refers to `directory`.
fn link(directory: &Path, readme: &Path) -> Result<String> {
    let absolute = |path: &Path| {
        fs::canonicalize(path).with_context(|| format!("{}: not there", path.display()))
    };
    let readme = absolute(readme)?;
    let directory = absolute(directory)?;
    let root = readme.parent().unwrap_or(&readme);
    let below = directory.strip_prefix(root).unwrap_or(&directory);
    Ok(below.display().to_string())
}

/// `text` with `section` between its markers.
fn replaced(text: &str, section: &str) -> Result<String> {
    let (Some(begin), Some(end)) = (text.find(BEGIN), text.find(END)) else {
        bail!("has no lines {BEGIN} and {END} to put results between");
    };
    if end < begin {
        bail!("{END} comes before {BEGIN}");
    }
    let (before, after) = (&text[..begin + BEGIN.len()], &text[end..]);
    Ok(format!("{before}\n{section}{after}"))
}

/// What belongs between the markers; `link` is how it refers to `directory`.
fn section(directory: &Path, link: &str) -> Result<String> {
    let document = read(directory)?;
    let mut text = String::new();
    if directory.join(OVERVIEW).exists() {
        let _ = writeln!(text, "![Requests per second and CPU]({link}/{OVERVIEW})\n");
    }
    text.push_str(&about(&document, link));
    ratios(&mut text, &document);
    redirection_alone(&mut text, &document);
    rivals(&mut text, &document);
    medians(&mut text, &document);
    let bench = directory.join("bench.json");
    if bench.exists() {
        benches(&mut text, &bench, link)?;
    }
    Ok(text)
}

fn about(document: &Document, link: &str) -> String {
    let (machine, settings) = (&document.machine, &document.settings);
    let mut text = format!(
        "`{}` on {}, {} CPUs, Linux {}, commit {}{}; {} rounds of {} s per trial, paths \
         interleaved.\nDetails and every trial: [report.html]({link}/report.html), \
         [report.md]({link}/report.md), [{link}]({link}).\n",
        document.command,
        machine.cpu,
        machine.cores,
        machine.kernel,
        document.git.sha,
        if document.git.dirty {
            " with changes"
        } else {
            ""
        },
        settings.rounds,
        settings.duration_s,
    );
    let _ = writeln!(
        text,
        "\n`{OF}` against `{TO}`, open loops included: {}.",
        tally::sentence(document, OF, TO)
    );
    if let Some(itself) = &document.against_itself {
        let _ = writeln!(
            text,
            "`{}` against itself: no difference shown in {} of {} ratios.",
            itself.path,
            itself.ratios - itself.differing,
            itself.ratios
        );
    }
    text
}

/// Closed loops: open ones are a plot of the report.
fn cells(document: &Document) -> Vec<Cell<'_>> {
    let cells = document.cells().into_iter();
    cells.filter(|cell| cell.offered_per_s.is_none()).collect()
}

/// Those with ztunnels.
fn meshed(document: &Document) -> Vec<Cell<'_>> {
    let mut cells = cells(document);
    cells.retain(|cell| !is_redirection_only(cell.workload));
    cells
}

fn metrics(workload: &str) -> [&'static str; 5] {
    let [ztunnel, machine] = cpu_metrics(workload);
    let throughput = throughput_metric(workload);
    [throughput, "p50_us", "p99_us", ztunnel, machine]
}

fn ratios(text: &mut String, document: &Document) {
    let _ = write!(
        text,
        "\n**{OF} / {TO}**: median ratio of paired trials [95 % interval]; more throughput is \
         better, less of the rest;\n`–`: no difference shown.\n\n\
         | scope | workload | throughput | p50 | p99 | ztunnel CPU | machine CPU |\n\
         | --- | --- | --- | --- | --- | --- | --- |\n"
    );
    for cell in meshed(document) {
        let show = |metric: &str| ratio(document, &cell, metric, (OF, TO));
        let shown = metrics(cell.workload).map(show);
        if shown.iter().any(|text| !text.is_empty()) {
            let (scope, label) = (cell.scope, cell.label());
            let _ = writeln!(text, "| {scope} | {label} | {} |", shown.join(" | "));
        }
    }
}

fn redirection_alone(text: &mut String, document: &Document) {
    if let Some(table) = alone::Table::of(document) {
        let about = alone::ABOUT;
        let table = table.markdown();
        let _ = write!(text, "\n**Redirection alone**: {about}\n\n{table}");
    }
}

/// Ours against every other proxy, on the redirection that one runs on.
fn rivals(text: &mut String, document: &Document) {
    if document.peers.is_empty() {
        return;
    }
    let ours = |peer: &Peer| peer.redirect.clone();
    text.push_str(
        "\n**Ours / other proxies**, on the same redirection: throughput; CPU of the proxies per \
         request, connection or GB.\n\n| scope | workload |",
    );
    for peer in &document.peers {
        let _ = write!(text, " {} / {} |", ours(peer), peer.name);
    }
    text.push_str("\n| --- | --- |");
    text.push_str(&" --- |".repeat(document.peers.len()));
    text.push('\n');
    for cell in meshed(document) {
        let [throughput, .., cpu, _] = metrics(cell.workload);
        let shown = document.peers.iter().map(|peer| {
            let of = ours(peer);
            let show = |metric| ratio(document, &cell, metric, (&of, &peer.name));
            match (show(throughput), show(cpu)) {
                (throughput, _) if throughput.is_empty() => String::new(),
                (throughput, cpu) => format!("{throughput}; CPU {cpu}"),
            }
        });
        let shown: Vec<String> = shown.collect();
        if shown.iter().any(|text| !text.is_empty()) {
            let (scope, label) = (cell.scope, cell.label());
            let _ = writeln!(text, "| {scope} | {label} | {} |", shown.join(" | "));
        }
    }
}

fn medians(text: &mut String, document: &Document) {
    text.push_str(
        "\n<details><summary>Medians of every path; CPU per request, connection or GB</summary>\n\n\
         | scope | workload | path | throughput | p50 | p99 | ztunnel CPU | machine CPU |\n\
         | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for cell in cells(document) {
        let paths = document.paths.iter();
        for row in paths.filter_map(|path| document.row(path, &cell)) {
            let show = |metric: &str| median(row, metric);
            let shown = metrics(cell.workload).map(show).join(" | ");
            let (scope, label) = (cell.scope, cell.label());
            let _ = writeln!(text, "| {scope} | {label} | {} | {shown} |", row.path);
        }
    }
    text.push_str("\n</details>\n");
}

fn median(row: &Row, metric: &str) -> String {
    let value = row.median(metric);
    value.map_or_else(String::new, |value| with_unit(metric, Some(value)))
}

/// What is read of `bench.json`.
#[derive(Debug, Deserialize)]
struct Benches {
    #[serde(default)]
    quick: bool,
    rows: Vec<Bench>,
}

#[derive(Debug, Deserialize)]
struct Bench {
    bench: String,
    metric: String,
    baseline: String,
    subject_value: f64,
    baseline_value: f64,
    ratio: f64,
}

fn benches(text: &mut String, path: &Path, link: &str) -> Result<()> {
    let read = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let benches: Benches =
        serde_json::from_str(&read).with_context(|| format!("parsing {}", path.display()))?;
    let shown: Vec<&Bench> = benches
        .rows
        .iter()
        .filter(|row| BENCHES.iter().any(|name| row.bench.starts_with(name)))
        .filter(|row| COSTS.contains(&row.metric.as_str()))
        .collect();
    let quick = if benches.quick {
        " (a first look: BENCH_QUICK=1)"
    } else {
        ""
    };
    let _ = write!(
        text,
        "\n**Parts** (`make bench`){quick}: what ours costs, and what others do, with the ratio of \
         ours to theirs;\n[bench.json]({link}/bench.json) has all of it.\n\n\
         | bench | quantity | ours | others (ours / theirs) |\n| --- | --- | ---: | --- |\n"
    );
    let mut done = Vec::new();
    for row in &shown {
        let key = (&row.bench, &row.metric);
        if done.contains(&key) {
            continue;
        }
        done.push(key);
        let others: Vec<String> = shown
            .iter()
            .filter(|other| (&other.bench, &other.metric) == key)
            .map(|other| {
                let value = with_unit("", Some(other.baseline_value));
                format!("{} {value} ({:.2})", other.baseline, other.ratio)
            })
            .collect();
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} |",
            row.bench,
            row.metric,
            with_unit("", Some(row.subject_value)),
            others.join(", ")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use serde_json::json;

    use super::super::tests::{example, redirection_alone};
    use super::*;

    fn stored(document: &Document, directory: &Path) {
        fs::create_dir_all(directory).unwrap();
        let json = serde_json::to_string(document).unwrap();
        fs::write(directory.join("report.json"), json).unwrap();
    }

    #[test]
    fn the_section_has_ratios_medians_benches_and_links() {
        let root = tempfile::tempdir().unwrap();
        let (directory, readme) = (root.path().join("results/x"), root.path().join("README.md"));
        let mut document = example();
        document.peers.push(Peer {
            name: "other".to_owned(),
            binary: "other".to_owned(),
            redirect: "ebpf".to_owned(),
            mode: "shared".to_owned(),
            about: Default::default(),
        });
        let mut against = document.ratios[0].clone();
        "other".clone_into(&mut against.to);
        document.ratios.push(against);
        stored(&document, &directory);
        let rows = json!([
            {"bench": "relay/rr/32", "metric": "cpu_us_per_request", "subject": "rt",
             "baseline": "tokio", "subject_value": 3.0, "baseline_value": 4.0, "ratio": 0.75},
            {"bench": "relay/rr/32", "metric": "cpu_us_per_request", "subject": "rt",
             "baseline": "monoio", "subject_value": 3.0, "baseline_value": 6.0, "ratio": 0.5},
            {"bench": "mesh/lb/1", "metric": "ns_per_call", "subject": "mesh",
             "baseline": "1 workload", "subject_value": 3.0, "baseline_value": 3.0, "ratio": 1.0},
        ]);
        let bench = json!({"schema": 1, "quick": true, "rows": rows}).to_string();
        fs::write(directory.join("bench.json"), bench).unwrap();
        fs::write(&readme, format!("a\n{BEGIN}\nold\n{END}\nb\n")).unwrap();
        update(&directory, &readme).unwrap();
        let text = fs::read_to_string(&readme).unwrap();
        assert!(
            text.starts_with(&format!("a\n{BEGIN}\n")) && text.ends_with(&format!("{END}\nb\n"))
        );
        for wanted in [
            "[report.html](results/x/report.html)",
            "| cross-node | rr x32 | 1.30 [1.25, 1.35] better |",
            "| cross-node | rr x32 | ebpf | 26.0k req/s | 1.23 ms |",
            "| relay/rr/32 | cpu_us_per_request | 3.00 | tokio 4.00 (0.75), monoio 6.00 (0.50) |",
            "| scope | workload | ebpf / other |\n| --- | --- | --- |\n\
             | cross-node | rr x32 | 1.30 [1.25, 1.35] better; CPU  |",
            "BENCH_QUICK=1",
            "throughput better in 1, worse in 0 of 1",
        ] {
            assert!(text.contains(wanted), "{wanted}: {text}");
        }
        for unwanted in ["old", "rr-open", "mesh/lb"] {
            assert!(!text.contains(unwanted), "{unwanted}: {text}");
        }
        // Once more changes nothing.
        update(&directory, &readme).unwrap();
        assert_eq!(fs::read_to_string(&readme).unwrap(), text);
    }

    #[test]
    fn redirection_alone_has_a_table_of_its_own_and_is_in_no_other_of_ratios() {
        let root = tempfile::tempdir().unwrap();
        let document = redirection_alone();
        stored(&document, root.path());
        let text = section(root.path(), "x").unwrap();
        assert!(text.contains("**Redirection alone**: CPU time"), "{text}");
        assert_eq!(
            text.matches("0.70 [0.65, 0.75] better").count(),
            1,
            "{text}"
        );
        assert!(
            text.contains("| same-node | redirect-rr x32 | ebpf |"),
            "{text}"
        );
    }

    #[test]
    fn a_file_without_the_markers_is_left_alone() {
        assert!(replaced("nothing", "x").is_err());
        assert!(replaced(&format!("{END}{BEGIN}"), "x").is_err());
    }

    #[test]
    fn the_newest_full_comparison_of_both_paths_is_shown() {
        let root = tempfile::tempdir().unwrap();
        let with = |name: &str, change: &dyn Fn(&mut Document)| {
            let mut document = example();
            change(&mut document);
            stored(&document, &root.path().join(name));
        };
        with("old", &|_| {});
        with("new", &|d| d.when = "2026-02-01T00:00:00Z".to_owned());
        with("quick", &|d| {
            d.when = "2026-03-01T00:00:00Z".to_owned();
            d.command.push_str(" --quick");
        });
        with("other", &|d| {
            d.when = "2026-04-01T00:00:00Z".to_owned();
            d.paths = vec!["ebpf".to_owned()];
        });
        fs::create_dir(root.path().join("without")).unwrap();
        let newest_of = || newest(directories(root.path()).unwrap());
        assert_eq!(newest_of().unwrap(), root.path().join("new"));
        fs::remove_dir_all(root.path().join("new")).unwrap();
        fs::remove_dir_all(root.path().join("old")).unwrap();
        assert_eq!(newest_of().unwrap(), root.path().join("quick"));
        fs::remove_dir_all(root.path().join("quick")).unwrap();
        let error = newest_of().unwrap_err().to_string();
        assert!(error.contains("make compare"), "{error}");
    }

    /// Results that are not committed yet do not count.
    fn committed(root: &Path) -> Option<Vec<PathBuf>> {
        let output = Command::new("git")
            .args(["ls-files", "results/*/report.json"])
            .current_dir(root)
            .output()
            .ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        let parent = |file: &str| root.join(file).parent().map(Path::to_owned);
        let found = text.lines().filter_map(parent).collect();
        output.status.success().then_some(found)
    }

    #[test]
    fn the_readme_shows_the_newest_committed_results() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let Some(committed) = committed(&root) else {
            eprintln!("skipped: the_readme_shows_the_newest_committed_results: no git repository");
            return;
        };
        let readme = root.join("README.md");
        let text = fs::read_to_string(&readme).unwrap();
        let section = match newest(committed) {
            Ok(directory) => section(&directory, &link(&directory, &readme).unwrap()).unwrap(),
            Err(_) => String::new(),
        };
        assert!(
            replaced(&text, &section).unwrap() == text,
            "README.md differs from the newest committed results: run `make readme`"
        );
    }
}
