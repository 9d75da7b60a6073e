//! The comparison as a table for the terminal.

use std::fmt::Write as _;

use super::schema::{Document, Ratio, Row, cpu_metrics, throughput_metric};
use super::units::with_unit;

const HEADERS: [&str; 6] = [
    "throughput",
    "p50",
    "p99",
    "ztunnel CPU",
    "machine CPU",
    "errors",
];

/// The table, its notes below.
#[must_use]
pub fn render(document: &Document) -> String {
    let mut text = String::new();
    line(&mut text, "", "path", &HEADERS.map(str::to_owned));
    let mut last_scope = "";
    for (scope, workload, connections) in document.cells() {
        if scope != last_scope {
            let _ = writeln!(text, "{scope} (medians; CPU per request, connection or GB)");
            last_scope = scope;
        }
        let mut label = format!("{workload} x{connections}");
        for path in &document.paths {
            if let Some(row) = document.row(path, scope, workload, connections) {
                line(&mut text, &label, path, &figures(row));
                label.clear();
            }
        }
        for verdict in verdicts(document, scope, workload, connections) {
            let _ = writeln!(text, "  {:13} {verdict}", "");
        }
    }
    let _ = writeln!(
        text,
        "noise threshold {:.1} %",
        document.noise_threshold * 100.0
    );
    for note in &document.notes {
        let _ = writeln!(text, "- {note}");
    }
    text
}

fn line(text: &mut String, label: &str, path: &str, cells: &[String; 6]) {
    let [throughput, p50, p99, ztunnel, machine, errors] = cells;
    let _ = writeln!(
        text,
        "  {label:13} {path:8} {throughput:>13} {p50:>9} {p99:>9} {ztunnel:>12} {machine:>12} \
         {errors:>7}"
    );
}

fn figures(row: &Row) -> [String; 6] {
    let show = |metric: &str| with_unit(metric, row.median(metric));
    let [ztunnel, total] = cpu_metrics(&row.workload);
    let errors: f64 = row
        .metrics
        .get("errors")
        .map_or(0.0, |errors| errors.values.iter().sum());
    [
        show(throughput_metric(&row.workload)),
        dash_for_streams(row, show("p50_us")),
        dash_for_streams(row, show("p99_us")),
        if row.metrics.contains_key("ztunnel_rss_bytes") {
            show(ztunnel)
        } else {
            "-".to_owned()
        },
        show(total),
        format!("{errors:.0}"),
    ]
}

fn dash_for_streams(row: &Row, text: String) -> String {
    if row.workload == "stream" {
        "-".to_owned()
    } else {
        text
    }
}

/// One line per pair of paths: throughput, median latency and machine CPU.
fn verdicts(document: &Document, scope: &str, workload: &str, connections: u32) -> Vec<String> {
    let mut pairs: Vec<(&str, &str)> = Vec::new();
    let here = |ratio: &&Ratio| {
        ratio.scope == scope && ratio.workload == workload && ratio.connections == connections
    };
    for ratio in document.ratios.iter().filter(here) {
        let pair = (ratio.of.as_str(), ratio.to.as_str());
        if !pairs.contains(&pair) && pair.1 != "none" {
            pairs.push(pair);
        }
    }
    let [ztunnel, total] = cpu_metrics(workload);
    let metrics = [
        (throughput_metric(workload), "throughput"),
        ("p50_us", "p50"),
        (ztunnel, "ztunnel CPU"),
        (total, "machine CPU"),
    ];
    let describe = |(of, to): (&str, &str)| {
        let parts: Vec<String> = metrics
            .iter()
            .filter_map(|(metric, name)| {
                let ratio = document
                    .ratios
                    .iter()
                    .filter(here)
                    .find(|r| r.of == of && r.to == to && r.metric == *metric)?;
                Some(format!(
                    "{name} x{:.2} ({})",
                    ratio.ratio,
                    ratio.verdict.name()
                ))
            })
            .collect();
        format!("{of} against {to}: {}", parts.join(", "))
    };
    pairs.into_iter().map(describe).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::example;
    use super::*;

    #[test]
    fn every_row_has_a_line_and_none_is_no_rival() {
        let text = render(&example());
        assert!(text.contains("cross-node"), "{text}");
        assert!(text.contains("rr x32        none"), "{text}");
        assert!(
            text.contains("ebpf against tunnel: throughput x1.30 (better)"),
            "{text}"
        );
        assert!(!text.contains("against none"), "{text}");
        assert!(text.contains("- A note."), "{text}");
        assert!(text.lines().take(6).all(|line| line.len() <= 100), "{text}");
    }
}
