//! How many refusals are told one by one. Anyone may have connections refused as fast as he can
//! open them; what that costs the log is bounded here. Counters count all of them.
//!
//! Each source address has a budget of lines for each reason, so that one that is noisy hides no
//! other, and a worker has one for all. What is left out is summed up, by source and reason, every
//! [`SUMMARY_EVERY`]. A table of bounded size knows the sources; those beyond it share an entry for
//! each reason.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::connection::Reporter;

/// Lines of one source and reason: at once, and a second.
const OF_SOURCE: Budget = Budget {
    most: 20,
    per_second: 1,
};
/// Lines of a worker: at once, and a second.
const OF_WORKER: Budget = Budget {
    most: 200,
    per_second: 50,
};
/// Sources and reasons that are told apart.
const ENTRIES_MAX: usize = 1024;
/// Lines of one summary; the rest is in its last.
const SUMMARY_LINES_MAX: usize = 20;
/// How often what was left out is to be told.
pub const SUMMARY_EVERY: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug)]
struct Budget {
    most: u32,
    per_second: u32,
}

/// What is left of a budget.
#[derive(Debug)]
struct Bucket {
    /// In thousandths of a line.
    left: u64,
    at: Instant,
}

impl Bucket {
    fn new(budget: Budget, now: Instant) -> Self {
        Self {
            left: u64::from(budget.most) * 1000,
            at: now,
        }
    }

    fn fill(&mut self, budget: Budget, now: Instant) {
        let passed = now.saturating_duration_since(self.at).as_millis();
        let passed = u64::try_from(passed).unwrap_or(u64::MAX);
        let gained = passed.saturating_mul(budget.per_second.into());
        if gained > 0 {
            self.left = (self.left.saturating_add(gained)).min(u64::from(budget.most) * 1000);
            self.at = now;
        }
    }

    fn has_one(&self) -> bool {
        self.left >= 1000
    }

    fn is_full(&self, budget: Budget) -> bool {
        self.left >= u64::from(budget.most) * 1000
    }
}

/// Whose refusals, and why. No address: of all that found no room.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
struct Key {
    source: Option<IpAddr>,
    reporter: Reporter,
    reason: &'static str,
}

#[derive(Debug)]
struct Entry {
    bucket: Bucket,
    left_out: u64,
}

/// What was not told of one source and reason.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct LeftOut {
    /// None: of several.
    pub(crate) source: Option<IpAddr>,
    pub(crate) reporter: Reporter,
    /// None: several.
    pub(crate) reason: Option<&'static str>,
    pub(crate) count: u64,
}

/// One worker's refusals.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    entries: HashMap<Key, Entry>,
    /// None before the first.
    worker: Option<Bucket>,
    left_out: u64,
}

impl Refusals {
    /// Whether this one is told.
    pub(crate) fn tell(
        &mut self,
        source: IpAddr,
        reporter: Reporter,
        reason: &'static str,
        now: Instant,
    ) -> bool {
        let mut key = Key {
            source: Some(source),
            reporter,
            reason,
        };
        if self.entries.len() >= ENTRIES_MAX && !self.entries.contains_key(&key) {
            key.source = None;
        }
        let new = || Entry {
            bucket: Bucket::new(OF_SOURCE, now),
            left_out: 0,
        };
        let entry = self.entries.entry(key).or_insert_with(new);
        entry.bucket.fill(OF_SOURCE, now);
        let worker = self
            .worker
            .get_or_insert_with(|| Bucket::new(OF_WORKER, now));
        worker.fill(OF_WORKER, now);
        if entry.bucket.has_one() && worker.has_one() {
            entry.bucket.left -= 1000;
            worker.left -= 1000;
            return true;
        }
        entry.left_out += 1;
        self.left_out += 1;
        false
    }

