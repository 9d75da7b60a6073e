//! `lab compare`: the same workloads over every redirection path, measured so that the paths can
//! be told apart.
//!
//! All paths' labs are up at the same time, each under its own name, and one trial runs at a
//! time: a fresh server and a fresh client of the load generator. A round measures every path at
//! every workload, the paths of a workload one right after the other; their order flips every
//! round. CPU time is read as the client's measured window begins and ends. One path is measured
//! a second time in a lab of its own (A/A): what it differs by from itself is the noise that
//! verdicts are judged by.
//!
//! Labs and processes are gone when [`run`] returns, also after Ctrl-C, which ends the comparison
//! after the trial under way; complete rounds are reported.
#![forbid(unsafe_code)]

mod interrupt;
mod kernel;
mod labs;
mod machine;
mod peers;
mod placement;
mod plan;
mod progress;
mod sample;
pub mod stats;
mod summary;
#[cfg(test)]
mod tests;
mod trial;
mod workload;

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use lab::{Redirect, Services, workspace_binary};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use report::metric::Metric;
use report::schema::{Document, Peer, Settings, SkippedPeer};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use interrupt::Interrupt;
use labs::Labs;
use peers::Wanted;
use placement::Pin;
use plan::{Arm, Cell, OPEN_CONNECTIONS, Plan};
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
    /// Under 3 minutes: short trials, fewer rounds, redirection alone only if --workloads names it
    #[arg(long)]
    pub quick: bool,
    /// Paths: none, tunnel, ebpf, ebpf+sockmap; one named twice is measured against itself
    /// [default: the first three, each once]
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    pub paths: Vec<String>,
    /// Workloads: rr, stream, connect, rr-open, and redirect-rr, redirect-connect with a plain
    /// listener in ztunnel's place [default: all of these]
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    pub workloads: Vec<String>,
    /// Rounds, each with one trial of every path at every workload [default: 10, quick 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub trials: Option<u32>,
    /// Measured seconds of each trial [default: 0.9, quick 0.4]
    #[arg(long, value_name = "S")]
    pub duration: Option<f64>,
    /// Where the report goes [default: results/<date>-<machine>-<sha>]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Path to measure against itself, for the noise that verdicts are judged by, or off
    /// [default: ebpf, or the last of --paths]
    #[arg(long, value_name = "PATH|off")]
    pub aa: Option<String>,
    /// Placement of all rows: free (the scheduler's choice), one-cpu, cpu-per-node, or CPUs of
    /// the load generator's client and server such as 0/1 or 0,1/2,3 [default: free]
    #[arg(long, value_name = "PLACEMENT")]
    pub pin: Option<String>,
    /// Rules for services on the nodes, as kube-proxy makes them: iptables, nftables, or none,
    /// where nodes only forward, without conntrack, as in reports that do not name them
    /// [default: iptables, what most clusters have]
    #[arg(long, value_name = "KIND")]
    pub services: Option<Services>,
    /// Another proxy to measure: conventional, envoy-tcp, envoy-hbone, haproxy, or all of these;
    /// NAME=PATH: any ztunnel, run dedicated to the node's main pod; NAME=shared:PATH: one that
    /// takes this project's environment
    #[arg(long = "peer", value_name = "NAME[=PATH]")]
    pub peers: Vec<String>,
}

/// What most clusters have.
const USUAL_SERVICES: Services = Services::Iptables;

/// Every trial of a comparison: `[cell][arm]` holds one per round.
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
    let mut plan = Plan::new(&options.paths, &options.workloads, options.quick)?;
    choose_repeated(&mut plan, options.aa.as_deref())?;
    let wanted = peers::parse(&options.peers)?;
    let pin = Pin::parse(options.pin.as_deref())?;
    let loadgen = workspace_binary("loadgen")?;
    let scratch = tempfile::tempdir().context("making a temporary directory")?;
    let (usual_s, warmup_ms) = if options.quick {
        (0.4, 150)
    } else {
        (0.9, 200)
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
        pin: &pin,
        services: options.services.unwrap_or(USUAL_SERVICES),
    };
    let _lock = lock(prefix)?;
    let begun = OffsetDateTime::now_utc();
    let (machine, git) = (machine::machine(), machine::git());
    let directory = match &options.out {
        Some(directory) => directory.clone(),
        None => machine::results_directory(&begun.date().to_string(), &machine, &git),
    };
    let measured = measure(prefix, options, (&mut plan, &wanted), &setup, &directory)?;
    let begun = begun.replace_nanosecond(0).context("taking the time")?;
    let about = summary::RunInfo {
        when: begun.format(&Rfc3339).context("formatting the time")?,
        git,
        machine,
        tunnel_driver: measured.tunnel_driver,
        command: command_line(options),
        settings: measured.settings,
        peers: measured.peers,
        skipped_peers: measured.skipped_peers,
    };
    finish(
        &summary::document(&plan, &measured.trials, about),
        &directory,
    )?;
    Ok(directory)
}

