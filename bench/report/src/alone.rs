//! Redirection alone, with a plain listener in ztunnel's place: what of it costs, as a table.

use std::fmt::Write as _;

use super::metric::{Metric, Spender};
use super::schema::{Cell, Document, Verdict, is_redirection_only};

/// The ratios shown, in this order, of those there are.
const PAIRS: [(&str, &str); 3] = [("ebpf", "tunnel"), ("ebpf", "none"), ("tunnel", "none")];

/// What the table is about.
pub(super) const ABOUT: &str = "CPU time of the whole machine per round trip (redirect-rr) or per \
    connection with one request (redirect-connect), between pods of one node, with a plain \
    listener in ztunnel's place; in path none the pod that is dialled answers.";

/// The table's head and lines; none if nothing was measured so.
pub(super) struct Table {
    pub(super) head: Vec<String>,
    pub(super) lines: Vec<Vec<String>>,
}

impl Table {
    /// Of a comparison.
    pub(super) fn of(document: &Document) -> Option<Self> {
        let mut cells = document.cells();
        cells.retain(|cell| is_redirection_only(cell.workload));
        let measured = |path: &&String| cells.iter().any(|c| document.row(path, c).is_some());
        let paths: Vec<&String> = document.paths.iter().filter(measured).collect();
        let has = |path: &str| paths.iter().any(|p| *p == path);
        let pairs = PAIRS.into_iter().filter(|(of, to)| has(of) && has(to));
        let pairs: Vec<(&str, &str)> = pairs.collect();
        let line = |cell: &Cell<'_>| {
            let metric = Metric::cpu(Spender::Machine, cell.workload);
            let medians = paths.iter().map(|path| {
                let value = document.row(path, cell).and_then(|row| row.median(metric));
                metric.show(value)
            });
            let ratios = pairs
                .iter()
                .map(|pair| ratio(document, cell, metric, *pair));
            [cell.label()]
                .into_iter()
                .chain(medians)
                .chain(ratios)
                .collect()
        };
        let names = paths.iter().map(|path| (*path).clone());
        let over = pairs.iter().map(|(of, to)| format!("{of} / {to}"));
        let head = ["workload".to_owned()].into_iter().chain(names).chain(over);
        (!cells.is_empty()).then(|| Self {
            head: head.collect(),
            lines: cells.iter().map(line).collect(),
        })
    }

    /// As Markdown.
    pub(super) fn markdown(&self) -> String {
        let mut text = format!("| {} |\n| ---", self.head.join(" | "));
        text.push_str(&" | ---:".repeat(self.head.len() - 1));
        text.push_str(" |\n");
        for line in &self.lines {
            let _ = writeln!(text, "| {} |", line.join(" | "));
        }
        text
    }
}

/// A ratio with its interval and verdict; empty if there is none.
pub(super) fn ratio(
    document: &Document,
    cell: &Cell<'_>,
    metric: Metric,
    (of, to): (&str, &str),
) -> String {
    document
        .ratio(cell, metric, (of, to))
        .map_or_else(String::new, |r| {
            let verdict = match r.verdict {
                Verdict::NoDifference => "–",
                told => told.name(),
            };
            let [low, high] = r.ci95;
            format!("{:.2} [{low:.2}, {high:.2}] {verdict}", r.ratio)
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{example, redirection_alone};

    #[test]
    fn every_path_has_its_cost_and_its_ratios() {
        assert!(Table::of(&example()).is_none());
        let table = Table::of(&redirection_alone()).unwrap();
        let text = table.markdown();
        assert_eq!(
            text.lines().next(),
            Some(
                "| workload | none | tunnel | ebpf | ebpf / tunnel | ebpf / none | tunnel / none |"
            )
        );
        assert!(
            text.contains(
                "| redirect-rr x32 | 20.0 us | 33.3 us | 22.2 us | 0.70 [0.65, 0.75] better | \
                 1.05 [1.04, 1.06] – |  |"
            ),
            "{text}"
        );
    }
}
