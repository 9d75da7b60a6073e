//! `lab compare`: the same workloads over every redirection path, measured so that the paths can
//! be told apart.
//!
//! All paths' labs are up at the same time, each under its own name, and one trial runs at a
//! time: a fresh server and a fresh client of the load generator. A round measures every path at
//! every workload, the paths of a workload one right after the other; their order flips every
//! round. CPU time is read as the client's measured window begins and ends.
//!
//! Labs and processes are gone when [`run`] returns, also after Ctrl-C, which ends the comparison
//! after the trial under way; complete rounds are reported.

mod interrupt;
mod machine;
mod plan;
mod progress;
mod sample;
pub mod stats;
mod summary;
mod trial;

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::daemon::workspace_binary;
use crate::lab::{Lab, LabOptions};
use crate::report;
use crate::report::schema::{Document, Settings};
use crate::state::Redirect;
use interrupt::Interrupt;
use plan::Plan;
use progress::Progress;
use sample::Sample;
use trial::{Setup, Trial};

/// A quick comparison begins no round that would end after this.
const QUICK_LIMIT: Duration = Duration::from_secs(165);
const TRIALS: &str = "trials.jsonl";
/// Labs are named `<prefix>-<path>`.
const PREFIX: &str = "cmp";

/// What to compare and how.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct CompareOptions {
    /// Under 3 minutes: short trials, fewer rounds
    #[arg(long)]
    pub quick: bool,
    /// Paths: none, tunnel, ebpf [default: all of these]
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    pub paths: Vec<String>,
    /// Workloads: rr, stream, connect [default: all of these]
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    pub workloads: Vec<String>,
    /// Rounds, each with one trial of every path at every workload [default: 10, quick 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub trials: Option<u32>,
    /// Measured seconds of each trial [default: 2, quick 0.5]
    #[arg(long, value_name = "S")]
    pub duration: Option<f64>,
    /// Where the report goes [default: results/<date>-<machine>-<sha>]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// CPUs of the load generator's client and server, for example 0/1 or 0,1/2,3
    /// [default: the scheduler's choice]
    #[arg(long, value_name = "CLIENT/SERVER")]
    pub pin: Option<String>,
    /// Another ztunnel to measure
    #[arg(long = "peer", value_name = "NAME[=PATH]")]
    pub peers: Vec<String>,
}

/// Every trial of a comparison: `[cell][path]` holds one per round.
type Trials = Vec<Vec<Vec<Trial>>>;

/// Runs the comparison, prints its table and returns the directory with the report.
///
/// # Errors
/// Options that cannot be met, a lab that does not come up, a trial that cannot run at all.
/// Requests that fail are not errors but figures of the report.
pub fn run(options: &CompareOptions) -> Result<PathBuf> {
    run_as(PREFIX, options)
}

fn run_as(prefix: &str, options: &CompareOptions) -> Result<PathBuf> {
    if let Some(peer) = options.peers.first() {
        bail!("--peer {peer}: peers cannot be measured yet; leave the option out");
    }
    let plan = Plan::new(&options.paths, &options.workloads, options.quick)?;
    let pin = options.pin.as_deref().map(parse_pin).transpose()?;
    let loadgen = workspace_binary("loadgen")?;
    let scratch = tempfile::tempdir().context("making a temporary directory")?;
    let (usual_s, warmup_ms) = if options.quick {
        (0.5, 200)
    } else {
        (2.0, 500)
    };
    let duration = options.duration.unwrap_or(usual_s);
    if !(0.1..=600.0).contains(&duration) {
        bail!("--duration is {duration}, must be 0.1 to 600");
    }
    let setup = Setup {
        loadgen: &loadgen,
        scratch: scratch.path(),
        duration: Duration::from_secs_f64(duration),
        warmup: Duration::from_millis(warmup_ms),
        pin,
    };
    let _lock = lock(prefix)?;
    let begun = OffsetDateTime::now_utc();
    let (machine, git) = (machine::machine(), machine::git());
    let directory = match &options.out {
        Some(directory) => directory.clone(),
        None => machine::results_directory(&begun.date().to_string(), &machine, &git),
    };
    let measured = measure(prefix, options, &plan, &setup, &directory)?;
    let begun = begun.replace_nanosecond(0).context("taking the time")?;
    let about = summary::Circumstances {
        when: begun.format(&Rfc3339).context("formatting the time")?,
        git,
        machine,
        tunnel_driver: measured.tunnel_driver,
        command: command_line(),
        settings: measured.settings,
    };
    finish(
        &summary::document(&plan, &measured.trials, about),
        &directory,
    )?;
    Ok(directory)
}

/// What measuring brought.
#[derive(Debug)]
struct Measured {
    trials: Trials,
    tunnel_driver: Option<String>,
    settings: Settings,
}