/// Adds the path to measure against itself: what `--aa` says, `ebpf`, or the last one.
fn choose_repeated(plan: &mut Plan, aa: Option<&str>) -> Result<()> {
    let repeated = plan.arms.iter().filter(|arm| arm.replicate_of.is_some());
    match (repeated.count(), aa) {
        (0, Some("off")) => Ok(()),
        (0, None) => {
            let mut arms = plan.arms.iter();
            let ebpf = arms.find(|arm| arm.redirect == Redirect::Ebpf && !arm.sockmap);
            let name = ebpf
                .or_else(|| plan.arms.last())
                .map(|arm| arm.name.clone());
            name.map_or(Ok(()), |name| plan.repeat(&name))
        }
        (0, Some(name)) => plan.repeat(name),
        (1, None) => Ok(()),
        (_, aa) => bail!(
            "only one path can be measured against itself: name one twice in --paths, or give \
             --aa {}",
            aa.unwrap_or("PATH")
        ),
    }
}

/// What measuring brought.
#[derive(Debug)]
struct Measured {
    trials: Trials,
    tunnel_driver: Option<String>,
    settings: Settings,
    peers: Vec<Peer>,
    skipped_peers: Vec<SkippedPeer>,
}

/// Brings the labs up, runs the rounds and takes the labs down.
fn measure(
    prefix: &str,
    options: &CompareOptions,
    (plan, wanted): (&mut Plan, &[Wanted]),
    setup: &Setup<'_>,
    directory: &Path,
) -> Result<Measured> {
    let interrupt = Interrupt::hold()?;
    let started = Instant::now();
    let mut labs = Labs::default();
    labs.up_competitors(prefix, plan, wanted, setup, &interrupt)?;
    labs.up(prefix, plan, setup.services, &interrupt)?;
    fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
    let rounds_wanted = options.trials.unwrap_or(if options.quick { 5 } else { 10 });
    let idle_busy_share = idle_busy_share()?;
    if plan.cells.iter().any(|cell| cell.load.is_some()) {
        plan.set_rates(highest_closed_rate(plan, setup, &labs)?);
    }
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
        placement: setup.pin.text(),
        services: setup.services.name().to_owned(),
        rounds_wanted,
        rounds,
        idle_busy_share,
    };
    Ok(Measured {
        trials,
        tunnel_driver: labs.tunnel_driver(),
        settings,
        peers: std::mem::take(&mut labs.peers),
        skipped_peers: std::mem::take(&mut labs.skipped_peers),
    })
}

fn finish(document: &Document, directory: &Path) -> Result<()> {
    report::store(document, directory)?;
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

/// The command, with what its meaning depends on and what the default was not always.
fn command_line(options: &CompareOptions) -> String {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    if options.services.is_none() {
        arguments.push(format!("--services {USUAL_SERVICES}"));
    }
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

/// The highest rate of a closed loop over the paths with a ztunnel (over all if there is none),
/// of one trial each: what the open loops' rates are shares of.
fn highest_closed_rate(plan: &Plan, setup: &Setup<'_>, labs: &Labs) -> Result<f64> {
    eprintln!("finding the rates of the open loops");
    let meshed = |redirect| redirect != Redirect::None;
    let any_meshed = plan.arms.iter().any(|arm| meshed(arm.redirect));
    let cell = Cell::closed_rr(OPEN_CONNECTIONS);
    let throughput = Metric::throughput(cell.workload.name());
    let mut highest = 0.0;
    for (arm, number) in plan.arms.iter().zip(1900..) {
        if arm.replicate_of.is_some() || (any_meshed && !meshed(arm.redirect)) {
            continue;
        }
        let trial = setup
            .run(labs.of(arm, &cell)?, &cell, number)
            .with_context(|| format!("finding the highest rate of {}", arm.name))?;
        highest = trial.metric(throughput).unwrap_or(0.0).max(highest);
    }
    Ok(highest)
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

    fn add(&mut self, round: u32, arm: &Arm, cell: &Cell, trial: &Trial) -> Result<()> {
        let line = serde_json::json!({
            "round": round,
            "path": arm.name,
            "scope": cell.scope.name(),
            "cell": cell.label(),
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
        let mut trials = vec![vec![Vec::new(); self.plan.arms.len()]; self.plan.cells.len()];
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
            for (cell, arm) in self.plan.round(round) {
                let (at, by) = (&self.plan.cells[cell], &self.plan.arms[arm]);
                progress.running(round, by, at);
                let number = u32::try_from(trials[cell][arm].len()).unwrap_or(0)
                    * u32::try_from(self.plan.cells.len()).unwrap_or(1)
                    + u32::try_from(cell).unwrap_or(0);
                let trial = self
                    .setup
                    .run(self.labs.of(by, at)?, at, number)
                    .with_context(|| format!("{} {}", by.name, at.label()))?;
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
                trials[cell][arm].push(trial);
            }
        }
        progress.end();
        Ok((trials, rounds))
    }
}
