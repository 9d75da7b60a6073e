//! Whether an attack was held off, and the table of all that were tried.
//!
//! Counts and bytes decide at once. A time does not, because any machine is slow for a moment now
//! and then: an attack against which nothing but a time speaks is tried again, and has succeeded if
//! it took that long each time. A percentile of a handful of exchanges is no figure.

use std::fmt::Write as _;

use serde::Serialize;

use super::catalog::{Attack, Failure, Finding};
use super::gauge::{Honest, Latency, Sample};

/// Below this, times are not told apart, in us: a loaded machine has them without any attack.
const FLOOR_US: u64 = 20_000;
/// How often an attack is tried against which only a time speaks.
const TRIES: usize = 3;
/// Exchanges of which the slowest tenth tells something.
const ENOUGH: usize = 100;
/// In that many seconds there are enough exchanges, unless it is the attack that made them few.
const LONG_S: f64 = 1.0;

/// What came of an attack.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It got nothing and cost no more than it may.
    Held,
    /// It got what it must not, or cost more than it may.
    Broke,
    /// It could not be tried here.
    Skipped,
}

/// Figures around an attack.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Figures {
    pub(super) before: Sample,
    /// The most that was seen while it lasted.
    pub(super) during: Sample,
    pub(super) after: Sample,
    pub(super) honest_before: Honest,
    pub(super) honest_during: Honest,
    pub(super) honest_after: Honest,
    /// Bytes of log, lines about the honest not counted.
    pub(super) log_bytes: u64,
    pub(super) seconds: f64,
    /// How many attacks ran side by side and share these.
    pub(super) shared_by: usize,
}

/// One line of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The attack.
    pub name: String,
    /// Attacks of a kind.
    pub family: &'static str,
    /// What it must not get.
    pub must_not: String,
    /// What it may cost.
    pub bounds: String,
    /// What came of it.
    pub verdict: Verdict,
    /// What happened, in a few words; if it was not held off, why.
    pub happened: String,
    /// Nothing but times speak against it.
    #[serde(skip)]
    pub(super) only_times: bool,
    pub(super) figures: Figures,
}

/// The row of an attack that is tried again while nothing but a time speaks against it, at most
/// [`TRIES`] times in all.
pub(super) fn of_tries(mut attempt: impl FnMut() -> Row) -> Row {
    let mut unlucky = Vec::new();
    loop {
        let mut row = attempt();
        if row.only_times && unlucky.len() + 1 < TRIES {
            unlucky.push(row.happened);
            continue;
        }
        if !unlucky.is_empty() {
            let (tries, before) = (unlucky.len() + 1, unlucky.join("; before: "));
            let _ = write!(row.happened, " (try {tries}; before: {before})");
        }
        return row;
    }
}

/// Judges an attack by what it found and, with `costs`, by what it cost.
pub(super) fn judge(attack: &Attack, finding: Finding, figures: &Figures, costs: bool) -> Row {
    let mut only_times = matches!(finding, Ok(_) | Err(Failure::Took(_)));
    let (mut verdict, mut happened) = match finding {
        Ok(happened) => (Verdict::Held, happened),
        Err(Failure::Took(what)) => (Verdict::Broke, format!("TOOK {what}")),
        Err(Failure::Got(what)) => (Verdict::Broke, format!("GOT {what}")),
        Err(Failure::Driver(what)) => (Verdict::Broke, format!("the driver failed: {what}")),
        Err(Failure::Skipped(why)) => (Verdict::Skipped, why),
    };
    if costs && verdict != Verdict::Skipped {
        for excess in excesses(attack, figures) {
            verdict = Verdict::Broke;
            only_times &= excess.of_time;
            let _ = write!(happened, "; {}", excess.what);
        }
    }
    Row {
        name: attack.name.clone(),
        family: attack.family,
        must_not: attack.must_not.clone(),
        bounds: attack.bounds.to_string(),
        verdict,
        happened,
        only_times: only_times && verdict == Verdict::Broke,
        figures: *figures,
    }
}

/// A bound that was passed.
struct Excess {
    what: String,
    /// It is a time.
    of_time: bool,
}

