//! What `make bench` measured of the parts, as a table of the report.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::units::Unit;

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

/// The section on them; nothing if `directory` has no `bench.json`.
///
/// # Errors
/// A `bench.json` that cannot be read.
pub(super) fn markdown(directory: &Path) -> Result<String> {
    let path = directory.join("bench.json");
    if !path.exists() {
        return Ok(String::new());
    }
    let read = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
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
    let mut text = format!(
        "\n## Parts\n\nWhat ours costs{quick}, and what others do, with the ratio of ours to \
         theirs; [bench.json](bench.json) has all of it.\n\n\
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
                let value = Unit::Count.show(other.baseline_value);
                format!("{} {value} ({:.2})", other.baseline, other.ratio)
            })
            .collect();
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} |",
            row.bench,
            row.metric,
            Unit::Count.show(row.subject_value),
            others.join(", ")
        );
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_bench_is_a_line_with_all_its_baselines() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(markdown(directory.path()).unwrap(), "");
        let rows = json!([
            {"bench": "relay/rr/32", "metric": "cpu_us_per_request", "subject": "rt",
             "baseline": "tokio", "subject_value": 3.0, "baseline_value": 4.0, "ratio": 0.75},
            {"bench": "relay/rr/32", "metric": "cpu_us_per_request", "subject": "rt",
             "baseline": "monoio", "subject_value": 3.0, "baseline_value": 6.0, "ratio": 0.5},
            {"bench": "mesh/lb/1", "metric": "ns_per_call", "subject": "mesh",
             "baseline": "1 workload", "subject_value": 3.0, "baseline_value": 3.0, "ratio": 1.0},
        ]);
        let bench = json!({"schema": 1, "quick": true, "rows": rows}).to_string();
        fs::write(directory.path().join("bench.json"), bench).unwrap();
        let text = markdown(directory.path()).unwrap();
        for wanted in [
            "| relay/rr/32 | cpu_us_per_request | 3.00 | tokio 4.00 (0.75), monoio 6.00 (0.50) |",
            "BENCH_QUICK=1",
        ] {
            assert!(text.contains(wanted), "{wanted}: {text}");
        }
        assert!(!text.contains("mesh/lb"), "{text}");
    }
}