/// Brings the labs up, runs the rounds and takes the labs down.
fn measure(
    prefix: &str,
    options: &CompareOptions,
    plan: &Plan,
    setup: &Setup<'_>,
    directory: &Path,
) -> Result<Measured> {
    let interrupt = Interrupt::hold()?;
    let started = Instant::now();
    let labs = Labs::up(prefix, plan, &interrupt)?;
    fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
    let rounds_wanted = options.trials.unwrap_or(if options.quick { 5 } else { 10 });
    let idle_busy_share = idle_busy_share()?;
    let mut runner = Runner {
        plan,
        setup,
        labs: &labs,
        interrupt: &interrupt,
        log: TrialLog::create(directory)?,
        deadline: options.quick.then(|| started + QUICK_LIMIT),
    };
    let (trials, rounds) = runner.run(rounds_wanted)?;
    if rounds == 0 {
        // The directory goes only if it is empty: other files are none of ours.
        let _ = fs::remove_file(directory.join(TRIALS));
        let _ = fs::remove_dir(directory);
        bail!("ended before the first round was complete: there is nothing to report");
    }
    let settings = Settings {
        duration_s: setup.duration.as_secs_f64(),
        warmup_s: setup.warmup.as_secs_f64(),
        placement: placement(setup.pin),
        rounds_wanted,
        rounds,
        idle_busy_share,
    };
    Ok(Measured {
        trials,
        tunnel_driver: labs.tunnel_driver(),
        settings,
    })
}

fn finish(document: &Document, directory: &Path) -> Result<()> {
    let json = serde_json::to_string_pretty(document).context("encoding report.json")?;
    let path = directory.join("report.json");
    fs::write(&path, json + "\n").with_context(|| format!("writing {}", path.display()))?;
    report::render(directory)?;
    println!("{}", report::table::render(document));
    println!("report: {}", directory.join("report.html").display());
    Ok(())
}

/// Only one comparison at a time: two would measure each other.
fn lock(prefix: &str) -> Result<Flock<File>> {
    let path = format!("/run/zt-lab-{prefix}.lock");
    let file = File::create(&path).with_context(|| format!("creating {path}: are you root?"))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        Errno::EWOULDBLOCK => anyhow::anyhow!("another `lab compare` is running; wait for its end"),
        errno => anyhow::anyhow!("locking {path}: {errno}"),
    })
}

fn parse_pin(text: &str) -> Result<(&str, &str)> {
    let is_list = |list: &str| list.split(',').all(|cpu| cpu.parse::<u16>().is_ok());
    match text.split_once('/') {
        Some((client, server)) if is_list(client) && is_list(server) => Ok((client, server)),
        _ => bail!("--pin is `{text}`, must be CPUs/CPUs such as 0/1 or 0,1/2,3"),
    }
}

fn placement(pin: Option<(&str, &str)>) -> String {
    match pin {
        None => "client and server of the load generator are not pinned: the scheduler places \
                 their threads; ztunnel pins one worker per CPU itself"
            .to_owned(),
        Some((client, server)) => format!(
            "client pinned to CPU {client}, server to CPU {server}; ztunnel pins one worker per \
             CPU itself"
        ),
    }
}

fn command_line() -> String {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    format!("lab {}", arguments.join(" "))
}

/// Busy share of the machine with all labs up and nothing measured.
fn idle_busy_share() -> Result<f64> {
    // Let what bringing up the labs started come to rest.
    thread::sleep(Duration::from_millis(500));
    let before = Sample::take(&[])?;
    thread::sleep(Duration::from_secs(1));
    Ok(Sample::take(&[])?.since(&before).busy_share)
}

/// The labs of all paths, in the plan's order; dropping takes them down.
#[derive(Debug)]
struct Labs(Vec<Lab>);

impl Labs {
    fn up(prefix: &str, plan: &Plan, interrupt: &Interrupt) -> Result<Self> {
        let mut labs = Self(Vec::new());
        for path in &plan.paths {
            let name = format!("{prefix}-{}", path.name());
            // Left up by a comparison that was killed: the lock says that none is running.
            Lab::down(&name).with_context(|| format!("removing an old lab {name}"))?;
            eprintln!("bringing up lab {name}");
            let options = LabOptions {
                name: name.clone(),
                redirect: path.0,
                ..LabOptions::default()
            };
            let lab = Lab::up(&options);
            labs.0
                .push(lab.with_context(|| format!("bringing up path {}", path.name()))?);
            if interrupt.came() {
                bail!("interrupted while labs came up");
            }
        }
        Ok(labs)
    }

    fn tunnel_driver(&self) -> Option<String> {
        let tunnel = self
            .0
            .iter()
            .find(|lab| lab.redirect() == Redirect::Tunnel)?;
        tunnel.tunnel_driver().map(str::to_owned)
    }
}

impl Drop for Labs {
    fn drop(&mut self) {
        for lab in &self.0 {
            if let Err(error) = Lab::down(lab.name()) {
                eprintln!("lab: taking lab {} down: {error}", lab.name());
            }
        }
    }
}

/// `trials.jsonl`: every trial as it ends, so that nothing measured is lost.
#[derive(Debug)]
struct TrialLog(File);

impl TrialLog {
    fn create(directory: &Path) -> Result<Self> {
        let path = directory.join(TRIALS);
        File::create(&path)
            .map(Self)
            .with_context(|| format!("creating {}", path.display()))
    }

