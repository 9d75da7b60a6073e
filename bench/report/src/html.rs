//! `report.html`: one self-contained page, the answer first, the details folded after it.

use std::fmt::Write as _;

use anyhow::Result;

use super::escape::escape;
use super::metric::{Metric, Spender};
use super::schema::{Cell, Document, Ratio, Row, is_redirection_only};
use super::units::Unit;
use super::{alone, answer, curve, plot};

const STYLE: &str = include_str!("style.css");

/// The page.
pub(super) fn page(document: &Document) -> Result<String> {
    let mut html = String::new();
    let _ = write!(
        html,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>Redirection paths compared</title><style>\n{STYLE}</style></head><body>\n"
    );
    head(&mut html, document);
    answer::write(&mut html, document);
    html.push_str("<h2>Details</h2>\n");
    let folded: [(&str, Part); 7] = [
        ("All results", |html, document| {
            results(html, document);
            Ok(())
        }),
        ("To judge the numbers", |html, document| {
            notes(html, document);
            Ok(())
        }),
        ("Throughput", throughput),
        ("Latency against load", load),
        ("Latency by percentile", spectra),
        ("CPU time", cpu),
        ("Redirection alone", redirection_alone),
    ];
    for (name, part) in folded {
        fold(&mut html, name, |html| part(html, document))?;
    }
    fold(&mut html, "CPU time by process", |html| {
        processes(html, document);
        Ok(())
    })?;
    fold(&mut html, "All ratios", |html| {
        ratios(html, document);
        Ok(())
    })?;
    fold(&mut html, "All figures", |html| {
        figures(html, document);
        Ok(())
    })?;
    html.push_str("</body></html>\n");
    Ok(html)
}

/// Writes a part of the page; nothing if there is nothing of it.
type Part = fn(&mut String, &Document) -> Result<()>;

/// A part that is there for those who open it.
fn fold(
    html: &mut String,
    name: &str,
    write: impl FnOnce(&mut String) -> Result<()>,
) -> Result<()> {
    let mut part = String::new();
    write(&mut part)?;
    if !part.is_empty() {
        let _ = write!(
            html,
            "<details><summary>{name}</summary>\n{part}</details>\n"
        );
    }
    Ok(())
}

fn head(html: &mut String, document: &Document) {
    let (machine, git) = (&document.machine, &document.git);
    let _ = write!(
        html,
        "<h1>Redirection paths compared</h1>\n<p class=\"about\">{} · commit {}{} · {}, {} \
         CPUs, {} of memory, Linux {}</p>\n",
        escape(&document.when),
        escape(&git.sha),
        if git.dirty { " with changes" } else { "" },
        escape(&machine.cpu),
        machine.cores,
        Unit::Bytes.show(machine.memory_bytes as f64),
        escape(&machine.kernel),
    );
}

