//! The highest rate at which a quantile of latency stays below a bound.
//!
//! A closed loop finds where to begin, then open loops halve the span between the highest rate
//! that held and the lowest that did not. A rate holds if the quantile, from the intended send
//! times, is below the bound, nothing failed and the run was not saturated.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use crate::error::Error;
use crate::pacing::{Arrivals, Pacing};
use crate::report::Report;
use crate::rr;

/// The span ends when its ends differ by less than this factor.
const PRECISION: f64 = 1.03;
const PROBES_MAX: usize = 16;
/// Rates below this are not looked at.
const LEAST_RATE: f64 = 1.0;

/// What must hold: `p99<2ms`.
#[derive(Clone, Debug, PartialEq)]
pub struct Objective {
    quantile: &'static str,
    below_us: f64,
}

impl FromStr for Objective {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!("`{text}` must be p50, p90, p99 or p999, `<`, and a time such as 500us or 2ms")
        };
        let (quantile, bound) = text.split_once('<').ok_or_else(wrong)?;
        let known = ["p50", "p90", "p99", "p999"];
        let quantile = known
            .into_iter()
            .find(|&q| q == quantile)
            .ok_or_else(wrong)?;
        let (number, scale) = if let Some(number) = bound.strip_suffix("us") {
            (number, 1.0)
        } else if let Some(number) = bound.strip_suffix("ms") {
            (number, 1e3)
        } else {
            (bound.strip_suffix('s').ok_or_else(wrong)?, 1e6)
        };
        let below_us = number.parse::<f64>().map_err(|_| wrong())? * scale;
        if !(below_us > 0.0 && below_us <= 60e6) {
            return Err(wrong());
        }
        Ok(Self { quantile, below_us })
    }
}

impl fmt::Display for Objective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}<{}us", self.quantile, self.below_us)
    }
}

impl Objective {
    /// The quantile's value in a report, and whether everything holds.
    fn judge(&self, report: &Report) -> (Option<f64>, bool) {
        let value = report.metric(&format!("{}_us", self.quantile));
        let holds = value.is_some_and(|us| us < self.below_us)
            && report.errors_by_kind().is_empty()
            && !report.saturated();
        (value, holds)
    }
}

/// A rate and what a run at it came to.
type Step = (f64, Report);

/// Searches with runs of `options`. The pacing of the options does not matter. Returns
/// the report of the highest rate that held with the search's steps in it; of the lowest one tried
/// if none did. `tell` is told of each step.
///
/// # Errors
///
/// As [`rr::run`].
pub fn run(
    options: &rr::Options,
    arrivals: Arrivals,
    objective: &Objective,
    mut tell: impl FnMut(&str),
) -> Result<Report, Error> {
    let mut options = options.clone();
    options.pacing = Pacing::Closed;
    let closed = rr::run(&options)?;
    let highest = closed.metric("requests_per_s").unwrap_or(0.0);
    tell(&format!("closed loop: {highest:.0} requests/s"));
    if closed.ok() == 0 {
        return Ok(closed);
    }
    let (mut held, mut broke): (Option<Step>, Option<Step>) = (None, None);
    let mut steps: Vec<Value> = Vec::new();
    let mut rate = (highest * 0.7).max(LEAST_RATE);
    while steps.len() < PROBES_MAX && !options.client.stop.load(Ordering::Relaxed) {
        options.pacing = Pacing::Open { rate, arrivals };
        let report = rr::run(&options)?;
        if options.client.stop.load(Ordering::Relaxed) && !steps.is_empty() {
            // A step that was cut short proves nothing.
            break;
        }
        let (value, holds) = objective.judge(&report);
        let verdict = if holds { "holds" } else { "does not hold" };
        let shown = value.map_or_else(|| "nothing".to_owned(), |us| format!("{us:.1} us"));
        tell(&format!(
            "{rate:.0} requests/s: {} {shown}, {verdict}",
            objective.quantile
        ));
        steps.push(json!({"rate": rate, "value_us": value, "holds": holds}));
        if holds {
            held = Some((rate, report));
        } else {
            broke = Some((rate, report));
        }
        rate = match (&held, &broke) {
            (Some((low, _)), Some((high, _))) if high / low < PRECISION => break,
            (Some((low, _)), Some((high, _))) => (low * high).sqrt(),
            (Some((low, _)), None) => low * 1.3,
            (None, Some((high, _))) if *high <= LEAST_RATE => break,
            (None, Some((high, _))) => (high / 2.0).max(LEAST_RATE),
            (None, None) => break,
        };
    }
    let sustained = held.as_ref().map(|(rate, _)| *rate);
    let mut report = held.or(broke).map_or(closed, |(_, report)| report);
    report.set_search(&objective.to_string(), sustained, &steps);
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objectives_are_a_quantile_and_a_time() {
        let objective: Objective = "p99<2ms".parse().unwrap();
        assert_eq!(objective.to_string(), "p99<2000us");
        assert_eq!("p50<1.5us".parse::<Objective>().unwrap().below_us, 1.5);
        for wrong in [
            "p99", "p98<1ms", "p99<1", "p99<0ms", "p99<-1ms", "p99<99s", "p99>1ms",
        ] {
            assert!(wrong.parse::<Objective>().is_err(), "{wrong}");
        }
    }
}