    fn add(
        &mut self,
        round: u32,
        path: plan::Path,
        cell: &plan::Cell,
        trial: &Trial,
    ) -> Result<()> {
        let line = serde_json::json!({
            "round": round,
            "path": path.name(),
            "scope": cell.scope.name(),
            "metrics": trial.metrics,
            "loadgen": trial.loadgen,
        });
        writeln!(self.0, "{line}").context("writing trials.jsonl")
    }
}

#[derive(Debug)]
struct Runner<'a> {
    plan: &'a Plan,
    setup: &'a Setup<'a>,
    labs: &'a Labs,
    interrupt: &'a Interrupt,
    log: TrialLog,
    deadline: Option<Instant>,
}

impl Runner<'_> {
    /// Runs up to `rounds` rounds and returns the trials of the complete ones with their number.
    fn run(&mut self, rounds: u32) -> Result<(Trials, u32)> {
        let mut progress = Progress::new(self.plan.trials_per_round() * rounds as usize);
        let mut trials = vec![vec![Vec::new(); self.plan.paths.len()]; self.plan.cells.len()];
        let begun = Instant::now();
        for round in 0..rounds {
            let per_round = begun.elapsed() / round.max(1);
            if self
                .deadline
                .is_some_and(|deadline| Instant::now() + per_round > deadline)
            {
                progress.end();
                eprintln!("no time for more than {round} of {rounds} rounds");
                return Ok((trials, round));
            }
            for (cell, path) in self.plan.round(round) {
                let (at, by) = (&self.plan.cells[cell], self.plan.paths[path]);
                progress.running(round, by, at);
                let number = u32::try_from(trials[cell][path].len()).unwrap_or(0)
                    * u32::try_from(self.plan.cells.len()).unwrap_or(1)
                    + u32::try_from(cell).unwrap_or(0);
                let trial = self
                    .setup
                    .run(&self.labs.0[path], at, number)
                    .with_context(|| {
                        format!("{} {} {}", by.name(), at.scope.name(), at.workload.name())
                    })?;
                if self.interrupt.came() {
                    progress.end();
                    eprintln!("interrupted: reporting {round} complete rounds");
                    trials
                        .iter_mut()
                        .flatten()
                        .for_each(|row| row.truncate(round as usize));
                    return Ok((trials, round));
                }
                self.log.add(round, by, at, &trial)?;
                progress.finished(round, by, at, &trial);
                trials[cell][path].push(trial);
            }
        }
        progress.end();
        Ok((trials, rounds))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pinning_is_two_lists_of_cpus() {
        assert_eq!(parse_pin("0/1").unwrap(), ("0", "1"));
        assert_eq!(parse_pin("0,1/2,3").unwrap(), ("0,1", "2,3"));
        for wrong in ["0", "0/", "a/b", "0/1/2", ""] {
            let error = parse_pin(wrong).unwrap_err().to_string();
            assert!(error.contains("must be CPUs/CPUs"), "{error}");
        }
    }

    #[test]
    fn a_comparison_reports_and_leaves_nothing() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: a_comparison_reports_and_leaves_nothing: needs root");
            return;
        }
        if let Err(error) = workspace_binary("loadgen") {
            eprintln!("skipped: a_comparison_reports_and_leaves_nothing: {error}");
            return;
        }
        let out = tempfile::tempdir().unwrap();
        let options = CompareOptions {
            paths: vec!["none".to_owned()],
            workloads: vec!["rr".to_owned(), "stream".to_owned()],
            trials: Some(2),
            duration: Some(0.1),
            quick: true,
            out: Some(out.path().join("report")),
            ..CompareOptions::default()
        };
        let prefix = format!("c{}", std::process::id());
        let directory = run_as(&prefix, &options).unwrap();
        let document = report::read(&directory).unwrap();
        assert_eq!(document.rows.len(), 8);
        for row in &document.rows {
            let metric = report::schema::throughput_metric(&row.workload);
            assert_eq!(row.metrics[metric].values.len(), 2, "{row:?}");
            assert!(row.median(metric).unwrap() > 0.0, "{row:?}");
            assert_eq!(row.median("errors"), Some(0.0), "{row:?}");
        }
        assert!(document.tunnel_driver.is_none());
        let html = fs::read_to_string(directory.join("report.html")).unwrap();
        assert!(html.contains("<svg"));
        let trials = fs::read_to_string(directory.join(TRIALS)).unwrap();
        assert_eq!(trials.lines().count(), 16);
        assert!(!Lab::names().iter().any(|name| name.starts_with(&prefix)));
        let _ = fs::remove_file(format!("/run/zt-lab-{prefix}.lock"));
    }

    #[test]
    fn peers_are_refused_until_they_can_be_measured() {
        let options = CompareOptions {
            peers: vec!["envoy".to_owned()],
            ..CompareOptions::default()
        };
        assert!(
            run(&options)
                .unwrap_err()
                .to_string()
                .contains("cannot be measured yet")
        );
    }
}
