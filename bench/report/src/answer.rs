//! What the page opens with: one picture, three sentences, one small matrix.

use std::fmt::Write as _;

use super::escape::escape;
use super::metric::{Better, Metric, Spender, Work};
use super::plot;
use super::schema::{Cell, Document, Ratio, Verdict, is_redirection_only};
use super::tally::{self, PARTS};

/// The path that a comparison is about, if it was measured.
const SUBJECT: &str = "ebpf";
/// The workloads of the picture, in its order.
const WORKLOADS: [&str; 4] = ["rr", "rr-open", "stream", "connect"];
/// Of `rr`: neither a lone connection nor a crowd.
const CONNECTIONS: u32 = 32;
/// An open loop that leaves out more of what is due says nothing of latency.
const SATURATED: f64 = 0.01;

/// The path that others are held against: [`SUBJECT`], or the last.
pub(super) fn subject(document: &Document) -> &str {
    let mut paths = document.paths.iter().map(String::as_str);
    let named = paths.clone().find(|path| *path == SUBJECT);
    named.or_else(|| paths.next_back()).unwrap_or_default()
}

/// The whole of it.
pub(super) fn write(html: &mut String, document: &Document) {
    let cells = cells(document);
    sentences(html, document, cells.first());
    picture(html, document, &cells);
    matrix(html, document);
}

/// One cell for each workload, between nodes where that was measured.
fn cells(document: &Document) -> Vec<Cell<'_>> {
    let all = document.cells();
    let of = |workload: &&str| {
        let of_it = || all.iter().filter(move |cell| cell.workload == *workload);
        let scope = of_it().next()?.scope;
        let mut here = of_it().filter(|cell| cell.scope == scope && cell.placement.is_none());
        match *workload {
            "rr" => here
                .clone()
                .find(|cell| cell.connections == CONNECTIONS)
                .or_else(|| here.next_back()),
            "rr-open" => {
                let first = here.clone().next();
                here.rfind(|cell| keeps_up(document, cell)).or(first)
            }
            _ => here.next_back(),
        }
        .copied()
    };
    WORKLOADS.iter().filter_map(of).collect()
}

/// Whether every path did what was due.
fn keeps_up(document: &Document, cell: &Cell<'_>) -> bool {
    let rows = document.paths.iter().filter_map(|p| document.row(p, cell));
    let skipped = rows.filter_map(|row| row.median(Metric::SkippedShare));
    skipped.fold(0.0, f64::max) <= SATURATED
}

