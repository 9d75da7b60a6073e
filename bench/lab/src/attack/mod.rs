//! `lab attack`: hostile peers and pods against the ztunnels of a lab, and what they got.
//!
//! Every attack is an entry of [`catalog`]: what is done, what the attacker must not get, and what
//! it may cost. Attacks that are refused at once run side by side; each of the others runs alone,
//! while honest connections go on beside it. Before, during and after, the ztunnels' descriptors,
//! memory and log and the latency of the honest are taken.
//!
//! Bounds are robust to a loaded machine: counts and bytes are absolute, times are compared with
//! those of the same run before the attack and, at the same time, between pods outside the mesh,
//! and an attack against which only a time speaks is tried again ([`judge`]).
//!
//! Limits: the attackers are sockets of this process in the lab's namespaces, so it needs root and
//! a descriptor for each connection; what it cannot have it says and skips.

mod arena;
mod catalog;
mod families;
mod frames;
mod gauge;
mod judge;
mod session;
mod who;

use std::cell::Cell;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde_json::json;

use arena::Arena;
use catalog::{Attack, Finding};
use gauge::{Honest, Prober, Watch};
use judge::{Figures, judge, of_tries, table};

use crate::kinds::Redirect;
use crate::lab::{Lab, LabOptions};

pub use catalog::KNOWN_TO_SUCCEED;
pub use judge::{Row, Verdict};

/// Attacks that run side by side.
const SIDE_BY_SIDE: usize = 6;
/// How long the honest are watched before and after an attack.
const QUIET: Duration = Duration::from_millis(400);
/// How long ztunnels may take to give descriptors back.
const SETTLE: Duration = Duration::from_secs(45);
/// Descriptors that may be more after an attack: tunnels of the honest, a hundred for a crowd.
const LEFT_OVER: u64 = 256;

/// What to attack, and where.
#[derive(Args, Clone, Debug)]
pub struct AttackOptions {
    /// `all`, `list`, or an attack or family by name or the beginning of one
    pub what: String,
    /// A lab that is up already [default: one of its own, with policies to go around]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Redirection of its own lab: tunnel or ebpf
    #[arg(long, default_value = Redirect::default().name())]
    pub redirect: Redirect,
    /// ztunnel of its own lab instead of this workspace's
    #[arg(long, value_name = "PATH")]
    pub ztunnel: Option<PathBuf>,
    /// Leave out what takes long, and use smaller numbers
    #[arg(long)]
    pub quick: bool,
    /// Write the results as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Runs the attacks that `options` name, tells of each on standard error as it ends, and returns
/// their rows; none for `list`, which is printed.
///
/// # Errors
/// The lab cannot be brought up or attached to, nothing has that name, or a file cannot be written.
pub fn run(options: &AttackOptions) -> Result<Vec<Row>> {
    if options.what == "list" {
        print!("{}", list());
        return Ok(Vec::new());
    }
    let attacks = select(options)?;
    let mut rows = Vec::new();
    match &options.name {
        Some(name) => rows.extend(against(Lab::attach(name)?, false, options.quick, &attacks)?),
        None => {
            let own = OwnLab::up(options)?;
            rows.extend(against(
                Lab::attach(&own.0)?,
                true,
                options.quick,
                &attacks,
            )?);
        }
    }
    if let Some(path) = &options.json {
        write_json(path, &rows)?;
    }
    Ok(rows)
}

/// The rows as a table, and a line with the sums.
#[must_use]
pub fn report(rows: &[Row]) -> String {
    let count = |verdict| rows.iter().filter(|row| row.verdict == verdict).count();
    format!(
        "{}{} attacks: {} held off, {} not, {} skipped\n",
        table(rows),
        rows.len(),
        count(Verdict::Held),
        count(Verdict::Broke),
        count(Verdict::Skipped)
    )
}

fn list() -> String {
    let mut out = String::new();
    for attack in catalog::all() {
        let long = if attack.long { " (not in --quick)" } else { "" };
        out.push_str(&format!(
            "{} [{}]{long}\n    must not get: {}\n    bounds: {}\n",
            attack.name, attack.family, attack.must_not, attack.bounds
        ));
    }
    out
}

fn select(options: &AttackOptions) -> Result<Vec<Attack>> {
    let what = options.what.as_str();
    let all = catalog::all();
    let exact = all
        .iter()
        .any(|attack| attack.name == what || attack.family == what);
    let wanted = |attack: &Attack| match exact {
        _ if what == "all" => !(options.quick && attack.long),
        true => attack.name == what || attack.family == what,
        false => attack.name.starts_with(what),
    };
    let chosen: Vec<_> = all.into_iter().filter(wanted).collect();
    if chosen.is_empty() {
        bail!("`{what}` is neither all, list, nor an attack's name; see `lab attack list`");
    }
    Ok(chosen)
}

/// A lab that is taken down when this is dropped.
#[derive(Debug)]
struct OwnLab(String);

impl OwnLab {
    fn up(options: &AttackOptions) -> Result<Self> {
        let name = format!("atk-{}", std::process::id());
        let mut mesh = tempfile::NamedTempFile::new().context("writing the mesh file")?;
        mesh.write_all(arena::attack_mesh().as_bytes())
            .context("writing the mesh file")?;
        Lab::up(&LabOptions {
            name: name.clone(),
            redirect: options.redirect,
            mesh: Some(mesh.path().to_owned()),
            ztunnel: options.ztunnel.clone(),
            ..LabOptions::default()
        })?;
        Ok(Self(name))
    }
}

impl Drop for OwnLab {
    fn drop(&mut self) {
        if std::env::var_os("LAB_KEEP").is_none()
            && let Err(error) = Lab::down(&self.0)
        {
            eprintln!("lab: {error}");
        }
    }
}

fn against(lab: Lab, own: bool, quick: bool, attacks: &[Attack]) -> Result<Vec<Row>> {
    let arena = Arena::new(lab, own, quick)?;
    let (mesh, plain) = arena.honest_ways()?;
    let prober = Prober::start(&mesh, &plain);
    // Tunnels of the honest and first allocations are no attack's.
    thread::sleep(QUIET);
    let field = Field {
        arena: &arena,
        prober: &prober,
        last: Cell::new(None),
    };
    let (alone, together): (Vec<_>, Vec<_>) = attacks.iter().partition(|attack| attack.alone);
    let mut rows = Vec::new();
    if !together.is_empty() {
        rows.extend(field.side_by_side(&together));
    }
    for attack in alone {
        let row = of_tries(|| field.alone(attack));
        tell(&row);
        rows.push(row);
    }
    Ok(rows)
}

fn tell(row: &Row) {
    let how = match row.verdict {
        Verdict::Held => "held",
        Verdict::Broke => "BROKE",
        Verdict::Skipped => "skipped",
    };
    let seconds = row.figures.seconds;
    eprintln!(
        "attack {} {how} ({seconds:.1} s): {}",
        row.name, row.happened
    );
}

/// Where and beside whom attacks run.
#[derive(Debug)]
struct Field<'a> {
    arena: &'a Arena,
    prober: &'a Prober,
    last: Cell<Option<Honest>>,
}

