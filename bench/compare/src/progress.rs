//! What is running, what it found, how much is left.

use std::io::{self, IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use super::plan::{Arm, Cell};
use super::trial::Trial;
use report::metric::Metric;

/// The progress line on stderr: rewritten in place on a terminal, else a line per trial.
#[derive(Debug)]
pub(super) struct Progress {
    total: usize,
    done: usize,
    begun: Instant,
    terminal: bool,
}

impl Progress {
    pub(super) fn new(total: usize) -> Self {
        Self {
            total,
            done: 0,
            begun: Instant::now(),
            terminal: io::stderr().is_terminal(),
        }
    }

    /// A trial begins.
    pub(super) fn running(&self, round: u32, arm: &Arm, cell: &Cell) {
        if self.terminal {
            let left = self
                .left()
                .map_or_else(String::new, |left| format!(", {} left", short(left)));
            let text = format!(
                "[{}/{}] round {}: {}{left}",
                self.done + 1,
                self.total,
                round + 1,
                name(arm, cell)
            );
            // \x1b[K clears what a longer line left. Nobody to tell if stderr is closed.
            let _ = write!(io::stderr(), "\r\x1b[K{text}");
        }
    }

    /// A trial has ended.
    pub(super) fn finished(&mut self, round: u32, arm: &Arm, cell: &Cell, trial: &Trial) {
        self.done += 1;
        let metric = Metric::throughput(cell.workload.name());
        let mut found = vec![metric.show(trial.metric(metric))];
        if let Some(p99) = trial.metric(Metric::P99) {
            let p99 = Metric::P99.show(Some(p99));
            found.push(format!("p99 {p99}"));
        }
        match trial.metric(Metric::Errors) {
            Some(errors) if errors > 0.0 => found.push(format!("{errors} errors")),
            _ => {}
        }
        let left = self.left().map_or_else(String::new, short);
        let text = format!(
            "[{}/{}] round {}  {:<40} {}  ({left} left)",
            self.done,
            self.total,
            round + 1,
            name(arm, cell),
            found.join(", "),
        );
        if self.terminal {
            let _ = write!(io::stderr(), "\r\x1b[K{text}");
        } else {
            let _ = writeln!(io::stderr(), "{text}");
        }
    }

    /// Ends the line that was rewritten.
    pub(super) fn end(&self) {
        if self.terminal {
            let _ = writeln!(io::stderr());
        }
    }

    /// Time for the rest at the pace so far.
    fn left(&self) -> Option<Duration> {
        let done = u32::try_from(self.done).ok().filter(|&done| done > 0)?;
        let rest = u32::try_from(self.total - self.done).ok()?;
        Some(self.begun.elapsed() / done * rest)
    }
}

fn name(arm: &Arm, cell: &Cell) -> String {
    format!("{:<6} {}", arm.name, cell.label())
}

fn short(time: Duration) -> String {
    let seconds = time.as_secs();
    if seconds >= 60 {
        format!("{}m{:02}s", seconds / 60, seconds % 60)
    } else {
        format!("{seconds}s")
    }
}
