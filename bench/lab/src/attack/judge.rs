//! Whether an attack was held off, and the table of all that were tried.

use std::fmt::Write as _;

use serde::Serialize;

use super::catalog::{Attack, Failure, Finding};
use super::gauge::{Honest, Latency, Sample};

/// Below this, times are not told apart, in us: a loaded machine has them without any attack.
const FLOOR_US: u64 = 20_000;

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
    pub(super) figures: Figures,
}

/// Judges an attack by what it found and, with `costs`, by what it cost.
pub(super) fn judge(attack: &Attack, finding: Finding, figures: &Figures, costs: bool) -> Row {
    let (mut verdict, mut happened) = match finding {
        Ok(happened) => (Verdict::Held, happened),
        Err(Failure::Got(what)) => (Verdict::Broke, format!("GOT {what}")),
        Err(Failure::Driver(what)) => (Verdict::Broke, format!("the driver failed: {what}")),
        Err(Failure::Skipped(why)) => (Verdict::Skipped, why),
    };
    if costs && verdict != Verdict::Skipped {
        for excess in excesses(attack, figures) {
            verdict = Verdict::Broke;
            let _ = write!(happened, "; {excess}");
        }
    }
    Row {
        name: attack.name.clone(),
        family: attack.family,
        must_not: attack.must_not.clone(),
        bounds: attack.bounds.to_string(),
        verdict,
        happened,
        figures: *figures,
    }
}

/// Every bound that was passed.
fn excesses(attack: &Attack, figures: &Figures) -> Vec<String> {
    let (bounds, mut found) = (&attack.bounds, Vec::new());
    let Figures { before, during, .. } = figures;
    let mut check = |what: &str, value: u64, bound: u64| {
        if value > bound {
            found.push(format!("{what} {value}, bound {bound}"));
        }
    };
    let more = |of: fn(&Sample) -> u64| of(during).saturating_sub(of(before));
    check("DESCRIPTORS +", more(|s| s.descriptors), bounds.descriptors);
    check("MEMORY +", more(|s| s.rss_bytes), bounds.memory);
    check("LOG +", figures.log_bytes, bounds.log);
    let honest = [figures.honest_during, figures.honest_after];
    let failed: usize = honest.iter().map(|h| h.kept.failed + h.new.failed).sum();
    if !bounds.honest_may_fail {
        check("HONEST FAILURES", failed as u64, 0);
    }
    if let Some(times) = bounds.slower {
        // Of connections that were there: new ones wait behind an honest crowd, too.
        let (during, before) = (figures.honest_during, figures.honest_before);
        let twin = slowed(during.twin, before.twin).max(1.0);
        let usual = before.kept.p90_us.max(FLOOR_US / times) as f64 * twin;
        check(
            "KEPT p90 us",
            during.kept.p90_us,
            usual.max(1.0) as u64 * times,
        );
    }
    found
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