impl Field<'_> {
    fn alone(&self, attack: &Attack) -> Row {
        if attack.family != families::AROUND
            && let Err(error) = self.arena.set_mesh(&arena::attack_mesh())
        {
            return judge(attack, Err(error.into()), &Figures::default(), false);
        }
        let (finding, figures) = self.measured(1, || (attack.run)(self.arena));
        judge(attack, self.survived(finding), &figures, true)
    }

    fn side_by_side(&self, attacks: &[&Attack]) -> Vec<Row> {
        let mut rows = Vec::new();
        // What they cost is a line of its own: nobody can tell whose it was.
        let costs = of_tries(|| {
            let (now, costs) = self.all_side_by_side(attacks);
            // The first try decides what each got; a further one is for the costs.
            if rows.is_empty() {
                rows = now;
            }
            costs
        });
        rows.push(costs);
        let told = rows
            .iter()
            .filter(|row| row.verdict != Verdict::Held || row.family == "all");
        told.for_each(tell);
        rows
    }

    /// Runs these attacks, a few at a time; a row for each, and one for what all have cost.
    fn all_side_by_side(&self, attacks: &[&Attack]) -> (Vec<Row>, Row) {
        let next = AtomicUsize::new(0);
        let done = Mutex::new(Vec::new());
        let arena = self.arena;
        let work = || {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(attack) = attacks.get(index) else {
                    return;
                };
                let finding = (attack.run)(arena);
                done.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push((index, finding));
            }
        };
        let ((), figures) = self.measured(attacks.len(), || {
            thread::scope(|scope| {
                for _ in 0..SIDE_BY_SIDE {
                    scope.spawn(work);
                }
            });
        });
        let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
        done.sort_by_key(|(index, _)| *index);
        let rows = done
            .into_iter()
            .map(|(index, finding)| judge(attacks[index], finding, &figures, false))
            .collect();
        let all = self.survived(Ok(format!(
            "{} attacks in {:.0} s",
            attacks.len(),
            figures.seconds
        )));
        (rows, judge(&catalog::side_by_side(), all, &figures, true))
    }

    /// Runs `f` and takes the figures around it.
    fn measured<T>(&self, shared_by: usize, f: impl FnOnce() -> T) -> (T, Figures) {
        let honest_before = self.calm();
        let watched = self.arena.watched();
        let before = watched.sample();
        let lengths = watched.log_lengths();
        let watch = Watch::start(&watched);
        let begun = Instant::now();
        let result = f();
        let seconds = begun.elapsed().as_secs_f64();
        let during = watch.most();
        let honest_during = self.prober.since(begun);
        let deadline = Instant::now() + SETTLE;
        while watched.sample().descriptors > before.descriptors + LEFT_OVER
            && Instant::now() < deadline
        {
            thread::sleep(Duration::from_millis(100));
        }
        let honest_after = self.look();
        let figures = Figures {
            before,
            during,
            after: watched.sample(),
            honest_before,
            honest_during: if honest_during.kept.count > 0 {
                honest_during
            } else {
                Honest::default()
            },
            honest_after,
            log_bytes: watched.log_since(&lengths, arena::honest_address()),
            seconds,
            shared_by,
        };
        (result, figures)
    }

    /// How the honest fare without an attack: as they did after the last one, if they were looked
    /// at then.
    fn calm(&self) -> Honest {
        let known = self.last.take();
        known.unwrap_or_else(|| self.look())
    }

    fn look(&self) -> Honest {
        let begun = Instant::now();
        thread::sleep(QUIET);
        let honest = self.prober.since(begun);
        self.last.set(Some(honest));
        honest
    }

    /// An attack that ended a ztunnel got that.
    fn survived(&self, finding: Finding) -> Finding {
        let gone = |pid: &u32| !Path::new("/proc").join(pid.to_string()).exists();
        if self.arena.lab.ztunnel_pids().iter().any(gone) {
            return catalog::got("a ztunnel's end: its process is gone");
        }
        finding
    }
}

fn write_json(path: &Path, rows: &[Row]) -> Result<()> {
    let document = json!({"schema": 1, "attacks": rows});
    fs::write(path, format!("{document:#}\n"))
        .with_context(|| format!("writing {}", path.display()))
}
