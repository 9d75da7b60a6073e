//! The report of a comparison: its file format, the page and the tables made from it.
//!
//! All of it is made from `report.json` alone ([`schema`]): nothing here measures or knows the lab.
#![forbid(unsafe_code)]

mod alone;
mod answer;
mod curve;
mod escape;
mod html;
pub mod metric;
mod overview;
mod parts;
pub mod plot;
pub mod readme;
pub mod schema;
pub mod table;
mod tally;
mod text;
pub mod units;

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

use serde_json::Value;

use schema::{Document, SCHEMA};

/// File name of the README's picture.
const OVERVIEW: &str = "overview.svg";

/// Writes `report.html`, `report.md`, `trials.csv`, `ratios.csv` and, where its case was measured,
/// `overview.svg` beside the `report.json` in
/// `directory`, from that file alone.
///
/// # Errors
/// A missing or malformed `report.json`, one of another schema, or a file that cannot be written.
pub fn render(directory: &Path) -> Result<()> {
    let document = read(directory)?;
    let picture = overview::picture(&document)?;
    let short = text::markdown(&document) + &parts::markdown(directory)?;
    let files = [
        ("report.html", html::page(&document)?),
        ("report.md", short),
        ("trials.csv", text::trials_csv(&document)),
        ("ratios.csv", text::ratios_csv(&document)),
    ];
    for (name, content) in files.into_iter().chain(picture.map(|svg| (OVERVIEW, svg))) {
        let path = directory.join(name);
        fs::write(&path, content).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// Writes `document` as the `report.json` in `directory`.
///
/// Figures have six digits, which is more than any of them is known to, and nothing is spaced out:
/// runs are kept in the repository.
///
/// # Errors
/// A file that cannot be written.
pub fn store(document: &Document, directory: &Path) -> Result<()> {
    let json = serde_json::to_value(document).context("encoding report.json")?;
    let path = directory.join("report.json");
    let text = rounded(json).to_string() + "\n";
    fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
}

fn rounded(value: Value) -> Value {
    match value {
        Value::Number(number) if number.is_f64() => {
            let figure = number.as_f64().unwrap_or(0.0);
            let short = format!("{figure:.5e}").parse().unwrap_or(figure);
            Value::from(short)
        }
        Value::Array(values) => values.into_iter().map(rounded).collect(),
        Value::Object(fields) => fields
            .into_iter()
            .map(|(name, value)| (name, rounded(value)))
            .collect(),
        other => other,
    }
}

/// Reads the `report.json` in `directory`.
///
/// # Errors
/// A missing or malformed file, or one of another schema.
pub fn read(directory: &Path) -> Result<Document> {
    let path = directory.join("report.json");
    let text = fs::read_to_string(&path).with_context(|| {
        format!(
            "reading {}: give the directory of a comparison",
            path.display()
        )
    })?;
    let document: Document =
        serde_json::from_str(&text).with_context(|| format!("parsing {}", path.display()))?;
    if document.schema != SCHEMA {
        bail!(
            "{} has schema {}, must be {SCHEMA}",
            path.display(),
            document.schema
        );
    }
    Ok(document)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::metric::{Metric, Spender};
    use super::schema::{Estimate, Git, Machine, Ratio, Row, Settings, Verdict};
    use super::*;

    /// Of three trials that differ a little.
    pub(super) fn estimate(median: f64) -> Estimate {
        let values = [0.97, 1.0, 1.02].map(|factor| factor * median).to_vec();
        Estimate {
            median,
            ci95: [0.97 * median, 1.02 * median],
            values,
        }
    }

    fn row(path: &str, rate: f64) -> Row {
        let mut metrics: BTreeMap<Metric, Estimate> = [
            (Metric::throughput("rr"), rate),
            (Metric::P50, 32e6 / rate),
            (Metric::P99, 90e6 / rate),
            (Metric::cpu(Spender::Machine, "rr"), 2e6 / rate),
            (Metric::Errors, 0.0),
        ]
        .map(|(metric, value)| (metric, estimate(value)))
        .into();
        if path != "none" {
            let cpu = Metric::cpu(Spender::Ztunnels, "rr");
            metrics.insert(cpu, estimate(1e6 / rate));
            metrics.insert(Metric::ZtunnelMemory, estimate(30e6));
        }
        let spectrum = (0..=30)
            .map(|step| f64::from(step) / 10.0)
            .map(|n| (1.0 - 10f64.powf(-n), 1e6 / rate + n));
        Row {
            path: path.to_owned(),
            scope: "cross-node".to_owned(),
            workload: "rr".to_owned(),
            connections: 32,
            size_bytes: 64,
            placement: None,
            offered_per_s: None,
            trials: 3,
            metrics,
            spectrum_us: spectrum.collect(),
        }
    }

    /// An open loop that gets slower with its rate.
    fn open(path: &str, rate: f64) -> Row {
        let mut row = row(path, 26e3);
        row.workload = "rr-open".to_owned();
        row.offered_per_s = Some(rate);
        row.metrics
            .insert(Metric::P99, estimate(100.0 + rate / 100.0));
        row.metrics.insert(Metric::ServiceP99, estimate(90.0));
        row
    }

    /// A small but complete report.
    pub(super) fn example() -> Document {
        let ratio = Ratio {
            metric: Metric::throughput("rr"),
            of: "ebpf".to_owned(),
            to: "tunnel".to_owned(),
            scope: "cross-node".to_owned(),
            workload: "rr".to_owned(),
            connections: 32,
            placement: None,
            offered_per_s: None,
            ratio: 1.3,
            ci95: [1.25, 1.35],
            verdict: Verdict::Better,
        };
        let against_none = Ratio {
            to: "none".to_owned(),
            ratio: 0.5,
            ci95: [0.4, 0.6],
            verdict: Verdict::Worse,
            ..ratio.clone()
        };
        Document {
            schema: SCHEMA,
            when: "2026-01-01T00:00:00Z".to_owned(),
            git: Git {
                sha: "0123456789ab".to_owned(),
                dirty: false,
            },
            machine: Machine {
                cpu: "CPU".to_owned(),
                cores: 2,
                kernel: "6.18".to_owned(),
                memory_bytes: 8 << 30,
            },
            tunnel_driver: Some("vxlan".to_owned()),
            command: "lab compare".to_owned(),
            noise_threshold: 0.05,
            rows: vec![
                row("none", 60e3),
                row("tunnel", 20e3),
                row("ebpf", 26e3),
                open("tunnel", 10e3),
                open("tunnel", 20e3),
                open("ebpf", 10e3),
                open("ebpf", 20e3),
            ],
            ratios: vec![ratio, against_none],
            paths: ["none", "tunnel", "ebpf"].map(str::to_owned).to_vec(),
            settings: Settings::default(),
            noise: BTreeMap::new(),
            noise_source: String::new(),
            against_itself: None,
            peers: Vec::new(),
            skipped_peers: Vec::new(),
            notes: vec!["A note.".to_owned()],
        }
    }

    /// One with redirection alone besides.
    pub(super) fn redirection_alone() -> Document {
        let mut document = example();
        for (path, rate) in [("none", 100e3), ("tunnel", 60e3), ("ebpf", 90e3)] {
            let mut row = row(path, rate);
            row.metrics
                .retain(|metric, _| !metric.name().starts_with("ztunnel_"));
            row.workload = "redirect-rr".to_owned();
            row.scope = "same-node".to_owned();
            document.rows.push(row);
        }
        let against = |to: &str, ratio: f64, verdict| Ratio {
            metric: Metric::cpu(Spender::Machine, "rr"),
            to: to.to_owned(),
            scope: "same-node".to_owned(),
            workload: "redirect-rr".to_owned(),
            ratio,
            ci95: [ratio - 0.05, ratio + 0.05],
            verdict,
            ..document.ratios[0].clone()
        };
        let mut same = against("none", 1.05, Verdict::NoDifference);
        same.ci95 = [1.04, 1.06];
        let faster = against("tunnel", 0.7, Verdict::Better);
        document.ratios.extend([faster, same]);
        document
    }

    #[test]
    fn the_page_is_rendered_from_the_file_alone() {
        let directory = tempfile::tempdir().unwrap();
        let json = serde_json::to_string(&example()).unwrap();
        fs::write(directory.path().join("report.json"), json).unwrap();
        render(directory.path()).unwrap();
        let html = fs::read_to_string(directory.path().join("report.html")).unwrap();
        assert!(html.contains("0123456789ab"));
    }

    #[test]
    fn what_is_stored_is_read_again_to_six_digits() {
        let directory = tempfile::tempdir().unwrap();
        let mut document = example();
        document.ratios[0].ratio = 1.234_567_89;
        document.machine.memory_bytes = 1_234_567_890_123;
        document.rows[0]
            .metrics
            .insert(Metric::Errors, estimate(1e-9 / 3.0));
        store(&document, directory.path()).unwrap();
        let read = read(directory.path()).unwrap();
        assert_eq!(read.ratios[0].ratio, 1.234_57);
        assert_eq!(read.machine.memory_bytes, 1_234_567_890_123);
        assert_eq!(read.rows[0].metrics[&Metric::Errors].median, 3.333_33e-10);
        assert_eq!(read.rows.len(), document.rows.len());
    }

    /// Whether all of `before` is in `after`, which may have fields besides.
    fn holds(after: &Value, before: &Value) -> bool {
        match (after, before) {
            (Value::Object(after), Value::Object(before)) => before
                .iter()
                .all(|(name, value)| after.get(name).is_some_and(|after| holds(after, value))),
            (Value::Array(after), Value::Array(before)) => {
                let pairs = || after.iter().zip(before);
                after.len() == before.len() && pairs().all(|(after, before)| holds(after, before))
            }
            _ => after == before,
        }
    }

    /// The format is an interface, and so is every figure: what is read and stored again has all
    /// that it had, and what was committed of its rendering is rendered again.
    #[test]
    fn committed_runs_are_stored_and_rendered_as_they_were() {
        let results = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../results");
        let mut seen = 0;
        for committed in readme::directories(&results).unwrap() {
            let Ok(json) = fs::read_to_string(committed.join("report.json")) else {
                continue;
            };
            let out = tempfile::tempdir().unwrap();
            store(&read(&committed).unwrap(), out.path()).unwrap();
            let again = fs::read_to_string(out.path().join("report.json")).unwrap();
            let value = |text: &str| serde_json::from_str::<Value>(text).unwrap();
            assert!(
                holds(&value(&again), &value(&json)),
                "{} is stored otherwise",
                committed.display()
            );
            let benches = committed.join("bench.json");
            if benches.exists() {
                fs::copy(benches, out.path().join("bench.json")).unwrap();
            }
            render(out.path()).unwrap();
            for name in ["report.md", OVERVIEW] {
                let Ok(before) = fs::read_to_string(committed.join(name)) else {
                    continue;
                };
                let after = fs::read_to_string(out.path().join(name)).unwrap();
                assert!(after == before, "{}/{name} differs", committed.display());
                seen += 1;
            }
        }
        assert!(seen > 0, "no committed run under {}", results.display());
    }

    #[test]
    fn metrics_of_a_later_version_are_left_out_and_the_others_kept() {
        let mut json = serde_json::to_value(example()).unwrap();
        let known = json.clone();
        json["rows"][0]["metrics"]["parsecs"] = json["rows"][0]["metrics"]["p50_us"].clone();
        let mut later = json["ratios"][0].clone();
        later["metric"] = "parsecs".into();
        json["ratios"].as_array_mut().unwrap().push(later);
        let document: Document = serde_json::from_value(json.clone()).unwrap();
        assert_eq!(serde_json::to_value(document).unwrap(), known);
        json["ratios"][0]["metric"] = 7.into();
        assert!(serde_json::from_value::<Document>(json).is_err());
    }

    #[test]
    fn what_is_no_report_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let error = format!("{:#}", render(directory.path()).unwrap_err());
        assert!(
            error.contains("report.json: give the directory of a comparison"),
            "{error}"
        );
        let path = directory.path().join("report.json");
        fs::write(&path, "{\"schema\": 1}").unwrap();
        assert!(format!("{:#}", render(directory.path()).unwrap_err()).contains("parsing"));
        let mut other = example();
        other.schema = 2;
        fs::write(&path, serde_json::to_string(&other).unwrap()).unwrap();
        let error = format!("{:#}", render(directory.path()).unwrap_err());
        assert!(error.contains("has schema 2, must be 1"), "{error}");
    }
}
