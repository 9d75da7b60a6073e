//! `report.md` for reading in a repository, `trials.csv` and `ratios.csv` for other programs.

use std::fmt::Write as _;

use super::alone;
use super::metric::Metric;
use super::schema::{Document, Ratio};

/// The report in short, as Markdown.
pub(super) fn markdown(document: &Document) -> String {
    let (machine, git) = (&document.machine, &document.git);
    let mut text = format!(
        "# Redirection paths compared: {}\n\n{}, commit {}{}, {}, {} CPUs, Linux {}.  \n`{}`\n\n\
         Medians of {} trials of {} s; CPU per request, connection or GB.\n\n\
         | scope | workload | path | throughput | p50 | p99 | ztunnel CPU | machine CPU | errors \
         |\n\
         | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n",
        document.paths.join(", "),
        document.when,
        git.sha,
        if git.dirty { " with changes" } else { "" },
        machine.cpu,
        machine.cores,
        machine.kernel,
        document.command,
        document.settings.rounds,
        document.settings.duration_s,
    );
    for cell in document.cells() {
        let rows = document
            .paths
            .iter()
            .filter_map(|path| document.row(path, &cell));
        for row in rows {
            let _ = write!(text, "| {} | {} | {} |", cell.scope, cell.label(), row.path);
            for metric in Metric::headlines(&row.workload) {
                let _ = write!(text, " {} |", metric.show(row.median(metric)));
            }
            let _ = writeln!(text, " {:.0} |", row.errors());
        }
    }
    if let Some(table) = alone::Table::of(document) {
        let (about, table) = (alone::ABOUT, table.markdown());
        let _ = write!(text, "\n## Redirection alone\n\n{about}\n\n{table}");
    }
    differences(&mut text, document);
    text.push_str("\n## To judge the numbers\n\n");
    for note in &document.notes {
        let _ = writeln!(text, "* {note}");
    }
    text
}

/// The ratios of rivals that show a difference, at what the table above has.
fn differences(text: &mut String, document: &Document) {
    let told = |ratio: &&Ratio| {
        ratio.is_of_rivals()
            && !document.is_against_itself(ratio)
            && Metric::headlines(&ratio.workload).contains(&ratio.metric)
    };
    text.push_str(
        "\n## Ratios\n\n| scope | workload | metric | of / to | ratio | 95 % interval | verdict |\n\
         | --- | --- | --- | --- | ---: | --- | --- |\n",
    );
    for ratio in document.ratios.iter().filter(told) {
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} / {} | {:.2} | {:.2} to {:.2} | {} |",
            ratio.scope,
            ratio.cell().label(),
            ratio.metric,
            ratio.of,
            ratio.to,
            ratio.ratio,
            ratio.ci95[0],
            ratio.ci95[1],
            ratio.verdict.name()
        );
    }
}

/// One line per figure of a trial.
pub(super) fn trials_csv(document: &Document) -> String {
    let mut text =
        "path,scope,workload,connections,placement,offered_per_s,metric,trial,value\n".to_owned();
    for row in &document.rows {
        for (metric, estimate) in &row.metrics {
            for (trial, value) in estimate.values.iter().enumerate() {
                let _ = writeln!(
                    text,
                    "{},{},{},{},{},{},{metric},{trial},{value}",
                    row.path,
                    row.scope,
                    row.workload,
                    row.connections,
                    row.placement.as_deref().unwrap_or(""),
                    number(row.offered_per_s),
                );
            }
        }
    }
    text
}

/// One line per ratio.
pub(super) fn ratios_csv(document: &Document) -> String {
    let mut text = "of,to,scope,workload,connections,placement,offered_per_s,metric,ratio,low,\
                    high,verdict\n"
        .to_owned();
    for ratio in &document.ratios {
        let _ = writeln!(
            text,
            "{},{},{},{},{},{},{},{},{},{},{},{}",
            ratio.of,
            ratio.to,
            ratio.scope,
            ratio.workload,
            ratio.connections,
            ratio.placement.as_deref().unwrap_or(""),
            number(ratio.offered_per_s),
            ratio.metric,
            ratio.ratio,
            ratio.ci95[0],
            ratio.ci95[1],
            ratio.verdict.name(),
        );
    }
    text
}

fn number(value: Option<f64>) -> String {
    value.map_or_else(String::new, |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::example;

    #[test]
    fn every_row_and_note_is_in_the_markdown() {
        let document = example();
        let text = markdown(&document);
        let lines = text.lines().filter(|line| line.starts_with("| cross-node"));
        // One per row, and the one ratio of rivals.
        assert_eq!(lines.count(), document.rows.len() + 1);
        assert!(
            text.contains("| requests_per_s | ebpf / tunnel | 1.30 |"),
            "{text}"
        );
        assert!(text.contains("* A note."), "{text}");
    }

    #[test]
    fn csv_has_all_figures_in_as_many_columns_as_its_head() {
        let document = example();
        let (trials, ratios) = (trials_csv(&document), ratios_csv(&document));
        let metrics = document.rows.iter().flat_map(|row| row.metrics.values());
        let figures: usize = metrics.map(|estimate| estimate.values.len()).sum();
        assert_eq!(trials.lines().count(), 1 + figures);
        assert_eq!(ratios.lines().count(), 1 + document.ratios.len());
        for text in [trials, ratios] {
            let columns = |line: &str| line.split(',').count();
            let head = text.lines().next().map(columns);
            assert!(
                text.lines().all(|line| Some(columns(line)) == head),
                "{text}"
            );
        }
    }
}