/// How it was measured.
fn method(html: &mut String, document: &Document) {
    let settings = &document.settings;
    let _ = writeln!(
        html,
        "<p><code>{}</code></p>\n<p>{} rounds of {} s per trial after {} s of warm-up, paths \
         interleaved, their order flipped every round. Rules for services on the nodes: {}. \
         Noise threshold {:.1} %. Machine {:.1} % busy with all labs up and nothing measured.</p>",
        escape(&document.command),
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

/// Medians, and how the path that the comparison is about does against each.
fn results(html: &mut String, document: &Document) {
    html.push_str(
        "<div class=\"wide\"><table class=\"main\"><tr><th class=\"l\">scope</th>\
         <th class=\"l\">workload</th><th class=\"l\">path</th><th>throughput</th>\
         <th>p50</th><th>p99</th><th>ztunnel CPU</th><th>machine CPU</th>\
         <th>ztunnel memory</th><th>errors</th>\
         <th class=\"l\">throughput of ",
    );
    let subject = escape(answer::subject(document));
    let _ = writeln!(html, "{subject} against it</th></tr>");
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
    let against = answer::against(document, &row.path, &row.cell());
    let against = against.map_or_else(String::new, verdict);
    let _ = writeln!(
        html,
        "<td>{errors:.0}</td><td class=\"l\">{}</td></tr>",
        against
    );
}

fn verdict(ratio: &Ratio) -> String {
    let (class, name) = (answer::class(ratio.verdict), ratio.verdict.name());
    format!("<span class=\"{class}\">×{:.2} {name}</span>", ratio.ratio)
}

fn notes(html: &mut String, document: &Document) {
    method(html, document);
    html.push_str("<ul>\n");
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
    Ok(())
}

fn redirection_alone(html: &mut String, document: &Document) -> Result<()> {
    let Some(table) = alone::Table::of(document) else {
        return Ok(());
    };
    let _ = writeln!(html, "<p>{}</p>", alone::ABOUT);
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
        "<div class=\"wide\"><table><tr>\
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
         has everything once.</small></p>\n",
    );
}

fn ratios(html: &mut String, document: &Document) {
    if document.ratios.is_empty() {
        return;
    }
    html.push_str(
        "<div class=\"wide\"><table><tr><th class=\"l\">scope</th><th class=\"l\">workload</th>\
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
    html.push_str("</table></div>\n");
}

fn figures(html: &mut String, document: &Document) {
    html.push_str(
        "<div class=\"wide\"><table><tr><th class=\"l\">scope</th>\
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
                 <td class=\"l\">{}</td><td>{}</td><td>{} to {}</td><td class=\"v\">{}</td></tr>",
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
    html.push_str("</table></div>\n");
}

#[cfg(test)]
mod tests {
    use std::path::Path;
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
        assert!(html.contains("+1 −0<small> of 1</small>"));
        assert!(html.contains("A note."));
    }

    #[test]
    fn redirection_alone_has_a_part_of_its_own() {
        let html = page(&redirection_alone()).unwrap();
        assert!(html.contains("<summary>Redirection alone</summary>"));
        assert!(html.contains("<td>0.70 [0.65, 0.75] better</td>"), "{html}");
        // The counts of the mesh leave it out.
        assert!(html.contains("+1 −0<small> of 1</small>"));
        assert!(!page(&example()).unwrap().contains("Redirection alone"));
    }

    fn browser() -> Option<&'static str> {
        ["chromium", "chromium-browser", "google-chrome"]
            .into_iter()
            .find(|name| Command::new(name).arg("--version").output().is_ok())
    }

    /// What a browser prints of a file in `directory`; nothing on the page may complain.
    fn run(browser: &str, directory: &Path, file: &str, what: &[&str]) -> String {
        let data = directory.join("data");
        let output = Command::new(browser)
            .args([
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--enable-logging=stderr",
            ])
            .arg(format!("--user-data-dir={}", data.display()))
            .args(what)
            .arg(directory.join(file))
            .current_dir(directory)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!log.contains("CONSOLE"), "{log}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    #[test]
    fn a_browser_shows_the_page_without_complaint() {
        let Some(browser) = browser() else {
            eprintln!("skipped: a_browser_shows_the_page_without_complaint: no chromium");
            return;
        };
        let directory = tempfile::tempdir().unwrap();
        let (file, image) = ("report.html", "report.png");
        let page = page(&redirection_alone()).unwrap();
        std::fs::write(directory.path().join(file), page).unwrap();
        let dom = run(browser, directory.path(), file, &["--dump-dom"]);
        let plots = dom.matches("<svg").count();
        assert!(plots >= 6, "{plots} plots");
        let screenshot = format!("--screenshot={image}");
        let options = ["--window-size=1240,2400", &screenshot];
        run(browser, directory.path(), file, &options);
        let bytes = std::fs::read(directory.path().join(image)).unwrap();
        // An empty page of this size is some 10 kB.
        assert!(
            bytes.starts_with(b"\x89PNG") && bytes.len() > 40_000,
            "{} bytes",
            bytes.len()
        );
    }

    /// A page as wide as it says, that tells the page around it what does not fit: what reaches
    /// beyond its right edge, and of what may scroll sideways whatever has to.
    const PROBE: &str = r#"<script>
        const width = document.documentElement.clientWidth, cut = [];
        const scrolls = width > 700 ? '.wide, .plots' : '.wide:has(.matrix)';
        for (const e of document.querySelectorAll('body *')) {
            const inner = e.parentElement.closest('.wide, .plots');
            if (!inner && e.getBoundingClientRect().right > width + 1) cut.push(e.outerHTML);
            if (e.matches(scrolls) && e.scrollWidth > e.clientWidth + 1) cut.push(e.outerHTML);
        }
        const found = cut.map(html => html.slice(0, 150).replace(/[<>&]/g, ' '));
        parent.postMessage(`looked ${width}: ${found.length} cut off ${found.slice(0, 5)}`, '*');
        </script></body>"#;
    const AROUND: &str = r#"<body><script>
        addEventListener('message', e => document.body.append(e.data));
        </script><iframe width=1400 height=900 style="border:0" src="page.html"></iframe>
        <iframe width=390 height=900 style="border:0" src="page.html"></iframe></body>"#;

    #[test]
    fn nothing_is_cut_off_on_a_desk_or_on_a_phone() {
        let Some(browser) = browser() else {
            eprintln!("skipped: nothing_is_cut_off_on_a_desk_or_on_a_phone: no chromium");
            return;
        };
        let results = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../results");
        let committed = crate::readme::directories(&results).unwrap().into_iter();
        let committed = committed.filter_map(|directory| crate::read(&directory).ok());
        for document in committed.chain([redirection_alone()]) {
            let directory = tempfile::tempdir().unwrap();
            let page = page(&document).unwrap();
            // What is folded must fit as well once it is open.
            let page = page.replace("<details>", "<details open>");
            let page = page.replace("</body>", PROBE);
            std::fs::write(directory.path().join("page.html"), page).unwrap();
            std::fs::write(directory.path().join("around.html"), AROUND).unwrap();
            let options = [
                "--virtual-time-budget=20000",
                "--hide-scrollbars",
                "--dump-dom",
            ];
            let dom = run(browser, directory.path(), "around.html", &options);
            for width in ["1400", "390"] {
                assert!(
                    dom.contains(&format!("looked {width}: 0 cut off")),
                    "{}: {dom}",
                    document.command
                );
            }
        }
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
