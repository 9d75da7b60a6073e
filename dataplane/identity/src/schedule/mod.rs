//! Which identity's certificate is asked for next, and when.
//!
//! Pure: it knows identities and spans of validity, is told what happens and what time it is, and
//! says what is to be done. Delays are kept in monotonic time; where the time of day turns out to
//! have been corrected they are computed anew.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant, SystemTime};

use mesh::Identity;
use tls::Validity;

/// Requests to an issuer that are under way at a time.
pub const UNDER_WAY_MAX: usize = 8;
/// Failures in a row with which who waits is told. The first may pass: a CA that has not heard of
/// a new pod yet will have by the next attempt, within a second.
const HOPELESS: u32 = 2;
/// Delay after the first failed attempt, at most; it doubles with each further one.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// Longest delay between attempts.
const RETRY_MAX: Duration = Duration::from_secs(150);
/// By how many hundredths of itself, at most, a delay after a failure is shortened by chance.
const JITTER: u64 = 20;
/// How long a certificate is kept that a connection waited for and no workload of this node has:
/// its workload was removed meanwhile.
const UNWANTED: Duration = Duration::from_secs(60);
/// How often the time of day is compared with the monotonic clock.
const CLOCK_CHECK: Duration = Duration::from_secs(30);
/// By how much they may drift apart meanwhile without the time of day having been corrected.
const DRIFT: Duration = Duration::from_secs(1);

/// This node's identities, and whether their certificates are fetched ahead.
pub type Wanted = HashMap<Identity, bool>;

/// Both clocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Now {
    pub(crate) monotonic: Instant,
    pub(crate) time_of_day: SystemTime,
}

/// What a certificate says of its validity.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Span {
    pub(crate) start: SystemTime,
    pub(crate) end: SystemTime,
}

impl Span {
    fn is_valid(&self, now: SystemTime) -> bool {
        Validity::at(now, (self.start, self.end)) == Validity::Valid
    }

    /// Time until half its lifetime is over; none if that is past, or it is not valid.
    fn half_in(&self, now: SystemTime) -> Duration {
        if !self.is_valid(now) {
            return Duration::ZERO;
        }
        let lifetime = self.end.duration_since(self.start).unwrap_or_default();
        let half = self.start + lifetime / 2;
        half.duration_since(now).unwrap_or_default()
    }

    /// Time until it is to be renewed, as it comes: at half its lifetime, and half of what is left
    /// of one that comes later than that. At most once a second.
    fn renewal_in(&self, now: SystemTime) -> Duration {
        let half = self.half_in(now);
        let delay = match half.is_zero() {
            true => self.left(now) / 2,
            false => half,
        };
        delay.max(RETRY_FIRST)
    }

    fn left(&self, now: SystemTime) -> Duration {
        self.end.duration_since(now).unwrap_or_default()
    }
}

/// Why a certificate is asked for: the first comes first.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Priority {
    /// A connection waits for it.
    Awaited,
    /// One will.
    Prefetch,
    /// There is one that is still valid.
    Renewal,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum Step {
    /// Until its timer, if it has one.
    #[default]
    Idle,
    /// Waits for its turn, since so many others.
    Queued(Priority, u64),
    UnderWay,
}

#[derive(Debug, Default)]
struct Entry {
    /// Of the certificate that is there.
    span: Option<Span>,
    step: Step,
    /// Renewal, or the next attempt after a failure.
    timer: Option<Instant>,
    /// In a row.
    failures: u32,
    awaited: bool,
}

/// All identities.
#[derive(Debug)]
pub(crate) struct Schedule {
    entries: HashMap<Identity, Entry>,
    /// Until it is said whose certificates are wanted, everybody's are.
    wanted: Option<Wanted>,
    queue: BTreeSet<(Priority, u64, Identity)>,
    timers: BTreeSet<(Instant, Identity)>,
    under_way: usize,
    arrivals: u64,
    forgotten: Vec<Identity>,
    /// The clocks when they were last compared.
    compared: Now,
    random: u64,
}

