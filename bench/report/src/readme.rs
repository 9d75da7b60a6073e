//! The README's results: what is between two markers, made from a directory of results.
//!
//! Nothing there is written by hand. A test renders the section again and compares it with what
//! the README has, so that neither can change without the other.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use super::metric::{Metric, Spender};
use super::schema::{Cell, Document, Verdict};
use super::{OVERVIEW, read, tally};

const BEGIN: &str = "<!-- results:begin -->";
const END: &str = "<!-- results:end -->";
/// The paths whose ratio is shown.
const OF: &str = "ebpf";
const TO: &str = "tunnel";
/// What a reader wants to know first, in this order: scope, workload and connections.
const HEADLINES: [(&str, &str, u32); 8] = [
    ("cross-node", "rr", 1),
    ("cross-node", "rr", 32),
    ("cross-node", "rr", 256),
    ("cross-node", "stream", 8),
    ("cross-node", "connect", 16),
    ("same-node", "rr", 32),
    ("same-node", "stream", 8),
    ("same-node", "connect", 16),
];
/// Other proxies that have a column, of those that were measured; the report has all.
const PEERS: [&str; 2] = ["conventional", "envoy-hbone"];

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
    headlines(&mut text, &document);
    Ok(text)
}

fn about(document: &Document, link: &str) -> String {
    let (machine, settings) = (&document.machine, &document.settings);
    let mut text = format!(
        "`{}` on {}, {} CPUs, Linux {}, commit {}{}: {} rounds of {} s per trial, paths \
         interleaved.\n[report.md]({link}/report.md) has all workloads, paths, other proxies and \
         parts; [{link}]({link}) every trial.\n",
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
    let _ = write!(
        text,
        "`{OF}` against `{TO}`: {}.",
        tally::sentence(document, OF, TO)
    );
    if let Some(itself) = &document.against_itself {
        let _ = write!(
            text,
            " `{}` against itself: no difference in {} of {}.",
            itself.path,
            itself.ratios - itself.differing,
            itself.ratios
        );
    }
    text.push('\n');
    text
}

/// Closed loops where the whole comparison ran; the rest is in the report.
fn cell<'a>(document: &'a Document, headline: (&str, &str, u32)) -> Option<Cell<'a>> {
    document.cells().into_iter().find(|cell| {
        let plain = cell.offered_per_s.is_none() && cell.placement.is_none();
        plain && (cell.scope, cell.workload, cell.connections) == headline
    })
}

/// What ours is compared with: the head of the column and the two paths.
fn columns(document: &Document) -> Vec<(String, String, String)> {
    let column = |name: &str, of: &str, to: &str| (name.to_owned(), of.to_owned(), to.to_owned());
    let mut columns = vec![
        column("no mesh", OF, "none"),
        column("the tunnel path", OF, TO),
    ];
    for peer in &document.peers {
        if PEERS.contains(&peer.name.as_str()) {
            columns.push(column(&peer.name, &peer.redirect, &peer.name));
        }
    }
    columns
}

fn headlines(text: &mut String, document: &Document) {
    let columns = columns(document);
    text.push_str(
        "\nOurs against others, each on the same redirection: rate / p50 / CPU of the whole \
         machine per request, connection or GB,\nas ratios of paired trials (`~`: no difference \
         shown).\n\n| workload |",
    );
    for (name, of, _) in &columns {
        let _ = write!(text, " {of} / {name} |");
    }
    text.push_str("\n| --- |");
    text.push_str(&" --- |".repeat(columns.len()));
    text.push('\n');
    for cell in HEADLINES.iter().filter_map(|name| cell(document, *name)) {
        let shown = columns.iter().map(|(_, of, to)| {
            let metrics = [
                Metric::throughput(cell.workload),
                Metric::P50,
                Metric::cpu(Spender::Machine, cell.workload),
            ];
            let ratios = metrics.map(|metric| short(document, &cell, metric, (of, to)));
            let ratios: Vec<String> = ratios.into_iter().flatten().collect();
            ratios.join(" / ")
        });
        let shown: Vec<String> = shown.collect();
        let (scope, label) = (cell.scope, cell.label());
        let _ = writeln!(text, "| {scope} {label} | {} |", shown.join(" | "));
    }
}

/// A ratio with two decimals, marked if it shows no difference.
fn short(
    document: &Document,
    cell: &Cell<'_>,
    metric: Metric,
    (of, to): (&str, &str),
) -> Option<String> {
    let ratio = document.ratio(cell, metric, (of, to))?;
    let mark = match ratio.verdict {
        Verdict::NoDifference => "~",
        Verdict::Better | Verdict::Worse => "",
    };
    Some(format!("{:.2}{mark}", ratio.ratio))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::schema::Peer;
    use crate::tests::{example, redirection_alone};

    fn stored(document: &Document, directory: &Path) {
        fs::create_dir_all(directory).unwrap();
        let json = serde_json::to_string(document).unwrap();
        fs::write(directory.join("report.json"), json).unwrap();
    }

    #[test]
    fn the_section_is_a_short_table_of_ratios_with_links() {
        let root = tempfile::tempdir().unwrap();
        let (directory, readme) = (root.path().join("results/x"), root.path().join("README.md"));
        let mut document = redirection_alone();
        for name in ["conventional", "haproxy"] {
            document.peers.push(Peer {
                name: name.to_owned(),
                binary: name.to_owned(),
                redirect: "ebpf".to_owned(),
                mode: "shared".to_owned(),
                about: Default::default(),
            });
            let mut against = document.ratios[0].clone();
            name.clone_into(&mut against.to);
            against.verdict = Verdict::NoDifference;
            document.ratios.push(against);
        }
        stored(&document, &directory);
        fs::write(&readme, format!("a\n{BEGIN}\nold\n{END}\nb\n")).unwrap();
        update(&directory, &readme).unwrap();
        let text = fs::read_to_string(&readme).unwrap();
        assert!(
            text.starts_with(&format!("a\n{BEGIN}\n")) && text.ends_with(&format!("{END}\nb\n"))
        );
        for wanted in [
            "[report.md](results/x/report.md)",
            "| workload | ebpf / no mesh | ebpf / the tunnel path | ebpf / conventional |\n",
            "| cross-node rr x32 | 0.50 | 1.30 | 1.30~ |\n",
            "throughput better in 1, worse in 0 of 1",
        ] {
            assert!(text.contains(wanted), "{wanted}: {text}");
        }
        for unwanted in ["old", "rr-open", "redirect-rr", "haproxy |"] {
            assert!(!text.contains(unwanted), "{unwanted}: {text}");
        }
        // Once more changes nothing.
        update(&directory, &readme).unwrap();
        assert_eq!(fs::read_to_string(&readme).unwrap(), text);
    }

    #[test]
    fn the_readme_is_read_in_five_minutes() {
        let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md");
        let lines = fs::read_to_string(readme).unwrap().lines().count();
        assert!(lines <= 120, "README.md has {lines} lines: at most 120");
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