/// Rate, median latency and CPU time of every path, as bars that are as wide as there is room.
fn picture(html: &mut String, document: &Document, cells: &[Cell<'_>]) {
    html.push_str("<figure class=\"answer\">\n");
    for cell in cells {
        let (scope, label) = (cell.scope, cell.label());
        let _ = writeln!(html, "<section><h3>{scope}, {label}</h3>");
        let each = Work::of(cell.workload).name();
        let cpu = format!("CPU of the machine per {each}");
        let metrics = [
            (Metric::throughput(cell.workload), "rate"),
            (Metric::P50, "median latency"),
            (Metric::cpu(Spender::Machine, cell.workload), cpu.as_str()),
        ];
        for metric in metrics {
            bars(html, document, cell, metric);
        }
        html.push_str("</section>\n");
    }
    html.push_str(
        "</figure>\n<p><small>Medians. CPU time is that of all processors, load generator \
         included. none: no mesh at all.</small></p>\n",
    );
}

fn bars(html: &mut String, document: &Document, cell: &Cell<'_>, (metric, name): (Metric, &str)) {
    let median = |path: &String| document.row(path, cell)?.median(metric);
    let longest = document.paths.iter().filter_map(median).fold(0.0, f64::max);
    if longest <= 0.0 {
        return;
    }
    let direction = match metric.better() {
        Some(Better::More) => ": more is better",
        Some(Better::Less) => ": less is better",
        None => "",
    };
    let _ = writeln!(html, "<h4>{name}{direction}</h4>");
    for path in &document.paths {
        let Some(value) = median(path) else {
            continue;
        };
        let (share, colour) = (value / longest * 100.0, plot::css_colour(document, path));
        let _ = writeln!(
            html,
            "<div class=\"bar\"><span>{}</span>\
             <i><b style=\"width:{share:.1}%;background:{colour}\"></b></i><em>{}</em></div>",
            escape(path),
            metric.show(Some(value)),
        );
    }
}

/// Three of them: how much, at what cost, and how far to believe it.
fn sentences(html: &mut String, document: &Document, cell: Option<&Cell<'_>>) {
    html.push_str("<div class=\"sentences\">\n");
    let of = subject(document);
    if let Some(cell) = cell {
        let figure = |metric: Metric| {
            let value = document.row(of, cell)?.median(metric)?;
            let against = rivals(document, of, cell).into_iter().filter_map(|to| {
                let ratio = document.ratio(cell, metric, (of, to))?;
                let class = class(ratio.verdict);
                let to = if to == "none" { "no mesh" } else { to };
                let times = format!("<span class=\"{class}\">×{:.2}</span>", ratio.ratio);
                Some(format!("{times} {}", escape(to)))
            });
            let against: Vec<String> = against.collect();
            let value = metric.show(Some(value));
            Some(match against.is_empty() {
                true => format!("<b>{value}</b>"),
                false => format!("<b>{value}</b> ({})", against.join(", ")),
            })
        };
        let (scope, label, name) = (cell.scope, cell.label(), escape(of));
        if let Some(rate) = figure(Metric::throughput(cell.workload)) {
            let _ = writeln!(
                html,
                "<p><b>{name}</b> does {rate} at {label}, {scope}.</p>"
            );
        }
        let cpu = figure(Metric::cpu(Spender::Machine, cell.workload));
        if let Some(cpu) = cpu {
            let each = Work::of(cell.workload).name();
            let p50 = figure(Metric::P50);
            let p50 = p50.map_or_else(String::new, |p50| format!(" and takes {p50} at the median"));
            let _ = writeln!(
                html,
                "<p>A {each} costs the machine {cpu} of CPU time{p50}.</p>"
            );
        }
    }
    let _ = writeln!(html, "<p>{}</p>\n</div>", doubts(document));
}

/// Whom the sentences name: no mesh, the other redirection, and the fastest of other proxies.
fn rivals<'d>(document: &'d Document, of: &str, cell: &Cell<'_>) -> Vec<&'d str> {
    let rate = |path: &&str| {
        let row = document.row(path, cell);
        row.and_then(|row| row.median(Metric::throughput(cell.workload)))
            .unwrap_or(0.0)
    };
    let others = || document.paths.iter().map(String::as_str);
    let is_peer = |path: &&str| document.peers.iter().any(|peer| peer.name == *path);
    let fastest = others()
        .filter(is_peer)
        .max_by(|a, b| rate(a).total_cmp(&rate(b)));
    others()
        .filter(|path| *path != of && (!is_peer(path) || Some(*path) == fastest))
        .collect()
}

/// How far to believe the figures.
fn doubts(document: &Document) -> String {
    let mut text = match &document.against_itself {
        Some(itself) => format!(
            "{} measured against itself shows a difference in {} of {} ratios, and",
            escape(&itself.path),
            itself.differing,
            itself.ratios
        ),
        None => "No path was measured against itself;".to_owned(),
    };
    let _ = write!(
        text,
        " throughput must differ by more than {:.1} % for a verdict; ",
        document.noise_threshold * 100.0
    );
    let errors: f64 = document.rows.iter().map(|row| row.errors()).sum();
    match errors > 0.0 {
        true => {
            let _ = write!(
                text,
                "<span class=\"worse\">{errors:.0} failed</span> in all trials."
            );
        }
        false => text.push_str("nothing failed in any trial."),
    }
    text
}

/// In how many workloads the subject is better and worse than each other path.
fn matrix(html: &mut String, document: &Document) {
    let pairs = tally::pairs(document);
    let of_subject = |pair: &&(&str, &str)| {
        let subject = subject(document);
        pair.0 == subject || pair.1 == subject
    };
    let first: Vec<_> = pairs.iter().filter(of_subject).copied().collect();
    if first.is_empty() {
        return;
    }
    html.push_str(
        "<h2>Better and worse</h2>\n<p><small>Workloads in which the first of two paths is better \
         + or worse − than the second; of the rest no difference was shown.</small></p>\n",
    );
    counts(html, document, &first);
    if pairs.len() > first.len() {
        html.push_str("<details><summary>All pairs of paths</summary>\n");
        counts(html, document, &pairs);
        html.push_str("</details>\n");
    }
}

fn counts(html: &mut String, document: &Document, pairs: &[(&str, &str)]) {
    html.push_str("<div class=\"wide\"><table class=\"matrix\"><tr><th></th>");
    for part in PARTS {
        let _ = write!(html, "<th>{part}</th>");
    }
    html.push_str("</tr>\n");
    for (of, to) in pairs {
        let _ = write!(html, "<tr><td>{} / {}</td>", escape(of), escape(to));
        for count in tally::counts(document, of, to) {
            let class = match (count.better, count.worse) {
                (better, worse) if better > worse => "better",
                (better, worse) if better < worse => "worse",
                _ => "same",
            };
            let (better, worse, all) = (count.better, count.worse, count.all);
            let _ = write!(
                html,
                "<td class=\"{class}\">+{better} −{worse}<small> of {all}</small></td>"
            );
        }
        html.push_str("</tr>\n");
    }
    html.push_str("</table></div>\n");
}

/// The colour of a verdict.
pub(super) fn class(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Better => "better",
        Verdict::Worse => "worse",
        Verdict::NoDifference => "same",
    }
}

