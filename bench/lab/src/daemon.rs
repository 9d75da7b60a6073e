//! Starting the lab's long-lived processes: node agents and ztunnels.

use std::env;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::network::namespace::HostCommand;
use crate::process::Process;
use crate::topology::Host;

/// How many of the last log lines an error quotes.
const QUOTED_LINES: usize = 4;

/// At most this much of a log's end is read for a quote, in bytes.
const TAIL_MAX: u64 = 8 << 10;

/// At most this much after a daemon's start is looked through for a line, in bytes: others may
/// write the same log.
const LOOK_MAX: u64 = 16 << 20;

const POLL: Duration = Duration::from_millis(20);

/// A daemon that was just started and is not known to be ready.
#[derive(Debug)]
pub(crate) struct Daemon {
    program: &'static str,
    host: Host,
    child: Child,
    log: PathBuf,
    /// Length of the log before this start, in bytes.
    log_start: u64,
}

impl Daemon {
    /// Starts `command` on `host` with its output appended to `log`, in a process group of its
    /// own so that a Ctrl-C meant for the lab does not reach it.
    pub(crate) fn start(
        program: &'static str,
        host: Host,
        mut command: HostCommand,
        log: PathBuf,
    ) -> Result<Self> {
        let open = || File::options().create(true).append(true).open(&log);
        let output = open().map_err(Error::io("opening", &log))?;
        let errors = output.try_clone().map_err(Error::io("opening", &log))?;
        let log_start = output.metadata().map_err(Error::io("reading", &log))?.len();
        command.stdin(Stdio::null()).stdout(output).stderr(errors);
        command.inner().process_group(0).current_dir("/");
        let child = command.spawn().map_err(|source| Error::Command {
            what: format!("starting {program} on {host}"),
            detail: source.to_string(),
        })?;
        Ok(Self {
            program,
            host,
            child,
            log,
            log_start,
        })
    }

    /// How the state file knows it. A process that has ended already is a failure to start.
    pub(crate) fn process(&mut self) -> Result<Process> {
        match Process::observe(self.program, self.host, self.child.id()) {
            Some(process) => Ok(process),
            None => Err(self.failed("ended at once")),
        }
    }

    /// Polls `ready` until it says so, the process ends, or `limit` is over.
    pub(crate) fn wait_ready(
        &mut self,
        limit: Duration,
        mut ready: impl FnMut(&Self) -> bool,
    ) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(self.failed(&format!("ended with {status} before it was ready")));
            }
            if ready(self) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(self.failed(&format!("was not ready after {} s", limit.as_secs())));
            }
            thread::sleep(POLL);
        }
    }

    /// Whether the daemon has written `line` since this start.
    pub(crate) fn has_written(&self, line: &str) -> bool {
        self.log_has(|found| found == line)
    }

    /// Whether it, or who else writes this log, has written a line with `words` in it since then.
    pub(crate) fn has_mentioned(&self, words: &str) -> bool {
        self.log_has(|found| found.contains(words))
    }

    fn log_has(&self, wanted: impl Fn(&str) -> bool) -> bool {
        let mut text = String::new();
        let read = File::open(&self.log).and_then(|mut file| {
            file.seek(SeekFrom::Start(self.log_start))?;
            file.take(LOOK_MAX).read_to_string(&mut text)
        });
        read.is_ok() && text.lines().any(wanted)
    }

    fn failed(&self, how: &str) -> Error {
        Error::NotReady {
            program: self.program.to_owned(),
            host: self.host.name().to_owned(),
            how: how.to_owned(),
            log: last_words(&self.log),
        }
    }
}

/// The last lines of `log` in one line.
pub(crate) fn last_words(log: &Path) -> String {
    let mut bytes = Vec::new();
    let read = File::open(log).and_then(|mut file| {
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_MAX)))?;
        file.take(TAIL_MAX).read_to_end(&mut bytes)
    });
    if read.is_err() || bytes.is_empty() {
        return "none".to_owned();
    }
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    lines[lines.len().saturating_sub(QUOTED_LINES)..].join(" | ")
}

/// Finds the workspace binary `name`: in `LAB_BIN_DIR` if that is set, else beside this
/// executable (for a test, in the directory above it).
///
/// # Errors
/// It is not there; the message says where it was looked for.
pub fn workspace_binary(name: &str) -> Result<PathBuf> {
    let mut directories = Vec::new();
    if let Some(directory) = env::var_os("LAB_BIN_DIR") {
        directories.push(PathBuf::from(directory));
    } else if let Ok(executable) = env::current_exe() {
        directories.extend(
            executable
                .ancestors()
                .skip(1)
                .take(2)
                .map(Path::to_path_buf),
        );
    }
    let candidates: Vec<_> = directories
        .iter()
        .map(|directory| directory.join(name))
        .collect();
    for candidate in &candidates {
        if candidate.is_file() {
            return fs::canonicalize(candidate).map_err(Error::io("resolving", candidate));
        }
    }
    let looked: Vec<_> = candidates
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    Err(Error::MissingBinary {
        name: name.to_owned(),
        looked: looked.join(", "),
        hint: "build the workspace (`cargo build --release`) or set LAB_BIN_DIR to where it is",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_words_are_the_end_of_the_log_in_one_line() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("x.log");
        assert_eq!(last_words(&log), "none");
        fs::write(&log, "1\n2\n3\n\n4\n5\n").unwrap();
        assert_eq!(last_words(&log), "2 | 3 | 4 | 5");
    }

    #[test]
    fn a_missing_binary_is_named_with_where_it_was_looked_for() {
        let error = workspace_binary("no-such-binary").unwrap_err().to_string();
        assert!(
            error.contains("no-such-binary") && error.contains("LAB_BIN_DIR"),
            "{error}"
        );
    }
}
