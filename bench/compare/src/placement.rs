//! Which CPUs a trial's processes may use.
//!
//! Where threads that wake each other run decides much of the latency of a lone connection: on
//! virtual machines a wake-up across CPUs costs several times one on the same CPU. So placement
//! is chosen and stated. Placing ztunnels overrides their own choice of CPUs; it is undone when
//! the trial has ended.

use std::fs;

use anyhow::{Context as _, Result, bail};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// A placement of client, server and ztunnels.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Placement {
    /// The scheduler's choice; ztunnels bind their workers as they like.
    Free,
    /// Client, server and all of ztunnel on the first CPU.
    OneCpu,
    /// Node A's processes on the first CPU, node B's on the last.
    CpuPerNode,
}

impl Placement {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::OneCpu => "one-cpu",
            Self::CpuPerNode => "cpu-per-node",
        }
    }

    /// CPUs of node A's processes and of the server's node's; `None` if the scheduler chooses.
    fn cpus(self, server_on_a: bool, available: &[usize]) -> Option<[usize; 2]> {
        let (first, last) = (*available.first()?, *available.last()?);
        match self {
            Self::Free => None,
            Self::OneCpu => Some([first, first]),
            Self::CpuPerNode if server_on_a => Some([first, first]),
            Self::CpuPerNode => Some([first, last]),
        }
    }

    /// In words.
    fn text(self) -> &'static str {
        match self {
            Self::Free => {
                "the scheduler places the load generator's threads; ztunnels bind their workers \
                 to CPUs as they are made to"
            }
            Self::OneCpu => "client, server and all threads of the ztunnels share one CPU",
            Self::CpuPerNode => {
                "node A's client and ztunnel have the first CPU, node B's server and ztunnel the \
                 last"
            }
        }
    }
}

/// What `--pin` asks for: a placement, or lists of CPUs for the load generator alone.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Pin {
    Placement(Placement),
    Lists { client: String, server: String },
}

impl Pin {
    pub(super) fn parse(text: Option<&str>) -> Result<Self> {
        let Some(text) = text else {
            return Ok(Self::Placement(Placement::Free));
        };
        let presets = [Placement::Free, Placement::OneCpu, Placement::CpuPerNode];
        if let Some(placement) = presets.into_iter().find(|p| p.name() == text) {
            return Ok(Self::Placement(placement));
        }
        let is_list = |list: &str| list.split(',').all(|cpu| cpu.parse::<u16>().is_ok());
        match text.split_once('/') {
            Some((client, server)) if is_list(client) && is_list(server) => Ok(Self::Lists {
                client: client.to_owned(),
                server: server.to_owned(),
            }),
            _ => bail!(
                "--pin is `{text}`, must be free, one-cpu, cpu-per-node, or CPUs/CPUs such as 0/1 \
                 or 0,1/2,3"
            ),
        }
    }

    /// In words, for the report.
    pub(super) fn text(&self) -> String {
        match self {
            Self::Placement(placement) => placement.text().to_owned(),
            Self::Lists { client, server } => format!(
                "client bound to CPU {client}, server to CPU {server}; ztunnels bind their \
                 workers as they are made to"
            ),
        }
    }

    /// Lists for `loadgen --cpus` of client and server, and CPUs for the ztunnels of nodes A and
    /// B, for a cell with a placement of its own or none.
    pub(super) fn cpus(&self, own: Placement, server_on_a: bool) -> Result<Cpus> {
        let placement = match (own, self) {
            (Placement::Free, Self::Lists { client, server }) => {
                return Ok(Cpus {
                    client: Some(client.clone()),
                    server: Some(server.clone()),
                    ztunnels: None,
                });
            }
            (Placement::Free, Self::Placement(placement)) => *placement,
            (own, _) => own,
        };
        let ztunnels = placement.cpus(server_on_a, &available()?);
        Ok(Cpus {
            client: ztunnels.map(|[a, _]| a.to_string()),
            server: ztunnels.map(|[_, b]| b.to_string()),
            ztunnels,
        })
    }
}

