//! Metrics of the process itself, from /proc.

use std::fs;

/// Name, help and value of each metric that /proc tells; one it does not tell is left out.
pub(crate) fn metrics() -> Vec<(&'static str, &'static str, u64)> {
    let mut metrics = Vec::new();
    if let Some(open) = open_fds() {
        metrics.push(("process_open_fds", "Number of open file descriptors", open));
    }
    let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    if let Some(max) = max_fds(&limits) {
        metrics.push((
            "process_max_fds",
            "Maximum number of open file descriptors",
            max,
        ));
    }
    metrics
}

fn open_fds() -> Option<u64> {
    let entries = fs::read_dir("/proc/self/fd").ok()?.count();
    // One of them was the directory itself.
    u64::try_from(entries.saturating_sub(1)).ok()
}

/// The soft limit of `Max open files` in /proc/self/limits.
fn max_fds(limits: &str) -> Option<u64> {
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    match line.split_whitespace().next()? {
        "unlimited" => Some(u64::MAX),
        number => number.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_as_the_kernel_writes_them() {
        let text = "Limit                     Soft Limit           Hard Limit           Units\n\
                    Max processes             1                    2                    processes\n\
                    Max open files            1024                 524288               files\n";
        assert_eq!(max_fds(text), Some(1024));
        assert_eq!(
            max_fds("Max open files   unlimited  unlimited  files"),
            Some(u64::MAX)
        );
        assert_eq!(max_fds(""), None);
        assert_eq!(max_fds("Max open files\n"), None);
    }

    #[test]
    fn an_open_file_is_counted() {
        let names: Vec<_> = metrics().into_iter().map(|(name, ..)| name).collect();
        assert_eq!(names, ["process_open_fds", "process_max_fds"]);
        let files: Vec<_> = (0..64)
            .map(|_| fs::File::open("/proc/self/stat").unwrap())
            .collect();
        // Other tests open and close a few meanwhile.
        assert!(open_fds().unwrap() >= 64);
        drop(files);
    }
}
