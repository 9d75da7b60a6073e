//! When to look for news instead of sleeping, and for how long.
//!
//! A worker that sleeps is woken by an interrupt to its CPU and a switch of tasks, which for a lone
//! message takes longer than its relaying. One that looks for news meanwhile answers at once, and
//! pays with its CPU. So it looks for a bounded time, and only while that finds something: after a
//! look in vain the next 1, 2, 4, up to 64 waits sleep at once.

use std::time::{Duration, Instant};

/// Waits that sleep at once after many looks in vain.
const REST_MAX: u32 = 64;
/// Looks between two readings of the clock.
const LOOKS: u32 = 32;

#[derive(Debug)]
pub(super) struct Spin {
    /// How long to look; zero: never.
    patience: Duration,
    /// Waits that are still to sleep at once.
    rest: u32,
    /// The next rest.
    penalty: u32,
}

impl Spin {
    pub(super) fn new(patience: Duration) -> Self {
        Self {
            patience,
            rest: 0,
            penalty: 1,
        }
    }

    /// Whether the wait that is about to begin begins with a look.
    pub(super) fn is_due(&mut self) -> bool {
        if self.patience.is_zero() {
            return false;
        }
        let due = self.rest == 0;
        self.rest = self.rest.saturating_sub(1);
        due
    }

    /// Calls `look` until it says that there is news (true), or for long enough. `most` bounds it
    /// where a timer is due earlier.
    pub(super) fn look(&mut self, most: Option<Duration>, mut look: impl FnMut() -> bool) -> bool {
        let patience = most.map_or(self.patience, |most| most.min(self.patience));
        let started = Instant::now();
        loop {
            for _ in 0..LOOKS {
                if look() {
                    self.penalty = 1;
                    return true;
                }
                std::hint::spin_loop();
            }
            if started.elapsed() >= patience {
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
    fn looks_in_vain_become_rare_and_a_find_makes_up_for_them() {
        assert!(!Spin::new(Duration::ZERO).is_due());
        let mut spin = Spin::new(Duration::from_micros(1));
        let mut looked = 0;
        for _ in 0..1_000 {
            if spin.is_due() {
                looked += 1;
                assert!(!spin.look(None, || false));
            }
        }
        assert!((15..30).contains(&looked), "{looked} of 1000 waits");
        while !spin.is_due() {}
        assert!(spin.look(None, || true));
        assert!(spin.is_due(), "it pays again");
        let mut looks = 0;
        assert!(!spin.look(Some(Duration::ZERO), || {
            looks += 1;
            false
        }));
        assert_eq!(looks, LOOKS, "a timer that is due ends it");
    }
}
