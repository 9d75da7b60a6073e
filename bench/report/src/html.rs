//! `report.html`: one self-contained page, the result first, the details after it.

use std::fmt::Write as _;

use anyhow::Result;

use super::metric::{Metric, Spender};
use super::schema::{Cell, Document, Ratio, Row, Verdict, is_redirection_only};
use super::units::Unit;
use super::{alone, curve, plot, tally};

const STYLE: &str = "
:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;color:#1c2026;max-width:1180px;margin:2rem auto;
padding:0 1rem;background:#fff}
h1{font-size:1.5rem;margin:0 0 .2rem}h2{font-size:1.15rem;margin:2.2rem 0 .5rem}
.about{color:#5a6069;margin:.1rem 0}
table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .5rem;text-align:right;border-bottom:1px solid #e4e7ec;white-space:nowrap}
th{color:#5a6069;font-weight:600}
th:first-child,td:first-child,td.l,th.l{text-align:left}
tr.first td{border-top:2px solid #cbd0d8}
.better{color:#05704d;font-weight:600}.worse{color:#b42318;font-weight:600}.same{color:#5a6069}
.key span{display:inline-block;margin-right:1.2rem}
.key i{display:inline-block;width:.9em;height:.9em;margin-right:.35em;vertical-align:-.1em}
.plots{display:flex;flex-wrap:wrap;gap:.6rem}svg{max-width:100%;height:auto}
.wide{overflow-x:auto}li{margin:.2rem 0}.error{background:#fdecea}small{color:#5a6069}
";

/// The page.
pub(super) fn page(document: &Document) -> Result<String> {
    let mut html = String::new();
    let _ = write!(
        html,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>Redirection paths compared</title><style>{STYLE}</style></head><body>\n"
    );
    head(&mut html, document);
    html.push_str("<h2>Result</h2>\n");
    key(&mut html, document);
    tallies(&mut html, document);
    results(&mut html, document);
    notes(&mut html, document);
    throughput(&mut html, document)?;
    load(&mut html, document)?;
    spectra(&mut html, document)?;
    cpu(&mut html, document)?;
    ratios(&mut html, document);
    figures(&mut html, document);
    html.push_str("</body></html>\n");
    Ok(html)
}

fn head(html: &mut String, document: &Document) {
    let (machine, git) = (&document.machine, &document.git);
    let _ = write!(
        html,
        "<h1>Redirection paths compared: {}</h1>\n<p class=\"about\">{} · commit {}{} · {}, {} \
         CPUs, {} of memory, Linux {}</p>\n<p class=\"about\"><code>{}</code></p>\n",
        escape(&document.paths.join(", ")),
        escape(&document.when),
        escape(&git.sha),
        if git.dirty { " with changes" } else { "" },
        escape(&machine.cpu),
        machine.cores,
        Unit::Bytes.show(machine.memory_bytes as f64),
        escape(&machine.kernel),
        escape(&document.command),
    );
    let settings = &document.settings;
    let _ = writeln!(
        html,
        "<p class=\"about\">{} rounds of {} s per trial after {} s of warm-up, paths interleaved, \
         their order flipped every round. Rules for services on the nodes: {}. \
         Noise threshold {:.1} %. Machine {:.1} % busy with all labs up and nothing measured.</p>",
        settings.rounds,
        settings.duration_s,
        settings.warmup_s,
        settings.services,
        document.noise_threshold * 100.0,
        settings.idle_busy_share * 100.0,
    );
}

fn key(html: &mut String, document: &Document) {
    html.push_str("<p class=\"key\">");
    for path in &document.paths {
        let colour = plot::css_colour(document, path);
        let _ = write!(
            html,
            "<span><i style=\"background:{colour}\"></i>{}</span>",
            escape(path)
        );
    }
    html.push_str("</p>\n");
}

/// One sentence per pair of paths: where the one is better.
fn tallies(html: &mut String, document: &Document) {
    for (of, to) in tally::pairs(document) {
        let sentence = tally::sentence(document, of, to);
        let (of, to) = (escape(of), escape(to));
        let _ = writeln!(html, "<p><b>{of} against {to}</b>: {sentence}.</p>");
    }
}

/// The table to read first: medians, and the verdict against the path before.
fn results(html: &mut String, document: &Document) {
    html.push_str(
        "<div class=\"wide\"><table class=\"main\"><tr><th class=\"l\">scope</th>\
         <th class=\"l\">workload</th><th class=\"l\">path</th><th>throughput</th>\
         <th>p50</th><th>p99</th><th>ztunnel CPU</th><th>machine CPU</th>\
         <th>ztunnel memory</th><th>errors</th>\
         <th class=\"l\">throughput against</th></tr>\n",
    );
    // Open loops have a plot of their own.
    let closed = |cell: &Cell<'_>| cell.offered_per_s.is_none();
    for cell in document.cells().into_iter().filter(closed) {
        let mut first = true;
        for path in &document.paths {
            let Some(row) = document.row(path, &cell) else {
                continue;
            };
            result_row(html, document, row, first);
            first = false;
        }
    }
    html.push_str(
        "</table></div>\n<p><small>Medians over trials. CPU per request, per connection or per \
         GB; machine CPU is the busy time of all CPUs, interrupts, load generator and node \
         agents included.</small></p>\n",
    );
}

fn result_row(html: &mut String, document: &Document, row: &Row, first: bool) {
    let errors = row.errors();
    let (scope, workload) = if first {
        (row.scope.clone(), row.cell().label())
    } else {
        Default::default()
    };
    let class = match (first, errors > 0.0) {
        (true, true) => " class=\"first error\"",
        (true, false) => " class=\"first\"",
        (false, true) => " class=\"error\"",
        (false, false) => "",
    };
    let _ = write!(
        html,
        "<tr{class}><td>{scope}</td><td class=\"l\">{workload}</td><td class=\"l\">{}</td>",
        escape(&row.path)
    );
    let shown = Metric::headlines(&row.workload).into_iter();
    for metric in shown.chain([Metric::ZtunnelMemory]) {
        let value = row.median(metric);
        let text = value.map_or_else(|| "–".to_owned(), |v| metric.show(Some(v)));
        let _ = write!(html, "<td>{text}</td>");
    }
    let against: Vec<String> = document
        .ratios
        .iter()
        .filter(|r| {
            r.of == row.path
                && r.metric == Metric::throughput(&row.workload)
                && r.cell() == row.cell()
        })
        // What the whole mesh costs is in the figures; this column is about rivals.
        .filter(|r| r.is_of_rivals() || document.paths.len() == 2)
        .map(|r| format!("{}: {}", escape(&r.to), verdict(r)))
        .collect();
    let _ = writeln!(
        html,
        "<td>{errors:.0}</td><td class=\"l\">{}</td></tr>",
        against.join("<br>")
    );
}

fn verdict(ratio: &Ratio) -> String {
    let class = match ratio.verdict {
        Verdict::Better => "better",
        Verdict::Worse => "worse",
        Verdict::NoDifference => "same",
    };
    format!(
        "<span class=\"{class}\">×{:.2} {}</span>",
        ratio.ratio,
        ratio.verdict.name()
    )
}

fn notes(html: &mut String, document: &Document) {
    html.push_str("<h2>To judge the numbers</h2>\n<ul>\n");
    for note in &document.notes {
        let _ = writeln!(html, "<li>{}</li>", escape(note));
    }
    let _ = writeln!(
        html,
        "<li>A trial counts as one observation. Intervals are bootstrap 95 % intervals of medians; \
         ratios are paired by round. A verdict other than \"no difference shown\" needs the \
         interval to lie beyond the noise threshold of its kind of metric, at least \
         2 %.</li>\n</ul>"
    );
}

fn throughput(html: &mut String, document: &Document) -> Result<()> {
    html.push_str("<h2>Throughput</h2>\n");
    key(html, document);
    let groups = [
        ("rr", ("thousand requests/s", 1e3)),
        ("stream", ("GB/s", 1e9)),
        ("connect", ("thousand connections/s", 1e3)),
    ];
    html.push_str("<div class=\"plots\">\n");
    for (workload, unit) in groups {
        bars(html, document, workload, Metric::throughput(workload), unit)?;
    }
    html.push_str(
        "</div>\n<p><small>Bars: medians. Thick lines: their 95 % intervals. Dots: trials in the \
         order of the rounds.</small></p>\n",
    );
    Ok(())
}

fn bars(
    html: &mut String,
    document: &Document,
    workload: &str,
    metric: Metric,
    unit: (&str, f64),
) -> Result<()> {
    let cells: Vec<_> = document
        .cells()
        .into_iter()
        .filter(|cell| cell.workload == workload)
        .collect();
    if let Some(svg) = plot::bars(document, &cells, metric, unit)? {
        html.push_str(&svg);
    }
    Ok(())
}

fn load(html: &mut String, document: &Document) -> Result<()> {
    let mut plots = String::new();
    for (metric, name) in [
        (Metric::P50, "median latency from when requests were due"),
        (Metric::P99, "99th percentile from when requests were due"),
    ] {
        if let Some(svg) = curve::against_load(document, metric, name)? {
            plots.push_str(&svg);
        }
    }
    if !plots.is_empty() {
        html.push_str("<h2>Latency against load</h2>\n");
        key(html, document);
        let _ = writeln!(
            html,
            "<div class=\"plots\">\n{plots}</div>\n<p><small>Open loop between nodes, 32 \
             connections, Poisson arrivals, the same rates for every path, up to 95 % of the \
             highest closed-loop rate. Lines: medians. Dots: trials.</small></p>"
        );
    }
    Ok(())
}

fn spectra(html: &mut String, document: &Document) -> Result<()> {
    let mut plots = String::new();
    let meshed = |cell: &Cell<'_>| !is_redirection_only(cell.workload);
    for cell in document.cells().into_iter().filter(meshed) {
        if let Some(svg) = plot::spectrum(document, &cell)? {
            plots.push_str(&svg);
        }
    }
    if !plots.is_empty() {
        html.push_str("<h2>Latency by percentile</h2>\n");
        key(html, document);
        let _ = writeln!(
            html,
            "<div class=\"plots\">\n{plots}</div>\n<p><small>Both axes logarithmic. At every \
             percentile the median over the trials, as far as every trial has at least ten \
             requests above.</small></p>"
        );
    }
    Ok(())
}

fn cpu(html: &mut String, document: &Document) -> Result<()> {
    html.push_str("<h2>CPU time</h2>\n");
    key(html, document);
    html.push_str("<div class=\"plots\">\n");
    for (workload, unit) in [
        (
            "rr",
            [
                "us in ztunnels per request",
                "us of the machine per request",
            ],
        ),
        (
            "stream",
            ["s in ztunnels per GB", "s of the machine per GB"],
        ),
        (
            "connect",
            [
                "us in ztunnels per connection",
                "us of the machine per connection",
            ],
        ),
    ] {
        for (of, unit) in [Spender::Ztunnels, Spender::Machine].into_iter().zip(unit) {
            let metric = Metric::cpu(of, workload);
            bars(html, document, workload, metric, (unit, 1.0))?;
        }
    }
    html.push_str("</div>\n");
    redirection_alone(html, document)?;
    processes(html, document);
    Ok(())
}

fn redirection_alone(html: &mut String, document: &Document) -> Result<()> {
    let Some(table) = alone::Table::of(document) else {
        return Ok(());
    };
    let _ = writeln!(html, "<h2>Redirection alone</h2>\n<p>{}</p>", alone::ABOUT);
    key(html, document);
    html.push_str("<div class=\"plots\">\n");
    for (workload, unit) in [
        ("redirect-rr", "us of the machine per round trip"),
        ("redirect-connect", "us of the machine per connection"),
    ] {
        let metric = Metric::cpu(Spender::Machine, workload);
        bars(html, document, workload, metric, (unit, 1.0))?;
    }
    html.push_str("</div>\n<div class=\"wide\"><table>");
    let row = |html: &mut String, cells: &[String], tag: &str| {
        html.push_str("<tr>");
        for cell in cells {
            let _ = write!(html, "<{tag}>{}</{tag}>", escape(cell));
        }
        html.push_str("</tr>\n");
    };
    row(html, &table.head, "th");
    table.lines.iter().for_each(|line| row(html, line, "td"));
    html.push_str("</table></div>\n");
    Ok(())
}

/// Where the time goes: by process, in soft interrupts, in the whole machine.
fn processes(html: &mut String, document: &Document) {
    let has = |row: &&Row| {
        row.metrics
            .contains_key(&Metric::cpu(Spender::Client, &row.workload))
    };
    if !document.rows.iter().any(|row| has(&row)) {
        return;
    }
    html.push_str(
        "<details><summary>By process</summary><div class=\"wide\"><table><tr>\
         <th class=\"l\">scope</th><th class=\"l\">workload</th><th class=\"l\">path</th>\
         <th>client</th><th>ztunnel A</th><th>ztunnel B</th><th>server</th>\
         <th>soft interrupts</th><th>whole machine</th></tr>\n",
    );
    for cell in document.cells() {
        let paths = document.paths.iter();
        for row in paths
            .filter_map(|path| document.row(path, &cell))
            .filter(has)
        {
            let _ = write!(
                html,
                "<tr><td>{}</td><td class=\"l\">{}</td><td class=\"l\">{}</td>",
                cell.scope,
                cell.label(),
                escape(&row.path)
            );
            for of in Spender::ON_THE_WAY {
                let metric = Metric::cpu(of, &row.workload);
                let value = row.median(metric);
                let text = value.map_or_else(|| "–".to_owned(), |v| metric.show(Some(v)));
                let _ = write!(html, "<td>{text}</td>");
            }
            html.push_str("</tr>\n");
        }
    }
    html.push_str(
        "</table></div><p><small>Medians; per request, connection or GB. Soft interrupts that the \
         kernel runs while a process is on the CPU count for that process too; the whole machine \
         has everything once.</small></p></details>\n",
    );
}

fn ratios(html: &mut String, document: &Document) {
    if document.ratios.is_empty() {
        return;
    }
    html.push_str(
        "<h2>All ratios</h2>\n<details><summary>Every metric of every pair of paths</summary>\
         <div class=\"wide\"><table><tr><th class=\"l\">scope</th><th class=\"l\">workload</th>\
         <th class=\"l\">metric</th><th class=\"l\">of</th><th class=\"l\">to</th>\
         <th>ratio and verdict</th><th>95 % interval</th></tr>\n",
    );
    for ratio in &document.ratios {
        let _ = writeln!(
            html,
            "<tr><td>{}</td><td class=\"l\">{}</td><td class=\"l\">{}</td>\
             <td class=\"l\">{}</td><td class=\"l\">{}</td><td>{}</td><td>{:.2} to {:.2}</td></tr>",
            ratio.scope,
            ratio.cell().label(),
            ratio.metric,
            escape(&ratio.of),
            escape(&ratio.to),
            verdict(ratio),
            ratio.ci95[0],
            ratio.ci95[1],
        );
    }
    html.push_str("</table></div></details>\n");
}

fn figures(html: &mut String, document: &Document) {
    html.push_str(
        "<h2>All figures</h2>\n<details><summary>Every metric with its interval and its trials\
         </summary><div class=\"wide\"><table><tr><th class=\"l\">scope</th>\
         <th class=\"l\">workload</th><th class=\"l\">path</th><th class=\"l\">metric</th>\
         <th>median</th><th>95 % interval</th><th>trials</th></tr>\n",
    );
    for row in &document.rows {
        for (metric, estimate) in &row.metrics {
            let show = |value: f64| metric.show(Some(value));
            let values: Vec<String> = estimate.values.iter().map(|&v| show(v)).collect();
            let _ = writeln!(
                html,
                "<tr><td>{}</td><td class=\"l\">{}</td><td class=\"l\">{}</td>\
                 <td class=\"l\">{}</td><td>{}</td><td>{} to {}</td><td>{}</td></tr>",
                row.scope,
                row.cell().label(),
                escape(&row.path),
                metric,
                show(estimate.median),
                show(estimate.ci95[0]),
                show(estimate.ci95[1]),
                values.join(", "),
            );
        }
    }
    html.push_str("</table></div></details>\n");
}

/// Text in HTML.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::tests::{example, redirection_alone};

    #[test]
    fn the_page_needs_nothing_from_elsewhere_and_has_its_plots() {
        let html = page(&example()).unwrap();
        assert!(html.matches("<svg").count() >= 3, "{html}");
        for outside in ["src=", "href=", "@import", "url("] {
            assert!(!html.contains(outside), "{outside}");
        }
        assert!(html.contains("×1.30 better"));
        assert!(html.contains("throughput better in 1, worse in 0 of 1"));
        assert!(html.contains("A note."));
    }

    #[test]
    fn redirection_alone_has_a_part_of_its_own() {
        let html = page(&redirection_alone()).unwrap();
        assert!(html.contains("<h2>Redirection alone</h2>"));
        assert!(html.contains("<td>0.70 [0.65, 0.75] better</td>"), "{html}");
        // The sentence about the mesh leaves it out.
        assert!(html.contains("throughput better in 1, worse in 0 of 1"));
        assert!(!page(&example()).unwrap().contains("Redirection alone"));
    }

    #[test]
    fn a_browser_shows_the_page_without_complaint() {
        let browser = ["chromium", "chromium-browser", "google-chrome"]
            .into_iter()
            .find(|name| Command::new(name).arg("--version").output().is_ok());
        let Some(browser) = browser else {
            eprintln!("skipped: a_browser_shows_the_page_without_complaint: no chromium");
            return;
        };
        let directory = tempfile::tempdir().unwrap();
        let (file, image) = ("report.html", "report.png");
        std::fs::write(
            directory.path().join(file),
            page(&redirection_alone()).unwrap(),
        )
        .unwrap();
        let run = |what: &[&str]| {
            let output = Command::new(browser)
                .args([
                    "--headless",
                    "--no-sandbox",
                    "--disable-gpu",
                    "--enable-logging=stderr",
                ])
                .arg(format!(
                    "--user-data-dir={}",
                    directory.path().join("data").display()
                ))
                .args(what)
                .arg(directory.path().join(file))
                .current_dir(directory.path())
                .output()
                .unwrap();
            assert!(output.status.success(), "{output:?}");
            let log = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(!log.contains("CONSOLE"), "{log}");
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        let dom = run(&["--dump-dom"]);
        let plots = dom.matches("<svg").count();
        assert!(plots >= 6, "{plots} plots");
        run(&["--window-size=1240,2400", &format!("--screenshot={image}")]);
        let bytes = std::fs::read(directory.path().join(image)).unwrap();
        // An empty page of this size is some 10 kB.
        assert!(
            bytes.starts_with(b"\x89PNG") && bytes.len() > 40_000,
            "{} bytes",
            bytes.len()
        );
    }

    #[test]
    fn text_from_outside_is_escaped() {
        let mut document = example();
        document.command = "lab compare --out '<script>'".to_owned();
        document.notes.push("a < b & c".to_owned());
        let html = page(&document).unwrap();
        assert!(!html.contains("<script>"));
        assert!(html.contains("a &lt; b &amp; c"));
    }
}