    /// What was left out since the last time, most first; and forgets who has been quiet.
    pub(crate) fn take_left_out(&mut self, now: Instant) -> Vec<LeftOut> {
        let mut all = Vec::new();
        if std::mem::take(&mut self.left_out) > 0 {
            let some = self
                .entries
                .iter_mut()
                .filter(|(_, entry)| entry.left_out > 0);
            all.extend(some.map(|(key, entry)| LeftOut {
                source: key.source,
                reporter: key.reporter,
                reason: Some(key.reason),
                count: std::mem::take(&mut entry.left_out),
            }));
        }
        self.entries.retain(|_, entry| {
            entry.bucket.fill(OF_SOURCE, now);
            !entry.bucket.is_full(OF_SOURCE)
        });
        all.sort_by_key(|left_out| std::cmp::Reverse(left_out.count));
        let told = SUMMARY_LINES_MAX - Reporter::ALL.len();
        let rest = all.split_off(told.min(all.len()));
        for reporter in Reporter::ALL {
            let of_reporter = rest.iter().filter(|one| one.reporter == reporter);
            let count = of_reporter.map(|one| one.count).sum();
            if count > 0 {
                all.push(LeftOut {
                    source: None,
                    reporter,
                    reason: None,
                    count,
                });
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHY: &str = "unknown source";

    fn ip(n: u32) -> IpAddr {
        IpAddr::from(std::net::Ipv4Addr::from(0x0a00_0000 + n))
    }

    /// Of so many refusals of each of these sources at `now`, how many are told.
    fn told(refusals: &mut Refusals, sources: u32, each: usize, now: Instant) -> usize {
        let mut told = 0;
        for _ in 0..each {
            for n in 0..sources {
                told += usize::from(refusals.tell(ip(n), Reporter::Source, WHY, now));
            }
        }
        told
    }

    fn count(left_out: &[LeftOut]) -> u64 {
        left_out.iter().map(|one| one.count).sum()
    }

    #[test]
    fn a_noisy_source_is_told_a_little_and_hides_no_other() {
        let (mut refusals, start) = (Refusals::default(), Instant::now());
        assert_eq!(told(&mut refusals, 1, 100_000, start), 20);
        assert!(
            refusals.tell(ip(7), Reporter::Source, WHY, start),
            "another one"
        );
        assert!(
            refusals.tell(ip(0), Reporter::Source, "route", start),
            "another reason"
        );
        let later = start + Duration::from_secs(5);
        assert_eq!(told(&mut refusals, 1, 100, later), 5, "one a second");
        let left_out = refusals.take_left_out(later);
        let expected = LeftOut {
            source: Some(ip(0)),
            reporter: Reporter::Source,
            reason: Some(WHY),
            count: 100_000 - 20 + 100 - 5,
        };
        assert_eq!(left_out, [expected]);
        assert_eq!(refusals.take_left_out(later), [], "told once");
    }

    #[test]
    fn many_sources_are_bounded_together_and_every_refusal_is_accounted_for() {
        let (mut refusals, start) = (Refusals::default(), Instant::now());
        let sources = 5_000;
        let at_once = told(&mut refusals, sources, 10, start);
        assert_eq!(at_once, 200);
        assert!(refusals.entries.len() <= ENTRIES_MAX + 2);
        let left_out = refusals.take_left_out(start);
        assert!(left_out.len() <= SUMMARY_LINES_MAX, "{}", left_out.len());
        assert_eq!(count(&left_out), u64::from(sources) * 10 - 200);
        // Ten seconds of that: no more than the worker's budget, ever.
        let mut lines = 0;
        for tenth in 1..=100_u32 {
            let now = start + Duration::from_millis(100) * tenth;
            lines += told(&mut refusals, sources, 1, now);
        }
        assert!((400..=500).contains(&lines), "{lines}");
        // The quiet are forgotten.
        let later = start + Duration::from_secs(60);
        refusals.take_left_out(later);
        assert_eq!(refusals.entries.len(), 0);
        assert!(refusals.tell(ip(1), Reporter::Source, WHY, later));
    }

    #[test]
    fn a_summary_of_both_directions_adds_up() {
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        for n in 0..100_u32 {
            for (reporter, times) in [(Reporter::Source, 30 + n), (Reporter::Destination, 50)] {
                for _ in 0..times {
                    refusals.tell(ip(n), reporter, WHY, now);
                }
            }
        }
        let all: u64 = (0..100).map(|n| 30 + n + 50).sum();
        let left_out = refusals.take_left_out(now);
        assert_eq!(count(&left_out), all - 200);
        assert_eq!(left_out.len(), SUMMARY_LINES_MAX);
    }
}
