//! Busy polling: when to poll for work instead of sleeping, and for how long.
//!
//! A worker that sleeps is woken by an interrupt to its CPU and a switch of tasks, which for a lone
//! message takes longer than its relaying. One that polls meanwhile answers at once, and pays with
//! its CPU. So it polls for a bounded time, and only while that finds something: after polling in
//! vain the next 1, 2, 4, up to 64 waits sleep at once.

use std::time::{Duration, Instant};

/// Waits that sleep at once after polling often in vain.
const REST_MAX: u32 = 64;
/// Polls between two readings of the clock.
const POLLS_PER_CLOCK: u32 = 32;

#[derive(Debug)]
pub(super) struct Spin {
    /// How long to poll; zero: never.
    budget: Duration,
    /// Waits that are still to sleep at once.
    rest: u32,
    /// The next rest.
    penalty: u32,
}

impl Spin {
    pub(super) fn new(budget: Duration) -> Self {
        Self {
            budget,
            rest: 0,
            penalty: 1,
        }
    }

    /// Whether the wait that is about to begin begins with polling.
    pub(super) fn is_due(&mut self) -> bool {
        if self.budget.is_zero() {
            return false;
        }
        let due = self.rest == 0;
        self.rest = self.rest.saturating_sub(1);
        due
    }

    /// Calls `has_work` until it says so, or until the budget is used up. `most` bounds it where a
    /// timer is due earlier. Returns whether there is work.
    pub(super) fn poll(
        &mut self,
        most: Option<Duration>,
        mut has_work: impl FnMut() -> bool,
    ) -> bool {
        let budget = most.map_or(self.budget, |most| most.min(self.budget));
        let started = Instant::now();
        loop {
            for _ in 0..POLLS_PER_CLOCK {
                if has_work() {
                    self.penalty = 1;
                    return true;
                }
                std::hint::spin_loop();
            }
            if started.elapsed() >= budget {
                break;
            }
        }
        self.rest = self.penalty;
        self.penalty = (self.penalty * 2).min(REST_MAX);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn polling_in_vain_becomes_rare_and_a_find_makes_up_for_it() {
        assert!(!Spin::new(Duration::ZERO).is_due());
        let mut spin = Spin::new(Duration::from_micros(1));
        let mut polled = 0;
        for _ in 0..1_000 {
            if spin.is_due() {
                polled += 1;
                assert!(!spin.poll(None, || false));
            }
        }
        assert!((15..30).contains(&polled), "{polled} of 1000 waits");
        while !spin.is_due() {}
        assert!(spin.poll(None, || true));
        assert!(spin.is_due(), "it pays again");
        let mut polls = 0;
        assert!(!spin.poll(Some(Duration::ZERO), || {
            polls += 1;
            false
        }));
        assert_eq!(polls, POLLS_PER_CLOCK, "a timer that is due ends it");
    }
}
