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

/// The newest directory of `results/` that a comparison wrote (it holds a `report.json`), by the
/// time of that file; `results/tmp` where there is none.
#[must_use]
pub fn newest_results() -> PathBuf {
    let root = git_says(&["rev-parse", "--show-toplevel"]).unwrap_or_else(|| ".".to_owned());
    newest_in(&Path::new(&root).join("results"))
}

fn newest_in(results: &Path) -> PathBuf {
    let entries = fs::read_dir(results).into_iter().flatten().flatten();
    let reports = entries.filter_map(|entry| {
        let written = fs::metadata(entry.path().join("report.json")).ok()?;
        Some((written.modified().ok()?, entry.path()))
    });
    let newest = reports.max();
    newest.map_or_else(|| results.join("tmp"), |(_, path)| path)
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
    fn the_newest_report_wins() {
        let results = tempfile::tempdir().unwrap();
        assert_eq!(newest_in(results.path()), results.path().join("tmp"));
        for name in ["b", "a", "without"] {
            fs::create_dir(results.path().join(name)).unwrap();
        }
        for (name, age_s) in [("b", 100), ("a", 10)] {
            let file = fs::File::create(results.path().join(name).join("report.json")).unwrap();
            let age = std::time::Duration::from_secs(age_s);
            file.set_modified(std::time::SystemTime::now() - age)
                .unwrap();
        }
        assert_eq!(newest_in(results.path()), results.path().join("a"));
    }
}
