//! What the numbers belong to: the machine and the sources.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use nix::sys::utsname::uname;

use report::schema::{Git, Machine};

/// Describes this machine.
pub(super) fn machine() -> Machine {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let kilobytes = field(&read("/proc/meminfo"), "MemTotal")
        .and_then(|value| value.split_whitespace().next()?.parse::<u64>().ok());
    Machine {
        cpu: field(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| "unknown".to_owned()),
        cores: thread::available_parallelism().map_or(1, usize::from),
        kernel: uname().map_or_else(
            |_| "unknown".to_owned(),
            |u| u.release().to_string_lossy().into_owned(),
        ),
        memory_bytes: kilobytes.unwrap_or(0) * 1024,
    }
}

/// State of the repository the current directory is in.
pub(super) fn git() -> Git {
    let sha = git_says(&["rev-parse", "--short=12", "HEAD"]);
    let changed = git_says(&["status", "--porcelain", "--untracked-files=no"]);
    Git {
        dirty: changed.is_some_and(|text| !text.is_empty()),
        sha: sha.unwrap_or_else(|| "unknown".to_owned()),
    }
}

/// Where results go that are not sent elsewhere: `results/<date>-<machine>-<sha>`, with a number
/// if that exists.
pub(super) fn results_directory(date: &str, machine: &Machine, git: &Git) -> PathBuf {
    let root = git_says(&["rev-parse", "--show-toplevel"]).unwrap_or_else(|| ".".to_owned());
    let name = format!("{date}-{}-{}", slug(machine), git.sha);
    let base = Path::new(&root).join("results");
    let first = base.join(&name);
    if !first.exists() {
        return first;
    }
    // Ends: directories are finitely many.
    (2u32..)
        .map(|n| base.join(format!("{name}-{n}")))
        .find(|p| !p.exists())
        .unwrap_or(first)
}

/// The machine in a directory's name, from its processor and not from its host name, which says
/// nothing to others.
fn slug(machine: &Machine) -> String {
    let mut slug = String::new();
    for c in machine
        .cpu
        .to_lowercase()
        .replace("(r)", "")
        .replace("(tm)", "")
        .chars()
    {
        match c {
            'a'..='z' | '0'..='9' => slug.push(c),
            _ if slug.ends_with('-') => {}
            _ => slug.push('-'),
        }
    }
    slug.truncate(32);
    format!("{}-{}cpu", slug.trim_matches('-'), machine.cores)
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
    fn this_machine_is_described() {
        let machine = machine();
        assert!(machine.cores >= 1);
        assert!(machine.memory_bytes > 1 << 20);
        assert_ne!(machine.kernel, "unknown");
    }

    #[test]
    fn directory_names_hold_no_odd_characters() {
        let mut machine = machine();
        machine.cpu = "Intel(R) Xeon(R) CPU @ 2.20GHz with a name beyond reason".to_owned();
        machine.cores = 8;
        assert_eq!(slug(&machine), "intel-xeon-cpu-2-20ghz-with-a-na-8cpu");
    }
}