/// The subject's throughput against a row's path, or the other way round.
pub(super) fn against<'d>(
    document: &'d Document,
    path: &str,
    cell: &Cell<'_>,
) -> Option<&'d Ratio> {
    let subject = subject(document);
    let metric = Metric::throughput(cell.workload);
    // What the whole mesh costs is in the figures; this is about rivals.
    let rivals = path != "none" || is_redirection_only(cell.workload) || document.paths.len() == 2;
    document
        .ratio(cell, metric, (subject, path))
        .filter(|_| rivals)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::example;

    fn text_of(document: &Document) -> String {
        let mut html = String::new();
        write(&mut html, document);
        html
    }

    #[test]
    fn the_picture_has_a_bar_for_every_figure_of_every_path() {
        let document = example();
        let html = text_of(&document);
        // Of rr: three paths at three metrics. Of rr-open: two, without none.
        assert_eq!(html.matches("<div class=\"bar\">").count(), 3 * 3 + 2 * 3);
        assert_eq!(html.matches("<section>").count(), 2);
        assert!(html.contains("width:100.0%"), "{html}");
        for wanted in ["rate: more is better", "median latency: less is better"] {
            assert!(html.contains(wanted), "{wanted}: {html}");
        }
    }

    #[test]
    fn three_sentences_say_how_much_at_what_cost_and_how_sure() {
        let mut document = example();
        let html = text_of(&document);
        for wanted in [
            "<b>ebpf</b> does <b>26.0k req/s</b> (<span class=\"worse\">×0.50</span> no mesh, \
             <span class=\"better\">×1.30</span> tunnel) at rr x32, cross-node.",
            "A request costs the machine <b>76.9 us</b> of CPU time and takes <b>1.23 ms</b> at the \
             median.",
            "must differ by more than 5.0 % for a verdict; nothing failed in any trial.",
        ] {
            assert!(html.contains(wanted), "{wanted}: {html}");
        }
        document.rows[0]
            .metrics
            .insert(Metric::Errors, crate::tests::estimate(2.0));
        assert!(text_of(&document).contains("6 failed</span> in all trials."));
    }

    #[test]
    fn the_open_loop_shown_is_the_fastest_that_every_path_keeps_up_with() {
        let mut document = example();
        let offered = |document: &Document| {
            let open = cells(document)
                .into_iter()
                .find(|c| c.workload == "rr-open");
            open.unwrap().offered_per_s
        };
        assert_eq!(offered(&document), Some(20e3));
        let row = document.rows.iter_mut().rfind(|row| row.path == "tunnel");
        let metrics = &mut row.unwrap().metrics;
        metrics.insert(Metric::SkippedShare, crate::tests::estimate(0.2));
        assert_eq!(offered(&document), Some(10e3));
    }

    #[test]
    fn the_matrix_counts_what_is_better_and_worse() {
        let html = text_of(&example());
        assert!(html.contains("<td>ebpf / tunnel</td>"), "{html}");
        assert!(
            html.contains("<td class=\"better\">+1 −0<small> of 1</small></td>"),
            "{html}"
        );
        assert!(!html.contains("ebpf / none"), "none is no rival: {html}");
    }

    #[test]
    fn without_the_usual_path_the_last_is_what_it_is_about() {
        let mut document = example();
        document.paths = vec!["none".to_owned(), "tunnel".to_owned()];
        assert_eq!(subject(&document), "tunnel");
        assert!(text_of(&document).contains("<b>tunnel</b> does <b>20.0k req/s</b>"));
    }
}
