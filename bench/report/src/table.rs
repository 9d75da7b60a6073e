//! The comparison as a table for the terminal.

use std::fmt::Write as _;

use super::metric::Metric;
use super::schema::{Cell, Document, Ratio, Row, Verdict};

/// Columns that notes are wrapped at.
const WIDTH: usize = 98;
/// Columns of a cell's label.
const LABEL: usize = 14;
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
    for cell in document.cells() {
        if cell.scope != last_scope {
            let scope = cell.scope;
            let _ = writeln!(text, "{scope} (medians; CPU per request, connection or GB)");
            last_scope = scope;
        }
        let mut label = cell.label();
        if label.len() > LABEL {
            let _ = writeln!(text, "  {label}");
            label.clear();
        }
        for path in &document.paths {
            if let Some(row) = document.row(path, &cell) {
                line(&mut text, &label, path, &figures(row));
                label.clear();
            }
        }
        compare(&mut text, document, &cell);
    }
    let _ = writeln!(
        text,
        "a/b: median ratio of paired trials; + better, - worse, ~ no difference shown (95 % \
         interval\nreaches into the noise, {:.1} % for throughput)",
        document.noise_threshold * 100.0
    );
    document.notes.iter().for_each(|note| item(&mut text, note));
    text
}

fn line(text: &mut String, label: &str, path: &str, cells: &[String; 6]) {
    let [throughput, p50, p99, ztunnel, machine, errors] = cells;
    let cells =
        format!("{throughput:>13} {p50:>9} {p99:>9} {ztunnel:>12} {machine:>12} {errors:>7}");
    let _ = writeln!(text, "  {label:LABEL$} {path:8} {}", cells.trim_end());
}

fn figures(row: &Row) -> [String; 6] {
    let show = |metric: Metric| metric.show(row.median(metric));
    let [throughput, p50, p99, ztunnel, total] = Metric::headlines(&row.workload);
    [
        show(throughput),
        dash_for_streams(row, show(p50)),
        dash_for_streams(row, show(p99)),
        if row.metrics.contains_key(&Metric::ZtunnelMemory) {
            show(ztunnel)
        } else {
            "-".to_owned()
        },
        show(total),
        format!("{:.0}", row.errors()),
    ]
}

fn dash_for_streams(row: &Row, text: String) -> String {
    if row.workload == "stream" {
        "-".to_owned()
    } else {
        text
    }
}

/// One line per pair of paths, `none` being no rival, in the columns of the figures.
fn compare(text: &mut String, document: &Document, cell: &Cell<'_>) {
    let here: Vec<&Ratio> = document
        .ratios
        .iter()
        .filter(|r| r.cell() == *cell && r.is_of_rivals() && !document.is_against_itself(r))
        .collect();
    let mut pairs: Vec<_> = here
        .iter()
        .map(|r| (r.of.as_str(), r.to.as_str()))
        .collect();
    pairs.dedup();
    for (of, to) in pairs {
        let show = |metric: Metric| {
            let ratio = here
                .iter()
                .find(|r| r.metric == metric && r.of == of && r.to == to);
            ratio.map_or_else(String::new, |r| {
                format!("x{:.2} {}", r.ratio, mark(r.verdict))
            })
        };
        let figures = Metric::headlines(cell.workload).map(show);
        let [throughput, p50, p99, ztunnel, machine] = figures;
        let figures = [throughput, p50, p99, ztunnel, machine, String::new()];
        line(text, &format!("{of}/{to}"), "", &figures);
    }
}

fn mark(verdict: Verdict) -> char {
    match verdict {
        Verdict::Better => '+',
        Verdict::Worse => '-',
        Verdict::NoDifference => '~',
    }
}

/// A note as a list item, wrapped.
fn item(text: &mut String, note: &str) {
    let mut column = 1;
    text.push('-');
    for word in note.split_whitespace() {
        if column + 1 + word.len() > WIDTH {
            text.push_str("\n ");
            column = 1;
        }
        text.push(' ');
        text.push_str(word);
        column += 1 + word.len();
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::example;

    #[test]
    fn every_row_has_a_line_and_none_is_no_rival() {
        let text = render(&example());
        assert!(text.contains("cross-node"), "{text}");
        assert!(text.contains("rr x32         none"), "{text}");
        assert!(
            text.contains("  ebpf/tunnel                   x1.30 +\n"),
            "{text}"
        );
        assert!(!text.contains("ebpf/none"), "{text}");
        assert!(text.contains("- A note."), "{text}");
        assert!(text.lines().all(|line| line.len() <= 100), "{text}");
    }
}
