//! CPU time and memory as the kernel counts them.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context as _, Result};
use nix::unistd::{SysconfVar, sysconf};

/// Counters at one moment.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    threads: BTreeMap<(u32, u32), ThreadTime>,
    machine: MachineTime,
}

#[derive(Clone, Copy, Debug, Default)]
struct ThreadTime {
    /// ns on a CPU.
    ns: u64,
    /// Context switches, voluntary or not.
    switches: u64,
}

/// What passed between two samples.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spent {
    /// CPU time of the processes, in s.
    pub(super) processes_s: f64,
    /// Context switches of the processes.
    pub(super) switches: u64,
    /// Busy CPU time of the whole machine, interrupts included, in s.
    pub(super) machine_s: f64,
    /// CPU time of the whole machine in soft interrupts, in s: network receive, for the most part.
    pub(super) softirq_s: f64,
    /// Busy share of the machine's CPU time.
    pub(super) busy_share: f64,
}

impl Sample {
    /// Reads the counters of `pids` and of the machine.
    pub(super) fn take(pids: &[u32]) -> Result<Self> {
        let mut threads = BTreeMap::new();
        for &pid in pids {
            let path = format!("/proc/{pid}/task");
            let tasks = fs::read_dir(&path)
                .with_context(|| format!("reading {path}: ztunnel {pid} has gone"))?;
            for task in tasks {
                let task = task.with_context(|| format!("reading {path}"))?;
                // A thread may end in between; then it is missing from both sides.
                let Ok(text) = fs::read_to_string(task.path().join("schedstat")) else {
                    continue;
                };
                let tid = task.file_name().to_string_lossy().parse().unwrap_or(0);
                let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
                let time = ThreadTime {
                    ns: first_number(&text),
                    switches: switches(&status),
                };
                threads.insert((pid, tid), time);
            }
        }
        Ok(Self {
            threads,
            machine: MachineTime::now()?,
        })
    }

    /// What passed since `earlier`.
    pub(super) fn since(&self, earlier: &Self) -> Spent {
        let (mut ns, mut switches) = (0, 0);
        for (thread, now) in &self.threads {
            let then = earlier.threads.get(thread).copied().unwrap_or_default();
            ns += now.ns.saturating_sub(then.ns);
            switches += now.switches.saturating_sub(then.switches);
        }
        let softirq = self.machine.softirq.saturating_sub(earlier.machine.softirq) as f64;
        let busy = self.machine.busy.saturating_sub(earlier.machine.busy) as f64;
        let all = self.machine.all.saturating_sub(earlier.machine.all) as f64;
        Spent {
            processes_s: ns as f64 / 1e9,
            switches,
            machine_s: busy / ticks_per_s(),
            softirq_s: softirq / ticks_per_s(),
            busy_share: if all > 0.0 { busy / all } else { 0.0 },
        }
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct MachineTime {
    busy: u64,
    softirq: u64,
    all: u64,
}

impl MachineTime {
    fn now() -> Result<Self> {
        let text = fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
        Self::parse(&text).context("reading /proc/stat: no line `cpu`")
    }

    /// Sums of the first line: user nice system idle iowait irq softirq steal, in ticks. Guest
    /// time is in user already; steal is another machine's time.
    fn parse(text: &str) -> Option<Self> {
        let line = text.lines().find_map(|line| line.strip_prefix("cpu "))?;
        let ticks: Vec<u64> = line
            .split_whitespace()
            .map_while(|t| t.parse().ok())
            .collect();
        let [user, nice, system, idle, iowait, irq, softirq, ..] = ticks[..] else {
            return None;
        };
        let busy = user + nice + system + irq + softirq;
        Some(Self {
            busy,
            softirq,
            all: busy + idle + iowait + ticks.get(7).copied().unwrap_or(0),
        })
    }
}

/// The switches in a thread's `status`.
fn switches(status: &str) -> u64 {
    let lines = status
        .lines()
        .filter_map(|line| line.split_once("voluntary_ctxt_switches:"));
    lines.map(|(_, value)| first_number(value)).sum()
}

fn ticks_per_s() -> f64 {
    // 100 on every architecture Linux has had for twenty years.
    sysconf(SysconfVar::CLK_TCK)
        .ok()
        .flatten()
        .map_or(100.0, |ticks| ticks as f64)
}

/// Resident memory of `pids` together, in bytes.
pub(super) fn resident_bytes(pids: &[u32]) -> u64 {
    pids.iter()
        .filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/status")).ok())
        .filter_map(|status| {
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("VmRSS:"))?;
            Some(first_number(line) * 1024)
        })
        .sum()
}

fn first_number(text: &str) -> u64 {
    text.split_whitespace()
        .next()
        .and_then(|t| t.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use nix::time::{ClockId, clock_gettime};

    use super::*;

    fn cpu_time() -> Duration {
        clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
            .unwrap()
            .into()
    }

    #[test]
    fn busy_time_includes_interrupts_and_not_waiting() {
        let stat = "cpu  10 1 20 400 50 3 4 7 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n";
        assert_eq!(
            MachineTime::parse(stat),
            Some(MachineTime {
                busy: 38,
                softirq: 4,
                all: 495
            })
        );
        assert_eq!(MachineTime::parse("intr 1 2\n"), None);
    }

    #[test]
    fn time_spent_computing_is_accounted() {
        let own = [std::process::id()];
        let before = Sample::take(&own).unwrap();
        let begun = cpu_time();
        while cpu_time() - begun < Duration::from_millis(200) {
            std::hint::spin_loop();
        }
        let spent = Sample::take(&own).unwrap().since(&before);
        // Other threads of the tests run as well, so there is no upper bound but the CPUs.
        assert!(spent.processes_s > 0.19, "{spent:?}");
        assert!(spent.machine_s > 0.05, "{spent:?}");
        assert!((0.0..=1.0).contains(&spent.busy_share));
    }

    #[test]
    fn both_kinds_of_context_switches_count() {
        let status = "Name:\tx\nvoluntary_ctxt_switches:\t7\nnonvoluntary_ctxt_switches:\t5\n";
        assert_eq!(switches(status), 12);
        let own = [std::process::id()];
        let before = Sample::take(&own).unwrap();
        for _ in 0..5 {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(Sample::take(&own).unwrap().since(&before).switches >= 5);
    }

    #[test]
    fn own_memory_is_seen_and_no_process_is_zero() {
        assert!(resident_bytes(&[std::process::id()]) > 100_000);
        assert_eq!(resident_bytes(&[]), 0);
    }

    #[test]
    fn a_process_that_does_not_exist_is_an_error() {
        let error = Sample::take(&[u32::MAX]).unwrap_err();
        assert!(error.to_string().contains("has gone"), "{error}");
    }
}