/// Every bound that was passed.
fn excesses(attack: &Attack, figures: &Figures) -> Vec<Excess> {
    let bounds = &attack.bounds;
    let Figures { before, during, .. } = figures;
    let more = |of: fn(&Sample) -> u64| of(during).saturating_sub(of(before));
    let honest = [figures.honest_during, figures.honest_after];
    let failed: usize = honest.iter().map(|h| h.kept.failed + h.new.failed).sum();
    let failures_max = if bounds.honest_may_fail { u64::MAX } else { 0 };
    let mut checks = vec![
        ("DESCRIPTORS +", more(|s| s.descriptors), bounds.descriptors),
        ("MEMORY +", more(|s| s.rss_bytes), bounds.memory),
        ("LOG +", figures.log_bytes, bounds.log),
        ("HONEST FAILURES", failed as u64, failures_max),
    ];
    let counts = checks.len();
    if let Some(times) = bounds.slower
        && tells_something(figures)
    {
        let usual = usual_p90_us(figures, times);
        checks.push((
            "KEPT p90 us",
            figures.honest_during.kept.p90_us,
            usual * times,
        ));
    }
    let passed = checks.into_iter().enumerate();
    let passed = passed.filter(|(_, (_, value, bound))| value > bound);
    passed
        .map(|(index, (what, value, bound))| Excess {
            what: format!("{what} {value}, bound {bound}"),
            of_time: index >= counts,
        })
        .collect()
}

/// There were enough honest exchanges, here and at the twin, or it was the attack that kept them
/// from being more.
fn tells_something(figures: &Figures) -> bool {
    let during = &figures.honest_during;
    let enough = |latency: Latency| latency.count >= ENOUGH || figures.seconds >= LONG_S;
    enough(during.kept) && enough(during.twin)
}

/// What nine in ten requests would take now without the attack: on connections that were there, as
/// new ones wait behind an honest crowd, too.
fn usual_p90_us(figures: &Figures, times: u64) -> u64 {
    let (during, before) = (figures.honest_during, figures.honest_before);
    let twin = slowed(during.twin, before.twin).max(1.0);
    let usual = before.kept.p90_us.max(FLOOR_US / times) as f64 * twin;
    usual.max(1.0) as u64
}

/// How many times longer the requests of the twin took.
fn slowed(during: Latency, before: Latency) -> f64 {
    during.p90_us as f64 / before.p90_us.max(1) as f64
}

