//! Processes of the lab: which they are, whether they live, and ending them.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::network::{namespace, netns_path};
use crate::topology::Host;

/// How long a process gets between SIGTERM and SIGKILL when a lab is removed.
const GRACE: Duration = Duration::from_millis(1500);

/// How long SIGKILL may take. An io_uring process is torn down by the kernel before it is gone.
const KILL_SECONDS: u64 = 10;

const POLL: Duration = Duration::from_millis(10);

/// A process the lab started. Pid and start time together identify it: pids are recycled.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct Process {
    /// What it is: `ztunnel` or `node-agent`.
    pub(crate) program: String,
    /// Host it runs on.
    pub(crate) host: String,
    /// Process id.
    pub(crate) pid: u32,
    /// Start time in clock ticks since boot, from `/proc/<pid>/stat`.
    pub(crate) started_ticks: u64,
}

impl Process {
    /// Describes the running process `pid`; `None` if it is already gone.
    pub(crate) fn observe(program: &str, host: Host, pid: u32) -> Option<Self> {
        Some(Self {
            program: program.to_owned(),
            host: host.name().to_owned(),
            pid,
            started_ticks: stat(pid)?.started_ticks,
        })
    }

    /// Whether this very process still runs. A zombie does not.
    pub(crate) fn alive(&self) -> bool {
        reap(self.pid);
        stat(self.pid).is_some_and(|now| now.started_ticks == self.started_ticks && !now.dead)
    }

    /// Sends `signal` if this very process still runs.
    pub(crate) fn signal(&self, signal: Signal) {
        if self.alive() {
            // Fails only if it has ended meanwhile.
            let _ = kill(pid(self.pid), signal);
        }
    }

    /// Ends the process: SIGTERM, and SIGKILL after `grace`.
    pub(crate) fn stop(&self, grace: Duration) -> Result<()> {
        self.signal(Signal::SIGTERM);
        if self.gone_within(grace) {
            return Ok(());
        }
        self.signal(Signal::SIGKILL);
        if self.gone_within(Duration::from_secs(KILL_SECONDS)) {
            return Ok(());
        }
        let host = self.host.clone();
        Err(Error::Immortal {
            pid: self.pid,
            host,
            seconds: KILL_SECONDS,
        })
    }

    fn gone_within(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while self.alive() {
            if Instant::now() >= deadline {
                return false;
            }
            thread::sleep(POLL);
        }
        true
    }
}

/// All processes whose network namespace is one of the lab's, by host. This also finds what was
/// started by `lab exec`, and what an `up` started without living to record it.
pub(crate) fn inside(lab: &str) -> Vec<Process> {
    let namespaces: HashMap<u64, Host> = Host::ALL
        .into_iter()
        .filter_map(|host| Some((namespace::inode(&netns_path(lab, host))?, host)))
        .collect();
    if namespaces.is_empty() {
        return Vec::new();
    }
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    let mut found = Vec::new();
    for pid in pids.filter(|pid| *pid != std::process::id()) {
        let link = PathBuf::from(format!("/proc/{pid}/ns/net"));
        let Ok(metadata) = fs::metadata(link) else {
            continue;
        };
        if let Some(host) = namespaces.get(&metadata.ino())
            && let Some(process) = Process::observe("", *host, pid)
        {
            found.push(process);
        }
    }
    found
}

/// Ends all of `processes` together: SIGTERM to all, then SIGKILL to what is left.
pub(crate) fn stop_all(processes: &[Process]) -> Result<()> {
    for process in processes {
        process.signal(Signal::SIGTERM);
    }
    let deadline = Instant::now() + GRACE;
    while processes.iter().any(Process::alive) && Instant::now() < deadline {
        thread::sleep(POLL);
    }
    for process in processes {
        process.stop(Duration::ZERO)?;
    }
    Ok(())
}

struct Stat {
    started_ticks: u64,
    dead: bool,
}

/// Reads `/proc/<pid>/stat`. The command name in it may hold anything, so fields are counted from
/// the last closing parenthesis: state is the first after it, start time the twentieth.
fn stat(pid: u32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let dead = matches!(fields.next()?, "Z" | "X" | "x");
    Some(Stat {
        dead,
        started_ticks: fields.nth(18)?.parse().ok()?,
    })
}

/// Collects the exit status if `pid` is an ended child of this process.
fn reap(process: u32) {
    // ECHILD (not our child) is the usual answer and means nothing is to be done.
    let _ = waitpid(pid(process), Some(WaitPidFlag::WNOHANG));
}

fn pid(process: u32) -> Pid {
    Pid::from_raw(i32::try_from(process).unwrap_or(i32::MAX))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_recycled_pid_is_neither_alive_nor_signalled() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let real = Process::observe("sleep", Host::NodeA, child.id()).unwrap();
        let stale = Process {
            started_ticks: real.started_ticks + 1,
            ..real.clone()
        };
        assert!(real.alive() && !stale.alive());
        stale.stop(Duration::ZERO).unwrap();
        assert!(real.alive(), "a process with another start time was killed");
        real.stop(Duration::from_secs(5)).unwrap();
        assert!(!real.alive());
        // Already collected by `stop`; this only satisfies the child's owner.
        let _ = child.wait();
    }

    #[test]
    fn a_process_that_ignores_sigterm_is_killed() {
        let script = "trap '' TERM; while :; do sleep 0.05; done";
        let mut child = Command::new("sh").args(["-c", script]).spawn().unwrap();
        thread::sleep(Duration::from_millis(200));
        let process = Process::observe("sh", Host::NodeA, child.id()).unwrap();
        process.stop(Duration::from_millis(100)).unwrap();
        assert!(!process.alive());
        let _ = child.wait();
    }
}