impl Schedule {
    pub(crate) fn new(now: Now, seed: u64) -> Self {
        Self {
            entries: HashMap::new(),
            wanted: None,
            queue: BTreeSet::new(),
            timers: BTreeSet::new(),
            under_way: 0,
            arrivals: 0,
            forgotten: Vec::new(),
            compared: now,
            random: seed | 1,
        }
    }

    /// Takes the identities of this node. What has no certificate is fetched ahead if it is to be;
    /// what nobody has any more is forgotten.
    pub(crate) fn want(&mut self, wanted: Wanted) {
        let ahead: Vec<Identity> = wanted
            .iter()
            .filter(|(_, ahead)| **ahead)
            .map(|(identity, _)| identity.clone())
            .collect();
        self.wanted = Some(wanted);
        for identity in ahead {
            let entry = self.entries.entry(identity.clone()).or_default();
            if entry.step == Step::Idle && entry.span.is_none() && entry.failures == 0 {
                self.enqueue(&identity, Priority::Prefetch);
            }
        }
        let gone: Vec<Identity> = self
            .entries
            .iter()
            .filter(|(identity, entry)| {
                // Who waits gets an answer.
                !self.is_wanted(identity) && !entry.awaited && entry.step != Step::UnderWay
            })
            .map(|(identity, _)| identity.clone())
            .collect();
        for identity in gone {
            self.forget(&identity);
        }
    }

    fn is_wanted(&self, identity: &Identity) -> bool {
        let wanted = self.wanted.as_ref();
        wanted.is_none_or(|wanted| wanted.contains_key(identity))
    }

    /// A connection waits for `identity`. The certificate that is there is of no use to it if
    /// `useless`.
    pub(crate) fn demand(&mut self, identity: &Identity, useless: bool, now: Now) {
        let entry = self.entries.entry(identity.clone()).or_default();
        let valid = entry
            .span
            .is_some_and(|span| span.is_valid(now.time_of_day));
        if valid && !useless {
            return; // it is on its way to whoever asks
        }
        entry.awaited = true;
        match entry.step {
            Step::Queued(Priority::Awaited, _) | Step::UnderWay => {}
            // The delay after a failure holds.
            Step::Idle if entry.failures > 0 => {}
            Step::Idle | Step::Queued(..) => self.enqueue(identity, Priority::Awaited),
        }
    }

    /// The identity to ask for now, if there is one and not too many are under way.
    pub(crate) fn next(&mut self) -> Option<Identity> {
        if self.under_way == UNDER_WAY_MAX {
            return None;
        }
        let (_, _, identity) = self.queue.pop_first()?;
        if let Some(entry) = self.entries.get_mut(&identity) {
            entry.step = Step::UnderWay;
        }
        self.under_way += 1;
        Some(identity)
    }

    /// A request has come to its end, with a certificate or without. Says whether who waits is to
    /// be told that there is none.
    pub(crate) fn finished(
        &mut self,
        identity: &Identity,
        outcome: Option<Span>,
        now: Now,
    ) -> bool {
        self.under_way -= 1;
        let (random, wanted) = (self.random(), self.is_wanted(identity));
        let Some(entry) = self.entries.get_mut(identity) else {
            return false; // one that is under way is not forgotten
        };
        entry.step = Step::Idle;
        let was_awaited = entry.awaited;
        let mut delay = match outcome {
            Some(span) => {
                entry.span = Some(span);
                entry.failures = 0;
                entry.awaited = false;
                span.renewal_in(now.time_of_day)
            }
            None => {
                entry.failures += 1;
                entry.awaited &= entry.failures < HOPELESS;
                entry.retry_in(random, now.time_of_day)
            }
        };
        let hopeless = entry.failures >= HOPELESS;
        if !wanted && !was_awaited {
            self.forget(identity);
            return hopeless;
        }
        if !wanted {
            delay = delay.min(UNWANTED);
        }
        self.set_timer(identity, now.monotonic + delay);
        hopeless
    }