/// CPUs of one trial's processes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Cpus {
    pub(super) client: Option<String>,
    pub(super) server: Option<String>,
    pub(super) ztunnels: Option<[usize; 2]>,
}

/// CPUs this process may use.
fn available() -> Result<Vec<usize>> {
    let set = sched_getaffinity(Pid::from_raw(0)).context("reading the CPUs in use")?;
    Ok((0..CpuSet::count())
        .filter(|&cpu| set.is_set(cpu).unwrap_or(false))
        .collect())
}

/// Threads bound to a CPU for as long as this lives.
#[derive(Debug, Default)]
pub(super) struct Bound(Vec<(Pid, CpuSet)>);

impl Bound {
    /// Binds every thread of `pid` to `cpu`. Threads that end meanwhile, or that the kernel does
    /// not let move, are left out.
    pub(super) fn bind(&mut self, pid: u32, cpu: usize) -> Result<()> {
        let path = format!("/proc/{pid}/task");
        let mut set = CpuSet::new();
        set.set(cpu).with_context(|| format!("CPU {cpu}"))?;
        for task in fs::read_dir(&path).with_context(|| format!("reading {path}"))? {
            let task = task.with_context(|| format!("reading {path}"))?;
            let Ok(tid) = task
                .file_name()
                .to_string_lossy()
                .parse()
                .map(Pid::from_raw)
            else {
                continue;
            };
            if let Ok(before) = sched_getaffinity(tid)
                && sched_setaffinity(tid, &set).is_ok()
            {
                self.0.push((tid, before));
            }
        }
        Ok(())
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        for (tid, set) in &self.0 {
            // Fails only if the thread has ended.
            let _ = sched_setaffinity(*tid, set);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pinning_is_a_preset_or_two_lists_of_cpus() {
        assert_eq!(Pin::parse(None).unwrap(), Pin::Placement(Placement::Free));
        assert_eq!(
            Pin::parse(Some("one-cpu")).unwrap(),
            Pin::Placement(Placement::OneCpu)
        );
        let lists = Pin::parse(Some("0,1/2,3")).unwrap();
        let cpus = lists.cpus(Placement::Free, false).unwrap();
        assert_eq!(cpus.client.as_deref(), Some("0,1"));
        assert_eq!(cpus.server.as_deref(), Some("2,3"));
        assert_eq!(cpus.ztunnels, None);
        for wrong in ["0", "0/", "a/b", "0/1/2", "", "two-cpus"] {
            let error = Pin::parse(Some(wrong)).unwrap_err().to_string();
            assert!(error.contains("must be free, one-cpu"), "{error}");
        }
    }

    #[test]
    fn a_cells_own_placement_comes_before_the_comparisons() {
        let free = Pin::parse(None).unwrap();
        assert_eq!(free.cpus(Placement::Free, false).unwrap().client, None);
        let one = free.cpus(Placement::OneCpu, false).unwrap();
        assert_eq!(one.client, one.server);
        assert_eq!(Placement::CpuPerNode.cpus(false, &[2, 3, 5]), Some([2, 5]));
        assert_eq!(Placement::CpuPerNode.cpus(true, &[2, 3, 5]), Some([2, 2]));
    }

    #[test]
    fn binding_is_undone() {
        let before = available().unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("30")
            .spawn()
            .unwrap();
        let count = |pid| {
            let set = sched_getaffinity(Pid::from_raw(i32::try_from(pid).unwrap())).unwrap();
            (0..CpuSet::count())
                .filter(|&cpu| set.is_set(cpu).unwrap())
                .count()
        };
        let mut bound = Bound::default();
        bound.bind(child.id(), before[0]).unwrap();
        assert_eq!(count(child.id()), 1);
        drop(bound);
        assert_eq!(count(child.id()), before.len());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
