//! Processes of a trial: their life, their placement and what the kernel counted for them.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::Pid;

/// A child whose standard output is read line by line; killed when dropped.
#[derive(Debug)]
pub struct Peer {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Peer {
    /// Starts `program` (the `bench-peer` binary) with `arguments`, on `cpus` if any.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(program: &Path, cpus: &[u32], arguments: &[String]) -> Result<Self> {
        let mut command = Command::new(program);
        if !cpus.is_empty() {
            let list: Vec<String> = cpus.iter().map(u32::to_string).collect();
            command.args(["--cpus", &list.join(",")]);
        }
        let mut child = command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        let output = child.stdout.take().context("the child has no output")?;
        Ok(Self {
            child,
            output: BufReader::new(output),
        })
    }

    /// The next line it prints, without its end.
    ///
    /// # Errors
    /// It ended before.
    pub fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            let status = self.child.wait()?;
            bail!("a process of the benchmark ended too early: {status}");
        }
        line.truncate(line.trim_end().len());
        Ok(line)
    }

    /// The address it says it listens on.
    ///
    /// # Errors
    /// It says something else, or ended.
    pub fn address(&mut self) -> Result<SocketAddr> {
        let line = self.line()?;
        let address = line.strip_prefix("listening on ");
        address
            .and_then(|address| address.parse().ok())
            .with_context(|| format!("expected `listening on ADDR`, not {line:?}"))
    }

    /// Waits for a line that is `expected`.
    ///
    /// # Errors
    /// It ended before.
    pub fn wait_for(&mut self, expected: &str) -> Result<()> {
        while self.line()? != expected {}
        Ok(())
    }

    /// CPU time of all its threads in ns, user and kernel.
    ///
    /// # Errors
    /// The process is gone, or the kernel keeps no scheduler statistics.
    pub fn cpu_ns(&self) -> Result<u64> {
        let mut total = 0;
        for task in fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            // A thread that has just ended has nothing to read.
            let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) else {
                continue;
            };
            let first = text.split(' ').next().and_then(|n| n.parse::<u64>().ok());
            total += first.with_context(|| format!("unexpected schedstat {text:?}"))?;
        }
        Ok(total)
    }

    /// Its resident memory that is not backed by files, in bytes.
    ///
    /// # Errors
    /// The process is gone.
    pub fn anonymous_bytes(&self) -> Result<u64> {
        let text = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        Ok(kilobytes.context("RssAnon is missing in /proc/PID/status")? * 1024)
    }

    /// Its open descriptors.
    ///
    /// # Errors
    /// The process is gone.
    pub fn descriptors(&self) -> Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.child.id()))?.count())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Fails only if it has ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Binds this process, before it has threads, to `cpus`.
///
/// # Errors
/// A CPU does not exist or is not allowed.
pub fn bind_to(cpus: &[u32]) -> Result<()> {
    if cpus.is_empty() {
        return Ok(());
    }
    let mut set = CpuSet::new();
    for &cpu in cpus {
        set.set(cpu as usize)?;
    }
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("run on CPUs {cpus:?}"))
}

/// Allows this process `wanted` descriptors, as far as it may. Returns how many it has now.
#[must_use]
pub fn allow_descriptors(wanted: u64) -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return 1024;
    };
    for (new_soft, new_hard) in [(wanted, wanted.max(hard)), (hard.min(wanted), hard)] {
        if new_soft > soft && setrlimit(Resource::RLIMIT_NOFILE, new_soft, new_hard).is_ok() {
            return new_soft;
        }
    }
    soft
}
