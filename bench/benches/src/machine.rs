//! What the numbers belong to: the machine and the sources.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use serde_json::{Value, json};

/// Describes this machine: processor, CPUs, kernel, memory.
#[must_use]
pub fn machine() -> Value {
    let field = |path: &str, name: &str| {
        let text = fs::read_to_string(path).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let kilobytes = field("/proc/meminfo", "MemTotal")
        .and_then(|value| value.split_whitespace().next()?.parse::<u64>().ok());
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    json!({
        "cpu": field("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown".to_owned()),
        "cores": thread::available_parallelism().map_or(1, usize::from),
        "kernel": kernel.trim(),
        "memory_bytes": kilobytes.unwrap_or(0) * 1024,
    })
}

/// State of the repository the current directory is in.
#[must_use]
pub fn git() -> Value {
    let changed = git_says(&["status", "--porcelain", "--untracked-files=no"]);
    json!({
        "sha": git_says(&["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "unknown".into()),
        "dirty": changed.is_some_and(|text| !text.is_empty()),
    })
}

/// The newest directory of `results/` that a comparison wrote, by what its `report.json` says,
/// full comparisons of `ebpf` and `tunnel` before all others; `results/tmp` where there is none.
#[must_use]
pub fn newest_results() -> PathBuf {
    let root = git_says(&["rev-parse", "--show-toplevel"]).unwrap_or_else(|| ".".to_owned());
    newest_in(&Path::new(&root).join("results"))
}

fn newest_in(results: &Path) -> PathBuf {
    let entries = fs::read_dir(results).into_iter().flatten().flatten();
    let reports = entries.filter_map(|entry| {
        let text = fs::read_to_string(entry.path().join("report.json")).ok()?;
        let report: Value = serde_json::from_str(&text).ok()?;
        let paths = report["paths"].as_array().cloned().unwrap_or_default();
        let both = ["ebpf", "tunnel"]
            .iter()
            .all(|path| paths.contains(&json!(path)));
        let full = !report["command"].as_str()?.contains("--quick");
        Some((
            both,
            full,
            report["when"].as_str()?.to_owned(),
            entry.path(),
        ))
    });
    let newest = reports.max();
    newest.map_or_else(|| results.join("tmp"), |(.., path)| path)
}

fn git_says(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    output.status.success().then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_full_comparison_wins() {
        let results = tempfile::tempdir().unwrap();
        assert_eq!(newest_in(results.path()), results.path().join("tmp"));
        let of = |name: &str, when: &str, paths: &[&str], command: &str| {
            let directory = results.path().join(name);
            fs::create_dir(&directory).unwrap();
            let report = json!({"when": when, "paths": paths, "command": command});
            fs::write(directory.join("report.json"), report.to_string()).unwrap();
        };
        fs::create_dir(results.path().join("without")).unwrap();
        let (both, full) = (["tunnel", "ebpf"], "lab compare");
        of("old", "2026-01-01T00:00:00Z", &both, full);
        of("new", "2026-01-02T00:00:00Z", &both, full);
        of(
            "quick",
            "2026-01-03T00:00:00Z",
            &both,
            "lab compare --quick",
        );
        of("one", "2026-01-04T00:00:00Z", &["ebpf"], full);
        assert_eq!(newest_in(results.path()), results.path().join("new"));
    }
}