/// The table.
pub(super) fn table(rows: &[Row]) -> String {
    let mut out = format!(
        "{:<34} {:<11} {:<7} {:>17} {:>14} {:>23} {:>6}  {}\n",
        "attack",
        "family",
        "verdict",
        "descriptors b/d/a",
        "MiB b/d/a",
        "honest p50/p99 ms b>d>a",
        "log KB",
        "what happened"
    );
    for row in rows {
        let f = &row.figures;
        let of = |get: fn(&Sample) -> u64| {
            format!("{}/{}/{}", get(&f.before), get(&f.during), get(&f.after))
        };
        let honest = |h: Honest| {
            let ms = |us: u64| us as f64 / 1e3;
            format!("{:.1}/{:.1}", ms(h.kept.p50_us), ms(h.kept.p99_us))
        };
        let honest = [f.honest_before, f.honest_during, f.honest_after].map(honest);
        let verdict = match row.verdict {
            Verdict::Held => "held",
            Verdict::Broke => "BROKE",
            Verdict::Skipped => "skipped",
        };
        let _ = writeln!(
            out,
            "{:<34} {:<11} {verdict:<7} {:>17} {:>14} {:>23} {:>6}  {}",
            row.name,
            row.family,
            of(|s| s.descriptors),
            of(|s| s.rss_bytes >> 20),
            honest.join(">"),
            f.log_bytes >> 10,
            row.happened
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attack::catalog::Bounds;

    fn attack() -> Attack {
        Attack {
            name: "x".to_owned(),
            family: "y",
            must_not: "z".to_owned(),
            bounds: Bounds::SMALL,
            long: false,
            alone: true,
            run: Box::new(|_| Ok(String::new())),
        }
    }

    fn of(change: impl FnOnce(&mut Figures)) -> Row {
        let mut figures = Figures::default();
        figures.honest_before.kept.p90_us = 1_000;
        figures.honest_before.new.p90_us = 2_000;
        figures.honest_before.twin.p90_us = 100;
        figures.honest_before.kept.count = 200;
        figures.honest_before.twin.count = 200;
        figures.seconds = 0.5;
        figures.honest_during = figures.honest_before;
        change(&mut figures);
        judge(&attack(), Ok("fine".to_owned()), &figures, true)
    }

    #[test]
    fn every_bound_is_looked_at() {
        assert_eq!(of(|_| ()).verdict, Verdict::Held);
        type Case = (&'static str, fn(&mut Figures));
        let cases: [Case; 5] = [
            ("DESCRIPTORS", |f| f.during.descriptors = 257),
            ("MEMORY", |f| f.during.rss_bytes = (64 << 20) + 1),
            ("LOG", |f| f.log_bytes = 1 << 20),
            ("HONEST FAILURES", |f| f.honest_after.new.failed = 1),
            ("KEPT p90", |f| f.honest_during.kept.p90_us = 51_000),
        ];
        for (name, change) in cases {
            let row = of(change);
            assert_eq!(row.verdict, Verdict::Broke, "{name}");
            assert!(row.happened.contains(name), "{}", row.happened);
        }
    }

    fn slow(figures: &mut Figures) {
        figures.honest_during.kept.p90_us = 51_000;
    }

    /// Tries that end like this, and the row of all of them; how many were needed.
    fn tried(how: &[fn(&mut Figures)]) -> (Row, usize) {
        let mut left = how.iter();
        let row = of_tries(|| of(*left.next().expect("tried more often")));
        (row, how.len() - left.len())
    }

    #[test]
    fn a_time_alone_decides_only_if_it_is_the_same_each_time() {
        let (row, tries) = tried(&[slow, slow, slow, |_| ()]);
        assert_eq!((row.verdict, tries), (Verdict::Broke, 3));
        assert!(row.happened.contains("try 3"), "{}", row.happened);
        assert_eq!(row.happened.matches("KEPT p90").count(), 3);
        let (row, tries) = tried(&[slow, |_| ()]);
        assert_eq!((row.verdict, tries), (Verdict::Held, 2));
        assert!(
            row.happened.contains("try 2; before: fine; KEPT"),
            "{}",
            row.happened
        );
        let (row, tries) = tried(&[slow, slow, |_| ()]);
        assert_eq!((row.verdict, tries), (Verdict::Held, 3));
    }

    #[test]
    fn what_is_counted_decides_at_once() {
        let counted: [fn(&mut Figures); 4] = [
            |f| f.during.descriptors = 257,
            |f| f.during.rss_bytes = (64 << 20) + 1,
            |f| f.log_bytes = 1 << 20,
            |f| f.honest_during.kept.failed = 1,
        ];
        for change in counted {
            let (row, tries) = tried(&[change]);
            assert_eq!(
                (row.verdict, tries),
                (Verdict::Broke, 1),
                "{}",
                row.happened
            );
            // Beside a time, too, and in a try that was only about a time.
            let both = || {
                of(|f| {
                    slow(f);
                    change(f);
                })
            };
            assert!(!both().only_times);
            let (row, tries) = tried(&[slow, change, |_| ()]);
            assert_eq!(
                (row.verdict, tries),
                (Verdict::Broke, 2),
                "{}",
                row.happened
            );
        }
    }

    #[test]
    fn an_attack_that_finds_a_time_is_tried_again_and_one_that_got_something_is_not() {
        let row = |failure| judge(&attack(), Err(failure), &Figures::default(), true);
        let mut tries = 0;
        let held = of_tries(|| {
            tries += 1;
            match tries {
                1 => row(Failure::Took("long".to_owned())),
                _ => of(|_| ()),
            }
        });
        assert_eq!((held.verdict, tries), (Verdict::Held, 2));
        for failure in [
            Failure::Got("in".to_owned()),
            Failure::Driver("no".to_owned()),
            Failure::Skipped("no".to_owned()),
        ] {
            assert!(!row(failure).only_times);
        }
        let mut failures = [
            Failure::Took("long".to_owned()),
            Failure::Got("in".to_owned()),
        ]
        .into_iter();
        let broke = of_tries(|| row(failures.next().expect("tried more often")));
        assert!(broke.happened.starts_with("GOT in"), "{}", broke.happened);
    }

    #[test]
    fn a_handful_of_exchanges_is_no_figure_unless_there_was_time_for_more() {
        let few: [fn(&mut Figures); 2] = [
            |f| f.honest_during.kept.count = 30,
            |f| f.honest_during.twin.count = 30,
        ];
        for few in few {
            let row = of(|f| {
                slow(f);
                few(f);
            });
            assert_eq!(row.verdict, Verdict::Held, "{}", row.happened);
            let row = of(|f| {
                slow(f);
                few(f);
                f.seconds = 4.0;
            });
            assert_eq!(row.verdict, Verdict::Broke, "{}", row.happened);
        }
    }

    #[test]
    fn a_machine_that_is_slow_for_all_is_no_success_of_the_attack() {
        let row = of(|f| {
            f.honest_during.kept.p90_us = 51_000;
            f.honest_during.twin.p90_us = 200;
        });
        assert_eq!(row.verdict, Verdict::Held, "{}", row.happened);
    }

    #[test]
    fn what_the_attacker_got_is_said() {
        let got = judge(
            &attack(),
            Err(Failure::Got("in".to_owned())),
            &Figures::default(),
            true,
        );
        assert_eq!(
            (got.verdict, got.happened.as_str()),
            (Verdict::Broke, "GOT in")
        );
        let skipped = Err(Failure::Skipped("no".to_owned()));
        let skipped = judge(&attack(), skipped, &Figures::default(), true);
        assert_eq!(skipped.verdict, Verdict::Skipped);
    }
}
