//! How many CPUs' worth of time this process may use: the limit of its control group.

use std::fs;
use std::path::Path;

/// CPUs the control groups of this process allow, rounded up; none if there is no limit. Of nested
/// groups the tightest counts.
#[must_use]
pub fn cpu_limit() -> Option<usize> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    limit_below(Path::new("/sys/fs/cgroup"), &own)
}

/// The limit of the groups in `own` (the text of `/proc/self/cgroup`) mounted at `root`.
fn limit_below(root: &Path, own: &str) -> Option<usize> {
    let mut tightest: Option<f64> = None;
    for line in own.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let unified = controllers.is_empty();
        let mount = if unified {
            root.to_owned()
        } else if controllers.split(',').any(|name| name == "cpu") {
            root.join(controllers)
        } else {
            continue;
        };
        // Inside a container the path may be the host's, and only the mount's root is there.
        let group = mount.join(path.trim_start_matches('/'));
        for directory in group.ancestors().take_while(|dir| dir.starts_with(&mount)) {
            let found = if unified {
                quota_v2(directory)
            } else {
                quota_v1(directory)
            };
            if let Some(cpus) = found {
                tightest = Some(tightest.map_or(cpus, |other| other.min(cpus)));
            }
        }
    }
    tightest.map(|cpus| (cpus.ceil() as usize).max(1))
}

/// `cpu.max`: "QUOTA PERIOD" in microseconds, or "max PERIOD".
fn quota_v2(directory: &Path) -> Option<f64> {
    let text = fs::read_to_string(directory.join("cpu.max")).ok()?;
    let mut words = text.split_whitespace();
    ratio(words.next()?, words.next()?)
}

/// `cpu.cfs_quota_us` (-1: no limit) and `cpu.cfs_period_us`.
fn quota_v1(directory: &Path) -> Option<f64> {
    let read = |name| fs::read_to_string(directory.join(name)).ok();
    ratio(
        read("cpu.cfs_quota_us")?.trim(),
        read("cpu.cfs_period_us")?.trim(),
    )
}

fn ratio(quota: &str, period: &str) -> Option<f64> {
    let (quota, period): (f64, f64) = (quota.parse().ok()?, period.parse().ok()?);
    (quota > 0.0 && period > 0.0).then_some(quota / period)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_group_counts_rounded_up() {
        let root = std::env::temp_dir().join(format!("rt-cgroup-{}", std::process::id()));
        let pod = root.join("pods/one");
        let v1 = root.join("cpu,cpuacct");
        fs::create_dir_all(&pod).unwrap();
        fs::create_dir_all(&v1).unwrap();
        let limit = |own: &str| limit_below(&root, own);
        assert_eq!(limit("0::/pods/one\n"), None);
        fs::write(pod.join("cpu.max"), "max 100000\n").unwrap();
        assert_eq!(limit("0::/pods/one\n"), None);
        fs::write(root.join("pods/cpu.max"), "250000 100000\n").unwrap();
        assert_eq!(limit("0::/pods/one\n"), Some(3));
        fs::write(pod.join("cpu.max"), "20000 100000\n").unwrap();
        assert_eq!(limit("0::/pods/one\n"), Some(1));
        assert_eq!(limit("0::/pods\n"), Some(3));
        fs::write(v1.join("cpu.cfs_quota_us"), "-1\n").unwrap();
        fs::write(v1.join("cpu.cfs_period_us"), "100000\n").unwrap();
        let own = "5:memory:/elsewhere\n4:cpu,cpuacct:/not/visible/here\n";
        assert_eq!(limit(own), None);
        fs::write(v1.join("cpu.cfs_quota_us"), "150000\n").unwrap();
        assert_eq!(limit(own), Some(2));
        assert_eq!(limit("nonsense"), None);
        fs::remove_dir_all(root).unwrap();
    }
}
