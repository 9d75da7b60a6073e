//! CPU time and memory as the kernel counts them.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::{Pid, SysconfVar, sysconf};
use report::metric::Spender;

/// A process whose costs are wanted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Watched {
    /// Its part in the trial.
    pub(super) role: Role,
    pub(super) pid: u32,
}

/// What a process does in a trial.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Role {
    /// The load generator's client.
    Client,
    /// The load generator's server.
    Server,
    /// A proxy on node A.
    ZtunnelA,
    /// A proxy on node B.
    ZtunnelB,
}

impl Role {
    pub(super) const ALL: [Self; 4] = [Self::Client, Self::ZtunnelA, Self::ZtunnelB, Self::Server];

    /// As messages say it.
    fn name(self) -> &'static str {
        match self {
            Self::Client => "the client",
            Self::Server => "the server",
            Self::ZtunnelA => "node A's proxy",
            Self::ZtunnelB => "node B's proxy",
        }
    }

    /// As metrics say it.
    pub(super) fn spender(self) -> Spender {
        match self {
            Self::Client => Spender::Client,
            Self::Server => Spender::Server,
            Self::ZtunnelA => Spender::ZtunnelA,
            Self::ZtunnelB => Spender::ZtunnelB,
        }
    }

    /// Whether it is one of the proxies that paths are about.
    pub(super) fn is_ztunnel(self) -> bool {
        matches!(self, Self::ZtunnelA | Self::ZtunnelB)
    }
}

/// Counters at one moment.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    processes: Vec<(Watched, ProcessTime)>,
    machine: MachineTime,
}

#[derive(Clone, Copy, Debug, Default)]
struct ProcessTime {
    /// On a CPU, threads that have ended included.
    cpu: Duration,
    /// Context switches of the threads there are, voluntary or not.
    switches: u64,
}

/// What passed between two samples.
#[derive(Clone, Debug, Default)]
pub(super) struct Spent {
    /// CPU time in s by process.
    pub(super) processes: Vec<(Role, f64)>,
    /// Context switches of the ztunnels.
    pub(super) switches: u64,
    /// Busy CPU time of the whole machine, interrupts included, in s.
    pub(super) machine_s: f64,
    /// CPU time of the whole machine in soft interrupts, in s: network receive, for the most part.
    pub(super) softirq_s: f64,
    /// Busy share of the machine's CPU time.
    pub(super) busy_share: f64,
}

impl Spent {
    /// CPU time of the processes in `role`, in s; `None` if there were none.
    pub(super) fn of(&self, role: Role) -> Option<f64> {
        let times = self.processes.iter().filter(|(other, _)| *other == role);
        times.map(|(_, s)| *s).reduce(|a, b| a + b)
    }

    /// CPU time of all ztunnels, in s.
    pub(super) fn ztunnels_s(&self) -> Option<f64> {
        let times = self.processes.iter().filter(|(role, _)| role.is_ztunnel());
        times.map(|(_, s)| *s).reduce(|a, b| a + b)
    }
}

impl Sample {
    /// Reads the counters of the processes and of the machine.
    pub(super) fn take(watched: &[Watched]) -> Result<Self> {
        let processes = watched.iter().map(|&one| Ok((one, process_time(one)?)));
        Ok(Self {
            processes: processes.collect::<Result<_>>()?,
            machine: MachineTime::now()?,
        })
    }

    /// What passed since `earlier`, which is of the same processes.
    pub(super) fn since(&self, earlier: &Self) -> Spent {
        let mut spent = Spent::default();
        for (watched, now) in &self.processes {
            let then = earlier.processes.iter().find(|(one, _)| one == watched);
            let then = then.map(|(_, time)| *time).unwrap_or_default();
            let cpu = now.cpu.saturating_sub(then.cpu).as_secs_f64();
            spent.processes.push((watched.role, cpu));
            if watched.role.is_ztunnel() {
                spent.switches += now.switches.saturating_sub(then.switches);
            }
        }
        let softirq = self.machine.softirq.saturating_sub(earlier.machine.softirq) as f64;
        let busy = self.machine.busy.saturating_sub(earlier.machine.busy) as f64;
        let all = self.machine.all.saturating_sub(earlier.machine.all) as f64;
        spent.machine_s = busy / ticks_per_s();
        spent.softirq_s = softirq / ticks_per_s();
        spent.busy_share = if all > 0.0 { busy / all } else { 0.0 };
        spent
    }
}

fn process_time(watched: Watched) -> Result<ProcessTime> {
    let Watched { role, pid } = watched;
    let gone = || {
        format!(
            "reading the CPU time of {} ({pid}): it has gone",
            role.name()
        )
    };
    let id = i32::try_from(pid).with_context(gone)?;
    let clock = clock_getcpuclockid(Pid::from_raw(id)).with_context(gone)?;
    let cpu = clock_gettime(clock).with_context(gone)?.into();
    let mut switches = 0;
    // Only theirs are reported.
    if role.is_ztunnel() {
        for task in fs::read_dir(format!("/proc/{pid}/task")).with_context(gone)? {
            let status = task.with_context(gone)?.path().join("status");
            // A thread may end in between; then it is missing from both sides.
            switches += switches_in(&fs::read_to_string(status).unwrap_or_default());
        }
    }
    Ok(ProcessTime { cpu, switches })
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
fn switches_in(status: &str) -> u64 {
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

    fn own(role: Role) -> [Watched; 1] {
        let pid = std::process::id();
        [Watched { role, pid }]
    }

    #[test]
    fn time_spent_computing_is_accounted() {
        let own = own(Role::Client);
        let before = Sample::take(&own).unwrap();
        let begun = cpu_time();
        while cpu_time() - begun < Duration::from_millis(200) {
            std::hint::spin_loop();
        }
        let spent = Sample::take(&own).unwrap().since(&before);
        // Other threads of the tests run as well, so there is no upper bound but the CPUs.
        assert!(spent.of(Role::Client) > Some(0.19), "{spent:?}");
        assert_eq!((spent.of(Role::Server), spent.ztunnels_s()), (None, None));
        assert!(spent.machine_s > 0.05, "{spent:?}");
        assert!((0.0..=1.0).contains(&spent.busy_share));
    }

    #[test]
    fn both_kinds_of_context_switches_count() {
        let status = "Name:\tx\nvoluntary_ctxt_switches:\t7\nnonvoluntary_ctxt_switches:\t5\n";
        assert_eq!(switches_in(status), 12);
        let own = own(Role::ZtunnelA);
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
        // Above what Linux gives away.
        let (role, pid) = (Role::Server, 4_194_305);
        let error = Sample::take(&[Watched { role, pid }]).unwrap_err();
        assert!(error.to_string().contains("has gone"), "{error}");
    }
}