    /// Queues what is due.
    pub(crate) fn fire(&mut self, now: Now) {
        self.compare_clocks(now);
        while let Some((at, identity)) = self.timers.first().cloned() {
            if at > now.monotonic {
                break;
            }
            self.timers.pop_first();
            let Some(entry) = self.entries.get_mut(&identity) else {
                continue;
            };
            entry.timer = None;
            let valid = entry
                .span
                .is_some_and(|span| span.is_valid(now.time_of_day));
            let priority = match (entry.awaited, valid) {
                (true, _) => Priority::Awaited,
                (false, false) => Priority::Prefetch,
                (false, true) => Priority::Renewal,
            };
            if priority == Priority::Awaited || self.is_wanted(&identity) {
                self.enqueue(&identity, priority);
            } else {
                self.forget(&identity);
            }
        }
    }

    /// When [`fire`](Self::fire) is to be called at the latest.
    pub(crate) fn wake_at(&self) -> Instant {
        let check = self.compared.monotonic + CLOCK_CHECK;
        self.timers.first().map_or(check, |(at, _)| check.min(*at))
    }

    /// Who was forgotten since the last call.
    pub(crate) fn take_forgotten(&mut self) -> Vec<Identity> {
        std::mem::take(&mut self.forgotten)
    }

    /// Where the time of day has been corrected, certificates may be due that were not, and those
    /// that are not valid by the right one are.
    fn compare_clocks(&mut self, now: Now) {
        let passed = now.monotonic.duration_since(self.compared.monotonic);
        let expected = self.compared.time_of_day + passed;
        let difference = match now.time_of_day.duration_since(expected) {
            Ok(ahead) => ahead,
            Err(behind) => behind.duration(),
        };
        if difference <= DRIFT && passed < CLOCK_CHECK {
            return;
        }
        self.compared = now;
        if difference <= DRIFT {
            return;
        }
        let due: Vec<(Identity, Duration)> = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.step == Step::Idle && entry.failures == 0)
            .filter_map(|(identity, entry)| {
                let delay = entry.span?.half_in(now.time_of_day);
                Some((identity.clone(), delay))
            })
            .collect();
        for (identity, delay) in due {
            self.set_timer(&identity, now.monotonic + delay);
        }
    }

    fn enqueue(&mut self, identity: &Identity, priority: Priority) {
        let Some(entry) = self.entries.get_mut(identity) else {
            return;
        };
        if let Step::Queued(priority, arrival) = entry.step {
            self.queue.remove(&(priority, arrival, identity.clone()));
        }
        if let Some(at) = entry.timer.take() {
            self.timers.remove(&(at, identity.clone()));
        }
        self.arrivals += 1;
        entry.step = Step::Queued(priority, self.arrivals);
        self.queue
            .insert((priority, self.arrivals, identity.clone()));
    }

    fn set_timer(&mut self, identity: &Identity, at: Instant) {
        let Some(entry) = self.entries.get_mut(identity) else {
            return;
        };
        if let Some(before) = entry.timer.replace(at) {
            self.timers.remove(&(before, identity.clone()));
        }
        self.timers.insert((at, identity.clone()));
    }

    fn forget(&mut self, identity: &Identity) {
        let Some(entry) = self.entries.remove(identity) else {
            return;
        };
        if let Step::Queued(priority, arrival) = entry.step {
            self.queue.remove(&(priority, arrival, identity.clone()));
        }
        if let Some(at) = entry.timer {
            self.timers.remove(&(at, identity.clone()));
        }
        self.forgotten.push(identity.clone());
    }

    /// xorshift64: nothing secret depends on it.
    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random >> 8
    }
}

impl Entry {
    /// Time until the next attempt. One whose certificate ends meanwhile is tried again then.
    fn retry_in(&self, random: u64, now: SystemTime) -> Duration {
        let doublings = self.failures.saturating_sub(1).min(8);
        let longest = RETRY_FIRST.saturating_mul(1 << doublings).min(RETRY_MAX);
        let delay = longest - longest * (random % (JITTER + 1)) as u32 / 100;
        match self.span.filter(|span| span.is_valid(now)) {
            Some(span) => delay.min(span.left(now).max(RETRY_FIRST)),
            None => delay,
        }
    }
}

#[cfg(test)]
mod tests;
